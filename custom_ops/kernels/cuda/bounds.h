// The largest sizes that calls of the linear ops may have. Host only.
#pragma once

#include <cstdint>

namespace specquant_cuda {

constexpr int64_t kMostFeatures = int64_t(1) << 19;  // int32 sums stay exact: (15 + 8) · 128 · 2^19 < 2^31
constexpr int64_t kMostOutputs = int64_t(1) << 22;
constexpr int64_t kMostTokens = int64_t(1) << 22;
constexpr int64_t kMostBasis = 4096;  // of a basis
constexpr int64_t kSplits = 16;         // shares of the features in `down`

}  // namespace specquant_cuda
