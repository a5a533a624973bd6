// The C ABI that custom_ops/library.py calls through ctypes: tests and tools, on one thread.
#include <cstdio>
#include <cstring>
#include <memory>
#include <new>

#include "steps.h"

#define SPECQUANT_EXPORT extern "C" __attribute__((visibility("default")))

namespace {

thread_local char message[256];

}  // namespace

SPECQUANT_EXPORT int32_t specquant_abi() { return specquant::kAbi; }

// sizeof(Problem), which the caller's mirror of it must have too.
SPECQUANT_EXPORT int64_t specquant_problem_size() { return int64_t(sizeof(specquant::Problem)); }

// sizeof(Attention), likewise.
SPECQUANT_EXPORT int64_t specquant_attention_size() { return int64_t(sizeof(specquant::Attention)); }

// The machine the library was compiled for.
SPECQUANT_EXPORT const char* specquant_architecture() {
#if defined(__x86_64__)
  return "x86_64";
#elif defined(__aarch64__)
  return "aarch64";
#else
  return "other";
#endif
}

// The index-th instruction set that was compiled, slowest first; null past the last.
SPECQUANT_EXPORT const char* specquant_isa(int32_t index) {
  for (const auto* const* it = specquant::kCompiled; *it; ++it)
    if (index-- == 0) return (*it)->name;
  return nullptr;
}

// 1 if this CPU runs the instruction set called `name`.
SPECQUANT_EXPORT int32_t specquant_isa_supported(const char* name) {
  return specquant::select(name, message, sizeof message) != nullptr;
}

// Null if it worked, else one line, valid until this thread's next call.
SPECQUANT_EXPORT const char* specquant_run(const specquant::Problem* problem, const char* isa) {
  const specquant::Kernels* kernels = specquant::select(isa, message, sizeof message);
  if (!kernels) return message;
  if (const char* wrong = specquant::check(*problem)) return wrong;
  const std::unique_ptr<char[]> scratch(new (std::nothrow) char[specquant::scratch_bytes(*problem)]);
  if (!scratch) return "there is no memory for the scratch; use fewer tokens";
  specquant::matmul(*kernels, *problem, specquant::ThreadPool{}, scratch.get());
  return nullptr;
}

// Int4KVAttention or HalfKVAttention, as kv_bits says. Null if it worked, else one line.
SPECQUANT_EXPORT const char* specquant_attend(const specquant::Attention* attention, const char* isa) {
  const specquant::Kernels* kernels = specquant::select(isa, message, sizeof message);
  if (!kernels) return message;
  if (const char* wrong = specquant::check(*attention)) return wrong;
  const std::unique_ptr<char[]> scratch(new (std::nothrow) char[specquant::scratch_bytes(*attention)]);
  if (!scratch) return "there is no memory for the scratch; use a shorter context";
  specquant::attend(*kernels, *attention, specquant::ThreadPool{}, scratch.get());
  return nullptr;
}

// One row: u float32 [n] → levels less their zero-point int8 [n], scale [n / group, or 1].
SPECQUANT_EXPORT const char* specquant_quantize(const float* u, int64_t n, int32_t bits, int64_t group, float clip,
                                                int8_t* levels, float* scale, const char* isa) {
  const specquant::Kernels* kernels = specquant::select(isa, message, sizeof message);
  if (!kernels) return message;
  if (bits < 2 || bits > 8) return "bits must be 2 to 8";
  if (!(clip > 0.0f && clip <= 1.0f)) return "clip must be more than 0, and at most 1";
  if (n < 1 || group < 0 || group % specquant::kBlock || (group && n % group))
    return "group must be 0, or a divisor of n that 8 divides";
  const int64_t padded = specquant::round_up(n, specquant::kBlock);
  const std::unique_ptr<float[]> values(new (std::nothrow) float[size_t(padded)]());
  const std::unique_ptr<int8_t[]> whole(new (std::nothrow) int8_t[size_t(padded)]);
  const std::unique_ptr<int32_t[]> starts(new (std::nothrow) int32_t[size_t(group ? n / group : 1)]);
  if (!values || !whole || !starts) return "there is no memory for the row";
  std::memcpy(values.get(), u, size_t(n) * sizeof(float));
  kernels->quantize(values.get(), n, bits, group, group ? group : n, clip, whole.get(), scale, starts.get());
  std::memcpy(levels, whole.get(), size_t(n));
  return nullptr;
}

// Multiplies and adds bytes as fast as `isa` (null: the fastest) can, on this thread: the operations that it did, or
// −1 if this CPU lacks it. The time is the caller's to take.
SPECQUANT_EXPORT int64_t specquant_peak(int64_t steps, const char* isa) {
  const specquant::Kernels* kernels = specquant::select(isa, message, sizeof message);
  return kernels ? kernels->peak(steps) : -1;
}

// Reads `count` words on this thread, as four streams side by side; their sum.
SPECQUANT_EXPORT uint64_t specquant_read(const uint64_t* words, int64_t count) {
  constexpr int kStreams = 4, kLine = 8;
  uint64_t sums[kStreams][kLine] = {};
  const int64_t length = count / kStreams / kLine * kLine;
  for (int64_t i = 0; i < length; i += kLine)
    for (int s = 0; s < kStreams; ++s)
      for (int j = 0; j < kLine; ++j) sums[s][j] += words[s * length + i + j];
  uint64_t all = 0;
  for (const auto& stream : sums)
    for (const uint64_t sum : stream) all += sum;
  return all;
}
