// e^x on vectors of floats.
#pragma once

namespace specquant {
namespace {

// e^x for x ≤ 0, within 2 ulp; 0 below −87, NaN for NaN. Powers of two apart, |f| ≤ ln 2 / 2, where seven terms do.
template <class V>
inline __attribute__((always_inline)) typename V::F exponential(typename V::F x) {
  using F = typename V::F;
  const F n = V::round(x * V::splat(1.44269504f));
  const F f = V::fma(n, V::splat(2.12194440e-4f), V::fma(n, V::splat(-0.693359375f), x));  // ln 2 in two parts
  F p = V::splat(1.0f / 720.0f);
  for (const float term : {1.0f / 120.0f, 1.0f / 24.0f, 1.0f / 6.0f, 0.5f, 1.0f, 1.0f}) p = V::fma(p, f, V::splat(term));
  return V::power_of_two(p, n, x);
}

}  // namespace
}  // namespace specquant
