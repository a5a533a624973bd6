// Attention of prompts on Hopper: how queries, keys and values lie in the workspace. Host and device.
#pragma once

#include "attention_args.h"

namespace specquant_cuda {

constexpr int kPromptRows = 128;    // tokens of one head that a block takes
constexpr int kPromptTokens = 128;  // cached tokens of a tile
constexpr int kPromptPiece = 64;    // features in a row of 128 bytes
constexpr int64_t kPromptSpace = int64_t(32) << 20;   // bytes of unpacked keys and values at a time, if one head takes less
constexpr int64_t kPromptMost = int64_t(128) << 20;   // of one head

// Where 8 features of a row lie in tiles of `rows` rows by 64 features, the next 64 features of these rows after them: in
// units of 16 bytes, which are swizzled as wgmma reads them. Queries: [B · H, padded S, d] in tiles of 64 rows; of a kv
// head keys, then values: [padded tokens, d] in tiles of kPromptTokens.
__host__ __device__ constexpr int64_t piece_place(int64_t row, int piece, int rows, int d) {
  const int pieces = kPromptPiece / 8;
  return (row / rows * (d / kPromptPiece) + piece / pieces) * rows * pieces + row % rows * pieces +
         (piece % pieces ^ static_cast<int>(row % 8));
}

inline int64_t padded_rows(int64_t sequence) { return round_up(sequence, kPromptRows); }
__host__ __device__ constexpr int64_t unpacked_bytes(int64_t present_rows, int64_t d) {
  return round_up(present_rows, kPromptTokens) * d * 4;
}

}  // namespace specquant_cuda
