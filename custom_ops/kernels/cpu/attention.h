// Int4KVAttention and HalfKVAttention (docs/ops.md) on raw pointers and sizes. Internal headers are steps.h, kv_rows.h,
// attend.h and attend_half.h.
//
// Symbols: B batch, S new tokens of a row (padding included), H query heads, K kv heads, d head_dim, E bytes of a cache
// row (row_bytes), P and T rows of the cache before and after. All arrays are contiguous.
#pragma once

#include "kernels.h"

namespace specquant {

constexpr int64_t kParameterBytes = 4;  // scale and low of a cache row, float16 each
constexpr int64_t kMostHeadDim = 256;
constexpr int64_t kHeadDimMultiple = 16;

// One call. Passed across the C ABI as it is (custom_ops/library_attention.py mirrors it), hence the plain types.
struct Attention {
  int64_t batch;             // B
  int64_t sequence;          // S
  int64_t past_rows;         // P
  int64_t present_rows;      // T >= P
  int64_t num_heads;         // H
  int64_t kv_num_heads;      // K, divides H
  int64_t head_dim;          // d
  int64_t context;           // rows of cos and sin
  int64_t rotary;            // their columns; twice as many features turn
  int64_t window;            // tokens a query sees, itself included; <= 0: all
  int64_t kv_bits;           // of a cached value: 4, packed rows; 16, float16 and neither hadamard, clip nor key_offset
  int32_t hadamard;          // 1: queries and keys pass a Hadamard transform; d is a power of two
  int32_t half;              // 1: qkv and y are float16; 0: float32
  float scale;               // what q · k is multiplied by; 0: 1 / sqrt(d)
  float clip;                // share of a cached row's range that its levels span, in (0, 1]
  const void* qkv;           // [B, S, (H + 2K) · d]
  const uint8_t* past_key;   // [B, K, P, E]
  const uint8_t* past_value;
  const int32_t* seqlens_k;  // [B]: tokens of a row, the new ones included, less one
  const int64_t* position_ids;  // [B, S]: rows of cos and sin
  const float* cos;          // [context, rotary]
  const float* sin;
  const float* key_offset;   // [K, d], taken from keys after their rotation
  uint8_t* present_key;      // [B, K, T, E]; may be past_key itself if T == P
  uint8_t* present_value;
  void* y;                   // [B, S, H · d]; zeros for padding
};

// Bytes of a token of a kv head in the cache. Static: see half.h.
static inline int64_t row_bytes(const Attention& attention) {
  const int64_t d = attention.head_dim;
  return attention.kv_bits == 16 ? d * int64_t(sizeof(uint16_t)) : d / 2 + kParameterBytes;
}

// Sizes, attributes, lengths and positions, before anything else is read or written: null if sound, else one line.
// present_key, present_value and y are not looked at: they may be allocated afterwards.
const char* check(const Attention& attention);

// Bytes that `attend` needs as scratch, for a call that passed `check`. The start may have any alignment.
size_t scratch_bytes(const Attention& attention);

// Appends the new keys and values to the cache, then computes y. Same bits for every pool and number of threads.
void attend(const Kernels& kernels, const Attention& attention, const ThreadPool& pool, void* scratch);

}  // namespace specquant
