// Launches of gemm.cuh: one tile for many tokens, one for fewer.
#include "gemm.cuh"
#include "launch.h"

namespace specquant_cuda {
namespace {

template <class G, int stages>
cudaError_t launch(const Args& args, cudaStream_t stream) {
  const auto kernel = gemm_kernel<G, stages>;
  static Known known;
  const cudaError_t error = allow(kernel, G::kShared, false, known);
  if (error != cudaSuccess) return error;
  const dim3 grid(ceil_div(args.tokens, G::kTokens), ceil_div(args.m, G::kOutputs));
  kernel<<<grid, G::kThreads, G::kShared, stream>>>(args);
  return cudaGetLastError();
}

template <Mode mode>
cudaError_t launch_tile(const Args& args, bool large, cudaStream_t stream) {
  constexpr int stages = 4;
  return large ? launch<Gemm<mode, 4, 2, 4, stages>, stages>(args, stream)   // 128 tokens x 256 outputs
               : launch<Gemm<mode, 2, 2, 2, stages>, stages>(args, stream);  // 64 tokens x 128 outputs
}

}  // namespace

cudaError_t gemm(const Args& args, Mode mode, bool large, cudaStream_t stream) {
  switch (mode) {
    case kFold: return launch_tile<kFold>(args, large, stream);
    case kChannel: return launch_tile<kChannel>(args, large, stream);
    case kMultiples: return launch_tile<kMultiples>(args, large, stream);
    default: return launch_tile<kHalf>(args, large, stream);
  }
}

}  // namespace specquant_cuda
