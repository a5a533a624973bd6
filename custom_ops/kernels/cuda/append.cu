// The first stage of attention: a warp per token and head. Queries are turned and transformed, keys and values written
// to the cache. What reaches the cache equals attention.py and kv_rows.py bit for bit: nothing here may be fused.
#include "append.cuh"
#include "launch.h"

namespace specquant_cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;

template <class X, bool half_cache>
__global__ void __launch_bounds__(kThreads) append_kernel(const AttentionArgs a) {
  __shared__ float rows[kWarps][kMostHeadDim];
  __shared__ uint8_t levels[kWarps][kMostHeadDim];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, d = a.d;
  const int all = a.heads + 2 * a.kv_heads;
  let_next_start();
  wait_for_previous();
  const int64_t item = static_cast<int64_t>(blockIdx.x) * kWarps + warp;
  const int b = blockIdx.y, token = static_cast<int>(item / all), head = static_cast<int>(item % all);
  if (token >= a.sequence) return;
  const Lengths lengths = lengths_of(a, b);
  if (!lengths.sound || token >= lengths.after - lengths.before) return;

  const int64_t at = static_cast<int64_t>(b) * a.sequence + token;
  const X* from = static_cast<const X*>(a.qkv) + (at * all + head) * d;
  float x[kLanes] = {};
#pragma unroll
  for (int j = 0; j < kLanes; ++j)
    if (lane + 32 * j < d) rows[warp][lane + 32 * j] = x[j] = to_float(from[lane + 32 * j]);
  __syncwarp();
  const bool query = head < a.heads, value = head >= a.heads + a.kv_heads;
  const int kv_head = query ? 0 : value ? head - a.heads - a.kv_heads : head - a.heads;
  if (!value) {
    turn(d, a.rotary, rows[warp], Angles<kLanes>(a, a.position_ids[at]), x);
    if (!query && a.key_offset) {
#pragma unroll
      for (int j = 0; j < kLanes; ++j)
        if (lane + 32 * j < d) x[j] = __fsub_rn(x[j], a.key_offset[kv_head * d + lane + 32 * j]);
    }
    if (a.hadamard) transform(d, x);
  }
  if (query) {
    float* to = a.queries + (at * a.heads + head) * d;
#pragma unroll
    for (int j = 0; j < kLanes; ++j)
      if (lane + 32 * j < d) to[lane + 32 * j] = x[j] * a.factor;
    return;
  }
  const int64_t row = (static_cast<int64_t>(b) * a.kv_heads + kv_head) * a.present_rows + lengths.before + token;
  void* cache = value ? a.present_value : a.present_key;
  if (half_cache) {
    __half* to = static_cast<__half*>(cache) + row * d;
#pragma unroll
    for (int j = 0; j < kLanes; ++j)
      if (lane + 32 * j < d) to[lane + 32 * j] = __float2half_rn(x[j]);
  } else {
    pack(d, a.cut, x, levels[warp], static_cast<char*>(cache) + row * (d / 2 + 4));
  }
}

// The first `before` rows of one cache.
__global__ void __launch_bounds__(kThreads) copy_kernel(const AttentionArgs a, const uint32_t* from, uint32_t* to,
                                                        int row_words) {
  const Lengths lengths = lengths_of(a, blockIdx.y / a.kv_heads);
  if (!lengths.sound) return;
  const int64_t count = static_cast<int64_t>(lengths.before) * row_words;
  from += static_cast<int64_t>(blockIdx.y) * a.past_rows * row_words;
  to += static_cast<int64_t>(blockIdx.y) * a.present_rows * row_words;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < count; i += step) to[i] = from[i];
}

}  // namespace

cudaError_t copy_past(const AttentionArgs& a, cudaStream_t stream) {
  const int row_words = a.half_cache ? a.d / 2 : a.d / 8 + 1;
  const int64_t words = static_cast<int64_t>(a.past_rows) * row_words;
  const int chunks = static_cast<int>(words / (8 * kThreads) < 64 ? words / (8 * kThreads) + 1 : 64);
  const dim3 grid(chunks, a.batch * a.kv_heads);
  const struct {
    const void* from;
    void* to;
  } caches[] = {{a.past_key, a.present_key}, {a.past_value, a.present_value}};
  for (const auto& cache : caches) {
    if (cache.from == cache.to) continue;
    const uint32_t* from = static_cast<const uint32_t*>(cache.from);
    uint32_t* to = static_cast<uint32_t*>(cache.to);
    copy_kernel<<<grid, kThreads, 0, stream>>>(a, from, to, row_words);
  }
  return cudaGetLastError();
}

cudaError_t append(const AttentionArgs& a, cudaStream_t stream) {
  const int64_t rows = static_cast<int64_t>(a.sequence) * (a.heads + 2 * a.kv_heads);
  const dim3 grid(static_cast<unsigned>((rows + kWarps - 1) / kWarps), a.batch);
  cudaError_t error = cudaSuccess;
  const auto start = [&](auto kernel) { error = launch_early(kernel, grid, kThreads, 0, a.early, stream, a); };
  if (a.half) {
    a.half_cache ? start(append_kernel<__half, true>) : start(append_kernel<__half, false>);
  } else {
    a.half_cache ? start(append_kernel<float, true>) : start(append_kernel<float, false>);
  }
  return error;
}

}  // namespace specquant_cuda
