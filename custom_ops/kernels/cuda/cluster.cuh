// Blocks of threads that run together and write each other's shared memory (compute capability 9.0 and later).
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace specquant_cuda {

__device__ __forceinline__ int cluster_rank() {
  uint32_t rank = 0;
#if __CUDA_ARCH__ >= 900
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
#endif
  return static_cast<int>(rank);
}

// All threads of all blocks arrive, then wait: what was written before the one is seen after the other.
__device__ __forceinline__ void cluster_arrive() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
#endif
}

__device__ __forceinline__ void cluster_wait() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}

// A value to the same place of another block's shared memory, whose threads have arrived once; seen after the next meeting.
__device__ __forceinline__ void cluster_write(float* shared, int rank, float value) {
#if __CUDA_ARCH__ >= 900
  const uint32_t own = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile(
      "{\n.reg .u32 there;\nmapa.shared::cluster.u32 there, %0, %1;\nst.shared::cluster.f32 [there], %2;\n}\n" ::"r"(own),
      "r"(rank), "f"(value)
      : "memory");
#endif
}

}  // namespace specquant_cuda
