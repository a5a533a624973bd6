// ARM's dot product (FEAT_DotProd).
#include "cpu_features.h"
#include "dotprod.h"

namespace specquant {

const Kernels kDotProd{"dotprod",  cpu_has_dotprod,    quantize_row<Neon>, turn<Neon>, prepare<Neon, Neon>,
                       interleave, multiply<DotProd>,  kTaskProducts,      4,
                       append<Neon>, attend_tile<Neon, 4>, attend_half<Neon, Neon, 4, 2>, peak<DotProd>};

}  // namespace specquant
