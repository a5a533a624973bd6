// AVX-VNNI: the byte dot product on 256 bits, for CPUs without AVX-512.
#include "cpu_features.h"
#include "ymm.h"

namespace specquant {
namespace {

struct AvxVnni : Ymm {
  static I dot(I sum, Weights w, Activation a) {
    return _mm256_dpbusd_avx_epi32(_mm256_dpbusd_avx_epi32(sum, w.low, a.low), w.high, a.high);
  }
};

}  // namespace

const Kernels kAvxVnni{"avxvnni", cpu_has_avxvnni, quantize_row<Ymm>, prepare<AvxVnni, Ymm>,
                       multiply<AvxVnni>, 4, append<Ymm>, attend_tile<Ymm, 4>};

}  // namespace specquant
