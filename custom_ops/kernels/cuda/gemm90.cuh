// The product of many tokens on Hopper: Yᵀ = Ŵᵀ·Xᵀ with wgmma, weights as operand A, unpacked in registers.
//
// A block of threads stays on its multiprocessor and takes tile after tile of 256 outputs x `tokens` tokens. Four warps
// keep a ring of slots filled (gemm90_ring.cuh), 128 features each; two warpgroups of 128 outputs each multiply. A warp
// owns 32 outputs. With g = lane / 4 and t = lane % 4, a 16-byte load holds outputs 4g … 4g + 3 of block
// 4s + t of 8 features; word 2i + h is row g + 8h of its part of fragment i, k of step s. The first stage has put the
// activations where operand B is read from (args.h, tile_place), so that a tile of them is one contiguous copy.
//
// Weights are unpacked as q times their group's scale, which fits a signed byte, so that int32 sums run over all features.
// Where activations have segments, too, sums are folded into float every 64 or 128 features: two instructions an output, as
// long as the tensor cores take for 64 features (docs/cuda.md).
#pragma once

#include "gemm90_end.cuh"
#include "gemm90_wide.cuh"

namespace specquant_cuda {

// The products of such a thread.
template <Mode mode, int tokens, int folds, bool split>
struct Consumer90 : Sums90<mode, tokens, folds, split> {
  using Base = Sums90<mode, tokens, folds, split>;
  using G = typename Base::G;
  using Base::g, Base::gemm, Base::group, Base::mask, Base::release, Base::sums, Base::t, Base::totals;

  static constexpr bool kGroups = mode != kChannel;
  const uint8_t* of_groups;  // scales of groups of the thread's panel
  uint2 scales[2];           // those of a chunk's halves, asked for while the chunk before is multiplied

  __device__ __forceinline__ explicit Consumer90(const G& gemm_) : Base(gemm_) {}

  __device__ __forceinline__ void load_scales(int chunk) {
#pragma unroll
    for (int half = 0; kGroups && half < 2; ++half) {
      const int at = quotient(2 * (gemm.first + chunk) + half, gemm.args.group_steps);
      scales[half] = __ldg(reinterpret_cast<const uint2*>(of_groups + 8 * at));
    }
  }

  // output: the tile's first.
  __device__ __forceinline__ void start(int output) {
    const int panel = min(output / kPanel + 2 * group + g / 4, gemm.args.m / kPanel - 1);
    of_groups = gemm.args.group_scales + static_cast<int64_t>(panel) * gemm.args.groups * 8;
    load_scales(0);
  }

