// AMX int8: 16 tokens × 16 outputs × 64 features an instruction. One vector of packed nibbles is two rows of a weight
// tile, so a panel is unpacked once, a run of features at a time, and used for all tokens of a task.
//
// What is not a tile of products (activations, branch, attention, few tokens) is AVX512-VNNI's.
#include "cpu_features.h"
#include "zmm.h"

namespace specquant {
namespace {

constexpr int kTile = 16;              // tokens, and outputs, of a tile of sums
constexpr int64_t kDepth = 64;         // features of a tile of factors
constexpr int64_t kRun = 2048;         // features unpacked at a time, padding included: two panels are 64 KB
// Shorter segments are left to VNNI: with groups of 64, folding sums takes longer than products (3.99 against 3.27 ms
// for 512 tokens, 576 × 3072).
constexpr int64_t kLeastSegment = 256;
constexpr int64_t kRows = 256;         // tokens at a time: bounds the stack
constexpr int64_t kLeastRows = 8;
constexpr int64_t kRunSegments = kRun / kDepth;

using Lanes = float[kTile];
struct Sums {  // of one tile
  alignas(64) Lanes rows[kTile];
};
struct Products {
  alignas(64) int32_t rows[kTile][kTile];
};

bool suits(const Problem& p, const Activations& x) {
  return x.rows >= kLeastRows && p.qweight && p.act_bits < 16 && segment_length(p) >= kLeastSegment;
}

// Consecutive segments, or a part of one that is longer than kRun.
struct Run {
  int64_t segment, count;  // the first, and how many
  int64_t offset, depth;   // the part of each, in features
  int64_t start;           // its first feature
  bool begins, ends;       // its segments
};

// A run's weights for one panel.
struct Unpacked {
  alignas(64) int8_t weights[kRun * kTile];  // segments padded to kDepth with zeros
  alignas(64) Lanes scales[kRunSegments];
  alignas(64) int32_t row_sums[kRunSegments][kTile];
};

int64_t padded(const Run& run) { return round_up(run.depth, kDepth); }

// Tile registers: sums in 0 to 3, tokens in 4 and 5, weights in 6 and 7.
void configure(int64_t tokens) {
  struct {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t bytes[16] = {};
    uint8_t rows[16] = {};
  } layout;
  for (int i = 0; i < 8; ++i) layout.bytes[i] = 64, layout.rows[i] = uint8_t(i < 6 ? tokens : kTile);
  __asm__ volatile("" : : "r"(&layout) : "memory");  // the intrinsic names 8 of these bytes; GCC would drop the others
  _tile_loadconfig(&layout);
}

void unpack(const Problem& p, const Activations& x, const Run& run, int64_t panel, Unpacked& to) {
  const int64_t panel_blocks = (p.in_features + kBlock - 1) / kBlock, segment_blocks = panel_blocks / x.segments;
  const int64_t groups = p.group_size ? p.in_features / p.group_size : 1, segments_in_group = x.segments / groups;
  const __m512i mask = _mm512_set1_epi8(15), offset = _mm512_set1_epi8(8);
  __m512i* weights = reinterpret_cast<__m512i*>(to.weights);
  for (int64_t i = 0; i < run.count; ++i) {
    const int64_t s = run.segment + i, blocks = round_up(run.depth, kBlock) / kBlock, column = panel * kPanel;
    const uint8_t* from = p.qweight + (panel * panel_blocks + s * segment_blocks + run.offset / kBlock) * 64;
    for (int64_t k = 0; k < blocks; ++k, weights += 2) {
      const __m512i packed = _mm512_loadu_si512(from + k * 64);
      weights[0] = _mm512_sub_epi8(_mm512_and_si512(packed, mask), offset);
      weights[1] = _mm512_sub_epi8(_mm512_and_si512(_mm512_srli_epi16(packed, 4), mask), offset);
    }
    for (int64_t k = blocks * kBlock; k < padded(run); k += 4) *weights++ = _mm512_setzero_si512();
    uint16_t spare[kTile];
    const int64_t g = s / segments_in_group;
    const int64_t first = g * p.out_features + column;
    _mm512_store_ps(to.scales[i], Zmm::half(whole<kTile>(p.scales, first, groups * p.out_features, spare)));
    if (x.centred) continue;
    const int64_t at = s * p.out_features + column, all = x.segments * p.out_features;
    if (p.wide_sums) {
      int32_t wide[kTile];
      const auto* sums = static_cast<const int32_t*>(p.row_sums);
      _mm512_store_si512(to.row_sums[i], Zmm::load_sums(whole<kTile>(sums, at, all, wide)));
    } else {
      int16_t narrow[kTile];
      const auto* sums = static_cast<const int16_t*>(p.row_sums);
      _mm512_store_si512(to.row_sums[i], Zmm::load_sums(whole<kTile>(sums, at, all, narrow)).lanes);
    }
  }
}

// The integer Σ (q − z) · q_w of one token: products, and what its zero-point brings where it is not in them.
enum class Zero { kCentred, kNarrow, kWide };
template <Zero Z>
inline __attribute__((always_inline)) __m512i whole_sum(const int32_t* products, const int32_t* row_sums,
                                                         int32_t zero) {
  const __m512i sum = _mm512_load_si512(products);
  if constexpr (Z == Zero::kCentred) return sum;
  const __m512i sums = _mm512_load_si512(row_sums);
  if constexpr (Z == Zero::kNarrow) return _mm512_dpwssd_epi32(sum, sums, _mm512_set1_epi32(zero));
  return _mm512_add_epi32(sum, Zmm::start(0, sums, zero));
}

// R × C tiles of products += tokens · weights, over features of one segment.
template <int R, int C>
inline __attribute__((always_inline)) void multiply_segment(const int8_t* const (&a)[R], int64_t stride,
                                                            const int8_t* const (&weights)[C], int64_t depth,
                                                            bool begins, Products* products) {
  if (begins) {
    _tile_zero(0);
    if constexpr (C > 1) _tile_zero(1);
    if constexpr (R > 1) _tile_zero(2);
    if constexpr (R > 1 && C > 1) _tile_zero(3);
  } else {
    _tile_loadd(0, products[0].rows, 64);
    if constexpr (C > 1) _tile_loadd(1, products[1].rows, 64);
    if constexpr (R > 1) _tile_loadd(2, products[C].rows, 64);
    if constexpr (R > 1 && C > 1) _tile_loadd(3, products[C + 1].rows, 64);
  }
  for (int64_t k = 0; k < depth; k += kDepth) {
    _tile_loadd(6, weights[0] + k * kTile, 64);
    _tile_loadd(4, a[0] + k, stride);
    _tile_dpbssd(0, 4, 6);
    if constexpr (C > 1) {
      _tile_loadd(7, weights[1] + k * kTile, 64);
      _tile_dpbssd(1, 4, 7);
    }
    if constexpr (R > 1) {
      _tile_loadd(5, a[1] + k, stride);
      _tile_dpbssd(2, 5, 6);
    }
    if constexpr (R > 1 && C > 1) _tile_dpbssd(3, 5, 7);
  }
  _tile_stored(0, products[0].rows, 64);
  if constexpr (C > 1) _tile_stored(1, products[1].rows, 64);
  if constexpr (R > 1) _tile_stored(2, products[C].rows, 64);
  if constexpr (R > 1 && C > 1) _tile_stored(3, products[C + 1].rows, 64);
}

// sums += s · scales · products for the tokens of a tile.
template <Zero Z>
void fold(const Products& products, const Step* steps, const Lanes& scales, const int32_t* row_sums, int64_t rows,
          Sums& sums) {
  const __m512 scale = _mm512_load_ps(scales);
  for (int64_t t = 0; t < rows; ++t) {
    const __m512 sum = Zmm::to_float(whole_sum<Z>(products.rows[t], row_sums, steps[t].zero));
    _mm512_store_ps(sums.rows[t],
                    Zmm::fma(Zmm::splat(steps[t].scale) * scale, sum, _mm512_load_ps(sums.rows[t])));
  }
}

// R × C tiles: panels `panels`, tokens kTile apart from `row` on unless `rows` says where.
template <Zero Z, int R, int C>
void add_run(const Activations& x, const Run& run, const Unpacked* panels, const int64_t (&rows)[R], int64_t tokens,
             Products* products, Sums* sums) {
  const int64_t length = run.begins && run.ends ? run.depth : 0, depth = padded(run);
  for (int64_t i = 0; i < run.count; ++i) {
    const int8_t *a[R], *weights[C];
    for (int r = 0; r < R; ++r) a[r] = x.a + rows[r] * x.features + run.start + i * length;
    for (int c = 0; c < C; ++c) weights[c] = panels[c].weights + i * depth * kTile;
    multiply_segment<R, C>(a, x.features, weights, depth, run.begins, products);
    if (!run.ends) return;
    for (int r = 0; r < R; ++r)
      for (int c = 0; c < C; ++c)
        fold<Z>(products[r * C + c], x.steps + (run.segment + i) * x.rows + rows[r], panels[c].scales[i],
                panels[c].row_sums[i], tokens, sums[r * C + c]);
  }
}

// The next features: as many whole segments as fit, or what fits of one.
Run next_run(const Activations& x, int64_t length, const Run& last) {
  const int64_t segment = last.segment + (last.ends ? last.count : 0), offset = last.ends ? 0 : last.offset + last.depth;
  const int64_t whole_segments = kRun / round_up(length, kDepth);
  const int64_t start = segment * length + offset;
  if (whole_segments) return {segment, std::min(whole_segments, x.segments - segment), 0, length, start, true, true};
  const int64_t depth = std::min(kRun, length - offset);
  return {segment, 1, offset, depth, start, offset == 0, offset + depth == length};
}

// R tokens' bias and branch, then of half as many …
template <int T>
void start_rows(const Problem& p, const Activations& x, int64_t row, int64_t rows, int64_t column, Lanes* sums) {
  for (; rows >= T; row += T, rows -= T, sums += T)
    start_tile<Zmm, T, 1>(p, x, row, column, *reinterpret_cast<Tile<Zmm, T, 1>*>(sums));
  if constexpr (T > 1) start_rows<T / 2>(p, x, row, rows, column, sums);
}

// y of up to kRows tokens and C panels.
template <Zero Z, int C>
void multiply_panels_of(const Problem& p, const Activations& x, int64_t row, int64_t rows, int64_t panel) {
  Unpacked panels[C];
  Sums sums[kRows / kTile * C];
  Products products[kRows / kTile * C];
  const int64_t length = round_up(segment_length(p), kBlock), tiles = (rows + kTile - 1) / kTile;
  const int64_t tokens = std::min<int64_t>(rows, kTile);  // of a tile: the last one overlaps the one before it
  const auto row_of = [&](int64_t tile) { return row + std::min(tile * kTile, rows - tokens); };
  for (int64_t i = 0; i < tiles; ++i)
    for (int c = 0; c < C; ++c)
      start_rows<8>(p, x, row_of(i), tokens, (panel + c) * kPanel, sums[i * C + c].rows);
  for (Run run = next_run(x, length, {}); run.segment < x.segments; run = next_run(x, length, run)) {
    for (int c = 0; c < C; ++c) unpack(p, x, run, panel + c, panels[c]);
    int64_t i = 0;
    for (; i + 2 <= tiles; i += 2)
      add_run<Z, 2, C>(x, run, panels, {row_of(i), row_of(i + 1)}, tokens, products + i * C, sums + i * C);
    for (; i < tiles; ++i) add_run<Z, 1, C>(x, run, panels, {row_of(i)}, tokens, products + i * C, sums + i * C);
  }
  for (int64_t i = 0; i < tiles; ++i)
    for (int c = 0; c < C; ++c)
      for (int64_t t = 0; t < tokens; ++t)
        store_tile<Zmm, 1, 1>(p, x, row_of(i) + t, (panel + c) * kPanel,
                              *reinterpret_cast<Tile<Zmm, 1, 1>*>(sums[i * C + c].rows[t]));
}

template <Zero Z>
void multiply_as(const Problem& p, const Activations& x, int64_t row, int64_t rows, int64_t panel, int64_t panels) {
  for (int64_t first = 0; first < rows; first += kRows) {
    const int64_t some = std::min(kRows, rows - first);
    configure(std::min<int64_t>(some, kTile));
    int64_t i = 0;
    for (; i + 2 <= panels; i += 2) multiply_panels_of<Z, 2>(p, x, row + first, some, panel + i);
    for (; i < panels; ++i) multiply_panels_of<Z, 1>(p, x, row + first, some, panel + i);
  }
  _tile_release();
}

void multiply_tiles(const Problem& p, const Activations& x, int64_t row, int64_t rows, int64_t panel, int64_t panels) {
  if (!suits(p, x)) return kAvx512Vnni.multiply(p, x, row, rows, panel, panels);
  const auto multiply = x.centred      ? multiply_as<Zero::kCentred>
                        : p.wide_sums ? multiply_as<Zero::kWide>
                                      : multiply_as<Zero::kNarrow>;
  multiply(p, x, row, rows, panel, panels);
}

// As limits.h, by tiles.
int64_t tile_peak(int64_t steps) {
  configure(kTile);
  static const int8_t factors[kTile * kDepth] = {};
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  _tile_loadd(4, factors, kDepth);
  _tile_loadd(5, factors, kDepth);
  _tile_loadd(6, factors, kDepth);
  _tile_loadd(7, factors, kDepth);
  for (int64_t i = 0; i < steps; ++i) {
    _tile_dpbssd(0, 4, 6);
    _tile_dpbssd(1, 4, 7);
    _tile_dpbssd(2, 5, 6);
    _tile_dpbssd(3, 5, 7);
  }
  _tile_release();
  return steps * 4 * kTile * kTile * kDepth * 2;
}

// Tokens stay rows: a tile reads 64 features of 16 of them. Weights are unpacked with their sign, so that `start` falls
// away.
void arrange_rows(const Problem& p, const Activations& x, int64_t row, int64_t rows) {
  if (!suits(p, x)) return interleave(p, x, row, rows);
  const int64_t length = round_up(segment_length(p), kBlock);
  for (int64_t t = row; t < row + rows; ++t) {
    int8_t* a = x.a + t * x.features;
    for (int64_t s = 0; s < x.segments; ++s, a += length) {
      const int64_t at = t * x.segments + s;
      x.steps[s * x.rows + t] = {x.scale[at], x.centred ? 0 : x.zero[at], 0};
      for (int64_t i = 0; x.centred && i < length; ++i) a[i] = int8_t(a[i] + x.zero[at]);
    }
  }
}

// Through functions: another file's table is not there yet when this one is filled.
void quantize(const float* u, int64_t n, int bits, int64_t group, float clip, int8_t* q, float* scale, int32_t* zero) {
  kAvx512Vnni.quantize(u, n, bits, group, clip, q, scale, zero);
}
void prepare_rows_of(const Problem& p, const Activations& x, int64_t row, int64_t rows) {
  kAvx512Vnni.prepare(p, x, row, rows);
}
void append_rows(const Attention& a, int64_t batch, int64_t kv_head, int64_t token, int64_t end) {
  kAvx512Vnni.append(a, batch, kv_head, token, end);
}
void attend_some(const Attention& a, const QueryTile& tile, const Partial& out) { kAvx512Vnni.attend(a, tile, out); }

}  // namespace

const Kernels kAmx{"amx",          cpu_has_amx,   quantize,    prepare_rows_of, arrange_rows,
                   multiply_tiles, 32 << 20,      kMostTileRows, append_rows,   attend_some, tile_peak};

}  // namespace specquant
