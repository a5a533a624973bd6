// Launches of attend.cuh, and the merge of splits.
#include <algorithm>

#include "attend.cuh"
#include "launch.h"

namespace specquant_cuda {
namespace {

// One tile of tokens, the warp's own from `start` on: rows see tokens (first[h], last[h]].
template <class A>
__device__ __forceinline__ void attend_tile(const uint4* fragments, int d, const uint32_t* keys, const uint32_t* values,
                                            const float* key_scales, const float* key_middles, const float* scales,
                                            const float* middles, int start, const int (&first)[2], const int (&last)[2],
                                            const float (&row_factor)[2], const float (&row_sum)[2], Sums<A>& sums) {
  const int lane = threadIdx.x % 32, t = lane % 4;
  float scores[A::kScores][4];
  multiply_keys<A>(fragments, d, keys, scores);

  float largest[2] = {sums.largest[0], sums.largest[1]};
#pragma unroll
  for (int n = 0; n < A::kScores; ++n)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int h = i / 2, at = 8 * n + 2 * t + i % 2;
      float score = scores[n][i] * row_factor[h];
      if (A::Cache::kScaled) score = fmaf(score, key_scales[at], row_sum[h] * key_middles[at]);
      if (start + at <= first[h] || start + at > last[h]) score = -INFINITY;
      scores[n][i] = score;
      largest[h] = fmaxf(largest[h], score);
    }
  float peak = sums.peak, factor = 0.5f, inverse = 2.0f;
  if (A::Cache::kScaled)
    for (int i = lane; i < A::kWarpTokens; i += 32) peak = fmaxf(peak, scales[i]);
  peak = A::Cache::kScaled ? over_warp(peak, LargestNumber()) : 1.0f;
  half_factor(peak, factor, inverse);
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    largest[h] = over_four(largest[h], LargestNumber());
    const float correction = weight_of(sums.largest[h], largest[h]), moved = correction * (sums.factor * inverse);
    sums.sum[h] *= correction, sums.middle[h] *= correction;
#pragma unroll
    for (int column = 0; column < A::kColumns; ++column)
#pragma unroll
      for (int tile = 0; tile < A::Cache::kTiles; ++tile)
#pragma unroll
        for (int e = 0; e < 2; ++e) sums.y[column][tile][2 * h + e] *= moved;
#pragma unroll
    for (int n = 0; n < A::kScores; ++n)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int at = 8 * n + 2 * t + e;
        const bool seen = start + at > first[h] && start + at <= last[h];
        const float weight = seen ? weight_of(scores[n][2 * h + e], largest[h]) : 0.0f;
        sums.sum[h] += weight;
        if (A::Cache::kScaled && seen) sums.middle[h] = fmaf(weight, middles[at], sums.middle[h]);
        scores[n][2 * h + e] = !seen ? 0.0f : weight * (A::Cache::kScaled ? scales[at] * inverse : inverse);
      }
    sums.largest[h] = largest[h];
  }
  sums.peak = peak, sums.factor = factor;
  multiply_values<A>(scores, d, values, sums);
}

// Of `split` kernels: what the warps found, as one; then y, or a share of it for `merge`. y: room for every warp's.
template <class A>
__device__ __forceinline__ void put_together(const AttentionArgs& a, int b, int kv_head, int row, int rows, int count,
                                             int share, float* y, float* found, Sums<A>& sums) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4, d = a.d;
  const int used = min(kTileRows, rows - row);
  float* largests = found;  // [kAttendWarps, kTileRows]
  float* totals = largests + kAttendWarps * kTileRows;
  float* middles = totals + kAttendWarps * kTileRows;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int r = g + 8 * h, at = warp * kTileRows + r;
    if (t == 0) largests[at] = sums.largest[h], totals[at] = sums.sum[h], middles[at] = sums.middle[h];
    if (r >= used) continue;
#pragma unroll
    for (int column = 0; column < A::kColumns; ++column)
