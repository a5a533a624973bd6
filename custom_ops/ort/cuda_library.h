// libspecquant_cuda.so, opened when the first node of a session on a GPU is made and never before: this library loads
// where there is no CUDA.
#pragma once

#include "specquant_cuda.h"

namespace specquant::ort {

struct CudaLibrary {
  decltype(&specquant_cuda_device) device;
  decltype(&specquant_cuda_check) check;
  decltype(&specquant_cuda_layout) layout;
  decltype(&specquant_cuda_matmul) matmul;
  decltype(&specquant_cuda_check_branch) check_branch;
  decltype(&specquant_cuda_branch_workspace) branch_workspace;
  decltype(&specquant_cuda_branch) branch;
  decltype(&specquant_cuda_check_attention) check_attention;
  decltype(&specquant_cuda_attention_workspace) attention_workspace;
  decltype(&specquant_cuda_attention) attention;
};

// The file that SPECQUANT_CUDA_LIBRARY names, or the one beside this library. Throws std::runtime_error with one line
// if it is not there, does not fit, or finds no GPU that it can use.
const CudaLibrary& cuda_library();

}  // namespace specquant::ort
