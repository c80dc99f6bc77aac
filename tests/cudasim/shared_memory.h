// Shared memory that is checked at every access: bounds, reads of elements nobody has written, and races.
//
// Two accesses to one element, one of them a write, are a race unless a block-wide barrier lies between them, or,
// within one warp, a __syncwarp. Shuffles order nothing, as on a GPU.
#pragma once

#include <cstddef>
#include <cstring>
#include <string>

#include "scheduler.h"

namespace cudasim {

void record_read(SharedStorage& storage, size_t index);
void record_write(SharedStorage& storage, size_t index);
SharedStorage& shared_storage(const char* file, int line, const char* name, size_t count, size_t element_size);

// What an element of a shared array is to the kernel: something to read from and to assign to.
template <class T>
class SharedReference {
 public:
  SharedReference(SharedStorage* storage, size_t index) : storage_(storage), index_(index) {}
  SharedReference(const SharedReference&) = default;

  operator T() const {
    record_read(*storage_, index_);
    T value;
    std::memcpy(&value, storage_->bytes.data() + index_ * sizeof(T), sizeof(T));
    return value;
  }

  const SharedReference& operator=(const T& value) const {
    record_write(*storage_, index_);
    std::memcpy(storage_->bytes.data() + index_ * sizeof(T), &value, sizeof(T));
    return *this;
  }

  const SharedReference& operator=(const SharedReference& other) const { return *this = T(other); }

 private:
  SharedStorage* storage_;
  size_t index_;
};

template <class T>
class SharedArray {
 public:
  explicit SharedArray(SharedStorage& storage) : storage_(&storage) {}
  SharedReference<T> operator[](size_t index) const { return {storage_, index}; }

 private:
  SharedStorage* storage_;
};

template <class T>
SharedArray<T> shared_array(const char* file, int line, const char* name, size_t count) {
  return SharedArray<T>(shared_storage(file, line, name, count, sizeof(T)));
}

}  // namespace cudasim