#pragma unroll
      for (int tile = 0; tile < A::Cache::kTiles; ++tile)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int feature = A::Cache::column(d, 8 * column + 2 * t + e, tile);
          if (feature >= 0) y[at * d + feature] = sums.y[column][tile][2 * h + e] * sums.factor;
        }
  }
  __syncthreads();
  for (int r = 0; r < used; ++r) {
    float most = -INFINITY, total = 0.0f, middle = 0.0f, parts[kAttendWarps];
#pragma unroll
    for (int w = 0; w < kAttendWarps; ++w) most = fmaxf(most, largests[w * kTileRows + r]);
#pragma unroll
    for (int w = 0; w < kAttendWarps; ++w) {
      parts[w] = weight_of(largests[w * kTileRows + r], most);
      total = fmaf(parts[w], totals[w * kTileRows + r], total);
      middle = fmaf(parts[w], middles[w * kTileRows + r], middle);
    }
    const int64_t line = (static_cast<int64_t>(b) * a.kv_heads + kv_head) * rows + row + r;
    float* to = a.partials + (line * a.splits + share) * (d + 2);
    for (int feature = threadIdx.x; feature < d; feature += A::kThreads) {
      float sum = middle;
#pragma unroll
      for (int w = 0; w < kAttendWarps; ++w) sum = fmaf(parts[w], y[(w * kTileRows + r) * d + feature], sum);
      if (a.splits == 1) {
        store(a, output_row(a, b, kv_head, row + r) * d + feature, row + r < count ? sum / total : 0.0f);
      } else {
        to[feature] = sum;
        if (feature == 0) to[d] = most, to[d + 1] = total;
      }
    }
  }
}

