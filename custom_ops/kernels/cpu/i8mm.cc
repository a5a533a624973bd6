// ARM's matrix product of bytes (FEAT_I8MM): 2 tokens by 2 outputs by 8 features, 32 multiplications. One token alone,
// as in decoding, takes the dot product.
#include "cpu_features.h"
#include "dotprod.h"

namespace specquant {
namespace {

struct I8mm : DotProd {
  // Sums of two tokens in pairs: outputs 0 and 1 of the one, then of the other; 2 and 3; and so on.
  static int32x4_t zip1(int32x4_t a, int32x4_t b) {
    return vreinterpretq_s32_s64(vzip1q_s64(vreinterpretq_s64_s32(a), vreinterpretq_s64_s32(b)));
  }
  static int32x4_t zip2(int32x4_t a, int32x4_t b) {
    return vreinterpretq_s32_s64(vzip2q_s64(vreinterpretq_s64_s32(a), vreinterpretq_s64_s32(b)));
  }
  static void pair(I& a, I& b) {
    const I low{zip1(a.low, b.low), zip2(a.low, b.low)}, high{zip1(a.high, b.high), zip2(a.high, b.high)};
    a = low, b = high;
  }
  static void unpair(I& a, I& b) {
    const I first{zip1(a.low, a.high), zip1(b.low, b.high)}, second{zip2(a.low, a.high), zip2(b.low, b.high)};
    a = first, b = second;
  }
  // The two tokens' blocks are neighbours. The compiler zips a vector of outputs once for all tokens.
  static void dot_pair(I& a, I& b, Weights w, const int8_t* tokens) {
    const int8x16_t both = vld1q_s8(tokens);
    const auto outputs = [](int8x16_t first, int8x16_t second, bool upper) {
      const int32x4_t x = vreinterpretq_s32_s8(first), y = vreinterpretq_s32_s8(second);
      return vreinterpretq_s8_s32(upper ? vzip2q_s32(x, y) : vzip1q_s32(x, y));
    };
    a.low = vmmlaq_s32(a.low, both, outputs(w.first[0], w.second[0], false));
    a.high = vmmlaq_s32(a.high, both, outputs(w.first[0], w.second[0], true));
    b.low = vmmlaq_s32(b.low, both, outputs(w.first[1], w.second[1], false));
    b.high = vmmlaq_s32(b.high, both, outputs(w.first[1], w.second[1], true));
  }
};

// As limits.h, by pairs of tokens.
int64_t pair_peak(int64_t steps) {
  constexpr int kSums = 12;
  int32x4_t sums[kSums] = {};
  int8x16_t factor = vdupq_n_s8(3);
  for (int64_t i = 0; i < steps; ++i)
#pragma GCC unroll 12
    for (auto& sum : sums) {
      __asm__ volatile("" : "+w"(factor));
      sum = vmmlaq_s32(sum, factor, factor);
    }
  for (auto& sum : sums) __asm__ volatile("" : : "w"(sum));
  return steps * kSums * 2 * 2 * 8 * 2;
}

}  // namespace

const Kernels kI8mm{"i8mm",     cpu_has_i8mm,    quantize_row<Neon>, turn<Neon>, prepare<Neon, Neon>,
                    interleave, multiply<I8mm>,  kTaskProducts,      4,
                    append<Neon>, attend_tile<Neon, 4>, attend_half<Neon, Neon, 4, 2>, pair_peak};

}  // namespace specquant
