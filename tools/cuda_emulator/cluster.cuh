// kernels/cuda/cluster.cuh for the emulator.
#pragma once

#include "emulator.h"

namespace specquant_cuda {

inline int cluster_rank() { return emulator::self->rank; }
inline void cluster_arrive() { emulator::cluster_arrive(); }
inline void cluster_wait() { emulator::cluster_wait(); }

template <class T>
T* of_block(T* shared, int rank) {
  const ptrdiff_t at = reinterpret_cast<char*>(shared) - emulator::self->shared;
  return reinterpret_cast<T*>(const_cast<char*>(emulator::shared_of(rank)) + at);
}

// A box: bytes that are still to come, less those that came before it was opened again; and how often it was full.
struct Box {
  int32_t missing;
  uint16_t open, full;
  void look() {
    if (open && missing < 0) emulator::fail("more was sent to a box than it was opened for");
    if (open && missing == 0) open = 0, ++full;
  }
};

inline Box& box_of(uint64_t* box) { return *reinterpret_cast<Box*>(box); }
inline void box_open(uint64_t* box, int bytes) { box_of(box) = {bytes, 1, 0}; }
inline void box_again(uint64_t* box, int bytes) {
  Box& b = box_of(box);
  if (b.open) emulator::fail("a box is opened that is not full");
  b.missing += bytes, b.open = 1;
  b.look();
}
template <class T>
void box_send(T* shared, int rank, T value, uint64_t* box, int blocks) {
  if (blocks == 1) {
    *shared = value;
    return;
  }
  Box& there = box_of(of_block(box, rank));
  *of_block(shared, rank) = value;
  there.missing -= sizeof(T);
  there.look();
}
inline void box_wait(uint64_t* box, int blocks, int parity = 0) {
  if (blocks == 1) return emulator::sync_threads();
  while (box_of(box).full % 2 == parity) emulator::yield();
}

}  // namespace specquant_cuda