  // Fragments of 64 features: [i][step of 32].
  __device__ __forceinline__ void weights(uint32_t (&a)[2][2][4], const uint8_t* slot, int half, const uint2& raw) const {
    const GroupScales c(raw, g % 4);
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
      for (int w = 0; w < 4; ++w) {
        uint32_t &first = a[w / 2][s][w % 2], &second = a[w / 2][s][w % 2 + 2];
        if constexpr (kGroups) {
          Multiple(c.of(w)).unpack(words[w], first, second);
        } else {
          unpack_s8(words[w], mask, first, second);
        }
      }
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

  // All features of a tile, without segments.
  __device__ __forceinline__ void run_channels(typename G::Turn& at, int output) {
    for (int chunk = 0; chunk < gemm.chunks; ++chunk, at.next()) {
      const uint8_t* from = gemm.shared + at.slot * G::kSlot;
      const uint2 now[2] = {scales[0], scales[1]};
      load_scales(min(chunk + 1, gemm.chunks - 1));
      barrier_wait(gemm.full + at.slot, at.parity);
      uint32_t first[2][2][4], second[2][2][4];
      weights(first, from, 0, now[0]);
      multiply(first, from, 0, chunk > 0);
      wgmma_wait<1>();
      if (chunk) release(gemm.empty + at.last);
      weights(second, from, 1, now[1]);
      multiply(second, from, 1, true);
      wgmma_wait<1>();
    }
    this->load_ends(this->output_of(output));
    wgmma_wait<0>();
    hold_sums();
    release(gemm.empty + at.last);
  }

  __device__ __forceinline__ void run_segments(typename G::Turn& at, int output) {
#pragma unroll
    for (int i = 0; i < 2 * G::kSums; ++i) totals[i / G::kSums][i % G::kSums] = 0.0f;
    for (int chunk = 0; chunk < gemm.chunks; ++chunk, at.next()) {
      const uint8_t* from = gemm.shared + at.slot * G::kSlot;
      const uint2 now[2] = {scales[0], scales[1]};
      load_scales(min(chunk + 1, gemm.chunks - 1));
      barrier_wait(gemm.full + at.slot, at.parity);
#pragma unroll
      for (int fold_ = 0; fold_ < folds; ++fold_) {
        uint32_t first[2][2][4], second[2][2][4];
        weights(first, from, fold_, now[fold_]);
        multiply(first, from, fold_, false);
        if constexpr (folds == 1) {
          weights(second, from, 1, now[1]);
          multiply(second, from, 1, true);
        }
        wgmma_wait<0>();
        hold_sums();
        fold(from, fold_);
      }
      release(gemm.empty + at.slot);
    }
    this->load_ends(this->output_of(output));
  }

  // totals += sums · the tokens' scales.
  __device__ __forceinline__ void fold(const uint8_t* slot, int which) {
#pragma unroll
    for (int block = 0; block < tokens / 8; ++block) {
      const int token = which * tokens + 8 * block + 2 * t;
      const float2 token_scale = *reinterpret_cast<const float2*>(slot + G::kTokenScales + token * 4);
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        float& total = totals[i / 4][4 * block + i % 4];
        total = fmaf(static_cast<float>(sums[i / 4][4 * block + i % 4]), i % 2 ? token_scale.y : token_scale.x, total);
      }
    }
  }
};

// parts: blocks of a cluster, which share a tile where it is split.
template <Mode mode, int tokens, int folds, bool split>
__global__ void __launch_bounds__(384, 1) gemm90_kernel(const Args args, int parts) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL) || !defined(__CUDA_ARCH__)  // empty for all GPUs but Hopper
  using G = Gemm90<mode, tokens, folds, split>;
  extern __shared__ __align__(1024) uint8_t memory[];
  const G gemm(args, parts, memory);
  if (threadIdx.x == 0) {
    for (int i = 0; i < G::kSlots; ++i) {
      barrier_init(gemm.full + i, 1);
      barrier_init(gemm.empty + i, 4 * G::kConsumers);
    }
    barrier_init(gemm.end_full, 1);
    barrier_init(gemm.end_empty, 4 * G::kConsumers);
    if constexpr (split) box_open(gemm.box, tokens * G::kOutputs * 4);
    barriers_ready();
  }
  __syncthreads();
  if constexpr (split) cluster_arrive();
  wait_for_previous();
  if constexpr (split) cluster_wait();
  if (threadIdx.x < 128) {
    leave_registers<40>();
    gemm.produce(threadIdx.x / 32, threadIdx.x % 32);
  } else {
    take_registers<232>();
    int turn = 0;
    typename G::Turn at;
    if constexpr (G::kWide) {
      Wide90 consumer(gemm);
      for (int tile = blockIdx.x; tile < gemm.tiles; tile += gridDim.x, ++turn) {
        const int2 corner = gemm.corner(tile);
        consumer.run(at, corner.y);
        consumer.finish(corner, turn);
      }
    } else {
      Consumer90<mode, tokens, folds, split> consumer(gemm);
      for (int tile = gemm.first_tile(); tile < gemm.tiles; tile = gemm.next_tile(tile), ++turn) {
        const int2 corner = gemm.corner(tile);
        consumer.start(corner.y);
        if constexpr (G::kFolds) {
          consumer.run_segments(at, corner.y);
        } else {
          consumer.run_channels(at, corner.y);
        }
        consumer.finish(corner, turn);
      }
    }
  }
#endif
}

}  // namespace specquant_cuda
