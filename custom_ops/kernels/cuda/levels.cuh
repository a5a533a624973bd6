// The arithmetic of quantised activations, operation for operation that of reference.py: nothing here may be fused.
#pragma once

#include "args.h"
#include "unpack.cuh"

namespace specquant_cuda {

// 1.5 · 2^23: adding it rounds to whole numbers, half to even, and leaves them in the low bits of the float.
constexpr float kMagic = 12582912.0f;

struct Quantizer {
  float inverse, zero, scale, qmax;

  // From the smallest and largest value, 0 included; NaN if one of them was. 8 bits are symmetric.
  __device__ __forceinline__ Quantizer(float lowest, float highest, float clip, int bits)
      : qmax(bits == 8 ? 254.0f : static_cast<float>((1 << bits) - 1)) {
    float low = __fmul_rn(clip, lowest), high = __fmul_rn(clip, highest);
    if (bits == 8) {
      high = high > -low || high != high ? high : -low;  // a NaN stays
      low = -high;
    }
    const float range = __fsub_rn(high, low);
    const bool finite = range <= 3.402823466e38f;
    const bool used = finite && range >= 1e-30f;
    inverse = used ? __fdiv_rn(qmax, range) : 0.0f;
    zero = used ? rintf(__fmul_rn(-low, inverse)) : 0.0f;
    scale = !finite ? __int_as_float(0x7FC00000) : used ? __fdiv_rn(range, qmax) : 0.0f;
  }

  // The level less the zero-point, which fits a signed byte, as the low byte; clipped while it still has kMagic. NaN
  // (0 · inf) becomes level 0.
  __device__ __forceinline__ uint32_t byte(float value) const {
    const float rounded = __fadd_rn(__fmul_rn(value, inverse), kMagic);
    return __float_as_uint(fminf(fmaxf(rounded, kMagic - zero), kMagic + (qmax - zero)));
  }
};

__device__ __forceinline__ void store_scale(const Args& args, int token, int segment, const Quantizer& q) {
  args.scale[static_cast<int64_t>(segment) * args.tp + token] = q.scale;
}

// The low bytes of four words.
__device__ __forceinline__ uint32_t pack_bytes(uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  return __byte_perm(__byte_perm(a, b, 0x0040), __byte_perm(c, d, 0x0040), 0x5410);
}

// A token's smallest and largest value, 0 included.
struct Range {
  float lowest = 0.0f, highest = 0.0f;
  __device__ __forceinline__ void add(float low, float high) {
    lowest = min_nan(lowest, low);
    highest = max_nan(highest, high);
  }
  // Of the four threads that share a token.
  __device__ __forceinline__ void meet() {
#pragma unroll
    for (int d = 1; d < 4; d *= 2) add(__shfl_xor_sync(~0u, lowest, d), __shfl_xor_sync(~0u, highest, d));
  }
};

// Levels of 16 of a token's features, from unit · 64 + 16t on; of what lies past the last feature, zeros.
__device__ __forceinline__ void store_levels(const Args& args, int token, int unit, int t, const float (&u)[16],
                                             const Quantizer& q) {
  uint32_t words[4];
#pragma unroll
  for (int i = 0; i < 4; ++i)
    words[i] = pack_bytes(q.byte(u[4 * i]), q.byte(u[4 * i + 1]), q.byte(u[4 * i + 2]), q.byte(u[4 * i + 3]));
  if (token >= args.tokens) return;
  int8_t* to = static_cast<int8_t*>(args.levels);
  const int feature = unit * kStep + 16 * t;
  if (feature + 16 > args.n) {
#pragma unroll
    for (int i = 0; i < 4; ++i)
      if (feature + 4 * i >= args.n) words[i] = 0;
  }
  const int64_t place = level_place(args, token, feature);
  if (args.order == kRows) {
    *reinterpret_cast<uint4*>(to + place) = make_uint4(words[0], words[1], words[2], words[3]);
  } else {  // of feature + 4 the place is the other half of 32 bytes
    *reinterpret_cast<uint2*>(to + place) = make_uint2(words[0], words[2]);
    *reinterpret_cast<uint2*>(to + (place ^ 16)) = make_uint2(words[1], words[3]);
  }
}

// float16 of 16 of a token's features over a power of two, as store_levels puts levels.
__device__ __forceinline__ void store_halves(const Args& args, int token, int unit, int t, const float (&u)[16],
                                             float inverse) {
  if (token >= args.tokens) return;
  uint32_t pairs[8];
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const float2 pair = make_float2(u[2 * i] * inverse, u[2 * i + 1] * inverse);
    pairs[i] = unit * kStep + 16 * t + 2 * i < args.n ? bits_of(__floats2half2_rn(pair.x, pair.y)) : 0u;
  }
  __half* to = static_cast<__half*>(args.levels);
#pragma unroll
  for (int i = 0; i < 8; ++i)
    *reinterpret_cast<uint32_t*>(to + level_place(args, token, unit * kStep + 16 * t + 2 * i)) = pairs[i];
}

