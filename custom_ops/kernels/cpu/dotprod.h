// ARM's dot product (FEAT_DotProd): four bytes of an output by four features of a token, 16 multiplications.
#pragma once
#include "neon.h"

namespace specquant {
namespace {

struct DotProd : Neon {
  static I dot(I sum, Weights w, Activation a) {
    sum.low = vdotq_lane_s32(vdotq_lane_s32(sum.low, w.first[0], a, 0), w.second[0], a, 1);
    sum.high = vdotq_lane_s32(vdotq_lane_s32(sum.high, w.first[1], a, 0), w.second[1], a, 1);
    return sum;
  }
};

}  // namespace
}  // namespace specquant
