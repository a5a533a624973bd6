// A warp's part of attention of one new token over a packed cache: loads, products, what it found.
//
// A warp takes chunks of 16 cached tokens, with the heads of the group as the 8 columns of an `mma`: scores are keys · q,
// y is valuesᵀ · weights, and what a thread loads of the cache goes from registers to the tensor cores. With g = lane / 4
// and t = lane % 4 a thread has the scores of tokens g and g + 8 for heads 2t and 2t + 1. Numbers are those of attend.cuh.
#pragma once

#include "attend.cuh"

namespace specquant_cuda {

constexpr int kDecodeWarps = 8;
constexpr int kDecodeThreads = 32 * kDecodeWarps;
constexpr int kChunkTokens = 16;
constexpr int kGap = 16;  // floats between rows of queries, so that two rows meet in no bank

// Shared memory of a block, in floats.
struct Room {
  uint64_t* box;
  float *queries, *factors, *sums, *rows, *levels, *y, *found, *shares, *stats;
  // Features of y that a block adds up: whole fours.
  __host__ __device__ static int slice(int group, int d, int blocks) {
    return ((group * d + blocks - 1) / blocks + 3) / 4 * 4;
  }
  __device__ __forceinline__ Room(float* shared, int group, int d, int blocks)
      : box(reinterpret_cast<uint64_t*>(shared)), queries(shared + 4),
        factors(queries + kDecodeGroup * (d + kGap)), sums(factors + kDecodeGroup), rows(sums + kDecodeGroup), levels(rows + kDecodeWarps * d), y(levels + kDecodeWarps * d / 4),
        found(y + kDecodeWarps * group * d), shares(found + 3 * kDecodeWarps * kDecodeGroup),
        stats(shares + blocks * slice(group, d, blocks)) {}
  static size_t bytes(int group, int d, int blocks) {
    return 4 * (4 + kDecodeGroup * (d + kGap) + 2 * kDecodeGroup + kDecodeWarps * d + kDecodeWarps * d / 4 +
                kDecodeWarps * group * d + 3 * kDecodeWarps * kDecodeGroup + blocks * slice(group, d, blocks) +
                2 * blocks * kDecodeGroup);
  }
};

// What a thread has of a chunk.
template <int most>
struct Words {
  static constexpr int kUnits = most / kUnit, kColumns = most / 64;
  uint32_t keys[2][kUnits];         // tokens g and g + 8, word 4 · unit + t
  uint32_t values[kColumns][2][2];  // [column][j][odd]: token 8j + 2t + odd, word 8 · column + g
  uint32_t key_parameters[2], value_parameters[2];  // of tokens g and g + 8

  __device__ __forceinline__ static const uint32_t* row(const uint32_t* all, int d, int token, int after) {
    return all + static_cast<int64_t>(min(token, after - 1)) * Int4Cache::row_words(d);
  }

  __device__ __forceinline__ void load_keys(const uint32_t* all, int d, int start, int after) {
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4, words = Int4Cache::words(d);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const uint32_t* from = row(all, d, start + g + 8 * h, after);
#pragma unroll
      for (int unit = 0; unit < kUnits; ++unit) keys[h][unit] = 4 * unit + t < words ? from[4 * unit + t] : 0;
      key_parameters[h] = from[words];
    }
  }

  __device__ __forceinline__ void load_values(const uint32_t* all, int d, int start, int after) {
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4, words = Int4Cache::words(d);
#pragma unroll
    for (int h = 0; h < 2; ++h) value_parameters[h] = row(all, d, start + g + 8 * h, after)[words];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t* from = row(all, d, start + i / 2 * 8 + 2 * t + i % 2, after);
#pragma unroll
      for (int column = 0; column < kColumns; ++column)
        values[column][i / 2][i % 2] = 8 * column + g < words ? from[8 * column + g] : 0;
    }
  }
};

// What a warp knows of heads 2t and 2t + 1.
template <int most>
struct Found {
  float largest[2] = {-INFINITY, -INFINITY}, sum[2] = {}, middle[2] = {};  // sum and middle: of the thread's own tokens
  float peak = 0.0f, factor = 1.0f;
  float y[most / 64][4][4] = {};  // [column][i][2h + e]: feature i + 4h of word 8 · column + g, head 2t + e
};

template <class F>
__device__ __forceinline__ float over_tokens(float value, F combine) {
#pragma unroll
  for (int d = 4; d < 32; d *= 2) value = combine(value, __shfl_xor_sync(~0u, value, d));
  return value;
}

