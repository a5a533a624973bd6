// Blocks of the orthonormal Hadamard matrix of Sylvester's order on values in shared memory, in float32.
#pragma once

#include <cuda_runtime.h>

namespace specquant_cuda {

// `steps` butterflies, at distance 2^from, twice that, …, on 2^steps values in registers: the order of walsh_hadamard in
// attention.py.
template <int steps>
__device__ __forceinline__ void butterflies(float* values, int count, int from, int rows, int stride) {
  constexpr int size = 1 << steps;
  const int each = count >> steps;
#pragma unroll 1
  for (int all = threadIdx.x; all < rows * each; all += blockDim.x) {
    const int row = rows == 1 ? 0 : all / each, i = all - row * each;
    float* base = values + row * stride + (i >> from << (from + steps)) + (i & ((1 << from) - 1));
    float v[size];
#pragma unroll
    for (int j = 0; j < size; ++j) v[j] = base[j << from];
#pragma unroll
    for (int step = 1; step < size; step *= 2)
#pragma unroll
      for (int j = 0; j < size; ++j)
        if (!(j & step)) {
          const float a = v[j], b = v[j + step];
          v[j] = a + b;
          v[j + step] = a - b;
        }
#pragma unroll
    for (int j = 0; j < size; ++j) base[j << from] = v[j];
  }
  __syncthreads();
}

// Every `block` of `count` values in each of `rows`, `stride` apart, by all threads of a block of threads, which have met
// before; the caller scales by hadamard_factor.
__device__ __forceinline__ void hadamard_blocks(float* values, int count, int block, int rows = 1, int stride = 0) {
  int from = 0;
#pragma unroll 1
  for (; 8 << from <= block; from += 3) butterflies<3>(values, count, from, rows, stride);
  if (4 << from == block) butterflies<2>(values, count, from, rows, stride);
  if (2 << from == block) butterflies<1>(values, count, from, rows, stride);
}

__device__ __forceinline__ float hadamard_factor(int block) {
  return __fdiv_rn(1.0f, __fsqrt_rn(static_cast<float>(block)));
}

}  // namespace specquant_cuda
