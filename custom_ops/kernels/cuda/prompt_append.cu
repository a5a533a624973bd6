// The first stages of attention of prompts on Hopper: new rows to the cache as in append.cu, bit for bit, queries as
// float16; then the cache's rows as float16. Both leave what they write as wgmma reads it (prompt_attention.h).
#include "launch.h"
#include "levels.cuh"
#include "prompt_attention.h"
#include "reductions.cuh"
#include "unpack.cuh"

namespace specquant_cuda {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kShares = 4;  // warps that share a token's heads
constexpr int kEach = 8;    // features of a lane, next to each other

__device__ __forceinline__ bool aligned(const void* place) { return reinterpret_cast<uintptr_t>(place) % 16 == 0; }

// What the lanes of a row found, as one.
template <int lanes, class F>
__device__ __forceinline__ float over_row(float value, F combine) {
#pragma unroll
  for (int step = 1; step < lanes; step *= 2) value = combine(value, __shfl_xor_sync(~0u, value, step));
  return value;
}

// A lane's share of a position's row of the tables; NaN for a position that no table has.
struct Turns {
  float cos[kEach], sin[kEach];
  __device__ __forceinline__ Turns(const AttentionArgs& a, int first, int64_t position) {
    const bool known = position >= 0 && position < a.context;
#pragma unroll
    for (int j = 0; j < kEach; ++j) {
      const int i = first + j, k = i < a.rotary ? i : i - a.rotary;
      const bool there = known && i < 2 * a.rotary;
      cos[j] = there ? a.cos[position * a.rotary + k] : __int_as_float(0x7FC00000);
      sin[j] = there ? a.sin[position * a.rotary + k] : 0.0f;
    }
  }
};

template <int d>
__device__ __forceinline__ void turn(int r, int first, const Turns& turns, float* row, float (&x)[kEach]) {
  float other[kEach];
  if (r == d / 2) {
#pragma unroll
    for (int j = 0; j < kEach; ++j) other[j] = __shfl_xor_sync(~0u, x[j], d / 16);
  } else {
    __syncwarp();
#pragma unroll
    for (int j = 0; j < kEach; ++j) row[first + j] = x[j];
    __syncwarp();
#pragma unroll
    for (int j = 0; j < kEach; ++j) {
      const int i = first + j;
      other[j] = i < r ? row[i + r] : i < 2 * r ? row[i - r] : 0.0f;
    }
  }
#pragma unroll
  for (int j = 0; j < kEach; ++j) {
    const int i = first + j;
    if (i >= 2 * r) continue;
    const float mine = __fmul_rn(x[j], turns.cos[j]), others = __fmul_rn(other[j], turns.sin[j]);
    x[j] = i < r ? __fsub_rn(mine, others) : __fadd_rn(mine, others);
  }
}

// Butterflies at distance 1, 2, 4, …: within a lane, then between lanes.
template <int d>
__device__ __forceinline__ void transform(int lane, float (&x)[kEach]) {
#pragma unroll
  for (int step = 1; step < kEach; step *= 2)
#pragma unroll
    for (int j = 0; j < kEach; ++j)
      if (!(j & step)) {
        const float one = x[j], two = x[j + step];
        x[j] = __fadd_rn(one, two), x[j + step] = __fsub_rn(one, two);
      }
#pragma unroll
  for (int step = 1; step < d / kEach; step *= 2)
#pragma unroll
    for (int j = 0; j < kEach; ++j) {
      const float other = __shfl_xor_sync(~0u, x[j], step);
      x[j] = lane & step ? __fsub_rn(other, x[j]) : __fadd_rn(x[j], other);
    }
  const float factor = __fdiv_rn(1.0f, __fsqrt_rn(static_cast<float>(d)));
#pragma unroll
  for (int j = 0; j < kEach; ++j) x[j] = __fmul_rn(x[j], factor);
}

// One packed row, as `pack` of append.cuh; all lanes of the warp take part.
template <int d>
__device__ __forceinline__ void pack(int lane, float cut_share, const float (&x)[kEach], bool there, uint32_t* words) {
  constexpr int lanes = d / kEach;
  float least = x[0], most = x[0];
#pragma unroll
  for (int j = 1; j < kEach; ++j) least = min_nan(least, x[j]), most = max_nan(most, x[j]);
  least = over_row<lanes>(least, Smallest());
  most = over_row<lanes>(most, Largest());
  const float span = __fsub_rn(most, least), cut = __fmul_rn(span, cut_share);
  const __half scale = __float2half_rn(__fdiv_rn(__fsub_rn(span, __fadd_rn(cut, cut)), 15.0f));
  const __half low = __float2half_rn(__fadd_rn(least, cut));
  const float wide = __half2float(scale), start = __half2float(low);
  const bool sound = fabsf(wide) <= 65504.0f && fabsf(start) <= 65504.0f;
  const float inverse = sound && wide > 0.0f ? __fdiv_rn(1.0f, wide) : 0.0f;
  uint32_t nibbles[2] = {};
#pragma unroll
  for (int j = 0; j < kEach; ++j) {
    const float level = rintf(__fmul_rn(__fsub_rn(x[j], start), inverse));
    nibbles[j / 4] |= static_cast<uint32_t>(sound ? fminf(fmaxf(level, 0.0f), 15.0f) : 0.0f) << 8 * (j % 4);
  }
  // Features i and d / 2 + i share a byte: of a pair of lanes the lower one writes the first word, the other the second.
  const bool upper = lane & lanes / 2;
  const uint32_t other = __shfl_xor_sync(~0u, upper ? nibbles[0] : nibbles[1], lanes / 2);
  if (!there) return;
  words[lane % (lanes / 2) * 2 + upper] = upper ? other | nibbles[1] << 4 : nibbles[0] | other << 4;
  if (lane == 0) {
    const uint32_t first = __half_as_ushort(scale), second = start == 0.0f ? 0 : __half_as_ushort(low);  // −0 becomes 0
    words[d / 8] = sound ? first | second << 16 : 0x7E007E00u;
  }
}

__device__ __forceinline__ uint4 halves_of(const float (&x)[kEach]) {
  return make_uint4(bits_of(__floats2half2_rn(x[0], x[1])), bits_of(__floats2half2_rn(x[2], x[3])),
                    bits_of(__floats2half2_rn(x[4], x[5])), bits_of(__floats2half2_rn(x[6], x[7])));
}

// A warp takes the heads of a token two (or four, of 64 features) at a time, every kShares-th time.
template <int d, bool half_cache>
__global__ void __launch_bounds__(kThreads) append_kernel(const AttentionArgs a) {
  constexpr int lanes = d / kEach, rows = 32 / lanes;
  __shared__ float room[kWarps][rows][d];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % lanes, which = threadIdx.x % 32 / lanes;
  const int first = kEach * lane, all = a.heads + 2 * a.kv_heads, turned = a.heads + a.kv_heads;
  const int b = blockIdx.y, token = blockIdx.x * (kWarps / kShares) + warp / kShares;
  let_next_start();
  wait_for_previous();
  if (token >= a.sequence) return;
  const Lengths lengths = lengths_of(a, b);
  if (!lengths.sound || token >= lengths.after - lengths.before) return;
  const int64_t at = static_cast<int64_t>(b) * a.sequence + token;
  const __half* from = static_cast<const __half*>(a.qkv) + at * all * d;
  const bool wide = aligned(a.qkv);
  const Turns turns(a, first, a.position_ids[at]);
  for (int start = warp % kShares * rows; start < all; start += kShares * rows) {
    const int head = start + which;
    const bool there = head < all, query = head < a.heads, value = head >= turned;
    float x[kEach] = {};
    if (there && wide) {
      widen(*reinterpret_cast<const uint4*>(from + head * d + first), x);
    } else if (there) {
#pragma unroll
      for (int j = 0; j < kEach; ++j) x[j] = __half2float(from[head * d + first + j]);
    }
    if (start < turned) {  // the warp's rows: values are the last
      float raw[kEach];
#pragma unroll
      for (int j = 0; j < kEach; ++j) raw[j] = x[j];
      turn<d>(a.rotary, first, turns, room[warp][which], x);
      if (!query && !value && a.key_offset) {
        const float* offset = a.key_offset + (head - a.heads) * d + first;
#pragma unroll
        for (int j = 0; j < kEach; ++j) x[j] = __fsub_rn(x[j], offset[j]);
      }
      if (a.hadamard) transform<d>(lane, x);
#pragma unroll
      for (int j = 0; j < kEach; ++j) x[j] = value ? raw[j] : x[j];
    }
    if (start < a.heads) {
      float scaled[kEach], largest = 0.0f, factor, inverse;
#pragma unroll
      for (int j = 0; j < kEach; ++j) scaled[j] = x[j] * a.factor, largest = max_nan(largest, fabsf(scaled[j]));
      half_factor(over_row<lanes>(largest, Largest()), factor, inverse);
#pragma unroll
      for (int j = 0; j < kEach; ++j) scaled[j] *= inverse;
      if (query) {
        const int64_t row = (static_cast<int64_t>(b) * a.heads + head) * a.turned_rows + token;
        static_cast<uint4*>(a.turned)[piece_place(row, lane, 64, d)] = halves_of(scaled);
        if (lane == 0) a.turned_factors[row] = factor;
      }
    }
    if (start + rows <= a.heads) continue;
    const int kv_head = value ? head - turned : head - a.heads;
    const int64_t row = (static_cast<int64_t>(b) * a.kv_heads + kv_head) * a.present_rows + lengths.before + token;
    void* cache = value ? a.present_value : a.present_key;
    if constexpr (half_cache) {
      if (query || !there) continue;
      const uint4 packed = halves_of(x);
      uint32_t* to = static_cast<uint32_t*>(cache) + (row * d + first) / 2;
      if (aligned(cache)) {
        *reinterpret_cast<uint4*>(to) = packed;
      } else {
        to[0] = packed.x, to[1] = packed.y, to[2] = packed.z, to[3] = packed.w;
      }
    } else {
      pack<d>(lane, a.cut, x, there && !query, static_cast<uint32_t*>(cache) + row * (d / 8 + 1));
    }
  }
}

// low + scale · level within what float16 holds: only rounding, or a key that was turned, comes beyond.
__device__ __forceinline__ float level_value(uint32_t level, float2 parameters) {
  const float value = fmaf(static_cast<float>(level), parameters.x, parameters.y);
  return fabsf(value) > 65504.0f ? copysignf(65504.0f, value) : value;
}

// Features [8p, 8p + 8) and [d/2 + 8p, …) of a cached token a thread. Rows up to the end of the last tile become zeros.
template <int d, bool half_cache>
__global__ void __launch_bounds__(kThreads) unpack_kernel(const AttentionArgs a, int first_item) {
  constexpr int threads = d / 16, tokens = kThreads / threads;  // of a token, of a block
  const int item = first_item + blockIdx.y / 2;
  const bool value = blockIdx.y % 2;
  const int piece = threadIdx.x % threads;
  let_next_start();
  wait_for_previous();
  const Lengths lengths = lengths_of(a, item / a.kv_heads);
  if (!lengths.sound) return;
  const int64_t token = static_cast<int64_t>(blockIdx.x) * tokens + threadIdx.x / threads;
  if (token >= round_up(lengths.after, kPromptTokens)) return;
  uint4 low = make_uint4(0, 0, 0, 0), high = low;
  const int64_t row = static_cast<int64_t>(item) * a.present_rows + token;
  const void* cache = value ? a.present_value : a.present_key;
  if (token < lengths.after) {
    if constexpr (half_cache) {
      const uint32_t* from = static_cast<const uint32_t*>(cache) + row * (d / 2) + 4 * piece;
      if (aligned(cache)) {
        low = *reinterpret_cast<const uint4*>(from), high = *reinterpret_cast<const uint4*>(from + d / 4);
      } else {
        low = make_uint4(from[0], from[1], from[2], from[3]);
        high = make_uint4(from[d / 4], from[d / 4 + 1], from[d / 4 + 2], from[d / 4 + 3]);
      }
    } else {
      const uint32_t* from = static_cast<const uint32_t*>(cache) + row * (d / 8 + 1);
      const float2 parameters = __half22float2(half2_of(from[d / 8]));
      float lows[kEach], highs[kEach];
#pragma unroll
      for (int j = 0; j < kEach; ++j) {
        const uint32_t byte = from[2 * piece + j / 4] >> 8 * (j % 4) & 255;
        lows[j] = level_value(byte & 15, parameters), highs[j] = level_value(byte >> 4, parameters);
      }
      low = halves_of(lows), high = halves_of(highs);
    }
  }
  uint4* to = static_cast<uint4*>(a.unpacked) + (blockIdx.y / 2 * 2 + value) * (unpacked_bytes(a.present_rows, d) / 32);
  to[piece_place(token, piece, kPromptTokens, d)] = low;
  to[piece_place(token, piece + threads, kPromptTokens, d)] = high;
}

}  // namespace

cudaError_t prompt_append(const AttentionArgs& a, cudaStream_t stream) {
  const dim3 grid(ceil_div(a.sequence, kWarps / kShares), a.batch);
  const auto start = [&](auto kernel) { return launch_early(kernel, grid, kThreads, 0, a.early, stream, a); };
  if (a.d == 64) return a.half_cache ? start(append_kernel<64, true>) : start(append_kernel<64, false>);
  return a.half_cache ? start(append_kernel<128, true>) : start(append_kernel<128, false>);
}

cudaError_t prompt_unpack(const AttentionArgs& a, int first_item, int items, cudaStream_t stream) {
  const int tokens = kThreads * 16 / a.d;
  const dim3 grid(ceil_div(static_cast<int>(round_up(a.present_rows, kPromptTokens)), tokens), 2 * items);
  const auto start = [&](auto kernel) {
    return launch_early(kernel, grid, kThreads, 0, a.early, stream, a, first_item);
  };
  if (a.d == 64) return a.half_cache ? start(unpack_kernel<64, true>) : start(unpack_kernel<64, false>);
  return a.half_cache ? start(unpack_kernel<128, true>) : start(unpack_kernel<128, false>);
}

}  // namespace specquant_cuda
