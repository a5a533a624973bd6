// From x to the float32 row that a product takes: as it is, or normed.
//
// E is a vector of 8 or 16 float lanes along features.
#pragma once

#include "half.h"
#include "steps.h"

namespace specquant {
namespace {

// A vector from x[index] on, of `total` values; zeros beyond.
template <class E>
inline __attribute__((always_inline)) typename E::F load_x(const float* x, int64_t index, int64_t total) {
  float spare[E::W];
  return E::load(whole<E::W>(x, index, total, spare));
}
template <class E>
inline __attribute__((always_inline)) typename E::F load_x(const uint16_t* x, int64_t index, int64_t total) {
  uint16_t spare[E::W];
  return E::half(whole<E::W>(x, index, total, spare));
}

// u / √(mean(u²) + epsilon) · norm of n features, in place, by 16 sums of squares. u holds zeros up to a multiple of 8.
template <class E>
void rms_norm(float* u, int64_t n, const float* norm, float epsilon) {
  using F = typename E::F;
  constexpr int kSums = 16 / E::W;
  F sums[2] = {E::splat(0.0f), E::splat(0.0f)};
  for (int64_t i = 0; i < n; i += E::W) {
    const F value = E::load(u + i);
    sums[i / E::W % kSums] = E::fma(value, value, sums[i / E::W % kSums]);
  }
  float lanes[16], sum = 0.0f;
  for (int i = 0; i < kSums; ++i) E::store(lanes + i * E::W, sums[i]);
  for (int i = 0; i < 8; ++i) sum += lanes[i] + lanes[8 + i];
  const F factor = E::splat(1.0f / __builtin_sqrtf(sum / float(n) + epsilon));
  for (int64_t i = 0; i < n; i += E::W) E::store(u + i, E::load(u + i) * factor * load_x<E>(norm, i, n));
}

template <class E, class X>
void load_row(const Problem& p, const X* x, int64_t token, float* u) {
  const int64_t n = p.in_features;
  for (int64_t i = 0; i < n; i += E::W) E::store(u + i, load_x<E>(x, token * n + i, p.tokens * n));
}

// A row of u, zeros from in_features on.
template <class E>
void prologue(const Problem& p, const Activations& x, int64_t row) {
  const int64_t n = p.in_features, token = x.first_token + row;
  float* u = x.u + row * x.features;
  if (p.half) {
    load_row<E>(p, static_cast<const uint16_t*>(p.x), token, u);
  } else {
    load_row<E>(p, static_cast<const float*>(p.x), token, u);
  }
  std::memset(u + n, 0, size_t(x.features - n) * sizeof(float));
  if (p.prologue == kRmsNorm) rms_norm<E>(u, n, p.norm, p.epsilon);
}

}  // namespace
}  // namespace specquant
