// low from its shares, u = x − low · Bᵀ on tensor cores, and the levels of u where groups and segments are of 64 or a
// group is a whole token. The latter in two passes that both compute u: cheaper than keeping it.
//
// A warp takes 16 tokens and, one after another, units of 64 features. Which feature a column of a fragment means is
// free: column 2t + e of fragment c is feature 16t + 2c + e, so that a thread holds 16 neighbours of two tokens.
#include <algorithm>

#include "args.h"
#include "launch.h"
#include "levels.cuh"

namespace specquant_cuda {
namespace {

constexpr int kMostWarps = kReduceTokens / 16;
constexpr int kUnit = 64;

// Sums of the shares, of this thread's two tokens and 8 neighbouring columns in each 32.
template <int rank_blocks>
__device__ __forceinline__ void sum_shares(const Args& args, int first, int t, float (&low)[2][rank_blocks][8]) {
#pragma unroll
  for (int h = 0; h < 2; ++h)
#pragma unroll
    for (int b = 0; b < rank_blocks; ++b) {
      const int token = first + 8 * h;
      float sum[8] = {};
      for (int s = 0; s < args.splits && token < args.tokens; ++s) {
        // Not __ldg: they may have been written while this kernel was already starting.
        const float4* from = reinterpret_cast<const float4*>(
            args.partial + (static_cast<int64_t>(s) * args.tokens + token) * args.rp + 32 * b + 8 * t);
        const float4 first_half = from[0], second_half = from[1];
        const float share[8] = {first_half.x,  first_half.y,  first_half.z,  first_half.w,
                                second_half.x, second_half.y, second_half.z, second_half.w};
#pragma unroll
        for (int i = 0; i < 8; ++i) sum[i] += share[i];
      }
#pragma unroll
      for (int i = 0; i < 8; ++i) low[h][b][i] = sum[i];
    }
}

// low / factor in two float16 numbers, for the second stage.
template <int rank_blocks>
__device__ __forceinline__ void store_low(const Args& args, int first, int t, const float (&low)[2][rank_blocks][8]) {
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int token = first + 8 * h;
    float largest = 0.0f, factor, inverse;
#pragma unroll
    for (int i = 0; i < rank_blocks * 8; ++i) largest = max_nan(largest, fabsf(low[h][i / 8][i % 8]));
    largest = max_nan(largest, __shfl_xor_sync(~0u, largest, 1));
    largest = max_nan(largest, __shfl_xor_sync(~0u, largest, 2));
    half_factor(largest, factor, inverse);
    if (token >= args.tokens) continue;
    if (t == 0) args.low_factor[token] = factor;
    __half* to = args.low + static_cast<int64_t>(token) * 2 * args.rp + 8 * t;
#pragma unroll
    for (int b = 0; b < rank_blocks; ++b) {
      __align__(16) __half leading[8], trailing[8];
#pragma unroll
      for (int i = 0; i < 8; ++i) split_half(low[h][b][i] * inverse, leading[i], trailing[i]);
      *reinterpret_cast<uint4*>(to + 32 * b) = *reinterpret_cast<const uint4*>(leading);
      *reinterpret_cast<uint4*>(to + args.rp + 32 * b) = *reinterpret_cast<const uint4*>(trailing);
    }
  }
}

// A token's smallest and largest value, 0 included.
struct Range {
  float lowest = 0.0f, highest = 0.0f;
  __device__ __forceinline__ void add(float low, float high) {
    lowest = min_nan(lowest, low);
    highest = max_nan(highest, high);
  }
  // Of the four threads that share a token.
  __device__ __forceinline__ void meet() {
#pragma unroll
    for (int d = 1; d < 4; d *= 2) add(__shfl_xor_sync(~0u, lowest, d), __shfl_xor_sync(~0u, highest, d));
  }
};

__device__ __forceinline__ void store_scale(const Args& args, int token, int segment, const Quantizer& q) {
  args.scale[static_cast<int64_t>(segment) * args.tp + token] = q.scale * args.level_unit;
  if (args.bits == 8) args.zero[static_cast<int64_t>(segment) * args.tp + token] = static_cast<int>(q.zero) - 128;
}

// Levels of 16 of a token's features, from unit · 64 + 16t on; of what lies past the last feature, zeros.
__device__ __forceinline__ void store_levels(const Args& args, int token, int unit, int t, const float (&u)[16],
                                             const Quantizer& q) {
  const float centre = q.centre(args.bits);
  uint32_t words[4];
#pragma unroll
  for (int i = 0; i < 4; ++i)
    words[i] = pack_bytes(q.byte(u[4 * i], centre), q.byte(u[4 * i + 1], centre), q.byte(u[4 * i + 2], centre),
                          q.byte(u[4 * i + 3], centre));
  if (token >= args.tokens) return;
  int8_t* to = static_cast<int8_t*>(args.levels);
  const int feature = unit * kUnit + 16 * t;
#pragma unroll
  for (int i = 0; i < 4; ++i)
    if (feature + 4 * i >= args.n) words[i] = 0;
  if (args.order == kRows) {
    *reinterpret_cast<uint4*>(to + level_place(args, token, feature)) = make_uint4(words[0], words[1], words[2], words[3]);
  } else {
    *reinterpret_cast<uint2*>(to + level_place(args, token, feature)) = make_uint2(words[0], words[2]);
    *reinterpret_cast<uint2*>(to + level_place(args, token, feature + 4)) = make_uint2(words[1], words[3]);
  }
}

// rank_blocks: rank_padded / 32, 0 without a branch.
template <class X, int rank_blocks, Reduce what>
__global__ void __launch_bounds__(kMostWarps * 32) reduce_kernel(const Args args, int units) {
  __shared__ uint4 shared[kUnit * kFastRank / 8 + kFastRank / 8];  // 64 rows of the basis, and what a row may overrun
  const __half* basis = reinterpret_cast<const __half*>(shared);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int first = (blockIdx.x * (blockDim.x / 32) + warp) * 16 + g;  // this thread's tokens: this one, and 8 on
  const X* x = static_cast<const X*>(args.x);
  constexpr int blocks = rank_blocks > 0 ? rank_blocks : 1;
  let_next_start();
  wait_for_previous();

  uint32_t lead[blocks][4][4], trail[blocks][4][4];  // low as fragments: k = 0..3 of 8 columns, two of them a thread's
  if constexpr (rank_blocks > 0) {
    float low[2][rank_blocks][8];
    sum_shares<rank_blocks>(args, first, t, low);
    if (what != Reduce::kTokenLevels && blockIdx.y == 0) store_low<rank_blocks>(args, first, t, low);
#pragma unroll
    for (int b = 0; b < rank_blocks; ++b)
#pragma unroll
      for (int k = 0; k < 4; ++k)
#pragma unroll
        for (int i = 0; i < 4; ++i) split_tf32(low[i % 2][b][2 * k + i / 2], lead[b][k][i], trail[b][k][i]);
    if (threadIdx.x < kFastRank / 8)  // a last row's overrun, met by zeros: must not be NaN
      shared[kUnit * args.r / 8 + threadIdx.x] = make_uint4(0, 0, 0, 0);
  }

  Range range[2];  // of this thread's tokens: what it has seen, or of the whole token
  if constexpr (what == Reduce::kTokenLevels) {
#pragma unroll
    for (int h = 0; h < 2; ++h)
      for (int s = t; s < args.shares && first + 8 * h < args.tokens; s += 4) {
        const float2 share = args.range[static_cast<int64_t>(s) * args.tokens + first + 8 * h];
        range[h].add(share.x, share.y);
      }
    range[0].meet();
    range[1].meet();
  }
  const Quantizer of_token[2] = {Quantizer(range[0].lowest, range[0].highest, args.clip, args.bits),
                                 Quantizer(range[1].lowest, range[1].highest, args.clip, args.bits)};

  for (int unit = blockIdx.y; unit < units; unit += gridDim.y) {
    const int feature = unit * kUnit + 16 * t;
    float u[2][2][8];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int token = first + i / 2 * 8, at = feature + i % 2 * 8;
      load8(u[i / 2][i % 2], x + static_cast<int64_t>(token) * args.n + at, token < args.tokens && at < args.n);
    }
    if constexpr (rank_blocks > 0) {
      if (args.subtract) {
        __syncthreads();
        const int rows = min(kUnit, args.n - unit * kUnit), pieces = kUnit * args.r / 8;
        const uint4* from = reinterpret_cast<const uint4*>(args.basis + static_cast<int64_t>(unit) * kUnit * args.r);
        for (int i = threadIdx.x; i < pieces; i += blockDim.x)
          shared[i] = i < rows * args.r / 8 ? __ldg(from + i) : make_uint4(0, 0, 0, 0);
        __syncthreads();
#pragma unroll
        for (int c = 0; c < 8; ++c) {
          float part[4] = {};
          const __half* row = basis + (16 * (g / 2) + 2 * c + g % 2) * args.r + 8 * t;
#pragma unroll
          for (int b = 0; b < rank_blocks; ++b) {
            float values[8];
            if (args.r % 8 == 0) {
              const uint4 raw = *reinterpret_cast<const uint4*>(row + 32 * b);
              const uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
              for (int i = 0; i < 4; ++i) {
                const float2 pair = __half22float2(half2_of(words[i]));
                values[2 * i] = pair.x;
                values[2 * i + 1] = pair.y;
              }
            } else {
#pragma unroll
              for (int i = 0; i < 8; ++i) values[i] = __half2float(row[32 * b + i]);
            }
#pragma unroll
            for (int k = 0; k < 4; ++k) {
              const uint32_t pair[2] = {__float_as_uint(values[2 * k]), __float_as_uint(values[2 * k + 1])};
              mma_tf32(part, trail[b][k], pair);
              mma_tf32(part, lead[b][k], pair);
            }
          }
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            float& value = u[i / 2][c / 4][2 * (c % 4) + i % 2];
            value = __fsub_rn(value, part[i]);
          }
        }
      }
    }
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int token = first + 8 * h;
      float row[16];
#pragma unroll
      for (int i = 0; i < 16; ++i) row[i] = u[h][i / 8][i % 8];
      if constexpr (what == Reduce::kTokenLevels) {
        store_levels(args, token, unit, t, row, of_token[h]);
      } else if constexpr (what != Reduce::kKeep) {
        Range group;
        if constexpr (what == Reduce::kRanges) group = range[h];
#pragma unroll
        for (int i = 0; i < 16; ++i) group.add(row[i], row[i]);
        if constexpr (what == Reduce::kRanges) {
          range[h] = group;
          continue;
        }
        group.meet();
        const Quantizer q(group.lowest, group.highest, args.clip, args.bits);
        store_levels(args, token, unit, t, row, q);
        if (t == 0 && token < args.tokens) store_scale(args, token, unit, q);
      } else if (token < args.tokens) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int at = feature + 4 * i;
          const float* v = &u[h][i / 2][i % 2 * 4];
          if (at < args.n)
            *reinterpret_cast<float4*>(args.reduced + static_cast<int64_t>(token) * args.n + at) =
                make_float4(v[0], v[1], v[2], v[3]);
        }
      }
    }
  }
  if constexpr (what == Reduce::kRanges) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      range[h].meet();
      if (t == 0 && first + 8 * h < args.tokens)
        args.range[static_cast<int64_t>(blockIdx.y) * args.tokens + first + 8 * h] =
            make_float2(range[h].lowest, range[h].highest);
    }
  }
  if constexpr (what == Reduce::kTokenLevels) {
#pragma unroll
    for (int h = 0; h < 2; ++h)
      for (int segment = blockIdx.y * 4 + t; segment < args.segments; segment += gridDim.y * 4)
        if (first + 8 * h < args.tokens) store_scale(args, first + 8 * h, segment, of_token[h]);
  }
}

