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

}  // namespace
}  // namespace specquant
