// y for a tile of T tokens × P panels, all features: accumulators stay in registers, weights are unpacked once
// per tile, and the branch and the bias come last.
#pragma once

#include "one_token.h"

namespace specquant {
namespace {

template <class V, int T, int P>
void multiply_tile(const Problem& p, const Activations& x, int64_t row, int64_t panel) {
  constexpr int C = P * kPanel / V::W;
  const int64_t column = panel * kPanel;
  typename V::F sums[T][C];
#pragma GCC unroll 16
  for (int i = 0; i < T * C; ++i) sums[i / C][i % C] = V::splat(0.0f);
  if (p.qweight && p.act_bits < 16) add_integer<V, T, C>(p, x, row, column, sums);
  if (p.qweight && p.act_bits == 16) add_float<V, T, C>(p, x, row, column, sums);
  typename V::F acc[T][C];
  bias_and_branch<V, T, C>(p, x, row, column, acc);
  finish_tile<V, T, C>(p, x, row, column, acc, [&](int t, int v) { return sums[t][v]; });
}

// Panels, side by side in y, of T tokens.
template <class V, int T, int P>
void multiply_panels(const Problem& p, const Activations& x, int64_t row, int64_t panel, int64_t panels) {
  for (; panels >= P; panel += P, panels -= P) multiply_tile<V, T, P>(p, x, row, panel);
  if constexpr (P > 1) multiply_panels<V, T, P / 2>(p, x, row, panel, panels);
}

// Tiles of T tokens, then of half as many …; panels(T) is more, the fewer the tokens are.
template <class V, int T>
void multiply_rows(const Problem& p, const Activations& x, int64_t row, int64_t rows, int64_t panel, int64_t panels) {
  if constexpr (T > 1) {
    for (; rows >= T; row += T, rows -= T) multiply_panels<V, T, V::panels(T)>(p, x, row, panel, panels);
    multiply_rows<V, T / 2>(p, x, row, rows, panel, panels);
  } else if (rows) {
    multiply_one<V>(p, x, row, panel, panels);
  }
}

template <class V>
void multiply(const Problem& p, const Activations& x, int64_t row, int64_t rows, int64_t panel, int64_t panels) {
  multiply_rows<V, V::kTokens>(p, x, row, rows, panel, panels);
}

}  // namespace
}  // namespace specquant
