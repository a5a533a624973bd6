#include "cuda_library.h"

#include <dlfcn.h>

#include <cstdlib>
#include <stdexcept>
#include <string>

namespace specquant::ort {
namespace {

std::string path_of_library() {
  if (const char* named = std::getenv("SPECQUANT_CUDA_LIBRARY"); named && *named) return named;
  Dl_info own;
  if (!dladdr(reinterpret_cast<const void*>(&cuda_library), &own) || !own.dli_fname) return "libspecquant_cuda.so";
  const std::string file = own.dli_fname;
  const size_t folder = file.rfind('/');
  return (folder == std::string::npos ? "./" : file.substr(0, folder + 1)) + "libspecquant_cuda.so";
}

CudaLibrary open() {
  const std::string path = path_of_library();
  void* const handle = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (!handle) throw std::runtime_error("no CUDA kernels: " + std::string(dlerror()));
  const auto find = [&](auto& function, const char* name) {
    function = reinterpret_cast<std::remove_reference_t<decltype(function)>>(dlsym(handle, name));
    if (!function) throw std::runtime_error(path + " is not SpecQuant's CUDA library");
  };
  decltype(&specquant_cuda_abi) abi;
  decltype(&specquant_cuda_problem_size) problem, layout, attention, branch;
  find(abi, "specquant_cuda_abi");
  find(problem, "specquant_cuda_problem_size");
  find(layout, "specquant_cuda_layout_size");
  find(attention, "specquant_cuda_attention_size");
  find(branch, "specquant_cuda_branch_size");
  if (abi() != SPECQUANT_CUDA_ABI || problem() != int64_t(sizeof(SpecquantCudaProblem)) ||
      layout() != int64_t(sizeof(SpecquantCudaLayout)) || attention() != int64_t(sizeof(SpecquantCudaAttention)) ||
      branch() != int64_t(sizeof(SpecquantCudaBranch)))
    throw std::runtime_error(path + " is of another version; build it again");
  CudaLibrary library;
  find(library.device, "specquant_cuda_device");
  find(library.check, "specquant_cuda_check");
  find(library.layout, "specquant_cuda_layout");
  find(library.matmul, "specquant_cuda_matmul");
  find(library.check_branch, "specquant_cuda_check_branch");
  find(library.branch_workspace, "specquant_cuda_branch_workspace");
  find(library.branch, "specquant_cuda_branch");
  find(library.check_attention, "specquant_cuda_check_attention");
  find(library.attention_workspace, "specquant_cuda_attention_workspace");
  find(library.attention, "specquant_cuda_attention");
  if (const char* wrong = library.device()) throw std::runtime_error(wrong);
  return library;
}

}  // namespace

const CudaLibrary& cuda_library() {
  static const CudaLibrary library = open();  // again at the next call if it throws
  return library;
}

}  // namespace specquant::ort
