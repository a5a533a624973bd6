// The first stage of few tokens in one kernel: prologue, rotation, low, subtraction and levels. A cluster of blocks takes
// a token, each block a share of its features, and they send each other their parts of low, of a range, of a maximum.
//
// The basis is on its way to shared memory before the kernels before this one are done. Arithmetic is that of the other
// first stage, value for value; only the order in which low is summed differs.
#include <algorithm>
#include <numeric>
#include <type_traits>

#include "cluster_share.cuh"
#include "hadamard.cuh"
#include "launch.h"

namespace specquant_cuda {
namespace {

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
  int8_t* out = static_cast<int8_t*>(args.levels) + static_cast<int64_t>(token) * args.kp + first;
#pragma unroll 1
  for (int i = threadIdx.x; i < count; i += kThreads) out[i] = static_cast<int8_t>(q.byte(at.values[i]));
  if (rank == 0 && threadIdx.x == 0) store_scale(args, token, 0, q);
}

// Groups that lie within the block, a warp each.
__device__ __forceinline__ void quantize_groups(const Args& args, const Places& at, int token, int first, int count) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, length = args.segment;
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
#pragma unroll 1
    for (int i = lane; i < length; i += 32) out[start + i] = static_cast<int8_t>(q.byte(at.values[start + i]));
    if (lane == 0) store_scale(args, token, (first + start) / length, q);
  }
}

// Groups of kStep features, a warp each, whose u stays in registers.
__device__ __forceinline__ void quantize_steps(const Args& args, const Places& at, int token, int first, int count,
                                               float factor) {
  const int lane = threadIdx.x % 32;
  int8_t* out = static_cast<int8_t*>(args.levels) + static_cast<int64_t>(token) * args.kp + first;
#pragma unroll 1
  for (int start = threadIdx.x / 32 * kStep; start < count; start += kWarps * kStep) {
    float u[2] = {at.values[start + lane], at.values[start + lane + 32]};
    if (args.subtract) subtract(args, at, start + lane, 32, factor, u);
    float lowest = min_nan(min_nan(0.0f, u[0]), u[1]), highest = max_nan(max_nan(0.0f, u[0]), u[1]);
#pragma unroll
    for (int d = 16; d > 0; d /= 2) {  // both at once: a shuffle takes longer than what is made of it
      lowest = min_nan(lowest, __shfl_xor_sync(~0u, lowest, d));
      highest = max_nan(highest, __shfl_xor_sync(~0u, highest, d));
    }
    const Quantizer q(lowest, highest, args.clip, args.bits);
#pragma unroll
    for (int i = 0; i < 2; ++i) out[start + lane + 32 * i] = static_cast<int8_t>(q.byte(u[i]));
    if (lane == 0) store_scale(args, token, (first + start) / kStep, q);
  }
}

// What u becomes. A kernel for each: what is not executed would still lie between what is, and instructions have to come from
// memory, too, in kernels that take turns and run once through theirs.
enum Ends { kHalves, kToken, kGroups, kSteps };

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
  float factor = 0.0f;
  if (args.rank) {
    factor = branch(args, at, token, rank, blocks, count);
  } else {
    cluster_wait();  // all blocks have started
  }
  if constexpr (ends != kSteps) {
    if (args.subtract) {
#pragma unroll 1
      for (int i = threadIdx.x; i < count; i += kThreads) {
        float u[1];
        subtract(args, at, i, 0, factor, u);
        at.values[i] = u[0];
      }
      __syncthreads();
    }
  }
  if constexpr (ends == kHalves) halve(args, at, token, rank, blocks, first, count);
  if constexpr (ends == kToken) quantize_token(args, at, token, rank, blocks, first, count);
  if constexpr (ends == kGroups) quantize_groups(args, at, token, first, count);
  if constexpr (ends == kSteps) quantize_steps(args, at, token, first, count, factor);
  if (rank) return;
  using Out = std::conditional_t<ends == kHalves, __half, int8_t>;
  Out* out = static_cast<Out*>(args.levels) + static_cast<int64_t>(token) * args.kp;
#pragma unroll 1
  for (int i = args.n + threadIdx.x; i < args.kp; i += kThreads) out[i] = Out(0.0f);
}

// Features of a block: whole groups, whole rotations, whole steps.
int span_of(const Args& args) {
  int64_t unit = std::lcm(kStep, args.hadamard ? args.hadamard : 1);
  if (args.segments > 1) unit = std::lcm<int64_t>(unit, args.segment);
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
  if (args.segments == 1) return pick(start<float, kToken>, start<__half, kToken>);
  if (args.segment == kStep) return pick(start<float, kSteps>, start<__half, kSteps>);
  return pick(start<float, kGroups>, start<__half, kGroups>);
}

}  // namespace specquant_cuda
