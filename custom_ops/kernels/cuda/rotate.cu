// x times the orthonormal Hadamard matrix, block by block.
#include <algorithm>

#include "args.h"
#include "hadamard.cuh"
#include "levels.cuh"

namespace specquant_cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kSpan = 2048;  // features that a block of threads holds, or one Hadamard block where that is longer

template <class X>
__global__ void __launch_bounds__(kThreads) rotate_kernel(const X* x, float* out, int n, int block, int span) {
  extern __shared__ float values[];
  const int first = blockIdx.y * span, count = min(span, n - first);
  const int64_t at = static_cast<int64_t>(blockIdx.x) * n + first;
  for (int i = threadIdx.x; i < count; i += kThreads) values[i] = to_float(x[at + i]);
  __syncthreads();
  hadamard_blocks(values, count, block);
  const float factor = hadamard_factor(block);
  for (int i = threadIdx.x; i < count; i += kThreads) out[at + i] = values[i] * factor;
}

}  // namespace

cudaError_t rotate(const Args& args, const void* x, int x_half, float* rotated, cudaStream_t stream) {
  const int block = args.hadamard, span = std::min(args.n, std::max(block, kSpan / block * block));
  const dim3 grid(args.tokens, ceil_div(args.n, span));
  const size_t shared = span * sizeof(float);
  if (x_half) {
    rotate_kernel<<<grid, kThreads, shared, stream>>>(static_cast<const __half*>(x), rotated, args.n, block, span);
  } else {
    rotate_kernel<<<grid, kThreads, shared, stream>>>(static_cast<const float*>(x), rotated, args.n, block, span);
  }
  return cudaGetLastError();
}

}  // namespace specquant_cuda