template <class X, Reduce what>
cudaError_t launch(const Args& args, cudaStream_t stream) {
  const int tiles = ceil_div(args.tokens, 16), warps = std::min(tiles, kMostWarps);
  const int units = what != Reduce::kKeep || args.subtract ? ceil_div(args.n, kUnit) : 0;  // 0: only low is wanted
  const dim3 grid(ceil_div(tiles, warps), args.shares);
  const int threads = warps * 32;
  switch (args.rp / kRankStep) {
    case 0: return launch_early(reduce_kernel<X, 0, what>, grid, threads, 0, false, stream, args, units);
    case 1: return launch_early(reduce_kernel<X, 1, what>, grid, threads, 0, args.early, stream, args, units);
    default: return launch_early(reduce_kernel<X, 2, what>, grid, threads, 0, args.early, stream, args, units);
  }
}

template <class X>
cudaError_t launch_all(const Args& args, Reduce what, cudaStream_t stream) {
  switch (what) {
    case Reduce::kKeep: return launch<X, Reduce::kKeep>(args, stream);
    case Reduce::kGroupLevels: return launch<X, Reduce::kGroupLevels>(args, stream);
    case Reduce::kRanges: return launch<X, Reduce::kRanges>(args, stream);
    default: return launch<X, Reduce::kTokenLevels>(args, stream);
  }
}

}  // namespace

cudaError_t reduce(const Args& args, Reduce what, cudaStream_t stream) {
  return args.x_half ? launch_all<__half>(args, what, stream) : launch_all<float>(args, what, stream);
}

}  // namespace specquant_cuda
