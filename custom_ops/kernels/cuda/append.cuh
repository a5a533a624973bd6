// What a new row goes through before attention, by a warp: rotary positions, the Hadamard transform, packing.
#pragma once

#include "attention_args.h"
#include "levels.cuh"
#include "reductions.cuh"
#include "row_scale.cuh"

namespace specquant_cuda {

constexpr int kLanes = kMostHeadDim / 32;  // features of a lane at most: lane, lane + 32, …

// The lane's share of a position's row of the tables. NaN for a position that no table has.
template <int lanes>
struct Angles {
  float cos[lanes], sin[lanes];
  __device__ __forceinline__ Angles(const AttentionArgs& a, int64_t position) {
    const int lane = threadIdx.x % 32, r = a.rotary;
    const bool known = position >= 0 && position < a.context;
#pragma unroll
    for (int j = 0; j < lanes; ++j) {
      const int i = lane + 32 * j, k = i < r ? i : i - r;
      const bool there = known && i < 2 * r;
      cos[j] = there ? a.cos[position * r + k] : __int_as_float(0x7FC00000);
      sin[j] = there ? a.sin[position * r + k] : 0.0f;
    }
  }
};

// Rotary positions of `row` (the warp's, in shared memory), in registers.
template <int lanes>
__device__ __forceinline__ void turn(int d, int r, const float* row, const Angles<lanes>& angles, float (&x)[lanes]) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int j = 0; j < lanes; ++j) {
    const int i = lane + 32 * j;
    if (i >= d) break;
    x[j] = row[i];
    if (i >= 2 * r) continue;
    x[j] = i < r ? __fsub_rn(__fmul_rn(row[i], angles.cos[j]), __fmul_rn(row[i + r], angles.sin[j]))
                 : __fadd_rn(__fmul_rn(row[i], angles.cos[j]), __fmul_rn(row[i - r], angles.sin[j]));
  }
}

// Butterflies at distance 1, 2, 4, …: within the warp, then within a lane. d is a power of two.
template <int lanes>
__device__ __forceinline__ void transform(int d, float (&x)[lanes]) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    if (step >= d) break;
#pragma unroll
    for (int j = 0; j < lanes; ++j) {
      if (32 * j >= d) break;
      const float other = __shfl_xor_sync(~0u, x[j], step);
      x[j] = lane & step ? __fsub_rn(other, x[j]) : __fadd_rn(x[j], other);
    }
  }
#pragma unroll
  for (int step = 1; step < lanes; step *= 2)
#pragma unroll
    for (int j = 0; j < lanes; ++j)
      if (!(j & step) && 32 * (j + step) < d) {
        const float first = x[j], second = x[j + step];
        x[j] = __fadd_rn(first, second);
        x[j + step] = __fsub_rn(first, second);
      }
  const float factor = __fdiv_rn(1.0f, __fsqrt_rn(static_cast<float>(d)));
#pragma unroll
  for (int j = 0; j < lanes; ++j) x[j] = __fmul_rn(x[j], factor);
}

// One packed row: levels over the range less `cut` at either end; NaN as scale and low if float16 cannot span it.
template <int lanes>
__device__ __forceinline__ void pack(int d, float cut_share, const float (&x)[lanes], uint8_t* levels, void* to) {
  const int lane = threadIdx.x % 32;
  float least = INFINITY, most = -INFINITY;
#pragma unroll
  for (int j = 0; j < lanes; ++j)
    if (lane + 32 * j < d) {
      least = min_nan(least, x[j]);
      most = max_nan(most, x[j]);
    }
  least = over_warp(least, Smallest());
  most = over_warp(most, Largest());
  const RowScale scale(least, most, cut_share);
#pragma unroll
  for (int j = 0; j < lanes; ++j)
    if (lane + 32 * j < d) {
      const float level = rintf(__fmul_rn(__fsub_rn(x[j], scale.start), scale.inverse));
      levels[lane + 32 * j] = static_cast<uint8_t>(scale.sound ? fminf(fmaxf(level, 0.0f), 15.0f) : 0.0f);
    }
  __syncwarp();
  uint32_t* words = static_cast<uint32_t*>(to);
  if (lane < d / 8) {
    uint32_t word = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i)
      word |= static_cast<uint32_t>(levels[4 * lane + i] | levels[d / 2 + 4 * lane + i] << 4) << 8 * i;
    words[lane] = word;
  }
  if (lane == 0) words[d / 8] = scale.stored;
}

}  // namespace specquant_cuda
