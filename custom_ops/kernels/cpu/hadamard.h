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

// Sums and differences of vectors 1, 2, 4, … apart.
template <class F, int N>
inline __attribute__((always_inline)) void butterflies(F (&v)[N]) {
#pragma GCC unroll 3
  for (int step = 1; step < N; step *= 2)
#pragma GCC unroll 8
    for (int i = 0; i < N; ++i)
      if (!(i & step)) {
        const F a = v[i], b = v[i + step];
        v[i] = a + b;
        v[i + step] = a - b;
      }
}

// 64 values through the first six steps, by eight vectors of 8 lanes: three of the steps on transposed ones.
template <class E>
inline __attribute__((always_inline)) void butterflies_of_64(typename E::F (&v)[8]) {
  E::transpose(v);
  butterflies(v);
  E::transpose(v);
  butterflies(v);
}

// By four of 16 lanes: four of the steps between lanes, a + b and a − b by one multiply-add, which rounds once.
template <class E>
inline __attribute__((always_inline)) void butterflies_of_64(typename E::F (&v)[4]) {
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) v[i] = E::butterflies(v[i]);
  butterflies(v);
}

// The same bits for d from 64 on, by vectors E of 8 or 16 lanes: 64 values stay in registers for six of the steps.
template <class E>
inline void walsh_hadamard(float* x, int64_t d) {
  using F = typename E::F;
  constexpr int W = E::W, kVectors = 64 / W;
  const F factor = E::splat(1.0f / __builtin_sqrtf(float(d)));
  for (int64_t block = 0; block < d; block += 64) {
    F v[kVectors];
#pragma GCC unroll 8
    for (int i = 0; i < kVectors; ++i) v[i] = E::load(x + block + W * i);
    butterflies_of_64<E>(v);
#pragma GCC unroll 8
    for (int i = 0; i < kVectors; ++i) E::store(x + block + W * i, d == 64 ? v[i] * factor : v[i]);
  }
  if (d == 64) return;
  for (int64_t step = 64; step < d; step *= 2)
    for (int64_t block = 0; block < d; block += 2 * step)
      for (int64_t i = block; i < block + step; i += W) {
        const F a = E::load(x + i), b = E::load(x + i + step);
        E::store(x + i, a + b);
        E::store(x + i + step, a - b);
      }
  for (int64_t i = 0; i < d; i += W) E::store(x + i, E::load(x + i) * factor);
}

}  // namespace
}  // namespace specquant
