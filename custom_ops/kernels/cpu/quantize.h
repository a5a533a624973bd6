// Dynamic quantisation of a row of activations (docs/ops.md), some groups at a time: what one of them waits for, others fill.
//
// E is a vector of 8 or 16 float lanes along features.
#pragma once

#include <algorithm>
#include <cstring>

#include "steps.h"

namespace specquant {
namespace {

constexpr int kGroupsAtOnce = 32;

// What the values of some groups become levels by.
struct Quantizers {
  alignas(64) float low[kGroupsAtOnce], high[kGroupsAtOnce];  // of the values, 0 included; NaN where one is not finite
  alignas(64) float inverse[kGroupsAtOnce], zero[kGroupsAtOnce], scale[kGroupsAtOnce];
  alignas(64) int32_t used[kGroupsAtOnce];

  // Nothing here is done for some of them only, so that the compiler takes a vector of groups at once.
  void find(int bits, float clip, float qmax) {
    const bool symmetric = bits == 8;
    for (int g = 0; g < kGroupsAtOnce; ++g) {
      float lo = clip * low[g], hi = clip * high[g];
      const float most = hi > -lo ? hi : -lo;
      hi = symmetric ? most : hi;
      lo = symmetric ? -most : lo;
      const float range = hi - lo;
      const bool finite = range <= 3.402823466e38f, large = range >= 1e-30f;
      used[g] = finite & large;
      const float divisor = used[g] ? range : 1.0f, by_range = qmax / divisor, by_levels = divisor / qmax;
      inverse[g] = used[g] ? by_range : 0.0f;
      zero[g] = __builtin_rintf(-lo * by_range);
      zero[g] = used[g] ? zero[g] : 0.0f;
      const float unused = finite ? 0.0f : __builtin_nanf("");
      scale[g] = used[g] ? by_levels : unused;
    }
  }
};

template <class E>
inline __attribute__((always_inline)) void find_range(const float* values, int64_t length, float& low, float& high) {
  using F = typename E::F;
  F least = E::splat(0.0f), most = E::splat(0.0f), poison = E::splat(0.0f);
  for (int64_t i = 0; i < length; i += E::W) {
    const F value = E::load(values + i);
    least = E::min(least, value);
    most = E::max(most, value);
    poison = poison + (value - value);  // 0 if finite, else NaN
  }
  const bool finite = !E::any_nan(poison);
  low = finite ? E::smallest(least) : __builtin_nanf("");
  high = finite ? E::largest(most) : __builtin_nanf("");
}

constexpr int64_t kExactLevels = 65536;  // of 254 at most: their sum is below 2^24

// Levels of a segment; −8 Σ of them.
template <class E>
inline __attribute__((always_inline)) int32_t quantize_segment(const float* values, int64_t length, float inverse,
                                                               float zero, float qmax, int8_t* q) {
  using F = typename E::F;
  F sum = E::splat(0.0f);
  for (int64_t i = 0; i < length; i += E::W) {
    const F scaled = E::round(E::load(values + i) * E::splat(inverse));
    const F level = E::min(E::max(scaled, E::splat(-zero)), E::splat(qmax - zero));
    E::store_int8(q + i, level);
    sum = sum + level;
  }
  if (length <= kExactLevels) return -8 * int32_t(E::total(sum));
  float lanes[E::W];
  E::store(lanes, sum);
  int32_t total = 0;
  for (const float lane : lanes) total += int32_t(lane);
  return -8 * total;
}

// Levels less their zero-point, which fits a byte, with a scale per group and −8 Σ of every segment.
template <class E>
void quantize_row(const float* u, int64_t n, int bits, int64_t group, int64_t segment, float clip, int8_t* q,
                  float* scale, int32_t* start) {
  const int64_t length = group ? group : n, groups = n / length;
  const float qmax = bits == 8 ? 254.0f : float((1 << bits) - 1);
  Quantizers by;
  for (int64_t first = 0; first < groups; first += kGroupsAtOnce, u += kGroupsAtOnce * length) {
    const int64_t count = std::min<int64_t>(kGroupsAtOnce, groups - first);
    for (int64_t g = 0; g < count; ++g) find_range<E>(u + g * length, length, by.low[g], by.high[g]);
    std::fill(by.low + count, by.low + kGroupsAtOnce, 0.0f);
    std::fill(by.high + count, by.high + kGroupsAtOnce, 0.0f);
    by.find(bits, clip, qmax);
    std::copy(by.scale, by.scale + count, scale + first);
    for (int64_t g = 0; g < count; ++g, q += length)
      for (int64_t from = 0; from < length; from += segment) {
        if (by.used[g]) {
          *start++ = quantize_segment<E>(u + g * length + from, segment, by.inverse[g], by.zero[g], qmax, q + from);
        } else {  // a value that is not finite times 0 is none
          std::memset(q + from, 0, size_t(segment));
          *start++ = 0;
        }
      }
  }
}

}  // namespace
}  // namespace specquant
