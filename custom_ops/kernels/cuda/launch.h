// Starts a kernel that may overlap the one before it on the stream.
#pragma once

#include <cuda_runtime.h>

namespace specquant_cuda {

// early (compute capability 9.0 or later): the kernel starts once every block of the one before has called
// let_next_start() or ended. It must call wait_for_previous() (ptx.cuh) before it touches what that one reads or writes.
template <class... Parameters, class... Arguments>
cudaError_t launch_early(void (*kernel)(Parameters...), dim3 grid, int threads, size_t shared, bool early,
                         cudaStream_t stream, Arguments... arguments) {
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = early ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}

// The same, started early, with clusters of `blocks` blocks: compute capability 9.0 or later.
struct ClusterLaunch {
  cudaLaunchAttribute attributes[2] = {};
  cudaLaunchConfig_t config{};

  ClusterLaunch(const ClusterLaunch&) = delete;  // config points to attributes
  ClusterLaunch(dim3 grid, int threads, size_t shared, int blocks, cudaStream_t stream) {
    attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[0].val.programmaticStreamSerializationAllowed = 1;
    attributes[1].id = cudaLaunchAttributeClusterDimension;
    attributes[1].val.clusterDim.x = static_cast<unsigned>(blocks);
    attributes[1].val.clusterDim.y = attributes[1].val.clusterDim.z = 1;
    config.gridDim = grid;
    config.blockDim = dim3(threads);
    config.dynamicSmemBytes = shared;
    config.stream = stream;
    config.attrs = attributes;
    config.numAttrs = 2;
  }
};

template <class... Parameters, class... Arguments>
cudaError_t launch_cluster(void (*kernel)(Parameters...), dim3 grid, int threads, size_t shared, int blocks,
                           cudaStream_t stream, Arguments... arguments) {
  const ClusterLaunch launch(grid, threads, shared, blocks, stream);
  return cudaLaunchKernelEx(&launch.config, kernel, arguments...);
}

// How many such clusters run at once: fewer than their sizes say, where groups of multiprocessors are not a multiple.
template <class... Parameters>
cudaError_t count_clusters(void (*kernel)(Parameters...), int threads, size_t shared, int blocks, int& clusters) {
  const ClusterLaunch launch(dim3(blocks), threads, shared, blocks, nullptr);
  return cudaOccupancyMaxActiveClusters(&clusters, kernel, &launch.config);
}

}  // namespace specquant_cuda
