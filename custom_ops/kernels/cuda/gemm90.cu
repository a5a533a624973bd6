// Launches of gemm90.cuh. Compiled for sm_90a alone: plan.cc sends no other GPU here.
#include <algorithm>

#include "gemm90.cuh"
#include "launch.h"

namespace specquant_cuda {
namespace {

template <Mode mode, int tokens, int folds>
cudaError_t launch(const Args& args, int multiprocessors, cudaStream_t stream) {
  using G = Gemm90<mode, tokens, folds>;
  const auto kernel = gemm90_kernel<mode, tokens, folds>;
  static Known known;
  const cudaError_t error = allow(kernel, G::kShared, false, known);
  if (error != cudaSuccess) return error;
  const int tiles = ceil_div(args.tokens, tokens) * ceil_div(args.m, G::kOutputs);
  const int blocks = std::min(tiles, multiprocessors);
  return launch_early(kernel, dim3(blocks), G::kThreads, G::kShared, args.early, stream, args);
}

template <Mode mode, int small, int large>
cudaError_t launch_tile(const Args& args, bool wide, int multiprocessors, cudaStream_t stream) {
  const auto pick = [&](auto narrow, auto broad) { return (wide ? broad : narrow)(args, multiprocessors, stream); };
  if constexpr (mode != kChannel)
    if (args.segment % kChunk) return pick(launch<mode, small, 2>, launch<mode, large, 2>);
  return pick(launch<mode, small, 1>, launch<mode, large, 1>);
}

}  // namespace

cudaError_t gemm90(const Args& args, Mode mode, bool large, int multiprocessors, cudaStream_t stream) {
  switch (mode) {
    case kFold: return launch_tile<kFold, 64, 80>(args, large, multiprocessors, stream);
    default: return launch_tile<kChannel, 64, 128>(args, large, multiprocessors, stream);
  }
}

}  // namespace specquant_cuda
