// A row of qkv on its way: rotary positions and Hadamard transform (queries, keys), rounding for the cache (keys, values).
//
// E is a vector of 8 float lanes. What reaches the cache must equal NumPy's float32 bit for bit (custom_ops/kv_rows.py,
// attention.py): one rounding per operation, in the order given there.
#pragma once

#include "attention.h"
#include "hadamard.h"
#include "half.h"

namespace specquant {
namespace {

// Tokens of row b that were there before, and with the new ones.
inline int64_t tokens_after(const Attention& a, int64_t b) { return int64_t(a.seqlens_k[b]) + 1; }
inline int64_t tokens_before(const Attention& a, int64_t b) {
  const int64_t before = tokens_after(a, b) - a.sequence;
  return before > 0 ? before : 0;
}

// Head `head` (queries, then keys, then values) of a token, in float32.
inline void read_head(const Attention& a, int64_t b, int64_t token, int64_t head, float* to) {
  const int64_t heads = a.num_heads + 2 * a.kv_num_heads;
  const int64_t at = ((b * a.sequence + token) * heads + head) * a.head_dim;
  if (a.half) {
    const auto* from = static_cast<const uint16_t*>(a.qkv) + at;
    for (int64_t i = 0; i < a.head_dim; ++i) to[i] = half_to_float(from[i]);
  } else {
    const auto* from = static_cast<const float*>(a.qkv) + at;
    for (int64_t i = 0; i < a.head_dim; i += 8) std::memcpy(to + i, from + i, 8 * sizeof(float));
  }
}

inline void turn(float* __restrict x, const float* __restrict cos, const float* __restrict sin, int64_t rotary) {
  float* __restrict second = x + rotary;
  for (int64_t i = 0; i < rotary; ++i) {
    const float a = x[i], b = second[i];
    x[i] = a * cos[i] - b * sin[i];
    second[i] = b * cos[i] + a * sin[i];
  }
}

// Positions and transform of a query, or of a key, which has an offset [d].
inline void place(const Attention& a, int64_t b, int64_t token, const float* offset, float* x) {
  const int64_t position = a.position_ids[b * a.sequence + token];
  turn(x, a.cos + position * a.rotary, a.sin + position * a.rotary, a.rotary);
  for (int64_t i = 0; offset && i < a.head_dim; ++i) x[i] -= offset[i];
  if (a.hadamard) walsh_hadamard(x, a.head_dim);
}

// q = clip(rint((x − low) / scale), 0, 15) in nibbles, then scale and low as float16, over the middle `clip` of the
// range. A row that float16 cannot span,
// or that holds a NaN or an infinity, gets NaN for both.
template <class E>
void pack_row(const float* x, int64_t d, float clip, uint8_t* to) {
  using F = typename E::F;
  F least = E::load(x), most = least, poison = E::splat(0.0f);
  for (int64_t i = 0; i < d; i += 8) {
    const F value = E::load(x + i);
    least = E::min(least, value);
    most = E::max(most, value);
    poison = poison + (value - value);  // 0 if finite, else NaN
  }
  const float lo = E::smallest(least), span = E::largest(most) - lo, cut = span * (0.5f * (1.0f - clip));
  uint16_t scale_half = float_to_half((span - (cut + cut)) / 15.0f), low_half = float_to_half(lo + cut);
  if (low_half == 0x8000) low_half = 0;  // −0
  const bool sound = !E::any_nan(poison) && (scale_half & 0x7C00) != 0x7C00 && (low_half & 0x7C00) != 0x7C00;
  if (!sound) scale_half = low_half = 0x7E00;
  const float scale = half_to_float(scale_half), low = half_to_float(low_half);
  const float inverse = sound && scale > 0.0f ? 1.0f / scale : 0.0f;
  int8_t levels[kMostHeadDim];
  for (int64_t i = 0; i < d; i += 8) {
    // A multiplication by 0 would keep a NaN.
    const F value = sound ? E::round((E::load(x + i) - E::splat(low)) * E::splat(inverse)) : E::splat(0.0f);
    E::store_int8(levels + i, E::min(E::max(value, E::splat(0.0f)), E::splat(15.0f)));
  }
  for (int64_t i = 0; i < d / 2; ++i) to[i] = uint8_t(levels[i] | levels[d / 2 + i] << 4);
  const uint8_t parameters[kParameterBytes] = {uint8_t(scale_half), uint8_t(scale_half >> 8), uint8_t(low_half),
                                               uint8_t(low_half >> 8)};
  std::memcpy(to + d / 2, parameters, sizeof parameters);
}

// One row of the cache, of either kind.
template <class E>
void store_row(const Attention& a, const float* x, uint8_t* to) {
  if (a.kv_bits != 16) return pack_row<E>(x, a.head_dim, a.clip, to);
  for (int64_t i = 0; i < a.head_dim; i += 8) E::store_half(reinterpret_cast<uint16_t*>(to) + i, E::load(x + i));
}

// The cache of one kv head: what was there, unless it is there already, then the new tokens [token, end).
template <class E>
void append(const Attention& a, int64_t b, int64_t kv_head, int64_t token, int64_t end) {
  const int64_t bytes = row_bytes(a), before = tokens_before(a, b), head = b * a.kv_num_heads + kv_head;
  uint8_t* const key = a.present_key + head * a.present_rows * bytes;
  uint8_t* const value = a.present_value + head * a.present_rows * bytes;
  if (token == 0) {
    const size_t kept = size_t(before * bytes);
    if (a.present_key != a.past_key) std::memcpy(key, a.past_key + head * a.past_rows * bytes, kept);
    if (a.present_value != a.past_value) std::memcpy(value, a.past_value + head * a.past_rows * bytes, kept);
  }
  float x[kMostHeadDim];
  for (int64_t t = token; t < end; ++t) {
    read_head(a, b, t, a.num_heads + kv_head, x);
    place(a, b, t, a.kv_bits == 16 ? nullptr : a.key_offset + kv_head * a.head_dim, x);
    store_row<E>(a, x, key + (before + t) * bytes);
    read_head(a, b, t, a.num_heads + a.kv_num_heads + kv_head, x);
    store_row<E>(a, x, value + (before + t) * bytes);
  }
}

}  // namespace
}  // namespace specquant
