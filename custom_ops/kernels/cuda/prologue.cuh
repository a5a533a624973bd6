// The arithmetic of the prologue, the same wherever it is computed: in float32, in one order.
#pragma once

#include "levels.cuh"
#include "reductions.cuh"

namespace specquant_cuda {

constexpr int kNormThreads = 512;  // that sum a row up, wherever: in the same order

enum Prologue { kNoPrologue, kRmsNorm };

// √(mean(row²) + epsilon), by kNormThreads threads; scratch has a float a warp.
template <class X>
__device__ __forceinline__ float root_mean_square(const X* row, int n, float epsilon, float* scratch) {
  float sum = 0.0f;
#pragma unroll 8
  for (int i = threadIdx.x; i < n; i += kNormThreads) {
    const float value = to_float(row[i]);
    sum = fmaf(value, value, sum);
  }
  sum = over_block<kNormThreads / 32>(sum, Sum(), scratch);
  return __fsqrt_rn(sum / static_cast<float>(n) + epsilon);
}

}  // namespace specquant_cuda
