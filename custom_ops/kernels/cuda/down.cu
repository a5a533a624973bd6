// low = x · B[:, :rank] on tensor cores, with exact products: in float16 where x is, else in tf32, x as the sum of two
// numbers. Each block takes 32 tokens and some chunks of features; `reduce` adds the shares up.
#include <algorithm>

#include "args.h"
#include "levels.cuh"

namespace specquant_cuda {
namespace {

constexpr int kWarps = kDownChunk / 32;  // each takes 32 features of a chunk
constexpr int kTiles = kDownTokens / 16;

// sum += of 16 tokens x 32 features x 8 columns; this thread has 8 features of tokens g and g + 8, and of column g.
__device__ __forceinline__ void multiply_halves(float (&sum)[4], const uint4& x0, const uint4& x1,
                                                const __half (&b)[8]) {
  uint32_t pairs[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) pairs[i] = bits_of(__halves2half2(b[2 * i], b[2 * i + 1]));
  const uint32_t a[2][4] = {{x0.x, x1.x, x0.y, x1.y}, {x0.z, x1.z, x0.w, x1.w}};
  const uint32_t first[2] = {pairs[0], pairs[1]}, second[2] = {pairs[2], pairs[3]};
  mma_f16(sum, a[0], first);
  mma_f16(sum, a[1], second);
}

__device__ __forceinline__ void multiply_floats(float (&sum)[4], const uint4 (&x0)[2], const uint4 (&x1)[2],
                                                const __half (&b)[8]) {
  const uint32_t x[2][8] = {{x0[0].x, x0[0].y, x0[0].z, x0[0].w, x0[1].x, x0[1].y, x0[1].z, x0[1].w},
                            {x1[0].x, x1[0].y, x1[0].z, x1[0].w, x1[1].x, x1[1].y, x1[1].z, x1[1].w}};
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    uint32_t lead[4], trail[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) split_tf32(__uint_as_float(x[i % 2][2 * k + i / 2]), lead[i], trail[i]);
    const uint32_t pair[2] = {__float_as_uint(__half2float(b[2 * k])), __float_as_uint(__half2float(b[2 * k + 1]))};
    mma_tf32(sum, trail, pair);
    mma_tf32(sum, lead, pair);
  }
}

// A chunk's rows of the basis. Where r is 32 or 64, columns of 16 bytes are swizzled, so that four threads read from
// different banks.
struct Basis {
  __half* at;
  int r, per_row;  // per_row: 16-byte columns of a swizzled row, else 0

  __device__ __forceinline__ Basis(void* shared, int r_)
      : at(static_cast<__half*>(shared)), r(r_), per_row(r_ % 32 ? 0 : r_ / 8) {}

  __device__ __forceinline__ void fill(const __half* from, int rows) {
    const uint4* pieces = reinterpret_cast<const uint4*>(from);
    for (int i = threadIdx.x; i < rows * r / 8; i += kWarps * 32) {
      const int row = per_row ? i / per_row : 0, column = i - row * per_row;
      reinterpret_cast<uint4*>(at)[per_row ? row * per_row + (column ^ row / 8 % 4) : i] = __ldg(pieces + i);
    }
  }

  __device__ __forceinline__ __half operator()(int row, int column) const {
    return at[row * r + (per_row ? (column / 8 ^ row / 8 % 4) * 8 + column % 8 : column)];
  }
};

// One 32-token tile (blockIdx.x), one share of the features (blockIdx.y). rank_blocks: rank_padded / 32.
template <class X, int rank_blocks>
__global__ void __launch_bounds__(kWarps * 32, sizeof(X) == 2 && rank_blocks == 1 ? 3 : 1)
    down_kernel(const Args args) {
  constexpr int columns = rank_blocks * 4;  // fragments of 8 columns
  constexpr bool halves = sizeof(X) == 2;
  extern __shared__ uint4 shared[];  // the basis, later the warps' sums
  Basis basis(shared, args.r);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int first_token = blockIdx.x * kDownTokens;
  const int chunks = ceil_div(args.n, kDownChunk);
  const X* x = static_cast<const X*>(args.x);
  let_next_start();

  float acc[kTiles][columns][4] = {};
  for (int chunk = blockIdx.y; chunk < chunks; chunk += gridDim.y) {
    const int start = chunk * kDownChunk, feature = start + warp * 32 + 8 * t;  // this thread's 8 features
    const bool inside = feature < args.n;
    uint4 raw[kTiles][2][halves ? 1 : 2];  // [tile][h]: the 8 features of token 16 · tile + 8h + g
#pragma unroll
    for (int i = 0; i < kTiles * 2; ++i) {
      const int token = first_token + i * 8 + g;
      const uint4* from = reinterpret_cast<const uint4*>(x + static_cast<int64_t>(token) * args.n + feature);
#pragma unroll
      for (int j = 0; j < (halves ? 1 : 2); ++j)
        raw[i / 2][i % 2][j] = inside && token < args.tokens ? __ldg(from + j) : make_uint4(0, 0, 0, 0);
    }
    __syncthreads();  // the last chunk is done with
    basis.fill(args.basis + static_cast<int64_t>(start) * args.r, min(kDownChunk, args.n - start));
    __syncthreads();
#pragma unroll
    for (int c = 0; c < columns; ++c) {
      __half b[8];
#pragma unroll
      for (int i = 0; i < 8; ++i) b[i] = inside ? basis(warp * 32 + 8 * t + i, 8 * c + g) : __half(0.0f);
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
        if constexpr (halves) {
          multiply_halves(acc[tile][c], raw[tile][0][0], raw[tile][1][0], b);
        } else {
          multiply_floats(acc[tile][c], raw[tile][0], raw[tile][1], b);
        }
      }
    }
  }

  float* sums = reinterpret_cast<float*>(shared);  // [warp][16 tokens, rank_padded]
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
    __syncthreads();
#pragma unroll
    for (int c = 0; c < columns; ++c)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        sums[(warp * 16 + g + i / 2 * 8) * args.rp + 8 * c + 2 * t + i % 2] = acc[tile][c][i];
    __syncthreads();
    for (int i = threadIdx.x; i < 16 * args.rp; i += kWarps * 32) {
      float sum = 0.0f;
#pragma unroll
      for (int w = 0; w < kWarps; ++w) sum += sums[w * 16 * args.rp + i];  // in order: the same bits every time
      const int token = first_token + tile * 16 + i / args.rp;
      if (token < args.tokens)
        args.partial[(static_cast<int64_t>(blockIdx.y) * args.tokens + token) * args.rp + i % args.rp] =
            i % args.rp < args.rank ? sum : 0.0f;
    }
  }
}

template <class X>
void launch(const Args& args, cudaStream_t stream) {
  const dim3 grid(ceil_div(args.tokens, kDownTokens), args.splits);
  // A row of the basis may be overrun by kFastRank columns.
  const size_t basis = (kDownChunk * args.r + kFastRank) * sizeof(__half), sums = kWarps * 16 * args.rp * sizeof(float);
  const size_t shared = std::max(basis, sums);
  if (args.rp == kRankStep) {
    down_kernel<X, 1><<<grid, kWarps * 32, shared, stream>>>(args);
  } else {
    down_kernel<X, 2><<<grid, kWarps * 32, shared, stream>>>(args);
  }
}

}  // namespace

cudaError_t down(const Args& args, cudaStream_t stream) {
  if (args.x_half) {
    launch<__half>(args, stream);
  } else {
    launch<float>(args, stream);
  }
  return cudaGetLastError();
}

}  // namespace specquant_cuda
