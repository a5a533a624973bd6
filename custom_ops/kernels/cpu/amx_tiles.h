// What AMX multiplies: panels unpacked into tiles of factors, tiles of sums, and how these are folded into floats.
//
// Tile registers: sums in 0 to 3, tokens in 4 and 5, weights in 6 and 7. A tile of factors is 16 tokens, or outputs, by
// `width` features, and one piece of memory.
#pragma once

#include "zmm.h"

namespace specquant {
namespace {

constexpr int kTile = kWidestTile;     // tokens, and outputs, of a tile of sums
// Panels side by side: y is written 512 bytes at a time (256 took 1.2 times as long for 512 tokens, 576 × 3072).
constexpr int kPanels = 8;
constexpr int64_t kRows = 256;         // tokens at a time: a block is 0.4 MB of stack
constexpr int64_t kLeastRows = 32;     // of short segments: with fewer, VNNI is as fast
constexpr int64_t kRun = 1024;         // features at a time: a panel's and a tile of tokens' fit the L1 cache
constexpr int64_t kWidest = 64, kLeastWidth = 32;  // of a tile of factors, in features
constexpr int64_t kLong = 256;         // a segment from here on keeps four tiles of sums busy

template <int C>
struct alignas(64) Sums {  // of C tiles side by side
  float rows[kTile][C * kTile];
};
struct alignas(64) Products {
  int32_t rows[kTile][kTile];
};

// A run of one panel, ready for tiles.
struct Panel {
  alignas(64) int8_t weights[kRun * kTile];
  alignas(64) float scales[kRun / kLeastWidth][kTile];
};

// Features of a tile of factors: whole tiles make up a segment.
int64_t width_of(int64_t segment) {
  int64_t width = kWidest;
  while (segment % width) width -= kBlock;
  return width;
}

// What all runs of a call share.
struct Shape {
  int64_t features, segment, width;  // padded to blocks
  int64_t segments;

  Shape(const Problem& p, const Activations& x)
      : features(round_up(p.in_features, kBlock)), segment(round_up(segment_length(p), kBlock)),
        width(width_of(segment)), segments(x.segments) {}
};

// Features [start, end): whole segments, or a part of one that is longer than kRun.
struct Run {
  int64_t start, end;

