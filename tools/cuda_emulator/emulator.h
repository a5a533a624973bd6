// A GPU's threads on a CPU, one fiber each, so that the CUDA kernels can be tested where there is no GPU.
//
// The threads of a block, or of a cluster of blocks, run in turn and in random order until they meet at a barrier;
// operations of a warp (mma, shuffles, ldmatrix) happen when the last of its 32 lanes arrives. Copies to shared memory
// land at their wait and not before. Kernels of clusters may have dynamic shared memory only.
#pragma once

#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <vector_functions.h>
#include <vector_types.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <vector>

#include <ucontext.h>

using std::max;
using std::min;

namespace emulator {

struct Copy {
  void* to;
  const void* from;
  bool there;
  int bytes;
};

enum class Form { kBytes, kHalfShared, kHalfRegisters };  // of wgmma: operands, and where the left one lies

// A thread's part of a warpgroup's product that is under way.
struct Product {
  int* d;
  uint32_t a[4];
  uint64_t b;  // where operand B lies in shared memory, / 16
  bool add;
  int columns;
  Form form = Form::kBytes;
  uint64_t left = 0;  // operand A, where it lies in shared memory
};

struct Fiber {
  std::vector<Copy> pending;
  std::vector<std::vector<Copy>> groups;
  std::vector<Product> uncommitted;
  std::vector<std::vector<Product>> products;
  void (*multiply_halves)(Product* const (&lanes)[32], int warp) = nullptr;  // of the forms that are not kBytes
  ucontext_t context;
  std::vector<char> stack;
  bool done;
  uint3 thread, block;
  int rank;      // of its block in the cluster
  long arrived;  // the generation of the cluster's barrier that it is part of
  char* shared;  // its block's
  int warp, lane;
};

// What the lanes of a warp brought to an operation, and where each wants its result.
struct Meeting {
  int arrived = 0;
  long generation = 0;
  void* in[32];
  void* out[32];
};

extern dim3 block_size, grid_size;
extern Fiber* self;
extern std::vector<Meeting> warps;

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "CUDA emulator: %s\n", what);
  std::abort();
}

void yield();
void sync_threads();
void cluster_arrive();
void cluster_wait();
const char* shared_of(int rank);  // of another block of the cluster
void launch(dim3 grid, dim3 threads, size_t shared_bytes, const std::function<void()>& body, int cluster = 1);

// Every lane brings `in` and `out`; the last one runs work(in[32], out[32]).
template <class Work>
void together(void* in, void* out, Work work) {
  Meeting& warp = warps[self->warp];
  const long generation = warp.generation;
  warp.in[self->lane] = in;
  warp.out[self->lane] = out;
  if (++warp.arrived == 32) {
    work(warp.in, warp.out);
    warp.arrived = 0;
    ++warp.generation;
  } else {
    while (warp.generation == generation) yield();
  }
}

template <class To, class From>
To bits_as(From value) {
  static_assert(sizeof(To) == sizeof(From));
  To result;
  std::memcpy(&result, &value, sizeof result);
  return result;
}

}  // namespace emulator

#undef __global__
#undef __device__
#undef __forceinline__
#undef __shared__
#define __global__
#define __device__
#define __forceinline__ inline
#undef __noinline__
#define __noinline__
#define __launch_bounds__(...)
#define __shared__ static
#define threadIdx (emulator::self->thread)
#define blockIdx (emulator::self->block)
#define blockDim emulator::block_size
#define gridDim emulator::grid_size
#define __syncthreads emulator::sync_threads
#define EMULATED_SHARED(type, name) type* name = reinterpret_cast<type*>(emulator::self->shared)

inline void __syncwarp() {
  emulator::together(nullptr, nullptr, [](void**, void**) {});
}

template <class T>
T __shfl_xor_sync(unsigned, T value, int distance) {
  T result;
  emulator::together(&value, &result, [distance](void** in, void** out) {
    for (int i = 0; i < 32; ++i) *static_cast<T*>(out[i]) = *static_cast<T*>(in[i ^ distance]);
  });
  return result;
}

template <class T>
T __shfl_sync(unsigned, T value, int lane) {
  struct Asked {
    T value;
    int lane;
  } asked{value, lane};
  T result;
  emulator::together(&asked, &result, [](void** in, void** out) {
    for (int i = 0; i < 32; ++i)
      *static_cast<T*>(out[i]) = static_cast<Asked*>(in[static_cast<Asked*>(in[i])->lane % 32])->value;
  });
  return result;
}

// Blocks run one after another, and of their threads one at a time.
inline int atomicAdd(int* to, int value) {
  const int before = *to;
  *to += value;
  return before;
}
inline void __threadfence() {}
template <class T>
T __ldcg(const T* from) {
  return *from;
}

inline int __popc(unsigned value) { return __builtin_popcount(value); }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fsqrt_rn(float a) { return std::sqrt(a); }
inline float __frsqrt_rn(float a) { return float(1 / std::sqrt(double(a))); }
template <class T>
T __ldg(const T* from) {
  return *from;
}
inline float __int_as_float(int v) { return emulator::bits_as<float>(v); }
inline float __uint_as_float(unsigned v) { return emulator::bits_as<float>(v); }
inline int __float_as_int(float v) { return emulator::bits_as<int>(v); }
inline unsigned __float_as_uint(float v) { return emulator::bits_as<unsigned>(v); }

inline unsigned __byte_perm(unsigned a, unsigned b, unsigned selector) {
  const uint64_t both = uint64_t(b) << 32 | a;
  unsigned result = 0;
  for (int i = 0; i < 4; ++i) result |= unsigned(both >> (selector >> 4 * i & 7) * 8 & 255) << 8 * i;
  return result;
}

inline int __dp4a(int a, int b, int sum) {
  for (int i = 0; i < 4; ++i) sum += int(int8_t(a >> 8 * i)) * int(int8_t(b >> 8 * i));
  return sum;
}

inline __half2 emulated_hfma2(__half2 a, __half2 b, __half2 c) {
  const float2 x = __half22float2(a), y = __half22float2(b), z = __half22float2(c);
  return __floats2half2_rn(std::fma(x.x, y.x, z.x), std::fma(x.y, y.y, z.y));
}
#define __hfma2 emulated_hfma2
