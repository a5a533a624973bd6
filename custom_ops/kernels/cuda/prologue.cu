// x̂ (docs/ops.md): x normed, row by row in float32.
#include "prologue.cuh"

namespace specquant_cuda {
namespace {

// x / √(mean(x²) + epsilon) · norm of one token a block.
template <class X>
__global__ void __launch_bounds__(kNormThreads) norm_kernel(const X* all, const float* norm, float* to, int n,
                                                            float epsilon) {
  __shared__ float scratch[kNormThreads / 32];
  const int64_t row = static_cast<int64_t>(blockIdx.x) * n;
  const float inverse = inverse_rms(all + row, n, epsilon, scratch);
  for (int i = threadIdx.x; i < n; i += kNormThreads) to[row + i] = to_float(all[row + i]) * inverse * norm[i];
}

template <class X>
void launch(const SpecquantCudaProblem& problem, float* to, cudaStream_t stream) {
  const X* x = static_cast<const X*>(problem.x);
  const int tokens = static_cast<int>(problem.tokens), n = static_cast<int>(problem.in_features);
  norm_kernel<<<tokens, kNormThreads, 0, stream>>>(x, problem.norm, to, n, problem.epsilon);
}

}  // namespace

cudaError_t prologue(const SpecquantCudaProblem& problem, float* to, cudaStream_t stream) {
  if (problem.half) {
    launch<__half>(problem, to, stream);
  } else {
    launch<float>(problem, to, stream);
  }
  return cudaGetLastError();
}

}  // namespace specquant_cuda
