// low = x · B[:, :rank] on tensor cores in tf32, whose products of float16 numbers are exact; float32 x goes in as the
// sum of two tf32 numbers. Each block takes 32 tokens and some chunks of features; `reduce` adds the shares up.
#include <algorithm>

#include "args.h"
#include "levels.cuh"

namespace specquant_cuda {
namespace {

constexpr int kWarps = kDownChunk / 32;  // each takes 32 features of a chunk
constexpr int kTiles = kDownTokens / 16;

// One 32-token tile (blockIdx.x), one share of the features (blockIdx.y). rank_blocks: rank_padded / 32.
template <class X, int rank_blocks>
__global__ void __launch_bounds__(kWarps * 32) down_kernel(const Args args) {
  constexpr int columns = rank_blocks * 4;  // fragments of 8 columns
  extern __shared__ uint4 shared[];
  __half* basis = reinterpret_cast<__half*>(shared);               // [256 features, r], and what a last row may overrun
  float* sums = reinterpret_cast<float*>(basis + kDownChunk * args.r + kFastRank);  // [32 tokens, rank_padded]
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int first_token = blockIdx.x * kDownTokens;
  const int chunks = ceil_div(args.n, kDownChunk);
  let_next_start();
  const X* x = static_cast<const X*>(args.x);

  float acc[kTiles][columns][4] = {};
  for (int chunk = blockIdx.y; chunk < chunks; chunk += gridDim.y) {
    const int start = chunk * kDownChunk, feature = start + warp * 32 + 8 * t;  // this thread's 8 features
    const bool inside = feature < args.n;
    float values[kTiles][2][8];
#pragma unroll
    for (int i = 0; i < kTiles * 2; ++i) {
      const int token = first_token + i * 8 + g;
      load8(values[i / 2][i % 2], x + static_cast<int64_t>(token) * args.n + feature, inside && token < args.tokens);
    }
    __syncthreads();  // the last chunk is done with
    const int pieces = min(kDownChunk, args.n - start) * args.r / 8;
    const uint4* from = reinterpret_cast<const uint4*>(args.basis + static_cast<int64_t>(start) * args.r);
    for (int i = threadIdx.x; i < pieces; i += kWarps * 32) shared[i] = __ldg(from + i);
    __syncthreads();
#pragma unroll
    for (int c = 0; c < columns; ++c) {
      uint32_t b[4][2];
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const __half value = inside ? basis[(warp * 32 + 8 * t + i) * args.r + 8 * c + g] : __half(0.0f);
        b[i / 2][i % 2] = __float_as_uint(__half2float(value));
      }
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile)
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          const float(&v)[2][8] = values[tile];
          uint32_t lead[4], trail[4];
#pragma unroll
          for (int i = 0; i < 4; ++i) split_tf32(v[i % 2][2 * k + i / 2], lead[i], trail[i]);
          if constexpr (sizeof(X) == 4) mma_tf32(acc[tile][c], trail, b[k]);
          mma_tf32(acc[tile][c], lead, b[k]);
        }
    }
  }

  for (int turn = 0; turn < kWarps; ++turn) {  // in order: the same bits every time
    __syncthreads();
    if (turn != warp) continue;
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile)
#pragma unroll
      for (int c = 0; c < columns; ++c)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          float& sum = sums[(tile * 16 + g + i / 2 * 8) * args.rp + 8 * c + 2 * t + i % 2];
          sum = turn ? sum + acc[tile][c][i] : acc[tile][c][i];
        }
  }
  __syncthreads();
  float* out = args.partial + (static_cast<int64_t>(blockIdx.y) * args.tokens + first_token) * args.rp;
  const int rows = min(kDownTokens, args.tokens - first_token);
  for (int i = threadIdx.x; i < rows * args.rp; i += kWarps * 32)
    out[i] = i % args.rp < args.rank ? sums[i] : 0.0f;
}

template <class X>
void launch(const Args& args, cudaStream_t stream) {
  const dim3 grid(ceil_div(args.tokens, kDownTokens), args.splits);
  const size_t shared = (kDownChunk * args.r + kFastRank) * sizeof(__half) + kDownTokens * args.rp * sizeof(float);
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
