// What a call will do: checked sizes, the layout of its workspace, and which kernels take it. Host only.
#pragma once

#include "api.h"
#include "args.h"

namespace specquant_cuda {

struct Plan {
  Args args;  // pointers into the workspace are null
  SpecquantCudaLayout layout;
  int64_t range;        // its place in the workspace
  Mode mode;
  bool tensor_prepare;  // down and reduce, else branch_any
  bool direct, two_pass;  // reduce writes the levels itself: of groups of 64, of whole tokens
  bool cluster;         // `first_stage` takes what matvec does
  bool prompt;          // `prompt` takes the first stage of any number of tokens
  int matvec_tokens;    // the most tokens that `matvec` takes, 0: none
  bool gemm, gemm90, wide;  // whether they take it; gemm90 with its wide tiles
};

// Sizes, attributes and pointers: null if sound, else one line.
const char* check(const SpecquantCudaProblem& problem);

// For a problem that passed `check`. x and y may still be null.
Plan make_plan(const SpecquantCudaProblem& problem, const Device& device);

}  // namespace specquant_cuda
