// Small kernels, right ones and wrong ones, that show what the simulator sees.
#pragma once

#include "cuda/block_reduce.cuh"
#include "cuda/last_block.cuh"
#include "cuda/vector_load.cuh"

namespace cudasim {

// Right: sums in a fixed order, the last block adds up.
inline void sum_kernel(const float* x, unsigned count, float* partial, float* out) {
  BIASLOSS_SHARED(float, warp_sum, 32);
  BIASLOSS_SHARED(bool, is_last, 1);
  float sum = 0;
  for (unsigned i = blockIdx.x * blockDim.x + threadIdx.x; i < count; i += gridDim.x * blockDim.x) sum += x[i];
  sum = biasloss::block_reduce<float>(sum, warp_sum, biasloss::Add());
  if (threadIdx.x == 0) {
    partial[blockIdx.x] = sum;
    is_last[0] = biasloss::draw_last_ticket(0);
  }
  __syncthreads();
  if (!is_last[0]) return;
  float total = 0;
  for (unsigned i = threadIdx.x; i < gridDim.x; i += blockDim.x) total += __ldcg(partial + i);
  total = biasloss::block_reduce<float>(total, warp_sum, biasloss::Add());
  if (threadIdx.x == 0) *out = total;
}

// Right: every thread reads what its neighbor in the block wrote, in dynamic shared memory.
inline void rotate_kernel(float* x) {
  BIASLOSS_DYNAMIC_SHARED(float, row);
  row[threadIdx.x] = x[blockIdx.x * blockDim.x + threadIdx.x];
  __syncthreads();
  x[blockIdx.x * blockDim.x + threadIdx.x] = row[(threadIdx.x + 1) % blockDim.x];
}

// Right: the same within a warp, ordered by __syncwarp alone, and handed on by a shuffle.
inline void rotate_in_warp_kernel(float* x) {
  BIASLOSS_DYNAMIC_SHARED(float, row);
  const unsigned lane = threadIdx.x % 32, first = threadIdx.x - lane;
  row[threadIdx.x] = x[threadIdx.x];
  __syncwarp();
  const float next = row[first + (lane + 1) % 32];
  x[threadIdx.x] = next + __shfl_sync(0xffffffffu, next, 0);
}

inline void missing_barrier_kernel(float* x) {
  BIASLOSS_DYNAMIC_SHARED(float, row);
  row[threadIdx.x] = x[threadIdx.x];
  x[threadIdx.x] = row[(threadIdx.x + 1) % blockDim.x];
}

inline void write_race_kernel(float* x) {
  BIASLOSS_SHARED(float, cell, 1);
  cell[0] = x[threadIdx.x];
  __syncthreads();
  x[threadIdx.x] = cell[0];
}

inline void uninitialized_kernel(float* x) {
  BIASLOSS_SHARED(float, row, 64);
  if (threadIdx.x != 5) row[threadIdx.x] = 1;
  __syncthreads();
  x[threadIdx.x] = row[threadIdx.x];
}

inline void out_of_range_kernel(float* x) {
  BIASLOSS_SHARED(float, row, 63);
  row[threadIdx.x] = x[threadIdx.x];
}

// Half of the block waits for the other half, which waits for lanes that are not coming.
inline void deadlock_kernel(float* x) {
  if (threadIdx.x < 48) {
    __syncthreads();
  } else {
    x[threadIdx.x] = __shfl_xor_sync(0xffffffffu, x[threadIdx.x], 1);
    __syncthreads();
  }
}

inline void divergent_barrier_kernel(float* x) {
  if (threadIdx.x < 32) {
    __syncthreads();
  } else {
    __syncthreads();
  }
  x[threadIdx.x] = 1;
}

inline void left_lane_kernel(float* x) {
  if (threadIdx.x == 7) return;
  x[threadIdx.x] = __shfl_xor_sync(0xffffffffu, x[threadIdx.x], 1);
}

inline void misaligned_kernel(float* x) { x[0] = biasloss::load_vector(x + 1).get<float>(0); }

inline void global_out_of_range_kernel(float* x) { x[blockDim.x + threadIdx.x] = 1; }

// Deep enough to use most of a stack.
inline float descend(volatile float* x, unsigned depth) {
  volatile float frame[256];
  frame[depth % 256] = x[0];
  return depth == 0 ? frame[0] : descend(x, depth - 1) + frame[depth % 256];
}

inline void deep_stack_kernel(float* x) { x[threadIdx.x] = descend(x + threadIdx.x, 99); }

}  // namespace cudasim
