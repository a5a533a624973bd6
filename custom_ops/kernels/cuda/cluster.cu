// The first stage of few tokens in one kernel: prologue, rotation, low, subtraction and levels. A cluster of blocks takes
// a token, each block a share of its features, and they send each other their parts of low, of a range, of a maximum.
//
// The basis is on its way to shared memory before the kernels before this one are done. Arithmetic is that of the other
// first stage, value for value; only the order in which low is summed differs.
#include <algorithm>
#include <numeric>
#include <type_traits>

#include "cluster.cuh"
#include "hadamard.cuh"
#include "launch.h"
#include "prologue.cuh"

namespace specquant_cuda {
namespace {

constexpr int kThreads = kNormThreads;
constexpr int kWarps = kThreads / 32;
constexpr int kMostBlocks = 16;
constexpr int kRange = 2;  // floats of a block that the others take: lowest and highest, or the largest

// Rows of the basis in shared memory: 16 bytes more than its columns, so that no two rows' start meets in a bank.
__host__ __device__ constexpr int basis_stride(int r) { return (r + 7) / 8 * 8 + 8; }

// Shared memory of one block, in floats: what other blocks send, sums of warps, each warp's low, values, basis.
struct Places {
  uint64_t *low_box, *range_box;
  float *lows, *ranges, *sums, *low, *values;  // lows: [kMostBlocks, kFastRank], ranges: [kMostBlocks, kRange]
  __half* basis;
  __device__ __forceinline__ Places(float* shared, int span)
      : low_box(reinterpret_cast<uint64_t*>(shared)), range_box(low_box + 1), lows(shared + 4),
        ranges(lows + kMostBlocks * kFastRank), sums(ranges + kMostBlocks * kRange),
        low(sums + kWarps * kFastRank), values(low + kWarps * kFastRank), basis(reinterpret_cast<__half*>(values + span)) {}
  static size_t bytes(int span, int r) {
    const size_t floats = 4 + kMostBlocks * (kFastRank + kRange) + 2 * kWarps * kFastRank + span;
    return floats * sizeof(float) + (r ? (static_cast<size_t>(span) * basis_stride(r) + kFastRank) * sizeof(__half) : 0);
  }
};

// The same where 8 does not divide r. Rows lie one after another, from a multiple of 16 bytes on: eight numbers at a time,
// wherever a row begins.
__device__ __noinline__ void fetch_any(const __half* from, int count, int r, __half* basis) {
  const int numbers = count * r, stride = basis_stride(r);
#pragma unroll 1
  for (int i = 8 * threadIdx.x; i < numbers; i += 8 * kThreads) {
    __half piece[8];
    const bool whole = i + 8 <= numbers;
    if (whole) *reinterpret_cast<uint4*>(piece) = __ldg(reinterpret_cast<const uint4*>(from + i));
    int row = i / r, column = i - row * r;
#pragma unroll
    for (int k = 0; k < 8; ++k) {
      if (i + k >= numbers) break;
      basis[row * stride + column] = whole ? piece[k] : from[i + k];
      if (++column == r) column = 0, ++row;
    }
  }
  const int pad = stride - 8 - r;
#pragma unroll 1
  for (int i = threadIdx.x; i < count * pad; i += kThreads) basis[i / pad * stride + r + i % pad] = __half(0.0f);
}

// This block's rows of the basis, in the background; zeros in the columns that pad them.
__device__ __forceinline__ void fetch(const Args& args, int first, int count, __half* basis) {
  const int stride = basis_stride(args.r), whole = args.r / 8;
  const __half* from = args.basis + static_cast<int64_t>(first) * args.r;
  if (args.r % 8) return fetch_any(from, count, args.r, basis);
  const int rows = kThreads / whole, column = threadIdx.x % whole * 8;  // of a turn; whole is at most 8
#pragma unroll 1
  for (int row = threadIdx.x / whole; row < count && threadIdx.x < rows * whole; row += rows)
    copy_async(basis + row * stride + column, from + row * args.r + column, true);
  commit_async();
}

// x̂ before its rotation, of features [first, first + count). norm: the thread's first of source.norm.
template <class X>
__device__ __forceinline__ void load(const Source& source, const Args& args, int token, int first, int count,
                                     float norm, float* scratch, float* values) {
  const int gates = source.prologue >= kSiluGate;
  const X* row = static_cast<const X*>(source.x) + static_cast<int64_t>(token) * args.n * (1 + gates);
  if (source.prologue == kRmsNorm) {
    const float value = static_cast<int>(threadIdx.x) < count ? to_float(row[first + threadIdx.x]) : 0.0f;
    const float root = root_mean_square(row, args.n, source.epsilon, scratch);
    if (static_cast<int>(threadIdx.x) < count) values[threadIdx.x] = __fdiv_rn(value, root) * norm;
#pragma unroll 1
    for (int i = threadIdx.x + kThreads; i < count; i += kThreads)
      values[i] = __fdiv_rn(to_float(row[first + i]), root) * source.norm[first + i];
    return;
  }
#pragma unroll 2
  for (int i = threadIdx.x; i < count; i += kThreads) {
    const float value = to_float(row[first + i]);
    values[i] = gates ? gated(value, to_float(row[args.n + first + i]), source.prologue == kGeluGate) : value;
  }
}

// low of the token and u in place of x̂. Every warp sums what the others found, for itself: that is sooner than to meet.
__device__ __forceinline__ void branch(const Args& args, const Places& at, int token, int rank, int blocks, int count) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, stride = basis_stride(args.r);
  const bool wide = args.rp > 32;
  // Half a warp a row, two columns a thread; past the last column: of the next row, and not used.
  float sum[2][2] = {};
  const int pair = lane % 16 * 2;
#pragma unroll 4
  for (int i = 2 * warp + lane / 16; i < count; i += 2 * kWarps) {
    const float value = at.values[i];
    const __half2* row = reinterpret_cast<const __half2*>(at.basis + i * stride + pair);
    const float2 first = __half22float2(row[0]);
    sum[0][0] = fmaf(value, first.x, sum[0][0]), sum[0][1] = fmaf(value, first.y, sum[0][1]);
    if (!wide) continue;
    const float2 second = __half22float2(row[16]);
    sum[1][0] = fmaf(value, second.x, sum[1][0]), sum[1][1] = fmaf(value, second.y, sum[1][1]);
  }
#pragma unroll
  for (int j = 0; j < 2; ++j) {
    const float even = sum[j][0] + __shfl_xor_sync(~0u, sum[j][0], 16);
    const float odd = sum[j][1] + __shfl_xor_sync(~0u, sum[j][1], 16);
    if (lane < 16) *reinterpret_cast<float2*>(at.sums + warp * kFastRank + 32 * j + pair) = make_float2(even, odd);
  }
  __syncthreads();
  cluster_wait();  // all blocks have started
  if (warp < blocks) {
    float all[2] = {};
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      all[0] += at.sums[w * kFastRank + lane];
      if (wide) all[1] += at.sums[w * kFastRank + lane + 32];
    }
    float* to = at.lows + rank * kFastRank + lane;
    box_send(to, warp, lane < args.rank ? all[0] : 0.0f, at.low_box, blocks);
    if (wide) box_send(to + 32, warp, lane + 32 < args.rank ? all[1] : 0.0f, at.low_box, blocks);
  }
  box_wait(at.low_box, blocks);
  float value[2] = {};
#pragma unroll
  for (int j = 0; j < 2; ++j) {
    if (j == 1 && !wide) break;
#pragma unroll
    for (int b = 0; b < kMostBlocks; ++b)
      if (b < blocks) value[j] += at.lows[b * kFastRank + lane + 32 * j];
  }
  float factor, inverse;
  half_factor(over_warp(max_nan(fabsf(value[0]), fabsf(value[1])), Largest()), factor, inverse);
  float* low = at.low + warp * kFastRank;  // not in place of sums: a warp that sends late still reads those
#pragma unroll
  for (int j = 0; j < 2; ++j) {
    __half lead, trail;
    split_half(value[j] * inverse, lead, trail);
    low[lane + 32 * j] = __half2float(lead) + __half2float(trail);
    if (rank == 0 && warp == 0 && lane + 32 * j < args.rp) {
      __half* to = args.low + static_cast<int64_t>(token) * 2 * args.rp + lane + 32 * j;
      to[0] = lead, to[args.rp] = trail;
      if (lane + j == 0) args.low_factor[token] = factor;
    }
  }
  __syncwarp();
  if (!args.subtract) return;
#pragma unroll 1
  for (int i = threadIdx.x; i < count; i += kThreads) {
    const uint4* row = reinterpret_cast<const uint4*>(at.basis + i * stride);
    float part = 0.0f;
#pragma unroll 4
    for (int c = 0; c < args.rank; c += 8) {
      const uint4 v = row[c / 8];
      const uint32_t words[4] = {v.x, v.y, v.z, v.w};
      const float4 lows[2] = {*reinterpret_cast<float4*>(low + c), *reinterpret_cast<float4*>(low + c + 4)};
      const float each[8] = {lows[0].x, lows[0].y, lows[0].z, lows[0].w, lows[1].x, lows[1].y, lows[1].z, lows[1].w};
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float2 pair = __half22float2(half2_of(words[j]));
        part = fmaf(each[2 * j + 1], pair.y, fmaf(each[2 * j], pair.x, part));
      }
    }
    at.values[i] = __fsub_rn(at.values[i], __fmul_rn(part, factor));
  }
  __syncthreads();
}

