// How a grid finds its last block: every block draws a ticket when its partial results are written.
#pragma once

#include "portable.cuh"

namespace biasloss {

// Static, hence zero when the library is loaded; atomicInc wraps to zero at the last block of each launch, so that
// nothing ever has to be cleared. Which launch may use which counter: ticket_slots.h.
constexpr unsigned kTickets = 4096;
static __device__ unsigned int tickets[kTickets];

// Called by the one thread of a block that has written the block's partial results.
__device__ __forceinline__ bool draw_last_ticket(unsigned slot) {
  __threadfence();
  return atomicInc(&tickets[slot], gridDim.x - 1) == gridDim.x - 1;
}

}  // namespace biasloss
