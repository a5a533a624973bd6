// x times the orthonormal Hadamard matrix of Sylvester's order, block by block, in float32.
#include <algorithm>

#include "args.h"
#include "levels.cuh"

namespace specquant_cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kSpan = 2048;  // features that a block of threads holds, or one Hadamard block where that is longer

// `steps` butterflies, at distance d, 2d, …, on 2^steps values in registers: the order of walsh_hadamard in attention.py.
template <int steps>
__device__ __forceinline__ void butterflies(float* values, int count, int d) {
  constexpr int size = 1 << steps;
  for (int i = threadIdx.x; i < count / size; i += kThreads) {
    float* base = values + (i / d) * d * size + i % d;
    float v[size];
#pragma unroll
    for (int j = 0; j < size; ++j) v[j] = base[j * d];
#pragma unroll
    for (int step = 1; step < size; step *= 2)
#pragma unroll
      for (int j = 0; j < size; ++j)
        if (!(j & step)) {
          const float a = v[j], b = v[j + step];
          v[j] = a + b;
          v[j + step] = a - b;
        }
#pragma unroll
    for (int j = 0; j < size; ++j) base[j * d] = v[j];
  }
  __syncthreads();
}

template <class X>
__global__ void __launch_bounds__(kThreads) rotate_kernel(const X* x, float* out, int n, int block, int span) {
  extern __shared__ float values[];
  const int first = blockIdx.y * span, count = min(span, n - first);
  const int64_t at = static_cast<int64_t>(blockIdx.x) * n + first;
  for (int i = threadIdx.x; i < count; i += kThreads) values[i] = to_float(x[at + i]);
  __syncthreads();
  int d = 1;
  for (; d * 8 <= block; d *= 8) butterflies<3>(values, count, d);
  if (d * 4 == block) butterflies<2>(values, count, d);
  if (d * 2 == block) butterflies<1>(values, count, d);
  const float factor = __fdiv_rn(1.0f, __fsqrt_rn(static_cast<float>(block)));
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
