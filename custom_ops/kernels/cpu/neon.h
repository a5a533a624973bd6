// 8 lanes of NEON, as two registers: half a panel of weights. Every aarch64 CPU has these; the byte dot products are
// in the files of their own that derive from this.
#pragma once

#include <arm_neon.h>

#include "attend_half.h"
#include "limits.h"
#include "tiles.h"

namespace specquant {
namespace {

// GCC keeps a struct of two registers in registers where it would keep a generic vector of 32 bytes in memory.
struct Floats {
  float32x4_t low, high;

  friend inline Floats operator+(Floats a, Floats b) { return {vaddq_f32(a.low, b.low), vaddq_f32(a.high, b.high)}; }
  friend inline Floats operator-(Floats a, Floats b) { return {vsubq_f32(a.low, b.low), vsubq_f32(a.high, b.high)}; }
  friend inline Floats operator*(Floats a, Floats b) { return {vmulq_f32(a.low, b.low), vmulq_f32(a.high, b.high)}; }
  friend inline Floats operator/(Floats a, Floats b) { return {vdivq_f32(a.low, b.low), vdivq_f32(a.high, b.high)}; }
};
struct Ints {
  int32x4_t low, high;
};

struct Neon {
  static constexpr int W = 8, kTokens = 4;
  static constexpr int panels(int tokens) { return tokens == 4 ? 1 : 2; }
  using F = Floats;
  using I = Ints;

