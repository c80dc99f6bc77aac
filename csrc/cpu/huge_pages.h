// Large outputs on huge pages: a page fault for every 2 MiB of fresh memory instead of every 4 KiB.
#pragma once

#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace biasloss {

constexpr int64_t kHugePageBytes = 2 << 20;
// glibc maps larger memory anew for every allocation. Smaller memory it mostly hands out again, without a page fault.
constexpr int64_t kLeastBytesToAdvise = 32 << 20;

// Asks for huge pages behind memory that is about to be overwritten, where the system leaves that to programs
// (/sys/kernel/mm/transparent_hugepage/enabled is "madvise"). Only whole ones: no byte becomes resident that would not
// have been. What lies in the memory, if anything does, stays.
inline void advise_huge_pages([[maybe_unused]] void* data, [[maybe_unused]] int64_t bytes) {
#if defined(__linux__)
  if (bytes < kLeastBytesToAdvise) return;
  const auto address = reinterpret_cast<uintptr_t>(data);
  const uintptr_t begin = (address + kHugePageBytes - 1) / kHugePageBytes * kHugePageBytes;
  const uintptr_t end = (address + bytes) / kHugePageBytes * kHugePageBytes;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);  // may be refused: no matter
#endif
}

}  // namespace biasloss