// Queries over their factors, as operand B: [unit][step][part][j].
template <int most, int parts>
struct Queries {
  uint32_t b[most / kUnit][2][parts][2];

  __device__ __forceinline__ void load(const Room& room, int group, int d) {
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
#pragma unroll
    for (int unit = 0; unit < most / kUnit; ++unit)
#pragma unroll
      for (int step = 0; step < 2; ++step) {
        const int first = Int4Cache::feature(d, unit, step, t);
        float4 q = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        if (first >= 0 && g < group) q = *reinterpret_cast<const float4*>(room.queries + g * (d + kGap) + first);
        uint32_t(&to)[parts][2] = b[unit][step];
        to[0][0] = halves(q.x, q.y), to[0][1] = halves(q.z, q.w);
        if (parts > 1) to[parts - 1][0] = rest(q.x, q.y, to[0][0]), to[parts - 1][1] = rest(q.z, q.w, to[0][1]);
      }
  }
};

// One chunk from `start` on; tokens (first, last] are seen. load_keys and load_values bring the next one's, as soon as
// this one's are used.
template <int most, int parts, class LoadKeys, class LoadValues>
__device__ __forceinline__ void attend_chunk(const Words<most>& words, const Queries<most, parts>& queries, int d,
                                             const float (&factors)[2], const float (&sums)[2], int start, int first,
                                             int last, Found<most>& found, LoadKeys load_keys, LoadValues load_values) {
  const int lane = threadIdx.x % 32, g = lane / 4;
  float scores[4] = {};
#pragma unroll
  for (int unit = 0; unit < most / kUnit; ++unit) {
    uint32_t pairs[2][4];
#pragma unroll
    for (int h = 0; h < 2; ++h) unpack_half(words.keys[h][unit], pairs[h]);
#pragma unroll
    for (int step = 0; step < 2; ++step) {
      const uint32_t a[4] = {pairs[0][2 * step], pairs[1][2 * step], pairs[0][2 * step + 1], pairs[1][2 * step + 1]};
#pragma unroll
      for (int part = 0; part < parts; ++part) mma_f16(scores, a, queries.b[unit][step][part]);
    }
  }
  float2 key[2], value[2];
  bool seen[2];
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    key[h] = Int4Cache::parameters(words.key_parameters[h]), value[h] = Int4Cache::parameters(words.value_parameters[h]);
    const int token = start + g + 8 * h;
    seen[h] = token > first && token <= last;
    found.peak = fmaxf(found.peak, seen[h] ? value[h].x : 0.0f);
  }
  load_keys();
  found.peak = over_tokens(found.peak, LargestNumber());
  float factor, inverse, weights[4];
  half_factor(found.peak, factor, inverse);
#pragma unroll
  for (int e = 0; e < 2; ++e) {
    float score[2], largest = found.largest[e];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      score[h] = fmaf(scores[2 * h + e] * factors[e], key[h].x, sums[e] * key[h].y);
      if (!seen[h]) score[h] = -INFINITY;
      largest = fmaxf(largest, score[h]);
    }
    largest = over_tokens(largest, LargestNumber());
    const float correction = weight_of(found.largest[e], largest), moved = correction * (found.factor * inverse);
    found.sum[e] *= correction, found.middle[e] *= correction, found.largest[e] = largest;
#pragma unroll
    for (int i = 0; i < most / 64 * 8; ++i) found.y[i / 8][i / 2 % 4][i % 2 * 2 + e] *= moved;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const float weight = seen[h] ? weight_of(score[h], largest) : 0.0f;
      found.sum[e] += weight;
      if (seen[h]) found.middle[e] = fmaf(weight, value[h].y, found.middle[e]);
      weights[2 * h + e] = seen[h] ? weight * (value[h].x * inverse) : 0.0f;
    }
  }
  found.factor = factor;
  uint32_t b[parts][2];
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const uint32_t leading = halves(weights[2 * h], weights[2 * h + 1]);
    b[0][h] = transposed(leading);
    if (parts > 1) b[parts - 1][h] = transposed(rest(weights[2 * h], weights[2 * h + 1], leading));
  }
#pragma unroll
  for (int column = 0; column < most / 64; ++column) {
    if (8 * column >= Int4Cache::words(d)) continue;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      uint32_t a[4];
#pragma unroll
      for (int j = 0; j < 2; ++j)
        Int4Cache::value_pair(words.values[column][j][0], words.values[column][j][1], i, a[2 * j], a[2 * j + 1]);
#pragma unroll
      for (int part = 0; part < parts; ++part) mma_f16(found.y[column][i], a, b[part]);
    }
  }
  load_values();
}

}  // namespace specquant_cuda
