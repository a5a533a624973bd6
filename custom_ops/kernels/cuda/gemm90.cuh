// The product of many tokens on Hopper: Yᵀ = Ŵᵀ·Xᵀ with wgmma, weights as operand A, unpacked in registers.
//
// A block of threads stays on its multiprocessor and takes tile after tile of 256 outputs x `tokens` tokens. Four warps
// keep a ring of slots filled (gemm90_ring.cuh), 128 features each; two warpgroups of 128 outputs each multiply. A warp
// owns 32 outputs. With g = lane / 4 and t = lane % 4, a 16-byte load holds outputs 4g … 4g + 3 of block
// 4s + t of 8 features; word 2i + h is row g + 8h of its part of fragment i, k of step s. The first stage has put the
// activations where operand B is read from (args.h, tile_place), so that a tile of them is one contiguous copy.
//
// Without groups the int32 sums run over all features. With groups they are folded into float every 64 or 128 features:
// three instructions an output, where the tensor cores take as long as two for 64 features:
// docs/cuda.md has the count.
#pragma once

#include "gemm90_end.cuh"

namespace specquant_cuda {

// The products of such a thread.
template <Mode mode, int tokens, int folds>
struct Consumer90 : Sums90<mode, tokens, folds> {
  using Base = Sums90<mode, tokens, folds>;
  using G = typename Base::G;
  using Base::g, Base::gemm, Base::group, Base::mask, Base::release, Base::sums, Base::t, Base::totals;

  __device__ __forceinline__ explicit Consumer90(const G& gemm_) : Base(gemm_) {}

  // Fragments of 64 features: [i][step of 32].
  __device__ __forceinline__ void weights(uint32_t (&a)[2][2][4], const uint8_t* slot, int half) const {
    const uint8_t* panel = slot + G::kWeights + (2 * group + g / 4) * G::kPanelBytes + g % 4 * 16;
    // Blocks t and t + 2 share their banks: their threads read their two halves in turn.
    const bool turned = t >= 2;
#pragma unroll
    for (int s = 0; s < 2; ++s) {
      const uint8_t* from = panel + (8 * half + 4 * s + t) * 64;
      const uint2 one = *reinterpret_cast<const uint2*>(from + turned * 8);
      const uint2 other = *reinterpret_cast<const uint2*>(from + !turned * 8);
      const uint32_t words[4] = {turned ? other.x : one.x, turned ? other.y : one.y, turned ? one.x : other.x,
                                 turned ? one.y : other.y};
#pragma unroll
      for (int w = 0; w < 4; ++w) unpack_s8(words[w], mask, a[w / 2][s][w % 2], a[w / 2][s][w % 2 + 2]);
    }
  }

  __device__ __forceinline__ void multiply(const uint32_t (&a)[2][2][4], const uint8_t* slot, int half, bool add) {
    const uint64_t operand = wgmma_operand(slot) + half * (64 >> 4);
    wgmma_fence();
#pragma unroll
    for (int s = 0; s < 2; ++s)
#pragma unroll
      for (int i = 0; i < 2; ++i) wgmma_s8(sums[i], a[i][s], operand + s * (32 >> 4), s > 0 || add);
    wgmma_commit();
  }

  __device__ __forceinline__ void hold_sums() {
#pragma unroll
    for (int i = 0; i < 2 * G::kSums; ++i) hold(sums[i / G::kSums][i % G::kSums]);
  }

  // All features of a tile, without groups. at: slots taken so far.
  __device__ __forceinline__ void run_channels(int& at, int output) {
    for (int chunk = 0; chunk < gemm.chunks; ++chunk, ++at) {
      const int slot = at % G::kSlots;
      const uint8_t* from = gemm.shared + slot * G::kSlot;
      barrier_wait(gemm.full + slot, at / G::kSlots & 1);
      uint32_t first[2][2][4], second[2][2][4];
      weights(first, from, 0);
      multiply(first, from, 0, chunk > 0);
      wgmma_wait<1>();
      if (chunk) release(gemm.empty + (at - 1) % G::kSlots);
      weights(second, from, 1);
      multiply(second, from, 1, true);
      wgmma_wait<1>();
    }
    this->load_ends(this->output_of(output));
    wgmma_wait<0>();
    hold_sums();
    release(gemm.empty + (at - 1) % G::kSlots);
  }

