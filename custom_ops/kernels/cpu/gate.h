// Pairs of outputs that become one: act(gate) · up.
#pragma once

#include <algorithm>

#include "exponential.h"
#include "steps.h"

namespace specquant {
namespace {

// g / (1 + e^−w), w of g's sign. One exponential, of −|w|, so that nothing overflows: the numerator is g or g e^w.
template <class V>
inline __attribute__((always_inline)) typename V::F sigmoid_gate(typename V::F g, typename V::F w) {
  using F = typename V::F;
  const F zero = V::splat(0.0f), one = V::splat(1.0f), power = exponential<V>(V::min(w, zero - w));
  return V::fma(V::min(zero, g), power, V::max(zero, g)) / (one + power);  // this order of min and max keeps a NaN
}

// sums[i] = act(sums[2i]) · sums[2i + 1], of L of them. gelu: by tanh, which is 1 / (1 + e^−w) with
// w = 2 √(2/π) (g + 0.044715 g³).
template <class V, int L>
inline __attribute__((always_inline)) void gate_pairs(float* sums, bool gelu) {
  using F = typename V::F;
  constexpr int kLanes = std::min(V::W, L / 2);
#pragma GCC unroll 4
  for (int i = 0; i < L / 2; i += kLanes) {
    float gates[V::W] = {}, ups[V::W] = {};
#pragma GCC unroll 16
    for (int lane = 0; lane < kLanes; ++lane) {
      gates[lane] = sums[2 * (i + lane)];
      ups[lane] = sums[2 * (i + lane) + 1];
    }
    const F g = V::load(gates);
    const F w = gelu ? g * V::fma(g * g, V::splat(0.0713548163f), V::splat(1.59576912f)) : g;
    float gated[V::W];
    V::store(gated, sigmoid_gate<V>(g, w) * V::load(ups));
    std::copy(gated, gated + kLanes, sums + i);
  }
}

}  // namespace
}  // namespace specquant
