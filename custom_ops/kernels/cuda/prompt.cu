// The first stage of many tokens in one pass over x: prologue, rotation, low, subtraction and levels, on compute
// capability 9.0 and later.
//
// A cluster of blocks shares the features: each block keeps its rows of the basis in shared memory and goes through 16
// tokens after another, a warp with 64 features of them in registers (prompt.cuh). The blocks read each other's parts of
// squares, of low and of ranges.
#include <algorithm>

#include "launch.h"
#include "prompt.cuh"

namespace specquant_cuda {
namespace {

constexpr int kMostThreads = kPromptWarps * 32, kFewThreads = 448;

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

  // What the warps told of a token, as one.
  template <class F>
  __device__ __forceinline__ float of_warps(int which, int row, F combine) const {
    float value = found(which, 0)[row];
#pragma unroll 4
    for (int w = 1; w < warps; ++w) value = combine(value, found(which, w)[row]);
    return value;
  }

  // What lies at a place of all blocks' memory as one, in their order. 0 must not matter.
  template <class F>
  __device__ __forceinline__ float of_blocks(const float* exchanged, F combine) const {
    float all = 0.0f;
    int b = 0;
    for (; b + 8 <= args.spread; b += 8) {
      float value[8];
#pragma unroll
      for (int i = 0; i < 8; ++i) value[i] = cluster_read(exchanged, b + i);
#pragma unroll
      for (int i = 0; i < 8; ++i) all = combine(all, value[i]);
    }
    for (; b < args.spread; ++b) all = combine(all, cluster_read(exchanged, b));
    return all;
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

  // Roots of the tokens' mean squares.
  __device__ __forceinline__ void find_roots(const Raw<X, reads>& raw) const {
    float squares[2];
    raw.squares(squares);
    tell(0, squares);
    __syncthreads();
    float* offered = at.squares + parity * kPromptTokens + lane;
    const bool mine = warp == 0 && lane < kPromptTokens;
    if (mine) *offered = of_warps(0, lane, Sum());
    cluster_release();
    cluster_wait();
    if (mine) at.roots[lane] = Root::of(of_blocks(offered, Sum()), args.n, source.epsilon);
    __syncthreads();
  }

  // low, from the warps' parts of it.
  __device__ __forceinline__ void add_up(const float (&sum)[rank_blocks ? rank_blocks * 4 : 1][4], int token) const {
    float* shares = at.shares + parity * kPromptTokens * kColumns;
    const auto place = [](int row, int column) { return row * kColumns + (column ^ row % 4 * 8); };  // in other banks
#pragma unroll
    for (int i = 0; i < rank_blocks * 8; ++i)
      *reinterpret_cast<float2*>(at.sums + warp * kPromptTokens * kColumns + place(g + i % 2 * 8, i / 2 * 8 + 2 * t)) =
          make_float2(sum[i / 2][i % 2 * 2], sum[i / 2][i % 2 * 2 + 1]);
    __syncthreads();
    for (int i = threadIdx.x; i < kPromptTokens * kColumns; i += warps * 32) {
      const float* from = at.sums + place(i / kColumns, i % kColumns);
      float all = 0.0f;
#pragma unroll 4
      for (int w = 0; w < warps; ++w) all += from[w * kPromptTokens * kColumns];
      shares[i] = i % kColumns < args.rank ? all : 0.0f;
    }
    cluster_release();
    cluster_wait();
    for (int row = warp; row < kPromptTokens; row += warps) finish_low(shares + row * kColumns, token + row, row);
    __syncthreads();
  }

  // low of a token, by a warp: in two float16 numbers, here and for the second stage.
  __device__ __forceinline__ void finish_low(const float* shares, int token, int row) const {
    float low[rank_blocks ? rank_blocks : 1], largest = 0.0f, factor, inverse;
#pragma unroll
    for (int b = 0; b < rank_blocks; ++b) {
      low[b] = of_blocks(shares + 32 * b + lane, Sum());
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
    float *low = at.lowest + parity * kPromptTokens + lane, *high = at.highest + parity * kPromptTokens + lane;
    const bool mine = warp == 0 && lane < kPromptTokens;
    if (mine) *low = of_warps(1, lane, Smallest()), *high = of_warps(2, lane, Largest());
    cluster_release();
    cluster_wait();
    if (mine) {
      const float lowest = of_blocks(low, Smallest()), highest = of_blocks(high, Largest());
      Quantizer q(lowest, highest, args.clip, args.bits);
      if (args.bits == 16) half_factor(max_nan(-lowest, highest), q.scale, q.inverse);
      at.quantizer[lane] = q;
      if (token + lane < args.tokens && args.bits == 16 && rank == 0) args.scale[token + lane] = q.scale;
      if (token + lane < args.tokens && args.bits != 16)
        for (int s = rank; s < args.segments; s += args.spread) store_scale(args, token + lane, s, q);
    }
    __syncthreads();
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
    const bool inside = unit * kStep < args.kp;
    if (args.rank) fetch_basis(args, rank * warps * kStep, warps * kStep, at.basis);
    __syncthreads();
    wait_for_previous();
    for (int token = blockIdx.x / args.spread * kPromptTokens; token < args.tokens; token += step, parity ^= 1) {
      renew();
      float u[2][16];
      {
        Raw<X, reads> raw;
        raw.load(args, source, token + g, feature);
        Raw<X, reads>::prefetch_ahead(args, source, token + step + g, feature);
        Root roots[2] = {};
        if (norm) {
          find_roots(raw);
          roots[0] = at.roots[g], roots[1] = at.roots[g + 8];
        }
        raw.values(args, source, feature, roots, u);
      }
      if (args.hadamard) rotate(u);
      renew();
      if constexpr (rank_blocks > 0) {
        float sums[rank_blocks * 4][4];
        project<rank_blocks, reads == kExact>(u, rows, sums);
        add_up(sums, token);
        renew();
        const float factor[2] = {at.factor[g], at.factor[g + 8]};
        if (args.subtract) subtract_low<rank_blocks>(u, rows, at.low, factor, g, t);
        renew();
      }
      if (whole) {
        levels_of_tokens(u, token, inside);
      } else {
        levels_of_groups(u, token, inside);
      }
    }
    cluster_release();  // none ends while another reads from it
    cluster_wait();
  }
};

// most: threads. Two blocks of few share a multiprocessor: one works where the other waits.
template <class X, int rank_blocks, Reads reads, int most>
__global__ void __launch_bounds__(most, most > kFewThreads ? 1 : 2) prompt_kernel(const Args args, const Source source) {
#if __CUDA_ARCH__ >= 900 || !defined(__CUDA_ARCH__)  // empty where there are no clusters
  extern __shared__ __align__(16) uint8_t memory[];
  let_next_start();
  Prompt<X, rank_blocks, reads>(args, source, memory).run();
#endif
}

template <class X, int rank_blocks, Reads reads, int most>
cudaError_t start(const Args& args, const Source& source, cudaStream_t stream) {
  const auto kernel = prompt_kernel<X, rank_blocks, reads, most>;
  const size_t shared = prompt_shared(args);
  const int threads = args.units * 32;
  cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared));
  if (error == cudaSuccess && args.spread > 8)
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
  int clusters = 1;  // that run at once: each takes as many tokens as the others
  if (error == cudaSuccess) error = count_clusters(kernel, threads, shared, args.spread, clusters);
  if (error != cudaSuccess) return error;
  const int tiles = ceil_div(args.tokens, kPromptTokens), rounds = ceil_div(tiles, std::max(1, clusters));
  const dim3 grid(ceil_div(tiles, rounds) * args.spread);
  return launch_cluster(kernel, grid, threads, shared, args.spread, stream, args, source);
}

template <class X, Reads reads, int most>
cudaError_t start_rank(const Args& args, const Source& source, cudaStream_t stream) {
  switch (args.rp / kRankStep) {
    case 0: return start<X, 0, reads, most>(args, source, stream);
    case 1: return start<X, 1, reads, most>(args, source, stream);
    default: return start<X, 2, reads, most>(args, source, stream);
  }
}

template <class X, Reads reads>
cudaError_t start_threads(const Args& args, const Source& source, cudaStream_t stream) {
  return args.units * 32 <= kFewThreads ? start_rank<X, reads, kFewThreads>(args, source, stream)
                                        : start_rank<X, reads, kMostThreads>(args, source, stream);
}

}  // namespace

size_t prompt_shared(const Args& args) {
  return PromptPlaces::take(nullptr, nullptr, args.units, args.rp, args.hadamard > 0);
}

cudaError_t prompt(const Args& args, const Source& source, cudaStream_t stream) {
  const bool gates = source.prologue >= kSiluGate, exact = !source.prologue && !args.hadamard;
  const auto pick = [&](auto run) { return run(args, source, stream); };
  if (!source.half) return gates ? pick(start_threads<float, kGates>) : pick(start_threads<float, kValues>);
  return gates ? pick(start_threads<__half, kGates>)
               : exact ? pick(start_threads<__half, kExact>) : pick(start_threads<__half, kValues>);
}

}  // namespace specquant_cuda
