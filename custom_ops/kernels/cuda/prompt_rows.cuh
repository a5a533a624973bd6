// What a new row goes through before attention of prompts on Hopper: as append.cuh, bit for bit, by fewer instructions.
//
// d / 16 lanes share a row. A lane holds features 8 · lane … + 7 and those d / 2 further: what rotary positions turn
// together, what the last step of the Hadamard transform adds, and what shares a byte of the cache.
#pragma once

#include "levels.cuh"
#include "prompt_attention.h"
#include "reductions.cuh"
#include "row_scale.cuh"
#include "unpack.cuh"

namespace specquant_cuda {

constexpr int kEach = 8;  // features of a lane that lie next to each other

__device__ __forceinline__ bool aligned(const void* place) { return reinterpret_cast<uintptr_t>(place) % 16 == 0; }

template <int d>
struct NewRow {
  static constexpr int kLanes = d / (2 * kEach), kRows = 32 / kLanes;  // of a warp
  float x[2 * kEach];

  __device__ __forceinline__ static int lane() { return threadIdx.x % kLanes; }
  __device__ __forceinline__ static int feature(int j) { return kEach * lane() + j % kEach + j / kEach * (d / 2); }

  // What the lanes of a row found, as one.
  template <class F>
  __device__ __forceinline__ static float over_row(float value, F combine) {
#pragma unroll
    for (int step = 1; step < kLanes; step *= 2) value = combine(value, __shfl_xor_sync(~0u, value, step));
    return value;
  }

  // The lane's share of a position's row of the tables, of the usual case; NaN for a position that no table has.
  struct Turns {
    float cos[kEach], sin[kEach];
    __device__ __forceinline__ Turns(const AttentionArgs& a, int64_t position) {
      const bool known = position >= 0 && position < a.context && a.rotary == d / 2;
      const float4* const from[2] = {reinterpret_cast<const float4*>(a.cos), reinterpret_cast<const float4*>(a.sin)};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float other = i < 2 ? __int_as_float(0x7FC00000) : 0.0f;
        float4 four = make_float4(other, other, other, other);
        if (known) four = from[i / 2][position * (d / 8) + 2 * lane() + i % 2];
        float* const to = (i < 2 ? cos : sin) + 4 * (i % 2);
        to[0] = four.x, to[1] = four.y, to[2] = four.z, to[3] = four.w;
      }
    }
  };

  // Rotary positions where every feature turns.
  __device__ __forceinline__ void turn(const Turns& turns) {
#pragma unroll
    for (int j = 0; j < kEach; ++j) {
      const float one = x[j], two = x[kEach + j];
      x[j] = __fsub_rn(__fmul_rn(one, turns.cos[j]), __fmul_rn(two, turns.sin[j]));
      x[kEach + j] = __fadd_rn(__fmul_rn(two, turns.cos[j]), __fmul_rn(one, turns.sin[j]));
    }
  }

  // Where only the first 2 · rotary do. room: the row's, in shared memory.
  __device__ __forceinline__ void turn_some(const AttentionArgs& a, int64_t position, float* room) {
    const int r = a.rotary;
    const bool known = position >= 0 && position < a.context;
    __syncwarp();
#pragma unroll
    for (int j = 0; j < 2 * kEach; ++j) room[feature(j)] = x[j];
    __syncwarp();
#pragma unroll
    for (int j = 0; j < 2 * kEach; ++j) {
      const int i = feature(j), k = i < r ? i : i - r;
      if (i >= 2 * r) continue;
      const float cos = known ? a.cos[position * r + k] : __int_as_float(0x7FC00000);
      const float other = i < r ? -room[i + r] : room[i - r];
      x[j] = __fadd_rn(__fmul_rn(x[j], cos), __fmul_rn(other, known ? a.sin[position * r + k] : 0.0f));
    }
  }

