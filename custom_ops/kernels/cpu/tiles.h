// y for a tile of T tokens × P panels, all features: accumulators stay in registers, weights are unpacked once
// per tile, and the branch and the bias are what the sums start from.
//
// V is the instruction set: W lanes along outputs, I of int32, F of float32, and the unpacked Weights of 8 features.
#pragma once

#include "tokens.h"

namespace specquant {
namespace {

template <class V, int T, int C>
using Tile = float[T][C * V::W];

// sums = bias + low · C[:rank]
template <class V, int T, int C>
void start_tile(const Problem& p, const Activations& x, int64_t row, int64_t column, Tile<V, T, C>& sums) {
  typename V::F acc[T][C];
  float spare[V::W];
#pragma GCC unroll 8
  for (int v = 0; v < C; ++v) {
    const auto bias = p.bias ? V::load(whole<V::W>(p.bias, column + v * V::W, p.out_features, spare)) : V::splat(0.0f);
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) acc[t][v] = bias;
  }
  if (p.basis)
    add_product<V, T, C>(acc, x.low + row * x.columns, x.columns, p.rank, p.coef, p.out_features, p.basis_rank,
                         column);
#pragma GCC unroll 8
  for (int t = 0; t < T; ++t)
#pragma GCC unroll 8
    for (int v = 0; v < C; ++v) V::store(&sums[t][v * V::W], acc[t][v]);
}

// The C vectors of packed weights under `column`, at their first block; 64 bytes further is the next block.
template <class V, int C>
void weight_streams(const Problem& p, int64_t column, const uint8_t* (&streams)[C]) {
  const int64_t panel_bytes = (p.in_features + 7) / 8 * 64;
  for (int v = 0; v < C; ++v) {
    const int64_t output = column + v * V::W;
    streams[v] = p.qweight + output / kPanel * panel_bytes + output % kPanel * 4;
  }
}

// acc = −8 Σ a − z · row_sums for segment s: what the products of stored nibbles, q_w + 8, are added to.
template <class V, class Sum, int T, int C>
inline __attribute__((always_inline)) void start_integer(const Problem& p, const Activations& x, int64_t row,
                                                         int64_t column, int64_t s, typename V::I (&acc)[T][C]) {
  const auto* row_sums = static_cast<const Sum*>(p.row_sums);
  Sum spare[V::W];
#pragma GCC unroll 8
  for (int v = 0; v < C; ++v) {
    const auto sums = V::load_sums(
        whole<V::W>(row_sums, s * p.out_features + column + v * V::W, x.segments * p.out_features, spare));
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) {
      const int64_t at = (row + t) * x.segments + s;
      acc[t][v] = V::start(x.start[at], sums, x.zero[at]);
    }
  }
}

// acc += Σ nibble · a over `blocks` blocks of 8 features.
template <class V, int T, int C>
inline __attribute__((always_inline)) void add_blocks(const uint8_t* (&weights)[C], const int8_t* a, int64_t stride,
                                                      int64_t blocks, typename V::I (&acc)[T][C]) {
  for (int64_t k = 0; k < blocks; ++k, a += kBlock) {
    typename V::Weights unpacked[C];
#pragma GCC unroll 8
    for (int v = 0; v < C; ++v) {
      unpacked[v] = V::unpack(weights[v]);
      weights[v] += 64;
    }
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) {
      const auto activation = V::activation(a + t * stride);
#pragma GCC unroll 8
      for (int v = 0; v < C; ++v) acc[t][v] = V::dot(acc[t][v], unpacked[v], activation);
    }
  }
}

// sums += Σ_segments s · scales[g] · acc, acc = Σ (q − z) · q_w exactly, because check() bounds N.
template <class V, int T, int C>
void add_integer(const Problem& p, const Activations& x, int64_t row, int64_t column, Tile<V, T, C>& sums) {
  const uint8_t* weights[C];
  weight_streams<V, C>(p, column, weights);
  const int64_t blocks = round_up(p.in_features, kBlock) / kBlock / x.segments;  // in a segment
  const int64_t groups = p.group_size ? p.in_features / p.group_size : 1, segments_in_group = x.segments / groups;
  for (int64_t s = 0; s < x.segments; ++s) {
    typename V::I acc[T][C];
    if (p.wide_sums) {
      start_integer<V, int32_t, T, C>(p, x, row, column, s, acc);
    } else {
      start_integer<V, int16_t, T, C>(p, x, row, column, s, acc);
    }
    add_blocks<V, T, C>(weights, x.a + row * x.features + s * blocks * kBlock, x.features, blocks, acc);
    const int64_t scales = s / segments_in_group * p.out_features + column;
#pragma GCC unroll 8
    for (int v = 0; v < C; ++v) {
      uint16_t spare[V::W];
      const auto scale = V::half(whole<V::W>(p.scales, scales + v * V::W, groups * p.out_features, spare));
#pragma GCC unroll 8
      for (int t = 0; t < T; ++t) {
        float* sum = &sums[t][v * V::W];
        const auto step = V::splat(x.scale[(row + t) * x.segments + s]) * scale;
        V::store(sum, V::fma(step, V::to_float(acc[t][v]), V::load(sum)));
      }
    }
  }
}

