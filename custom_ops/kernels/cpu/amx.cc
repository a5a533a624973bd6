// AMX int8: 16 tokens × 16 outputs × 64 features an instruction. One vector of packed nibbles is two rows of a tile of
// weights, so panels are unpacked once, a run of features at a time, and used for all tokens of a task.
//
// What is not a product of many tokens is AVX512-VNNI's.
#include "cpu_features.h"
#include "zmm.h"

namespace specquant {
namespace {

constexpr int kTile = kWidestTile;     // tokens, and outputs, of a tile of sums
constexpr int kPanels = 4;             // side by side: y is written 256 bytes at a time
constexpr int64_t kRows = 128;         // tokens at a time: bounds the stack
constexpr int64_t kLeastRows = 32;     // of short segments: with fewer, VNNI is as fast
constexpr int64_t kRun = 1024;         // features at a time: those of a tile of tokens and of a panel share the L1 cache
constexpr int64_t kWidest = 64, kLeastWidth = 32;  // of a tile of factors, in features
constexpr int64_t kLong = 256;         // a segment from here on keeps four tiles of sums busy
constexpr int64_t kStepWords = 2 * kTile;  // of a tile and segment: 16 scales, then 16 zeros

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
  alignas(64) int32_t row_sums[kRun / kLeastWidth][kTile];
};

// Features of a tile of factors: whole tiles make up a segment.
int64_t width_of(int64_t segment) {
  int64_t width = kWidest;
  while (segment % width) width -= kBlock;
  return width;
}

bool suits(const Problem& p, const Activations& x) {
  const int64_t segment = round_up(segment_length(p), kBlock);
  return x.rows >= (segment < kLong ? kLeastRows : kTile) && p.qweight && p.act_bits < 16 &&
         width_of(segment) >= kLeastWidth;
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
    const int64_t most = shape.segment <= kRun ? kRun / shape.segment * shape.segment : kRun / shape.width * shape.width;
    end = std::min(start + most, shape.segment <= kRun ? shape.features : (start / shape.segment + 1) * shape.segment);
  }
};

// Tokens of a tile lie side by side, `width` features of each, so that a tile of factors is one piece of memory.
void arrange_tokens(const Problem& p, const Activations& x, int64_t row, int64_t rows) {
  if (!suits(p, x)) return interleave(p, x, row, rows);
  const Shape shape(p, x);
  const int64_t past = x.rows % kTile, last = x.rows / kTile * shape.segments * kStepWords;
  if (past && row + rows == x.rows)  // what happens to lie there for the tokens that are missing may be slow: denormals
    for (int64_t s = 0; s < shape.segments; ++s)
      for (int64_t half = 0; half < 2; ++half)
        std::memset(reinterpret_cast<int32_t*>(x.steps) + last + s * kStepWords + half * kTile + past, 0,
                    size_t(kTile - past) * sizeof(int32_t));
  for (int64_t t = row; t < row + rows; ++t) {
    const int8_t* a = x.a + t * x.features;
    int8_t* to = x.tiles + t / kTile * kTile * shape.features + t % kTile * shape.width;
    auto* step = reinterpret_cast<int32_t*>(x.steps) + t / kTile * shape.segments * kStepWords + t % kTile;
    for (int64_t s = 0; s < shape.segments; ++s, step += kStepWords) {
      const int64_t at = t * shape.segments + s;
      const int32_t moved = x.centred ? x.zero[at] : 0, zero = x.zero[at] - moved;
      std::memcpy(step, x.scale + at, sizeof(float));
      std::memcpy(step + kTile, &zero, sizeof zero);
      for (int64_t k = 0; k < shape.segment; k += shape.width, a += shape.width, to += kTile * shape.width)
        for (int64_t i = 0; i < shape.width; i += kBlock)
          for (int64_t j = 0; j < kBlock; ++j) to[i + j] = int8_t(a[i + j] + moved);
    }
  }
}

// Tile registers: sums in 0 to 3, tokens in 4 and 5, weights in 6 and 7.
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

template <class T>
__m512i load_sums(const void* row_sums, int64_t at, int64_t all) {
  T spare[kTile];
  const auto sums = Zmm::load_sums(whole<kTile>(static_cast<const T*>(row_sums), at, all, spare));
  if constexpr (sizeof(T) == 2) {
    return sums.lanes;
  } else {
    return sums;
  }
}

