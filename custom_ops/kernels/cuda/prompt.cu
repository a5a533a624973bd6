// The first stage of many tokens in one pass over x: prologue, rotation, low, subtraction and levels, on compute
// capability 9.0 and later.
//
// A cluster of blocks shares the features: each block keeps its rows of the basis in shared memory and goes through 16
// tokens after another, a warp with 64 features of them in registers (prompt.cuh). The blocks tell each other their parts
// of low and of ranges, and of the next tokens' squares in the same turn. x of the next tokens is on its way meanwhile.
#include <algorithm>

#include "launch.h"
#include "prompt.cuh"

namespace specquant_cuda {
namespace {

constexpr int kMostThreads = kPromptWarps * 32;
constexpr int kResidentThreads = 65536 / 96;  // by their registers

// float16 of 16 of a token's features over a power of two, as store_levels puts levels.
__device__ __forceinline__ void store_halves(const Args& args, int token, int unit, int t, const float (&u)[16],
                                             float inverse) {
  if (token >= args.tokens) return;
  uint32_t pairs[8];
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const float2 pair = make_float2(u[2 * i] * inverse, u[2 * i + 1] * inverse);
    pairs[i] = unit * kStep + 16 * t + 2 * i < args.n ? bits_of(__floats2half2_rn(pair.x, pair.y)) : 0u;
  }
  __half* to = static_cast<__half*>(args.levels);
#pragma unroll
  for (int i = 0; i < 8; ++i)
    *reinterpret_cast<uint32_t*>(to + level_place(args, token, unit * kStep + 16 * t + 2 * i)) = pairs[i];
}

template <class X, int rank_blocks, Reads reads>
struct Prompt {
  static constexpr int kColumns = rank_blocks * kRankStep, kStride = prompt_stride(kColumns);
  const Args& args;
  const Source& source;
  PromptPlaces at;
  int warps, warp, lane, g, t, rank, unit, feature;
  const __half* rows;  // of the basis: those that this lane names in ldmatrix
  bool norm, whole;    // whole: one range for all features of a token
  int parity = 0;      // of the tile

  __device__ __forceinline__ Prompt(const Args& a, const Source& s, uint8_t* memory)
      : args(a), source(s), warps(blockDim.x / 32), warp(threadIdx.x / 32), lane(threadIdx.x % 32), g(lane / 4),
        t(lane % 4), rank(cluster_rank()), norm(reads == kValues && s.prologue == kRmsNorm),
        whole(a.bits == 16 || a.act_group == a.n) {
    PromptPlaces::take(&at, memory, warps, kColumns, a.hadamard);
    renew();
  }

  // Has the compiler work addresses out again from here on: kept for all of the loop, they would take u's registers.
  __device__ __forceinline__ void renew() {
    hold(warp), hold(lane);
    g = lane / 4, t = lane % 4;
    unit = rank * warps + warp, feature = unit * kStep + 16 * t;
    rows = at.basis + (warp * kStep + lane % 8) * kStride + lane / 8 * 8;
  }

  __device__ __forceinline__ float* found(int which, int of_warp) const {
    return at.warps_found + (which * warps + of_warp) * kPromptTokens;
  }

  // A value of tokens g and g + 8, the same in the four threads that share them, for the block to combine.
  __device__ __forceinline__ void tell(int which, const float (&value)[2]) const {
    if (t == 0) found(which, warp)[g] = value[0], found(which, warp)[g + 8] = value[1];
  }

  // Of token threadIdx.x < 16, over the block's warps.
  template <class F>
  __device__ __forceinline__ float over_warps(int which, F combine) const {
    float value = found(which, 0)[threadIdx.x];
    for (int w = 1; w < warps; ++w) value = combine(value, found(which, w)[threadIdx.x]);
    return value;
  }

  template <class F>
  __device__ __forceinline__ float over_blocks(const float* exchanged, F combine) const {
    float value = cluster_read(exchanged, 0);
    for (int b = 1; b < args.spread; ++b) value = combine(value, cluster_read(exchanged, b));
    return value;
  }

