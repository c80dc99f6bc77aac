// How a grid finds its last block: every block draws a ticket when its partial results are written.
#pragma once

#include "portable.cuh"

namespace biasloss {

// Static, hence zero when the library is loaded; atomicInc wraps to zero at the last block of each launch, so that
// nothing ever has to be cleared. Which launch may use which counter: ticket_slots.h.
constexpr unsigned kTickets = 4096;
static __device__ unsigned int tickets[kTickets];

// Whether `blocks` blocks have drawn with this one. Called by the one thread of a block that has written the block's
// partial results, or that has met those that have at a barrier.
__device__ __forceinline__ bool draw_last_ticket(unsigned int* counter, unsigned blocks) {
  __threadfence();
  return atomicInc(counter, blocks - 1) == blocks - 1;
}

// Of all blocks of a launch in one dimension.
__device__ __forceinline__ bool draw_last_ticket(unsigned slot) { return draw_last_ticket(&tickets[slot], gridDim.x); }

}  // namespace biasloss
