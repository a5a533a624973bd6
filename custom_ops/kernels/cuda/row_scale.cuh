// How a row of a 4-bit cache is spread over its levels.
#pragma once

#include <cuda_fp16.h>

#include <cmath>
#include <cstdint>

namespace specquant_cuda {

// Of a row from `least` to `most`, less `cut_share` of that range at either end: level i stands for start + wide · i. Not
// sound: float16 cannot span it, inverse is 0 then, and scale and low are stored as NaN.
struct RowScale {
  float wide, start, inverse;
  bool sound;
  uint32_t stored;  // scale and low

  __device__ __forceinline__ RowScale(float least, float most, float cut_share) {
    const float span = __fsub_rn(most, least), cut = __fmul_rn(span, cut_share);
    const __half scale = __float2half_rn(__fdiv_rn(__fsub_rn(span, __fadd_rn(cut, cut)), 15.0f));
    const __half low = __float2half_rn(__fadd_rn(least, cut));
    wide = __half2float(scale), start = __half2float(low);
    sound = fabsf(wide) <= 65504.0f && fabsf(start) <= 65504.0f;
    inverse = sound && wide > 0.0f ? __fdiv_rn(1.0f, wide) : 0.0f;
    const uint32_t first = __half_as_ushort(scale), second = start == 0.0f ? 0 : __half_as_ushort(low);  // −0 becomes 0
    stored = sound ? first | second << 16 : 0x7E007E00u;
  }
};

}  // namespace specquant_cuda