template <class A>
__global__ void __launch_bounds__(A::kThreads) attend_kernel(const AttentionArgs a) {
  extern __shared__ __align__(16) uint4 shared[];
  let_next_start();
  wait_for_previous();
  const int d = a.d, stride = A::stride(d), rows = a.sequence * a.group;
  uint4* fragments = shared;
  uint32_t* keys = reinterpret_cast<uint32_t*>(fragments + A::fragments(d));
  uint32_t* values = keys + A::kTokens * stride;
  float* key_scales = reinterpret_cast<float*>(keys + A::cache_words(d));
  float *key_middles = key_scales + A::kTokens, *scales = key_middles + A::kTokens, *middles = scales + A::kTokens;
  float *factors = middles + A::kTokens, *row_sums = factors + A::kRows, *found = row_sums + A::kRows;

  const int b = blockIdx.y / a.kv_heads, kv_head = blockIdx.y % a.kv_heads;
  const int row_tiles = (rows + A::kRows - 1) / A::kRows;
  const int share = A::split ? blockIdx.x / row_tiles : 0;
  // The last rows see most: they start first.
  const int row = (A::split ? blockIdx.x % row_tiles : row_tiles - 1 - blockIdx.x) * A::kRows;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const Lengths lengths = lengths_of(a, b);
  const int count = (lengths.after - lengths.before) * a.group;  // rows that are no padding
  const int used = count - row < A::kRows ? count - row : A::kRows;
  if (used <= 0) {  // padding, or lengths that do not fit; a merge writes it otherwise
    if (a.splits > 1) return;
    const float value = lengths.sound ? 0.0f : __int_as_float(0x7FC00000);
    for (int i = threadIdx.x; i < A::kRows * d; i += A::kThreads)
      if (row + i / d < rows) store(a, output_row(a, b, kv_head, row + i / d) * d + i % d, value);
    return;
  }
  const int end = lengths.before + (row + used - 1) / a.group + 1;
  int start = 0;
  if (a.window > 0) start = max(0, lengths.before + row / a.group + 1 - a.window) / A::kTokens * A::kTokens;
  start += share * A::kTokens;
  if (start >= end) {  // a split without tokens
    const int64_t line = static_cast<int64_t>(blockIdx.y) * rows + row + threadIdx.x;
    float* to = a.partials + (line * a.splits + share) * (d + 2) + d;
    if (threadIdx.x < used) to[0] = -INFINITY, to[1] = 0.0f;
    return;
  }

  const int64_t head = static_cast<int64_t>(blockIdx.y) * a.present_rows * A::Cache::row_words(d);
  const uint32_t* all_keys = static_cast<const uint32_t*>(a.present_key) + head;
  const uint32_t* all_values = static_cast<const uint32_t*>(a.present_value) + head;
  const auto load = [&](int tile) {
    load_tile<A>(all_keys, d, tile, lengths.after, keys, key_scales, key_middles);
    load_tile<A>(all_values, d, tile, lengths.after, values, scales, middles);
  };
  clear_padding<A>(d, keys);
  load(start);  // on its way while the queries are

  const int own = A::split ? row : row + warp * kTileRows;  // the warp's first row
  float *own_factors = factors + (own - row), *own_sums = row_sums + (own - row);
  uint4* own_fragments = fragments + (A::split ? 0 : warp) * A::units(d) * 2 * A::kParts * 32;
  const int worker = A::split ? warp : 0, workers = A::split ? kAttendWarps : 1;
  scan_queries(a, b, kv_head, own, count, worker, workers, own_factors, own_sums);
  __syncthreads();
  load_queries<A>(a, b, kv_head, own, count, worker, workers, own_factors, own_fragments);

  Sums<A> sums = {};
  int first[2], last[2];
  float row_factor[2], row_sum[2];
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int r = own + g + 8 * h;
    last[h] = r < count ? lengths.before + r / a.group : -1;
    first[h] = a.window > 0 ? last[h] - a.window : -1;
    row_factor[h] = own_factors[g + 8 * h], row_sum[h] = own_sums[g + 8 * h];
    sums.largest[h] = -INFINITY;
  }
  sums.factor = 1.0f;
  const int offset = A::split ? warp * A::kWarpTokens : 0;
  for (int tile = start; tile < end; tile += (A::split ? a.splits : 1) * A::kTokens) {
    if (tile > start) {
      __syncthreads();
      load(tile);
    }
    __syncthreads();
    attend_tile<A>(own_fragments, d, keys + offset * stride, values + offset * stride, key_scales + offset,
                   key_middles + offset, scales + offset, middles + offset, tile + offset, first, last, row_factor,
                   row_sum, sums);
  }
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    sums.sum[h] = over_four(sums.sum[h], Sum());
    sums.middle[h] = over_four(sums.middle[h], Sum());
  }
  if constexpr (A::split) {
    __syncthreads();
    put_together<A>(a, b, kv_head, row, rows, count, share, reinterpret_cast<float*>(keys), found, sums);
  } else {
#pragma unroll
    for (int column = 0; column < A::kColumns; ++column)
#pragma unroll
      for (int tile = 0; tile < A::Cache::kTiles; ++tile)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int r = own + g + i / 2 * 8, feature = A::Cache::column(d, 8 * column + 2 * t + i % 2, tile);
          if (feature < 0 || r >= rows) continue;
          const float value = fmaf(sums.y[column][tile][i], sums.factor, sums.middle[i / 2]) / sums.sum[i / 2];
          store(a, output_row(a, b, kv_head, r) * d + feature, r < count ? value : 0.0f);
        }
  }
}

constexpr int kMergeThreads = 512;
constexpr int kMergeWarps = kMergeThreads / 32;

