// The product of many tokens on Hopper: Yᵀ = Ŵᵀ·Xᵀ with wgmma, weights as operand A, unpacked in registers.
//
// A block of threads stays on its multiprocessor and takes tile after tile of 256 outputs x `tokens` tokens. Four warps
// keep a ring of slots filled (gemm90_ring.cuh), 128 features each; two warpgroups of 128 outputs each multiply. A warp
// owns 32 outputs. With g = lane / 4 and t = lane % 4, a 16-byte load holds outputs 4g … 4g + 3 of block
// 4s + t of 8 features; word 2i + h is row g + 8h of its part of fragment i, k of step s. The first stage has put the
// activations where operand B is read from (args.h, tile_place), so that a tile of them is one contiguous copy.
//
// Without groups the int32 sums run over all features. With groups they are folded into float every 64 or 128 features:
// three instructions an output, four with zero-points, where the tensor cores take as long as two for 64 features:
// docs/cuda.md has the count.
#pragma once

#include "gemm90_ring.cuh"
#include "levels.cuh"
#include "unpack.cuh"

namespace specquant_cuda {

// What a thread of the two multiplying warpgroups holds.
template <Mode mode, int tokens, int folds>
struct Consumer90 {
  using G = Gemm90<mode, tokens, folds>;

  const G& gemm;
  int group, g, t, lane;
  uint32_t mask;
  int sums[2][G::kSums];  // [i][4 · column block + 2h + e]: output 4g + 2i + h, token 8 · block + 2t + e
  float totals[2][G::kFolds ? G::kSums : 1];

  // What a thread's four outputs need at the end of a tile, on its way while the last product is.
  struct Ends {
    uint2 coef[8];  // of columns 8t …, of the first 32
    uint2 scale;
    float bias[4];
  } ends;

  __device__ __forceinline__ explicit Consumer90(const G& gemm_)
      : gemm(gemm_), group((threadIdx.x / 32) - 4), g(threadIdx.x % 32 / 4), t(threadIdx.x % 4), lane(threadIdx.x % 32),
        mask(gemm_.args.high_nibbles) {}

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

  __device__ __forceinline__ void release(uint64_t* barrier) const {
    __syncwarp();
    if (lane == 0) barrier_arrive(barrier);
  }

  // The first warpgroup runs ahead of the other by as many slots as this, from here on: one ends its tile while the other
  // still multiplies.
  __device__ __forceinline__ void wait_for_lead() const {
    if (group >= 4) barrier_wait(gemm.lead, 0);
  }
  __device__ __forceinline__ void give_lead(int at) const {
    if (group < 4 && at + 1 == min(G::kLead, gemm.chunks)) release(gemm.lead);
  }

  // All features of a tile, without groups. at: slots taken so far.
  __device__ __forceinline__ void run_channels(int& at, int tile) {
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
      give_lead(at);
    }
    load_ends(output_of(tile));
    wgmma_wait<0>();
    hold_sums();
    release(gemm.empty + (at - 1) % G::kSlots);
  }