// Weights get their sign here, so that −8 Σ a falls away.
void unpack(const Problem& p, const Shape& shape, const Run& run, int64_t panel, bool centred, Panel& to) {
  const __m512i mask = _mm512_set1_epi8(15), offset = _mm512_set1_epi8(8);
  const uint8_t* from = p.qweight + (panel * shape.features + run.start) * (kPanel / 2);
  int8_t* weights = to.weights;
  for (int64_t k = run.start; k < run.end; k += kBlock, from += 64, weights += 128) {
    const __m512i packed = _mm512_loadu_si512(from);
    _mm512_store_si512(weights, _mm512_sub_epi8(_mm512_and_si512(packed, mask), offset));
    _mm512_store_si512(weights + 64, _mm512_sub_epi8(_mm512_and_si512(_mm512_srli_epi16(packed, 4), mask), offset));
  }
  const int64_t groups = p.group_size ? p.in_features / p.group_size : 1, column = panel * kPanel;
  for (int64_t s = run.start / shape.segment, i = 0; s * shape.segment < run.end; ++s, ++i) {
    uint16_t spare[kTile];
    const int64_t g = s * groups / shape.segments;
    _mm512_store_ps(to.scales[i], Zmm::half(whole<kTile>(p.scales, g * p.out_features + column,
                                                         groups * p.out_features, spare)));
    if (centred) continue;
    const auto load = p.wide_sums ? load_sums<int32_t> : load_sums<int16_t>;
    _mm512_store_si512(to.row_sums[i], load(p.row_sums, s * p.out_features + column, shape.segments * p.out_features));
  }
}

// Where the zero-points are: in the activations already, or to be multiplied by sums of weights of 16 or 32 bits.
enum class Zero { kCentred, kNarrow, kWide };

// Σ (q − z) · q_w of one token, from Σ a · q_w.
template <Zero Z>
inline __attribute__((always_inline)) __m512i add_zero(const int32_t* products, const int32_t* row_sums, int32_t zero) {
  const __m512i sum = _mm512_load_si512(products);
  if constexpr (Z == Zero::kCentred) return sum;
  const __m512i sums = _mm512_load_si512(row_sums), factor = _mm512_set1_epi32(zero);
  if constexpr (Z == Zero::kNarrow) return _mm512_dpwssd_epi32(sum, sums, factor);
  return _mm512_add_epi32(sum, _mm512_mullo_epi32(sums, factor));
}

