// SpectralBranch: low = x · B[:, :rank] by `down`, or where that does not take the sizes by a thread a column; then one
// kernel sums the shares of low and multiplies them with C, in float32.
#include "branch_args.h"
#include "levels.cuh"

namespace specquant_cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / 32;

template <class X>
__device__ __forceinline__ void store(void* to, int64_t at, float value) {
  if constexpr (sizeof(X) == 2) {
    static_cast<__half*>(to)[at] = __float2half_rn(value);
  } else {
    static_cast<float*>(to)[at] = value;
  }
}

// One token (blockIdx.x) and 32 columns (blockIdx.y); a warp takes every kWarps-th feature.
template <class X>
__global__ void __launch_bounds__(kThreads) project_kernel(const Args args) {
  __shared__ float sums[kThreads];
  const int token = blockIdx.x, warp = threadIdx.x / 32, column = blockIdx.y * 32 + threadIdx.x % 32;
  const X* x = static_cast<const X*>(args.x) + static_cast<int64_t>(token) * args.n;
  float sum = 0.0f;
  for (int i = warp; i < args.n && column < args.rank; i += kWarps)
    sum = fmaf(to_float(x[i]), __half2float(args.basis[static_cast<int64_t>(i) * args.r + column]), sum);
  sums[threadIdx.x] = sum;
  __syncthreads();
  if (warp) return;
  for (int w = 1; w < kWarps; ++w) sum += sums[w * 32 + threadIdx.x];
  args.partial[static_cast<int64_t>(token) * args.rp + column] = sum;
}

// kThreads outputs (blockIdx.x) of every gridDim.y-th token.
template <class X>
__global__ void __launch_bounds__(kThreads) expand_kernel(const Args args, void* low_out) {
  extern __shared__ float low[];  // [rank_padded]
  const int output = blockIdx.x * kThreads + threadIdx.x;
  for (int token = blockIdx.y; token < args.tokens; token += gridDim.y) {
    __syncthreads();  // the last token's low is done with
    for (int j = threadIdx.x; j < args.r; j += kThreads) {
      float sum = 0.0f;
      for (int s = 0; s < args.splits && j < args.rank; ++s)  // in order: the same bits every time
        sum += args.partial[(static_cast<int64_t>(s) * args.tokens + token) * args.rp + j];
      if (j < args.rank) low[j] = sum;
      if (blockIdx.x == 0) store<X>(low_out, static_cast<int64_t>(token) * args.r + j, sum);
    }
    __syncthreads();
    if (output >= args.m) continue;
    float y = 0.0f;
    for (int j = 0; j < args.rank; ++j)
      y = fmaf(low[j], __half2float(args.coef[static_cast<int64_t>(j) * args.m + output]), y);
    store<X>(args.y, static_cast<int64_t>(token) * args.m + output, y);
  }
}

template <class X>
cudaError_t launch(const BranchPlan& plan, void* low, cudaStream_t stream) {
  const Args& args = plan.args;
  cudaError_t error = cudaSuccess;
  if (args.rank && plan.tensor) error = down(args, stream);
  if (args.rank && !plan.tensor) {
    const dim3 grid(args.tokens, args.rp / kRankStep);
    project_kernel<X><<<grid, kThreads, 0, stream>>>(args);
    error = cudaGetLastError();
  }
  if (error != cudaSuccess) return error;
  const dim3 grid(ceil_div(args.m, kThreads), min(args.tokens, 65535));
  expand_kernel<X><<<grid, kThreads, args.rp * sizeof(float), stream>>>(args, low);
  return cudaGetLastError();
}

}  // namespace

cudaError_t branch(const BranchPlan& plan, void* low, cudaStream_t stream) {
  return plan.args.x_half ? launch<__half>(plan, low, stream) : launch<float>(plan, low, stream);
}

}  // namespace specquant_cuda
