#include "fiber.h"

#if defined(__x86_64__)
// Callee-saved registers go to the old stack and come from the new one.
extern "C" void cudasim_swap_stacks(void** old_stack_pointer, void* new_stack_pointer);
asm(R"(
.text
.globl cudasim_swap_stacks
.hidden cudasim_swap_stacks
.type cudasim_swap_stacks, @function
cudasim_swap_stacks:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size cudasim_swap_stacks, . - cudasim_swap_stacks
)");
#elif defined(__aarch64__)
extern "C" void cudasim_swap_stacks(void** old_stack_pointer, void* new_stack_pointer);
asm(R"(
.text
.globl cudasim_swap_stacks
.hidden cudasim_swap_stacks
.type cudasim_swap_stacks, %function
cudasim_swap_stacks:
  sub sp, sp, #160
  stp x19, x20, [sp, #0]
  stp x21, x22, [sp, #16]
  stp x23, x24, [sp, #32]
  stp x25, x26, [sp, #48]
  stp x27, x28, [sp, #64]
  stp x29, x30, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mov x9, sp
  str x9, [x0]
  mov sp, x1
  ldp x19, x20, [sp, #0]
  ldp x21, x22, [sp, #16]
  ldp x23, x24, [sp, #32]
  ldp x25, x26, [sp, #48]
  ldp x27, x28, [sp, #64]
  ldp x29, x30, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  add sp, sp, #160
  ret
.size cudasim_swap_stacks, . - cudasim_swap_stacks
)");
#endif

namespace cudasim {

void prepare(Fiber& fiber, const Stack& stack, void (*entry)()) {
  fiber = Fiber();
  fiber.stack_low = stack.low();
  fiber.stack_size = stack.size();
#if defined(__SANITIZE_ADDRESS__)
  // Whoever used the stack before may have been abandoned in the middle, after a violation elsewhere.
  ASAN_UNPOISON_MEMORY_REGION(stack.low(), stack.size());
#endif
#if defined(__x86_64__)
  // The return address and, below it, six saved registers. Once they are popped the stack pointer is 8 below a multiple
  // of 16, as a function finds it after a call.
  void** top = reinterpret_cast<void**>(stack.top()) - 1;
  *--top = reinterpret_cast<void*>(entry);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  fiber.stack_pointer = top;
#elif defined(__aarch64__)
  uint64_t* frame = reinterpret_cast<uint64_t*>(stack.top() - 160);
  for (int i = 0; i < 20; ++i) frame[i] = 0;
  frame[11] = reinterpret_cast<uint64_t>(entry);  // x30, where `ret` goes
  fiber.stack_pointer = frame;
#else
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = stack.low();
  fiber.context.uc_stack.ss_size = stack.size();
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, entry, 0);
#endif
}

void arrive_in_fresh_fiber([[maybe_unused]] Fiber& from) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &from.stack_low, &from.stack_size);
#endif
}

void switch_fiber(Fiber& from, Fiber& to) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&from.sanitizer_state, to.stack_low, to.stack_size);
#endif
#if defined(__x86_64__) || defined(__aarch64__)
  cudasim_swap_stacks(&from.stack_pointer, to.stack_pointer);
#else
  swapcontext(&from.context, &to.context);
#endif
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(from.sanitizer_state, nullptr, nullptr);
#endif
}

}  // namespace cudasim
