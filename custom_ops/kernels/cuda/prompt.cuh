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

// How x is read: float16 that is x̂ already, whose products are exact in float16; any other.
enum Reads { kExact, kValues };

// Where a feature of 64 has its row of the basis.
__device__ __forceinline__ int basis_row_of(int feature) { return feature % 16 / 2 * 8 + feature / 16 * 2 + feature % 2; }

// The block's rows of the basis, zeros in what pads rows and columns. They lie one after another, from a multiple of 16
// bytes on.
__device__ __forceinline__ void fetch_basis(const Args& args, int first, int features, __half* basis) {
  const int stride = prompt_stride(args.rp), threads = blockDim.x, r = args.r;
  const int pieces = max(0, min(features, args.n - first)) * r / 8;
  const uint4* from = reinterpret_cast<const uint4*>(args.basis + static_cast<int64_t>(first) * r);
  for (int i = threadIdx.x; i < features * stride / 8; i += threads)
    reinterpret_cast<uint4*>(basis)[i] = make_uint4(0, 0, 0, 0);
  __syncthreads();
  const auto row_of = [&](int i) { return basis + (i / kStep * kStep + basis_row_of(i % kStep)) * stride; };
#pragma unroll 4
  for (int i = threadIdx.x; i < pieces; i += threads) {
    const uint4 raw = __ldg(from + i);
    int row = 8 * i / r, column = 8 * i - row * r;
    if (r % 8 == 0) {
      if (column < args.rp) *reinterpret_cast<uint4*>(row_of(row) + column) = raw;
      continue;
    }
    const uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
    for (int k = 0; k < 8; ++k) {
      const __half2 pair = half2_of(words[k / 2]);
      if (column < args.rp) row_of(row)[column] = k % 2 ? __high2half(pair) : __low2half(pair);  // r may be more than rp
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

  // x̂ before its rotation. roots: of tokens g and g + 8.
  __device__ __forceinline__ void values(const Args& args, const Source& source, int feature, const Root (&roots)[2],
                                         float (&u)[2][16]) const {
#pragma unroll
    for (int h = 0; h < 2; ++h) floats(h, u[h]);
    if (reads == kValues && source.prologue == kRmsNorm) {
#pragma unroll
      for (int i = 0; i < 16; i += 4) {
        const float4 norm = feature + i < args.n ? __ldg(reinterpret_cast<const float4*>(source.norm + feature + i))
                                                 : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        const float of[4] = {norm.x, norm.y, norm.z, norm.w};
#pragma unroll
        for (int j = 0; j < 8; ++j) u[j / 4][i + j % 4] = roots[j / 4].divide(u[j / 4][i + j % 4]) * of[j % 4];
      }
    }
  }
};

// The warp's share of low: [8 columns][2h + e] of tokens g + 8h. rows: those of the basis that this lane names.
template <int rank_blocks, bool exact>
__device__ __forceinline__ void project(const float (&u)[2][16], const __half* rows, float (&sum)[rank_blocks * 4][4]) {
  constexpr int stride = prompt_stride(rank_blocks * kRankStep);
#pragma unroll
  for (int i = 0; i < rank_blocks * 16; ++i) sum[i / 4][i % 4] = 0.0f;
#pragma unroll
  for (int c = 0; c < 8; c += exact ? 2 : 1)
#pragma unroll
    for (int b = 0; b < rank_blocks; ++b) {
      uint32_t basis[2][4];
      load_transposed(basis[0], rows + 8 * c * stride + 32 * b);
      if constexpr (exact) {
        load_transposed(basis[1], rows + 8 * (c + 1) * stride + 32 * b);
        uint32_t a[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float* pair = &u[i % 2][2 * (c + i / 2)];
          a[i] = bits_of(__floats2half2_rn(pair[0], pair[1]));
        }
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          const uint32_t both[2] = {basis[0][k], basis[1][k]};
          mma_f16(sum[4 * b + k], a, both);
        }
      } else {
        uint32_t lead[4], trail[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) split_tf32(u[i % 2][2 * c + i / 2], lead[i], trail[i]);
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          const float2 pair = __half22float2(half2_of(basis[0][k]));
          const uint32_t both[2] = {__float_as_uint(pair.x), __float_as_uint(pair.y)};
          mma_tf32(sum[4 * b + k], trail, both);
          mma_tf32(sum[4 * b + k], lead, both);
        }
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
      for (int k = 0; k < 2; ++k) load_matrices(basis[k], rows + 8 * (c + k) * stride + 32 * b);
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
      value = __fsub_rn(value, __fmul_rn(part[i / 4][i % 4], factor[i / 2 % 2]));  // factor is a power of two
    }
  }
}

}  // namespace specquant_cuda
