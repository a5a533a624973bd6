// AVX-VNNI: the byte dot product on 256 bits, for CPUs without AVX-512.
#include "cpu_features.h"
#include "ymm.h"

namespace specquant {
namespace {

struct AvxVnni : Ymm {
  // Assembly, because GCC 12 copies the sums around the intrinsic and spills them.
  static I dot(I sum, Weights w, Activation a) {
    __asm__("%{vex%} vpdpbusd %1, %2, %0" : "+x"(sum) : "x"(a.low), "x"(w.low));
    __asm__("%{vex%} vpdpbusd %1, %2, %0" : "+x"(sum) : "x"(a.high), "x"(w.high));
    return sum;
  }
};

}  // namespace

const Kernels kAvxVnni{"avxvnni",     cpu_has_avxvnni,   quantize_row<Ymm>, turn<Ymm>, prepare<AvxVnni, Ymm>,
                       interleave,    multiply<AvxVnni>, kTaskProducts,     4,
                       append<Ymm>,   attend_tile<Ymm, 4>, attend_half<Ymm, Ymm, 6, 2>,
                       peak<AvxVnni, true>};

}  // namespace specquant
