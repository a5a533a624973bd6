// softmax(scale · q k̂ᵀ) v̂ for some rows of queries against a run of tokens cached in float16.
//
// A tile goes through the cache block by block. Keys, then values, of a block become float32 once for all rows of the
// tile, as panels: kSpan tokens by all features, so that lanes of a score run along tokens; then all tokens by kSpan
// features. Rows go through the panels R at a time: R · C vectors of sums stay in registers. A run of R rows skips what
// all of them cannot see, ahead of them or before the window.
//
// One new token has too few rows for that: they meet the cache as it lies, lanes along features.
#pragma once

#include <type_traits>

#include "attend.h"

namespace specquant {
namespace {

constexpr int64_t kHalfBlock = 128;  // tokens of a block, fewer where their keys would exceed kMostTileFloats

// sums[r][c] += Σ_k a[r · Stride + k] · panel[k · C · W + c · W + lane].
template <class V, int R, int C, int64_t Stride>
inline __attribute__((always_inline)) void multiply_add(const float* a, const float* panel, int64_t depth,
                                                        typename V::F (&sums)[R][C]) {
  for (int64_t k = 0; k < depth; ++k, ++a, panel += C * V::W) {
    typename V::F b[C];
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) b[c] = V::load(panel + c * V::W);
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r) {
      const auto value = V::splat(a[r * Stride]);
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c) sums[r][c] = V::fma(value, b[c], sums[r][c]);
    }
  }
}

constexpr int kStepRows = 4;  // of one token, at a time

// A tile in work. E is a vector of 8 lanes, V of as many as there are.
template <class V, class E, int R, int C>
struct HalfTile {
  using F = typename V::F;
  static constexpr int64_t kSpan = C * V::W;
  static_assert(kHalfRowsMultiple % R == 0 && kHalfBlock % kSpan == 0 && kSpan % 8 == 0);

  const Attention& a;
  const QueryTile& tile;
  const Partial& out;
  const int64_t d, group;
  alignas(64) float queries[kMostHalfRows * kMostHeadDim];  // rows of kMostHeadDim: the loops know the distance
  alignas(64) float panels[kMostTileFloats];
  alignas(64) float scores[kMostHalfRows * kHalfBlock];
  float corrections[kMostHalfRows];  // what y has to be multiplied by, since the largest score has grown
  int64_t places[kMostHalfRows];     // of the rows' tokens in the cache

  HalfTile(const Attention& attention, const QueryTile& rows, const Partial& result)
      : a(attention), tile(rows), out(result), d(attention.head_dim),
        group(attention.num_heads / attention.kv_num_heads) {}

  // Tokens [from, to) of the block of `count` from `start` on that one of the rows [row, row + rows) sees.
  struct Seen {
    int64_t from, to;
  };
  Seen seen(int64_t row, int64_t rows, int64_t start, int64_t count) const {
    const int64_t from = a.window > 0 ? std::clamp<int64_t>(places[row] + 1 - a.window - start, 0, count) : 0;
    return {from, std::clamp<int64_t>(places[row + rows - 1] + 1 - start, from, count)};
  }

  void load_queries() {
    const float factor = a.scale != 0.0f ? a.scale : 1.0f / __builtin_sqrtf(float(d));
    const int64_t before = tokens_before(a, tile.batch), first_head = tile.kv_head * group;
    int64_t token = tile.row / group, head = tile.row % group;
    for (int64_t r = 0; r < tile.rows; ++r, ++head) {
      if (head == group) ++token, head = 0;
      places[r] = before + token;
      float* const x = queries + r * kMostHeadDim;
      read_head(a, tile.batch, token, first_head + head, x);
      place(a, tile.batch, token, nullptr, x);
      for (int64_t i = 0; i < d; ++i) x[i] *= factor;
    }
  }

  const uint16_t* cached(const uint8_t* cache, int64_t start) const {
    return reinterpret_cast<const uint16_t*>(cache) +
           ((tile.batch * a.kv_num_heads + tile.kv_head) * a.present_rows + start) * d;
  }

  // Panels [tokens / kSpan][d][kSpan]; zeros for tokens that are missing in the last one.
  void load_keys(int64_t start, int64_t count) {
    const uint16_t* from = cached(a.present_key, start);
    for (int64_t j = 0; j < round_up(count, kSpan); j += 8) {
      float* const to = panels + j / kSpan * kSpan * d + j % kSpan;
      for (int64_t i = 0; i < d; i += 8) {
        typename E::F rows[8];
#pragma GCC unroll 8
        for (int t = 0; t < 8; ++t) rows[t] = j + t < count ? E::half(from + (j + t) * d + i) : E::splat(0.0f);
        E::transpose(rows);
#pragma GCC unroll 8
        for (int t = 0; t < 8; ++t) E::store(to + (i + t) * kSpan, rows[t]);
      }
    }
  }

