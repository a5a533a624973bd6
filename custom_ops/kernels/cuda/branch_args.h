// What the kernels of SpectralBranch are given. Host only.
#pragma once

#include "args.h"

namespace specquant_cuda {

struct BranchPlan {
  Args args;    // the fields of a branch: sizes, x, basis, coef, y, splits and partial
  bool tensor;  // `down` takes it
};

// y and low, float16 or float32 [T, r], zeros from rank on.
cudaError_t branch(const BranchPlan& plan, void* low, cudaStream_t stream);

}  // namespace specquant_cuda
