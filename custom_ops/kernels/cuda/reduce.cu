// low from its shares, u = x − low · Bᵀ on tensor cores, and the levels of u where groups and segments are of 64.
//
// A warp takes 16 tokens and, one after another, units of 64 features. Which feature a column of a fragment means is
// free: column 2t + e of fragment c is feature 16t + 2c + e, so that a thread holds 16 neighbours of two tokens.
#include <algorithm>

#include "args.h"
#include "levels.cuh"

namespace specquant_cuda {
namespace {

constexpr int kMostWarps = 8;
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
        float share[8];
        load8(share, args.partial + (static_cast<int64_t>(s) * args.tokens + token) * args.rp + 32 * b + 8 * t, true);
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

// Levels of a row's 64 features, 16 of them in each of 4 threads, in `unit` of the token.
__device__ __forceinline__ void store_levels(const Args& args, int token, int unit, int t, const float (&u)[16]) {
  float lowest = 0.0f, highest = 0.0f;
#pragma unroll
  for (int i = 0; i < 16; ++i) {
    lowest = min_nan(lowest, u[i]);
    highest = max_nan(highest, u[i]);
  }
#pragma unroll
  for (int d = 1; d < 4; d *= 2) {
    lowest = min_nan(lowest, __shfl_xor_sync(~0u, lowest, d));
    highest = max_nan(highest, __shfl_xor_sync(~0u, highest, d));
  }
  const Quantizer q(lowest, highest, args.clip, args.bits);
  const float centre = q.centre(args.bits);
  uint32_t words[4];
#pragma unroll
  for (int i = 0; i < 4; ++i)
    words[i] = pack_bytes(q.byte(u[4 * i], centre), q.byte(u[4 * i + 1], centre), q.byte(u[4 * i + 2], centre),
                          q.byte(u[4 * i + 3], centre));
  if (token >= args.tokens) return;
  int8_t* to = static_cast<int8_t*>(args.levels) + static_cast<int64_t>(token) * args.kp + unit * kUnit;
  if (args.permuted) {
    *reinterpret_cast<uint2*>(to + place_of(16 * t, false)) = make_uint2(words[0], words[2]);
    *reinterpret_cast<uint2*>(to + place_of(16 * t + 4, false)) = make_uint2(words[1], words[3]);
  } else {
    *reinterpret_cast<uint4*>(to + 16 * t) = make_uint4(words[0], words[1], words[2], words[3]);
  }
  if (t == 0) {
    args.scale[static_cast<int64_t>(unit) * args.tp + token] = q.scale * args.level_unit;
    if (args.bits == 8) args.zero[static_cast<int64_t>(unit) * args.tp + token] = static_cast<int>(q.zero) - 128;
  }
}

// rank_blocks: rank_padded / 32, 0 without a branch.
template <class X, int rank_blocks>
__global__ void __launch_bounds__(kMostWarps * 32) reduce_kernel(const Args args, int units, bool direct) {
  __shared__ uint4 shared[kUnit * kFastRank / 8 + kFastRank / 8];  // 64 rows of the basis, and what a row may overrun
  const __half* basis = reinterpret_cast<const __half*>(shared);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int first = (blockIdx.x * (blockDim.x / 32) + warp) * 16 + g;  // this thread's tokens: this one, and 8 on
  const X* x = static_cast<const X*>(args.x);
  constexpr int blocks = rank_blocks > 0 ? rank_blocks : 1;

  uint32_t lead[blocks][4][4], trail[blocks][4][4];  // low as fragments: k = 0..3 of 8 columns, two of them a thread's
  if constexpr (rank_blocks > 0) {
    float low[2][rank_blocks][8];
    sum_shares<rank_blocks>(args, first, t, low);
    if (blockIdx.y == 0) store_low<rank_blocks>(args, first, t, low);
#pragma unroll
    for (int b = 0; b < rank_blocks; ++b)
#pragma unroll
      for (int k = 0; k < 4; ++k)
#pragma unroll
        for (int i = 0; i < 4; ++i) split_tf32(low[i % 2][b][2 * k + i / 2], lead[b][k][i], trail[b][k][i]);
    if (threadIdx.x < kFastRank / 8)  // a last row's overrun, met by zeros: must not be NaN
      shared[kUnit * args.r / 8 + threadIdx.x] = make_uint4(0, 0, 0, 0);
  }

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
      if (direct) {
        float row[16];
#pragma unroll
        for (int i = 0; i < 16; ++i) row[i] = u[h][i / 8][i % 8];
        store_levels(args, token, unit, t, row);
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
}

template <class X>
void launch(const Args& args, bool direct, int multiprocessors, cudaStream_t stream) {
  const int tiles = ceil_div(args.tokens, 16), warps = std::min(tiles, kMostWarps);
  const int units = direct || args.subtract ? ceil_div(args.n, kUnit) : 0;  // 0: only low is wanted
  const int across = ceil_div(tiles, warps);
  const int shares = std::clamp(ceil_div(4 * multiprocessors, across), 1, std::max(units, 1));
  const dim3 grid(across, shares);
  switch (args.rp / kRankStep) {
    case 0: reduce_kernel<X, 0><<<grid, warps * 32, 0, stream>>>(args, units, direct); break;
    case 1: reduce_kernel<X, 1><<<grid, warps * 32, 0, stream>>>(args, units, direct); break;
    default: reduce_kernel<X, 2><<<grid, warps * 32, 0, stream>>>(args, units, direct); break;
  }
}

}  // namespace

cudaError_t reduce(const Args& args, bool direct, int multiprocessors, cudaStream_t stream) {
  if (args.x_half) {
    launch<__half>(args, direct, multiprocessors, stream);
  } else {
    launch<float>(args, direct, multiprocessors, stream);
  }
  return cudaGetLastError();
}

}  // namespace specquant_cuda
