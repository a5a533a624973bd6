// The first stage of many tokens in one pass over x: prologue, rotation, low, subtraction and levels, on compute
// capability 9.0 and later.
//
// A cluster of blocks shares the features: each block keeps its rows of the basis in shared memory and goes through 16
// tokens after another, a warp with 64 features of them in registers (prompt.cuh). The blocks send each other their parts
// of squares, of low and of ranges (prompt_exchange.cuh).
#include <algorithm>

#include "launch.h"
#include "prompt.cuh"

namespace specquant_cuda {
namespace {

constexpr int kMostThreads = kPromptWarps * 32, kFewThreads = 448;

template <class X, int rank_blocks, Reads reads>
struct Prompt {
  static constexpr bool kHalves = rank_blocks > 0 && reads != kValues;  // low is made of x as it lies
  const Args& args;
  const Source& source;
  PromptExchange<rank_blocks, reads == kNormed> others;
  int g, t, unit, feature;
  const __half* rows;  // of the basis: those that this lane names in ldmatrix
  bool norm, whole;    // whole: one range for all features of a token

  __device__ __forceinline__ Prompt(const Args& a, const Source& s, uint8_t* memory)
      : args(a), source(s), others(a, s, memory), norm(reads == kValues && s.prologue == kRmsNorm),
        whole(a.segments == 1) {
    renew();
  }

  // Has the compiler work addresses out again from here on: kept for all of the loop, they would take u's registers.
  __device__ __forceinline__ void renew() {
    hold(others.warp), hold(others.lane);
    const uint32_t lane = others.lane;
    g = lane / 4, t = lane % 4;
    unit = others.rank * others.warps + others.warp, feature = unit * kStep + 16 * t;
    rows = others.at.basis + others.warp * rank_blocks * kBasisBlock + lane % 8 * kRankStep + (lane / 8 ^ lane % 8 / 2) * 8;
  }

  __device__ __forceinline__ void rotate(float (&u)[2][16]) const {
    const PromptPlaces& at = others.at;
    float* mine = at.sums + g * at.values_stride + others.warp * kStep + 16 * t;
    const float factor = hadamard_factor(args.hadamard);
#pragma unroll
    for (int i = 0; i < 32; ++i) mine[i / 16 * 8 * at.values_stride + i % 16] = u[i / 16][i % 16];
    __syncthreads();
    hadamard_blocks(at.sums, others.warps * kStep, args.hadamard, kPromptTokens, at.values_stride);
#pragma unroll
    for (int i = 0; i < 32; ++i) u[i / 16][i % 16] = mine[i / 16 * 8 * at.values_stride + i % 16] * factor;
    __syncthreads();  // sums take its place
  }

  // What tokens g and g + 8 are multiplied by.
  __device__ __forceinline__ void find_inverses(const Raw<X, reads>& raw, float (&inverse)[2]) const {
    float squares[2];
    raw.squares(squares);
    const float own = inverse_rms(others.square(squares), args.n, source.epsilon);
#pragma unroll
    for (int h = 0; h < 2; ++h) inverse[h] = __shfl_sync(~0u, own, g + 8 * h);
  }

  // low of x that is float16 and not normed yet.
  __device__ __forceinline__ void low_of_halves(const Raw<X, reads>& raw, int token) {
    if constexpr (reads == kNormed) {
      float squares[2];
      square_halves(raw, g, squares);
      others.tell_squares(squares);
    }
    renew();
    const uint32_t lane = others.lane, slot = lane / 16 ^ lane % 8 / 2;
    const __half* from = others.at.basis + others.warp * rank_blocks * kBasisBlock + lane % 16 * kRankStep;
    const __half* parts = reinterpret_cast<const __half*>(others.at.norm + others.warps * kStep);
#pragma unroll
    for (int b = 0; b < rank_blocks; ++b) {
      float sums[4][4] = {};
      const __half* block = from + b * kBasisBlock;
      project_halves<reads == kNormed>(raw, block + slot * 8, block + (slot ^ 2) * 8,
                                       parts + others.warp * 2 * kStep + 8 * t, sums);
      others.put(sums, b);
    }
    others.add_up(token);
    renew();
  }

