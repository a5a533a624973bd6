// Int4KVAttention and HalfKVAttention (docs/ops.md): what their kernels are given, and the launches. Host and device.
#pragma once

#include "api.h"
#include "args.h"

namespace specquant_cuda {

constexpr int kMostHeadDim = 256;
constexpr int kHeadDimMultiple = 16;
constexpr int kTileRows = 16;      // rows of queries that a warp multiplies with the cache: those of an `mma`
constexpr int kTileTokens = 64;    // cached tokens that a block of threads holds
constexpr int kAttendWarps = 4;
constexpr int kDecodeRows = 64;    // up to here the cached tokens of a kv head are split over blocks

struct AttentionArgs {
  int batch, sequence, heads, kv_heads, group;  // B, S, H, K, H / K
  int d, rotary, context, window;               // window 0: all
  int past_rows, present_rows;
  int hadamard, half, half_cache;               // half: qkv and y
  int splits;                                   // shares of the cached tokens, tile by tile in turn; 1: not split
  int cluster;                                  // blocks that share a kv head in `decode`; 0: not taken
  bool early;                                   // kernels may start before those before them end
  float factor;                                 // of q · k: scale · log2 e
  float cut;                                    // share of a row's range that is clipped at either end
  const void* qkv;
  const void* past_key;
  const void* past_value;
  const int32_t* seqlens_k;
  const int64_t* position_ids;
  const float* cos;
  const float* sin;
  const float* key_offset;                      // null: none
  void* present_key;
  void* present_value;
  void* y;
  float* queries;   // [B, S, H, d]: turned, transformed and times `factor`
  int chunk;             // kv heads that are unpacked at a time for a prompt on Hopper; 0: `attend` takes it
  int64_t turned_rows;   // S, padded
  void* turned;          // then instead of `queries`, and with them keys and values: see prompt_attention.h
  float* turned_factors;
  void* unpacked;
  float* partials;  // [B · K, rows, splits, d + 2]: y, then largest score and sum of weights; rows: group · S
};

// Of row b of the batch: its tokens before and with the new ones. Not sound: lengths that the cache cannot hold.
struct Lengths {
  int before, after;
  bool sound;
};

constexpr int kDecodeGroup = 8;   // the most heads of a kv head that `decode` takes
constexpr int kMostSplits = 128;

#ifdef __CUDACC__
#define SPECQUANT_DEVICE __device__ __forceinline__
#else
#define SPECQUANT_DEVICE inline
#endif

SPECQUANT_DEVICE Lengths lengths_of(const AttentionArgs& a, int b) {
  const int last = a.seqlens_k[b];
  if (last < -1 || last >= a.present_rows) return {0, 0, false};
  const int after = last + 1, before = after > a.sequence ? after - a.sequence : 0;
  return {before, after, before <= a.past_rows};
}

// Sizes, attributes and pointers: null if sound, else one line. Lengths and positions lie on the GPU: the kernels bound
// them.
const char* check(const SpecquantCudaAttention& problem);

// What a call that passed `check` does; places of the workspace are null. bytes: of that workspace.
AttentionArgs plan_attention(const SpecquantCudaAttention& problem, const Device& device, int64_t& bytes);
// Fills in the places; workspace is aligned to 256 bytes.
void place_workspace(AttentionArgs& args, void* workspace);

// Copies what was cached, where past and present are two buffers.
cudaError_t copy_past(const AttentionArgs& args, cudaStream_t stream);
// Appends keys and values to the cache, and readies the queries.
cudaError_t append(const AttentionArgs& args, cudaStream_t stream);
// y, or where there are several splits what each of them comes to.
cudaError_t attend(const AttentionArgs& args, cudaStream_t stream);
// All of it in one kernel: one new token a row, packed cache, compute capability 9.0 or later.
cudaError_t decode(const AttentionArgs& args, cudaStream_t stream);
// The same as `append` and `attend` for prompts on Hopper, float16 models, heads of 64 or 128, for so many kv
// heads of the batch; prompt_append leaves the cache's older rows as float16, too.
cudaError_t prompt_append(const AttentionArgs& args, int first_item, int items, cudaStream_t stream);
cudaError_t prompt_attend(const AttentionArgs& args, int first_item, int items, cudaStream_t stream);
// y of the splits.
cudaError_t merge(const AttentionArgs& args, cudaStream_t stream);

}  // namespace specquant_cuda
