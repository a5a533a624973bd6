// u −= low · B[:, :rank]ᵀ, by the basis as it lies, or turned beforehand when many tokens follow. Both add the same
// products in the same order.
#pragma once

#include <algorithm>

#include "half.h"
#include "steps.h"

namespace specquant {
namespace {

// u −= low · B[:, :rank]ᵀ for T rows, features [from, to), 8 at a time; kInside: whatever that reads lies in B. Lanes
// run along the columns: a lane's products are one sum, then a feature's lanes are added in pairs. kColumns: those of B
// where all are used, which makes addresses constants; or 0.
template <class E, int T, bool kInside, int kColumns>
void subtract_as_it_lies(const Problem& p, const Activations& x, int64_t row, int64_t from, int64_t to) {
  const int64_t stride = kColumns ? kColumns : p.basis_rank, rank = kColumns ? kColumns : round_up(p.rank, 8);
  const int64_t total = p.in_features * stride;
  const float* low = x.low + row * x.columns;  // 0 from rank on, where B holds columns that are not used, or the next row
  for (int64_t feature = from; feature < to; feature += 8) {
    typename E::F parts[T][8];
#pragma GCC unroll 16
    for (int i = 0; i < 8 * T; ++i) parts[i / 8][i % 8] = E::splat(0.0f);
#pragma GCC unroll 4
    for (int64_t column = 0; column < rank; column += 8) {
      typename E::F factors[T];
#pragma GCC unroll 2
      for (int t = 0; t < T; ++t) factors[t] = E::load(low + t * x.columns + column);
#pragma GCC unroll 8
      for (int i = 0; i < 8; ++i) {
        uint16_t spare[8];
        const int64_t index = (feature + i) * stride + column;
        const auto basis = E::half(kInside ? p.basis + index : whole<8>(p.basis, index, total, spare));
#pragma GCC unroll 2
        for (int t = 0; t < T; ++t) parts[t][i] = E::fma(basis, factors[t], parts[t][i]);
      }
    }
#pragma GCC unroll 2
    for (int t = 0; t < T; ++t) {
      float* u = x.u + (row + t) * x.features + feature;
      E::store(u, E::load(u) - E::lane_sums(parts[t]));
    }
  }
}

// All features: the last ones, of which reading 8 columns may leave B, by themselves.
template <class E, int T>
void subtract_branch(const Problem& p, const Activations& x, int64_t row) {
  const int64_t rank = round_up(p.rank, 8), last = p.in_features * p.basis_rank - rank;  // where a row may start
  const int64_t inside = last < 0 ? 0 : std::min(last / p.basis_rank + 1, p.in_features) / 8 * 8;
  switch (rank == p.basis_rank ? rank : 0) {
    case 8: subtract_as_it_lies<E, T, true, 8>(p, x, row, 0, inside); break;
    case 16: subtract_as_it_lies<E, T, true, 16>(p, x, row, 0, inside); break;
    case 24: subtract_as_it_lies<E, T, true, 24>(p, x, row, 0, inside); break;
    case 32: subtract_as_it_lies<E, T, true, 32>(p, x, row, 0, inside); break;
    default: subtract_as_it_lies<E, T, true, 0>(p, x, row, 0, inside);
  }
  subtract_as_it_lies<E, T, false, 0>(p, x, row, inside, p.in_features);
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

// T tokens and W features by the turned basis, lanes along features: parts[i] holds what lane i does above.
template <class V, int T>
inline __attribute__((always_inline)) void subtract_turned(const Problem& p, const Activations& x, int64_t row,
                                                           int64_t feature) {
  const float* low = x.low + row * x.columns;
  const int64_t rank = round_up(p.rank, 8);
  typename V::F parts[T][8];
#pragma GCC unroll 16
  for (int i = 0; i < 8 * T; ++i) parts[i / 8][i % 8] = V::splat(0.0f);
  for (int64_t column = 0; column < rank; column += 8)
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
      const auto basis = V::load(x.turned + (column + i) * x.features + feature);
#pragma GCC unroll 2
      for (int t = 0; t < T; ++t) parts[t][i] = V::fma(basis, V::splat(low[t * x.columns + column + i]), parts[t][i]);
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
