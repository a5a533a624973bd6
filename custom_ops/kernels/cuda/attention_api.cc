// The C API of attention: checks, the workspace, and the order of the kernels.
#include <algorithm>
#include <cmath>

#include "prompt_attention.h"

namespace specquant_cuda {
namespace {

constexpr int64_t kMostSize = int64_t(1) << 22;  // of lengths and heads
constexpr int64_t kMostRows = 65535;             // of a grid's second axis
constexpr int64_t kBlocks = 4;                   // of a multiprocessor that splits are made for
constexpr int kMultiprocessors = 256;            // the most that they are made for
constexpr int64_t kLeastPrompt = 64;             // new tokens that a prompt has: fewer leave a block's rows empty

int64_t query_bytes(const SpecquantCudaAttention& p) {
  return round_up(p.batch * p.sequence * p.num_heads * p.head_dim * 4, 256);
}

// Most splits that the cache's rows allow.
int64_t most_splits(int64_t present_rows) {
  return std::clamp<int64_t>(ceil_div(int(present_rows), kTileTokens), 1, kMostSplits);
}

// Whether prompt_attend.cuh takes the call on Hopper.
bool takes_prompt(const SpecquantCudaAttention& p) {
  bool aligned = true;  // its loads
  for (const float* input : {static_cast<const float*>(p.qkv), p.cos, p.sin, p.key_offset})
    aligned = aligned && reinterpret_cast<uintptr_t>(input) % 16 == 0;
  return p.half && aligned && p.sequence >= kLeastPrompt && (p.head_dim == 64 || p.head_dim == 128) &&
         unpacked_bytes(p.present_rows, p.head_dim) <= kPromptMost;
}

int64_t turned_bytes(const SpecquantCudaAttention& p) {
  return p.batch * p.num_heads * padded_rows(p.sequence) * p.head_dim * 2;
}
int64_t factor_bytes(const SpecquantCudaAttention& p) {
  return round_up(p.batch * p.num_heads * padded_rows(p.sequence) * 4, 256);
}

// Of what a prompt takes there.
int64_t prompt_bytes(const SpecquantCudaAttention& p) {
  const int64_t one = unpacked_bytes(p.present_rows, p.head_dim), all = p.batch * p.kv_num_heads * one;
  return turned_bytes(p) + factor_bytes(p) + std::min(all, std::max(one, kPromptSpace));
}

}  // namespace

const char* check(const SpecquantCudaAttention& p) {
  if (p.head_dim < 1 || p.head_dim > kMostHeadDim || p.head_dim % kHeadDimMultiple)
    return "head_dim must be a multiple of 16, at most 256";
  if (p.num_heads < 1 || p.kv_num_heads < 1 || p.num_heads > kMostRows || p.num_heads % p.kv_num_heads)
    return "kv_num_heads must divide num_heads";
  for (const int64_t size : {p.batch, p.sequence, p.past_rows, p.present_rows, p.context, p.rotary})
    if (size < 0 || size > kMostSize) return "sizes must be 0 to 4194304";
  if (p.batch * p.kv_num_heads > kMostRows) return "batch times kv_num_heads must be at most 65535";
  if (p.sequence * p.num_heads > int64_t(1) << 30) return "sequence times num_heads must be at most 2^30";
  if (p.present_rows < p.past_rows) return "the cache cannot shrink";
  if (p.present_rows > p.past_rows + p.sequence) return "total_sequence_length exceeds the cache and the new tokens";
  if (2 * p.rotary > p.head_dim) return "cos and sin have more than head_dim / 2 columns";
  for (const int32_t flag : {p.hadamard, p.half, p.half_cache})
    if (flag != 0 && flag != 1) return "hadamard, half and half_cache must be 0 or 1";
  if (p.half_cache && (p.hadamard || p.key_offset)) return "a float16 cache has no hadamard and no key_offset";
  if (!(p.clip > 0.0f && p.clip <= 1.0f)) return "clip must be more than 0, and at most 1";
  if (!(std::abs(p.scale) <= 3.4e38f)) return "scale must be finite";
  if (p.hadamard && (p.head_dim & (p.head_dim - 1))) return "hadamard needs a head_dim that is a power of two";
  const bool tokens = p.batch * p.sequence > 0, cached = p.batch * p.past_rows > 0, turned = p.context * p.rotary > 0;
  if ((tokens && (!p.qkv || !p.position_ids)) || (p.batch && !p.seqlens_k) || (turned && (!p.cos || !p.sin)) ||
      (cached && (!p.past_key || !p.past_value)) || (!p.half_cache && !p.key_offset))
    return "an input is missing";
  for (const void* cache : {p.past_key, p.past_value, const_cast<const void*>(p.present_key),
                            const_cast<const void*>(p.present_value)})
    if (reinterpret_cast<uintptr_t>(cache) % 4) return "the cache must be aligned to 4 bytes";
  return nullptr;
}

AttentionArgs plan_attention(const SpecquantCudaAttention& p, const Device& device, int64_t& bytes) {
  AttentionArgs a{};
  a.batch = int(p.batch), a.sequence = int(p.sequence);
  a.heads = int(p.num_heads), a.kv_heads = int(p.kv_num_heads), a.group = a.heads / a.kv_heads;
  a.d = int(p.head_dim), a.rotary = int(p.rotary), a.context = int(p.context);
  a.window = int(std::clamp<int64_t>(p.window, 0, kMostSize));
  a.past_rows = int(p.past_rows), a.present_rows = int(p.present_rows);
  a.hadamard = p.hadamard, a.half = p.half, a.half_cache = p.half_cache;
  a.factor = (p.scale != 0.0f ? p.scale : 1.0f / std::sqrt(float(a.d))) * 1.44269504f;
  a.early = device.major >= 9;
  a.cut = 0.5f * (1.0f - p.clip);
  a.qkv = p.qkv, a.past_key = p.past_key, a.past_value = p.past_value;
  a.seqlens_k = p.seqlens_k, a.position_ids = p.position_ids;
  a.cos = p.cos, a.sin = p.sin, a.key_offset = p.key_offset;
  a.present_key = p.present_key, a.present_value = p.present_value, a.y = p.y;

  // Splits as blocks allow. They take tiles in turn, so that a cache that is far from full keeps all of them busy.
  const int64_t rows = int64_t(a.sequence) * a.group, heads = int64_t(a.batch) * a.kv_heads;
  a.splits = 1;
  if (rows <= kDecodeRows && rows * heads > 0) {
    const int64_t blocks = heads * ceil_div(int(rows), kTileRows);
    const int multiprocessors = std::min(device.multiprocessors, kMultiprocessors);
    a.splits = int(std::clamp<int64_t>(kBlocks * multiprocessors / blocks, 1, most_splits(p.present_rows)));
  }
  // One token a row: a cluster of blocks for each kv head, so many that all multiprocessors have one.
  if (device.major >= 9 && a.sequence == 1 && !a.half_cache && a.group <= kDecodeGroup && heads > 0) {
    const int most = device.major == 9 ? 16 : 8;  // 16 are more than other GPUs than Hopper take
    a.cluster = 1;
    while (a.cluster < most && a.cluster * heads < device.multiprocessors) a.cluster *= 2;
  }
  a.chunk = 0;
  if (device.major == 9 && takes_prompt(p) && heads > 0) {
    a.splits = 1;
    a.chunk = int(std::clamp<int64_t>(kPromptSpace / unpacked_bytes(p.present_rows, a.d), 1, heads));
    a.turned_rows = padded_rows(a.sequence);
    bytes = prompt_bytes(p);
    return a;
  }
  bytes = query_bytes(p);
  if (a.splits > 1) bytes += heads * rows * a.splits * (a.d + 2) * 4;
  return a;
}

void place_workspace(AttentionArgs& a, void* workspace) {
  if (a.chunk) {
    const int64_t rows = int64_t(a.batch) * a.heads * a.turned_rows;
    a.turned = workspace;
    a.turned_factors = reinterpret_cast<float*>(static_cast<char*>(workspace) + rows * a.d * 2);
    a.unpacked = reinterpret_cast<char*>(a.turned_factors) + round_up(rows * 4, 256);
    return;
  }
  a.queries = static_cast<float*>(workspace);
  a.partials = a.queries + round_up(int64_t(a.batch) * a.sequence * a.heads * a.d * 4, 256) / 4;
}

static int64_t bound(const SpecquantCudaAttention& p) {
  const int64_t rows = std::min<int64_t>(p.sequence * p.num_heads / p.kv_num_heads, kDecodeRows);
  const int64_t by_cache = p.batch * p.kv_num_heads * rows * most_splits(p.present_rows);
  const int64_t by_blocks = kBlocks * kMultiprocessors * kTileRows;  // splits times blocks, where there are several
  const int64_t elsewhere = query_bytes(p) + std::min(by_cache, by_blocks) * (p.head_dim + 2) * 4;
  // A smaller call may be one that Hopper takes.
  return p.half && p.sequence >= kLeastPrompt && (p.head_dim == 64 || p.head_dim == 128)
             ? std::max(elsewhere, prompt_bytes(p))
             : elsewhere;
}

}  // namespace specquant_cuda

