// The arithmetic of prologues, the same wherever they are computed: in float32, in one order.
#pragma once

#include "levels.cuh"
#include "reductions.cuh"

namespace specquant_cuda {

constexpr int kNormThreads = 512;  // that sum a row up, wherever: in the same order

enum Prologue { kNoPrologue, kRmsNorm, kSiluGate, kGeluGate };

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

// gate / (1 + e^−w) · up: w is the gate, or what makes it GELU by tanh. Approximate to some 2^-21: of a prompt these are the
// most instructions of the first stage.
__device__ __forceinline__ float gated(float gate, float up, int gelu) {
  const float w = gelu ? gate * fmaf(gate * gate, 0.0713548163f, 1.59576912f) : gate;
  return gate * reciprocal_of(1.0f + power_of_two(w * -1.44269504f)) * up;
}

}  // namespace specquant_cuda
