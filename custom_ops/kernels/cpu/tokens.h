// The steps on one run of tokens: prologue, rotation, down-projection, subtraction, quantisation.
//
// E is a vector of 8 float lanes: along features, so that groups (multiples of 8) have no tail. V may be one of 16, for
// sizes that allow it; both do the same to every value, so that their bits are the same.
#pragma once

#include <algorithm>

#include "hadamard.h"
#include "half.h"
#include "prologue.h"
#include "quantize.h"
#include "steps.h"
#include "subtract.h"

namespace specquant {
namespace {

// acc[t][v] += Σ_k a[t·lda + k] · b[k, column + v·W + lane], from ≤ k < to; b is float16 [rows, width], lanes along its
// columns.
template <class V, int T, int C>
inline __attribute__((always_inline)) void add_product(typename V::F (&acc)[T][C], const float* a, int64_t lda,
                                                       int64_t from, int64_t to, const uint16_t* b, int64_t width,
                                                       int64_t rows, int64_t column) {
  const auto step = [&](int64_t k, const uint16_t* const (&at)[C]) __attribute__((always_inline)) {
#pragma GCC unroll 8
    for (int v = 0; v < C; ++v) {
      const auto lanes = V::half(at[v]);
#pragma GCC unroll 8
      for (int t = 0; t < T; ++t) acc[t][v] = V::fma(V::splat(a[t * lda + k]), lanes, acc[t][v]);
    }
  };
  const uint16_t* at[C];
  const int64_t past = rows * width - column - C * V::W;  // the last index that all C vectors may start from
  const int64_t whole_rows = width && past >= 0 ? std::min(to, past / width + 1) : 0;
  int64_t k = from;
  for (; k < whole_rows; ++k) {
#pragma GCC unroll 8
    for (int v = 0; v < C; ++v) at[v] = b + k * width + column + v * V::W;
    step(k, at);
  }
  uint16_t spare[C][V::W];
  for (; k < to; ++k) {
    for (int v = 0; v < C; ++v) at[v] = whole<V::W>(b, k * width + column + v * V::W, rows * width, spare[v]);
    step(k, at);
  }
}

// Elements of the basis that one token asks for before it needs them.
constexpr int64_t kBasisAhead = 1024;

// low[column …] of T rows, C vectors of it: sums over the features in two halves, since one token has few sums, and waits
// for each of its additions.
template <class V, int T, int C>
void project_columns(const Problem& p, const Activations& x, int64_t row, int64_t column) {
  const int64_t n = p.in_features, half = n / 2;
  const float* u = x.u + row * x.features;
  typename V::F sums[2][T][C];
#pragma GCC unroll 16
  for (int i = 0; i < 2 * T * C; ++i) sums[i / (T * C)][i / C % T][i % C] = V::splat(0.0f);
  int64_t done = 0;
  if constexpr (T == 1) {  // both halves at once, as long as nothing lies past the end of B
    const int64_t past = (n - half) * p.basis_rank - column - C * V::W;
    done = past >= 0 ? std::min(half, past / p.basis_rank + 1) : 0;
    const uint16_t *first = p.basis + column, *second = first + half * p.basis_rank;
    for (int64_t k = 0; k < done; ++k, first += p.basis_rank, second += p.basis_rank) {
      __builtin_prefetch(first + kBasisAhead);
      __builtin_prefetch(second + kBasisAhead);
#pragma GCC unroll 4
      for (int v = 0; v < C; ++v) {
        sums[0][0][v] = V::fma(V::splat(u[k]), V::half(first + v * V::W), sums[0][0][v]);
        sums[1][0][v] = V::fma(V::splat(u[half + k]), V::half(second + v * V::W), sums[1][0][v]);
      }
    }
  }
  add_product<V, T, C>(sums[0], u, x.features, done, half, p.basis, p.basis_rank, n, column);
  add_product<V, T, C>(sums[1], u, x.features, half + done, n, p.basis, p.basis_rank, n, column);
  float lanes[T][C * V::W];
#pragma GCC unroll 16
  for (int i = 0; i < T * C; ++i)
    V::store(&lanes[i / C][i % C * V::W], sums[0][i / C][i % C] + sums[1][i / C][i % C]);
  for (int t = 0; t < T; ++t)
    for (int64_t j = 0; j < C * V::W && column + j < x.columns; ++j)
      x.low[(row + t) * x.columns + column + j] = column + j < p.rank ? lanes[t][j] : 0.0f;
}

// low = u · B[:, :rank] for T rows (first equation of docs/ops.md), by as few vectors as the columns need.
template <class V, class E, int T>
void project_down(const Problem& p, const Activations& x, int64_t row) {
  constexpr int C = T == 1 ? 32 / V::W : 2;
  int64_t column = 0;
  for (; p.rank - column > (C - 1) * V::W; column += C * V::W) project_columns<V, T, C>(p, x, row, column);
  if constexpr (C > 2)
    if (p.rank - column > V::W) project_columns<V, T, 2>(p, x, row, column), column += 2 * V::W;
  for (; p.rank > column && (V::W == 8 || p.rank - column > 8); column += V::W)
    project_columns<V, T, 1>(p, x, row, column);
  if (p.rank > column) project_columns<E, T, 1>(p, x, row, column);
}

// Whether rows can go through vectors E: they are made of whole ones.
template <class E>
bool in_vectors(const Problem& p) {
  const bool quantised = p.qweight && p.act_bits < 16;
  return p.in_features % E::W == 0 && (!quantised || segment_length(p) % E::W == 0);
}

// Prologue and rotation of one row.
template <class E>
void start_row(const Problem& p, const Activations& x, int64_t row) {
  prologue<E>(p, x, row);
  float* u = x.u + row * x.features;
  for (int64_t i = 0; p.hadamard && i < p.in_features; i += p.hadamard)
    p.hadamard < 64 ? walsh_hadamard(u + i, p.hadamard) : walsh_hadamard<E>(u + i, p.hadamard);
}

// What the integer product needs of one row: levels, and per segment scale and −8 Σ a.
template <class E>
void quantize_for_product(const Problem& p, const Activations& x, int64_t row) {
  float* scale = x.scale + row * x.segments;
  quantize_row<E>(x.u + row * x.features, p.in_features, p.act_bits, p.act_group, segment_length(p), p.act_clip,
                  x.a + row * x.features, scale, x.start + row * x.segments);
  const int64_t groups = p.act_group ? p.in_features / p.act_group : 1;
  if (groups == x.segments) return;
  for (int64_t s = x.segments - 1; s >= 0; --s) scale[s] = scale[s * groups / x.segments];  // backwards: in place
}

template <class V, class E, int T>
void prepare_rows(const Problem& p, const Activations& x, int64_t row) {
  const bool wide = in_vectors<V>(p);
  for (int t = 0; t < T; ++t) wide ? start_row<V>(p, x, row + t) : start_row<E>(p, x, row + t);
  if (p.basis && p.rank) {
    project_down<V, E, T>(p, x, row);
    if (p.subtract) subtract_low<V, E, T>(p, x, row);
  }
  if (p.qweight && p.act_bits < 16)
    for (int t = 0; t < T; ++t) wide ? quantize_for_product<V>(p, x, row + t) : quantize_for_product<E>(p, x, row + t);
}

// As many rows at once as the registers hold, then half as many …: the branch reads its basis once for all of them.
template <class V, class E, int T>
void prepare_blocks(const Problem& p, const Activations& x, int64_t row, int64_t rows) {
  for (; rows >= T; row += T, rows -= T) prepare_rows<V, E, T>(p, x, row);
  if constexpr (T > 1) prepare_blocks<V, E, T / 2>(p, x, row, rows);
}

template <class V, class E>
void prepare(const Problem& p, const Activations& x, int64_t row, int64_t rows) {
  prepare_blocks<V, E, V::kTokens>(p, x, row, rows);
}

}  // namespace
}  // namespace specquant
