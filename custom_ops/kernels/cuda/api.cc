#include "api.h"

#include <cstdarg>
#include <cstdio>

#include "specquant_cuda.h"

namespace specquant_cuda {

const char* say(const char* format, ...) {
  thread_local char message[256];
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(message, sizeof message, format, arguments);
  va_end(arguments);
  return message;
}

const char* failed(const char* what, cudaError_t error) { return say("%s: %s", what, cudaGetErrorString(error)); }

const char* current(Device& device) {
  int id = 0;
  cudaError_t error = cudaGetDevice(&id);
  const auto ask = [&](int& value, cudaDeviceAttr attribute) {
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(&value, attribute, id);
  };
  ask(device.major, cudaDevAttrComputeCapabilityMajor);
  ask(device.minor, cudaDevAttrComputeCapabilityMinor);
  ask(device.multiprocessors, cudaDevAttrMultiProcessorCount);
  if (error != cudaSuccess) return failed("no GPU can be used; check nvidia-smi and the driver, or use the CPU", error);
  if (device.major < 8)
    return say("the GPU has compute capability %d.%d and the kernels need 8.0 (Ampere) or later; use the CPU",
               device.major, device.minor);
  return nullptr;
}

}  // namespace specquant_cuda

SPECQUANT_EXPORT int32_t specquant_cuda_abi(void) { return SPECQUANT_CUDA_ABI; }

SPECQUANT_EXPORT const char* specquant_cuda_device(void) {
  specquant_cuda::Device device{};
  return specquant_cuda::current(device);
}
