// The product of one token (one_token.cuh), bound by how fast the weights come from memory.
//
// One wave of blocks, each warp of which has a unit's weights under way: before the first stage is done, too.
#include <algorithm>

#include "gate.cuh"
#include "launch.h"
#include "one_token.cuh"

namespace specquant_cuda {
namespace {

[[maybe_unused]] __device__ __forceinline__ float together(const Shares& shares, const char* kept, int index) {
  const float* sums = reinterpret_cast<const float*>(kept + shares.sums) + index / kTile * shares.parts * kTile + index % kTile;
  float y = 0.0f;
#pragma unroll 4
  for (int p = 0; p < shares.parts; ++p) y += sums[p * kTile];
  return y;
}

template <Mode mode>
__global__ void __launch_bounds__(kMostWarps * 32, 1) one_token_kernel(const Args args, const Shares shares) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  constexpr int kHeld = 2;  // steps of a unit that a thread has in registers
  extern __shared__ uint4 shared[];
  char* const kept = reinterpret_cast<char*>(shared);
  OneToken<mode> work(args, shares, kept);
  const int block = blockIdx.x, first = block * shares.least + min(block, shares.more);
  const int last = first + shares.least + (block < shares.more);
  let_next_start();

  Place at{first + work.slot, work.part};
  if (work.lane == 0) {
    barrier_init(work.arrived, 1);
    barriers_ready();
  }
  __syncthreads();
  if (at.tile < last) {
    // Few units at a time: what the first stage loads meanwhile would wait behind all of them.
    if (work.lane == 0) {
      if (threadIdx.x >= kPaced * 32) barrier_wait(work.arrived - kPaced, 0);
      work.fetch(at);
    }
    __syncwarp();
    work.load(work.now, at, true);
  }
  // The thread's own output, at the end.
  const int own = first * kTile + static_cast<int>(threadIdx.x);
  const bool owns = own < min(last * kTile, args.m);
  const float bias = owns && args.bias ? args.bias[own] : 0.0f;
  wait_for_previous();
  const float residual = owns && args.residual ? residual_at(args, own) : 0.0f;
  work.stage();
  __syncthreads();

  work.clear_sums();
  for (uint32_t parity = 0; at.tile < last; parity ^= 1) {
    const Place next = work.after(at);
    const bool more = next.tile < last;
    work.begin(at);
    const char* levels[2];
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const bool mine = work.g == 2 * work.t + e;
      levels[e] = kept + shares.levels + (mine ? (at.unit * kGroups + work.g) * kLevelBytes : -kZeros);
    }
    barrier_wait(work.arrived, parity);
    uint4 w[kHeld][2];
    Constants current;
#pragma unroll
    for (int k = 0; k < kSteps; ++k) {
      if (k % kHeld == 0) {
#pragma unroll
        for (int i = 0; i < kHeld; ++i) work.load(k + i, w[i]);
      }
      if (k == kSteps - kHeld) {  // all of it is in registers
        __syncwarp();
        if (work.lane == 0 && more) work.fetch(next);
        current = work.now;  // here, since a copy waits for what is under way
        if (more) work.load(work.now, next, next.tile != at.tile);
      }
      uint32_t lo[2], hi[2];
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const uint2 b = *reinterpret_cast<const uint2*>(levels[e] + 8 * k);
        lo[e] = b.x, hi[e] = b.y;
      }
      work.multiply(w[k % kHeld], lo, hi);
    }
    work.fold(at, current);
    if (next.tile != at.tile) work.finish(at.tile, at.tile - first, current);
    at = next;
  }
  __syncthreads();

  for (int i = threadIdx.x; i < (last - first) * kTile; i += blockDim.x) {
    const int place = first * kTile + i, output = min(place, args.m - 1);
    float y = together(shares, kept, i);
    const bool here = i == static_cast<int>(threadIdx.x);
    if (args.bias) y += here ? bias : args.bias[output];
    if (args.residual) y += here ? residual : residual_at(args, output);
    store_outputs(args, 0, output, y, place < args.m);
  }
#endif
}

// warps: the most of a block.
Shares divided(const Args& args, int multiprocessors, int warps) {
  Shares s{};
  s.tiles = ceil_div(args.m, kTile), s.units = ceil_div(args.kp, kUnitFeatures);
  s.parts = ceil_div(s.units, ceil_div(s.units, warps));
  s.slots = std::min(warps / s.parts, ceil_div(s.tiles, multiprocessors));
  const int bytes = s.parts * kTile * 4;  // of a tile's sums
  s.blocks = std::max(std::min(s.tiles, multiprocessors), ceil_div(s.tiles, kMostSums / bytes));
  s.least = s.tiles / s.blocks, s.more = s.tiles % s.blocks;
  s.levels = static_cast<int>(round_up(s.parts * s.slots * (kUnitBytes + 8), kZeros)) + kZeros;
  s.scales = s.levels + s.units * kGroups * kLevelBytes;
  s.starts = s.scales + s.units * kGroups * 4;
  s.low = s.starts + s.units * kGroups * 4;
  s.sums = s.low + args.rp * 4;
  s.bytes = s.sums + ceil_div(s.tiles, s.blocks) * bytes;
  return s;
}

// As many warps as shared memory allows.
Shares shares_of(const Args& args, int multiprocessors) {
  int warps = kMostWarps;
  while (warps > 4 && divided(args, multiprocessors, warps).bytes > args.most_shared) warps /= 2;
  return divided(args, multiprocessors, warps);
}

template <Mode mode>
cudaError_t start(const Args& args, int multiprocessors, cudaStream_t stream) {
  const Shares shares = shares_of(args, multiprocessors);
  const auto kernel = one_token_kernel<mode>;
  static Known known;
  const cudaError_t error = allow(kernel, args.most_shared, false, known);
  if (error != cudaSuccess) return error;
  return launch_early(kernel, dim3(shares.blocks), shares.parts * shares.slots * 32, shares.bytes, args.early, stream,
                      args, shares);
}

}  // namespace

bool takes_one_token(const Args& args, Mode mode, int multiprocessors) {
  return args.early && args.tokens == 1 && mode != kHalf && args.n % kStep == 0 &&
         shares_of(args, multiprocessors).bytes <= args.most_shared;
}

cudaError_t one_token(const Args& args, Mode mode, int multiprocessors, cudaStream_t stream) {
  return mode == kFold       ? start<kFold>(args, multiprocessors, stream)
         : mode == kMultiples ? start<kMultiples>(args, multiprocessors, stream)
                              : start<kChannel>(args, multiprocessors, stream);
}

}  // namespace specquant_cuda
