// Memory that a thread uses during one piece of work and keeps for the next: no page is faulted in twice.
#pragma once

#include <cstdint>
#include <memory>
#include <new>

namespace biasloss {

// Hands out parts of one buffer of this thread, each on a cache line of its own.
class Scratch {
 public:
  template <class T>
  T* take(int64_t count) {
    T* part = buffer_ == nullptr ? nullptr : reinterpret_cast<T*>(buffer_ + used_);
    used_ += (count * int64_t(sizeof(T)) + kLine - 1) / kLine * kLine;
    return part;
  }

  // What layout(scratch) returns. It is called twice: to add up what it takes, then to be given it. What an earlier
  // call gave on this thread is void.
  template <class Layout>
  static auto lay_out(const Layout& layout) {
    Scratch scratch;
    layout(scratch);
    scratch.buffer_ = buffer(scratch.used_);
    scratch.used_ = 0;
    return layout(scratch);
  }

 private:
  Scratch() = default;

  static constexpr int64_t kLine = 64;
  struct Free {
    void operator()(char* p) const { ::operator delete(p, std::align_val_t(kLine)); }
  };
  static char* buffer(int64_t bytes) {
    thread_local std::unique_ptr<char, Free> kept;
    thread_local int64_t size = 0;
    if (size < bytes) {
      kept.reset();
      size = 0;
      kept.reset(static_cast<char*>(::operator new(bytes, std::align_val_t(kLine))));
      size = bytes;
    }
    return kept.get();
  }

  char* buffer_ = nullptr;
  int64_t used_ = 0;
};

}  // namespace biasloss