// sums += s · scales · products, in the vectors' order of operations.
template <Zero Z>
inline __attribute__((always_inline)) void fold(const Products& products, const int32_t* step, const Panel& panel,
                                                int64_t segment, __m512 (&sums)[kTile]) {
  const __m512 scales = _mm512_load_ps(panel.scales[segment]);
#pragma GCC unroll 16
  for (int t = 0; t < kTile; ++t) {
    const __m512i sum = add_zero<Z>(products.rows[t], panel.row_sums[segment], step[kTile + t]);
    const __m512 scale = _mm512_castsi512_ps(_mm512_set1_epi32(step[t]));
    sums[t] = Zmm::fma(scale * scales, Zmm::to_float(sum), sums[t]);
  }
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
template <Zero Z, int C>
void add_short(const Shape& shape, const Run& run, const int8_t* a, const int32_t* steps, const Panel& panel, int c,
               Sums<C>& total) {
  Products products[2];
  __m512 sums[kTile];
  load(total, c, sums);
  const int64_t count = (run.end - run.start) / shape.segment, bytes = shape.segment * kTile;
  multiply_segment(a, panel.weights, shape, products[0]);
  for (int64_t i = 0; i < count; ++i, steps += kStepWords) {
    if (i + 1 < count)
      multiply_segment(a + (i + 1) * bytes, panel.weights + (i + 1) * bytes, shape, products[(i + 1) % 2]);
    fold<Z>(products[i % 2], steps, panel, i, sums);
  }
  store(sums, c, total);
}

// R × C tiles of products += tokens · weights over `count` bytes of their rows; products lie `next` apart, R · C of them.
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

// C panels of up to kRows tokens.
template <Zero Z, int C>
struct Block {
  const Problem& p;
  const Activations& x;
  const Shape& shape;
  int64_t row, rows, panel, tiles;
  Panel panels[C];
  Sums<C> sums[kRows / kTile];
  Products products[kRows / kTile][C];  // of long segments

  Block(const Problem& problem, const Activations& activations, const Shape& sizes, int64_t from, int64_t count,
        int64_t first_panel)
      : p(problem), x(activations), shape(sizes), row(from), rows(count), panel(first_panel),
        tiles((count + kTile - 1) / kTile) {}

  const int8_t* factors(int64_t tile, int64_t feature) const {
    return x.tiles + (row + tile * kTile) * shape.features + feature * kTile;
  }
  const int32_t* steps(int64_t tile, int64_t segment) const {
    return reinterpret_cast<const int32_t*>(x.steps) + ((row / kTile + tile) * shape.segments + segment) * kStepWords;
  }

  template <int R, int D>
  void multiply_long_at(int64_t tile, int c, int64_t from, int64_t to, const Run& run, bool begins) {
    const int8_t *a[R], *weights[D];
    for (int r = 0; r < R; ++r) a[r] = factors(tile + r, from);
    for (int d = 0; d < D; ++d) weights[d] = panels[c + d].weights + (from - run.start) * kTile;
    multiply_long<R, D>(a, weights, (to - from) * kTile, shape.width, begins, &products[tile][c], C);
  }

  void add_long(const Run& run) {
    constexpr int D = C < 2 ? 1 : 2;
    const int64_t first = run.start / shape.segment;
    for (int64_t s = first; s * shape.segment < run.end; ++s) {
      const int64_t from = std::max(run.start, s * shape.segment), to = std::min(run.end, (s + 1) * shape.segment);
      const bool begins = from == s * shape.segment, ends = to == (s + 1) * shape.segment;
      for (int c = 0; c < C; c += D) {
        int64_t tile = 0;
        for (; tile + 2 <= tiles; tile += 2) multiply_long_at<2, D>(tile, c, from, to, run, begins);
        if (tile < tiles) multiply_long_at<1, D>(tile, c, from, to, run, begins);
      }
      for (int64_t tile = 0; ends && tile < tiles; ++tile)
        for (int c = 0; c < C; ++c) {
          __m512 total[kTile];
          load(sums[tile], c, total);
          fold<Z>(products[tile][c], steps(tile, s), panels[c], s - first, total);
          store(total, c, sums[tile]);
        }
    }
  }

  // The tile's tokens, T at a time, then half as many …: bias and branch, or y.
  template <int T>
  void start_rows(int64_t tile, int64_t t) {
    for (const int64_t count = std::min<int64_t>(kTile, rows - tile * kTile); t + T <= count; t += T)
      start_tile<Zmm, T, C>(p, x, row + tile * kTile + t, panel * kPanel,
                            *reinterpret_cast<Tile<Zmm, T, C>*>(sums[tile].rows[t]));
    if constexpr (T > 1) start_rows<T / 2>(tile, t);
  }

  void run() {
    for (int64_t tile = 0; tile < tiles; ++tile) start_rows<4>(tile, 0);
    for (Run run(shape, 0); run.start < shape.features; run = Run(shape, run.end)) {
      for (int c = 0; c < C; ++c) unpack(p, shape, run, panel + c, x.centred, panels[c]);
      if (shape.segment >= kLong) {
        add_long(run);
      } else {
        for (int64_t tile = 0; tile < tiles; ++tile)
          for (int c = 0; c < C; ++c)
            add_short<Z, C>(shape, run, factors(tile, run.start), steps(tile, run.start / shape.segment), panels[c], c,
                            sums[tile]);
      }
    }
    for (int64_t t = 0; t < rows; ++t)
      store_tile<Zmm, 1, C>(p, x, row + t, panel * kPanel,
                            *reinterpret_cast<Tile<Zmm, 1, C>*>(sums[t / kTile].rows[t % kTile]));
  }
};

template <Zero Z, int C>
void multiply_blocks(const Problem& p, const Activations& x, const Shape& shape, int64_t row, int64_t rows,
                     int64_t panel, int64_t panels) {
  for (; panels >= C; panel += C, panels -= C)
    for (int64_t first = 0; first < rows; first += kRows)
      Block<Z, C>(p, x, shape, row + first, std::min(kRows, rows - first), panel).run();
  if constexpr (C > 1) multiply_blocks<Z, C / 2>(p, x, shape, row, rows, panel, panels);
}

void multiply_tiles(const Problem& p, const Activations& x, int64_t row, int64_t rows, int64_t panel, int64_t panels) {
  if (!suits(p, x)) return kAvx512Vnni.multiply(p, x, row, rows, panel, panels);
  const Shape shape(p, x);
  const auto blocks = x.centred     ? multiply_blocks<Zero::kCentred, kPanels>
                      : p.wide_sums ? multiply_blocks<Zero::kWide, kPanels>
                                    : multiply_blocks<Zero::kNarrow, kPanels>;
  configure(shape.width);
  blocks(p, x, shape, row, rows, panel, panels);
  _tile_release();
}

// As limits.h, by tiles.
int64_t tile_peak(int64_t steps) {
  configure(kWidest);
  static const int8_t factors[kTile * kWidest] = {};
  _tile_loadd(4, factors, kWidest);
  _tile_loadd(5, factors, kWidest);
  _tile_loadd(6, factors, 64);
  _tile_loadd(7, factors, 64);
  for (int64_t i = 0; i < steps; ++i) {
    _tile_dpbssd(0, 4, 6);
    _tile_dpbssd(1, 4, 7);
    _tile_dpbssd(2, 5, 6);
    _tile_dpbssd(3, 5, 7);
  }
  _tile_release();
  return steps * 4 * kTile * kTile * kWidest * 2;
}

// Through functions: another file's table may not be filled yet when this one is.
void quantize(const float* u, int64_t n, int bits, int64_t group, float clip, int8_t* q, float* scale, int32_t* zero) {
  kAvx512Vnni.quantize(u, n, bits, group, clip, q, scale, zero);
}
void prepare_tokens(const Problem& p, const Activations& x, int64_t row, int64_t rows) {
  kAvx512Vnni.prepare(p, x, row, rows);
}
void append_tokens(const Attention& a, int64_t batch, int64_t kv_head, int64_t token, int64_t end) {
  kAvx512Vnni.append(a, batch, kv_head, token, end);
}
void attend_tokens(const Attention& a, const QueryTile& tile, const Partial& out) { kAvx512Vnni.attend(a, tile, out); }

}  // namespace

const Kernels kAmx{"amx",          cpu_has_amx, quantize,      prepare_tokens, arrange_tokens,
                   multiply_tiles, 32 << 20,    kMostTileRows, append_tokens,  attend_tokens, tile_peak};

}  // namespace specquant
