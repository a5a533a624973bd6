// Blocks of threads that run together and send each other numbers (compute capability 9.0 and later).
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

// All threads of all blocks arrive, once their boxes are open, then wait: nothing is sent before.
__device__ __forceinline__ void cluster_arrive() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
#endif
}

__device__ __forceinline__ void cluster_wait() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}

// A box counts what is sent to its block: as many bytes as it was opened for. By one thread.
__device__ __forceinline__ void box_open(uint64_t* box, int bytes) {
#if __CUDA_ARCH__ >= 900
  const uint32_t at = static_cast<uint32_t>(__cvta_generic_to_shared(box));
  asm volatile(
      "mbarrier.init.shared::cta.b64 [%0], 1;\nfence.mbarrier_init.release.cluster;\n"
      "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;\n" ::"r"(at),
      "r"(bytes)
      : "memory");
#endif
}

// For so many bytes once more, when they were waited for. Some may have come already.
__device__ __forceinline__ void box_again(uint64_t* box, int bytes) {
#if __CUDA_ARCH__ >= 900
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(
                   static_cast<uint32_t>(__cvta_generic_to_shared(box))),
               "r"(bytes)
               : "memory");
#endif
}

// A float, float2 or float4 to the same place of another block's shared memory, counted in its box. `blocks` are the
// cluster's: one alone has nobody to send to, and only meets.
template <class V>
__device__ __forceinline__ void box_send(V* shared, int rank, V value, uint64_t* box, int blocks) {
  if (blocks == 1) {
    *shared = value;
    return;
  }
#if __CUDA_ARCH__ >= 900
  constexpr int kWords = sizeof(V) / 4;
  static_assert(kWords == 1 || kWords == 2 || kWords == 4);
  const uint32_t own = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  const uint32_t count = static_cast<uint32_t>(__cvta_generic_to_shared(box));
#define SPECQUANT_SEND                                                                                              \
  "{\n.reg .u32 there, counter;\nmapa.shared::cluster.u32 there, %0, %2;\nmapa.shared::cluster.u32 counter, %1, %2;\n" \
  "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes"
  if constexpr (kWords == 1) {
    asm volatile(SPECQUANT_SEND ".b32 [there], %3, [counter];\n}\n" ::"r"(own), "r"(count), "r"(rank),
                 "r"(__float_as_uint(value))
                 : "memory");
  } else if constexpr (kWords == 2) {
    asm volatile(SPECQUANT_SEND ".v2.b32 [there], {%3, %4}, [counter];\n}\n" ::"r"(own), "r"(count), "r"(rank),
                 "r"(__float_as_uint(value.x)), "r"(__float_as_uint(value.y))
                 : "memory");
  } else {
    asm volatile(SPECQUANT_SEND ".v4.b32 [there], {%3, %4, %5, %6}, [counter];\n}\n" ::"r"(own), "r"(count), "r"(rank),
                 "r"(__float_as_uint(value.x)), "r"(__float_as_uint(value.y)), "r"(__float_as_uint(value.z)),
                 "r"(__float_as_uint(value.w))
                 : "memory");
  }
#undef SPECQUANT_SEND
#endif
}

// Until all of it is there; by all threads. parity: 0 the first time, 1 the second, and so on.
__device__ __forceinline__ void box_wait(uint64_t* box, int blocks, int parity = 0) {
  if (blocks == 1) {
    __syncthreads();
    return;
  }
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "{\n.reg .pred p;\nagain:\nmbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n@p bra done;\n"
      "bra again;\ndone:\n}\n" ::"r"(static_cast<uint32_t>(__cvta_generic_to_shared(box))),
      "r"(parity)
      : "memory");
#endif
}

}  // namespace specquant_cuda
