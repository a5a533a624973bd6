// Pairs of outputs that become one, the same wherever they are computed: in float32, in one order.
#pragma once

#include "levels.cuh"

namespace specquant_cuda {

enum Gate { kNoGate, kSiluGate, kGeluGate };

// gate / (1 + e^−w) · up: w is the gate, or what makes it GELU by tanh. Approximate to some 2^-21: nothing else runs on a
// multiprocessor while `gemm90` ends a tile.
__device__ __forceinline__ float gated(float gate, float up, int kind) {
  const float w = kind == kGeluGate ? gate * fmaf(gate * gate, 0.0713548163f, 1.59576912f) : gate;
  return gate * reciprocal_of(1.0f + power_of_two(w * -1.44269504f)) * up;
}

__device__ __forceinline__ void store_output(const Args& args, int64_t at, float y) {
  if (args.y_half) {
    static_cast<__half*>(args.y)[at] = __float2half_rn(y);
  } else {
    static_cast<float*>(args.y)[at] = y;
  }
}

// A token's output of each lane, `there` saying whether it is one; all lanes call, and have neighbouring outputs.
__device__ __forceinline__ void store_outputs(const Args& args, int token, int output, float y, bool there) {
  const int64_t row = static_cast<int64_t>(token) * args.width;
  if (!args.gate) {
    if (there) store_output(args, row + output, y);
    return;
  }
  const float up = __shfl_xor_sync(~0u, y, 1);
  if (there && output % 2 == 0) store_output(args, row + output / 2, gated(y, up, args.gate));
}

}  // namespace specquant_cuda