  Run(const Shape& shape, int64_t from) : start(from) {
    const bool several = shape.segment <= kRun;
    const int64_t unit = several ? shape.segment : shape.width;
    end = std::min(start + kRun / unit * unit, several ? shape.features : (start / shape.segment + 1) * shape.segment);
  }
};

void configure(int64_t width) {
  struct {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t bytes[16] = {};
    uint8_t rows[16] = {};
  } layout;
  for (int i = 0; i < 8; ++i) {
    layout.bytes[i] = uint16_t(i == 4 || i == 5 ? width : 64);
    layout.rows[i] = uint8_t(i < 6 ? kTile : width / 4);
  }
  __asm__ volatile("" : : "r"(&layout) : "memory");  // the intrinsic names 8 of these bytes; GCC would drop the others
  _tile_loadconfig(&layout);
}

// Weights get their sign here, so that −8 Σ a falls away.
void unpack(const Problem& p, const Shape& shape, const Run& run, int64_t panel, Panel& to) {
  const __m512i mask = _mm512_set1_epi8(15), offset = _mm512_set1_epi8(8);
  const uint8_t* from = p.qweight + (panel * shape.features + run.start) * (kPanel / 2);
  int8_t* weights = to.weights;
  for (int64_t k = run.start; k < run.end; k += kBlock, from += 64, weights += 128) {
    const __m512i packed = _mm512_loadu_si512(from);
    _mm512_store_si512(weights, _mm512_sub_epi8(_mm512_and_si512(packed, mask), offset));
    _mm512_store_si512(weights + 64, _mm512_sub_epi8(_mm512_and_si512(_mm512_srli_epi16(packed, 4), mask), offset));
  }
  const int64_t groups = groups_of(p);
  const uint8_t* scales = p.group_scales + panel * groups * kGroupBytes;
  for (int64_t s = run.start / shape.segment, i = 0; s * shape.segment < run.end; ++s, ++i)
    _mm512_store_ps(to.scales[i], Zmm::group_scales(scales + s * groups / shape.segments * kGroupBytes, 0));
}

// sums += s · scales · products, in the vectors' order of operations.
inline __attribute__((always_inline)) void fold(const Products& products, const float* step, const Panel& panel,
                                                int64_t segment, __m512 (&sums)[kTile]) {
  const __m512 scales = _mm512_load_ps(panel.scales[segment]);
#pragma GCC unroll 16
  for (int t = 0; t < kTile; ++t)
    sums[t] = Zmm::fma(Zmm::splat(step[t]) * scales, Zmm::to_float(_mm512_load_si512(products.rows[t])), sums[t]);
}

template <int C>
inline __attribute__((always_inline)) void load(const Sums<C>& from, int c, __m512 (&sums)[kTile]) {
#pragma GCC unroll 16
  for (int t = 0; t < kTile; ++t) sums[t] = _mm512_load_ps(from.rows[t] + c * kTile);
}
template <int C>
inline __attribute__((always_inline)) void store(const __m512 (&sums)[kTile], int c, Sums<C>& to) {
#pragma GCC unroll 16
  for (int t = 0; t < kTile; ++t) _mm512_store_ps(to.rows[t] + c * kTile, sums[t]);
}

// A tile of products of one segment, in tile register 0.
inline __attribute__((always_inline)) void multiply_segment(const int8_t* a, const int8_t* weights, const Shape& shape,
                                                            Products& products) {
  _tile_zero(0);
  for (int64_t k = 0; k < shape.segment * kTile; k += shape.width * kTile) {
    _tile_loadd(6, weights + k, 64);
    _tile_loadd(4, a + k, shape.width);
    _tile_dpbssd(0, 4, 6);
  }
  _tile_stored(0, products.rows, 64);
}

// A tile's short segments: its sums stay in registers, and a segment is multiplied while the last one is folded.
template <int C>
void add_short(const Shape& shape, const Run& run, const int8_t* a, const float* steps, const Panel& panel, int c,
               Sums<C>& total) {
  Products products[2];
  __m512 sums[kTile];
  load(total, c, sums);
  const int64_t count = (run.end - run.start) / shape.segment, bytes = shape.segment * kTile;
  multiply_segment(a, panel.weights, shape, products[0]);
  for (int64_t i = 0; i < count; ++i, steps += kTile) {
    if (i + 1 < count)
      multiply_segment(a + (i + 1) * bytes, panel.weights + (i + 1) * bytes, shape, products[(i + 1) % 2]);
    fold(products[i % 2], steps, panel, i, sums);
  }
  store(sums, c, total);
}

// R × C tiles of products += tokens · weights, over `count` bytes of tiles; the second tokens' products lie at `next`.
template <int R, int C>
void multiply_long(const int8_t* const (&a)[R], const int8_t* const (&weights)[C], int64_t count, int64_t width,
                   bool begins, Products* products, int64_t next) {
  if (begins) {
    _tile_zero(0);
    if constexpr (C > 1) _tile_zero(1);
    if constexpr (R > 1) _tile_zero(2);
    if constexpr (R > 1 && C > 1) _tile_zero(3);
  } else {
    _tile_loadd(0, products[0].rows, 64);
    if constexpr (C > 1) _tile_loadd(1, products[1].rows, 64);
    if constexpr (R > 1) _tile_loadd(2, products[next].rows, 64);
    if constexpr (R > 1 && C > 1) _tile_loadd(3, products[next + 1].rows, 64);
  }
  for (int64_t k = 0; k < count; k += width * kTile) {
    _tile_loadd(6, weights[0] + k, 64);
    _tile_loadd(4, a[0] + k, width);
    _tile_dpbssd(0, 4, 6);
    if constexpr (C > 1) {
      _tile_loadd(7, weights[1] + k, 64);
      _tile_dpbssd(1, 4, 7);
    }
    if constexpr (R > 1) {
      _tile_loadd(5, a[1] + k, width);
      _tile_dpbssd(2, 5, 6);
    }
    if constexpr (R > 1 && C > 1) _tile_dpbssd(3, 5, 7);
  }
  _tile_stored(0, products[0].rows, 64);
  if constexpr (C > 1) _tile_stored(1, products[1].rows, 64);
  if constexpr (R > 1) _tile_stored(2, products[next].rows, 64);
  if constexpr (R > 1 && C > 1) _tile_stored(3, products[next + 1].rows, 64);
}

}  // namespace
}  // namespace specquant
