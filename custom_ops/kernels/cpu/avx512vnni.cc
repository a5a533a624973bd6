// AVX512-VNNI: 8 tokens × 2 panels, or 4 × 4, of sums fill half the registers.
#include "cpu_features.h"
#include "zmm.h"

namespace specquant {
namespace {

// 16 lanes of features need a row whose halves are multiples of 16, and pairs of them one that 32 divides.
void attend_some(const Attention& attention, const QueryTile& tile, const Partial& out) {
  if (attention.head_dim % 32 == 0) {
    attend_tile<Zmm, kMostTileRows>(attention, tile, out);
  } else {
    attend_tile<Ymm, kMostTileRows>(attention, tile, out);
  }
}

void attend_some_half(const Attention& attention, const QueryTile& tile, const Partial& out) {
  if (attention.head_dim % 32 == 0) {
    attend_half<Zmm, Ymm, 12, 2>(attention, tile, out);
  } else {
    attend_half<Ymm, Ymm, 6, 2>(attention, tile, out);
  }
}

}  // namespace

const Kernels kAvx512Vnni{"avx512vnni",  cpu_has_avx512vnni, quantize_row<Ymm>, turn<Ymm>, prepare<Zmm, Ymm>, interleave,
                          multiply<Zmm>, kTaskProducts,      kMostTileRows,     append<Ymm>,        attend_some,
                          attend_some_half, peak<Zmm, true>};

}  // namespace specquant
