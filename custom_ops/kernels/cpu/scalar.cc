// Any architecture: the same steps on 8 lanes of the compiler's generic vectors, no instruction set asked for.
#include "attend_half.h"
#include "limits.h"

namespace specquant {
namespace {

struct Portable {
  static constexpr int W = 8, kTokens = 2;
  static constexpr int panels(int) { return 1; }
  typedef float F __attribute__((vector_size(32)));
  typedef int32_t I __attribute__((vector_size(32)));

  static F splat(float value) { return F{value, value, value, value, value, value, value, value}; }
  static F load(const float* from) {
    F value;
    std::memcpy(&value, from, sizeof value);
    return value;
  }
  static void store(float* to, F value) { std::memcpy(to, &value, sizeof value); }
  static F half(const uint16_t* from) {
    F value;
    for (int i = 0; i < W; ++i) value[i] = half_to_float(from[i]);
    return value;
  }
  static void store_half(uint16_t* to, F value) {
    for (int i = 0; i < W; ++i) to[i] = float_to_half(value[i]);
  }
  static F fma(F a, F b, F sum) { return a * b + sum; }
  static F min(F a, F b) { return a < b ? a : b; }
  static F max(F a, F b) { return a > b ? a : b; }
  static F round(F value) {
    for (int i = 0; i < W; ++i) value[i] = __builtin_rintf(value[i]);
    return value;
  }
  static float smallest(F value) {
    float least = value[0];
    for (int i = 1; i < W; ++i) least = value[i] < least ? value[i] : least;
    return least;
  }
  static float largest(F value) { return -smallest(-value); }
  static float total(F value) {
    float sum = value[0];
    for (int i = 1; i < W; ++i) sum += value[i];
    return sum;
  }
  static bool any_nan(F value) {
    for (int i = 0; i < W; ++i)
      if (value[i] != value[i]) return true;
    return false;
  }
  static void store_int8(int8_t* to, F whole_numbers) {
    for (int i = 0; i < W; ++i) to[i] = int8_t(whole_numbers[i]);
  }
  static void transpose(F (&rows)[8]) {
    for (int i = 0; i < 8; ++i)
      for (int j = 0; j < i; ++j) {
        const float moved = rows[i][j];
        rows[i][j] = rows[j][i];
        rows[j][i] = moved;
      }
  }

  // Lane i: the lanes of rows[i], added in pairs.
  static F lane_sums(const F (&rows)[8]) {
    F sums;
    for (int i = 0; i < W; ++i) {
      const F& r = rows[i];
      sums[i] = ((r[0] + r[1]) + (r[2] + r[3])) + ((r[4] + r[5]) + (r[6] + r[7]));
    }
    return sums;
  }

  using Weights = I;                 // as packed
  using Activation = const int8_t*;  // 8 features
  static I splat_int(int32_t value) { return I{} + value; }
  static I add(I a, I b) { return a + b; }
  static F to_float(I value) { return __builtin_convertvector(value, F); }
  static I load_packed(const uint8_t* from) {
    I value;
    for (int i = 0; i < W; ++i)  // byte by byte: the layout is little-endian whatever the machine is
      value[i] = int32_t(from[4 * i] | from[4 * i + 1] << 8 | from[4 * i + 2] << 16 | uint32_t(from[4 * i + 3]) << 24);
    return value;
  }
  static Weights unpack(const uint8_t* from) { return load_packed(from); }
  static Activation activation(const int8_t* a) { return a; }
  static I dot(I sum, Weights w, Activation a) {
    for (int j = 0; j < 4; ++j) sum += (w >> (8 * j) & 15) * a[j] + (w >> (8 * j + 4) & 15) * a[j + 4];
    return sum;
  }
  static F lowest_nibble(I packed) { return to_float((packed & 15) - 8); }
  static I next_nibble(I packed) { return packed >> 4; }
  // Scales of a group and the outputs from `lane`, 0 or 8, of its panel on.
  static F group_scales(const uint8_t* from, int lane) {
    F value;
    for (int i = 0; i < W; ++i) value[i] = float((from[i % 2 * 4 + (lane + i) / 4] >> (i / 2 % 2 * 4) & 15) + 1);
    return value;
  }

  static I gather(const uint8_t* from, int64_t stride) {
    I value;
    for (int i = 0; i < W; ++i) {
      const uint8_t* at = from + i * stride;
      value[i] = int32_t(at[0] | at[1] << 8 | at[2] << 16 | uint32_t(at[3]) << 24);
    }
    return value;
  }
  static I bytes(const uint8_t* from) {
    I value;
    for (int i = 0; i < W; ++i) value[i] = from[i];
    return value;
  }
  static void halves(I packed, F& low, F& high) {
    for (int i = 0; i < W; ++i) {
      low[i] = half_to_float(uint16_t(packed[i]));
      high[i] = half_to_float(uint16_t(packed[i] >> 16));
    }
  }
  static F power_of_two(F value, F n, F x) {
    F result;
    for (int i = 0; i < W; ++i) result[i] = x[i] < -87.0f ? 0.0f : x[i] != x[i] ? x[i] : std::ldexp(value[i], int(n[i]));
    return result;
  }
};

bool any_cpu() { return true; }

}  // namespace

const Kernels kScalar{"scalar",   any_cpu,            quantize_row<Portable>, turn<Portable>, prepare<Portable, Portable>,
                      interleave, multiply<Portable>, kTaskProducts,          2,
                      append<Portable>, attend_tile<Portable, 2>, attend_half<Portable, Portable, 4, 1>, peak<Portable>};

}  // namespace specquant