  // Panels [d / kSpan][tokens][kSpan].
  void load_values(int64_t start, int64_t count) {
    const uint16_t* from = cached(a.present_value, start);
    for (int64_t j = 0; j < count; ++j, from += d)
      for (int64_t i = 0; i < d; i += V::W)
        V::store(panels + i / kSpan * kSpan * count + j * kSpan + i % kSpan, V::half(from + i));
  }

  template <int N>
  void score(int64_t row, int64_t panel) {
    F sums[N][C];
#pragma GCC unroll 12
    for (int r = 0; r < N; ++r)
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c) sums[r][c] = V::splat(0.0f);
    multiply_add<V, N, C, kMostHeadDim>(queries + row * kMostHeadDim, panels + panel * kSpan * d, d, sums);
#pragma GCC unroll 12
    for (int r = 0; r < N; ++r)
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c) V::store(scores + (row + r) * kHalfBlock + panel * kSpan + c * V::W, sums[r][c]);
  }

  // y of `kSpan` features from `feature` on.
  template <int N>
  void add_values(int64_t row, int64_t feature, const Seen& tokens, int64_t count) {
    F sums[N][C];
    float* const y = out.y + row * d + feature;
#pragma GCC unroll 12
    for (int r = 0; r < N; ++r) {
      const F correction = V::splat(corrections[row + r]);
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c) sums[r][c] = V::load(y + r * d + c * V::W) * correction;
    }
    multiply_add<V, N, C, kHalfBlock>(scores + row * kHalfBlock + tokens.from,
                                      panels + feature * count + tokens.from * kSpan, tokens.to - tokens.from, sums);