  __device__ __forceinline__ void rotate(float (&u)[2][16]) const {
    float* mine = at.sums + g * at.values_stride + warp * kStep + 16 * t;
    const float factor = hadamard_factor(args.hadamard);
#pragma unroll
    for (int i = 0; i < 32; ++i) mine[i / 16 * 8 * at.values_stride + i % 16] = u[i / 16][i % 16];
    __syncthreads();
    hadamard_blocks(at.sums, warps * kStep, args.hadamard, kPromptTokens, at.values_stride);
#pragma unroll
    for (int i = 0; i < 32; ++i) u[i / 16][i % 16] = mine[i / 16 * 8 * at.values_stride + i % 16] * factor;
    __syncthreads();  // sums take its place
  }

  // Parts of low, and of the next tokens' squares, to where the other blocks read them, and what comes of all.
  __device__ __forceinline__ void meet(const float (&sum)[rank_blocks ? rank_blocks * 4 : 1][4], int token, bool squares) {
    float* shares = at.shares + parity * kPromptTokens * kColumns;
    if constexpr (rank_blocks > 0) {
#pragma unroll
      for (int i = 0; i < rank_blocks * 8; ++i)
        *reinterpret_cast<float2*>(at.sums + (warp * kPromptTokens + g + i % 2 * 8) * kStride + i / 2 * 8 + 2 * t) =
            make_float2(sum[i / 2][i % 2 * 2], sum[i / 2][i % 2 * 2 + 1]);
    }
    __syncthreads();
    if constexpr (rank_blocks > 0) {
      for (int i = threadIdx.x; i < kPromptTokens * kColumns; i += warps * 32) {
        const float* from = at.sums + i / kColumns * kStride + i % kColumns;
        float all = 0.0f;
        for (int w = 0; w < warps; ++w) all += from[w * kPromptTokens * kStride];
        shares[i] = i % kColumns < args.rank ? all : 0.0f;
      }
    }
    if (squares && threadIdx.x < kPromptTokens)
      at.squares[parity * kPromptTokens + threadIdx.x] = over_warps(0, Sum());
    cluster_arrive();
    cluster_wait();
    if (squares && threadIdx.x < kPromptTokens) {
      const float all = over_blocks(at.squares + parity * kPromptTokens + threadIdx.x, Sum());
      at.root[threadIdx.x] = __fsqrt_rn(all / static_cast<float>(args.n) + source.epsilon);
    }
    if constexpr (rank_blocks > 0)
      for (int row = warp; row < kPromptTokens; row += warps) finish_low(shares + row * kColumns, token + row, row);
    __syncthreads();
  }

  // low of a token, by a warp: in two float16 numbers, here and for the second stage.
  __device__ __forceinline__ void finish_low(const float* shares, int token, int row) const {
    float low[rank_blocks ? rank_blocks : 1], largest = 0.0f, factor, inverse;
#pragma unroll
    for (int b = 0; b < rank_blocks; ++b) {
      low[b] = over_blocks(shares + 32 * b + lane, Sum());
      largest = max_nan(largest, fabsf(low[b]));
    }
    half_factor(over_warp(largest, Largest()), factor, inverse);
    const bool stores = rank == 0 && token < args.tokens;
    __half* to = args.low + static_cast<int64_t>(token) * 2 * kColumns + lane;
#pragma unroll
    for (int b = 0; b < rank_blocks; ++b) {
      __half parts[2];
      split_half(low[b] * inverse, parts[0], parts[1]);
#pragma unroll
      for (int part = 0; part < 2; ++part) {
        at.low[(part * kPromptTokens + row) * kStride + 32 * b + lane] = parts[part];
        if (stores) to[part * kColumns + 32 * b] = parts[part];
      }
    }
    if (lane == 0) at.factor[row] = factor;
    if (lane == 0 && stores) args.low_factor[token] = factor;
  }

