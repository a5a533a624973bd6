// The first stage of few tokens in one kernel: prologue, rotation, low, subtraction and levels. A cluster of blocks takes
// a token, each block a share of its features, and they tell each other their parts of low, of a range, of a maximum.
//
// The basis is on its way to shared memory before the kernels before this one are done. Arithmetic is that of the other
// first stage, value for value; only the order in which low is summed differs.
#include <algorithm>
#include <numeric>

#include "cluster.cuh"
#include "hadamard.cuh"
#include "launch.h"
#include "prologue.cuh"

namespace specquant_cuda {
namespace {

constexpr int kThreads = kNormThreads;
constexpr int kWarps = kThreads / 32;
constexpr int kExchanged = kFastRank + 4;  // floats that other blocks read: low, range, maximum

// Rows of the basis in shared memory: 16 bytes more than its columns, so that no two rows' start meets in a bank.
__host__ __device__ constexpr int basis_stride(int r) { return (r + 7) / 8 * 8 + 8; }

// Shared memory of one block, in floats: what is exchanged, sums of warps, low, values, basis.
struct Places {
  float *exchange, *sums, *low, *values;
  __half* basis;
  __device__ __forceinline__ Places(float* shared, int span)
      : exchange(shared), sums(exchange + kExchanged), low(sums + kWarps * kFastRank), values(low + kFastRank),
        basis(reinterpret_cast<__half*>(values + span)) {}
  static size_t bytes(int span, int r) {
    const size_t floats = kExchanged + (kWarps + 1) * kFastRank + span;
    return floats * sizeof(float) + (r ? (static_cast<size_t>(span) * basis_stride(r) + kFastRank) * sizeof(__half) : 0);
  }
};

// This block's rows of the basis, in the background; zeros in the columns that pad them.
__device__ __forceinline__ void fetch(const Args& args, int first, int count, __half* basis) {
  const int stride = basis_stride(args.r), whole = args.r / 8;
  if (args.r % 8 == 0) {
    const int rows = kThreads / whole, column = threadIdx.x % whole * 8;  // of a turn; whole is at most 8
    for (int row = threadIdx.x / whole; row < count && threadIdx.x < rows * whole; row += rows)
      copy_async(basis + row * stride + column, args.basis + static_cast<int64_t>(first + row) * args.r + column, true);
    commit_async();
    return;
  }
  const int lane = threadIdx.x % 32;
  for (int row = threadIdx.x / 32; row < count; row += kWarps)
    for (int column = lane; column < stride - 8; column += 32)
      basis[row * stride + column] =
          column < args.r ? args.basis[static_cast<int64_t>(first + row) * args.r + column] : __half(0.0f);
}

// x̂ before its rotation, of features [first, first + count).
template <class X>
__device__ __forceinline__ void load(const Source& source, const Args& args, int token, int first, int count,
                                     float* scratch, float* values) {
  const int gates = source.prologue >= kSiluGate;
  const X* row = static_cast<const X*>(source.x) + static_cast<int64_t>(token) * args.n * (1 + gates);
  if (source.prologue == kRmsNorm) {
    const float root = root_mean_square(row, args.n, source.epsilon, scratch);
    for (int i = threadIdx.x; i < count; i += kThreads)
      values[i] = __fdiv_rn(to_float(row[first + i]), root) * source.norm[first + i];
    return;
  }
  for (int i = threadIdx.x; i < count; i += kThreads) {
    const float value = to_float(row[first + i]);
    values[i] = gates ? gated(value, to_float(row[args.n + first + i]), source.prologue == kGeluGate) : value;
  }
}

// low of the token and u in place of x̂.
__device__ __forceinline__ void branch(const Args& args, const Places& at, int token, int rank, int blocks, int count) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, stride = basis_stride(args.r);
  float sum[2] = {};
#pragma unroll 4
  for (int i = warp; i < count; i += kWarps) {
    const float value = at.values[i];
    const __half* row = at.basis + i * stride + lane;  // past the last column: of the next row, and not used
    sum[0] = fmaf(value, __half2float(row[0]), sum[0]);
    if (args.r > 32) sum[1] = fmaf(value, __half2float(row[32]), sum[1]);
  }
  at.sums[warp * kFastRank + lane] = sum[0], at.sums[warp * kFastRank + lane + 32] = sum[1];
  __syncthreads();
  if (threadIdx.x < args.rp) {
    float all = 0.0f;
    for (int w = 0; w < kWarps; ++w) all += at.sums[w * kFastRank + threadIdx.x];
    at.exchange[threadIdx.x] = static_cast<int>(threadIdx.x) < args.rank ? all : 0.0f;
  }
  cluster_arrive();
  cluster_wait();
  if (threadIdx.x < args.rp) {
    float all = 0.0f;
    for (int b = 0; b < blocks; ++b) all += cluster_read(at.exchange + threadIdx.x, b);
    at.low[threadIdx.x] = all;
  }
  __syncthreads();
  const float second = args.rp > 32 ? fabsf(at.low[lane + 32]) : 0.0f;
  float factor, inverse;
  half_factor(over_warp(max_nan(fabsf(at.low[lane]), second), Largest()), factor, inverse);
  __syncthreads();
  if (threadIdx.x < args.rp) {
    __half lead, trail;
    split_half(at.low[threadIdx.x] * inverse, lead, trail);
    at.low[threadIdx.x] = __half2float(lead) + __half2float(trail);
    if (rank == 0) {
      __half* to = args.low + static_cast<int64_t>(token) * 2 * args.rp + threadIdx.x;
      to[0] = lead, to[args.rp] = trail;
      if (threadIdx.x == 0) args.low_factor[token] = factor;
    }
  }
  __syncthreads();
  if (!args.subtract) return;
  for (int i = threadIdx.x; i < count; i += kThreads) {
    const uint4* row = reinterpret_cast<const uint4*>(at.basis + i * stride);
    float part = 0.0f;
    for (int c = 0; c < args.rank; c += 8) {
      const uint4 v = row[c / 8];
      const uint32_t words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float2 pair = __half22float2(half2_of(words[j])), low = *reinterpret_cast<float2*>(at.low + c + 2 * j);
        part = fmaf(low.y, pair.y, fmaf(low.x, pair.x, part));
      }
    }
    at.values[i] = __fsub_rn(at.values[i], __fmul_rn(part, factor));
  }
  __syncthreads();
}

