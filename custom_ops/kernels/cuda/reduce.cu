// low from its shares, u = x − low · Bᵀ on tensor cores, and the levels of u where groups of them are of 64 or a
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

// Sums of the shares, of this thread's two tokens and 8 neighbouring columns in each 32: in order, loads ahead.
template <int rank_blocks>
__device__ __forceinline__ void sum_shares(const Args& args, int first, int t, float (&low)[2][rank_blocks][8]) {
  constexpr int batch = 4;
#pragma unroll
  for (int i = 0; i < 2 * rank_blocks * 8; ++i) low[i / (rank_blocks * 8)][i / 8 % rank_blocks][i % 8] = 0.0f;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int token = first + 8 * h;
    if (token >= args.tokens) continue;
    for (int start = 0; start < args.splits; start += batch)
#pragma unroll
      for (int b = 0; b < rank_blocks; ++b) {
        float4 shares[batch][2];
#pragma unroll
        for (int s = 0; s < batch; ++s) {
          // Not __ldg: they may have been written while this kernel was already starting.
          const float4* from = reinterpret_cast<const float4*>(
              args.partial + (static_cast<int64_t>(start + s) * args.tokens + token) * args.rp + 32 * b + 8 * t);
          const bool there = start + s < args.splits;
#pragma unroll
          for (int i = 0; i < 2; ++i) shares[s][i] = there ? from[i] : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        }
#pragma unroll
        for (int s = 0; s < batch; ++s) {
          const float4 x = shares[s][0], y = shares[s][1];
          const float share[8] = {x.x, x.y, x.z, x.w, y.x, y.y, y.z, y.w};
#pragma unroll
          for (int i = 0; i < 8; ++i) low[h][b][i] += share[i];
        }
      }
  }
}

// low / factor in two float16 numbers, [h][block]: columns 8t … 8t + 7 of 32.
template <int rank_blocks>
__device__ __forceinline__ void split_low(const float (&low)[2][rank_blocks][8], float (&factor)[2],
                                          uint4 (&lead)[2][rank_blocks], uint4 (&trail)[2][rank_blocks]) {
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    float largest = 0.0f, inverse;
#pragma unroll
    for (int i = 0; i < rank_blocks * 8; ++i) largest = max_nan(largest, fabsf(low[h][i / 8][i % 8]));
    largest = max_nan(largest, __shfl_xor_sync(~0u, largest, 1));
    largest = max_nan(largest, __shfl_xor_sync(~0u, largest, 2));
    half_factor(largest, factor[h], inverse);
#pragma unroll
    for (int b = 0; b < rank_blocks; ++b) {
      uint32_t leading[4], trailing[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        __half first[2], second[2];
#pragma unroll
        for (int e = 0; e < 2; ++e) split_half(low[h][b][2 * i + e] * inverse, first[e], second[e]);
        leading[i] = bits_of(__halves2half2(first[0], first[1]));
        trailing[i] = bits_of(__halves2half2(second[0], second[1]));
      }
      lead[h][b] = make_uint4(leading[0], leading[1], leading[2], leading[3]);
      trail[h][b] = make_uint4(trailing[0], trailing[1], trailing[2], trailing[3]);
    }
  }
}

// For the second stage.
template <int rank_blocks>
__device__ __forceinline__ void store_low(const Args& args, int first, int t, const float (&factor)[2],
                                          const uint4 (&lead)[2][rank_blocks], const uint4 (&trail)[2][rank_blocks]) {
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int token = first + 8 * h;
    if (token >= args.tokens) continue;
    if (t == 0) args.low_factor[token] = factor[h];
    __half* to = args.low + static_cast<int64_t>(token) * 2 * args.rp + 8 * t;
#pragma unroll
    for (int b = 0; b < rank_blocks; ++b) {
      *reinterpret_cast<uint4*>(to + 32 * b) = lead[h][b];
      *reinterpret_cast<uint4*>(to + args.rp + 32 * b) = trail[h][b];
    }
  }
}

// 64 rows of the basis, from `unit` on, on their way to shared memory.
__device__ __forceinline__ void fetch_basis(const Args& args, uint4* to, int unit) {
  const int rows = min(kUnit, args.n - unit * kUnit), pieces = kUnit * args.r / 8;
  const uint4* from = reinterpret_cast<const uint4*>(args.basis + static_cast<int64_t>(unit) * kUnit * args.r);
  for (int i = threadIdx.x; i < pieces; i += blockDim.x) copy_async(to + i, from + i, i < rows * args.r / 8);
  commit_async();
}

