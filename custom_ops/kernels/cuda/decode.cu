// Attention of one new token a row over a packed cache, in one kernel: `append`, `attend` and `merge` at once.
//
// A cluster of blocks takes a kv head, each warp every so many chunks of 16 cached tokens, with the heads of the group
// as the 8 columns of an `mma`: scores are keys · q, y is valuesᵀ · weights, and what a thread loads of the cache goes
// from registers to the tensor cores. With g = lane / 4 and t = lane % 4 a thread has the scores of tokens g and g + 8
// for heads 2t and 2t + 1. Every block turns the queries for itself; that of the newest chunk packs the new row. Blocks
// send what they found to each other, and each adds up a share of y. Numbers are those of attend.cuh.
#include <algorithm>

#include "append.cuh"
#include "attend.cuh"
#include "cluster.cuh"
#include "launch.h"

namespace specquant_cuda {
namespace {

constexpr int kDecodeWarps = 8;
constexpr int kDecodeThreads = 32 * kDecodeWarps;
constexpr int kChunkTokens = 16;
constexpr int kAheadRounds = 8;  // chunks of a warp that are prefetched
constexpr int kGap = 16;         // floats between rows of queries, so that two rows meet in no bank

// Shared memory of a block, in floats.
struct Room {
  uint64_t* box;
  float *queries, *factors, *sums, *rows, *levels, *y, *found, *shares, *stats;
  __host__ __device__ static int slice(int group, int d, int blocks) { return (group * d + blocks - 1) / blocks; }
  __device__ __forceinline__ Room(float* shared, int group, int d, int blocks)
      : box(reinterpret_cast<uint64_t*>(shared)), queries(shared + 4), factors(queries + kDecodeGroup * (d + kGap)), sums(factors + kDecodeGroup),
        rows(sums + kDecodeGroup), levels(rows + kDecodeWarps * d), y(levels + kDecodeWarps * d / 4),
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

