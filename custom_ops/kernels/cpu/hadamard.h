// The Hadamard transform that spreads a vector's few large values over all of them.
#pragma once

#include <cstdint>

namespace specquant {
namespace {

// x[d] times the orthonormal matrix of Sylvester's order, d a power of two from 8 on: sums and differences at distance
// 1, 2, 4, …, the first three inside blocks of 8, which the compiler keeps in registers.
inline void walsh_hadamard(float* x, int64_t d) {
  for (int64_t block = 0; block < d; block += 8) {
    float* v = x + block;
    for (int step = 1; step < 8; step *= 2)
      for (int i = 0; i < 8; ++i)
        if (!(i & step)) {
          const float a = v[i], b = v[i + step];
          v[i] = a + b;
          v[i + step] = a - b;
        }
  }
  for (int64_t step = 8; step < d; step *= 2)
    for (int64_t block = 0; block < d; block += 2 * step) {
      float* __restrict left = x + block;
      float* __restrict right = x + block + step;
      for (int64_t i = 0; i < step; ++i) {
        const float a = left[i], b = right[i];
        left[i] = a + b;
        right[i] = a - b;
      }
    }
  const float factor = 1.0f / __builtin_sqrtf(float(d));
  for (int64_t i = 0; i < d; ++i) x[i] *= factor;
}

// The same bits for d from 64 on, by vectors E of 8 lanes: 64 values stay in registers for six of the steps, the first
// three of them transposed.
template <class E>
inline void walsh_hadamard(float* x, int64_t d) {
  using F = typename E::F;
  const auto butterflies = [](F (&v)[8]) {
#pragma GCC unroll 3
    for (int step = 1; step < 8; step *= 2)
#pragma GCC unroll 8
      for (int i = 0; i < 8; ++i)
        if (!(i & step)) {
          const F a = v[i], b = v[i + step];
          v[i] = a + b;
          v[i + step] = a - b;
        }
  };
  const F factor = E::splat(1.0f / __builtin_sqrtf(float(d)));
  for (int64_t block = 0; block < d; block += 64) {
    F v[8];
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) v[i] = E::load(x + block + 8 * i);
    E::transpose(v);
    butterflies(v);
    E::transpose(v);
    butterflies(v);
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) E::store(x + block + 8 * i, d == 64 ? v[i] * factor : v[i]);
  }
  if (d == 64) return;
  for (int64_t step = 64; step < d; step *= 2)
    for (int64_t block = 0; block < d; block += 2 * step)
      for (int64_t i = block; i < block + step; i += 8) {
        const F a = E::load(x + i), b = E::load(x + i + step);
        E::store(x + i, a + b);
        E::store(x + i + step, a - b);
      }
  for (int64_t i = 0; i < d; i += 8) E::store(x + i, E::load(x + i) * factor);
}

}  // namespace
}  // namespace specquant
