// A stack to run on, and the switch from one to another.
#pragma once

#include <sys/mman.h>

#include <cstddef>
#include <cstdint>
#include <new>
#include <utility>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#if !defined(__x86_64__) && !defined(__aarch64__)
#include <ucontext.h>
#endif

namespace cudasim {

constexpr size_t kPageSize = 4096;
constexpr size_t kStackSize = size_t(256) << 10;

// A page below the stack is left unmapped for access: an overflow faults at once.
class Stack {
 public:
  Stack()
      : base_(static_cast<char*>(
            mmap(nullptr, kStackSize, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0))) {
    if (base_ == MAP_FAILED || mprotect(base_, kPageSize, PROT_NONE) != 0) throw std::bad_alloc();
  }
  Stack(Stack&& other) noexcept : base_(std::exchange(other.base_, nullptr)) {}
  Stack& operator=(Stack&&) = delete;
  ~Stack() {
    if (base_ != nullptr) munmap(base_, kStackSize);
  }

  char* low() const { return base_ + kPageSize; }
  char* top() const { return base_ + kStackSize; }
  size_t size() const { return kStackSize - kPageSize; }

 private:
  char* base_;
};

// Where a suspended flow of control goes on. The main flow uses the stack that it had.
struct Fiber {
#if defined(__x86_64__) || defined(__aarch64__)
  void* stack_pointer = nullptr;
#else
  ucontext_t context;
#endif
  const void* stack_low = nullptr;
  size_t stack_size = 0;
  void* sanitizer_state = nullptr;
};

// `entry` never returns.
void prepare(Fiber& fiber, const Stack& stack, void (*entry)());
void switch_fiber(Fiber& from, Fiber& to);
// The first thing that a fresh fiber does.
void arrive_in_fresh_fiber(Fiber& from);

}  // namespace cudasim