  __device__ __forceinline__ void load(const uint32_t* all_keys, const uint32_t* all_values, int d, int start, int after) {
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4, words = Int4Cache::words(d);
    const int width = Int4Cache::row_words(d);
    const auto row = [&](const uint32_t* all, int token) {
      return all + static_cast<int64_t>(min(start + token, after - 1)) * width;
    };
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const uint32_t *key = row(all_keys, g + 8 * h), *value = row(all_values, g + 8 * h);
#pragma unroll
      for (int unit = 0; unit < kUnits; ++unit) keys[h][unit] = 4 * unit + t < words ? key[4 * unit + t] : 0;
      key_parameters[h] = key[words], value_parameters[h] = value[words];
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t* value = row(all_values, i / 2 * 8 + 2 * t + i % 2);
#pragma unroll
      for (int column = 0; column < kColumns; ++column)
        values[column][i / 2][i % 2] = 8 * column + g < words ? value[8 * column + g] : 0;
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

// One chunk from `start` on; tokens (first, last] are seen.
template <int most, int parts>
__device__ __forceinline__ void attend_chunk(const Words<most>& words, const Queries<most, parts>& queries, int d,
                                             const float (&factors)[2], const float (&sums)[2], int start, int first,
                                             int last, Found<most>& found) {
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
}

// The queries of the group to shared memory, and with `newest` the new row to the cache, a warp each.
template <class X>
__device__ __forceinline__ void ready(const AttentionArgs& a, const Room& room, int b, int kv_head, bool newest, int row) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, d = a.d;
  float* own = room.rows + warp * d;
  for (int item = warp; item < a.group + 2 * newest; item += kDecodeWarps) {
    const bool query = item < a.group, value = item > a.group;
    const int head = query ? kv_head * a.group + item : a.heads + (value ? a.kv_heads : 0) + kv_head;
    const X* from = static_cast<const X*>(a.qkv) + (static_cast<int64_t>(b) * (a.heads + 2 * a.kv_heads) + head) * d;
    float x[kLanes] = {};
#pragma unroll
    for (int j = 0; j < kLanes; ++j)
      if (lane + 32 * j < d) own[lane + 32 * j] = x[j] = to_float(from[lane + 32 * j]);
    __syncwarp();
    if (!value) {
      turn(a, own, a.position_ids[b], x);
      if (!query) {
#pragma unroll
        for (int j = 0; j < kLanes; ++j)
          if (lane + 32 * j < d) x[j] = __fsub_rn(x[j], a.key_offset[kv_head * d + lane + 32 * j]);
      }
      if (a.hadamard) transform(d, x);
    }
    if (query) {
      float largest = 0.0f, sum = 0.0f, factor, inverse;
#pragma unroll
      for (int j = 0; j < kLanes; ++j)
        if (lane + 32 * j < d) {
          x[j] *= a.factor;
          largest = max_nan(largest, fabsf(x[j])), sum += x[j];
        }
      sum = over_warp(sum, Sum());
      half_factor(over_warp(largest, Largest()), factor, inverse);
#pragma unroll
      for (int j = 0; j < kLanes; ++j)
        if (lane + 32 * j < d) room.queries[item * (d + kGap) + lane + 32 * j] = x[j] * inverse;
      if (lane == 0) room.factors[item] = factor, room.sums[item] = sum;
    } else {
      const int64_t at = (static_cast<int64_t>(b) * a.kv_heads + kv_head) * a.present_rows + row;
      void* cache = value ? a.present_value : a.present_key;
      pack(a, x, reinterpret_cast<uint8_t*>(room.levels) + warp * d, static_cast<char*>(cache) + at * (d / 2 + 4));
    }
    __syncwarp();
  }
}

// What the block's warps found as one, to the blocks that add it up.
template <int most>
__device__ __forceinline__ void share(const AttentionArgs& a, const Room& room, int rank, Found<most>& found) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4, d = a.d, group = a.group;
  float *largests = room.found, *totals = largests + kDecodeWarps * kDecodeGroup;
  float* middles = totals + kDecodeWarps * kDecodeGroup;
#pragma unroll
  for (int e = 0; e < 2; ++e) {
    const int head = 2 * t + e, at = warp * kDecodeGroup + head;
    const float sum = over_tokens(found.sum[e], Sum()), middle = over_tokens(found.middle[e], Sum());
    if (g == 0) largests[at] = found.largest[e], totals[at] = sum, middles[at] = middle;
    if (head >= group) continue;
    float* y = room.y + (warp * group + head) * d;
#pragma unroll
    for (int column = 0; column < most / 64; ++column) {
      const int word = 8 * column + g;
      if (word >= Int4Cache::words(d)) continue;
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const float(&from)[4][4] = found.y[column];
        *reinterpret_cast<float4*>(y + h * (d / 2) + 4 * word) =
            make_float4(from[0][2 * h + e] * found.factor, from[1][2 * h + e] * found.factor,
                        from[2][2 * h + e] * found.factor, from[3][2 * h + e] * found.factor);
      }
    }
  }
  __syncthreads();
  const int slice = Room::slice(group, d, a.cluster);
  for (int i = threadIdx.x; i < group * d; i += kDecodeThreads) {
    const int head = i / d;
    float most_of = -INFINITY, total = 0.0f, y = 0.0f;
#pragma unroll
    for (int w = 0; w < kDecodeWarps; ++w) most_of = fmaxf(most_of, largests[w * kDecodeGroup + head]);
#pragma unroll
    for (int w = 0; w < kDecodeWarps; ++w) {
      const int at = w * kDecodeGroup + head;
      const float part = weight_of(largests[at], most_of);
      total = fmaf(part, totals[at], total);
      y = fmaf(part, middles[at], fmaf(part, room.y[w * group * d + i], y));
    }
    box_send(room.shares + rank * slice + i % slice, i / slice, y, room.box);
    if (i % d < a.cluster) {  // d is 16 at least: as many threads of every head as a cluster has blocks
      float* stats = room.stats + 2 * (rank * kDecodeGroup + head);
      box_send(stats, i % d, most_of, room.box);
      box_send(stats + 1, i % d, total, room.box);
    }
  }
}

template <class X, int most>
__global__ void __launch_bounds__(kDecodeThreads, most > 128 || sizeof(X) == 4 ? 1 : 2) decode_kernel(const AttentionArgs a) {
  extern __shared__ float4 shared[];
  constexpr int parts = sizeof(X) == 4 ? 2 : 1;
  const int d = a.d, group = a.group, blocks = a.cluster, rank = cluster_rank();
  const int b = blockIdx.y / a.kv_heads, kv_head = blockIdx.y % a.kv_heads, warp = threadIdx.x / 32;
  const Room room(reinterpret_cast<float*>(shared), group, d, blocks);
  const int64_t cached = static_cast<int64_t>(blockIdx.y) * a.present_rows * Int4Cache::row_words(d);
  const uint32_t* keys = static_cast<const uint32_t*>(a.present_key) + cached;
  const uint32_t* values = static_cast<const uint32_t*>(a.present_value) + cached;
  const int own = rank + blocks * warp, step = blocks * kDecodeWarps;  // chunks of a warp
  let_next_start();
  const int slice = Room::slice(group, d, blocks), owned = max(0, min(slice, group * d - rank * slice));
  if (threadIdx.x == 0) box_open(room.box, blocks * (owned + 2 * group) * static_cast<int>(sizeof(float)));
  cluster_arrive();
  {  // The length may change until the kernels before are done: here it says only what will probably be read.
    const int rows = min(a.seqlens_k[b], a.present_rows - 1) + 1, bytes = Int4Cache::row_words(d) * 4 * kChunkTokens;
    for (int round = 0; round < kAheadRounds; ++round) {
      const int start = (own + round * step) * kChunkTokens;
      if (start >= rows || a.window > 0) break;
      for (int at = threadIdx.x % 32 * 128; at < min(bytes, (rows - start) * bytes / kChunkTokens); at += 32 * 128) {
        prefetch_line(reinterpret_cast<const char*>(keys) + static_cast<int64_t>(start) * bytes / kChunkTokens + at);
        prefetch_line(reinterpret_cast<const char*>(values) + static_cast<int64_t>(start) * bytes / kChunkTokens + at);
      }
    }
  }
  wait_for_previous();
  const Lengths lengths = lengths_of(a, b);
  if (!lengths.sound || lengths.after == 0) {
    const float value = lengths.sound ? 0.0f : __int_as_float(0x7FC00000);
    for (int i = threadIdx.x; rank == 0 && i < group * d; i += kDecodeThreads)
      store(a, output_row(a, b, kv_head, i / d) * d + i % d, value);
    cluster_wait();
    return;
  }
  const int last = lengths.before, first = a.window > 0 ? last - a.window : -1;
  const int begin = max(0, first + 1) / kChunkTokens, end = last / kChunkTokens + 1;
  const int newest = end - 1;
  int chunk = begin + own;
  Words<most> words;
  if (chunk < newest) words.load(keys, values, d, chunk * kChunkTokens, lengths.after);
  ready<X>(a, room, b, kv_head, (newest - begin) % blocks == rank, last);
  __syncthreads();
  if (chunk == newest) words.load(keys, values, d, chunk * kChunkTokens, lengths.after);

  Queries<most, parts> queries;
  queries.load(room, group, d);
  float factors[2], sums[2];
#pragma unroll
  for (int e = 0; e < 2; ++e) {
    const int head = 2 * (threadIdx.x % 4) + e;
    factors[e] = head < group ? room.factors[head] : 1.0f, sums[e] = head < group ? room.sums[head] : 0.0f;
  }
  Found<most> found;
  while (chunk < end) {
    const Words<most> now = words;
    const int start = chunk * kChunkTokens;
    chunk += step;
    if (chunk < end) words.load(keys, values, d, chunk * kChunkTokens, lengths.after);
    attend_chunk<most, parts>(now, queries, d, factors, sums, start, first, last, found);
  }
  cluster_wait();  // all blocks have started
  share<most>(a, room, rank, found);
  box_wait(room.box);

  for (int i = threadIdx.x; i < owned; i += kDecodeThreads) {
    const int head = (rank * slice + i) / d, feature = (rank * slice + i) % d;
    float largest = -INFINITY, total = 0.0f, y = 0.0f;
    for (int s = 0; s < blocks; ++s) largest = fmaxf(largest, room.stats[2 * (s * kDecodeGroup + head)]);
#pragma unroll 4
    for (int s = 0; s < blocks; ++s) {
      const float* stats = room.stats + 2 * (s * kDecodeGroup + head);
      const float part = weight_of(stats[0], largest);
      total = fmaf(part, stats[1], total), y = fmaf(part, room.shares[s * slice + i], y);
    }
    store(a, output_row(a, b, kv_head, head) * d + feature, y / total);
  }
}

template <class X, int most>
cudaError_t start(const AttentionArgs& a, cudaStream_t stream) {
  const auto kernel = decode_kernel<X, most>;
  const size_t shared = Room::bytes(a.group, a.d, a.cluster);
  cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared));
  if (error == cudaSuccess && a.cluster > 8)
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
  if (error != cudaSuccess) return error;
  const dim3 grid(a.cluster, a.batch * a.kv_heads);
  return launch_cluster(kernel, grid, kDecodeThreads, shared, a.cluster, stream, a);
}

template <class X>
cudaError_t start_size(const AttentionArgs& a, cudaStream_t stream) {
  return a.d <= 64    ? start<X, 64>(a, stream)
         : a.d <= 128 ? start<X, 128>(a, stream)
                      : start<X, 256>(a, stream);
}

}  // namespace

cudaError_t decode(const AttentionArgs& a, cudaStream_t stream) {
  return a.half ? start_size<__half>(a, stream) : start_size<float>(a, stream);
}

}  // namespace specquant_cuda
