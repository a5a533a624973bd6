// softmax(scale · q k̂ᵀ) v̂ for some rows of queries against a run of cached tokens.
//
// A tile is up to kRows consecutive (token, head) pairs that share a kv head, so every nibble that is unpacked serves
// them all. V is a vector of W float lanes: tokens in q · k̂, features in the sum over v̂. A level n enters as n − 8, so
//   q · k̂ = scale · Σ q (n − 8) + (low + 8 scale) · Σ q,   and likewise for v̂.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

#include "exponential.h"
#include "kv_rows.h"
#include "steps.h"

namespace specquant {
namespace {

constexpr int64_t kBlockTokens = 256;  // tokens between two corrections of the running maximum: a stack buffer's size
constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();

// The queries of a tile: value `column` of row r is at [column · R + r], columns in the order in which `score` meets
// the nibbles. sums[r] = Σ q.
template <int R>
struct Queries {
  float values[kMostHeadDim * R];
  float sums[R];
};

template <int R>
void load_queries(const Attention& a, const QueryTile& tile, Queries<R>& queries) {
  const int64_t group = a.num_heads / a.kv_num_heads, d = a.head_dim;
  const float factor = a.scale != 0.0f ? a.scale : 1.0f / __builtin_sqrtf(float(d));
  float x[kMostHeadDim];
  for (int r = 0; r < R; ++r) {
    const int64_t token = (tile.row + r) / group;
    read_head(a, tile.batch, token, tile.kv_head * group + (tile.row + r) % group, x);
    place(a, tile.batch, token, nullptr, x);
    float sum = 0.0f;
    for (int64_t i = 0; i < d / 2; i += 4)
      for (int n = 0; n < 8; ++n) {
        const float value = x[i + n / 2 + (n & 1) * (d / 2)] * factor;
        queries.values[(2 * i + n) * R + r] = value;
        sum += value;
      }
    queries.sums[r] = sum;
  }
}

// scores[r · kBlockTokens + lane] of 2W tokens whose keys start at `rows`.
template <class V, int R>
inline void score(const uint8_t* rows, int64_t bytes, int64_t d, const Queries<R>& queries, float* scores) {
  using F = typename V::F;
  F sums[R][2];
#pragma GCC unroll 24
  for (int i = 0; i < 2 * R; ++i) sums[i / 2][i % 2] = V::splat(0.0f);
  const float* q = queries.values;
  for (int64_t i = 0; i < d / 2; i += 4) {
    auto first = V::gather(rows + i, bytes), second = V::gather(rows + V::W * bytes + i, bytes);
    for (int n = 0; n < 8; ++n, q += R) {
      const F levels[2] = {V::lowest_nibble(first), V::lowest_nibble(second)};
#pragma GCC unroll 12
      for (int r = 0; r < R; ++r) {
        const F value = V::splat(q[r]);
        sums[r][0] = V::fma(levels[0], value, sums[r][0]);
        sums[r][1] = V::fma(levels[1], value, sums[r][1]);
      }
      first = V::next_nibble(first);
      second = V::next_nibble(second);
    }
  }
#pragma GCC unroll 2
  for (int u = 0; u < 2; ++u) {
    F scale, low;
    V::halves(V::gather(rows + u * V::W * bytes + d / 2, bytes), scale, low);
    const F middle = V::fma(scale, V::splat(8.0f), low);
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r)
      V::store(scores + r * kBlockTokens + u * V::W, V::fma(sums[r][u], scale, middle * V::splat(queries.sums[r])));
  }
}

// y[r] += Σ_j weights[r][j] (n_j − 8) over `count` tokens whose values start at `rows`.
template <class V, int R>
inline void add_values(const uint8_t* rows, int64_t bytes, int64_t d, int64_t count, const float* weights, float* y) {
  using F = typename V::F;
  for (int64_t c = 0; c < d / 2; c += V::W) {
    F sums[R][2];
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r) {
      sums[r][0] = V::load(y + r * d + c);
      sums[r][1] = V::load(y + r * d + d / 2 + c);
    }
    for (int64_t j = 0; j < count; ++j) {
      const auto packed = V::bytes(rows + j * bytes + c);
      const F low = V::lowest_nibble(packed), high = V::lowest_nibble(V::next_nibble(packed));
#pragma GCC unroll 12
      for (int r = 0; r < R; ++r) {
        const F weight = V::splat(weights[r * kBlockTokens + j]);
        sums[r][0] = V::fma(low, weight, sums[r][0]);
        sums[r][1] = V::fma(high, weight, sums[r][1]);
      }
    }
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r) {
      V::store(y + r * d + c, sums[r][0]);
      V::store(y + r * d + d / 2 + c, sums[r][1]);
    }
  }
}

