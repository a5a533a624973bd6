// kernels/cuda/cluster.cuh for the emulator.
#pragma once

#include "emulator.h"

namespace specquant_cuda {

inline int cluster_rank() { return emulator::self->rank; }
inline void cluster_arrive() { emulator::cluster_arrive(); }
inline void cluster_release() { emulator::cluster_arrive(); }
inline void cluster_wait() { emulator::cluster_wait(); }

template <class T>
T* of_block(T* shared, int rank) {
  const ptrdiff_t at = reinterpret_cast<char*>(shared) - emulator::self->shared;
  return reinterpret_cast<T*>(const_cast<char*>(emulator::shared_of(rank)) + at);
}

inline float cluster_read(const float* shared, int rank) { return *of_block(const_cast<float*>(shared), rank); }

// The box holds the bytes that are still to come.
inline void box_open(uint64_t* box, int bytes) { *box = bytes; }
template <class T>
void box_send(T* shared, int rank, T value, uint64_t* box, int blocks) {
  if (blocks == 1) {
    *shared = value;
    return;
  }
  uint64_t* there = of_block(box, rank);
  if (*there < sizeof(T) || *there > 1 << 24) emulator::fail("more was sent to a box than it was opened for");
  *of_block(shared, rank) = value;
  *there -= sizeof(T);
}
inline void box_wait(uint64_t* box, int blocks) {
  if (blocks == 1) return emulator::sync_threads();
  while (*box) emulator::yield();
}

}  // namespace specquant_cuda
