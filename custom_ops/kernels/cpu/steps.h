// What one instruction set provides, and the scratch its steps share. Internal to kernels/cpu.
#pragma once

#include "attention.h"

namespace specquant {

constexpr int64_t kPanel = 16;  // outputs in a panel of packed weights
constexpr int64_t kBlock = 8;   // features in a block of it
constexpr int64_t kGroupBytes = 8;  // of a panel's scales of one group
constexpr int64_t kTileTokens = kFewTokens;  // tokens whose activations are interleaved
constexpr int64_t kWidestTile = 16;  // tokens: tasks begin at multiples, `tiles` and `steps` have room for whole ones
constexpr int64_t kTaskProducts = 8 << 20;  // Kernels::task_products where the byte dot product is a vector's

// Static: see half.h.
static inline int64_t round_up(int64_t value, int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

// G, of a problem with weights.
static inline int64_t groups_of(const Problem& p) { return p.group_size ? p.in_features / p.group_size : 1; }

// What one segment of a token's activations brings to the product besides the sum of products.
struct Step {
  float scale;
  int32_t start;
};

// The prepared activations of a run of tokens. Rows are indexed from `first_token` of the problem.
struct Activations {
  int64_t first_token;
  int64_t features;  // row stride of u and a: N, and padding that keeps rows out of each other's cache sets
  int64_t columns;   // row stride of low
  int64_t panel_bytes;  // from one panel of weights to the next
  int64_t group_bytes;  // from one panel of group_scales to the next
  int64_t segments;  // row stride of the three below
  float* turned;     // B turned, [columns, features]: many tokens take it in that order; or null
  float* u;          // what is multiplied by the INT4 weights; zeros from N on
  float* low;        // x · B[:, :rank]; zeros from rank on
  int8_t* a;         // quantised u: levels less their zero-point
  float* scale;      // per segment; NaN where the group holds a NaN or an infinity
  int32_t* start;    // −8 Σ a per segment: what the weights' offset of 8 has to be paid back
  // The same once more, as tiles read it: what several tokens need at once lies together.
  int64_t rows;      // that are there
  // Filled by Kernels::arrange, here as `interleave` does.
  int8_t* tiles;     // [rows / kTileTokens, blocks of features, tokens, kBlock]
  Step* steps;       // [segments, rows]
  // Where `within` leaves outputs at half of the features, else null: the largest of each panel, those to go on with, and
  // sums of products [P, kPanel], which the second half adds to (begun).
  float* largest;
  int64_t* wanted;
  float* kept;
  bool begun;
};

// Rows [row, row + rows) of one kv head against cached tokens [first, end). A row is a query: of a token's num_heads /
// kv_num_heads heads that share the kv head, token by token.
struct QueryTile {
  int64_t batch, kv_head, row, rows, first, end;
};

// A softmax over part of the tokens: for every row of a tile the largest score, Σ e^(score − largest), and
// Σ e^(score − largest) v̂.
struct Partial {
  float* largest;
  float* sum;
  float* y;  // [rows, head_dim]
};

constexpr int64_t kMostTileRows = 12;    // of a 4-bit cache
constexpr int64_t kMostHalfRows = 120;    // of one of 16 bits
constexpr int64_t kHalfRowsMultiple = 24;  // rows of a tile there, but of the last: any microkernel's rows divide it
constexpr int64_t kMostTileFloats = 1 << 14;  // rows · head_dim of a tile

struct Kernels {
  const char* name;
  bool (*supported)();
  // q int8 [N], levels less their zero-point, scale [N / group, or 1] and start [N / segment] of one row, whose levels
  // span `clip` of every group's range. u is readable, and q writable, up to a multiple of 8, where u holds zeros.
  void (*quantize)(const float* u, int64_t n, int bits, int64_t group, int64_t segment, float clip, int8_t* q,
                   float* scale, int32_t* start);
  // `turned`, features [from, to).
  void (*turn)(const Problem& problem, const Activations& activations, int64_t from, int64_t to);
  // Rows [row, row + rows) of the activations, from x.
  void (*prepare)(const Problem& problem, const Activations& activations, int64_t row, int64_t rows);
  // Those rows, at most kTileTokens and all of them prepared, as `multiply` reads them: `interleave`, or its own way.
  void (*arrange)(const Problem& problem, const Activations& activations, int64_t row, int64_t rows);
  // y of those rows and of panels [panel, panel + panels).
  void (*multiply)(const Problem& problem, const Activations& activations, int64_t row, int64_t rows, int64_t panel,
                   int64_t panels);
  int64_t task_products;  // multiplications that a call of `multiply` should have, unless its smallest tile has more
  int64_t tile_rows;  // of `attend`, at most kMostTileRows
  // The cache of a kv head: the past if it lies elsewhere (with the first token), and new tokens [token, end).
  void (*append)(const Attention& attention, int64_t batch, int64_t kv_head, int64_t token, int64_t end);
  void (*attend)(const Attention& attention, const QueryTile& tile, const Partial& out);       // kv_bits 4
  void (*attend_half)(const Attention& attention, const QueryTile& tile, const Partial& out);  // kv_bits 16
  int64_t (*peak)(int64_t steps);  // limits.h
};

// Up to kTileTokens quantised rows from `row` on into `tiles` and `steps`.
void interleave(const Problem& problem, const Activations& activations, int64_t row, int64_t rows);

// Each in its own file, where the compiler has it.
extern const Kernels kScalar, kAvx2, kAvxVnni, kAvx512Vnni, kAmx, kNeon, kDotProd, kI8mm;

}  // namespace specquant
