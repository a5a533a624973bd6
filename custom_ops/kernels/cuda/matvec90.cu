// The product of up to 8 tokens where memory can be copied in bulk (compute capability 9.0 and later): a block's weights
// stream through a ring in shared memory, and start to do so before the first stage is done. The ring mostly holds all of
// them, so that memory is busy while the first stage and the last block's sums are not.
//
// A slot has 64 features for every warp of the block's two panels. `full` counts its bytes in, `empty` its readers out.
#include <algorithm>

#include "launch.h"
#include "matvec.cuh"
#include "ptx90.cuh"

namespace specquant_cuda {
namespace {

constexpr int kMostSlots = 32;
constexpr int kPiece = kStep / kBlock * 64;  // bytes of a panel for a warp's step
constexpr int kAhead = 4;                    // steps whose scales are under way

#if __CUDA_ARCH__ >= 900 || !defined(__CUDACC__) || !defined(__CUDA_ARCH__)

// The weights of one block.
template <int warps>
struct Ring {
  static constexpr int kSlot = 2 * warps * kPiece;
  char* const slots;
  uint64_t *const full, *const empty;
  const int count, chunks;
  const uint8_t* panels[2];
  const int64_t bytes;  // of a panel

  __device__ __forceinline__ Ring(const Args& args, char* shared, uint64_t* barriers, int slots_)
      : slots(shared), full(barriers), empty(barriers + kMostSlots), count(slots_),
        chunks(ceil_div(args.kp / kStep, warps)), bytes(static_cast<int64_t>(ceil_div(args.n, kBlock)) * 64) {
    const int last = ceil_div(args.m, kPanel) - 1, first = blockIdx.x * (kOutputs / kPanel);
    panels[0] = args.qweight + min(first, last) * bytes;
    panels[1] = args.qweight + min(first + 1, last) * bytes;
  }

  __device__ __forceinline__ void start(int chunk) const {
    const int slot = chunk % count;
    const int64_t at = static_cast<int64_t>(chunk) * warps * kPiece;
    const uint32_t size = static_cast<uint32_t>(min(static_cast<int64_t>(warps * kPiece), bytes - at));
    barrier_expect(full + slot, 2 * size);
    for (int i = 0; i < 2; ++i)
      copy_bulk(slots + slot * kSlot + i * warps * kPiece, panels[i] + at, size, full + slot);
  }
};

#endif

template <Mode mode, int warps>
__global__ void __launch_bounds__(warps * 32) matvec90_kernel(const Args args, int slots) {
#if __CUDA_ARCH__ >= 900 || !defined(__CUDACC__) || !defined(__CUDA_ARCH__)
  using M = Matvec<mode, 1, warps, true>;
  extern __shared__ uint4 kept[];
  __shared__ float4 shares4[warps][M::kTokens * kOutputs / 4];  // kChannel: int32
  __shared__ float branch[mode == kChannel ? warps : 1][M::kTokens * kOutputs];
  __shared__ uint64_t barriers[2 * kMostSlots];
  char* ring_at = reinterpret_cast<char*>(kept);
  const Ring<warps> ring(args, ring_at, barriers, slots);
  M work(args, ring_at + slots * Ring<warps>::kSlot);
  const int steps = args.kp / kStep;
  if (threadIdx.x == 0) {
    for (int slot = 0; slot < slots; ++slot) barrier_init(ring.full + slot, 1), barrier_init(ring.empty + slot, warps);
    barriers_ready();
    for (int chunk = 0; chunk < min(slots, ring.chunks); ++chunk) ring.start(chunk);
  }
  typename M::Step scales[kAhead];
#pragma unroll
  for (int i = 0; i < kAhead; ++i)
    if (work.warp + i * warps < steps) work.load_scales(scales[i], work.warp + i * warps);
  float coef[M::kEarly];
  work.load_coef(coef);
  let_next_start();
  wait_for_previous();
  work.stage();  // meets: the barriers are seen

  const int half = work.g / 4 * warps * kPiece, within = work.warp * kPiece + work.t * 64 + work.g % 4 * 16;
  for (int first = 0; first < ring.chunks; first += kAhead) {
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      const int chunk = first + i, step = chunk * warps + work.warp, slot = chunk % slots, turn = chunk / slots;
      if (step >= steps) continue;
      typename M::Step& s = scales[i];
      work.load_activations(s, step);
      barrier_wait(ring.full + slot, turn & 1);
      const char* from = ring.slots + slot * Ring<warps>::kSlot + half + within;
      s.weights[0] = *reinterpret_cast<const uint4*>(from);
      s.weights[1] = *reinterpret_cast<const uint4*>(from + 4 * 64);
      work.add(s);
      if (step + kAhead * warps < steps) work.load_scales(s, step + kAhead * warps);
      if (chunk + slots < ring.chunks) {
        __syncwarp();  // all lanes have their weights
        if (work.lane == 0) barrier_arrive(ring.empty + slot);
      }
      const int done = chunk - 1;  // the other warps are mostly done with it, too
      if (threadIdx.x == 0 && done >= 0 && done + slots < ring.chunks) {
        barrier_wait(ring.empty + done % slots, done / slots & 1);
        ring.start(done + slots);
      }
    }
  }
  finish<M>(args, work, coef, shares4, branch);
#endif
}

template <Mode mode, int warps>
cudaError_t start(const Args& args, int multiprocessors, cudaStream_t stream) {
  const int blocks = ceil_div(args.m, kOutputs);
  const int together = std::clamp(ceil_div(blocks, multiprocessors), 1, std::max(1, 16 / warps));
  const int fixed = Staged<mode, 1>(args).bytes + warps * 1024 * (mode == kChannel ? 2 : 1) + 2048;
  const int chunks = ceil_div(args.kp / kStep, warps), slot = 2 * warps * kPiece;
  const int slots = std::min({(args.shared / together - fixed) / slot, chunks, kMostSlots});
  const size_t bytes = static_cast<size_t>(slots) * slot + Staged<mode, 1>(args).bytes;
  if (slots < std::min(2, chunks)) return matvec(args, mode, multiprocessors, stream);
  const auto kernel = matvec90_kernel<mode, warps>;
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
  if (error != cudaSuccess) return error;
  return launch_early(kernel, dim3(blocks), warps * 32, bytes, true, stream, args, slots);
}

template <Mode mode>
cudaError_t launch(const Args& args, int multiprocessors, cudaStream_t stream) {
  const int blocks = ceil_div(args.m, kOutputs) / multiprocessors;
  return blocks >= 3   ? start<mode, 4>(args, multiprocessors, stream)
         : blocks >= 1 ? start<mode, 8>(args, multiprocessors, stream)
                       : start<mode, 16>(args, multiprocessors, stream);
}

}  // namespace

cudaError_t matvec90(const Args& args, Mode mode, int multiprocessors, cudaStream_t stream) {
  switch (mode) {
    case kFold: return launch<kFold>(args, multiprocessors, stream);
    case kFoldZero: return launch<kFoldZero>(args, multiprocessors, stream);
    case kChannel: return launch<kChannel>(args, multiprocessors, stream);
    default: return launch<kHalf>(args, multiprocessors, stream);
  }
}

}  // namespace specquant_cuda