// R rows of a tile. `out` is as in Kernels::attend.
template <class V, int R>
void attend_rows(const Attention& a, const QueryTile& tile, const Partial& out) {
  using F = typename V::F;
  constexpr int64_t kStep = 2 * V::W;
  const int64_t d = a.head_dim, bytes = row_bytes(a), group = a.num_heads / a.kv_num_heads;
  const int64_t before = tokens_before(a, tile.batch);
  const int64_t cache = (tile.batch * a.kv_num_heads + tile.kv_head) * a.present_rows * bytes;
  Queries<R> queries;
  load_queries<R>(a, tile, queries);
  float largest[R], sums[R], middles[R];  // of the softmax so far; middles: Σ weight · (low + 8 scale)
  for (int r = 0; r < R; ++r) largest[r] = kMinusInfinity, sums[r] = middles[r] = 0.0f;
  std::fill(out.y, out.y + R * d, 0.0f);

  float scores[R * kBlockTokens], scales[kBlockTokens], centres[kBlockTokens];
  uint8_t spare[kStep * (kMostHeadDim / 2 + kParameterBytes)];
  for (int64_t start = tile.first; start < tile.end; start += kBlockTokens) {
    const int64_t count = std::min(kBlockTokens, tile.end - start);
    const uint8_t *keys = a.present_key + cache + start * bytes, *values = a.present_value + cache + start * bytes;
    for (int64_t j = 0; j < count; j += kStep) {
      // Nothing past the last token is read: it may lie past the cache's end.
      const auto whole_rows = [&](const uint8_t* rows) -> const uint8_t* {
        if (j + kStep <= count) return rows + j * bytes;
        std::memset(spare, 0, size_t(kStep * bytes));
        std::memcpy(spare, rows + j * bytes, size_t((count - j) * bytes));
        return spare;
      };
      score<V, R>(whole_rows(keys), bytes, d, queries, scores + j);
      const uint8_t* rows = whole_rows(values);
      for (int u = 0; u < 2; ++u) {
        F scale, low;
        V::halves(V::gather(rows + u * V::W * bytes + d / 2, bytes), scale, low);
        V::store(scales + j + u * V::W, scale);
        V::store(centres + j + u * V::W, V::fma(scale, V::splat(8.0f), low));
      }
    }
    const int64_t padded = round_up(count, kStep);
    for (int r = 0; r < R; ++r) {
      float* const row = scores + r * kBlockTokens;
      const int64_t last = before + (tile.row + r) / group;  // the query's own place in the cache
      const int64_t from = a.window > 0 ? std::clamp<int64_t>(last + 1 - a.window - start, 0, count) : 0;
      const int64_t to = std::clamp<int64_t>(last + 1 - start, from, count);
      std::fill(row, row + from, kMinusInfinity);
      std::fill(row + to, row + padded, kMinusInfinity);
      F peak = V::splat(largest[r]);
      for (int64_t j = 0; j < padded; j += V::W) peak = V::max(peak, V::load(row + j));
      float lanes[2][V::W], most = largest[r];
      V::store(lanes[0], peak);
      for (const float lane : lanes[0]) most = lane > most ? lane : most;
      if (most == kMinusInfinity && to == from) {  // nothing of this block is seen, nor of those before
        std::fill(row, row + padded, 0.0f);
        continue;
      }
      F sum = V::splat(0.0f), middle = V::splat(0.0f);
      for (int64_t j = 0; j < padded; j += V::W) {
        const F weight = exponential<V>(V::load(row + j) - V::splat(most));
        sum = sum + weight;
        middle = V::fma(weight, V::load(centres + j), middle);
        V::store(row + j, weight * V::load(scales + j));
      }
      float total = 0.0f, centre = 0.0f;
      V::store(lanes[0], sum);
      V::store(lanes[1], middle);
      for (int i = 0; i < V::W; ++i) total += lanes[0][i], centre += lanes[1][i];
      const float correction = std::exp(largest[r] - most);
      sums[r] = sums[r] * correction + total;
      middles[r] = middles[r] * correction + centre;
      if (correction != 1.0f)
        for (int64_t i = 0; i < d; ++i) out.y[r * d + i] *= correction;
      largest[r] = most;
    }
    add_values<V, R>(values, bytes, d, count, scores, out.y);
  }
  for (int r = 0; r < R; ++r) {
    for (int64_t i = 0; i < d; ++i) out.y[r * d + i] += middles[r];
    out.largest[r] = largest[r];
    out.sum[r] = sums[r];
  }
}

// Any number of rows up to R: the compiler makes one function for each.
template <class V, int R>
void attend_tile(const Attention& a, const QueryTile& tile, const Partial& out) {
  if constexpr (R > 1) {
    if (tile.rows < R) return attend_tile<V, R - 1>(a, tile, out);
  }
  attend_rows<V, R>(a, tile, out);
}

}  // namespace
}  // namespace specquant