// y = Σ 2^(largest_s − largest) y_s / Σ 2^(largest_s − largest) sum_s of every row. Threads that share a feature take
// every so many splits.
__global__ void __launch_bounds__(kMergeThreads) merge_kernel(const AttentionArgs a) {
  __shared__ float weights[kMergeWarps][kMostSplits], shares[kMergeThreads];
  let_next_start();
  wait_for_previous();
  const int row = blockIdx.x, kv_head = blockIdx.y % a.kv_heads, b = blockIdx.y / a.kv_heads;
  const int d = a.d, width = d + 2, rows = a.sequence * a.group;
  const Lengths lengths = lengths_of(a, b);
  const int64_t to = output_row(a, b, kv_head, row) * d;
  if (row >= (lengths.after - lengths.before) * a.group) {  // padding, or lengths that do not fit
    for (int i = threadIdx.x; i < d; i += kMergeThreads)
      store(a, to + i, lengths.sound ? 0.0f : __int_as_float(0x7FC00000));
    return;
  }
  const float* parts = a.partials + (static_cast<int64_t>(blockIdx.y) * rows + row) * a.splits * width;
  // Every warp for itself what each split counts: that is sooner than to meet.
  const int lane = threadIdx.x % 32;
  float* weight = weights[threadIdx.x / 32];
  float largest[kMostSplits / 32], seen[kMostSplits / 32], most = -INFINITY, total = 0.0f;
#pragma unroll
  for (int i = 0; i < kMostSplits / 32; ++i) {
    const int split = lane + 32 * i;
    largest[i] = split < a.splits ? parts[split * width + d] : -INFINITY;
    seen[i] = split < a.splits ? parts[split * width + d + 1] : 0.0f;
    most = fmaxf(most, largest[i]);
  }
  most = over_warp(most, LargestNumber());
#pragma unroll
  for (int i = 0; i < kMostSplits / 32; ++i) {
    const bool empty = largest[i] == -INFINITY && seen[i] == 0.0f;  // a split without tokens: its y was not written
    const float part = weight_of(largest[i], most);
    weight[lane + 32 * i] = empty ? -1.0f : part;
    total += empty ? 0.0f : part * seen[i];
  }
  total = over_warp(total, Sum());
  __syncwarp();
  const int groups = kMergeThreads / d, group = threadIdx.x / d, feature = threadIdx.x % d;
  float y = 0.0f;
  if (group < groups) {
#pragma unroll 8
    for (int s = group; s < a.splits; s += groups)
      if (!(weight[s] < 0.0f)) y = fmaf(weight[s], parts[s * width + feature], y);  // NaN counts
  }
  shares[threadIdx.x] = y;
  __syncthreads();
  if (group > 0) return;
  for (int i = 1; i < groups; ++i) y += shares[i * d + feature];
  store(a, to + feature, y / total);
}

template <class A>
cudaError_t start(const AttentionArgs& a, cudaStream_t stream) {
  const auto kernel = attend_kernel<A>;
  const size_t shared = A::shared(a.d);
  static Known known;
  const cudaError_t error = allow(kernel, shared, false, known);
  if (error != cudaSuccess) return error;
  const dim3 grid(ceil_div(a.sequence * a.group, A::kRows) * (A::split ? a.splits : 1), a.batch * a.kv_heads);
  return launch_early(kernel, grid, A::kThreads, shared, a.early, stream, a);
}

template <class Cache, int most, bool exact>
cudaError_t start_rows(const AttentionArgs& a, cudaStream_t stream) {
  return a.sequence * a.group <= kDecodeRows ? start<Attend<Cache, most, exact, true>>(a, stream)
                                             : start<Attend<Cache, most, exact, false>>(a, stream);
}

template <class Cache, int most>
cudaError_t start_type(const AttentionArgs& a, cudaStream_t stream) {
  return a.half ? start_rows<Cache, most, false>(a, stream) : start_rows<Cache, most, true>(a, stream);
}

template <class Cache>
cudaError_t start_size(const AttentionArgs& a, cudaStream_t stream) {
  return a.d <= 64    ? start_type<Cache, 64>(a, stream)
         : a.d <= 128 ? start_type<Cache, 128>(a, stream)
                      : start_type<Cache, 256>(a, stream);
}

}  // namespace

cudaError_t attend(const AttentionArgs& a, cudaStream_t stream) {
  return a.half_cache ? start_size<HalfCache>(a, stream) : start_size<Int4Cache>(a, stream);
}

cudaError_t merge(const AttentionArgs& a, cudaStream_t stream) {
  const dim3 grid(a.sequence * a.group, a.batch * a.kv_heads);
  return launch_early(merge_kernel, grid, kMergeThreads, 0, a.early, stream, a);
}

}  // namespace specquant_cuda
