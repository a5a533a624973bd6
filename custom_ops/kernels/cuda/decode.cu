// Attention of one new token a row over a packed cache, in one kernel: `append`, `attend` and `merge` at once.
//
// A cluster of blocks takes a kv head, each warp every so many chunks of its tokens (decode.cuh). Every block turns the
// queries for itself; that of the newest chunk packs the new row. Blocks send what they found to each other, and each
// adds up a share of y.
#include <algorithm>

#include "append.cuh"
#include "cluster.cuh"
#include "decode.cuh"
#include "launch.h"

namespace specquant_cuda {
namespace {

// Loops are not unrolled where few rounds are run: instructions have to come from memory, too (docs/cuda.md).

// The queries of the group to shared memory, and with `newest` the new row to the cache, a warp each.
template <class X, int kLanes>
__device__ __forceinline__ void ready(const AttentionArgs& a, int d, const Room& room, int b, int kv_head, bool newest,
                                      int row, int64_t position) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  float* own = room.rows + warp * d;
#pragma unroll 1
  for (int item = warp; item < a.group + 2 * newest; item += kDecodeWarps) {
    const bool query = item < a.group, value = item > a.group;
    const int head = query ? kv_head * a.group + item : a.heads + (value ? a.kv_heads : 0) + kv_head;
    const X* from = static_cast<const X*>(a.qkv) + (static_cast<int64_t>(b) * (a.heads + 2 * a.kv_heads) + head) * d;
    float x[kLanes] = {};
#pragma unroll
    for (int j = 0; j < kLanes; ++j)
      if (lane + 32 * j < d) x[j] = to_float(from[lane + 32 * j]);
    const Angles<kLanes> angles(a, position);  // under way together
#pragma unroll
    for (int j = 0; j < kLanes; ++j)
      if (lane + 32 * j < d) own[lane + 32 * j] = x[j];
    __syncwarp();
    if (!value) {
      turn(d, a.rotary, own, angles, x);
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
      pack(d, a.cut, x, reinterpret_cast<uint8_t*>(room.levels) + warp * d, static_cast<char*>(cache) + at * (d / 2 + 4));
    }
    __syncwarp();
  }
}

// What the block's warps found as one, to the blocks that add it up.
template <int most>
__device__ __forceinline__ void share(const AttentionArgs& a, int d, const Room& room, int rank, int first_head,
                                      int first_owner, Found<most>& found) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4, group = a.group;
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
  const int slice = Room::slice(group, d, a.cluster), row = d / 4;
#pragma unroll 1
  for (int i = threadIdx.x; i < group * row; i += kDecodeThreads) {  // four features of a head
    const bool own = i == static_cast<int>(threadIdx.x);
    const int head = own ? first_head : i / row;
    float most_of = -INFINITY, total = 0.0f, y[4] = {};
#pragma unroll
    for (int w = 0; w < kDecodeWarps; ++w) most_of = fmaxf(most_of, largests[w * kDecodeGroup + head]);
#pragma unroll
    for (int w = 0; w < kDecodeWarps; ++w) {
      const int at = w * kDecodeGroup + head;
      const float part = weight_of(largests[at], most_of), middle = part * middles[at];
      const float4 v = *reinterpret_cast<const float4*>(room.y + w * group * d + 4 * i);
      total = fmaf(part, totals[at], total);
      y[0] += fmaf(part, v.x, middle), y[1] += fmaf(part, v.y, middle);
      y[2] += fmaf(part, v.z, middle), y[3] += fmaf(part, v.w, middle);
    }
    const int owner = own ? first_owner : 4 * i / slice;
    float* to = room.shares + rank * slice + (4 * i - owner * slice);
    box_send(reinterpret_cast<float4*>(to), owner, make_float4(y[0], y[1], y[2], y[3]), room.box, a.cluster);
#pragma unroll 1
    for (int block = i - head * row; block < a.cluster; block += row) {
      float* stats = room.stats + 2 * (rank * kDecodeGroup + head);
      box_send(stats, block, most_of, room.box, a.cluster);
      box_send(stats + 1, block, total, room.box, a.cluster);
    }
  }
}

