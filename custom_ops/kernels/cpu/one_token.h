// y of one token. It waits for memory, so all that it reads is read as long pieces: rows of coefficients for many panels,
// then weights, panel by panel.
#pragma once

#include "finish.h"
#include "sums.h"

namespace specquant {
namespace {

constexpr int64_t kStrip = 64;  // panels whose sums are kept at once

// Short panels are read one after another, as one stream; long ones several at once.
inline bool short_panels(const Problem& p) { return (p.in_features + 7) / 8 * kPanel * 4 < 16 * 1024; }

// Asks for the weights that add_block does not ask for, those of the beginning.
inline void touch_weights(const Problem& p, const Activations& x, int64_t panel) {
  const uint8_t* weights = p.qweight + panel * x.panel_bytes;
  for (int64_t i = 0; i < kWeightsAhead; i += 64) __builtin_prefetch(weights + i);
}

// sums[column …] += low · C, rows k to k + K of it, in the order of bias_and_branch. Whole: what is read lies in C.
template <class V, int K, bool kWhole>
inline __attribute__((always_inline)) void add_coefficients(const Problem& p, const typename V::F (&low)[K], int64_t k,
                                                            int64_t column, float* sums) {
  typename V::F sum = V::load(sums);
#pragma GCC unroll 8
  for (int i = 0; i < K; ++i) {
    const int64_t index = (k + i) * p.out_features + column;
    uint16_t spare[V::W];
    const auto lanes =
        V::half(kWhole ? p.coef + index : whole<V::W>(p.coef, index, p.basis_rank * p.out_features, spare));
    sum = V::fma(low[i], lanes, sum);
  }
  V::store(sums, sum);
}

template <class V, int K>
void add_rows(const Problem& p, const float* low, int64_t k, int64_t column, int64_t columns, float* sums) {
  constexpr int64_t line = 32;
  typename V::F rows[K];
#pragma GCC unroll 8
  for (int i = 0; i < K; ++i) rows[i] = V::splat(low[k + i]);
  const int64_t lines = std::min(columns, p.out_features - column) / line * line;
  // Rows that come next: the hardware sees a row only when it is half read.
  const uint16_t* const next = p.coef + (k + K < p.rank ? k + K : k) * p.out_features + column;
  int64_t j = 0;
  for (; j < lines; j += line) {
#pragma GCC unroll 8
    for (int i = 0; i < K; ++i) __builtin_prefetch(next + i * p.out_features + j);
#pragma GCC unroll 4
    for (int64_t part = 0; part < line; part += V::W)
      add_coefficients<V, K, true>(p, rows, k, column + j + part, sums + j + part);
  }
  for (; j < columns; j += V::W) add_coefficients<V, K, false>(p, rows, k, column + j, sums + j);
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

// Whether V multiplies low and high nibbles apart (dot_halves).
template <class V, class = void>
struct InHalves : std::false_type {};
template <class V>
struct InHalves<V, std::void_t<decltype(V::kHalves)>> : std::true_type {};

constexpr int64_t kStep = 8;            // blocks that add_panel takes at once
constexpr int64_t kHalvesBlocks = 8192;  // of a segment: 16 · 15 · 127 · 4 a block stay far below 2^31

// Whether add_panel can do it: decoding one token, with a weight scale per segment.
template <class V>
bool in_halves(const Problem& p, const Activations& x) {
  if (!InHalves<V>::value || x.rows != 1 || !p.qweight || p.act_bits == 16) return false;
  const int64_t blocks = (p.in_features + 7) / 8 / x.segments;
  return groups_of(p) == x.segments && p.in_features % 8 == 0 && blocks % kStep == 0 && blocks <= kHalvesBlocks;
}

// sums += Σ_segments s · c[g] · Σ a · q_w of one panel, as add_integer: nothing but that, since it would take longer
// than memory does.
template <class V>
inline __attribute__((always_inline)) void add_panel(const uint8_t* weights, int64_t ahead, const int8_t* a, const Step* steps,
                                                     const uint8_t* scales, int64_t segments, int64_t blocks, float* sums) {
  typename V::F sum = V::load(sums);
  for (int64_t s = 0; s < segments; ++s, scales += kGroupBytes) {
    // Two of each, in names of their own, which GCC keeps in registers: the multipliers would wait for one chain.
    typename V::I low = V::splat_int(steps[s].start), high = V::splat_int(0), low2 = high, high2 = high;
    for (int64_t k = 0; k < blocks; k += kStep)
#pragma GCC unroll 4
      for (int i = 0; i < kStep; i += 2, weights += 2 * kPanel * 4, a += 2 * kBlock) {
        __builtin_prefetch(weights + ahead);
        V::dot_halves(low, high, weights, a);
        __builtin_prefetch(weights + kPanel * 4 + ahead);
        V::dot_halves(low2, high2, weights + kPanel * 4, a + kBlock);
      }
    const auto total = V::add(V::add(low, low2), V::sixteenth(V::add(high, high2)));
    sum = V::fma(V::splat(steps[s].scale) * V::group_scales(scales, 0), V::to_float(total), sum);
  }
  V::store(sums, sum);
}

// Sums of one token's panels, one after another.
template <class V>
void add_in_halves(const Problem& p, const Activations& x, int64_t panel, int64_t panels, float* sums) {
  const int64_t blocks = p.in_features / 8, in_segment = blocks / x.segments;
  // Of panels that are read in part, what lies a panel further is wanted, and not what comes next.
  const int64_t ahead = blocks * kPanel * 4 < std::min(x.panel_bytes, 2 * kWeightsAhead) ? x.panel_bytes : kWeightsAhead;
  const uint8_t* weights = p.qweight + panel * x.panel_bytes;
  const uint8_t* scales = p.group_scales + panel * x.group_bytes;
  for (; panels; --panels, weights += x.panel_bytes, scales += x.group_bytes, sums += kPanel)
    add_panel<V>(weights, ahead, x.tiles, x.steps, scales, x.segments, in_segment, sums);
}

// P panels at a time, then half as many …
template <class V, int P>
void add_panels(const Problem& p, const Activations& x, int64_t row, int64_t column, int64_t panels, float* sums) {
  constexpr int C = P * kPanel / V::W;
  for (; panels >= P; column += P * kPanel, panels -= P, sums += P * kPanel) {
    typename V::F tile[1][C];
#pragma GCC unroll 8
    for (int v = 0; v < C; ++v) tile[0][v] = V::load(sums + v * V::W);
    p.act_bits < 16 ? add_integer<V, 1, C>(p, x, row, column, tile) : add_float<V, 1, C>(p, x, row, column, tile);
#pragma GCC unroll 8
    for (int v = 0; v < C; ++v) V::store(sums + v * V::W, tile[0][v]);
  }
  if constexpr (P > 1) add_panels<V, P / 2>(p, x, row, column, panels, sums);
}

// y of P panels at a time: sums, which hold bias and branch, and products.
template <class V, int P>
void finish_strip(const Problem& p, const Activations& x, int64_t row, int64_t column, int64_t panels, const float* sums,
                  const float* products) {
  constexpr int C = P * kPanel / V::W;
  for (; panels >= P; panels -= P, column += P * kPanel, sums += P * kPanel, products += P * kPanel) {
    typename V::F acc[1][C];
#pragma GCC unroll 8
    for (int v = 0; v < C; ++v) acc[0][v] = V::load(sums + v * V::W);
    finish_tile<V, 1, C>(p, x, row, column, acc, [&](int, int v) { return V::load(products + v * V::W); });
  }
  if constexpr (P > 1) finish_strip<V, P / 2>(p, x, row, column, panels, sums, products);
}

template <class V>
void multiply_one(const Problem& p, const Activations& x, int64_t row, int64_t panel, int64_t panels) {
  alignas(64) float sums[kStrip * kPanel], own[kStrip * kPanel];
  const bool halves = in_halves<V>(p, x), streamed = p.act_bits < 16 && short_panels(p);
  for (int64_t done; panels; panel += done, panels -= done) {
    done = std::min(panels, kStrip);
    const int64_t column = panel * kPanel;
    float* const products = x.kept ? x.kept + column : own;
    if (p.qweight) touch_weights(p, x, panel);
    start_strip<V>(p, x, row, column, done * kPanel, sums);
    if (!x.begun) std::fill(products, products + done * kPanel, 0.0f);
    if constexpr (InHalves<V>::value)
      if (halves) add_in_halves<V>(p, x, panel, done, products);
    if (p.qweight && !halves)
      streamed ? add_panels<V, 1>(p, x, row, column, done, products)
               : add_panels<V, V::panels(1)>(p, x, row, column, done, products);
    finish_strip<V, 2>(p, x, row, column, done, sums, products);
  }
}

}  // namespace
}  // namespace specquant