#pragma GCC unroll 12
    for (int r = 0; r < N; ++r)
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c) V::store(y + r * d + c * V::W, sums[r][c]);
  }

  // Calls work(row, integral_constant rows) for each run of N rows, and for the fewer that are left.
  template <int N = R, class Work>
  void for_runs(const Work& work) const {
    int64_t row = 0;
    for (; row + N <= tile.rows; row += N) work(row, std::integral_constant<int, N>());
    for_rest<N - 1>(row, work);
  }
  template <int N, class Work>
  void for_rest(int64_t row, const Work& work) const {
    if constexpr (N > 0) {
      if (tile.rows - row == N) return work(row, std::integral_constant<int, N>());
      for_rest<N - 1>(row, work);
    }
  }

  // Scores of a row become weights e^(score − largest), of which `own` are seen; of all that were computed in [from, to).
  void weigh(int64_t r, const Seen& own, int64_t from, int64_t to) {
    float* const row = scores + r * kHalfBlock;
    std::fill(row + from, row + own.from, kMinusInfinity);
    std::fill(row + own.to, row + to, kMinusInfinity);
    F peak = V::splat(out.largest[r]);
    for (int64_t j = from; j < to; j += V::W) peak = V::max(peak, V::load(row + j));
    const float most = V::largest(peak);
    corrections[r] = 1.0f;
    if (most == kMinusInfinity && own.from == own.to)  // nothing of this block is seen, nor of those before
      return std::fill(row + from, row + to, 0.0f);
    F sum = V::splat(0.0f);
    for (int64_t j = from; j < to; j += V::W) {
      const F weight = exponential<V>(V::load(row + j) - V::splat(most));
      sum = sum + weight;
      V::store(row + j, weight);
    }
    corrections[r] = std::exp(out.largest[r] - most);
    out.sum[r] = out.sum[r] * corrections[r] + V::total(sum);
    out.largest[r] = most;
  }

  // Scores of N rows and T tokens, of which `keys` is the first and `token` its place in the block.
  template <int N, int T>
  void score_tokens(int64_t row, const uint16_t* keys, int64_t token) {
    F sums[N][T];
#pragma GCC unroll 16
    for (int i = 0; i < N * T; ++i) sums[i / T][i % T] = V::splat(0.0f);
    for (int64_t i = 0; i < d; i += V::W) {
      F key[T];
#pragma GCC unroll 4
      for (int t = 0; t < T; ++t) key[t] = V::half(keys + t * d + i);
#pragma GCC unroll 4
      for (int r = 0; r < N; ++r) {
        const F query = V::load(queries + (row + r) * kMostHeadDim + i);
#pragma GCC unroll 4
        for (int t = 0; t < T; ++t) sums[r][t] = V::fma(query, key[t], sums[r][t]);
      }
    }
#pragma GCC unroll 16
    for (int i = 0; i < N * T; ++i) scores[(row + i / T) * kHalfBlock + token + i % T] = V::total(sums[i / T][i % T]);
  }

  // y of N rows and P vectors of features, over tokens whose values lie from `values` on: many sums, since each waits for
  // its last addition.
  template <int N, int P>
  void add_tokens(int64_t row, int64_t feature, const uint16_t* values, const Seen& tokens) {
    F sums[N][P];
    float* const y = out.y + row * d + feature;
#pragma GCC unroll 8
    for (int i = 0; i < P * N; ++i)
      sums[i / P][i % P] = V::load(y + i / P * d + i % P * V::W) * V::splat(corrections[row + i / P]);
    const float* const weights = scores + row * kHalfBlock;
    for (int64_t j = tokens.from; j < tokens.to; ++j) {
      F value[P];
#pragma GCC unroll 4
      for (int i = 0; i < P; ++i) value[i] = V::half(values + j * d + feature + i * V::W);
#pragma GCC unroll 4
      for (int r = 0; r < N; ++r) {
        const F weight = V::splat(weights[r * kHalfBlock + j]);
#pragma GCC unroll 4
        for (int i = 0; i < P; ++i) sums[r][i] = V::fma(weight, value[i], sums[r][i]);
      }
    }
#pragma GCC unroll 8
    for (int i = 0; i < P * N; ++i) V::store(y + i / P * d + i % P * V::W, sums[i / P][i % P]);
  }

  // Asks for keys of later tokens, and for these tokens' values: the hardware alone does not keep up.
  template <int T>
  void ask(const uint16_t* keys, const uint16_t* values) const {
    constexpr int64_t line = 32, ahead = 2048;
    for (int64_t i = 0; i < T * d; i += line) {
      __builtin_prefetch(keys + ahead + i);
      __builtin_prefetch(values + i);
    }
  }

  // A block, of which all rows see the same.
  void attend_step(int64_t start, int64_t count) {
    const uint16_t *keys = cached(a.present_key, start), *values = cached(a.present_value, start);
    for_runs<kStepRows>([&](int64_t row, auto rows) {
      constexpr int kTokens = rows < kStepRows ? 4 : 2;  // 12 sums at most
      int64_t j = 0;
      for (; j + kTokens <= count; j += kTokens) {
        if (row == 0) ask<kTokens>(keys + j * d, values + j * d);
        score_tokens<rows, kTokens>(row, keys + j * d, j);
      }
      for (; j < count; ++j) score_tokens<rows, 1>(row, keys + j * d, j);
    });
    const Seen tokens = seen(0, tile.rows, start, count);
    for (int64_t r = 0; r < tile.rows; ++r) weigh(r, tokens, 0, round_up(count, V::W));
    for_runs<kStepRows>([&](int64_t row, auto rows) {
      constexpr int many = V::W == 16 ? 4 : 2, few = 16 / V::W;
      int64_t feature = 0;
      for (; feature + many * V::W <= d; feature += many * V::W) add_tokens<rows, many>(row, feature, values, tokens);
      for (; feature < d; feature += 16) add_tokens<rows, few>(row, feature, values, tokens);
    });
  }

  void attend_block(int64_t start, int64_t count) {
    load_keys(start, count);
    for (int64_t panel = 0; panel * kSpan < count; ++panel)
      for_runs([&](int64_t row, auto rows) {
        const Seen tokens = seen(row, rows, start, count);
        if (tokens.from < (panel + 1) * kSpan && tokens.to > panel * kSpan) score<rows>(row, panel);
      });
    load_values(start, count);
    for_runs([&](int64_t row, auto rows) {
      const Seen tokens = seen(row, rows, start, count);
      if (tokens.from == tokens.to) return;
      for (int r = 0; r < rows; ++r)
        weigh(row + r, seen(row + r, 1, start, count), tokens.from / kSpan * kSpan, round_up(tokens.to, kSpan));
    });
    for (int64_t feature = 0; feature < d; feature += kSpan)
      for_runs([&](int64_t row, auto rows) {
        const Seen tokens = seen(row, rows, start, count);
        if (tokens.from < tokens.to) add_values<rows>(row, feature, tokens, count);
      });
  }

  void run() {
    load_queries();
    std::fill(out.largest, out.largest + tile.rows, kMinusInfinity);
    std::fill(out.sum, out.sum + tile.rows, 0.0f);
    std::fill(out.y, out.y + tile.rows * d, 0.0f);
    const int64_t block = std::min(kHalfBlock, kMostTileFloats / d / kSpan * kSpan);
    for (int64_t start = tile.first; start < tile.end; start += block) {
      const int64_t count = std::min(block, tile.end - start);
      a.sequence == 1 ? attend_step(start, count) : attend_block(start, count);
    }
  }
};

// As Kernels::attend_half; C · W divides head_dim.
template <class V, class E, int R, int C>
void attend_half(const Attention& attention, const QueryTile& tile, const Partial& out) {
  HalfTile<V, E, R, C>(attention, tile, out).run();
}

}  // namespace
}  // namespace specquant
