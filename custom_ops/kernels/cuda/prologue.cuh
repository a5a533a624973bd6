// The arithmetic of the prologue, the same wherever it is computed: in float32, in one order.
#pragma once

#include "levels.cuh"
#include "reductions.cuh"

namespace specquant_cuda {

constexpr int kNormThreads = 512;  // that sum a row up, wherever: in the same order

enum Prologue { kNoPrologue, kRmsNorm };

// What normed x is multiplied by, then by the norm: 1 / √(squares / n + epsilon).
__device__ __forceinline__ float inverse_rms(float squares, int n, float epsilon) {
  return __frsqrt_rn(squares / static_cast<float>(n) + epsilon);
}

// That of a row, by kNormThreads threads; scratch has a float a warp.
template <class X>
__device__ __forceinline__ float inverse_rms(const X* row, int n, float epsilon, float* scratch) {
  float sum = 0.0f;
  const bool whole = n % 8 == 0 && reinterpret_cast<uintptr_t>(row) % 16 == 0;
#pragma unroll 2
  for (int i = 8 * threadIdx.x; i < n; i += 8 * kNormThreads) {
    float v[8];
    if (whole) {
      load_written8(v, row + i);
    } else {
#pragma unroll
      for (int k = 0; k < 8; ++k) v[k] = i + k < n ? to_float(row[i + k]) : 0.0f;
    }
#pragma unroll
    for (int k = 0; k < 8; ++k) sum = fmaf(v[k], v[k], sum);
  }
  sum = over_block<kNormThreads / 32>(sum, Sum(), scratch);
  return inverse_rms(sum, n, epsilon);
}

}  // namespace specquant_cuda
