// What this CPU can do at most, for a benchmark to compare with: products of bytes when nothing has to be loaded.
#pragma once

#include "tiles.h"

namespace specquant {
namespace {

// `steps` rounds of the instruction set's dot product on independent sums; how many operations that was, a
// multiplication and its addition being two. kAssembly: V::dot is, so that the compiler cannot multiply once, and add.
template <class V, bool kAssembly = false>
int64_t peak(int64_t steps) {
  constexpr int kSums = 12;
  static const uint8_t nibbles[kPanel * 4] = {0x79};
  int8_t levels[kBlock] = {1, 2, 3};
  typename V::I sums[kSums];
  for (auto& sum : sums) sum = V::splat_int(0);
  const auto weights = V::unpack(nibbles);
  for (int64_t i = 0; i < steps; ++i) {
    auto activation = V::activation(levels);
#pragma GCC unroll 12
    for (auto& sum : sums) {
      if (!kAssembly) {
        __asm__ volatile("" : "+m"(levels));
        activation = V::activation(levels);
      }
      sum = V::dot(sum, weights, activation);
    }
    __asm__ volatile("");
  }
  float lanes[V::W];
  for (int i = 1; i < kSums; ++i) sums[0] = V::add(sums[0], sums[i]);
  V::store(lanes, V::to_float(sums[0]));
  __asm__ volatile("" : : "m"(lanes));
  return steps * kSums * V::W * kBlock * 2;
}

}  // namespace
}  // namespace specquant