using namespace specquant_cuda;

SPECQUANT_EXPORT int64_t specquant_cuda_attention_size(void) { return int64_t(sizeof(SpecquantCudaAttention)); }

SPECQUANT_EXPORT const char* specquant_cuda_check_attention(const SpecquantCudaAttention* problem) {
  return check(*problem);
}

SPECQUANT_EXPORT const char* specquant_cuda_attention_workspace(const SpecquantCudaAttention* problem, int64_t* bytes) {
  if (const char* wrong = check(*problem)) return wrong;
  Device device{};
  if (const char* wrong = current(device)) return wrong;
  plan_attention(*problem, device, *bytes);
  return nullptr;
}

SPECQUANT_EXPORT const char* specquant_cuda_attention_bound(const SpecquantCudaAttention* problem, int64_t* bytes) {
  static const int64_t place = 0;
  SpecquantCudaAttention p = *problem;
  p.present_key = p.present_value = nullptr;
  p.qkv = p.past_key = p.past_value = p.position_ids = &place;
  p.seqlens_k = reinterpret_cast<const int32_t*>(&place);
  p.cos = p.sin = p.key_offset = reinterpret_cast<const float*>(&place);
  if (p.half_cache) p.key_offset = nullptr;
  if (const char* wrong = check(p)) return wrong;
  *bytes = bound(p);
  return nullptr;
}

