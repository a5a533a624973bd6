// What a call will do: checked sizes, the layout of its workspace, and which kernels take it. Host only.
#pragma once

#include "args.h"

namespace specquant_cuda {

struct Device {
  int major, minor, multiprocessors;
};

struct Plan {
  Args args;  // pointers into the workspace are null
  SpecquantCudaLayout layout;
  Mode mode;
  bool tensor_prepare;  // down and reduce, else branch_any
  bool direct;          // reduce writes the levels itself
  int matvec_tokens;    // the most tokens that `matvec` takes, 0: none
  bool gemm;            // whether `gemm` takes it
};

// Sizes, attributes and pointers: null if sound, else one line.
const char* check(const SpecquantCudaProblem& problem);

// For a problem that passed `check`. x and y may still be null.
Plan make_plan(const SpecquantCudaProblem& problem, const Device& device);

}  // namespace specquant_cuda
