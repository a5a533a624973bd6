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
inline void touch_weights(const Problem& p, const Activations& x, int64_t panel) {
  const uint8_t* weights = p.qweight + panel * x.panel_bytes;
  for (int64_t i = 0; i < kWeightsAhead; i += 64) __builtin_prefetch(weights + i);
}

// sums[column …] += low · C, rows k to k + K of it, in the order of start_tile. Whole: what is read lies in C.
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
  const int64_t blocks = (p.in_features + 7) / 8 / x.segments, groups = p.group_size ? p.in_features / p.group_size : 1;
  return groups == x.segments && p.in_features % 8 == 0 && blocks % kStep == 0 && blocks <= kHalvesBlocks;
}

// sums += Σ_segments s · scales[g] · Σ a · q_w of one whole panel, as add_integer: nothing but that, since it would take
// longer than memory does.
template <class V>
inline __attribute__((always_inline)) void add_panel(const uint8_t* weights, int64_t ahead, const int8_t* a, const Step* steps,
                                                     const uint16_t* scales, int64_t segments, int64_t blocks,
                                                     int64_t outputs, float* sums) {
  typename V::F sum = V::load(sums);
  for (int64_t s = 0; s < segments; ++s, scales += outputs) {
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
    sum = V::fma(V::splat(steps[s].scale) * V::half(scales), V::to_float(total), sum);
  }
  V::store(sums, sum);
}

// y of one token's panels, one after another; how many were done: a last one of fewer outputs is not.
template <class V>
int64_t add_whole_panels(const Problem& p, const Activations& x, int64_t panel, int64_t panels, float* sums) {
  const int64_t whole = std::min(panels, p.out_features / kPanel - panel), blocks = p.in_features / 8;
  const int64_t in_segment = blocks / x.segments;
  // Of panels that are read in part, what lies a panel further is wanted, and not what comes next.
  const int64_t ahead = blocks * kPanel * 4 < std::min(x.panel_bytes, 2 * kWeightsAhead) ? x.panel_bytes : kWeightsAhead;
  for (int64_t i = 0; i < whole; ++i)
    add_panel<V>(p.qweight + (panel + i) * x.panel_bytes, ahead, x.tiles, x.steps, p.scales + (panel + i) * kPanel, x.segments,
                 in_segment, p.out_features, sums + i * kPanel);
  int64_t i = 0;
  for (; i + 2 <= whole; i += 2)
    store_tile<V, 1, 2>(p, x, 0, (panel + i) * kPanel, *reinterpret_cast<Tile<V, 1, 2>*>(sums + i * kPanel));
  if (i < whole)
    store_tile<V, 1, 1>(p, x, 0, (panel + i) * kPanel, *reinterpret_cast<Tile<V, 1, 1>*>(sums + i * kPanel));
  return whole;
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
  const bool halves = in_halves<V>(p, x);
  for (int64_t done; panels; panel += done, panels -= done) {
    done = std::min(panels, kStrip);
    const int64_t column = panel * kPanel;
    const bool streamed = p.qweight && p.act_bits < 16 && short_panels(p);
    if (p.qweight) touch_weights(p, x, panel);
    if (streamed) touch_scales(p, column, done * kPanel);
    start_strip<V>(p, x, row, column, done * kPanel, sums);
    int64_t first = 0;
    if constexpr (InHalves<V>::value)
      if (halves) first = add_whole_panels<V>(p, x, panel, done, sums);
    const int64_t from = first * kPanel;
    streamed ? add_panels<V, 1>(p, x, row, column + from, done - first, sums + from)
             : add_panels<V, V::panels(1)>(p, x, row, column + from, done - first, sums + from);
  }
}

}  // namespace
}  // namespace specquant
