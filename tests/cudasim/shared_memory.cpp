#include "shared_memory.h"

namespace cudasim {

namespace {

SharedAccess access_now() {
  const Thread& thread = scheduler().current();
  return {&thread, thread.block_epoch, thread.warp_epoch};
}

bool same_warp(const SharedAccess& a, const SharedAccess& b) { return a.thread->index / 32 == b.thread->index / 32; }

bool ordered(const SharedAccess& earlier, const SharedAccess& later) {
  return earlier.thread == later.thread || earlier.block_epoch != later.block_epoch ||
         (same_warp(earlier, later) && earlier.warp_epoch != later.warp_epoch);
}

std::string element_name(const SharedStorage& storage, size_t index) {
  return storage.name + "[" + std::to_string(index) + "]";
}

SharedStorage::Element& element_at(SharedStorage& storage, size_t index) {
  if (index >= storage.elements.size())
    scheduler().fail("shared memory out of range: " + element_name(storage, index) + " of " +
                     std::to_string(storage.elements.size()) + " elements");
  return storage.elements[index];
}

void check_order(const SharedStorage& storage, size_t index, const SharedAccess& earlier, const SharedAccess& now,
                 const char* what) {
  if (!ordered(earlier, now))
    scheduler().fail("race: " + element_name(storage, index) + " " + what + " thread " +
                     std::to_string(earlier.thread->index) + " with no barrier between");
}

}  // namespace

SharedStorage& shared_storage(const char* file, int line, const char* name, size_t count, size_t element_size) {
  Block& block = *scheduler().current().block;
  SharedStorage& storage = block.shared[{file, line}];
  if (storage.elements.empty()) {
    block.shared_bytes += (count * element_size + 15) / 16 * 16;
    if (block.shared_bytes > scheduler().most_shared_bytes())
      scheduler().fail("a block has " + std::to_string(block.shared_bytes) +
                       " bytes of shared memory, the device gives " + std::to_string(scheduler().most_shared_bytes()));
    storage.name = std::string(name) + " (" + site(file, line) + ")";
    storage.elements.resize(count);
    storage.bytes.assign(count * element_size, 0xff);
  }
  return storage;
}

void record_read(SharedStorage& storage, size_t index) {
  scheduler().yield();
  SharedStorage::Element& element = element_at(storage, index);
  const SharedAccess now = access_now();
  if (!element.written) scheduler().fail("uninitialized shared memory read: " + element_name(storage, index));
  check_order(storage, index, element.last_write, now, "is read here, written by");
  element.reads.push_back(now);
}

void record_write(SharedStorage& storage, size_t index) {
  scheduler().yield();
  SharedStorage::Element& element = element_at(storage, index);
  const SharedAccess now = access_now();
  if (element.written) check_order(storage, index, element.last_write, now, "is written here and by");
  for (const SharedAccess& read : element.reads) check_order(storage, index, read, now, "is written here, read by");
  element.reads.clear();
  element.written = true;
  element.last_write = now;
}

}  // namespace cudasim
