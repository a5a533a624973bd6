// A word of packed weights: 8 features of one output. Byte i holds feature i in its low nibble, 4 + i in its high one,
// each as q + 8.
#pragma once

#include "ptx.cuh"

namespace specquant_cuda {

// 16 · q as signed bytes, features 0..3 and 4..7. mask: Args::high_nibbles.
__device__ __forceinline__ void unpack_s8(uint32_t word, uint32_t mask, uint32_t& first, uint32_t& second) {
  first = ((word << 4) & mask) ^ 0x80808080u;
  second = (word & mask) ^ 0x80808080u;
}

// Eight bytes of group scales as they lie (docs/ops.md, "Packed weights"), for the quad-th four outputs of their panel.
struct GroupScales {
  uint32_t even, odd;  // nibble i: of output 2i, of output 2i + 1

  __device__ __forceinline__ GroupScales(const uint2& raw, int quad) : even(raw.x >> 8 * quad), odd(raw.y >> 8 * quad) {}
  __device__ __forceinline__ int of(int i) const { return static_cast<int>((i % 2 ? odd : even) >> i / 2 * 4 & 15) + 1; }
  // As a float: bits of 2^23 + nibble.
  __device__ __forceinline__ float as_float(int i) const {
    return __uint_as_float(((i % 2 ? odd : even) >> i / 2 * 4 & 15) | 0x4B000000u) - 8388607.0f;
  }
};

// c · q as signed bytes, features 0..3 and 4..7, c from 1 to 16. Bytes c · nibble + 128 − 8c are 128 + c · q, from 0 to 240:
// one multiplication for four of them.
struct Multiple {
  uint32_t c, rest;

  __device__ __forceinline__ explicit Multiple(int c_) : c(c_), rest(0x80808080u - c_ * 0x08080808u) {}
  __device__ __forceinline__ void unpack(uint32_t word, uint32_t& first, uint32_t& second) const {
    first = ((word & 0x0F0F0F0Fu) * c + rest) ^ 0x80808080u;
    second = ((word >> 4 & 0x0F0F0F0Fu) * c + rest) ^ 0x80808080u;
  }
};

// Low or high nibbles of bytes 0 and 2, each less 8, as float16. 0x6400 is 1024, whose last place is 1.
__device__ __forceinline__ uint32_t low_nibbles(uint32_t bytes) {
  const __half2 offset = half2_of(0x64086408u);  // 1024 + 8
  return bits_of(__hsub2(half2_of((bytes & 0x000F000Fu) | 0x64006400u), offset));
}

__device__ __forceinline__ uint32_t high_nibbles(uint32_t bytes) {
  const __half2 scale = half2_of(0x2C002C00u);   // 1/16
  const __half2 offset = half2_of(0xD480D480u);  // −(1024 / 16 + 8)
  return bits_of(__hfma2(half2_of((bytes & 0x00F000F0u) | 0x64006400u), scale, offset));
}

// q as float16, features 0, 1 | 2, 3 | 4, 5 | 6, 7.
__device__ __forceinline__ void unpack_half(uint32_t word, uint32_t (&pairs)[4]) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const uint32_t bytes = __byte_perm(word, 0, i ? 0x4342 : 0x4140);
    pairs[i] = low_nibbles(bytes);
    pairs[2 + i] = high_nibbles(bytes);
  }
}

// Eight float16 as float.
__device__ __forceinline__ void widen(const uint4& raw, float (&v)[8]) {
  const uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 pair = __half22float2(half2_of(words[i]));
    v[2 * i] = pair.x;
    v[2 * i + 1] = pair.y;
  }
}

}  // namespace specquant_cuda
