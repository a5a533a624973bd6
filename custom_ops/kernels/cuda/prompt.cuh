// What a warp of `prompt` does with its 64 features of 16 tokens, which stay in registers.
//
// With g = lane / 4 and t = lane % 4 a thread holds, of tokens g and g + 8, features 16t … 16t + 15: column 2t + e of
// fragment c is feature 16t + 2c + e. The basis lies in the order of the columns, so that ldmatrix reads neighbours.
#pragma once

#include "hadamard.cuh"
#include "prompt_exchange.cuh"
#include "ptx90.cuh"
#include "unpack.cuh"

namespace specquant_cuda {

// How x is read: float16 that is x̂ already, whose products are exact in float16; float16 that low is made of before it is
// normed (late_norm); any other.
enum Reads { kExact, kNormed, kValues };

// Where a feature of 64 has its row of the basis.
__device__ __forceinline__ uint32_t basis_row_of(uint32_t feature) {
  return feature % 16 / 2 * 8 + feature / 16 * 2 + feature % 2;
}

// The block's rows of the basis, zeros in what pads rows and columns. They lie one after another, from a multiple of 16
// bytes on.
__device__ __forceinline__ void fetch_basis(const Args& args, int first, int features, __half* basis) {
  const int threads = blockDim.x, r = args.r, blocks = args.rp / kRankStep;
  const int pieces = max(0, min(features, args.n - first)) * r / 8;
  const uint4* from = reinterpret_cast<const uint4*>(args.basis + static_cast<int64_t>(first) * r);
  for (int i = threadIdx.x; i < features * args.rp / 8; i += threads)
    reinterpret_cast<uint4*>(basis)[i] = make_uint4(0, 0, 0, 0);
  __syncthreads();
  const auto place = [&](uint32_t feature, uint32_t column) {
    const uint32_t row = basis_row_of(feature % kStep), piece = column % kRankStep / 8 ^ row / 2 % 4;
    return basis + (feature / kStep * blocks + column / kRankStep) * kBasisBlock + row * kRankStep + piece * 8 + column % 8;
  };
#pragma unroll 4
  for (int i = threadIdx.x; i < pieces; i += threads) {
    const uint4 raw = __ldg(from + i);
    int row = 8 * i / r, column = 8 * i - row * r;
    if (r % 8 == 0) {
      if (column < args.rp) *reinterpret_cast<uint4*>(place(row, column)) = raw;
      continue;
    }
    const uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
    for (int k = 0; k < 8; ++k) {
      const __half2 pair = half2_of(words[k / 2]);
      if (column < args.rp) *place(row, column) = k % 2 ? __high2half(pair) : __low2half(pair);  // r may be more than rp
      if (++column == r) column = 0, ++row;
    }
  }
}

// x as it lies in memory: of a thread's two tokens, its 16 features.
template <class X, Reads reads>
struct Raw {
  static constexpr int kPieces = 16 * sizeof(X) / 16, kEach = 16 / sizeof(X);
  uint4 v[2][kPieces];

  // A token's row; past the last one that of the last, of which nothing is kept.
  __device__ __forceinline__ static const X* row_of(const Args& args, const Source& source, int token) {
    return static_cast<const X*>(source.x) + static_cast<int64_t>(min(token, args.tokens - 1)) * args.n;
  }

