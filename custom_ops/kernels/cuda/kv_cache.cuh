// A row of the KV cache, packed (docs/ops.md, "Packed cache") or float16: how it is written, and how the tensor cores
// meet it. A row is words of 32 bits; features may come in any order that queries and outputs share.
#pragma once

#include "attention_args.h"
#include "levels.cuh"
#include "unpack.cuh"

namespace specquant_cuda {

constexpr int kUnit = 32;  // features of a key that a warp multiplies at a time: two steps of an `mma`

// Level n enters the products as n − 8; scale and middle (low + 8 · scale) come afterwards.
struct Int4Cache {
  static constexpr int kTiles = 8;  // features in a word, in the order of `column`
  static constexpr bool kScaled = true;
  static constexpr int kPad = 8;  // words that are taken together: by values, and by a unit of keys

  __host__ __device__ static int words(int d) { return d / 8; }          // without those of the parameters
  __host__ __device__ static int row_words(int d) { return d / 8 + 1; }

  // The first of the four consecutive features that thread t of four takes in a step of a unit, −1 for none.
  __device__ static int feature(int d, int unit, int step, int t) {
    const int word = 4 * unit + t;
    return word < d / 8 ? step * (d / 2) + 4 * word : -1;
  }

  // Those features of a row, as operand B of both steps.
  __device__ static void keys(const uint32_t* row, int unit, int t, uint32_t (&b)[2][2]) {
    uint32_t pairs[4];
    unpack_half(row[4 * unit + t], pairs);
    b[0][0] = pairs[0], b[0][1] = pairs[1], b[1][0] = pairs[2], b[1][1] = pairs[3];
  }

  // Of tokens 0, 1, 8 and 9 from `row` on, the features of one word, as operands B of kTiles products.
  __device__ static void values(const uint32_t* row, int stride, int word, uint32_t (&b)[kTiles][2]) {
#pragma unroll
    for (int j = 0; j < 2; ++j)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        value_pair(row[8 * j * stride + word], row[(8 * j + 1) * stride + word], i, b[i][j], b[4 + i][j]);
  }

  // Features i and 4 + i of a word, of two tokens each.
  __device__ static void value_pair(uint32_t even, uint32_t odd, int i, uint32_t& low, uint32_t& high) {
    const uint32_t bytes = __byte_perm(even, odd, 0x4400 + 0x1111 * i);
    low = low_nibbles(bytes), high = high_nibbles(bytes);
  }

  // The feature of product `tile` of a word, −1 for none.
  __device__ static int column(int d, int word, int tile) {
    return word < d / 8 ? tile / 4 * (d / 2) + 4 * word + tile % 4 : -1;
  }

  // scale and middle of a row, from its last word.
  __device__ static float2 parameters(uint32_t word) {
    const float2 pair = __half22float2(half2_of(word));
    return make_float2(pair.x, fmaf(pair.x, 8.0f, pair.y));
  }
};

struct HalfCache {
  static constexpr int kTiles = 2;
  static constexpr bool kScaled = false;
  static constexpr int kPad = 16;

  __host__ __device__ static int words(int d) { return d / 2; }
  __host__ __device__ static int row_words(int d) { return d / 2; }

  __device__ static int feature(int d, int unit, int step, int t) {
    const int first = kUnit * unit + 16 * step + 4 * t;
    return first < d ? first : -1;
  }

  __device__ static void keys(const uint32_t* row, int unit, int t, uint32_t (&b)[2][2]) {
#pragma unroll
    for (int step = 0; step < 2; ++step) {
      const uint2 pair = *reinterpret_cast<const uint2*>(row + 16 * unit + 8 * step + 2 * t);
      b[step][0] = pair.x, b[step][1] = pair.y;
    }
  }

  __device__ static void values(const uint32_t* row, int stride, int word, uint32_t (&b)[kTiles][2]) {
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const uint32_t even = row[8 * j * stride + word], odd = row[(8 * j + 1) * stride + word];
      b[0][j] = __byte_perm(even, odd, 0x5410);
      b[1][j] = __byte_perm(even, odd, 0x7632);
    }
  }

  __device__ static int column(int d, int word, int tile) { return word < d / 2 ? 2 * word + tile : -1; }
  __device__ static float2 parameters(uint32_t) { return make_float2(1.0f, 0.0f); }
};

}  // namespace specquant_cuda