// `value` of all threads of a block as one, to all blocks; `which` of kRange.
template <class F>
__device__ __forceinline__ void tell(float value, F combine, const Places& at, int which, int rank, int blocks) {
  value = over_block<kWarps>(value, combine, at.sums);
  if (static_cast<int>(threadIdx.x) < blocks)
    box_send(at.ranges + rank * kRange + which, threadIdx.x, value, at.range_box, blocks);
}

template <class F>
__device__ __forceinline__ float told(F combine, const Places& at, int which, int blocks) {
  float value = at.ranges[which];
#pragma unroll 1
  for (int b = 1; b < blocks; ++b) value = combine(value, at.ranges[b * kRange + which]);
  return value;
}

// float16 over a power of two of the token.
__device__ __forceinline__ void halve(const Args& args, const Places& at, int token, int rank, int blocks, int first,
                                      int count) {
  float largest = 0.0f, factor, inverse;
#pragma unroll 1
  for (int i = threadIdx.x; i < count; i += kThreads) largest = max_nan(largest, fabsf(at.values[i]));
  tell(largest, Largest(), at, 0, rank, blocks);
  box_wait(at.range_box, blocks);
  half_factor(told(Largest(), at, 0, blocks), factor, inverse);
  __half* out = static_cast<__half*>(args.levels) + static_cast<int64_t>(token) * args.kp + first;
#pragma unroll 1
  for (int i = threadIdx.x; i < count; i += kThreads) out[i] = __float2half_rn(at.values[i] * inverse);
  if (rank == 0 && threadIdx.x == 0) args.scale[token] = factor;
}

