// The first stages of attention of prompts on Hopper: new rows to the cache as in append.cu, bit for bit, and these rows
// and their queries as float16; then the cache's older rows as float16. All of that lies as wgmma reads it
// (prompt_attention.h).
#include <algorithm>

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
constexpr int kUnpackBlocks = 2048;  // enough for every GPU's memory

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
  if (r == d / 2) {  // the usual case: every feature turns, and a lane's all turn the same way
    const float sign = first < r ? -1.0f : 1.0f;
#pragma unroll
    for (int j = 0; j < kEach; ++j) other[j] = sign * __shfl_xor_sync(~0u, x[j], d / 16);
  } else {
    __syncwarp();
#pragma unroll
    for (int j = 0; j < kEach; ++j) row[first + j] = x[j];
    __syncwarp();
#pragma unroll
    for (int j = 0; j < kEach; ++j) {
      const int i = first + j;
      other[j] = i < r ? -row[i + r] : i < 2 * r ? row[i - r] : 0.0f;
    }
  }
#pragma unroll
  for (int j = 0; j < kEach; ++j)
    if (r == d / 2 || first + j < 2 * r)
      x[j] = __fadd_rn(__fmul_rn(x[j], turns.cos[j]), __fmul_rn(other[j], turns.sin[j]));
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
      x[j] = fmaf(x[j], lane & step ? -1.0f : 1.0f, other);  // their sum or difference, rounded once
    }
  const float factor = __fdiv_rn(1.0f, __fsqrt_rn(static_cast<float>(d)));
#pragma unroll
  for (int j = 0; j < kEach; ++j) x[j] = __fmul_rn(x[j], factor);
}

// low + scale · level within what float16 holds: only rounding, or a key that was turned, comes beyond.
__device__ __forceinline__ float level_value(uint32_t level, float2 parameters) {
  const float value = fmaf(static_cast<float>(level), parameters.x, parameters.y);
  return fabsf(value) > 65504.0f ? copysignf(65504.0f, value) : value;
}