// whole: d is most, known to the compiler.
template <class X, int most, bool whole>
__global__ void __launch_bounds__(kDecodeThreads, most > 128 || sizeof(X) == 4 ? 1 : 2) decode_kernel(const AttentionArgs a) {
  extern __shared__ float4 shared[];
  constexpr int parts = sizeof(X) == 4 ? 2 : 1;
  const int d = whole ? most : a.d, group = a.group, blocks = a.cluster, rank = cluster_rank();
  const int b = blockIdx.y / a.kv_heads, kv_head = blockIdx.y % a.kv_heads, warp = threadIdx.x / 32;
  const Room room(reinterpret_cast<float*>(shared), group, d, blocks);
  const int64_t cached = static_cast<int64_t>(blockIdx.y) * a.present_rows * Int4Cache::row_words(d);
  const uint32_t* keys = static_cast<const uint32_t*>(a.present_key) + cached;
  const uint32_t* values = static_cast<const uint32_t*>(a.present_value) + cached;
  const int own = rank + blocks * warp, step = blocks * kDecodeWarps;  // chunks of a warp
  // Divisions come before the wait.
  const int first_head = threadIdx.x / (d / 4);
  let_next_start();
  const int slice = Room::slice(group, d, blocks), owned = max(0, min(slice, group * d - rank * slice));
  if (threadIdx.x == 0) box_open(room.box, blocks * (owned + 2 * group) * static_cast<int>(sizeof(float)));
  cluster_arrive();
  const int first_owner = 4 * threadIdx.x / slice;
  const int own_head = (rank * slice + static_cast<int>(threadIdx.x)) / d;
  {  // The position may change until the kernels before are done: here it says only what will probably be read.
    const int64_t probable = a.position_ids[b], at = probable * a.rotary + threadIdx.x % 32 * 32;
    if (warp == 0 && probable >= 0 && probable < a.context && static_cast<int>(threadIdx.x) * 32 < a.rotary) {
      prefetch_line(a.cos + at);
      prefetch_line(a.sin + at);
    }
  }
  wait_for_previous();
  const int64_t position = a.position_ids[b];
  const Lengths lengths = lengths_of(a, b);
  if (!lengths.sound || lengths.after == 0) {
    const float value = lengths.sound ? 0.0f : __int_as_float(0x7FC00000);
#pragma unroll 1
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
  const auto load_keys = [&] { words.load_keys(keys, d, chunk * kChunkTokens, lengths.after); };
  const auto load_values = [&] { words.load_values(values, d, chunk * kChunkTokens, lengths.after); };
  if (chunk < newest) load_keys(), load_values();
  ready<X, most / 32>(a, d, room, b, kv_head, (newest - begin) % blocks == rank, last, position);
  __syncthreads();
  if (chunk == newest) load_keys(), load_values();

  Queries<most, parts> queries;
  queries.load(room, group, d);
  float factors[2], sums[2];
#pragma unroll
  for (int e = 0; e < 2; ++e) {
    const int head = 2 * (threadIdx.x % 4) + e;
    factors[e] = head < group ? room.factors[head] : 1.0f, sums[e] = head < group ? room.sums[head] : 0.0f;
  }
  Found<most> found;
#pragma unroll 1
  while (chunk < end) {
    const int start = chunk * kChunkTokens;
    chunk += step;
    const bool more = chunk < end;
    attend_chunk<most, parts>(
        words, queries, d, factors, sums, start, first, last, found, [&] { if (more) load_keys(); },
        [&] { if (more) load_values(); });
  }
  cluster_wait();  // all blocks have started
  share<most>(a, d, room, rank, first_head, first_owner, found);
  box_wait(room.box, blocks);

#pragma unroll 1
  for (int i = threadIdx.x; i < owned; i += kDecodeThreads) {
    const int head = i == static_cast<int>(threadIdx.x) ? own_head : (rank * slice + i) / d;
    const int feature = rank * slice + i - head * d;
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

template <class X, int most, bool whole>
cudaError_t start(const AttentionArgs& a, cudaStream_t stream) {
  const auto kernel = decode_kernel<X, most, whole>;
  const size_t shared = Room::bytes(a.group, a.d, a.cluster);
  static Known known;
  const cudaError_t error = allow(kernel, shared, a.cluster > 8, known);
  if (error != cudaSuccess) return error;
  const dim3 grid(a.cluster, a.batch * a.kv_heads);
  return launch_cluster(kernel, grid, kDecodeThreads, shared, a.cluster, stream, a);
}

template <class X>
cudaError_t start_size(const AttentionArgs& a, cudaStream_t stream) {
  return a.d == 128  ? start<X, 128, true>(a, stream)
         : a.d == 64 ? start<X, 64, true>(a, stream)
         : a.d < 64  ? start<X, 64, false>(a, stream)
         : a.d < 128 ? start<X, 128, false>(a, stream)
                     : start<X, 256, false>(a, stream);
}

}  // namespace

cudaError_t decode(const AttentionArgs& a, cudaStream_t stream) {
  return a.half ? start_size<__half>(a, stream) : start_size<float>(a, stream);
}

}  // namespace specquant_cuda