__device__ __forceinline__ void quantize_token(const Args& args, const Places& at, int token, int rank, int blocks,
                                               int first, int count) {
  float lowest = 0.0f, highest = 0.0f;
#pragma unroll 1
  for (int i = threadIdx.x; i < count; i += kThreads) {
    lowest = min_nan(lowest, at.values[i]);
    highest = max_nan(highest, at.values[i]);
  }
  tell(lowest, Smallest(), at, 0, rank, blocks);
  tell(highest, Largest(), at, 1, rank, blocks);
  box_wait(at.range_box, blocks);
  const Quantizer q(told(Smallest(), at, 0, blocks), told(Largest(), at, 1, blocks), args.clip, args.bits);
  const float centre = q.centre(args.bits);
  int8_t* out = static_cast<int8_t*>(args.levels) + static_cast<int64_t>(token) * args.kp + first;
#pragma unroll 1
  for (int i = threadIdx.x; i < count; i += kThreads) out[i] = static_cast<int8_t>(q.byte(at.values[i], centre));
#pragma unroll 1
  for (int s = rank * kThreads + threadIdx.x; s < args.segments; s += blocks * kThreads) store_scale(args, token, s, q);
}

// Groups that lie within the block, a warp each.
__device__ __forceinline__ void quantize_groups(const Args& args, const Places& at, int token, int first, int count) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, length = args.act_group;
  const int spread = length / args.segment;  // segments of a group
  int8_t* out = static_cast<int8_t*>(args.levels) + static_cast<int64_t>(token) * args.kp + first;
