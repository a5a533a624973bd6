// kernels/cuda/launch.h for the emulator, where kernels run one after another.
#pragma once

#include "emulator.h"

namespace specquant_cuda {

struct Known {};
template <class... Parameters>
cudaError_t allow(void (*)(Parameters...), size_t, bool, Known&) {
  return cudaSuccess;
}

template <class... Parameters, class... Arguments>
cudaError_t launch_early(void (*kernel)(Parameters...), dim3 grid, int threads, size_t shared, bool, cudaStream_t,
                         Arguments... arguments) {
  emulator::launch(grid, dim3(threads), shared, [&] { kernel(arguments...); });
  return cudaSuccess;
}

template <class... Parameters, class... Arguments>
cudaError_t launch_cluster(void (*kernel)(Parameters...), dim3 grid, int threads, size_t shared, int blocks,
                           cudaStream_t, Arguments... arguments) {
  emulator::launch(grid, dim3(threads), shared, [&] { kernel(arguments...); }, blocks);
  return cudaSuccess;
}

template <class... Parameters>
cudaError_t count_clusters(void (*)(Parameters...), int, size_t, int blocks, int& clusters, Known&) {
  clusters = std::max(1, 8 / blocks);
  return cudaSuccess;
}

}  // namespace specquant_cuda
