// How a slab's sums over the batch are put together: the workers of a block in order, then, by the slab's last block,
// the blocks in order.
#pragma once

#include "../cuda/last_block.cuh"
#include "tile.cuh"

namespace biasloss {

// A launch has so many counters. A slab has one of its own where they suffice; else slabs share one, and the last block
// of all of them finishes them all.
constexpr unsigned kTicketsOfLaunch = 32;
static __device__ unsigned int slab_tickets[kTickets * kTicketsOfLaunch];

// Whether this block is the last one of its slab, and so reads what all blocks have written before the call.
__device__ __forceinline__ bool is_last_block_of_slab(unsigned slot) {
  BIASLOSS_SHARED(unsigned, last, 1);
  const unsigned ticket = blockIdx.x % kTicketsOfLaunch;
  const unsigned slabs = (gridDim.x - 1 - ticket) / kTicketsOfLaunch + 1;
  __syncthreads();  // the block's results are written
  if (threadIdx.x == 0)
    last[0] = draw_last_ticket(slab_tickets + slot * kTicketsOfLaunch + ticket, gridDim.y * slabs) ? 1 : 0;
  __syncthreads();
  return last[0] != 0;
}

// Calls finish(slab) for every slab that this block is to finish.
template <class F>
__device__ __forceinline__ void finish_slabs(unsigned slot, F&& finish) {
  if (!is_last_block_of_slab(slot)) return;
  for (unsigned slab = blockIdx.x % kTicketsOfLaunch; slab < gridDim.x; slab += kTicketsOfLaunch) finish(slab);
}

// The partial results of a launch: (slabs, blocks of a slab, rows, channels of a slab); the channels of a row in the
// order of threads, so that neighbors write neighbors.
template <class Tiling, unsigned rows>
class PartialRows {
 public:
  using Acc = typename Tiling::Acc;
  using Cell = typename Tiling::Cell;

  __device__ __forceinline__ PartialRows(Acc* partial, unsigned lanes, unsigned slab, unsigned block)
      : lanes_(lanes),
        first_(partial + (int64_t(slab) * gridDim.y + block) * (rows * Tiling::kChannels) * int64_t(lanes)) {}

  __device__ __forceinline__ void store(unsigned row, unsigned lane, const Cell& cell) const {
#pragma unroll
    for (unsigned c = 0; c < Tiling::kChannels; ++c)
      first_[(row * Tiling::kChannels + c) * lanes_ + lane] = cell.value[c];
  }

  // Past the first cache: another block has written it.
  __device__ __forceinline__ Cell load(unsigned row, unsigned lane) const {
    Cell cell;
#pragma unroll
    for (unsigned c = 0; c < Tiling::kChannels; ++c)
      cell.value[c] = __ldcg(first_ + (row * Tiling::kChannels + c) * lanes_ + lane);
    return cell;
  }

 private:
  unsigned lanes_;
  Acc* first_;
};

// Adds up `rows` cells of every worker, in order, and calls sink(row, lane, total). Shared memory is free again then.
template <class Tiling, unsigned rows, class Sink>
__device__ __forceinline__ void add_workers(const Lane<Tiling>& lane, SharedPointer<typename Tiling::Cell> shared,
                                            const typename Tiling::Cell (&sum)[rows], Sink&& sink) {
  const unsigned part = lane.workers * lane.lanes;
  if (lane.worker < lane.workers)
#pragma unroll
    for (unsigned r = 0; r < rows; ++r) shared[r * part + threadIdx.x] = sum[r];
  __syncthreads();
  for (unsigned i = threadIdx.x; i < rows * lane.lanes; i += kDepthwiseThreads) {
    const unsigned row = i / lane.lanes, index = i % lane.lanes;
    typename Tiling::Cell total = shared[row * part + index];
    for (unsigned worker = 1; worker < lane.workers; ++worker) {
      const typename Tiling::Cell next = shared[row * part + worker * lane.lanes + index];
#pragma unroll
      for (unsigned c = 0; c < Tiling::kChannels; ++c) total.value[c] += next.value[c];
    }
    sink(row, index, total);
  }
  __syncthreads();
}

}  // namespace biasloss
