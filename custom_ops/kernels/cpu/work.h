// One run of prepared tokens, as the tasks of matmul.cc and few_tokens.cc see it.
#pragma once

#include "steps.h"

namespace specquant {

struct Work {
  const Kernels& kernels;
  const Problem& problem;
  const Activations& activations;
  int64_t rows;
  int64_t tile_rows, tile_panels, tiles_down;  // the grid of the multiplication of many tokens
};

static inline int64_t panels_of(const Problem& p) { return (p.out_features + kPanel - 1) / kPanel; }

// Rows of tile number `index`.
static inline void prepare_tile(const Work& work, int64_t index) {
  const int64_t row = index * kTileTokens, rows = work.rows - row < kTileTokens ? work.rows - row : kTileTokens;
  work.kernels.prepare(work.problem, work.activations, row, rows);
  if (work.problem.qweight && work.problem.act_bits < 16)
    work.kernels.arrange(work.problem, work.activations, row, rows);
}

// y of at most kTileTokens tokens, by the threads of the pool.
void multiply_few(const Work& work, const ThreadPool& pool);

}  // namespace specquant
