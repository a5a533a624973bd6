// From the sums of a tile of T tokens × C vectors of outputs to y: scales, bias and branch, gate or residual, and rounding.
#pragma once

#include <algorithm>

#include "gate.h"
#include "tokens.h"

namespace specquant {
namespace {

template <class V>
typename V::F load_as(const float* from) { return V::load(from); }
template <class V>
typename V::F load_as(const uint16_t* from) { return V::half(from); }
template <class V>
void store_as(float* to, typename V::F value) { V::store(to, value); }
template <class V>
void store_as(uint16_t* to, typename V::F value) { V::store_half(to, value); }

// y, of X, of a tile with a gate or of fewer outputs than it has.
template <class V, int T, int C, class X>
void store_part(const Problem& p, int64_t token, int64_t column, float (&sums)[T][C * V::W]) {
  const int64_t parts = p.gate ? 2 : 1, width = p.out_features / parts, left = p.out_features - column;
  for (int t = 0; t < T; ++t) {
    if (p.gate) gate_pairs<V, C * V::W>(sums[t], p.gate == kGeluGate);
    X rounded[C * V::W];
    for (int v = 0; v < C; ++v) {
      auto value = V::load(&sums[t][v * V::W]);
      if (p.residual) {
        X spare[V::W];
        const int64_t at = (token + t) * width + column + v * V::W;
        value = value + load_as<V>(whole<V::W>(static_cast<const X*>(p.residual), at, p.tokens * width, spare));
      }
      store_as<V>(rounded + v * V::W, value);
    }
    X* const y = static_cast<X*>(p.y) + (token + t) * width + column / parts;
    if (p.gate && left >= C * V::W) {  // a size that the compiler knows
      std::memcpy(y, rounded, C * V::W / 2 * sizeof(X));
    } else {
      std::memcpy(y, rounded, size_t(std::min<int64_t>(left, C * V::W) / parts) * sizeof(X));
    }
  }
}

// y = gate(acc) + residual. The residual is added last, so that small products are not lost beside it.
template <class V, int T, int C, class X>
inline __attribute__((always_inline)) void store_tile(const Problem& p, int64_t token, int64_t column,
                                                      typename V::F (&acc)[T][C]) {
  if (p.gate || column + C * V::W > p.out_features) {
    alignas(64) float sums[T][C * V::W];
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t)
#pragma GCC unroll 8
      for (int v = 0; v < C; ++v) V::store(&sums[t][v * V::W], acc[t][v]);
    return store_part<V, T, C, X>(p, token, column, sums);
  }
  const int64_t at = token * p.out_features + column;
  X* const y = static_cast<X*>(p.y) + at;
  const X* const residual = p.residual ? static_cast<const X*>(p.residual) + at : nullptr;
#pragma GCC unroll 8
  for (int t = 0; t < T; ++t)
#pragma GCC unroll 8
    for (int v = 0; v < C; ++v) {
      const int64_t there = t * p.out_features + v * V::W;
      store_as<V>(y + there, residual ? acc[t][v] + load_as<V>(residual + there) : acc[t][v]);
    }
}

// acc = bias + low · C[:rank]
template <class V, int T, int C>
inline __attribute__((always_inline)) void bias_and_branch(const Problem& p, const Activations& x, int64_t row,
                                                           int64_t column, typename V::F (&acc)[T][C]) {
  float spare[V::W];
#pragma GCC unroll 8
  for (int v = 0; v < C; ++v) {
    const auto bias = p.bias ? V::load(whole<V::W>(p.bias, column + v * V::W, p.out_features, spare)) : V::splat(0.0f);
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) acc[t][v] = bias;
  }
  if (p.basis)
    add_product<V, T, C>(acc, x.low + row * x.columns, x.columns, 0, p.rank, p.coef, p.out_features, p.basis_rank,
                         column);
}

// y of a tile from acc + scales · product(token, vector), the INT4 product's sums.
template <class V, int T, int C, class Product>
inline __attribute__((always_inline)) void finish_tile(const Problem& p, const Activations& x, int64_t row, int64_t column,
                                                       typename V::F (&acc)[T][C], const Product& product) {
  if (p.qweight) {
#pragma GCC unroll 8
    for (int v = 0; v < C; ++v) {
      uint16_t spare[V::W];
      const auto scales = V::half(whole<V::W>(p.scales, column + v * V::W, p.out_features, spare));
#pragma GCC unroll 8
      for (int t = 0; t < T; ++t) acc[t][v] = V::fma(scales, product(t, v), acc[t][v]);
    }
  }
  const int64_t token = x.first_token + row;
  p.half ? store_tile<V, T, C, uint16_t>(p, token, column, acc) : store_tile<V, T, C, float>(p, token, column, acc);
}

}  // namespace
}  // namespace specquant
