// What a block of `cluster` holds and does of its share of a token's features: the basis on its way, x̂, low and u.
#pragma once

#include "cluster.cuh"
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
  for (int i = 8 * threadIdx.x; i < numbers; i += 32 * kThreads) {
    uint4 pieces[4];  // under way together
#pragma unroll
    for (int j = 0; j < 4; ++j)
      if (i + 8 * (j * kThreads + 1) <= numbers) pieces[j] = __ldg(reinterpret_cast<const uint4*>(from + i) + j * kThreads);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int at = i + 8 * j * kThreads;
      const bool whole = at + 8 <= numbers;
      const __half* piece = reinterpret_cast<const __half*>(pieces + j);
      int row = at / r, column = at - row * r;
#pragma unroll
      for (int k = 0; k < 8; ++k) {
        if (at + k >= numbers) break;
        basis[row * stride + column] = whole ? piece[k] : from[at + k];
        if (++column == r) column = 0, ++row;
      }
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
  const X* row = static_cast<const X*>(source.x) + static_cast<int64_t>(token) * args.n;
  if (source.prologue == kRmsNorm) {
    const float value = static_cast<int>(threadIdx.x) < count ? to_float(row[first + threadIdx.x]) : 0.0f;
    const float inverse = inverse_rms(row, args.n, source.epsilon, scratch);
    if (static_cast<int>(threadIdx.x) < count) values[threadIdx.x] = value * inverse * norm;
#pragma unroll 1
    for (int i = threadIdx.x + kThreads; i < count; i += kThreads)
      values[i] = to_float(row[first + i]) * inverse * source.norm[first + i];
    return;
  }
#pragma unroll 2
  for (int i = threadIdx.x; i < count; i += kThreads) values[i] = to_float(row[first + i]);
}

// low of the token, over the factor that this returns, at `low` of every warp. Every warp sums what the others found, for
// itself: that is sooner than to meet.
__device__ __forceinline__ float branch(const Args& args, const Places& at, int token, int rank, int blocks, int count) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, stride = basis_stride(args.r);
  const bool wide = args.rp > 32;
  // A quarter of a warp a row, four columns a thread; past the last column: of the next row, and not used.
  float sum[2][4] = {};
  const int four = lane % 8 * 4;
#pragma unroll 4
  for (int i = 4 * warp + lane / 8; i < count; i += 4 * kWarps) {
    const float value = at.values[i];
    const uint2* row = reinterpret_cast<const uint2*>(at.basis + i * stride + four);
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      if (j == 1 && !wide) break;
      const uint2 raw = row[8 * j];
      const float2 first = __half22float2(half2_of(raw.x)), second = __half22float2(half2_of(raw.y));
      sum[j][0] = fmaf(value, first.x, sum[j][0]), sum[j][1] = fmaf(value, first.y, sum[j][1]);
      sum[j][2] = fmaf(value, second.x, sum[j][2]), sum[j][3] = fmaf(value, second.y, sum[j][3]);
    }
  }
#pragma unroll
  for (int j = 0; j < 2; ++j) {
    if (j == 1 && !wide) break;
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      sum[j][k] += __shfl_xor_sync(~0u, sum[j][k], 8);
      sum[j][k] += __shfl_xor_sync(~0u, sum[j][k], 16);
    }
    if (lane < 8)
      *reinterpret_cast<float4*>(at.sums + warp * kFastRank + 32 * j + four) =
          make_float4(sum[j][0], sum[j][1], sum[j][2], sum[j][3]);
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
  return factor;
}

// u of so many features, `apart` from each other.
template <int count>
__device__ __forceinline__ void subtract(const Args& args, const Places& at, int feature, int apart, float factor,
                                         float (&u)[count]) {
  const float* low = at.low + threadIdx.x / 32 * kFastRank;
  const __half* rows = at.basis + feature * basis_stride(args.r);
  float parts[count] = {};
#pragma unroll 4
  for (int c = 0; c < args.rank; c += 8) {
    const float4 lows[2] = {*reinterpret_cast<const float4*>(low + c), *reinterpret_cast<const float4*>(low + c + 4)};
    const float each[8] = {lows[0].x, lows[0].y, lows[0].z, lows[0].w, lows[1].x, lows[1].y, lows[1].z, lows[1].w};
#pragma unroll
    for (int i = 0; i < count; ++i) {
      const uint4 v = *reinterpret_cast<const uint4*>(rows + i * apart * basis_stride(args.r) + c);
      const uint32_t words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float2 pair = __half22float2(half2_of(words[j]));
        parts[i] = fmaf(each[2 * j + 1], pair.y, fmaf(each[2 * j], pair.x, parts[i]));
      }
    }
  }
#pragma unroll
  for (int i = 0; i < count; ++i) u[i] = __fsub_rn(at.values[feature + i * apart], __fmul_rn(parts[i], factor));
}

}  // namespace
}  // namespace specquant_cuda
