// The INT4 product of a tile of T tokens × C vectors of outputs, but for the scales of outputs.
//
// V is the instruction set: W lanes along outputs, I of int32, F of float32, and the unpacked Weights of 8 features.
#pragma once

#include <algorithm>
#include <type_traits>

#include "tokens.h"

namespace specquant {
namespace {

// The C vectors of packed weights under `column`, at their first block; 64 bytes further is the next block.
template <class V, int C>
void weight_streams(const Problem& p, const Activations& x, int64_t column, const uint8_t* (&streams)[C]) {
  for (int v = 0; v < C; ++v) {
    const int64_t output = column + v * V::W;
    streams[v] = p.qweight + output / kPanel * x.panel_bytes + output % kPanel * 4;
  }
}

// Whether V multiplies two tokens at once (dot_pair), whose sums lie in another order meanwhile (pair, unpair).
template <class V, class = void>
struct InPairs : std::false_type {};
template <class V>
struct InPairs<V, std::void_t<decltype(&V::dot_pair)>> : std::true_type {};

// Bytes of weights that one token asks for before it needs them: the hardware alone does not keep up with it, and stops at
// the end of every page.
constexpr int64_t kWeightsAhead = 4096;

// acc += Σ nibble · a for one block of 8 features; tokens are a block apart.
template <class V, int T, int C>
inline __attribute__((always_inline)) void add_block(const uint8_t* (&weights)[C], const int8_t* a,
                                                     typename V::I (&acc)[T][C]) {
  typename V::Weights unpacked[C];
#pragma GCC unroll 8
  for (int v = 0; v < C; ++v) {
    if constexpr (T == 1)
      if (v * V::W % kPanel == 0) __builtin_prefetch(weights[v] + kWeightsAhead);
    unpacked[v] = V::unpack(weights[v]);
    weights[v] += kPanel * 4;
  }
  if constexpr (InPairs<V>::value && T % 2 == 0) {
#pragma GCC unroll 4
    for (int t = 0; t < T; t += 2)
#pragma GCC unroll 8
      for (int v = 0; v < C; ++v) V::dot_pair(acc[t][v], acc[t + 1][v], unpacked[v], a + t * kBlock);
  } else {
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) {
      const auto activation = V::activation(a + t * kBlock);
#pragma GCC unroll 8
      for (int v = 0; v < C; ++v) acc[t][v] = V::dot(acc[t][v], unpacked[v], activation);
    }
  }
}

// Whether V adds the products of some blocks as int16 before they are widened (kShorts).
template <class V, class = void>
struct InShorts : std::false_type {};
template <class V>
struct InShorts<V, std::void_t<decltype(V::kShorts)>> : std::true_type {};

// Blocks whose products int16 holds: 2 · 15 · 128 for each half of a block, eight times below 2^15.
constexpr int64_t kShortBlocks = 4;

// acc += Σ nibble · a over B ≤ kShortBlocks blocks. One half of the nibbles at a time: everything stays in registers.
template <class V, int T, int C, int B>
inline __attribute__((always_inline)) void add_short_blocks(const uint8_t* (&weights)[C], const int8_t* a,
                                                            int64_t stride, typename V::I (&acc)[T][C]) {
  typename V::I shorts[T][C];
#pragma GCC unroll 8
  for (int i = 0; i < T * C; ++i) shorts[i / C][i % C] = V::splat_int(0);
#pragma GCC unroll 4
  for (int k = 0; k < B; ++k) {
    if constexpr (T == 1)
      for (int v = 0; v < C; v += 64 / (4 * V::W)) __builtin_prefetch(weights[v] + k * kPanel * 4 + kWeightsAhead);
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      typename V::I nibbles[C];
#pragma GCC unroll 8
      for (int v = 0; v < C; ++v) nibbles[v] = V::nibbles(weights[v] + k * kPanel * 4, half);
#pragma GCC unroll 8
      for (int t = 0; t < T; ++t) {
        const auto four = V::four(a + k * stride + t * kBlock + 4 * half);
#pragma GCC unroll 8
        for (int v = 0; v < C; ++v) V::add_products(shorts[t][v], nibbles[v], four);
      }
    }
  }
#pragma GCC unroll 8
  for (int v = 0; v < C; ++v) {
    weights[v] += B * kPanel * 4;
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) acc[t][v] = V::add(acc[t][v], V::widen(shorts[t][v]));
  }
}

