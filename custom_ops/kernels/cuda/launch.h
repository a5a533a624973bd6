// Starts kernels, which may overlap the one before them on the stream.
#pragma once

#include <cuda_runtime.h>

#include <atomic>
#include <cstdint>
#include <mutex>

namespace specquant_cuda {

// A number for each device that is asked of the driver once, since that takes longer than a launch: one of these for each
// kernel, or 0 for what is not known yet.
struct Known {
  static constexpr int kDevices = 32;
  std::atomic<uint64_t> of[kDevices] = {};
  std::atomic<uint64_t>* here() {
    int device = 0;
    return cudaGetDevice(&device) == cudaSuccess && device < kDevices ? of + device : nullptr;
  }
};

// Lets a kernel have `shared` bytes and more, and with `wide` run in clusters of 16 blocks.
inline cudaError_t allow(const void* kernel, size_t shared, bool wide, Known& known) {
  static std::mutex one_at_a_time;
  std::atomic<uint64_t>* const here = known.here();
  const auto enough = [&] {
    const uint64_t found = here ? here->load(std::memory_order_acquire) : 0;
    return found / 2 > shared && (found % 2 || !wide);
  };
  if (enough()) return cudaSuccess;
  const std::lock_guard<std::mutex> lock(one_at_a_time);  // limits only grow
  if (enough()) return cudaSuccess;
  const uint64_t before = here ? here->load(std::memory_order_relaxed) : 0;
  if (before / 2 > shared) shared = before / 2 - 1;
  wide = wide || before % 2;
  cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared));
  if (error == cudaSuccess && wide)
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
  if (error == cudaSuccess && here) here->store(2 * uint64_t(shared + 1) + wide, std::memory_order_release);
  return error;
}
template <class... Parameters>
cudaError_t allow(void (*kernel)(Parameters...), size_t shared, bool wide, Known& known) {
  return allow(reinterpret_cast<const void*>(kernel), shared, wide, known);
}

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
cudaError_t count_clusters(void (*kernel)(Parameters...), int threads, size_t shared, int blocks, int& clusters,
                           Known& known) {
  std::atomic<uint64_t>* const last = known.here();
  const uint64_t asked = (uint64_t(shared) << 20 | uint64_t(threads) << 8 | uint64_t(blocks)) << 16;
  const uint64_t answer = last ? last->load(std::memory_order_relaxed) : 0;
  if (answer && answer >> 16 << 16 == asked) {
    clusters = int(answer & 0xFFFF);
    return cudaSuccess;
  }
  const ClusterLaunch launch(dim3(blocks), threads, shared, blocks, nullptr);
  const cudaError_t error = cudaOccupancyMaxActiveClusters(&clusters, kernel, &launch.config);
  if (error == cudaSuccess && last) last->store(asked | uint64_t(clusters & 0xFFFF), std::memory_order_relaxed);
  return error;
}

}  // namespace specquant_cuda