// sums += Σ_groups scales[g] · Σ u · q_w in float32: activations that are not quantised.
template <class V, int T, int C>
void add_float(const Problem& p, const Activations& x, int64_t row, int64_t column, Tile<V, T, C>& sums) {
  const uint8_t* weights[C];
  weight_streams<V, C>(p, column, weights);
  const int64_t groups = p.group_size ? p.in_features / p.group_size : 1;
  const int64_t blocks = round_up(p.in_features, kBlock) / kBlock / groups;
  for (int64_t g = 0; g < groups; ++g) {
    typename V::F acc[T][C];
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t)
#pragma GCC unroll 8
      for (int v = 0; v < C; ++v) acc[t][v] = V::splat(0.0f);
    for (int64_t k = g * blocks; k < (g + 1) * blocks; ++k) {
      typename V::I packed[C];
#pragma GCC unroll 8
      for (int v = 0; v < C; ++v) packed[v] = V::load_packed(weights[v] + k * 64);
      const float* u = x.u + row * x.features + k * kBlock;
#pragma GCC unroll 8
      for (int i = 0; i < 8; ++i) {  // nibble i of a lane is feature i/2, or 4 + i/2 for odd i
        const int feature = i / 2 + i % 2 * 4;
#pragma GCC unroll 8
        for (int v = 0; v < C; ++v) {
          const auto weight = V::lowest_nibble(packed[v]);
          packed[v] = V::next_nibble(packed[v]);
#pragma GCC unroll 8
          for (int t = 0; t < T; ++t)
            acc[t][v] = V::fma(V::splat(u[t * x.features + feature]), weight, acc[t][v]);
        }
      }
    }
#pragma GCC unroll 8
    for (int v = 0; v < C; ++v) {
      uint16_t spare[V::W];
      const auto scale = V::half(
          whole<V::W>(p.scales, g * p.out_features + column + v * V::W, groups * p.out_features, spare));
#pragma GCC unroll 8
      for (int t = 0; t < T; ++t) {
        float* sum = &sums[t][v * V::W];
        V::store(sum, V::fma(scale, acc[t][v], V::load(sum)));
      }
    }
  }
}

template <class V, int T, int C>
void store_tile(const Problem& p, const Activations& x, int64_t row, int64_t column, const Tile<V, T, C>& sums) {
  const int64_t left = p.out_features - column, lanes = left < C * V::W ? left : C * V::W;
  for (int t = 0; t < T; ++t) {
    const int64_t at = (x.first_token + row + t) * p.out_features + column;
    if (p.half) {
      uint16_t rounded[C * V::W];
      for (int v = 0; v < C; ++v) V::store_half(rounded + v * V::W, V::load(&sums[t][v * V::W]));
      std::memcpy(static_cast<uint16_t*>(p.y) + at, rounded, size_t(lanes) * sizeof(uint16_t));
    } else {
      std::memcpy(static_cast<float*>(p.y) + at, sums[t], size_t(lanes) * sizeof(float));
    }
  }
}

template <class V, int T, int P>
void multiply_tile(const Problem& p, const Activations& x, int64_t row, int64_t panel) {
  constexpr int C = P * kPanel / V::W;
  alignas(64) Tile<V, T, C> sums;
  const int64_t column = panel * kPanel;
  start_tile<V, T, C>(p, x, row, column, sums);
  if (p.qweight && p.act_bits < 16) add_integer<V, T, C>(p, x, row, column, sums);
  if (p.qweight && p.act_bits == 16) add_float<V, T, C>(p, x, row, column, sums);
  store_tile<V, T, C>(p, x, row, column, sums);
}

// Rows in blocks of V::kTokens, then of half as many …; a panel's weights stay in cache from block to block.
template <class V, int P, int T>
void multiply_rows(const Problem& p, const Activations& x, int64_t row, int64_t rows, int64_t panel) {
  for (; rows >= T; row += T, rows -= T) multiply_tile<V, T, P>(p, x, row, panel);
  if constexpr (T > 1) multiply_rows<V, P, T / 2>(p, x, row, rows, panel);
}

template <class V>
void multiply(const Problem& p, const Activations& x, int64_t row, int64_t rows, int64_t panel, int64_t panels) {
  if (rows == 1)  // more panels at once: one token alone leaves the multipliers waiting for their own sums
    for (; panels >= V::kDecodePanels; panel += V::kDecodePanels, panels -= V::kDecodePanels)
      multiply_rows<V, V::kDecodePanels, 1>(p, x, row, rows, panel);
  for (; panels >= V::kPanels; panel += V::kPanels, panels -= V::kPanels)
    multiply_rows<V, V::kPanels, V::kTokens>(p, x, row, rows, panel);
  if constexpr (V::kPanels > 1)
    for (; panels > 0; ++panel, --panels) multiply_rows<V, 1, V::kTokens>(p, x, row, rows, panel);
}

}  // namespace
}  // namespace specquant
