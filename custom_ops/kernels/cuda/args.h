// What every kernel of one call is given, and the launches. Kernels index with int where the checks bound it.
#pragma once

#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "specquant_cuda.h"

namespace specquant_cuda {

constexpr int kPanel = 16;         // outputs in a panel of packed weights
constexpr int kBlock = 8;          // features in a block of them: 64 bytes for 16 outputs
constexpr int kStep = 64;          // features that the tensor-core kernels take at a time
constexpr int64_t kSharedHopper = 220 * 1024;  // bytes that a block may take on compute capability 9.0
constexpr int kTokenPad = 128;     // tokens in a row of `scale` are padded to this
constexpr int kRankStep = 32;      // rank is padded to this
constexpr int kFastRank = 64;      // the largest rank of the tensor-core first stage
constexpr int kDownChunk = 256;    // features of the basis that `down` holds at a time
constexpr int kDownTokens = 32;    // tokens per block of `down`
constexpr int kReduceTokens = 128;  // tokens per block of `reduce`, at most
constexpr int kMatvecTokens = 32;  // the most that `matvec` takes
constexpr int kPromptWarps = 20;   // of a block of `prompt`, at most
constexpr int kChunk = 128;        // features that `gemm90` takes at a time

// How the first stage lays the levels out.
enum Order {
  kRows,       // [T, kp]
  kFragments,  // [T, kp], as `gemm` wants each row: place_of
  kTiles,      // [kp / kChunk, tp, kChunk], as `gemm90` wants them: tile_place
  kWideTiles,  // the same, as its wide tiles do
};

struct Args {
  int tokens, n, m;              // T, N, M
  int r, rank, rp;               // columns stored, used, and used padded to kRankStep; rank 0: no branch
  int kp, tp;                    // N padded to kStep, T padded to kTokenPad
  int segments, segment;         // runs of features that share an activation scale, and the features of one
  int groups, group;             // of weights: G, N / G
  uint32_t group_steps, segment_steps;  // reciprocals of group / kStep and segment / kStep, for `quotient`
  int hadamard, splits, bits;    // splits: shares of the features in `down`
  int shares;                    // and in `reduce`
  int x_half, y_half;
  int gate, width;               // a Gate (gate.cuh), and columns of y: M, or M / 2
  int cluster;                   // blocks that share a token in `first_stage`
  int most_shared;               // bytes of shared memory that a block may take
  int spread, units;             // blocks that share tokens in `prompt`, and 64 features each of theirs
  bool late_norm;                // `prompt` norms low, not what it is made of
  bool early;                    // later kernels may start before earlier ones end
  int subtract;                  // only where there is a branch
  Order order;                   // of the levels
  float clip;
  uint32_t high_nibbles;         // 0xF0F0F0F0, unknown to the compiler: one instruction holds one constant only
  const void* x;                 // after prologue and rotation, if it is to be
  const __half* basis;
  const __half* coef;
  const uint8_t* qweight;
  const uint8_t* group_scales;
  const __half* scales;
  const float* bias;
  const void* residual;          // as y
  void* y;
  float* reduced;
  float* partial;
  float2* range;                 // [shares, T]: lowest and highest
  __half* low;
  float* low_factor;
  void* levels;
  float* scale;
};

// How products of levels and weights are summed.
enum Mode {
  kFold,      // int32 over 64 features, then float with the scales of the segment and the group they are in
  kChannel,   // int32 over all features, which are one segment and one group
  kMultiples, // the same where there are groups: of the weights times the scales of theirs
  kHalf,      // float16 activations
};

// First stage.
// x̂ of the problem's x, float32 [T, N].
cudaError_t prologue(const SpecquantCudaProblem& problem, float* to, cudaStream_t stream);
cudaError_t rotate(const Args& args, const void* x, int x_half, float* rotated, cudaStream_t stream);
cudaError_t down(const Args& args, cudaStream_t stream);
enum class Reduce {
  kKeep,         // low, and `reduced` where subtract is set
  kGroupLevels,  // low and levels, for segments of 64
  kRanges,       // low, and the range of every token's u: the first of two passes
  kTokenLevels,  // levels, a group a token: the second
};
cudaError_t reduce(const Args& args, Reduce what, cudaStream_t stream);
cudaError_t branch_any(const Args& args, cudaStream_t stream);
// Levels of u, which is x or, float32, `reduced`.
cudaError_t quantize(const Args& args, const void* u, int u_half, cudaStream_t stream);

// The first stage of few tokens at once, to kRows, on compute capability 9.0 or later.
struct Source {  // x of the problem, and what its prologue takes
  const void* x;
  const float* norm;
  float epsilon;
  int prologue, half;
};
// Bytes of shared memory of a block.
size_t cluster_shared(const Args& args);
cudaError_t first_stage(const Args& args, const Source& source, cudaStream_t stream);

// The first stage of many tokens at once, there too.
size_t prompt_shared(const Args& args);
cudaError_t prompt(const Args& args, const Source& source, cudaStream_t stream);

// Second stage.
cudaError_t matvec(const Args& args, Mode mode, int multiprocessors, cudaStream_t stream);
// Of what matvec takes, whether one_token does, which is faster.
bool takes_one_token(const Args& args, Mode mode, int multiprocessors);
cudaError_t one_token(const Args& args, Mode mode, int multiprocessors, cudaStream_t stream);
cudaError_t gemm(const Args& args, Mode mode, bool large, cudaStream_t stream);
// sm_90a only. tile: tokens x outputs are 64 x 256; 128 x 256, or 80 x 256 of kFold; 256 x 128, of kMultiples alone.
enum class Tile90 { kSmall, kLarge, kWide };
// Blocks that share a small tile's features where there are few tiles: 8, 4 or 2, of 2 chunks each at least; or 1.
constexpr int shares_of_tile(const Args& args, int tiles, int multiprocessors) {
  int parts = 8;
  while (parts > 1 && (tiles * parts > multiprocessors || args.n / kChunk < 2 * parts)) parts /= 2;
  return parts;
}
cudaError_t gemm90(const Args& args, Mode mode, Tile90 tile, int multiprocessors, cudaStream_t stream);
cudaError_t multiply_any(const Args& args, cudaStream_t stream);

// Where a feature's level lies in its row for `gemm`, which takes 32 features at a time: ldmatrix gives thread t of four
// the t-th words of 16 bytes, and the thread needs features 8t … 8t + 7.
__host__ __device__ constexpr uint32_t place_of(uint32_t feature, bool halves) {
  const uint32_t within = feature % 32, t = within / 8;
  return feature - within + (halves ? within % 8 / 2 * 8 + 2 * t + within % 2 : within % 8 / 4 * 16 + 4 * t + within % 4);
}

// The same for `gemm90`'s wide tiles, of kChunk features: threads 0 and 1 of four take features of the first half, the others
// those of the second.
__host__ __device__ constexpr uint32_t wide_place(uint32_t feature) {
  const uint32_t block = feature % 64 / 8, t = feature / 64 * 2 + block % 2;
  return block / 2 * 32 + feature % 8 / 4 * 16 + 4 * t + feature % 4;
}

// Where the level of a token's feature lies in kTiles: rows of 128 bytes whose 16-byte columns are swizzled.
__host__ __device__ constexpr int64_t tile_place(uint32_t token, uint32_t feature, int tp, bool wide) {
  const uint32_t place = wide ? wide_place(feature % kChunk) : place_of(feature % kChunk, false);
  return (static_cast<int64_t>(feature / kChunk) * tp + token) * kChunk + ((place / 16 ^ token % 8) * 16 + place % 16);
}

__host__ __device__ constexpr int64_t level_place(const Args& args, int token, int feature) {
  return args.order >= kTiles ? tile_place(token, feature, args.tp, args.order == kWideTiles)
                              : static_cast<int64_t>(token) * args.kp +
                                    (args.order == kFragments ? place_of(feature, args.bits == 16) : feature);
}

// x / k for x · k < 2^32, by multiplication: a division costs a warp more than the mma of a step.
__host__ __device__ constexpr uint32_t reciprocal(uint32_t k) {
  return k < 2 ? 0 : static_cast<uint32_t>((uint64_t(1) << 32) / k + 1);
}
__host__ __device__ constexpr int quotient(int x, uint32_t reciprocal_of_k) {
  return reciprocal_of_k ? static_cast<int>(uint64_t(static_cast<uint32_t>(x)) * reciprocal_of_k >> 32) : x;
}

__host__ __device__ constexpr int64_t round_up(int64_t value, int64_t unit) { return (value + unit - 1) / unit * unit; }
__host__ __device__ constexpr int ceil_div(int value, int unit) { return (value + unit - 1) / unit; }

}  // namespace specquant_cuda
