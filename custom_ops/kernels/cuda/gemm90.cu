// Launches of gemm90.cuh. Compiled for sm_90a alone: plan.cc sends no other GPU here.
#include <algorithm>

#include "gemm90.cuh"
#include "launch.h"

namespace specquant_cuda {
namespace {

template <Mode mode, int tokens, int folds>
cudaError_t launch(const Args& args, int multiprocessors, cudaStream_t stream) {
  using G = Gemm90<mode, tokens, folds>;
  const auto kernel = gemm90_kernel<mode, tokens, folds, false>;
  static Known known;
  const cudaError_t error = allow(kernel, G::kShared, false, known);
  if (error != cudaSuccess) return error;
  const int tiles = ceil_div(args.tokens, tokens) * ceil_div(args.m, G::kOutputs);
  const int blocks = std::min(tiles, multiprocessors);
  return launch_early(kernel, dim3(blocks), G::kThreads, G::kShared, args.early, stream, args, 1);
}

// Few tiles: each by some blocks, as many as run at once. How many clusters do differs from card to card: of 8 blocks 15 or 16 on
// H100s of 132 multiprocessors.
template <Mode mode, int folds>
cudaError_t launch_small(const Args& args, int multiprocessors, cudaStream_t stream) {
  using G = Gemm90<mode, 64, folds, true>;
  const auto kernel = gemm90_kernel<mode, 64, folds, true>;
  static Known known, counts[3];
  const int tiles = ceil_div(args.tokens, 64) * ceil_div(args.m, G::kOutputs);
  for (int parts = shares_of_tile(args, tiles, multiprocessors); parts > 1; parts /= 2) {
    cudaError_t error = allow(kernel, G::kShared, false, known);
    int clusters = 0;
    if (error == cudaSuccess)
      error = count_clusters(kernel, G::kThreads, G::kShared, parts, clusters, counts[parts / 4]);
    if (error != cudaSuccess) return error;
    if (clusters >= tiles)
      return launch_cluster(kernel, dim3(tiles * parts), G::kThreads, G::kShared, parts, stream, args, parts);
  }
  return launch<mode, 64, folds>(args, multiprocessors, stream);
}

// folds: of 128 features.
template <int folds>
cudaError_t launch_folding(const Args& args, Tile90 tile, int multiprocessors, cudaStream_t stream) {
  return tile == Tile90::kSmall ? launch_small<kFold, folds>(args, multiprocessors, stream)
                                : launch<kFold, 80, folds>(args, multiprocessors, stream);
}

template <Mode mode>
cudaError_t launch_whole(const Args& args, Tile90 tile, int multiprocessors, cudaStream_t stream) {
  switch (tile) {
    case Tile90::kSmall: return launch_small<mode, 1>(args, multiprocessors, stream);
    case Tile90::kLarge: return launch<mode, 128, 1>(args, multiprocessors, stream);
    default:
      if constexpr (mode == kMultiples) return launch<mode, 256, 1>(args, multiprocessors, stream);
      return cudaErrorInvalidValue;  // plan.cc sends no other mode here
  }
}

}  // namespace

cudaError_t gemm90(const Args& args, Mode mode, Tile90 tile, int multiprocessors, cudaStream_t stream) {
  switch (mode) {
    case kFold:
      return args.segment % kChunk ? launch_folding<2>(args, tile, multiprocessors, stream)
                                   : launch_folding<1>(args, tile, multiprocessors, stream);
    case kMultiples: return launch_whole<kMultiples>(args, tile, multiprocessors, stream);
    default: return launch_whole<kChannel>(args, tile, multiprocessors, stream);
  }
}

}  // namespace specquant_cuda
