// The instructions of kernels/cuda/ptx90_half.cuh.
#pragma once

#include "ptx.cuh"
#include "ptx90.cuh"

namespace specquant_cuda {

inline void hold(float&) {}

struct NamedBarrier {
  int arrived = 0;
  long generation = 0;
};
inline NamedBarrier named_barriers[16];  // a block leaves them as it found them

inline void named_arrive(int barrier, int threads) {
  if (++named_barriers[barrier].arrived < threads) return;
  named_barriers[barrier].arrived = 0;
  ++named_barriers[barrier].generation;
}
inline void named_wait(int barrier, int threads) {
  const long before = named_barriers[barrier].generation;
  named_arrive(barrier, threads);
  while (named_barriers[barrier].generation == before) emulator::yield();
}

inline uint64_t wgmma_across(const void* shared, int stride) {
  if (stride % 1024) emulator::fail("pieces of an operand of wgmma that are not aligned to 1024 bytes");
  return wgmma_operand(shared) | uint64_t(stride >> 4) << 16;
}

// One float16 of a tile of swizzled rows of 128 bytes.
inline float operand_half(size_t base, int row, int column) {
  const size_t at = base + row * 128 + column * 2;
  uint16_t bits;
  std::memcpy(&bits, emulator::self->shared + (at ^ (at >> 7 & 7) << 4), 2);
  return half_of(bits, 0);
}

// Warp `warp` of the four: 16 rows of its own lanes' registers, or of operand A in shared memory.
inline void multiply_halves(emulator::Product* const (&lanes)[32], int warp) {
  const emulator::Product& product = *lanes[0];
  const bool across = product.form == emulator::Form::kHalfRegisters;
  const size_t left = (product.left & 0x3FFF) << 4, right = (product.b & 0x3FFF) << 4;
  const size_t stride = (product.b >> 16 & 0x3FFF) << 4;
  float A[16][16];
  for (int row = 0; row < 16; ++row)
    for (int k = 0; k < 16; ++k)
      A[row][k] = across ? half_of(lanes[row % 8 * 4 + k % 8 / 2]->a[row / 8 + k / 8 * 2], k % 2)
                         : operand_half(left, 16 * warp + row, k);
  for (int column = 0; column < product.columns; ++column) {
    float B[16];
    for (int k = 0; k < 16; ++k)
      B[k] = across ? operand_half(right + column / 64 * stride, k, column % 64) : operand_half(right, column, k);
    for (int row = 0; row < 16; ++row) {
      const emulator::Product& to = *lanes[row % 8 * 4 + column % 8 / 2];
      float& d = reinterpret_cast<float*>(to.d)[column / 8 * 4 + row / 8 * 2 + column % 2];
      double sum = to.add ? d : 0.0f;
      for (int k = 0; k < 16; ++k) sum += double(A[row][k]) * B[k];
      d = float(sum);
    }
  }
}

template <int sums>
void wgmma_f16(float (&d)[sums], uint64_t a, uint64_t b, bool add) {
  emulator::self->uncommitted.push_back(
      {reinterpret_cast<int*>(d), {}, b, add, 2 * sums, emulator::Form::kHalfShared, a});
  emulator::self->multiply_halves = multiply_halves;
}

template <int sums>
void wgmma_f16(float (&d)[sums], const uint32_t (&a)[4], uint64_t b, bool add) {
  emulator::self->uncommitted.push_back(
      {reinterpret_cast<int*>(d), {a[0], a[1], a[2], a[3]}, b, add, 2 * sums, emulator::Form::kHalfRegisters, 0});
  emulator::self->multiply_halves = multiply_halves;
}

}  // namespace specquant_cuda