// 8 columns of a row of it, which lies at any even address where 8 does not divide r.
__device__ __forceinline__ uint4 basis_row(const __half* row, bool whole) {
  if (whole) return *reinterpret_cast<const uint4*>(row);
  uint32_t words[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) words[i] = bits_of(__halves2half2(row[2 * i], row[2 * i + 1]));
  return make_uint4(words[0], words[1], words[2], words[3]);
}

// part += low · Bᵀ of a fragment of 8 features, of 32 columns: both parts of low.
__device__ __forceinline__ void multiply_low(float (&part)[4], const uint4& low0, const uint4& low1, const uint4& row) {
  const uint32_t first[4] = {low0.x, low1.x, low0.y, low1.y}, second[4] = {low0.z, low1.z, low0.w, low1.w};
  const uint32_t b[2][2] = {{row.x, row.y}, {row.z, row.w}};
  mma_f16(part, first, b[0]);
  mma_f16(part, second, b[1]);
}

// rank_blocks: rank_padded / 32, 0 without a branch.
template <class X, int rank_blocks, Reduce what>
__global__ void __launch_bounds__(kMostWarps * 32) reduce_kernel(const Args args, int units) {
  constexpr int blocks = rank_blocks > 0 ? rank_blocks : 1, overrun = kFastRank / 8;
  __shared__ uint4 shared[2][kUnit * overrun + overrun];  // 64 rows of the basis, and what a last row may overrun
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int first = (blockIdx.x * (blockDim.x / 32) + warp) * 16 + g;  // this thread's tokens: this one, and 8 on
  const X* x = static_cast<const X*>(args.x);
  const bool subtract = rank_blocks > 0 && args.subtract;
  let_next_start();
  if (subtract) {
    if (threadIdx.x < 2 * overrun)  // met by zeros: must not be NaN
      shared[threadIdx.x / overrun][kUnit * args.r / 8 + threadIdx.x % overrun] = make_uint4(0, 0, 0, 0);
    if (blockIdx.y < units) fetch_basis(args, shared[0], blockIdx.y);
  }
  wait_for_previous();

  uint4 lead[2][blocks], trail[2][blocks];  // low / factor: [h][block], as fragments of the first operand want it
  float factor[2];
  if constexpr (rank_blocks > 0) {
    float low[2][rank_blocks][8];
    sum_shares<rank_blocks>(args, first, t, low);
    split_low<rank_blocks>(low, factor, lead, trail);
    if (what != Reduce::kTokenLevels && blockIdx.y == 0) store_low<rank_blocks>(args, first, t, factor, lead, trail);
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

  for (int unit = blockIdx.y, turn = 0; unit < units; unit += gridDim.y, turn ^= 1) {
    const int feature = unit * kUnit + 16 * t;
    float u[2][2][8];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int token = first + i / 2 * 8, at = feature + i % 2 * 8;
      load8(u[i / 2][i % 2], x + static_cast<int64_t>(token) * args.n + at, token < args.tokens && at < args.n);
    }
    if (subtract) {
      wait_async<0>();
      __syncthreads();  // these rows have come, and the others are done with
      if (unit + gridDim.y < units) fetch_basis(args, shared[turn ^ 1], unit + gridDim.y);
      const __half* basis = reinterpret_cast<const __half*>(shared[turn]);
#pragma unroll
      for (int c = 0; c < 8; ++c) {
        float part[4] = {};
        const __half* row = basis + (16 * (g / 2) + 2 * c + g % 2) * args.r + 8 * t;
#pragma unroll
        for (int b = 0; b < rank_blocks; ++b) {
          const uint4 columns = basis_row(row + 32 * b, args.r % 8 == 0);
          multiply_low(part, trail[0][b], trail[1][b], columns);
          multiply_low(part, lead[0][b], lead[1][b], columns);
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          float& value = u[i / 2][c / 4][2 * (c % 4) + i % 2];
          value = __fsub_rn(value, __fmul_rn(part[i], factor[i / 2]));  // factor is a power of two
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
      if (blockIdx.y == 0 && t == 0 && first + 8 * h < args.tokens) store_scale(args, first + 8 * h, 0, of_token[h]);
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
