// AMX int8: 16 tokens × 16 outputs × 64 features an instruction. One vector of packed nibbles is two rows of a tile of
// weights, so panels are unpacked once, a run of features at a time, and used for all tokens of a task.
//
// What is not a product of many tokens is AVX512-VNNI's.
#include "amx_tiles.h"
#include "cpu_features.h"

namespace specquant {
namespace {

bool suits(const Problem& p, const Activations& x) {
  const int64_t segment = round_up(segment_length(p), kBlock);
  return x.rows >= (segment < kLong ? kLeastRows : kTile) && p.qweight && p.act_bits < 16 &&
         width_of(segment) >= kLeastWidth;
}

// Tokens of a tile lie side by side, `width` features of each, so that a tile of factors is one piece of memory.
void arrange_tokens(const Problem& p, const Activations& x, int64_t row, int64_t rows) {
  if (!suits(p, x)) return interleave(p, x, row, rows);
  const Shape shape(p, x);
  const int64_t past = x.rows % kTile, last = x.rows / kTile * shape.segments * kTile;
  if (past && row + rows == x.rows)  // what happens to lie there for the tokens that are missing may be slow: denormals
    for (int64_t s = 0; s < shape.segments; ++s)
      std::memset(reinterpret_cast<float*>(x.steps) + last + s * kTile + past, 0,
                  size_t(kTile - past) * sizeof(float));
  for (int64_t t = row; t < row + rows; ++t) {
    const int8_t* a = x.a + t * x.features;
    int8_t* to = x.tiles + t / kTile * kTile * shape.features + t % kTile * shape.width;
    auto* step = reinterpret_cast<float*>(x.steps) + t / kTile * shape.segments * kTile + t % kTile;
    for (int64_t s = 0; s < shape.segments; ++s, step += kTile) {
      *step = x.scale[t * shape.segments + s];
      for (int64_t k = 0; k < shape.segment; k += shape.width, a += shape.width, to += kTile * shape.width)
        std::memcpy(to, a, size_t(shape.width));
    }
  }
}

// C panels of up to kRows tokens.
template <int C>
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
  const float* steps(int64_t tile, int64_t segment) const {
    return reinterpret_cast<const float*>(x.steps) + ((row / kTile + tile) * shape.segments + segment) * kTile;
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
          fold(products[tile][c], steps(tile, s), panels[c], s - first, total);
          store(total, c, sums[tile]);
        }
    }
  }

  // The tile's tokens, T at a time, then half as many …: y from their sums.
  template <int T>
  void finish_rows(int64_t tile, int64_t t) {
    for (const int64_t count = std::min<int64_t>(kTile, rows - tile * kTile); t + T <= count; t += T) {
      const int64_t token = row + tile * kTile + t, column = panel * kPanel;
      __m512 acc[T][C];
      bias_and_branch<Zmm, T, C>(p, x, token, column, acc);
      finish_tile<Zmm, T, C>(p, x, token, column, acc,
                             [&](int i, int c) { return Zmm::load(sums[tile].rows[t + i] + c * kTile); });
    }
    if constexpr (T > 1) finish_rows<T / 2>(tile, t);
  }

  void run() {
    std::memset(sums, 0, size_t(tiles) * sizeof sums[0]);
    for (Run run(shape, 0); run.start < shape.features; run = Run(shape, run.end)) {
      for (int c = 0; c < C; ++c) unpack(p, shape, run, panel + c, panels[c]);
      if (shape.segment >= kLong) {
        add_long(run);
      } else {
        for (int64_t tile = 0; tile < tiles; ++tile)
          for (int c = 0; c < C; ++c)
            add_short<C>(shape, run, factors(tile, run.start), steps(tile, run.start / shape.segment), panels[c], c,
                         sums[tile]);
      }
    }
    for (int64_t tile = 0; tile < tiles; ++tile) finish_rows<4>(tile, 0);
  }
};

template <int C>
void multiply_blocks(const Problem& p, const Activations& x, const Shape& shape, int64_t row, int64_t rows,
                     int64_t panel, int64_t panels) {
  for (; panels >= C; panel += C, panels -= C)
    for (int64_t first = 0; first < rows; first += kRows)
      Block<C>(p, x, shape, row + first, std::min(kRows, rows - first), panel).run();
  if constexpr (C > 1) multiply_blocks<C / 2>(p, x, shape, row, rows, panel, panels);
}

void multiply_tiles(const Problem& p, const Activations& x, int64_t row, int64_t rows, int64_t panel, int64_t panels) {
  if (!suits(p, x)) return kAvx512Vnni.multiply(p, x, row, rows, panel, panels);
  const Shape shape(p, x);
  configure(shape.width);
  multiply_blocks<kPanels>(p, x, shape, row, rows, panel, panels);
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
void quantize(const float* u, int64_t n, int bits, int64_t group, int64_t segment, float clip, int8_t* q, float* scale,
              int32_t* start) {
  kAvx512Vnni.quantize(u, n, bits, group, segment, clip, q, scale, start);
}
void turn_basis(const Problem& p, const Activations& x, int64_t from, int64_t to) { kAvx512Vnni.turn(p, x, from, to); }
void prepare_tokens(const Problem& p, const Activations& x, int64_t row, int64_t rows) {
  kAvx512Vnni.prepare(p, x, row, rows);
}
void append_tokens(const Attention& a, int64_t batch, int64_t kv_head, int64_t token, int64_t end) {
  kAvx512Vnni.append(a, batch, kv_head, token, end);
}
void attend_tokens(const Attention& a, const QueryTile& tile, const Partial& out) { kAvx512Vnni.attend(a, tile, out); }
void attend_half_tokens(const Attention& a, const QueryTile& tile, const Partial& out) {
  kAvx512Vnni.attend_half(a, tile, out);
}

}  // namespace

const Kernels kAmx{"amx",          cpu_has_amx, quantize,      turn_basis, prepare_tokens, arrange_tokens,
                   multiply_tiles, 32 << 20,    kMostTileRows, append_tokens,  attend_tokens, attend_half_tokens,
                   tile_peak};

}  // namespace specquant