  static F splat(float value) { return {vdupq_n_f32(value), vdupq_n_f32(value)}; }
  static F load(const float* from) { return {vld1q_f32(from), vld1q_f32(from + 4)}; }
  static void store(float* to, F value) {
    vst1q_f32(to, value.low);
    vst1q_f32(to + 4, value.high);
  }
  static F half(const uint16_t* from) {
    const float16x8_t value = vreinterpretq_f16_u16(vld1q_u16(from));
    return {vcvt_f32_f16(vget_low_f16(value)), vcvt_high_f32_f16(value)};
  }
  static void store_half(uint16_t* to, F value) {
    vst1q_u16(to, vreinterpretq_u16_f16(vcvt_high_f16_f32(vcvt_f16_f32(value.low), value.high)));
  }
  static F fma(F a, F b, F sum) { return {vfmaq_f32(sum.low, a.low, b.low), vfmaq_f32(sum.high, a.high, b.high)}; }
  // As a < b ? a : b: vminq_f32 would answer NaN for a NaN on either side.
  static F min(F a, F b) {
    return {vbslq_f32(vcltq_f32(a.low, b.low), a.low, b.low), vbslq_f32(vcltq_f32(a.high, b.high), a.high, b.high)};
  }
  static F max(F a, F b) {
    return {vbslq_f32(vcgtq_f32(a.low, b.low), a.low, b.low), vbslq_f32(vcgtq_f32(a.high, b.high), a.high, b.high)};
  }
  static F round(F value) { return {vrndnq_f32(value.low), vrndnq_f32(value.high)}; }
  static float smallest(F value) { return vminvq_f32(min(value, F{value.high, value.low}).low); }
  static float largest(F value) { return vmaxvq_f32(max(value, F{value.high, value.low}).low); }
  static float total(F value) { return vaddvq_f32(vaddq_f32(value.low, value.high)); }
  static bool any_nan(F value) {
    return vminvq_u32(vandq_u32(vceqq_f32(value.low, value.low), vceqq_f32(value.high, value.high))) == 0;
  }
  static void store_int8(int8_t* to, F whole_numbers) {
    const int16x8_t words = vcombine_s16(vmovn_s32(vcvtq_s32_f32(whole_numbers.low)),
                                         vmovn_s32(vcvtq_s32_f32(whole_numbers.high)));
    vst1_s8(to, vmovn_s16(words));
  }
  static void transpose(F (&rows)[8]) {
    float32x4_t quarters[2][2][4];  // of rows, of columns
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) quarters[i / 4][0][i % 4] = rows[i].low, quarters[i / 4][1][i % 4] = rows[i].high;
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      auto& q = quarters[i / 2][i % 2];
      const auto pair = [](float32x4_t a) { return vreinterpretq_f64_f32(a); };
      const float32x4_t a = vtrn1q_f32(q[0], q[1]), b = vtrn2q_f32(q[0], q[1]);
      const float32x4_t c = vtrn1q_f32(q[2], q[3]), d = vtrn2q_f32(q[2], q[3]);
      q[0] = vreinterpretq_f32_f64(vzip1q_f64(pair(a), pair(c)));
      q[1] = vreinterpretq_f32_f64(vzip1q_f64(pair(b), pair(d)));
      q[2] = vreinterpretq_f32_f64(vzip2q_f64(pair(a), pair(c)));
      q[3] = vreinterpretq_f32_f64(vzip2q_f64(pair(b), pair(d)));
    }
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) rows[i] = {quarters[0][i / 4][i % 4], quarters[1][i / 4][i % 4]};
  }

  // Lane i: the lanes of rows[i], added in pairs.
  static F lane_sums(const F (&rows)[8]) {
    float32x4_t quads[2][2];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {  // pairs, then pairs of pairs, of half of the lanes of four rows
      const F* r = rows + 4 * (i / 2);
      const auto part = [&](int row) { return i % 2 ? r[row].high : r[row].low; };
      quads[i / 2][i % 2] = vpaddq_f32(vpaddq_f32(part(0), part(1)), vpaddq_f32(part(2), part(3)));
    }
    return {vaddq_f32(quads[0][0], quads[0][1]), vaddq_f32(quads[1][0], quads[1][1])};
  }

  // Nibbles of 8 outputs: features 0 to 3 of a block, then 4 to 7; four bytes an output.
  struct Weights {
    int8x16_t first[2], second[2];
  };
  using Activation = int8x8_t;  // a block
  static I splat_int(int32_t value) { return {vdupq_n_s32(value), vdupq_n_s32(value)}; }
  static I add(I a, I b) { return {vaddq_s32(a.low, b.low), vaddq_s32(a.high, b.high)}; }
  static F to_float(I value) { return {vcvtq_f32_s32(value.low), vcvtq_f32_s32(value.high)}; }
  static I load_packed(const uint8_t* from) {
    return {vreinterpretq_s32_u8(vld1q_u8(from)), vreinterpretq_s32_u8(vld1q_u8(from + 16))};
  }
  static Weights unpack(const uint8_t* from) {
    const uint8x16_t a = vld1q_u8(from), b = vld1q_u8(from + 16), mask = vdupq_n_u8(15);
    const auto bytes = [](uint8x16_t value) { return vreinterpretq_s8_u8(value); };
    return {{bytes(vandq_u8(a, mask)), bytes(vandq_u8(b, mask))}, {bytes(vshrq_n_u8(a, 4)), bytes(vshrq_n_u8(b, 4))}};
  }
  static Activation activation(const int8_t* a) { return vld1_s8(a); }
  static I widen(int16x8_t value) { return {vmovl_s16(vget_low_s16(value)), vmovl_high_s16(value)}; }
  static F lowest_nibble(I packed) {
    const int32x4_t mask = vdupq_n_s32(15), middle = vdupq_n_s32(8);
    return to_float({vsubq_s32(vandq_s32(packed.low, mask), middle), vsubq_s32(vandq_s32(packed.high, mask), middle)});
  }
  static I next_nibble(I packed) { return {vshrq_n_s32(packed.low, 4), vshrq_n_s32(packed.high, 4)}; }
  // Scales of a group and the outputs from `lane`, 0 or 8, of its panel on.
  static F group_scales(const uint8_t* from, int lane) {
    const uint8x8_t bytes = vld1_u8(from);
    const int32x4_t left{0, 0, -4, -4};
    const auto four = [&](int shift) {
      const uint32x4_t words = vreinterpretq_u32_u8(vcombine_u8(bytes, bytes));
      const uint32x4_t nibbles = vandq_u32(vshlq_u32(words, vsubq_s32(left, vdupq_n_s32(shift))), vdupq_n_u32(15));
      return vcvtq_f32_u32(vaddq_u32(nibbles, vdupq_n_u32(1)));
    };
    return {four(2 * lane), four(2 * lane + 8)};
  }

  // 4 bytes a lane, lanes `stride` bytes apart.
  static I gather(const uint8_t* from, int64_t stride) {
    int32_t lanes[W];
    for (int i = 0; i < W; ++i) std::memcpy(lanes + i, from + i * stride, sizeof(int32_t));
    return {vld1q_s32(lanes), vld1q_s32(lanes + 4)};
  }
  static I bytes(const uint8_t* from) { return widen(vreinterpretq_s16_u16(vmovl_u8(vld1_u8(from)))); }
  // The float16 in the low and in the high half of each lane.
  static void halves(I packed, F& low, F& high) {
    const auto to_floats = [](uint16x4_t a, uint16x4_t b) {
      return F{vcvt_f32_f16(vreinterpret_f16_u16(a)), vcvt_f32_f16(vreinterpret_f16_u16(b))};
    };
    const uint32x4_t a = vreinterpretq_u32_s32(packed.low), b = vreinterpretq_u32_s32(packed.high);
    low = to_floats(vmovn_u32(a), vmovn_u32(b));
    high = to_floats(vshrn_n_u32(a, 16), vshrn_n_u32(b, 16));
  }
  // value · 2^n, n a whole number above −126; 0 where x < −87.
  static F power_of_two(F value, F n, F x) {
    const auto scaled = [](float32x4_t value, float32x4_t n, float32x4_t x) {
      const int32x4_t exponent = vshlq_n_s32(vcvtq_s32_f32(n), 23);
      const uint32x4_t bits = vreinterpretq_u32_s32(vaddq_s32(vreinterpretq_s32_f32(value), exponent));
      return vreinterpretq_f32_u32(vbicq_u32(bits, vcltq_f32(x, vdupq_n_f32(-87.0f))));
    };
    return {scaled(value.low, n.low, x.low), scaled(value.high, n.high, x.high)};
  }
};

}  // namespace
}  // namespace specquant