// acc += Σ nibble · a over `blocks` blocks, `stride` bytes of activations apart. Few sums are kept twice, for every
// other block: the multipliers would wait for one chain of them.
template <class V, int T, int C>
inline __attribute__((always_inline)) void add_blocks(const uint8_t* (&weights)[C], const int8_t* a, int64_t stride,
                                                      int64_t blocks, typename V::I (&acc)[T][C]) {
  if constexpr (InShorts<V>::value) {
    int64_t k = 0;
    for (; k + kShortBlocks <= blocks; k += kShortBlocks, a += kShortBlocks * stride)
      add_short_blocks<V, T, C, kShortBlocks>(weights, a, stride, acc);
    for (; k < blocks; ++k, a += stride) add_short_blocks<V, T, C, 1>(weights, a, stride, acc);
    return;
  }
  constexpr bool pairs = InPairs<V>::value && T % 2 == 0;
  if constexpr (pairs)
    for (int t = 0; t < T; t += 2)
      for (int v = 0; v < C; ++v) V::pair(acc[t][v], acc[t + 1][v]);
  int64_t k = 0;
  if constexpr (T * C < 8) {
    typename V::I other[T][C];
    for (int t = 0; t < T; ++t)
      for (int v = 0; v < C; ++v) other[t][v] = V::splat_int(0);
    for (; k + 2 <= blocks; k += 2, a += 2 * stride) {
      add_block<V, T, C>(weights, a, acc);
      add_block<V, T, C>(weights, a + stride, other);
    }
    for (int t = 0; t < T; ++t)
      for (int v = 0; v < C; ++v) acc[t][v] = V::add(acc[t][v], other[t][v]);
  }
  for (; k < blocks; ++k, a += stride) add_block<V, T, C>(weights, a, acc);
  if constexpr (pairs)
    for (int t = 0; t < T; t += 2)
      for (int v = 0; v < C; ++v) V::unpair(acc[t][v], acc[t + 1][v]);
}

// sums += Σ_segments s · c[g] · acc, acc = Σ a · q_w exactly, because check() bounds N.
template <class V, int T, int C>
inline __attribute__((always_inline)) void add_integer(const Problem& p, const Activations& x, int64_t row, int64_t column,
                                                       typename V::F (&sums)[T][C]) {
  const uint8_t* weights[C];
  weight_streams<V, C>(p, x, column, weights);
  const int64_t blocks = round_up(p.in_features, kBlock) / kBlock / x.segments;  // in a segment
  const int64_t segments_in_group = x.segments / groups_of(p);
  const int64_t group = row / kTileTokens * kTileTokens;  // of tokens whose activations lie side by side
  const int64_t stride = std::min(kTileTokens, x.rows - group) * kBlock;
  const int8_t* a = x.tiles + group * x.features + (row - group) * kBlock;
  const Step* steps = x.steps + row;
  const uint8_t* scales = p.group_scales + column / kPanel * x.group_bytes;
  for (int64_t s = 0, left = segments_in_group; s < x.segments; ++s) {
    typename V::I acc[T][C];
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t)
#pragma GCC unroll 8
      for (int v = 0; v < C; ++v) acc[t][v] = V::splat_int(steps[t].start);
    add_blocks<V, T, C>(weights, a, stride, blocks, acc);
#pragma GCC unroll 8
    for (int v = 0; v < C; ++v) {
      const auto scale = V::group_scales(scales + v * V::W / kPanel * x.group_bytes, v * V::W % kPanel);
#pragma GCC unroll 8
      for (int t = 0; t < T; ++t)
        sums[t][v] = V::fma(V::splat(steps[t].scale) * scale, V::to_float(acc[t][v]), sums[t][v]);
    }
    a += blocks * stride;
    steps += x.rows;
    if (--left == 0) scales += kGroupBytes, left = segments_in_group;
  }
}

// sums += Σ_groups c[g] · Σ u · q_w in float32: activations that are not quantised.
template <class V, int T, int C>
inline __attribute__((always_inline)) void add_float(const Problem& p, const Activations& x, int64_t row, int64_t column,
                                                     typename V::F (&sums)[T][C]) {
  const uint8_t* weights[C];
  weight_streams<V, C>(p, x, column, weights);
  const int64_t groups = groups_of(p);
  const int64_t blocks = round_up(p.in_features, kBlock) / kBlock / groups;
  const uint8_t* scales = p.group_scales + column / kPanel * x.group_bytes;
  for (int64_t g = 0; g < groups; ++g, scales += kGroupBytes) {
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
      const auto scale = V::group_scales(scales + v * V::W / kPanel * x.group_bytes, v * V::W % kPanel);
#pragma GCC unroll 8
      for (int t = 0; t < T; ++t) sums[t][v] = V::fma(scale, acc[t][v], sums[t][v]);
    }
  }
}

}  // namespace
}  // namespace specquant
