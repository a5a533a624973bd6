// What the parts of the C API share. Host only.
#pragma once

#include <cuda_runtime.h>

#define SPECQUANT_EXPORT extern "C" __attribute__((visibility("default")))

namespace specquant_cuda {

struct Device {
  int major, minor, multiprocessors;
};

// The current device; or one line why it cannot be used.
const char* current(Device& device);

// One line in this thread's memory, valid until its next.
const char* say(const char* format, ...) __attribute__((format(printf, 1, 2)));
const char* failed(const char* what, cudaError_t error);

}  // namespace specquant_cuda