  __device__ __forceinline__ void run_groups(int& at, int output) {
#pragma unroll
    for (int i = 0; i < 2 * G::kSums; ++i) totals[i / G::kSums][i % G::kSums] = 0.0f;
    for (int chunk = 0; chunk < gemm.chunks; ++chunk, ++at) {
      const int slot = at % G::kSlots;
      const uint8_t* from = gemm.shared + slot * G::kSlot;
      barrier_wait(gemm.full + slot, at / G::kSlots & 1);
#pragma unroll
      for (int fold_ = 0; fold_ < folds; ++fold_) {
        uint32_t first[2][2][4], second[2][2][4];
        weights(first, from, fold_);
        multiply(first, from, fold_, false);
        if constexpr (folds == 1) {
          weights(second, from, 1);
          multiply(second, from, 1, true);
        }
        wgmma_wait<0>();
        hold_sums();
        fold(from, fold_);
      }
      release(gemm.empty + slot);
    }
    this->load_ends(this->output_of(output));
  }

  // totals += sums · both scales.
  __device__ __forceinline__ void fold(const uint8_t* slot, int which) {
    const int output = 32 * group + 4 * g;
    const uint2 raw = *reinterpret_cast<const uint2*>(slot + G::kWeightScales + (which * G::kOutputs + output) * 2);
    const float2 low = __half22float2(half2_of(raw.x)), high = __half22float2(half2_of(raw.y));
    const float scale[4] = {low.x, low.y, high.x, high.y};
#pragma unroll
    for (int block = 0; block < tokens / 8; ++block) {
      const int token = which * tokens + 8 * block + 2 * t;
      const float2 token_scale = *reinterpret_cast<const float2*>(slot + G::kTokenScales + token * 4);
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const int w = i / 2, j = 4 * block + i % 4;
        float& total = totals[i / 4][j];
        total = fmaf(static_cast<float>(sums[i / 4][j]) * scale[w], i % 2 ? token_scale.y : token_scale.x, total);
      }
    }
  }
};

template <Mode mode, int tokens, int folds>
__global__ void __launch_bounds__(384, 1) gemm90_kernel(const Args args) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL) || !defined(__CUDA_ARCH__)  // empty for all GPUs but Hopper
  using G = Gemm90<mode, tokens, folds>;
  extern __shared__ __align__(1024) uint8_t memory[];
  const G gemm(args, memory);
  if (threadIdx.x == 0) {
    for (int i = 0; i < G::kSlots; ++i) {
      barrier_init(gemm.full + i, 1);
      barrier_init(gemm.empty + i, 4 * G::kConsumers);
    }
    barrier_init(gemm.end_full, 1);
    barrier_init(gemm.end_empty, 4 * G::kConsumers);
    barriers_ready();
  }
  __syncthreads();
  wait_for_previous();
  if (threadIdx.x < 128) {
    leave_registers<40>();
    gemm.produce(threadIdx.x / 32, threadIdx.x % 32);
  } else {
    take_registers<232>();
    Consumer90<mode, tokens, folds> consumer(gemm);
    int at = 0, turn = 0;
    for (int tile = blockIdx.x; tile < gemm.tiles; tile += gridDim.x, ++turn) {
      const int2 corner = gemm.corner(tile);
      if constexpr (G::kFolds) {
        consumer.run_groups(at, corner.y);
      } else {
        consumer.run_channels(at, corner.y);
      }
      consumer.finish(corner, turn);
    }
  }
#endif
}

}  // namespace specquant_cuda
