// The first stage for every shape, a block of threads per token: levels of any groups, float16 activations, and a
// branch that the tensor-core kernels do not take.
#include "args.h"
#include "levels.cuh"
#include "reductions.cuh"

namespace specquant_cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kLongGroup = 1024;  // from here on all threads share a group

template <class U>
__global__ void __launch_bounds__(kThreads) quantize_kernel(const Args args, const U* all) {
  __shared__ float scratch[kWarps];
  let_next_start();
  const int token = blockIdx.x, length = args.segment;
  const U* u = all + static_cast<int64_t>(token) * args.n;
  int8_t* levels = static_cast<int8_t*>(args.levels);
  const bool wide = length >= kLongGroup;
  const int worker = wide ? threadIdx.x : threadIdx.x % 32, workers = wide ? kThreads : 32;
  for (int group = wide ? 0 : threadIdx.x / 32; group < args.segments; group += wide ? 1 : kWarps) {
    const int start = group * length;
    float lowest = 0.0f, highest = 0.0f;
    for (int i = worker; i < length; i += workers) {
      const float value = to_float(u[start + i]);
      lowest = min_nan(lowest, value);
      highest = max_nan(highest, value);
    }
    lowest = wide ? over_block<kWarps>(lowest, Smallest(), scratch) : over_warp(lowest, Smallest());
    highest = wide ? over_block<kWarps>(highest, Largest(), scratch) : over_warp(highest, Largest());
    const Quantizer q(lowest, highest, args.clip, args.bits);
    for (int i = worker; i < length; i += workers)
      levels[level_place(args, token, start + i)] = static_cast<int8_t>(q.byte(to_float(u[start + i])));
    if (worker == 0) store_scale(args, token, group, q);
  }
  for (int i = args.n + threadIdx.x; i < args.kp; i += kThreads) levels[level_place(args, token, i)] = 0;
}

template <class U>
__global__ void __launch_bounds__(kThreads) halve_kernel(const Args args, const U* all) {
  __shared__ float scratch[kWarps];
  let_next_start();
  const int token = blockIdx.x;
  const U* u = all + static_cast<int64_t>(token) * args.n;
  __half* out = static_cast<__half*>(args.levels);
  float largest = 0.0f, factor, inverse;
  for (int i = threadIdx.x; i < args.n; i += kThreads) largest = max_nan(largest, fabsf(to_float(u[i])));
  half_factor(over_block<kWarps>(largest, Largest(), scratch), factor, inverse);
  for (int i = threadIdx.x; i < args.kp; i += kThreads)
    out[level_place(args, token, i)] = i < args.n ? __float2half_rn(to_float(u[i]) * inverse) : __half(0.0f);
  if (threadIdx.x == 0) args.scale[token] = factor;
}

// low, its two float16 parts, and x − low · Bᵀ, without tensor cores.
template <class X>
__global__ void __launch_bounds__(kThreads) branch_kernel(const Args args) {
  extern __shared__ float low[];  // [rank_padded]
  __shared__ float scratch[kWarps];
  const int token = blockIdx.x, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const X* x = static_cast<const X*>(args.x) + static_cast<int64_t>(token) * args.n;
  for (int j = warp; j < args.rp; j += kWarps) {
    float sum = 0.0f;
    for (int i = lane; i < args.n && j < args.rank; i += 32)
      sum = fmaf(to_float(x[i]), __half2float(args.basis[static_cast<int64_t>(i) * args.r + j]), sum);
    sum = over_warp(sum, Sum());
    if (lane == 0) low[j] = sum;
  }
  __syncthreads();
  float largest = 0.0f, factor, inverse;
  for (int j = threadIdx.x; j < args.rank; j += kThreads) largest = max_nan(largest, fabsf(low[j]));
  half_factor(over_block<kWarps>(largest, Largest(), scratch), factor, inverse);
  __half* out = args.low + static_cast<int64_t>(token) * 2 * args.rp;
  for (int j = threadIdx.x; j < args.rp; j += kThreads) split_half(low[j] * inverse, out[j], out[args.rp + j]);
  if (threadIdx.x == 0) args.low_factor[token] = factor;
  if (!args.subtract) return;
  for (int i = threadIdx.x; i < args.n; i += kThreads) {
    float sum = 0.0f;
    for (int j = 0; j < args.rank; ++j)
      sum = fmaf(low[j], __half2float(args.basis[static_cast<int64_t>(i) * args.r + j]), sum);
    args.reduced[static_cast<int64_t>(token) * args.n + i] = to_float(x[i]) - sum;
  }
}

template <class U>
void launch(const Args& args, const U* u, cudaStream_t stream) {
  if (args.bits == 16) {
    halve_kernel<<<args.tokens, kThreads, 0, stream>>>(args, u);
  } else {
    quantize_kernel<<<args.tokens, kThreads, 0, stream>>>(args, u);
  }
}

}  // namespace

cudaError_t quantize(const Args& args, const void* u, int u_half, cudaStream_t stream) {
  if (u_half) {
    launch(args, static_cast<const __half*>(u), stream);
  } else {
    launch(args, static_cast<const float*>(u), stream);
  }
  return cudaGetLastError();
}

cudaError_t branch_any(const Args& args, cudaStream_t stream) {
  const size_t shared = args.rp * sizeof(float);
  if (args.x_half) {
    branch_kernel<__half><<<args.tokens, kThreads, shared, stream>>>(args);
  } else {
    branch_kernel<float><<<args.tokens, kThreads, shared, stream>>>(args);
  }
  return cudaGetLastError();
}

}  // namespace specquant_cuda