SPECQUANT_EXPORT const char* specquant_cuda_attention(const SpecquantCudaAttention* problem, void* workspace,
                                                      int64_t workspace_bytes, void* stream) {
  if (const char* wrong = check(*problem)) return wrong;
  Device device{};
  if (const char* wrong = current(device)) return wrong;
  int64_t bytes;
  AttentionArgs a = plan_attention(*problem, device, bytes);
  if (a.batch == 0) return nullptr;
  if (!a.present_key || !a.present_value || !a.y) return "present_key, present_value or y are missing";
  const bool moves = a.present_key != a.past_key || a.present_value != a.past_value;
  if ((a.present_key == a.past_key || a.present_value == a.past_value) && a.present_rows != a.past_rows)
    return "a cache that is extended in place must have room";
  if (bytes && (!workspace || workspace_bytes < bytes || reinterpret_cast<uintptr_t>(workspace) % 256))
    return say("the workspace must have %lld bytes, aligned to 256", static_cast<long long>(bytes));
  place_workspace(a, workspace);

  const cudaStream_t on = static_cast<cudaStream_t>(stream);
  cudaError_t error = moves && a.past_rows ? copy_past(a, on) : cudaSuccess;
  if (a.cluster) {
    if (error == cudaSuccess) error = decode(a, on);
  } else if (a.chunk) {
    for (int first = 0, all = a.batch * a.kv_heads; first < all && error == cudaSuccess; first += a.chunk) {
      const int items = std::min(a.chunk, all - first);
      error = prompt_append(a, first, items, on);
      if (error == cudaSuccess) error = prompt_attend(a, first, items, on);
    }
  } else if (a.sequence > 0) {
    if (error == cudaSuccess) error = append(a, on);
    if (error == cudaSuccess) error = attend(a, on);
    if (error == cudaSuccess && a.splits > 1) error = merge(a, on);
  }
  return error == cudaSuccess ? nullptr : failed("a CUDA kernel did not start", error);
}