  // Of whole tokens: where two kernels of other first stages would read x again.
  __device__ __forceinline__ void levels_of_tokens(const float (&u)[2][16], int token, bool inside) {
    float ends[2][2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      Range range;
#pragma unroll
      for (int i = 0; i < 16; ++i) range.add(u[h][i], u[h][i]);
      range.meet();
      ends[0][h] = range.lowest, ends[1][h] = range.highest;
    }
    const float2 range = others.range(ends[0], ends[1]);
    Quantizer q(range.x, range.y, args.clip, args.bits);
    if (args.bits == 16) half_factor(max_nan(-range.x, range.y), q.scale, q.inverse);
    renew();
    const int lane = others.lane;
    if (unit == 0 && lane < kPromptTokens && token + lane < args.tokens) store_scale(args, token + lane, 0, q);
    const Quantizer all = q;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      q.inverse = __shfl_sync(~0u, all.inverse, g + 8 * h), q.zero = __shfl_sync(~0u, all.zero, g + 8 * h);
      if (!inside) continue;
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
    others.open();
    cluster_arrive();
    const int features = others.warps * kStep;
    if (args.rank) fetch_basis(args, others.rank * features, features, others.at.basis);
    if constexpr (reads == kNormed) fetch_norm(args, source.norm, others.rank * features, features, others.at);
    __syncthreads();
    cluster_wait();  // all boxes are open
    wait_for_previous();
    for (int token = blockIdx.x / args.spread * kPromptTokens; token < args.tokens; token += step, ++others.round) {
      renew();
      float u[2][16];
      {
        Raw<X, reads> raw;
        raw.load(args, source, token + g, feature);
        Raw<X, reads>::prefetch_ahead(args, source, token + step + g, feature);
        float inverse[2] = {};
        if constexpr (kHalves) {
          low_of_halves(raw, token);
          if constexpr (reads == kNormed) inverse[0] = others.at.token[g].y, inverse[1] = others.at.token[g + 8].y;
        } else {
          if (norm) find_inverses(raw, inverse);
        }
        raw.values(args, source, feature, others.at.norm + others.warp * kStep + 4 * t, inverse, u);
      }
      if (!kHalves && args.hadamard) rotate(u);
      if constexpr (rank_blocks > 0) {
        if constexpr (!kHalves) {
          renew();
#pragma unroll
          for (int b = 0; b < rank_blocks; ++b) {
            float sums[4][4] = {};
            project(u, rows + b * kBasisBlock, sums);
            others.put(sums, b);
          }
          others.add_up(token);
        }
        renew();
        const PromptPlaces& at = others.at;
        const float factor[2] = {at.token[g].x, at.token[g + 8].x};
        if (args.subtract) subtract_low<rank_blocks>(u, rows, at.low, factor, g, t);
        renew();
      }
      if (whole) {
        levels_of_tokens(u, token, inside);
      } else {
        levels_of_groups(u, token, inside);
      }
    }
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
  static Known allowed, counted;
  cudaError_t error = allow(kernel, shared, args.spread > 8, allowed);
  int clusters = 1;  // that run at once: each takes as many tokens as the others
  if (error == cudaSuccess) error = count_clusters(kernel, threads, shared, args.spread, clusters, counted);
  if (error != cudaSuccess) return error;
  const int tiles = ceil_div(args.tokens, kPromptTokens), rounds = ceil_div(tiles, std::max(1, clusters));
  const dim3 grid(ceil_div(tiles, rounds) * args.spread);
  return launch_cluster(kernel, grid, threads, shared, args.spread, stream, args, source);
}

template <class X, Reads reads, int most>
cudaError_t start_rank(const Args& args, const Source& source, cudaStream_t stream) {
  switch (args.rp / kRankStep) {
    case 0: return start<X, 0, reads == kNormed ? kValues : reads, most>(args, source, stream);
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
  return PromptPlaces::take(nullptr, nullptr, args.units, args.spread, args.rp, args.hadamard > 0,
                            args.late_norm);
}

cudaError_t prompt(const Args& args, const Source& source, cudaStream_t stream) {
  if (!source.half) return start_threads<float, kValues>(args, source, stream);
  if (args.late_norm) return start_threads<__half, kNormed>(args, source, stream);
  const bool exact = !source.prologue && !args.hadamard;
  return exact ? start_threads<__half, kExact>(args, source, stream)
               : start_threads<__half, kValues>(args, source, stream);
}

}  // namespace specquant_cuda
