// 8 lanes of AVX2, FMA and F16C: the steps on tokens of every x86 path, and the tiles of the two 256-bit ones.
#pragma once

#include <immintrin.h>

#include "attend_half.h"
#include "limits.h"

namespace specquant {
namespace {

// Loaded one by one, 4 bytes are broadcast by the load port; through a 64-bit register, by the multipliers' ports.
typedef int32_t FourBytes __attribute__((may_alias, aligned(1)));

struct Ymm {
  static constexpr int W = 8, kTokens = 4;
  static constexpr int panels(int tokens) { return 4 / tokens; }
  using F = __m256;
  using I = __m256i;

  static F splat(float value) { return _mm256_set1_ps(value); }
  static F load(const float* from) { return _mm256_loadu_ps(from); }
  static void store(float* to, F value) { _mm256_storeu_ps(to, value); }
  static F half(const uint16_t* from) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
  }
  static void store_half(uint16_t* to, F value) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT));
  }
  static F fma(F a, F b, F sum) { return _mm256_fmadd_ps(a, b, sum); }
  static F min(F a, F b) { return _mm256_min_ps(a, b); }
  static F max(F a, F b) { return _mm256_max_ps(a, b); }
  static F round(F value) { return _mm256_round_ps(value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  static float smallest(F value) {
    __m128 four = _mm_min_ps(_mm256_castps256_ps128(value), _mm256_extractf128_ps(value, 1));
    four = _mm_min_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_min_ss(four, _mm_movehdup_ps(four)));
  }
  static float largest(F value) { return -smallest(_mm256_xor_ps(value, splat(-0.0f))); }
  static float total(F value) {
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(value), _mm256_extractf128_ps(value, 1));
    four = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(four, _mm_movehdup_ps(four)));
  }
  static bool any_nan(F value) { return _mm256_movemask_ps(_mm256_cmp_ps(value, value, _CMP_UNORD_Q)) != 0; }
  static void store_int8(int8_t* to, F whole_numbers) {
    const __m256i wide = _mm256_cvtps_epi32(whole_numbers);
    const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(wide), _mm256_extracti128_si256(wide, 1));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(to), _mm_packs_epi16(words, words));
  }
  static void transpose(F (&rows)[8]) {
    F pairs[8], quads[8];
#pragma GCC unroll 4
    for (int i = 0; i < 8; i += 2) {
      pairs[i] = _mm256_unpacklo_ps(rows[i], rows[i + 1]);
      pairs[i + 1] = _mm256_unpackhi_ps(rows[i], rows[i + 1]);
    }
#pragma GCC unroll 2
    for (int i = 0; i < 8; i += 4)
#pragma GCC unroll 2
      for (int j = 0; j < 2; ++j) {
        quads[i + 2 * j] = _mm256_shuffle_ps(pairs[i + j], pairs[i + j + 2], 0x44);
        quads[i + 2 * j + 1] = _mm256_shuffle_ps(pairs[i + j], pairs[i + j + 2], 0xEE);
      }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      rows[i] = _mm256_permute2f128_ps(quads[i], quads[i + 4], 0x20);
      rows[i + 4] = _mm256_permute2f128_ps(quads[i], quads[i + 4], 0x31);
    }
  }

  // Lane i: the lanes of rows[i], added in pairs.
  static F lane_sums(const F (&rows)[8]) {
    F quads[2];
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) {
      const F a = _mm256_hadd_ps(rows[4 * i], rows[4 * i + 1]), b = _mm256_hadd_ps(rows[4 * i + 2], rows[4 * i + 3]);
      quads[i] = _mm256_hadd_ps(a, b);
    }
    return _mm256_permute2f128_ps(quads[0], quads[1], 0x20) + _mm256_permute2f128_ps(quads[0], quads[1], 0x31);
  }

  struct Weights {
    I low, high;
  };
  struct Activation {
    I low, high;
  };
  static I splat_int(int32_t value) { return _mm256_set1_epi32(value); }
  static I add(I a, I b) { return _mm256_add_epi32(a, b); }
  static F to_float(I value) { return _mm256_cvtepi32_ps(value); }
  static I load_packed(const uint8_t* from) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)); }
  static Weights unpack(const uint8_t* from) {
    const I packed = load_packed(from), mask = _mm256_set1_epi8(15);
    return {_mm256_and_si256(packed, mask), _mm256_and_si256(_mm256_srli_epi16(packed, 4), mask)};
  }
  static Activation activation(const int8_t* a) {
    const auto* four = reinterpret_cast<const FourBytes*>(a);
    return {splat_int(four[0]), splat_int(four[1])};
  }
  static F lowest_nibble(I packed) {
    return to_float(_mm256_sub_epi32(_mm256_and_si256(packed, splat_int(15)), splat_int(8)));
  }
  static I next_nibble(I packed) { return _mm256_srli_epi32(packed, 4); }
  // Scales of a group and the outputs from `lane`, 0 or 8, of its panel on.
  static F group_scales(const uint8_t* from, int lane) {
    int64_t words;
    std::memcpy(&words, from, sizeof words);
    const I shifts = lane ? _mm256_setr_epi32(16, 16, 20, 20, 24, 24, 28, 28) : _mm256_setr_epi32(0, 0, 4, 4, 8, 8, 12, 12);
    const I nibbles = _mm256_and_si256(_mm256_srlv_epi32(_mm256_set1_epi64x(words), shifts), splat_int(15));
    return to_float(_mm256_add_epi32(nibbles, splat_int(1)));
  }

  // 4 bytes a lane, lanes `stride` bytes apart.
  static I gather(const uint8_t* from, int64_t stride) {
    const I steps = _mm256_mullo_epi32(_mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7), splat_int(int32_t(stride)));
    return _mm256_i32gather_epi32(reinterpret_cast<const int*>(from), steps, 1);
  }
  static I bytes(const uint8_t* from) {
    return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from)));
  }
  // The float16 in the low and in the high half of each lane.
  static void halves(I packed, F& low, F& high) {
    const I words = _mm256_packus_epi32(_mm256_and_si256(packed, splat_int(0xFFFF)), _mm256_srli_epi32(packed, 16));
    const I ordered = _mm256_permute4x64_epi64(words, 0xD8);
    low = _mm256_cvtph_ps(_mm256_castsi256_si128(ordered));
    high = _mm256_cvtph_ps(_mm256_extracti128_si256(ordered, 1));
  }
  // value · 2^n, n a whole number above −126; 0 where x < −87.
  static F power_of_two(F value, F n, F x) {
    const I exponent = _mm256_slli_epi32(_mm256_cvtps_epi32(n), 23);
    const F scaled = _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(value), exponent));
    return _mm256_and_ps(scaled, _mm256_cmp_ps(x, splat(-87.0f), _CMP_NLT_UQ));
  }
};

}  // namespace
}  // namespace specquant
