// AVX2: bytes are multiplied into int16 pairs. Two products of 0..15 by int8 stay below 3841, so nothing saturates.
#include "cpu_features.h"
#include "ymm.h"

namespace specquant {
namespace {

struct Avx2 : Ymm {
  static constexpr bool kShorts = true;
  static I nibbles(const uint8_t* from, int half) {
    const I packed = load_packed(from), mask = _mm256_set1_epi8(15);
    return _mm256_and_si256(half ? _mm256_srli_epi16(packed, 4) : packed, mask);
  }
  static I four(const int8_t* a) { return splat_int(*reinterpret_cast<const FourBytes*>(a)); }
  // As assembly, in the order given: GCC 12 would multiply everything first, and keep the products on the stack.
  static void add_products(I& shorts, I nibbles, I four) {
    I products;
    __asm__ volatile("vpmaddubsw %3, %2, %1\n\tvpaddw %1, %0, %0" : "+x"(shorts), "=&x"(products) : "x"(nibbles), "x"(four));
  }
  static I widen(I shorts) { return _mm256_madd_epi16(shorts, _mm256_set1_epi16(1)); }
  static I dot(I sum, Weights w, Activation a) {
    const I pairs = _mm256_add_epi16(_mm256_maddubs_epi16(w.low, a.low), _mm256_maddubs_epi16(w.high, a.high));
    return _mm256_add_epi32(sum, widen(pairs));
  }
};

}  // namespace

const Kernels kAvx2{"avx2",        cpu_has_avx2, quantize_row<Ymm>, turn<Ymm>, prepare<Avx2, Ymm>,  interleave, multiply<Avx2>,
                    kTaskProducts, 4,            append<Ymm>,       attend_tile<Ymm, 4>, attend_half<Ymm, Ymm, 6, 2>,
                    peak<Avx2>};

}  // namespace specquant
