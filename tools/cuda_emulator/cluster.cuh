// kernels/cuda/cluster.cuh for the emulator.
#pragma once

#include "emulator.h"

namespace specquant_cuda {

inline int cluster_rank() { return emulator::self->rank; }
inline void cluster_arrive() { emulator::cluster_arrive(); }
inline void cluster_wait() { emulator::cluster_wait(); }
inline float cluster_read(const float* shared, int rank) {
  const ptrdiff_t at = reinterpret_cast<const char*>(shared) - emulator::self->shared;
  return *reinterpret_cast<const float*>(emulator::shared_of(rank) + at);
}

}  // namespace specquant_cuda