#pragma unroll 1
  for (int start = warp * length; start < count; start += kWarps * length) {
    float lowest = 0.0f, highest = 0.0f;
#pragma unroll 1
    for (int i = lane; i < length; i += 32) {
      lowest = min_nan(lowest, at.values[start + i]);
      highest = max_nan(highest, at.values[start + i]);
    }
    const Quantizer q(over_warp(lowest, Smallest()), over_warp(highest, Largest()), args.clip, args.bits);
    const float centre = q.centre(args.bits);
#pragma unroll 1
    for (int i = lane; i < length; i += 32)
      out[start + i] = static_cast<int8_t>(q.byte(at.values[start + i], centre));
    const int segment = (first + start) / args.segment;
#pragma unroll 1
    for (int s = lane; s < spread; s += 32) store_scale(args, token, segment + s, q);
  }
}

// What u becomes. A kernel for each: what is not executed would still lie between what is, and instructions have to come from
// memory, too, in kernels that take turns and run once through theirs.
enum Ends { kHalves, kToken, kGroups };

// span: features of a block.
template <class X, Ends ends>
__global__ void __launch_bounds__(kThreads, 1) cluster_kernel(const Args args, const Source source, int span) {
  extern __shared__ float shared[];
  const Places at(shared, span);
  const int blocks = args.cluster, rank = cluster_rank(), token = blockIdx.x / blocks, first = rank * span;
  const int count = max(0, min(span, args.n - first));
  let_next_start();
  if (args.rank) fetch(args, first, count, at.basis);
  const bool normed = source.prologue == kRmsNorm && static_cast<int>(threadIdx.x) < count;
  const float norm = normed ? source.norm[first + threadIdx.x] : 0.0f;
  if (threadIdx.x == 0) {
    box_open(at.low_box, blocks * args.rp * static_cast<int>(sizeof(float)));
    box_open(at.range_box, blocks * (ends == kHalves ? 1 : kRange) * static_cast<int>(sizeof(float)));
  }
  cluster_arrive();
  wait_for_previous();
  load<X>(source, args, token, first, count, norm, at.sums, at.values);
  wait_async<0>();
  __syncthreads();
  if (args.hadamard) {
    hadamard_blocks(at.values, count, args.hadamard);
    const float factor = hadamard_factor(args.hadamard);
#pragma unroll 1
    for (int i = threadIdx.x; i < count; i += kThreads) at.values[i] *= factor;
    __syncthreads();
  }
  if (args.rank) {
    branch(args, at, token, rank, blocks, count);
  } else {
    cluster_wait();  // all blocks have started
  }
  if constexpr (ends == kHalves) halve(args, at, token, rank, blocks, first, count);
  if constexpr (ends == kToken) quantize_token(args, at, token, rank, blocks, first, count);
  if constexpr (ends == kGroups) quantize_groups(args, at, token, first, count);
  if (rank) return;
  using Out = std::conditional_t<ends == kHalves, __half, int8_t>;
  Out* out = static_cast<Out*>(args.levels) + static_cast<int64_t>(token) * args.kp;
#pragma unroll 1
  for (int i = args.n + threadIdx.x; i < args.kp; i += kThreads) out[i] = Out(0.0f);
}

// Features of a block: whole groups, whole rotations, whole steps.
int span_of(const Args& args) {
  int64_t unit = std::lcm(kStep, args.hadamard ? args.hadamard : 1);
  if (args.act_group < args.n && args.bits != 16) unit = std::lcm<int64_t>(unit, args.act_group);
  return static_cast<int>(std::min<int64_t>(round_up(ceil_div(args.n, args.cluster), unit), 1 << 20));
}

template <class X, Ends ends>
cudaError_t start(const Args& args, const Source& source, cudaStream_t stream) {
  const auto kernel = cluster_kernel<X, ends>;
  const size_t shared = cluster_shared(args);
  static Known known;
  const cudaError_t error = allow(kernel, shared, args.cluster > 8, known);
  if (error != cudaSuccess) return error;
  const dim3 grid(args.tokens * args.cluster);
  return launch_cluster(kernel, grid, kThreads, shared, args.cluster, stream, args, source, span_of(args));
}

}  // namespace

size_t cluster_shared(const Args& args) { return Places::bytes(span_of(args), args.rank ? args.r : 0); }

cudaError_t first_stage(const Args& args, const Source& source, cudaStream_t stream) {
  const auto pick = [&](auto wide, auto half) { return (source.half ? half : wide)(args, source, stream); };
  if (args.bits == 16) return pick(start<float, kHalves>, start<__half, kHalves>);
  if (args.act_group == args.n) return pick(start<float, kToken>, start<__half, kToken>);
  return pick(start<float, kGroups>, start<__half, kGroups>);
}

}  // namespace specquant_cuda
