// softmax(q k̂ᵀ) v̂ on tensor cores, tile by tile of cached tokens with a running maximum, in the base of 2.
//
// A row is a (token, head) pair of those that share a kv head, token by token; a warp takes kTileRows of them, so that
// what it unpacks serves all. Both products run in float16: q over a power of two of its row, and weights over one of
// the values' scales, each in two parts where `exact`.
#pragma once

#include "kv_cache.cuh"
#include "reductions.cuh"

namespace specquant_cuda {

// Sizes of one kernel: heads of up to `most` features. split: the warps share one tile of rows and take 16 tokens each,
// else each has rows of its own and takes all tokens.
template <class Cache_, int most, bool exact_, bool split_>
struct Attend {
  using Cache = Cache_;
  static constexpr bool exact = exact_, split = split_;
  static constexpr int kThreads = 32 * kAttendWarps;
  static constexpr int kRowTiles = split ? 1 : kAttendWarps;
  static constexpr int kRows = kRowTiles * kTileRows;  // of a block
  static constexpr int kTokens = most == kMostHeadDim && !split ? kTileTokens / 2 : kTileTokens;
  static constexpr int kWarpTokens = split ? kTokens / kAttendWarps : kTokens;
  static constexpr int kScores = kWarpTokens / 8;                              // products of 8 tokens
  static constexpr int kColumns = most / (8 * Cache::kTiles);  // of 8 words of values each
  static constexpr int kParts = exact ? 2 : 1;

  // Rows of words in shared memory: 4 more than a multiple of 8, so that no two threads of a load share a bank.
  __host__ __device__ static int padded(int d) { return (Cache::words(d) + Cache::kPad - 1) / Cache::kPad * Cache::kPad; }
  __host__ __device__ static int stride(int d) { return padded(d) + 4; }
  __host__ __device__ static int units(int d) { return (d + kUnit - 1) / kUnit; }
  __host__ __device__ static int fragments(int d) { return kRowTiles * units(d) * 2 * kParts * 32; }  // of uint4
  __host__ __device__ static int cache_words(int d) {
    const int tiles = 2 * kTokens * stride(d), outputs = split ? kAttendWarps * kTileRows * d : 0;
    return tiles > outputs ? tiles : outputs;
  }
  static size_t shared(int d) {
    return fragments(d) * sizeof(uint4) + (cache_words(d) + 4 * kTokens + 2 * kRows + 3 * kAttendWarps * kTileRows) * 4;
  }
};

template <class F>
__device__ __forceinline__ float over_four(float value, F combine) {
  value = combine(value, __shfl_xor_sync(~0u, value, 1));
  return combine(value, __shfl_xor_sync(~0u, value, 2));
}

struct LargestNumber {  // leaves a NaN out
  __device__ float operator()(float a, float b) const { return fmaxf(a, b); }
};

// Two floats as float16, and what that leaves of them.
__device__ __forceinline__ uint32_t halves(float a, float b) { return bits_of(__floats2half2_rn(a, b)); }
__device__ __forceinline__ uint32_t rest(float a, float b, uint32_t leading) {
  const float2 taken = __half22float2(half2_of(leading));
  return halves(a - taken.x, b - taken.y);
}

// 2^(score − largest). Largest is −∞ where nothing was seen, or NaN alone, which stays.
__device__ __forceinline__ float weight_of(float score, float largest) {
  return exp2f(score - (largest == -INFINITY ? 0.0f : largest));
}

// Where y of a row starts, as a number of rows of d.
__device__ __forceinline__ int64_t output_row(const AttentionArgs& a, int b, int kv_head, int row) {
  return (static_cast<int64_t>(b) * a.sequence + row / a.group) * a.heads + kv_head * a.group + row % a.group;
}

__device__ __forceinline__ void store(const AttentionArgs& a, int64_t at, float value) {
  if (a.half) {
    static_cast<__half*>(a.y)[at] = __float2half_rn(value);
  } else {
    static_cast<float*>(a.y)[at] = value;
  }
}

// Of rows [row, row + kTileRows): a power of two that brings each into float16, and its sum; from `count` on 1 and 0.
__device__ __forceinline__ void scan_queries(const AttentionArgs& a, int b, int kv_head, int row, int count, int worker,
                                             int workers, float* factors, float* sums) {
  for (int r = worker; r < kTileRows; r += workers) {
    float largest = 0.0f, sum = 0.0f, factor = 1.0f, inverse;
    if (row + r < count) {
      const float* q = a.queries + output_row(a, b, kv_head, row + r) * a.d;
      for (int i = threadIdx.x % 32; i < a.d; i += 32) {
        largest = max_nan(largest, fabsf(q[i]));
        sum += q[i];
      }
      largest = over_warp(largest, Largest());
      sum = over_warp(sum, Sum());
      half_factor(largest, factor, inverse);
    }
    if (threadIdx.x % 32 == 0) factors[r] = factor, sums[r] = sum;
  }
}

// Those rows over their factors, as operand A of every step.
template <class A>
__device__ __forceinline__ void load_queries(const AttentionArgs& a, int b, int kv_head, int row, int count, int worker,
                                             int workers, const float* factors, uint4* fragments) {
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  for (int i = worker; i < A::units(a.d) * 2; i += workers) {
    float x[2][4] = {};
    const int first = A::Cache::feature(a.d, i / 2, i % 2, t);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int r = g + 8 * h;
      if (first < 0 || row + r >= count) continue;
      const float inverse = __fdiv_rn(1.0f, factors[r]);
      const float* q = a.queries + output_row(a, b, kv_head, row + r) * a.d + first;
      const float4 v = *reinterpret_cast<const float4*>(q);
      x[h][0] = v.x * inverse, x[h][1] = v.y * inverse, x[h][2] = v.z * inverse, x[h][3] = v.w * inverse;
    }
    const uint4 leading = make_uint4(halves(x[0][0], x[0][1]), halves(x[1][0], x[1][1]), halves(x[0][2], x[0][3]),
                                     halves(x[1][2], x[1][3]));
    uint4* to = fragments + i * A::kParts * 32 + lane;
    to[0] = leading;
    if (A::exact)
      to[32] = make_uint4(rest(x[0][0], x[0][1], leading.x), rest(x[1][0], x[1][1], leading.y),
                          rest(x[0][2], x[0][3], leading.z), rest(x[1][2], x[1][3], leading.w));
  }
}