  // offset: of the row's head.
  __device__ __forceinline__ void subtract(const float* offset) {
#pragma unroll
    for (int j = 0; j < 2 * kEach; j += 4) {
      const float4 four = *reinterpret_cast<const float4*>(offset + feature(j));
      x[j] = __fsub_rn(x[j], four.x), x[j + 1] = __fsub_rn(x[j + 1], four.y);
      x[j + 2] = __fsub_rn(x[j + 2], four.z), x[j + 3] = __fsub_rn(x[j + 3], four.w);
    }
  }

  // Butterflies at distance 1, 2, 4, …: within a lane, between lanes, and at last within a lane again.
  __device__ __forceinline__ void transform(float factor) {
    const auto within = [&](int step) __attribute__((always_inline)) {
#pragma unroll
      for (int j = 0; j < 2 * kEach; ++j)
        if (!(j & step)) {
          const float one = x[j], two = x[j + step];
          x[j] = __fadd_rn(one, two), x[j + step] = __fsub_rn(one, two);
        }
    };
    within(1), within(2), within(4);
#pragma unroll
    for (int step = 1; step < kLanes; step *= 2) {
      const float sign = lane() & step ? -1.0f : 1.0f;
#pragma unroll
      for (int j = 0; j < 2 * kEach; ++j)
        x[j] = fmaf(x[j], sign, __shfl_xor_sync(~0u, x[j], step));  // their sum or difference, rounded once
    }
    within(kEach);
#pragma unroll
    for (int j = 0; j < 2 * kEach; ++j) x[j] = __fmul_rn(x[j], factor);
  }

  // A packed row, and in x what it holds, within what float16 holds: only rounding comes beyond. All lanes of the warp
  // take part.
  __device__ __forceinline__ void pack(float cut_share, bool there, uint32_t* words) {
    float least = x[0], most = x[0];
#pragma unroll
    for (int j = 1; j < 2 * kEach; ++j) least = min_nan(least, x[j]), most = max_nan(most, x[j]);
    least = over_row(least, Smallest());
    most = over_row(most, Largest());
    const RowScale scale(least, most, cut_share);
    const float factor = scale.sound ? scale.wide : __int_as_float(0x7FC00000), offset = scale.sound ? scale.start : 0.0f;
    uint32_t whole[2 * kEach];
#pragma unroll
    for (int j = 0; j < 2 * kEach; ++j) {  // clipped, then rounded by kMagic: conversions are slow. NaN becomes 0
      const float level = fminf(fmaxf(__fmul_rn(__fsub_rn(x[j], scale.start), scale.inverse), 0.0f), 15.0f);
      const float rounded = __fadd_rn(level, kMagic);
      whole[j] = __float_as_uint(rounded);
      x[j] = fmaf(__fsub_rn(rounded, kMagic), factor, offset);
    }
    if (!(fmaf(15.0f, factor, offset) <= 65504.0f)) {
#pragma unroll
      for (int j = 0; j < 2 * kEach; ++j) x[j] = min_nan(x[j], 65504.0f);
    }
    if (!there) return;
#pragma unroll
    for (int i = 0; i < kEach; i += 4)
      words[(kEach * lane() + i) / 4] =
          pack_bytes(whole[i], whole[i + 1], whole[i + 2], whole[i + 3]) |
          pack_bytes(whole[kEach + i], whole[kEach + i + 1], whole[kEach + i + 2], whole[kEach + i + 3]) << 4;
    if (lane() == 0) words[d / 8] = scale.stored;
  }

  // The lane's two runs as float16.
  __device__ __forceinline__ uint4 halves(int run) const {
    const float* v = x + kEach * run;
    return make_uint4(bits_of(__floats2half2_rn(v[0], v[1])), bits_of(__floats2half2_rn(v[2], v[3])),
                      bits_of(__floats2half2_rn(v[4], v[5])), bits_of(__floats2half2_rn(v[6], v[7])));
  }
};

}  // namespace specquant_cuda