// `value` of all threads of the cluster as one; `place` is one of the exchanged.
template <class F>
__device__ __forceinline__ float over_cluster(float value, F combine, const Places& at, int place) {
  value = over_block<kWarps>(value, combine, at.sums);
  if (threadIdx.x == 0) at.exchange[kFastRank + place] = value;
  return value;
}

template <class F>
__device__ __forceinline__ float met(F combine, const Places& at, int place, int blocks) {
  float value = cluster_read(at.exchange + kFastRank + place, 0);
  for (int b = 1; b < blocks; ++b) value = combine(value, cluster_read(at.exchange + kFastRank + place, b));
  return value;
}

// float16 over a power of two of the token.
__device__ __forceinline__ void halve(const Args& args, const Places& at, int token, int rank, int blocks, int first,
                                      int count) {
  float largest = 0.0f, factor, inverse;
  for (int i = threadIdx.x; i < count; i += kThreads) largest = max_nan(largest, fabsf(at.values[i]));
  over_cluster(largest, Largest(), at, 2);
  cluster_arrive();
  cluster_wait();
  half_factor(met(Largest(), at, 2, blocks), factor, inverse);
  __half* out = static_cast<__half*>(args.levels) + static_cast<int64_t>(token) * args.kp + first;
  for (int i = threadIdx.x; i < count; i += kThreads) out[i] = __float2half_rn(at.values[i] * inverse);
  if (rank == 0 && threadIdx.x == 0) args.scale[token] = factor;
}

__device__ __forceinline__ void quantize_token(const Args& args, const Places& at, int token, int rank, int blocks,
                                               int first, int count) {
  float lowest = 0.0f, highest = 0.0f;
  for (int i = threadIdx.x; i < count; i += kThreads) {
    lowest = min_nan(lowest, at.values[i]);
    highest = max_nan(highest, at.values[i]);
  }
  over_cluster(lowest, Smallest(), at, 0);
  over_cluster(highest, Largest(), at, 1);
  cluster_arrive();
  cluster_wait();
  const Quantizer q(met(Smallest(), at, 0, blocks), met(Largest(), at, 1, blocks), args.clip, args.bits);
  const float centre = q.centre(args.bits);
  int8_t* out = static_cast<int8_t*>(args.levels) + static_cast<int64_t>(token) * args.kp + first;
  for (int i = threadIdx.x; i < count; i += kThreads) out[i] = static_cast<int8_t>(q.byte(at.values[i], centre));
  for (int s = rank * kThreads + threadIdx.x; s < args.segments; s += blocks * kThreads) store_scale(args, token, s, q);
}

