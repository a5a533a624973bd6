// u −= low · B[:, :rank]ᵀ, by the basis as it lies, or turned beforehand when many tokens follow. Both add the same
// products in the same order.
#pragma once

#include <algorithm>

#include "half.h"
#include "steps.h"

namespace specquant {
namespace {

constexpr int kAcross = 4;  // vectors of 8 columns whose products are one sum; the columns left are one by one

// parts[t][i] += Σ low · B[feature + i], over K · 8 columns from `column` on; lanes run along the columns. Whole: they
// lie in B, all of them.
template <class E, int T, int K, bool kWhole>
inline __attribute__((always_inline)) void add_columns(const Problem& p, const float* low, int64_t stride,
                                                       int64_t feature, int64_t column, typename E::F (&parts)[T][8]) {
  const int64_t total = p.in_features * p.basis_rank;
  uint16_t spare[8];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    const int64_t index = (feature + i) * p.basis_rank + column;
    typename E::F sums[T];
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) sums[t] = E::splat(0.0f);
#pragma GCC unroll 4
    for (int k = 0; k < K; ++k) {
      const auto basis = E::half(kWhole ? p.basis + index + 8 * k : whole<8>(p.basis, index + 8 * k, total, spare));
#pragma GCC unroll 8
      for (int t = 0; t < T; ++t) sums[t] = E::fma(basis, E::load(low + t * stride + 8 * k), sums[t]);
    }
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) parts[t][i] = parts[t][i] + sums[t];
  }
}

// u −= low · B[:, :rank]ᵀ for T rows. B is read as it lies; products of 8 features are turned before they are summed.
template <class E, int T>
void subtract_branch(const Problem& p, const Activations& x, int64_t row) {
  constexpr int K = kAcross;
  const float* low = x.low + row * x.columns;  // 0 from rank on, where B holds columns that are not used, or the next row
  const int64_t wide = round_up(p.rank, 8) / (8 * K) * (8 * K);
  const int64_t safe = p.basis_rank < 8 * K ? 0 : p.in_features / 8 * 8;  // features whose wide columns lie in B
  for (int64_t feature = 0; feature < p.in_features; feature += 8) {
    typename E::F parts[T][8];
#pragma GCC unroll 64
    for (int i = 0; i < 8 * T; ++i) parts[i / 8][i % 8] = E::splat(0.0f);
    for (int64_t column = 0; column < p.rank; column += column < wide ? 8 * K : 8) {
      if (column < wide && feature < safe && wide <= p.basis_rank) {
        add_columns<E, T, K, true>(p, low + column, x.columns, feature, column, parts);
      } else if (column < wide) {
        add_columns<E, T, K, false>(p, low + column, x.columns, feature, column, parts);
      } else {
        add_columns<E, T, 1, false>(p, low + column, x.columns, feature, column, parts);
      }
    }
    for (int t = 0; t < T; ++t) {
      auto& part = parts[t];
      E::transpose(part);
      float* u = x.u + (row + t) * x.features + feature;
      E::store(u, E::load(u) - (((part[0] + part[1]) + (part[2] + part[3])) +
                                ((part[4] + part[5]) + (part[6] + part[7]))));
    }
  }
}

// x.turned[column, feature] = B, features [from, to), a multiple of 8 but for the last; zeros from N on.
template <class E>
void turn(const Problem& p, const Activations& x, int64_t from, int64_t to) {
  const int64_t total = p.in_features * p.basis_rank;
  for (int64_t feature = from; feature < to; feature += 8)
    for (int64_t column = 0; column < x.columns; column += 8) {
      typename E::F tile[8];
      for (int i = 0; i < 8; ++i) {
        uint16_t spare[8];
        const int64_t index = (feature + i) * p.basis_rank + column;
        tile[i] = feature + i < p.in_features ? E::half(whole<8>(p.basis, index, total, spare)) : E::splat(0.0f);
      }
      E::transpose(tile);
      for (int i = 0; i < 8; ++i) E::store(x.turned + (column + i) * x.features + feature, tile[i]);
    }
}

// T tokens and W features by the turned basis, lanes along features: sums[i] holds what lane i of add_columns does.
template <class V, int T>
inline __attribute__((always_inline)) void subtract_turned(const Problem& p, const Activations& x, int64_t row,
                                                           int64_t feature) {
  const float* low = x.low + row * x.columns;
  const int64_t rank = round_up(p.rank, 8), wide = rank / (8 * kAcross) * (8 * kAcross);
  typename V::F parts[T][8];
#pragma GCC unroll 16
  for (int i = 0; i < 8 * T; ++i) parts[i / 8][i % 8] = V::splat(0.0f);
  for (int64_t column = 0; column < rank;) {
    const int64_t end = column < wide ? column + 8 * kAcross : column + 8;
    typename V::F sums[T][8];
#pragma GCC unroll 16
    for (int i = 0; i < 8 * T; ++i) sums[i / 8][i % 8] = V::splat(0.0f);
    for (; column < end; column += 8)
#pragma GCC unroll 8
      for (int i = 0; i < 8; ++i) {
        const auto basis = V::load(x.turned + (column + i) * x.features + feature);
#pragma GCC unroll 2
        for (int t = 0; t < T; ++t) sums[t][i] = V::fma(basis, V::splat(low[t * x.columns + column + i]), sums[t][i]);
      }
#pragma GCC unroll 16
    for (int i = 0; i < 8 * T; ++i) parts[i / 8][i % 8] = parts[i / 8][i % 8] + sums[i / 8][i % 8];
  }
#pragma GCC unroll 2
  for (int t = 0; t < T; ++t) {
    const auto& part = parts[t];
    float* u = x.u + (row + t) * x.features + feature;
    V::store(u, V::load(u) - (((part[0] + part[1]) + (part[2] + part[3])) +
                              ((part[4] + part[5]) + (part[6] + part[7]))));
  }
}

// T tokens, as many at once as the registers hold.
template <class V, class E, int T>
void subtract_low(const Problem& p, const Activations& x, int64_t row) {
  constexpr int kTurned = T > 1 && V::W == 16 ? 2 : 1, kAsItLies = T > 2 ? 2 : T;
  if (x.turned) {
    for (int64_t feature = 0; feature < p.in_features; feature += V::W)  // a piece of the basis stays in L1
      for (int t = 0; t < T; t += kTurned) subtract_turned<V, kTurned>(p, x, row + t, feature);
  } else {
    for (int t = 0; t < T; t += kAsItLies) subtract_branch<E, kAsItLies>(p, x, row + t);
  }
}

}  // namespace
}  // namespace specquant