  __device__ __forceinline__ void load(const Args& args, const Source& source, int token, int feature) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const X* from = row_of(args, source, token + 8 * h) + feature;
#pragma unroll
      for (int i = 0; i < kPieces; ++i)  // not __ldg: x may have been written while this kernel was already starting
        v[h][i] = feature + i * kEach < args.n ? *reinterpret_cast<const uint4*>(from + i * kEach)
                                               : make_uint4(0, 0, 0, 0);
    }
  }

  // The same of later tokens, a line a thread, on its way to the second-level cache.
  __device__ __forceinline__ static void prefetch_ahead(const Args& args, const Source& source, int token, int feature) {
    if (feature >= args.n) return;
#pragma unroll
    for (int h = 0; h < 2; ++h) prefetch(row_of(args, source, token + 8 * h) + feature);
  }

  __device__ __forceinline__ void floats(int h, float (&to)[16]) const {
#pragma unroll
    for (int i = 0; i < kPieces; ++i) {
      const uint4 raw = v[h][i];
      if constexpr (sizeof(X) == 2) {
        widen(raw, *reinterpret_cast<float(*)[8]>(to + 8 * i));
      } else {
        to[4 * i] = __uint_as_float(raw.x), to[4 * i + 1] = __uint_as_float(raw.y);
        to[4 * i + 2] = __uint_as_float(raw.z), to[4 * i + 3] = __uint_as_float(raw.w);
      }
    }
  }

  // Features 2w and 2w + 1 of float16.
  __device__ __forceinline__ uint32_t word(int h, int w) const {
    const uint4& four = v[h][w / 4];
    return w % 4 == 0 ? four.x : w % 4 == 1 ? four.y : w % 4 == 2 ? four.z : four.w;
  }

  // Of both tokens, added up by the four threads that share them.
  __device__ __forceinline__ void squares(float (&sum)[2]) const {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float x[16];
      floats(h, x);
      sum[h] = 0.0f;
#pragma unroll
      for (int i = 0; i < 16; ++i) sum[h] = fmaf(x[i], x[i], sum[h]);
      sum[h] += __shfl_xor_sync(~0u, sum[h], 1);
      sum[h] += __shfl_xor_sync(~0u, sum[h], 2);
    }
  }

  // x̂ before its rotation. inverse: of the roots of tokens g and g + 8; shared: with late_norm, the thread's part of the norm.
  __device__ __forceinline__ void values(const Args& args, const Source& source, int feature, const float* shared,
                                         const float (&inverse)[2], float (&u)[2][16]) const {
#pragma unroll
    for (int h = 0; h < 2; ++h) floats(h, u[h]);
    if (reads == kNormed || (reads == kValues && source.prologue == kRmsNorm)) {
#pragma unroll
      for (int i = 0; i < 16; i += 4) {
        float4 norm = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        if constexpr (reads == kNormed) {
          norm = *reinterpret_cast<const float4*>(shared + 4 * i);
        } else if (feature + i < args.n) {
          norm = __ldg(reinterpret_cast<const float4*>(source.norm + feature + i));
        }
        const float of[4] = {norm.x, norm.y, norm.z, norm.w};
#pragma unroll
        for (int j = 0; j < 8; ++j) u[j / 4][i + j % 4] = u[j / 4][i + j % 4] * inverse[j / 4] * of[j % 4];
      }
    }
  }
};

// The block's norms of `features` features (PromptPlaces::norm), zeros in what pads them; by all threads, who meet.
__device__ __forceinline__ void fetch_norm(const Args& args, const float* from, int first, int features,
                                           const PromptPlaces& at) {
  const auto norm_of = [&](int i) { return first + i < args.n ? from[first + i] : 0.0f; };
  float largest = 0.0f, factor, inverse;
  for (int i = threadIdx.x; i < features; i += blockDim.x) largest = max_nan(largest, fabsf(norm_of(i)));
  largest = over_warp(largest, Largest());
  if (threadIdx.x % 32 == 0) at.sums[threadIdx.x / 32] = largest;
  __syncthreads();
  for (int i = 0; i < static_cast<int>(blockDim.x) / 32; ++i) largest = max_nan(largest, at.sums[i]);
  half_factor(largest, factor, inverse);  // less 2^15 more, so that a product with x stays in range
  if (threadIdx.x == 0) *at.norm_factor = factor * 32768.0f;
  for (int i = threadIdx.x; i < features; i += blockDim.x) {
    const int unit = i / kStep, t = i % kStep / 16, within = i % 16;
    const float norm = norm_of(i);
    at.norm[unit * kStep + (within / 4 * 4 + t) * 4 + within % 4] = norm;
    __half* parts = reinterpret_cast<__half*>(at.norm + features) + unit * 2 * kStep + (within / 8 * 4 + t) * 8 + within % 8;
    split_half(norm * inverse * (1.0f / 32768.0f), parts[0], parts[kStep]);
  }
  __syncthreads();
}

// Squares of tokens g (h = 0) and g + 8, of 8 features by 8 features on the tensor cores: the diagonals of x · xᵀ. Threads
// with t = g / 2 have them.
template <class R>
__device__ __forceinline__ void square_halves(const R& raw, int g, float (&squares)[2]) {
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    float even[4] = {}, odd[4] = {};  // row g of the one and row g + 8 of the other are token g + 8h, as are columns g
#pragma unroll
    for (int w = 0; w < 8; w += 2) {
      const uint32_t x[2] = {raw.word(h, w), raw.word(h, w + 1)};
      mma_f16(even, x, x[0]);
      mma_f16(odd, x, x[1]);
    }
    squares[h] = g % 2 ? even[1] + odd[3] : even[0] + odd[2];
  }
}