// Groups that lie within the block, a warp each.
__device__ __forceinline__ void quantize_groups(const Args& args, const Places& at, int token, int first, int count) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, length = args.act_group;
  const int spread = length / args.segment;  // segments of a group
  int8_t* out = static_cast<int8_t*>(args.levels) + static_cast<int64_t>(token) * args.kp + first;
  for (int start = warp * length; start < count; start += kWarps * length) {
    float lowest = 0.0f, highest = 0.0f;
    for (int i = lane; i < length; i += 32) {
      lowest = min_nan(lowest, at.values[start + i]);
      highest = max_nan(highest, at.values[start + i]);
    }
    const Quantizer q(over_warp(lowest, Smallest()), over_warp(highest, Largest()), args.clip, args.bits);
    const float centre = q.centre(args.bits);
    for (int i = lane; i < length; i += 32)
      out[start + i] = static_cast<int8_t>(q.byte(at.values[start + i], centre));
    const int segment = (first + start) / args.segment;
    for (int s = lane; s < spread; s += 32) store_scale(args, token, segment + s, q);
  }
}

// span: features of a block.
template <class X>
__global__ void __launch_bounds__(kThreads) cluster_kernel(const Args args, const Source source, int span) {
  extern __shared__ float shared[];
  const Places at(shared, span);
  const int blocks = args.cluster, rank = cluster_rank(), token = blockIdx.x / blocks, first = rank * span;
  const int count = max(0, min(span, args.n - first));
  let_next_start();
  if (args.rank) fetch(args, first, count, at.basis);
  wait_for_previous();
  load<X>(source, args, token, first, count, at.sums, at.values);
  wait_async<0>();
  __syncthreads();
  if (args.hadamard) {
    hadamard_blocks(at.values, count, args.hadamard);
    const float factor = hadamard_factor(args.hadamard);
    for (int i = threadIdx.x; i < count; i += kThreads) at.values[i] *= factor;
    __syncthreads();
  }
  if (args.rank) branch(args, at, token, rank, blocks, count);
  if (args.bits == 16) {
    halve(args, at, token, rank, blocks, first, count);
  } else if (args.act_group == args.n) {
    quantize_token(args, at, token, rank, blocks, first, count);
  } else {
    quantize_groups(args, at, token, first, count);
  }
  cluster_arrive();  // none ends while another reads from it
  if (rank == 0 && args.bits == 16) {
    __half* out = static_cast<__half*>(args.levels) + static_cast<int64_t>(token) * args.kp;
    for (int i = args.n + threadIdx.x; i < args.kp; i += kThreads) out[i] = __half(0.0f);
  } else if (rank == 0) {
    int8_t* out = static_cast<int8_t*>(args.levels) + static_cast<int64_t>(token) * args.kp;
    for (int i = args.n + threadIdx.x; i < args.kp; i += kThreads) out[i] = 0;
  }
  cluster_wait();
}

// Features of a block: whole groups, whole rotations, whole steps.
int span_of(const Args& args) {
  int64_t unit = std::lcm(kStep, args.hadamard ? args.hadamard : 1);
  if (args.act_group < args.n && args.bits != 16) unit = std::lcm<int64_t>(unit, args.act_group);
  return static_cast<int>(std::min<int64_t>(round_up(ceil_div(args.n, args.cluster), unit), 1 << 20));
}

template <class X>
cudaError_t start(const Args& args, const Source& source, cudaStream_t stream) {
  const auto kernel = cluster_kernel<X>;
  const size_t shared = cluster_shared(args);
  cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared));
  if (error == cudaSuccess && args.cluster > 8)
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
  if (error != cudaSuccess) return error;
  const dim3 grid(args.tokens * args.cluster);
  return launch_cluster(kernel, grid, kThreads, shared, args.cluster, stream, args, source, span_of(args));
}

}  // namespace

size_t cluster_shared(const Args& args) { return Places::bytes(span_of(args), args.rank ? args.r : 0); }

cudaError_t first_stage(const Args& args, const Source& source, cudaStream_t stream) {
  return source.half ? start<__half>(args, source, stream) : start<float>(args, source, stream);
}

}  // namespace specquant_cuda
