// gemm90's tiles of 256 tokens and 128 outputs, of kMultiples: half of the instructions that unpack weights, for as many
// products. (kChannel, which unpacks with fewer, is no faster so: the tensor cores are what it waits for.)
//
// A warpgroup takes 64 outputs, a warp the 16 of a panel. With g = lane / 4 and t = lane % 4, a load of 8 bytes holds outputs
// 2g and 2g + 1 of a block of 8 features: rows g and g + 8 of the warp's part of a fragment. In step s of a chunk of 128
// features threads t of 0 and 1 take blocks 2s + t, the others blocks 8 + 2s + t − 2, so that a thread has one half of the
// chunk, and of groups of 64 features one (args.h, wide_place).
#pragma once

#include "gemm90_end.cuh"

namespace specquant_cuda {

struct Wide90 {
  using G = Gemm90<kMultiples, 256, 1>;
  static constexpr int kTogether = 2;  // times 8 tokens, at the end of a tile

  const G& gemm;
  int warp, g, t, lane;
  const uint8_t* of_groups;  // scales of the panel's groups
  uint2 scales;              // those of the thread's half of a chunk, asked for while the chunk before is multiplied
  int sums[G::kSums];        // [4 · column block + 2h + e]: output 2g + h, token 8 · block + 2t + e

  // What a thread's two outputs need at the end of a tile, on its way while the last product is.
  struct Ends {
    uint32_t coef[8];  // of columns 8t …
    uint32_t scale;
    float2 bias;
  } ends;

  __device__ __forceinline__ explicit Wide90(const G& gemm_)
      : gemm(gemm_), warp(threadIdx.x / 32 - 4), g(threadIdx.x % 32 / 4), t(threadIdx.x % 4), lane(threadIdx.x % 32) {}

  __device__ __forceinline__ void release(uint64_t* barrier) const {
    __syncwarp();
    if (lane == 0) barrier_arrive(barrier);
  }

  __device__ __forceinline__ int output_of(int first) const { return first + kPanel * warp + 2 * g; }

  __device__ __forceinline__ void load_scales(int chunk) {
    const int at = quotient(2 * chunk + t / 2, gemm.args.group_steps);
    scales = __ldg(reinterpret_cast<const uint2*>(of_groups + 8 * at));
  }

  // Fragments of steps 2 · half and 2 · half + 1.
  __device__ __forceinline__ void weights(uint32_t (&a)[2][4], const uint8_t* slot, int half, const Multiple (&c)[2]) const {
    const uint8_t* from = slot + G::kWeights + warp * G::kPanelBytes + t / 2 * G::kSecondPiece + t % 2 * 64 + g * 8;
#pragma unroll
    for (int s = 0; s < 2; ++s) {
      const uint2 words = *reinterpret_cast<const uint2*>(from + (2 * half + s) * 128);
      c[0].unpack(words.x, a[s][0], a[s][2]);
      c[1].unpack(words.y, a[s][1], a[s][3]);
    }
  }

  __device__ __forceinline__ void multiply(const uint32_t (&a)[2][4], uint64_t operand, int half, bool add) {
    wgmma_fence();
#pragma unroll
    for (int s = 0; s < 2; ++s) wgmma_s8(sums, a[s], operand + (2 * half + s) * (32 >> 4), s > 0 || add);
    wgmma_commit();
  }

  // All features of a tile.
  __device__ __forceinline__ void run(G::Turn& at, int output) {
    const int panel = min(output / kPanel + warp, gemm.args.m / kPanel - 1);
    of_groups = gemm.args.group_scales + static_cast<int64_t>(panel) * gemm.args.groups * 8;
    load_scales(0);
    for (int chunk = 0; chunk < gemm.chunks; ++chunk, at.next()) {
      const uint8_t* from = gemm.shared + at.slot * G::kSlot;
      const uint64_t operand = wgmma_operand(from);
      const Multiple c[2] = {Multiple(static_cast<int>(scales.x >> 4 * g & 15) + 1),
                             Multiple(static_cast<int>(scales.y >> 4 * g & 15) + 1)};
      load_scales(min(chunk + 1, gemm.chunks - 1));
      barrier_wait(gemm.full + at.slot, at.parity);
      uint32_t first[2][4], second[2][4];
      weights(first, from, 0, c);
      multiply(first, operand, 0, chunk > 0);
      wgmma_wait<1>();
      if (chunk) release(gemm.empty + at.last);
      weights(second, from, 1, c);
      multiply(second, operand, 1, true);
      wgmma_wait<1>();
    }
    load_ends(output_of(output));
    wgmma_wait<0>();
#pragma unroll
    for (int i = 0; i < G::kSums; ++i) hold(sums[i]);
    release(gemm.empty + at.last);
  }

  __device__ __forceinline__ void load_ends(int output) {
    const Args& args = gemm.args;
    const bool there = output < args.m;
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const int column = 8 * t + j;
      const __half* from = args.coef + static_cast<int64_t>(column) * args.m + output;
      ends.coef[j] = column < args.rank && there ? __ldg(reinterpret_cast<const uint32_t*>(from)) : 0;
    }
    ends.scale = there ? __ldg(reinterpret_cast<const uint32_t*>(args.scales + output)) : 0;
    ends.bias = args.bias && there ? __ldg(reinterpret_cast<const float2*>(args.bias + output)) : make_float2(0.0f, 0.0f);
  }

