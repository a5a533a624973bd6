// AVX2: bytes are multiplied into int16 pairs. Four products of 0..15 by int8 stay below 7681, so nothing saturates.
#include "cpu_features.h"
#include "ymm.h"

namespace specquant {
namespace {

struct Avx2 : Ymm {
  static I dot(I sum, Weights w, Activation a) {
    const I pairs = _mm256_add_epi16(_mm256_maddubs_epi16(w.low, a.low), _mm256_maddubs_epi16(w.high, a.high));
    return _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
  }
};

}  // namespace

const Kernels kAvx2{"avx2",        cpu_has_avx2, quantize_row<Ymm>, prepare<Avx2, Ymm>,  interleave, multiply<Avx2>,
                    kTaskProducts, 4,            append<Ymm>,       attend_tile<Ymm, 4>, attend_half<Ymm, Ymm, 6, 2>,
                    peak<Avx2>};

}  // namespace specquant