  // Of whole tokens: where two kernels of other first stages would read x again.
  __device__ __forceinline__ void levels_of_tokens(const float (&u)[2][16], int token, bool inside) {
    Range range[2];
    float ends[2][2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
#pragma unroll
      for (int i = 0; i < 16; ++i) range[h].add(u[h][i], u[h][i]);
      range[h].meet();
      ends[0][h] = range[h].lowest, ends[1][h] = range[h].highest;
    }
    tell(1, ends[0]);
    tell(2, ends[1]);
    __syncthreads();
    const int mine = parity * kPromptTokens + threadIdx.x;
    if (threadIdx.x < kPromptTokens)
      at.lowest[mine] = over_warps(1, Smallest()), at.highest[mine] = over_warps(2, Largest());
    cluster_arrive();
    cluster_wait();
    if (threadIdx.x < kPromptTokens) {
      const float low = over_blocks(at.lowest + mine, Smallest()), high = over_blocks(at.highest + mine, Largest());
      Quantizer q(low, high, args.clip, args.bits);
      if (args.bits == 16) half_factor(max_nan(-low, high), q.scale, q.inverse);
      at.quantizer[threadIdx.x] = q;
    }
    __syncthreads();
    if (args.bits == 16) {
      const int row = threadIdx.x;
      if (rank == 0 && row < kPromptTokens && token + row < args.tokens)
        args.scale[token + row] = at.quantizer[row].scale;
    } else {
      const int segments = args.segments * kPromptTokens;
      for (int i = rank * warps * 32 + threadIdx.x; i < segments; i += args.spread * warps * 32)
        if (token + i % kPromptTokens < args.tokens)
          store_scale(args, token + i % kPromptTokens, i / kPromptTokens, at.quantizer[i % kPromptTokens]);
    }
    if (!inside) return;
    renew();
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const Quantizer q = at.quantizer[g + 8 * h];
      if (args.bits == 16) {
        store_halves(args, token + g + 8 * h, unit, t, u[h], q.inverse);
      } else {
        store_levels(args, token + g + 8 * h, unit, t, u[h], q);
      }
    }
  }

  // Of groups of 64.
  __device__ __forceinline__ void levels_of_groups(const float (&u)[2][16], int token, bool inside) const {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      Range range;
#pragma unroll
      for (int i = 0; i < 16; ++i) range.add(u[h][i], u[h][i]);
      range.meet();
      const Quantizer q(range.lowest, range.highest, args.clip, args.bits);
      if (!inside) continue;
      store_levels(args, token + g + 8 * h, unit, t, u[h], q);
      if (t == 0 && token + g + 8 * h < args.tokens) store_scale(args, token + g + 8 * h, unit, q);
    }
  }

  __device__ __forceinline__ void run() {
    const int step = gridDim.x / args.spread * kPromptTokens;
    int token = blockIdx.x / args.spread * kPromptTokens;
    const bool inside = unit * kStep < args.kp;
    if (args.rank) fetch_basis(args, rank * warps * kStep, warps * kStep, at.basis);
    wait_for_previous();
    Raw<X, reads> raw;
    raw.load(args, source, token + g, feature);
    float sums[rank_blocks ? rank_blocks * 4 : 1][4];
    float squares[2];
    if (norm) {
      raw.squares(squares);
      tell(0, squares);
      __syncthreads();
      if (threadIdx.x < kPromptTokens) at.squares[kPromptTokens + threadIdx.x] = over_warps(0, Sum());
      cluster_arrive();
      cluster_wait();
      if (threadIdx.x < kPromptTokens) {
        const float all = over_blocks(at.squares + kPromptTokens + threadIdx.x, Sum());
        at.root[threadIdx.x] = __fsqrt_rn(all / static_cast<float>(args.n) + source.epsilon);
      }
    }
    __syncthreads();  // the basis, too
    for (; token < args.tokens; token += step, parity ^= 1) {
      renew();
      float u[2][16];
      const float roots[2] = {norm ? at.root[g] : 0.0f, norm ? at.root[g + 8] : 0.0f};
      raw.values(args, source, feature, roots, u);
      const bool more = token + step < args.tokens;
      if (more && reads != kGates) raw.load(args, source, token + step + g, feature);
      if (args.hadamard) rotate(u);
      if constexpr (rank_blocks > 0) project<rank_blocks, reads == kExact>(u, rows, sums);
      renew();
      if (norm && more) {
        raw.squares(squares);
        tell(0, squares);
      }
      if (rank_blocks > 0 || (norm && more)) meet(sums, token, norm && more);
      renew();
      if (more && reads == kGates) raw.load(args, source, token + step + g, feature);  // twice the registers
      if constexpr (rank_blocks > 0) {
        const float factor[2] = {at.factor[g], at.factor[g + 8]};
        if (args.subtract) subtract_low<rank_blocks>(u, rows, at.low, factor, g, t);
      }
      renew();
      if (whole) {
        levels_of_tokens(u, token, inside);
      } else {
        levels_of_groups(u, token, inside);
      }
    }
    cluster_arrive();  // none ends while another reads from it
    cluster_wait();
  }
};

