// y of one token. It waits for memory, so all that it reads is read as long pieces: rows of coefficients for many panels,
// then weights, panel by panel.
#pragma once

#include "sums.h"

namespace specquant {
namespace {

constexpr int64_t kStrip = 64;  // panels whose sums are kept at once

// Short panels are read one after another, as one stream; long ones several at once.
inline bool short_panels(const Problem& p) { return (p.in_features + 7) / 8 * kPanel * 4 < 16 * 1024; }

// Asks for the scales of some panels: their rows lie too far apart for the hardware to see them coming.
inline void touch_scales(const Problem& p, int64_t column, int64_t columns) {
  constexpr int64_t line = 32;  // elements of two bytes
  const int64_t end = std::min(column + columns, p.out_features);
  const int64_t groups = p.group_size ? p.in_features / p.group_size : 1;
  for (int64_t g = 0; g < groups; ++g)
    for (int64_t i = column; i < end; i += line) __builtin_prefetch(p.scales + g * p.out_features + i, 0, 2);
}

// Asks for the weights that add_block does not ask for, those of the beginning.
inline void touch_weights(const Problem& p, int64_t panel) {
  const uint8_t* weights = p.qweight + panel * ((p.in_features + 7) / 8 * kPanel * 4);
  for (int64_t i = 0; i < kWeightsAhead; i += 64) __builtin_prefetch(weights + i);
}

// sums[column …] = bias + low · C[:rank], in the order of start_tile. Whole: what is read lies in C and bias.
template <class V, int K, bool kWhole>
inline __attribute__((always_inline)) void add_coefficients(const Problem& p, const float* low, int64_t k,
                                                            int64_t column, float* sums) {
  typename V::F sum = V::load(sums);
#pragma GCC unroll 8
  for (int i = 0; i < K; ++i) {
    const int64_t index = (k + i) * p.out_features + column;
    uint16_t spare[V::W];
    const auto lanes =
        V::half(kWhole ? p.coef + index : whole<V::W>(p.coef, index, p.basis_rank * p.out_features, spare));
    sum = V::fma(V::splat(low[k + i]), lanes, sum);
  }
  V::store(sums, sum);
}

template <class V, int K>
void add_rows(const Problem& p, const float* low, int64_t k, int64_t column, int64_t columns, float* sums) {
  constexpr int64_t line = 32;
  // Rows that come next: the hardware sees a row only when it is half read.
  for (int64_t i = 0; k + K < p.rank && i < columns; i += line)
    for (int64_t next = k + K; next < std::min(k + 2 * K, p.rank); ++next)
      __builtin_prefetch(p.coef + next * p.out_features + std::min(column + i, p.out_features - 1));
  const int64_t whole_columns = std::min(columns, p.out_features - column) / V::W * V::W;
  int64_t j = 0;
  for (; j < whole_columns; j += V::W) add_coefficients<V, K, true>(p, low, k, column + j, sums + j);
  for (; j < columns; j += V::W) add_coefficients<V, K, false>(p, low, k, column + j, sums + j);
}

template <class V>
void start_strip(const Problem& p, const Activations& x, int64_t row, int64_t column, int64_t columns, float* sums) {
  float spare[V::W];
  for (int64_t j = 0; j < columns; j += V::W)
    V::store(sums + j, p.bias ? V::load(whole<V::W>(p.bias, column + j, p.out_features, spare)) : V::splat(0.0f));
  if (!p.basis) return;
  const float* low = x.low + row * x.columns;
  int64_t k = 0;
  for (; k + 8 <= p.rank; k += 8) add_rows<V, 8>(p, low, k, column, columns, sums);
  for (; k < p.rank; ++k) add_rows<V, 1>(p, low, k, column, columns, sums);
}

// P panels at a time, then half as many …
template <class V, int P>
void add_panels(const Problem& p, const Activations& x, int64_t row, int64_t column, int64_t panels, float* sums) {
  constexpr int C = P * kPanel / V::W;
  for (; panels >= P; column += P * kPanel, panels -= P, sums += P * kPanel) {
    auto& tile = *reinterpret_cast<Tile<V, 1, C>*>(sums);
    if (p.qweight && p.act_bits < 16) add_integer<V, 1, C>(p, x, row, column, sums);
    if (p.qweight && p.act_bits == 16) add_float<V, 1, C>(p, x, row, column, tile);
    store_tile<V, 1, C>(p, x, row, column, tile);
  }
  if constexpr (P > 1) add_panels<V, P / 2>(p, x, row, column, panels, sums);
}

template <class V>
void multiply_one(const Problem& p, const Activations& x, int64_t row, int64_t panel, int64_t panels) {
  alignas(64) float sums[kStrip * kPanel];
  for (int64_t done; panels; panel += done, panels -= done) {
    done = std::min(panels, kStrip);
    const int64_t column = panel * kPanel;
    const bool streamed = p.qweight && p.act_bits < 16 && short_panels(p);
    if (p.qweight) touch_weights(p, panel);
    if (streamed) touch_scales(p, column, done * kPanel);
    start_strip<V>(p, x, row, column, done * kPanel, sums);
    streamed ? add_panels<V, 1>(p, x, row, column, done, sums)
             : add_panels<V, V::panels(1)>(p, x, row, column, done, sums);
  }
}

}  // namespace
}  // namespace specquant
