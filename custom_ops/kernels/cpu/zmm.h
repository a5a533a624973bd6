// 16 lanes of AVX-512 with VNNI: one vector is a whole panel of weights.
#pragma once

#include "ymm.h"

namespace specquant {
namespace {

struct Zmm {
  static constexpr int W = 16, kTokens = 8;
  static constexpr int panels(int tokens) { return tokens == 8 ? 2 : 4; }
  using F = __m512;
  using I = __m512i;

  static F splat(float value) { return _mm512_set1_ps(value); }
  static F load(const float* from) { return _mm512_loadu_ps(from); }
  static void store(float* to, F value) { _mm512_storeu_ps(to, value); }
  static F half(const uint16_t* from) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
  }
  static void store_half(uint16_t* to, F value) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT));
  }
  static F fma(F a, F b, F sum) { return _mm512_fmadd_ps(a, b, sum); }
  static F min(F a, F b) { return _mm512_min_ps(a, b); }
  static F max(F a, F b) { return _mm512_max_ps(a, b); }
  static float smallest(F value) { return _mm512_reduce_min_ps(value); }
  static float largest(F value) { return _mm512_reduce_max_ps(value); }
  static bool any_nan(F value) { return _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q) != 0; }
  static void store_int8(int8_t* to, F whole_numbers) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(whole_numbers)));
  }
  static float total(F value) { return _mm512_reduce_add_ps(value); }
  static F round(F value) { return _mm512_roundscale_ps(value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }

  // Sums and differences of lanes 1, 2, 4 and 8 apart (hadamard.h).
  static F butterflies(F x) {
    const auto step = [&](F other, __mmask16 second) {
      x = _mm512_fmadd_ps(x, _mm512_mask_blend_ps(second, splat(1.0f), splat(-1.0f)), other);
    };
    step(_mm512_permute_ps(x, 0xB1), 0xAAAA);
    step(_mm512_permute_ps(x, 0x4E), 0xCCCC);
    step(_mm512_shuffle_f32x4(x, x, 0xB1), 0xF0F0);
    step(_mm512_shuffle_f32x4(x, x, 0x4E), 0xFF00);
    return x;
  }

  struct Weights {
    I low, high;
  };
  struct Activation {
    I low, high;
  };
  static I splat_int(int32_t value) { return _mm512_set1_epi32(value); }
  static I add(I a, I b) { return _mm512_add_epi32(a, b); }
  static F to_float(I value) { return _mm512_cvtepi32_ps(value); }
  static I load_packed(const uint8_t* from) { return _mm512_loadu_si512(from); }
  static Weights unpack(const uint8_t* from) {
    const I packed = load_packed(from), mask = _mm512_set1_epi8(15);
    return {_mm512_and_si512(packed, mask), _mm512_and_si512(_mm512_srli_epi16(packed, 4), mask)};
  }
  static Activation activation(const int8_t* a) {
    const auto* four = reinterpret_cast<const FourBytes*>(a);
    return {splat_int(four[0]), splat_int(four[1])};
  }
  // Assembly, because GCC 12 copies the sums around the intrinsic and spills them.
  static I dot(I sum, Weights w, Activation a) {
    __asm__("vpdpbusd %1, %2, %0" : "+v"(sum) : "v"(a.low), "v"(w.low));
    __asm__("vpdpbusd %1, %2, %0" : "+v"(sum) : "v"(a.high), "v"(w.high));
    return sum;
  }
  static constexpr bool kHalves = true;  // there is dot_halves
  // Sums of the products with low nibbles, and 16 times those with high ones, which then need no shift.
  static void dot_halves(I& low, I& high, const uint8_t* weights, const int8_t* a) {
    const auto* four = reinterpret_cast<const FourBytes*>(a);
    const I mask = _mm512_set1_epi8(15);
    I packed = load_packed(weights);
    __asm__("" : "+v"(packed));  // GCC would load it twice
    __asm__("vpdpbusd %1%{1to16%}, %2, %0" : "+v"(low) : "m"(four[0]), "v"(_mm512_and_si512(packed, mask)));
    __asm__("vpdpbusd %1%{1to16%}, %2, %0" : "+v"(high) : "m"(four[1]), "v"(_mm512_andnot_si512(mask, packed)));
  }
  static I sixteenth(I value) { return _mm512_srai_epi32(value, 4); }
  // A table of 16 floats indexed by the lane's low 4 bits; the bits above are ignored.
  static F lowest_nibble(I packed) {
    return _mm512_permutexvar_ps(packed, _mm512_setr_ps(-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7));
  }
  static I next_nibble(I packed) { return _mm512_srli_epi32(packed, 4); }
  // Scales of a group and the outputs from `lane` of its panel on. The table's index is a lane's low 4 bits, too.
  static F group_scales(const uint8_t* from, int /*lane*/) {
    int64_t words;
    std::memcpy(&words, from, sizeof words);
    I shifts = _mm512_setr_epi32(0, 0, 4, 4, 8, 8, 12, 12, 16, 16, 20, 20, 24, 24, 28, 28);
    F values = _mm512_setr_ps(1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16);
    __asm__("" : "+v"(shifts));  // GCC would load both for every group
    __asm__("" : "+v"(values));
    return _mm512_permutexvar_ps(_mm512_srlv_epi32(_mm512_set1_epi64(words), shifts), values);
  }

  static I gather(const uint8_t* from, int64_t stride) {
    const I lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    return _mm512_i32gather_epi32(_mm512_mullo_epi32(lanes, splat_int(int32_t(stride))), from, 1);
  }
  static I bytes(const uint8_t* from) {
    return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
  }
  static void halves(I packed, F& low, F& high) {
    low = _mm512_cvtph_ps(_mm512_cvtepi32_epi16(packed));
    high = _mm512_cvtph_ps(_mm512_cvtepi32_epi16(_mm512_srli_epi32(packed, 16)));
  }
  static F power_of_two(F value, F n, F x) {
    return _mm512_maskz_scalef_ps(_mm512_cmp_ps_mask(x, splat(-87.0f), _CMP_NLT_UQ), value, n);
  }
};

}  // namespace
}  // namespace specquant