  __device__ __forceinline__ void run_groups(int& at, int tile) {
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
      give_lead(at);
    }
    load_ends(output_of(tile));
  }

  // totals += sums · both scales.
  __device__ __forceinline__ void fold(const uint8_t* slot, int which) {
    const int output = 32 * group + 4 * g;
    const uint2 raw = *reinterpret_cast<const uint2*>(slot + G::kWeightScales + (which * G::kOutputs + output) * 2);
    const float2 low = __half22float2(half2_of(raw.x)), high = __half22float2(half2_of(raw.y));
    const float scale[4] = {low.x, low.y, high.x, high.y};
    uint32_t row_sums[4];
    if constexpr (G::kZeros) {
      const uint8_t* from = slot + G::kRowSums + which * G::kOutputs * 4;
#pragma unroll
      for (int i = 0; i < 4; ++i)
        row_sums[i] = -16 * (gemm.args.wide_sums ? reinterpret_cast<const int32_t*>(from)[output + i]
                                                 : reinterpret_cast<const int16_t*>(from)[output + i]);
    }
#pragma unroll
    for (int block = 0; block < tokens / 8; ++block) {
      const int token = which * tokens + 8 * block + 2 * t;
      const float2 token_scale = *reinterpret_cast<const float2*>(slot + G::kTokenScales + token * 4);
      int2 zero = make_int2(0, 0);
      if constexpr (G::kZeros) zero = *reinterpret_cast<const int2*>(slot + G::kTokenZeros + token * 4);
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const int w = i / 2, j = 4 * block + i % 4;
        int sum = sums[i / 4][j];
        // Unsigned: the zero-points of rows past the last token are anything.
        if constexpr (G::kZeros) sum += static_cast<uint32_t>(i % 2 ? zero.y : zero.x) * row_sums[w];
        float& total = totals[i / 4][j];
        total = fmaf(static_cast<float>(sum) * scale[w], i % 2 ? token_scale.y : token_scale.x, total);
      }
    }
  }

  __device__ __forceinline__ int output_of(int tile) const { return gemm.first_output(tile) + 32 * group + 4 * g; }

  __device__ __forceinline__ void load_coef(uint2 (&coef)[8], int output, int column) const {
    const __half* from = gemm.args.coef + output;
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const int at = column + 8 * t + j;
      coef[j] = at < gemm.args.rank && output < gemm.args.m
                    ? __ldg(reinterpret_cast<const uint2*>(from + static_cast<int64_t>(at) * gemm.args.m))
                    : make_uint2(0, 0);
    }
  }

  __device__ __forceinline__ void load_ends(int output) {
    const Args& args = gemm.args;
    load_coef(ends.coef, output, 0);
    ends.scale = make_uint2(0, 0);
    if (mode == kChannel && output < args.m) ends.scale = __ldg(reinterpret_cast<const uint2*>(args.scales + output));
    const bool there = args.bias && output < args.m;
    const float4 bias =
        there ? __ldg(reinterpret_cast<const float4*>(args.bias + output)) : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    ends.bias[0] = bias.x, ends.bias[1] = bias.y, ends.bias[2] = bias.z, ends.bias[3] = bias.w;
  }

  // C as fragments: [i][k], columns 8t … 8t + 7.
  __device__ __forceinline__ static void fragments_of(uint32_t (&coef)[2][2][4], const uint2 (&rows)[8]) {
#pragma unroll
    for (int w = 0; w < 4; ++w)
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const uint2 even = rows[2 * j], odd = rows[2 * j + 1];
        coef[w / 2][j / 2][w % 2 + j % 2 * 2] =
            __byte_perm(w < 2 ? even.x : even.y, w < 2 ? odd.x : odd.y, w % 2 ? 0x7632 : 0x5410);
      }
  }

  // y of a tile: scales where there are no groups, the branch, bias, residual.
  __device__ __forceinline__ void finish(int tile, int turn) {
    gemm.args.y_half ? finish_rank<true>(tile, turn) : finish_rank<false>(tile, turn);
  }

  // halves: y and the residual are float16.
  template <bool halves>
  __device__ __forceinline__ void finish_rank(int tile, int turn) {
    switch (gemm.args.rank ? gemm.args.rp / kRankStep : 0) {
      case 0: finish_added<0, halves>(tile, turn); break;
      case 1: finish_added<1, halves>(tile, turn); break;
      default: finish_as<2, halves, true>(tile, turn);
    }
  }

  template <int blocks, bool halves>
  __device__ __forceinline__ void finish_added(int tile, int turn) {
    if (mode == kChannel && halves && !gemm.args.residual) {
      finish_as<blocks, halves, false>(tile, turn);
    } else {
      finish_as<blocks, halves, true>(tile, turn);
    }
  }

  // With 8 bits: sums less zero-points.
  __device__ __forceinline__ void subtract_zeros(int output) {
    const Args& args = gemm.args;
    int row_sums[4] = {};
#pragma unroll
    for (int i = 0; i < 4; ++i)
      if (output < args.m)
        row_sums[i] = args.wide_sums ? static_cast<const int32_t*>(args.row_sums)[output + i]
                                     : static_cast<const int16_t*>(args.row_sums)[output + i];
#pragma unroll
    for (int i = 0; i < 2 * G::kSums; ++i) {
      const int w = i / G::kSums, j = i % G::kSums, row = j / 4 * 8 + 2 * t + j % 2;
      // Unsigned: the zero-points of rows past the last token are anything.
      const uint32_t zero = reinterpret_cast<const int*>(gemm.shared + G::kEndZeros)[row];
      sums[w][j] = (sums[w][j] >> 4) - zero * row_sums[2 * w + j / 2 % 2];
    }
  }

  // blocks: of 32 columns of the branch. added: there may be a residual. Few jumps: while 8 tokens wait for something,
  // others go on.
  template <int blocks, bool halves, bool added>
  __device__ __forceinline__ void finish_as(int tile, int turn) {
    const Args& args = gemm.args;
    constexpr int together = blocks > 1 ? 1 : 2;  // times 8 tokens
    const int first_token = gemm.first_token(tile) + 2 * t, output = output_of(tile);
    const int tokens_left = output < args.m ? args.tokens - first_token : 0;  // from this thread's first on
    uint32_t coef[blocks ? blocks : 1][2][2][4];
    if constexpr (blocks > 0) fragments_of(coef[0], ends.coef);
    if constexpr (blocks > 1) {
      load_coef(ends.coef, output, kRankStep);
      fragments_of(coef[blocks - 1], ends.coef);
    }
    const bool zeros = mode == kChannel && args.bits == 8;
    const float2 low_scales = __half22float2(half2_of(ends.scale.x)), high_scales = __half22float2(half2_of(ends.scale.y));
    const float unit = zeros ? 1.0f : 0.0625f;  // sums are 16 times too large: the weights were
    const float scale[4] = {low_scales.x * unit, low_scales.y * unit, high_scales.x * unit, high_scales.y * unit};
    barrier_wait(gemm.end_full, turn & 1);
    if (zeros) subtract_zeros(output);
    constexpr int size = halves ? 2 : 4;
    const int64_t step = static_cast<int64_t>(args.m) * size;
    int64_t at = first_token * step + static_cast<int64_t>(output) * size;  // of this thread's outputs, in bytes
#pragma unroll
    for (int start = 0; start < tokens / 8; start += together) {
      uint4 residual[together][2];
      if (added && args.residual) {
#pragma unroll
        for (int i = 0; i < 2 * together; ++i)
          residual[i / 2][i % 2] =
              residual_of<halves>(at + (i / 2 * 8 + i % 2) * step, 8 * (start + i / 2) + i % 2 < tokens_left);
      }
      float branch[together][8] = {};
#pragma unroll
      for (int i = 0; i < together * blocks * (halves ? 1 : 2); ++i) {  // float16 y does not see low's trailing bits
        const int k = i % together, b = i / together % (blocks ? blocks : 1), part = i / (together * (blocks ? blocks : 1));
        const int row = 8 * (start + k) + g;
        const uint8_t* from = gemm.shared + G::kLow + ((row * 2 + part) * blocks + b) * kRankStep * 2 + 16 * t;
        const uint4 raw = *reinterpret_cast<const uint4*>(from);
        const uint32_t low[2][2] = {{raw.x, raw.y}, {raw.z, raw.w}};
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          float(&out)[4] = *reinterpret_cast<float(*)[4]>(branch[k] + j / 2 * 4);
          mma_f16(out, coef[b][j / 2][j % 2], low[j % 2]);
        }
      }
#pragma unroll
      for (int k = 0; k < together; ++k, at += 8 * step) {
        const int place = (8 * (start + k) + 2 * t) * 4;
        float2 factor = make_float2(0.0f, 0.0f), token_scale = make_float2(0.0f, 0.0f);
        if constexpr (blocks > 0) factor = *reinterpret_cast<const float2*>(gemm.shared + G::kFactors + place);
        if constexpr (mode == kChannel)
          token_scale = *reinterpret_cast<const float2*>(gemm.shared + G::kEndScales + place);
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          float v[4];
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const int j = 4 * (start + k) + i % 2 * 2 + e;
            float rest = ends.bias[i];
            if constexpr (blocks > 0) rest = fmaf(branch[k][i / 2 * 4 + i % 2 * 2 + e], e ? factor.y : factor.x, rest);
            if constexpr (mode == kChannel) {
              v[i] = fmaf(static_cast<float>(sums[i / 2][j]), (e ? token_scale.y : token_scale.x) * scale[i], rest);
            } else {
              v[i] = totals[i / 2][j] + rest;
            }
          }
          if (added && args.residual) add_residual<halves>(v, residual[k][e]);
          if (8 * (start + k) + e < tokens_left) store<halves>(v, at + e * step);
        }
      }
      hold(at);  // or the places of all tokens are worked out at once, and take registers
    }
    release(gemm.end_empty);
  }

  // Four outputs of it, as they lie. at: in bytes.
  template <bool halves>
  __device__ __forceinline__ uint4 residual_of(int64_t at, bool there) const {
    if (!there) return make_uint4(0, 0, 0, 0);
    const uint8_t* from = static_cast<const uint8_t*>(gemm.args.residual) + at;
    if constexpr (!halves) return *reinterpret_cast<const uint4*>(from);
    const uint2 raw = *reinterpret_cast<const uint2*>(from);
    return make_uint4(raw.x, raw.y, 0, 0);
  }

  template <bool halves>
  __device__ __forceinline__ static void add_residual(float (&v)[4], const uint4& raw) {
    if constexpr (halves) {
      const float2 first = __half22float2(half2_of(raw.x)), second = __half22float2(half2_of(raw.y));
      v[0] += first.x, v[1] += first.y, v[2] += second.x, v[3] += second.y;
    } else {
      v[0] += __uint_as_float(raw.x), v[1] += __uint_as_float(raw.y);
      v[2] += __uint_as_float(raw.z), v[3] += __uint_as_float(raw.w);
    }
  }

  template <bool halves>
  __device__ __forceinline__ void store(const float (&v)[4], int64_t at) const {
    uint8_t* to = static_cast<uint8_t*>(gemm.args.y) + at;
    if constexpr (halves) {
      *reinterpret_cast<uint2*>(to) =
          make_uint2(bits_of(__floats2half2_rn(v[0], v[1])), bits_of(__floats2half2_rn(v[2], v[3])));
    } else {
      *reinterpret_cast<float4*>(to) = make_float4(v[0], v[1], v[2], v[3]);
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
    barrier_init(gemm.lead, 4);
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
    consumer.wait_for_lead();
    for (int tile = blockIdx.x; tile < gemm.tiles; tile += gridDim.x, ++turn) {
      if constexpr (G::kFolds) {
        consumer.run_groups(at, tile);
      } else {
        consumer.run_channels(at, tile);
      }
      consumer.finish(tile, turn);
    }
  }
#endif
}

}  // namespace specquant_cuda