template <class X, int rank_blocks, Reads reads>
__global__ void __launch_bounds__(kMostThreads, 1) prompt_kernel(const Args args, const Source source) {
#if __CUDA_ARCH__ >= 900 || !defined(__CUDA_ARCH__)  // empty where there are no clusters
  extern __shared__ __align__(16) uint8_t memory[];
  let_next_start();
  Prompt<X, rank_blocks, reads>(args, source, memory).run();
#endif
}

template <class X, int rank_blocks, Reads reads>
cudaError_t start(const Args& args, const Source& source, int multiprocessors, cudaStream_t stream) {
  const auto kernel = prompt_kernel<X, rank_blocks, reads>;
  const size_t shared = prompt_shared(args);
  cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared));
  if (error == cudaSuccess && args.spread > 8)
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
  if (error != cudaSuccess) return error;
  // As many clusters as run at once, and each as many tokens as the others.
  const int tiles = ceil_div(args.tokens, kPromptTokens), threads = args.units * 32;
  const int each = std::max<int>(1, std::min<int>(kSharedHopper / (shared + 1024), kResidentThreads / threads));
  const int rounds = ceil_div(tiles, std::max(1, multiprocessors * each / args.spread));
  const dim3 grid(ceil_div(tiles, rounds) * args.spread);
  return launch_cluster(kernel, grid, threads, shared, args.spread, stream, args, source);
}

template <class X, Reads reads>
cudaError_t start_rank(const Args& args, const Source& source, int multiprocessors, cudaStream_t stream) {
  switch (args.rp / kRankStep) {
    case 0: return start<X, 0, reads>(args, source, multiprocessors, stream);
    case 1: return start<X, 1, reads>(args, source, multiprocessors, stream);
    default: return start<X, 2, reads>(args, source, multiprocessors, stream);
  }
}

}  // namespace

size_t prompt_shared(const Args& args) {
  return PromptPlaces::take(nullptr, nullptr, args.units, args.rp, args.hadamard > 0);
}

cudaError_t prompt(const Args& args, const Source& source, int multiprocessors, cudaStream_t stream) {
  const bool gates = source.prologue >= kSiluGate, exact = !source.prologue && !args.hadamard;
  const auto pick = [&](auto run) { return run(args, source, multiprocessors, stream); };
  if (!source.half) return gates ? pick(start_rank<float, kGates>) : pick(start_rank<float, kValues>);
  return gates ? pick(start_rank<__half, kGates>)
               : exact ? pick(start_rank<__half, kExact>) : pick(start_rank<__half, kValues>);
}

}  // namespace specquant_cuda