// The warp's share of 32 columns of low from float16 x: [8 columns][2h + e] of tokens g + 8h. first and second: rows of the
// basis that this lane names, of columns up to 15 and from 16 on. normed: of x times `norm`, the thread's part of it, in two
// float16 numbers each.
template <bool normed, class R>
__device__ __forceinline__ void project_halves(const R& raw, const __half* first, const __half* second, const __half* norm,
                                               float (&sum)[4][4]) {
#pragma unroll
  for (int c = 0; c < 8; c += 2) {
    uint32_t x[4], rest[4], basis[2][4];
#pragma unroll
    for (int i = 0; i < 4; ++i) x[i] = raw.word(i % 2, c + i / 2);
    if constexpr (normed) {
      const uint2 lead = *reinterpret_cast<const uint2*>(norm + c / 4 * 32 + c % 4 * 2);
      const uint2 trail = *reinterpret_cast<const uint2*>(norm + kStep + c / 4 * 32 + c % 4 * 2);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const __half2 value = half2_of(x[i]), n = half2_of(i / 2 ? lead.y : lead.x);
        const __half2 product = __hmul2(value, n), left = __hfma2(value, n, __hneg2(product));
        x[i] = bits_of(product), rest[i] = bits_of(__hfma2(value, half2_of(i / 2 ? trail.y : trail.x), left));
      }
    }
    load_transposed(basis[0], first + 8 * c * kRankStep);
    load_transposed(basis[1], second + 8 * c * kRankStep);
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const uint32_t both[2] = {basis[k / 2][k % 2 * 2], basis[k / 2][k % 2 * 2 + 1]};
      if (normed) mma_f16(sum[k], rest, both);
      mma_f16(sum[k], x, both);
    }
  }
}

// The same from any x̂, on tf32 tensor cores; rows as for subtract_low.
__device__ __forceinline__ void project(const float (&u)[2][16], const __half* rows, float (&sum)[4][4]) {
#pragma unroll
  for (int c = 0; c < 8; ++c) {
    uint32_t basis[4], lead[4], trail[4];
    load_transposed(basis, rows + 8 * c * kRankStep);
#pragma unroll
    for (int i = 0; i < 4; ++i) split_tf32(u[i % 2][2 * c + i / 2], lead[i], trail[i]);
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const float2 pair = __half22float2(half2_of(basis[k]));
      const uint32_t both[2] = {__float_as_uint(pair.x), __float_as_uint(pair.y)};
      mma_tf32(sum[k], trail, both);
      mma_tf32(sum[k], lead, both);
    }
  }
}

// u = x̂ − low · Bᵀ. low: [2 parts, tokens] as float16, less `factor`.
template <int rank_blocks>
__device__ __forceinline__ void subtract_low(float (&u)[2][16], const __half* rows, const __half* low,
                                             const float (&factor)[2], int g, int t) {
  constexpr int stride = prompt_stride(rank_blocks * kRankStep), steps = rank_blocks * 2;
  uint32_t parts[2][steps][4];  // as fragments of the first operand
#pragma unroll
  for (int i = 0; i < 2 * steps * 4; ++i) {
    const int part = i / (steps * 4), step = i / 4 % steps, h = i % 2, j = i / 2 % 2;
    const __half* from = low + (part * kPromptTokens + g + 8 * h) * stride + 16 * step + 8 * j + 2 * t;
    parts[part][step][i % 4] = *reinterpret_cast<const uint32_t*>(from);
  }
#pragma unroll
  for (int c = 0; c < 8; c += 2) {
    float part[2][4] = {};
#pragma unroll
    for (int b = 0; b < rank_blocks; ++b) {
      uint32_t basis[2][4];
#pragma unroll
      for (int k = 0; k < 2; ++k) load_matrices(basis[k], rows + 8 * (c + k) * kRankStep + b * kBasisBlock);
#pragma unroll
      for (int i = 0; i < 8; ++i) {  // both parts of low, the small one first; two sums, since one waits for itself
        const int k = i % 2, j = i / 2 % 2;
        const uint32_t columns[2] = {basis[k][j * 2], basis[k][j * 2 + 1]};
        mma_f16(part[k], parts[1 - i / 4][2 * b + j], columns);
      }
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      float& value = u[i / 2 % 2][2 * (c + i / 4) + i % 2];
      value = fmaf(part[i / 4][i % 4], -factor[i / 2 % 2], value);  // factor is a power of two: rounded once all the same
    }
  }
}

}  // namespace specquant_cuda