// A power of two f with `largest` / f below 2^15, so that float16 holds it, and 1 / f. NaN if largest is not finite.
__device__ __forceinline__ void half_factor(float largest, float& factor, float& inverse) {
  if (!(largest <= 3.402823466e38f)) {
    factor = __int_as_float(0x7FC00000);
    inverse = 0.0f;
    return;
  }
  const int exponent = static_cast<int>(__float_as_uint(largest) >> 23) - 127 - 14;
  const int bounded = max(exponent, -100);
  factor = __uint_as_float(static_cast<uint32_t>(bounded + 127) << 23);
  inverse = __uint_as_float(static_cast<uint32_t>(127 - bounded) << 23);
}

// value = leading + trailing in float16, to about 22 bits.
__device__ __forceinline__ void split_half(float value, __half& leading, __half& trailing) {
  leading = __float2half_rn(value);
  trailing = __float2half_rn(value - __half2float(leading));
}

// value = leading + trailing in tf32, which keeps 11 significant bits: cut, since rounding could overflow.
__device__ __forceinline__ void split_tf32(float value, uint32_t& leading, uint32_t& trailing) {
  leading = __float_as_uint(value) & 0xFFFFE000u;
  trailing = __float_as_uint(value - __uint_as_float(leading)) & 0xFFFFE000u;
}

// Eight features as float, from where `there` says that they are, else zeros. 16-byte aligned.
__device__ __forceinline__ void load8(float (&v)[8], const __half* from, bool there) {
  widen(there ? __ldg(reinterpret_cast<const uint4*>(from)) : make_uint4(0, 0, 0, 0), v);
}

__device__ __forceinline__ void load8(float (&v)[8], const float* from, bool there) {
  const float4 zero = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
  const float4 a = there ? __ldg(reinterpret_cast<const float4*>(from)) : zero;
  const float4 b = there ? __ldg(reinterpret_cast<const float4*>(from) + 1) : zero;
  v[0] = a.x, v[1] = a.y, v[2] = a.z, v[3] = a.w, v[4] = b.x, v[5] = b.y, v[6] = b.z, v[7] = b.w;
}

// Eight features as float, 16-byte aligned, of what the kernel before this one may have written.
__device__ __forceinline__ void load_written8(float (&v)[8], const __half* from) {
  widen(*reinterpret_cast<const uint4*>(from), v);
}

__device__ __forceinline__ void load_written8(float (&v)[8], const float* from) {
  const float4 a = *reinterpret_cast<const float4*>(from), b = *(reinterpret_cast<const float4*>(from) + 1);
  v[0] = a.x, v[1] = a.y, v[2] = a.z, v[3] = a.w, v[4] = b.x, v[5] = b.y, v[6] = b.z, v[7] = b.w;
}

__device__ __forceinline__ float to_float(__half v) { return __half2float(v); }
__device__ __forceinline__ float to_float(float v) { return v; }

__device__ __forceinline__ float residual_at(const Args& args, int64_t at) {
  return args.y_half ? __half2float(static_cast<const __half*>(args.residual)[at])
                     : static_cast<const float*>(args.residual)[at];
}

}  // namespace specquant_cuda