// Tokens [start, start + kTokens) of one cache, words and parameters; zeros from `end` on, which are not read. What pads
// the rows stays.
template <class A>
__device__ __forceinline__ void load_tile(const uint32_t* rows, int d, int start, int end, uint32_t* words,
                                          float* scales, float* middles) {
  const int row_words = A::Cache::row_words(d), used = A::Cache::words(d), padded = A::padded(d), stride = A::stride(d);
  const int there = end - start < A::kTokens ? end - start : A::kTokens, count = there * row_words;
  const uint32_t inverse = (1u << 22) / row_words + 1;  // exact for every i below kTokens · row_words
  const uint32_t* from = rows + static_cast<int64_t>(start) * row_words;
#pragma unroll 4
  for (int i = threadIdx.x; i < count; i += A::kThreads) {
    const int token = static_cast<int>(i * inverse >> 22), word = i - token * row_words;
    const uint32_t value = __ldg(from + i);
    if (word < used) {
      words[token * stride + word] = value;
    } else {
      const float2 found = A::Cache::parameters(value);
      scales[token] = found.x, middles[token] = found.y;
    }
  }
  if (there == A::kTokens && A::Cache::kScaled) return;
  for (int i = threadIdx.x; i < A::kTokens; i += A::kThreads) {
    for (int word = i < there ? used : 0; word < used; ++word) words[i * stride + word] = 0;
    if (i >= there || !A::Cache::kScaled) {
      const float2 found = i < there ? A::Cache::parameters(0) : make_float2(0.0f, 0.0f);
      scales[i] = found.x, middles[i] = found.y;
    }
  }
}

// Zeros in the words that pad the tiles' rows.
template <class A>
__device__ __forceinline__ void clear_padding(int d, uint32_t* words) {
  const int used = A::Cache::words(d), padded = A::padded(d);
  if (used == padded) return;
  for (int row = threadIdx.x; row < 2 * A::kTokens; row += A::kThreads)
    for (int word = used; word < padded; ++word) words[row * A::stride(d) + word] = 0;
}

// What a thread knows of rows g and g + 8 of its warp's tile: weights are relative to `largest`, `y` to `factor`.
template <class A>
struct Sums {
  float largest[2], sum[2], middle[2];  // sum and middle: of the thread's own tokens
  float peak;                           // the largest scale of a value so far
  float factor;                         // its power of two
  float y[A::kColumns][A::Cache::kTiles][4];
};

// The scores of the warp's tokens, which start at `keys`.
template <class A>
__device__ __forceinline__ void multiply_keys(const uint4* fragments, int d, const uint32_t* keys,
                                              float (&scores)[A::kScores][4]) {
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4, stride = A::stride(d);
#pragma unroll
  for (int n = 0; n < A::kScores; ++n)
#pragma unroll
    for (int i = 0; i < 4; ++i) scores[n][i] = 0.0f;
  for (int unit = 0; unit < A::units(d); ++unit) {
    uint32_t q[2][A::kParts][4];
#pragma unroll
    for (int step = 0; step < 2; ++step)
#pragma unroll
      for (int part = 0; part < A::kParts; ++part) {
        const uint4 v = fragments[((unit * 2 + step) * A::kParts + part) * 32 + lane];
        q[step][part][0] = v.x, q[step][part][1] = v.y, q[step][part][2] = v.z, q[step][part][3] = v.w;
      }
#pragma unroll
    for (int n = 0; n < A::kScores; ++n) {
      uint32_t k[2][2];
      A::Cache::keys(keys + (8 * n + g) * stride, unit, t, k);
#pragma unroll
      for (int step = 0; step < 2; ++step)
#pragma unroll
        for (int part = 0; part < A::kParts; ++part) mma_f16(scores[n], q[step][part], k[step]);
    }
  }
}

// y += weights · values; the weights are where the scores were.
template <class A>
__device__ __forceinline__ void multiply_values(const float (&weights)[A::kScores][4], int d, const uint32_t* values,
                                                Sums<A>& sums) {
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4, stride = A::stride(d);
#pragma unroll
  for (int c = 0; c < A::kScores / 2; ++c) {
    uint32_t w[A::kParts][4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float first = weights[2 * c + i / 2][i % 2 * 2], second = weights[2 * c + i / 2][i % 2 * 2 + 1];
      w[0][i] = halves(first, second);
      if (A::exact) w[A::kParts - 1][i] = rest(first, second, w[0][i]);
    }
    const uint32_t* row = values + (16 * c + 2 * t) * stride;
#pragma unroll
    for (int column = 0; column < A::kColumns; ++column) {
      if (8 * column >= A::Cache::words(d)) continue;
      uint32_t v[A::Cache::kTiles][2];
      A::Cache::values(row, stride, 8 * column + g, v);
#pragma unroll
      for (int tile = 0; tile < A::Cache::kTiles; ++tile)
#pragma unroll
        for (int part = 0; part < A::kParts; ++part) mma_f16(sums.y[column][tile], w[part], v[tile]);
    }
  }
}

}  // namespace specquant_cuda