  // y of a tile: scales, the branch, bias, residual or gate.
  __device__ __forceinline__ void finish(int2 corner, int turn) {
    if (gemm.args.y_half) {
      gemm.args.rank ? finish_end<true, true>(corner, turn) : finish_end<false, true>(corner, turn);
    } else {
      gemm.args.rank ? finish_end<true, false>(corner, turn) : finish_end<false, false>(corner, turn);
    }
  }

  template <bool branch, bool halves>
  __device__ __forceinline__ void finish_end(int2 corner, int turn) {
    if (gemm.args.gate) {
      gemm.args.gate == kSiluGate && halves ? finish_as<branch, halves, kSiluPairs>(corner, turn)
                                            : finish_as<branch, halves, kPairs>(corner, turn);
    } else {
      gemm.args.residual ? finish_as<branch, halves, kAdded>(corner, turn) : finish_as<branch, halves, kPlain>(corner, turn);
    }
  }

  template <bool branch, bool halves, End90 end>
  __device__ __forceinline__ void finish_as(int2 corner, int turn) {
    const Args& args = gemm.args;
    const int first_token = corner.x + 2 * t, output = output_of(corner.y);
    const int tokens_left = output < args.m ? args.tokens - first_token : 0;  // from this thread's first on
    uint32_t coef[2][4];
    if constexpr (branch) {
#pragma unroll
      for (int i = 0; i < 8; ++i) {  // [k][h + 2j]
        const int k = i / 4, h = i % 2, j = i % 4 / 2;
        coef[k][h + 2 * j] = __byte_perm(ends.coef[4 * k + 2 * j], ends.coef[4 * k + 2 * j + 1], h ? 0x7632 : 0x5410);
      }
    }
    const float2 scale = __half22float2(half2_of(ends.scale));
    constexpr bool pairs = end == kPairs || end == kSiluPairs;
    constexpr int size = halves ? 2 : 4;
    const int64_t step = static_cast<int64_t>(args.width) * size;
    int64_t at = first_token * step + static_cast<int64_t>(pairs ? output / 2 : output) * size;  // of y here, in bytes
    barrier_wait(gemm.end_full, turn & 1);
#pragma unroll
    for (int start = 0; start < 32; start += kTogether) {
      float2 residual[2 * kTogether];
      if constexpr (end == kAdded) {
#pragma unroll
        for (int i = 0; i < 2 * kTogether; ++i)
          residual[i] = residual_of<halves>(at + (i / 2 * 8 + i % 2) * step, 8 * (start + i / 2) + i % 2 < tokens_left);
      }
      float of_branch[kTogether][4] = {};
      if constexpr (branch) {
#pragma unroll
        for (int i = 0; i < kTogether * (halves ? 1 : 2); ++i) {  // float16 y does not see low's trailing bits
          const int k = i % kTogether, row = 8 * (start + k) + g;
          const uint8_t* from = gemm.shared + G::kLow + (row * 2 + i / kTogether) * kRankStep * 2 + 16 * t;
          const uint4 raw = *reinterpret_cast<const uint4*>(from);
          const uint32_t low[2][2] = {{raw.x, raw.y}, {raw.z, raw.w}};
          mma_f16(of_branch[k], coef[0], low[0]);
          mma_f16(of_branch[k], coef[1], low[1]);
        }
      }
#pragma unroll
      for (int k = 0; k < kTogether; ++k, at += 8 * step) {
        const int place = (8 * (start + k) + 2 * t) * 4;
        float2 factor = make_float2(0.0f, 0.0f);
        if constexpr (branch) factor = *reinterpret_cast<const float2*>(gemm.shared + G::kFactors + place);
        const float2 of_tokens = *reinterpret_cast<const float2*>(gemm.shared + G::kEndScales + place);
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          float v[2];
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            float rest = h ? ends.bias.y : ends.bias.x;
            if constexpr (branch) rest = fmaf(of_branch[k][2 * h + e], e ? factor.y : factor.x, rest);
            const int sum = sums[4 * (start + k) + 2 * h + e];
            v[h] = fmaf(static_cast<float>(sum), (e ? of_tokens.y : of_tokens.x) * (h ? scale.y : scale.x), rest);
          }
          if constexpr (end == kAdded) v[0] += residual[2 * k + e].x, v[1] += residual[2 * k + e].y;
          if (8 * (start + k) + e >= tokens_left) continue;
          uint8_t* to = static_cast<uint8_t*>(args.y) + at + e * step;
          if constexpr (pairs) {
            const float y = gated(v[0], v[1], end == kSiluPairs ? int(kSiluGate) : args.gate);
            if constexpr (halves) {
              *reinterpret_cast<__half*>(to) = __float2half_rn(y);
            } else {
              *reinterpret_cast<float*>(to) = y;
            }
          } else if constexpr (halves) {
            *reinterpret_cast<uint32_t*>(to) = bits_of(__floats2half2_rn(v[0], v[1]));
          } else {
            *reinterpret_cast<float2*>(to) = make_float2(v[0], v[1]);
          }
        }
      }
      hold(at);  // or the places of all tokens are worked out at once, and take registers
    }
    release(gemm.end_empty);
  }

  // Two outputs of it, as they lie. at: in bytes.
  template <bool halves>
  __device__ __forceinline__ float2 residual_of(int64_t at, bool there) const {
    if (!there) return make_float2(0.0f, 0.0f);
    const uint8_t* from = static_cast<const uint8_t*>(gemm.args.residual) + at;
    if constexpr (halves) return __half22float2(half2_of(*reinterpret_cast<const uint32_t*>(from)));
    return *reinterpret_cast<const float2*>(from);
  }
};

}  // namespace specquant_cuda
