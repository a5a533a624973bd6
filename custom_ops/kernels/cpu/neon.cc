// Any aarch64 CPU: bytes are multiplied into int16. A nibble of 0 to 15 by an int8, twice, stays below 3841.
#include "neon.h"

namespace specquant {
namespace {

struct AnyNeon : Neon {
  static int32x4_t dot(int32x4_t sum, int8x16_t first, int8x16_t second, int8x8_t a) {
    const int32x2_t both = vreinterpret_s32_s8(a);
    const int8x16_t four = vreinterpretq_s8_s32(vdupq_lane_s32(both, 0));
    const int8x16_t rest = vreinterpretq_s8_s32(vdupq_lane_s32(both, 1));
    const int16x8_t low = vmull_s8(vget_low_s8(first), vget_low_s8(four)), high = vmull_high_s8(first, four);
    return vpadalq_s16(sum, vpaddq_s16(vmlal_s8(low, vget_low_s8(second), vget_low_s8(rest)),
                                       vmlal_high_s8(high, second, rest)));
  }
  static I dot(I sum, Weights w, Activation a) {
    return {dot(sum.low, w.first[0], w.second[0], a), dot(sum.high, w.first[1], w.second[1], a)};
  }
};

bool any_aarch64() { return true; }

}  // namespace

const Kernels kNeon{"neon",     any_aarch64,        quantize_row<Neon>, turn<Neon>, prepare<Neon, Neon>,
                    interleave, multiply<AnyNeon>,  kTaskProducts,      4,
                    append<Neon>, attend_tile<Neon, 4>, attend_half<Neon, Neon, 4, 2>, peak<AnyNeon>};

}  // namespace specquant
