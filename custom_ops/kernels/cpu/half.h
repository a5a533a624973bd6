// float16 <-> float32 without hardware, and a guard for reads at the end of an array.
// Anonymous namespace on purpose, here and in the other headers that the per-instruction-set files include: each
// file is compiled with flags of its own, and a shared symbol would let the linker keep the AVX-512 copy for all.
#pragma once

#include <cstdint>
#include <cstring>

namespace specquant {
namespace {

inline float half_to_float(uint16_t half) {
  const uint32_t sign = uint32_t(half & 0x8000) << 16;
  const uint32_t magnitude = half & 0x7FFF;
  float value;
  if (magnitude < 0x0400) {  // zero or subnormal: magnitude · 2^-24
    value = float(magnitude) * 5.9604644775390625e-8f;
    return sign ? -value : value;
  }
  const uint32_t bias = magnitude >= 0x7C00 ? 0x70000000u : 0x38000000u;  // infinity and NaN keep a full exponent
  const uint32_t bits = sign | ((magnitude << 13) + bias);
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// Round to nearest, ties to even; overflow is infinity, NaN stays NaN.
inline uint16_t float_to_half(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  const uint16_t sign = uint16_t(bits >> 16 & 0x8000);
  bits &= 0x7FFFFFFF;
  if (bits > 0x7F800000) return sign | 0x7E00;
  if (bits >= 0x477FF000) return sign | 0x7C00;  // 65520 and above
  if (bits < 0x38800000) {                       // below 2^-14: adding 0.5 leaves the value in units of 2^-24
    float magnitude;
    std::memcpy(&magnitude, &bits, sizeof magnitude);
    magnitude += 0.5f;
    std::memcpy(&bits, &magnitude, sizeof bits);
    return sign | uint16_t(bits - 0x3F000000);
  }
  bits += 0xFFF + (bits >> 13 & 1);
  return sign | uint16_t((bits - 0x38000000) >> 13);
}

// W elements from base[index]: where they lie if the array of `total` elements holds them all, else in `spare`,
// filled up with zeros. Rows may run into the next one: the lanes past a row's end are never stored.
template <int W, class T>
inline const T* whole(const T* base, int64_t index, int64_t total, T (&spare)[W]) {
  if (__builtin_expect(index + W <= total, 1)) return base + index;
  for (int i = 0; i < W; ++i) spare[i] = index + i < total ? base[index + i] : T(0);
  return spare;
}

}  // namespace
}  // namespace specquant
