// kernels/cuda/cluster.cuh for the emulator.
#pragma once

#include "emulator.h"

namespace specquant_cuda {

inline int cluster_rank() { return emulator::self->rank; }
inline void cluster_arrive() { emulator::cluster_arrive(); }
inline void cluster_wait() { emulator::cluster_wait(); }
inline void cluster_write(float* shared, int rank, float value) {
  const ptrdiff_t at = reinterpret_cast<char*>(shared) - emulator::self->shared;
  *reinterpret_cast<float*>(const_cast<char*>(emulator::shared_of(rank)) + at) = value;
}

}  // namespace specquant_cuda