// One packed row, as `pack` of append.cuh, and in x what it holds; all lanes of the warp take part.
template <int d>
__device__ __forceinline__ void pack(int lane, float cut_share, float (&x)[kEach], bool there, uint32_t* words) {
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
  const float2 parameters = sound ? make_float2(wide, start) : make_float2(__int_as_float(0x7FC00000), 0.0f);
  uint32_t nibbles[2] = {};
#pragma unroll
  for (int j = 0; j < kEach; ++j) {  // clipped, then rounded by kMagic: conversions are slow
    const float level = sound ? fminf(fmaxf(__fmul_rn(__fsub_rn(x[j], start), inverse), 0.0f), 15.0f) : 0.0f;
    const uint32_t whole = __float_as_uint(__fadd_rn(level, kMagic)) & 15;
    nibbles[j / 4] |= whole << 8 * (j % 4);
    x[j] = level_value(whole, parameters);
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

// Keys or values of the item-th kv head at hand, in float16.
template <int d>
__device__ __forceinline__ uint4* unpacked_of(const AttentionArgs& a, int item, bool value) {
  return static_cast<uint4*>(a.unpacked) + (2 * item + value) * (unpacked_bytes(a.present_rows, d) / 32);
}

// Eight features of a head as they lie; wide: at a multiple of 16 bytes.
__device__ __forceinline__ uint4 raw_of(const __half* from, bool wide) {
  if (wide) return *reinterpret_cast<const uint4*>(from);
  const unsigned short* bits = reinterpret_cast<const unsigned short*>(from);
  return make_uint4(bits[0] | bits[1] << 16, bits[2] | bits[3] << 16, bits[4] | bits[5] << 16, bits[6] | bits[7] << 16);
}

// Of `items` kv heads of the batch from `first_item` on. A warp takes the heads of a token two (or four, of 64 features)
// at a time, every kShares-th time: queries, then keys, then values; the next ones are on their way meanwhile.
template <int d, bool half_cache>
__global__ void __launch_bounds__(kThreads) append_kernel(const AttentionArgs a, int first_item, int items) {
  constexpr int lanes = d / kEach, rows = 32 / lanes;
  __shared__ float room[kWarps][rows][d];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % lanes, which = threadIdx.x % 32 / lanes;
  const int first = kEach * lane, b = first_item / a.kv_heads + blockIdx.y, item = b * a.kv_heads;
  const int from_head = max(first_item - item, 0), kv_heads = min(first_item + items - item, a.kv_heads) - from_head;
  const int queries = kv_heads * a.group, turned = queries + kv_heads, all = turned + kv_heads;
  const int token = blockIdx.x * (kWarps / kShares) + warp / kShares;
  let_next_start();
  wait_for_previous();
  if (token >= a.sequence) return;
  const Lengths lengths = lengths_of(a, b);
  if (!lengths.sound || token >= lengths.after - lengths.before) return;
  const int64_t at = static_cast<int64_t>(b) * a.sequence + token;
  const __half* row_of_token = static_cast<const __half*>(a.qkv) + at * (a.heads + 2 * a.kv_heads) * d + first;
  const bool wide = aligned(a.qkv);
  // Where a head of the loop lies in a row of qkv; past the last one: somewhere.
  const auto head_of = [&](int i) {
    return i < queries  ? from_head * a.group + i
           : i < turned ? a.heads + from_head + i - queries
                        : a.heads + a.kv_heads + from_head + min(i - turned, kv_heads - 1);
  };
  const Turns turns(a, first, a.position_ids[at]);
  int start = warp % kShares * rows;
  uint4 raw = raw_of(row_of_token + head_of(start + which) * d, wide);
  for (; start < all; start += kShares * rows) {
    const int i = start + which;
    const bool there = i < all, query = i < queries, value = i >= turned;
    float x[kEach];
    widen(raw, x);
    if (start + kShares * rows < all) raw = raw_of(row_of_token + head_of(i + kShares * rows) * d, wide);
    if (start < turned) {  // the warp's rows: values are the last
      float given[kEach];
#pragma unroll
      for (int j = 0; j < kEach; ++j) given[j] = x[j];
      turn<d>(a.rotary, first, turns, room[warp][which], x);
      if (!query && !value && a.key_offset) {
        const float* offset = a.key_offset + (from_head + i - queries) * d + first;
#pragma unroll
        for (int j = 0; j < kEach; ++j) x[j] = __fsub_rn(x[j], offset[j]);
      }
      if (a.hadamard) transform<d>(lane, x);
#pragma unroll
      for (int j = 0; j < kEach; ++j) x[j] = value ? given[j] : x[j];
    }
    if (start < queries) {
      float scaled[kEach], largest = 0.0f, factor, inverse;
#pragma unroll
      for (int j = 0; j < kEach; ++j) scaled[j] = x[j] * a.factor, largest = max_nan(largest, fabsf(scaled[j]));
      half_factor(over_row<lanes>(largest, Largest()), factor, inverse);
#pragma unroll
      for (int j = 0; j < kEach; ++j) scaled[j] *= inverse;
      if (query) {
        const int64_t row = (static_cast<int64_t>(b) * a.heads + head_of(i)) * a.turned_rows + token;
        static_cast<uint4*>(a.turned)[piece_place(row, lane, 64, d)] = halves_of(scaled);
        if (lane == 0) a.turned_factors[row] = factor;
      }
    }
    if (start + rows <= queries) continue;
    const int kv_head = from_head + i - (value ? turned : queries), position = lengths.before + token;
    const int64_t row = (static_cast<int64_t>(item) + kv_head) * a.present_rows + position;
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
    if (there && !query) {
      uint4* to = unpacked_of<d>(a, item + kv_head - first_item, value);
      to[piece_place(position, lane, kPromptTokens, d)] = halves_of(x);
    }
  }
}

// Features [8p, 8p + 8) and [d/2 + 8p, …) of a cached token a thread: of rows that are older than the call, and zeros up to
// the end of the last tile.
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
  const int rest = static_cast<int>(round_up(lengths.after, kPromptTokens)) - lengths.after;
  uint4* to = unpacked_of<d>(a, item - first_item, value);
  const void* cache = value ? a.present_value : a.present_key;
  for (int i = blockIdx.x * tokens + threadIdx.x / threads; i < lengths.before + rest; i += gridDim.x * tokens) {
    const bool old = i < lengths.before;
    const int token = old ? i : lengths.after + i - lengths.before;
    uint4 low = make_uint4(0, 0, 0, 0), high = low;
    const int64_t row = static_cast<int64_t>(item) * a.present_rows + token;
    if (old && half_cache) {
      const uint32_t* from = static_cast<const uint32_t*>(cache) + row * (d / 2) + 4 * piece;
      if (aligned(cache)) {
        low = *reinterpret_cast<const uint4*>(from), high = *reinterpret_cast<const uint4*>(from + d / 4);
      } else {
        low = make_uint4(from[0], from[1], from[2], from[3]);
        high = make_uint4(from[d / 4], from[d / 4 + 1], from[d / 4 + 2], from[d / 4 + 3]);
      }
    } else if (old) {
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
    to[piece_place(token, piece, kPromptTokens, d)] = low;
    to[piece_place(token, piece + threads, kPromptTokens, d)] = high;
  }
}

}  // namespace

cudaError_t prompt_append(const AttentionArgs& a, int first_item, int items, cudaStream_t stream) {
  const int batches = (first_item + items - 1) / a.kv_heads - first_item / a.kv_heads + 1;
  const dim3 grid(ceil_div(a.sequence, kWarps / kShares), batches);
  const auto start = [&](auto kernel) {
    return launch_early(kernel, grid, kThreads, 0, a.early, stream, a, first_item, items);
  };
  if (a.d == 64) return a.half_cache ? start(append_kernel<64, true>) : start(append_kernel<64, false>);
  return a.half_cache ? start(append_kernel<128, true>) : start(append_kernel<128, false>);
}

// Few blocks, since the host does not know how many rows are older: often there are none.
cudaError_t prompt_unpack(const AttentionArgs& a, int first_item, int items, cudaStream_t stream) {
  const int tokens = kThreads * 16 / a.d, most = ceil_div(static_cast<int>(round_up(a.present_rows, kPromptTokens)), tokens);
  const dim3 grid(std::min(most, ceil_div(kUnpackBlocks, 2 * items)), 2 * items);
  const auto start = [&](auto kernel) {
    return launch_early(kernel, grid, kThreads, 0, a.early, stream, a, first_item);
  };
  if (a.d == 64) return a.half_cache ? start(unpack_kernel<64, true>) : start(unpack_kernel<64, false>);
  return a.half_cache ? start(unpack_kernel<128, true>) : start(unpack_kernel<128, false>);
}

}  // namespace specquant_cuda
