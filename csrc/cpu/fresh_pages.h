// Large outputs: their pages from the system many at a time instead of one page fault each.
#pragma once

#include <algorithm>
#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace biasloss {

// Below this an output's page faults are not worth asking about.
constexpr int64_t kLeastBytesToAskAbout = 1 << 20;

// Has the system back `bytes` at `data`, which are about to be written, with pages, if any are missing. What lies there
// stays. For parts of a few hundred KiB: the system clears them, which leaves them in cache. Huge pages would take
// fewer faults still, but where the memory of a virtual machine is backed late they were seen to cost several times as
// much.
inline void take_pages([[maybe_unused]] const void* data, [[maybe_unused]] int64_t bytes) {
#if defined(__linux__)
  constexpr int kPopulateForWriting = 23;  // MADV_POPULATE_WRITE: Linux 5.14. An older one refuses, and nothing is lost
  constexpr int64_t kPage = 4096, kMostPages = 256;
  const auto address = reinterpret_cast<intptr_t>(data), end = address + bytes;
  for (intptr_t begin = address / kPage * kPage; begin < end; begin += kMostPages * kPage) {
    const int64_t pages = std::min((end - begin + kPage - 1) / kPage, kMostPages);
    unsigned char resident[kMostPages];
    if (mincore(reinterpret_cast<void*>(begin), pages * kPage, resident) != 0) return;
    if (std::any_of(resident, resident + pages, [](unsigned char page) { return (page & 1) == 0; }))
      madvise(reinterpret_cast<void*>(begin), pages * kPage, kPopulateForWriting);
  }
#endif
}

}  // namespace biasloss
