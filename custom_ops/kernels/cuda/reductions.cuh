// Values of threads as one.
#pragma once

#include "ptx.cuh"

namespace specquant_cuda {

struct Sum {
  __device__ float operator()(float a, float b) const { return a + b; }
};
struct Smallest {
  __device__ float operator()(float a, float b) const { return min_nan(a, b); }
};
struct Largest {
  __device__ float operator()(float a, float b) const { return max_nan(a, b); }
};

template <class F>
__device__ __forceinline__ float over_warp(float value, F combine) {
#pragma unroll
  for (int d = 16; d > 0; d /= 2) value = combine(value, __shfl_xor_sync(~0u, value, d));
  return value;
}

// Over the threads of a block of `warps` warps, in the same order every time. `scratch` has so many floats.
template <int warps, class F>
__device__ float over_block(float value, F combine, float* scratch) {
  value = over_warp(value, combine);
  __syncthreads();
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = value;
  __syncthreads();
  value = scratch[0];
  for (int i = 1; i < warps; ++i) value = combine(value, scratch[i]);
  return value;
}

}  // namespace specquant_cuda
