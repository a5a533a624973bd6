// The end of a tile of gemm90.cuh: scales, the branch, bias, residual or gate, from sums to y.
#pragma once

#include "cluster.cuh"
#include "gate.cuh"
#include "gemm90_ring.cuh"
#include "unpack.cuh"

namespace specquant_cuda {

// What becomes of outputs last: nothing, a residual that there may be, a gate, a gate of silu.
enum End90 { kPlain, kAdded, kPairs, kSiluPairs };

// What a thread of the two multiplying warpgroups holds, and what it does at the end of a tile.
template <Mode mode, int tokens, int folds, bool split>
struct Sums90 {
  using G = Gemm90<mode, tokens, folds, split>;

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

  __device__ __forceinline__ explicit Sums90(const G& gemm_)
      : gemm(gemm_), group((threadIdx.x / 32) - 4), g(threadIdx.x % 32 / 4), t(threadIdx.x % 4), lane(threadIdx.x % 32),
        mask(gemm_.args.high_nibbles) {}

  __device__ __forceinline__ void release(uint64_t* barrier) const {
    __syncwarp();
    if (lane == 0) barrier_arrive(barrier);
  }

  __device__ __forceinline__ int output_of(int first) const { return first + 32 * group + 4 * g; }

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
    if (output < args.m) ends.scale = __ldg(reinterpret_cast<const uint2*>(args.scales + output));
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

  // y of a tile: scales, the branch, bias, residual or gate.
  __device__ __forceinline__ void finish(int2 corner, int turn) {
    gemm.args.y_half ? finish_rank<true>(corner, turn) : finish_rank<false>(corner, turn);
  }

  // halves: y and the residual are float16.
  template <bool halves>
  __device__ __forceinline__ void finish_rank(int2 corner, int turn) {
    switch (gemm.args.rank ? gemm.args.rp / kRankStep : 0) {
      case 0: finish_end<0, halves>(corner, turn); break;
      case 1: finish_end<1, halves>(corner, turn); break;
      default: finish_end<2, halves>(corner, turn);
    }
  }

  template <int blocks, bool halves>
  __device__ __forceinline__ void finish_end(int2 corner, int turn) {
    constexpr bool often = !G::kFolds && halves && blocks < 2;
    if (often && gemm.args.gate == kSiluGate) {
      finish_as<blocks, halves, kSiluPairs>(corner, turn);
    } else if (gemm.args.gate) {
      finish_as<blocks, halves, kPairs>(corner, turn);
    } else if (often && !gemm.args.residual) {
      finish_as<blocks, halves, kPlain>(corner, turn);
    } else {
      finish_as<blocks, halves, kAdded>(corner, turn);
    }
  }

  // blocks: of 32 columns of the branch. Few jumps: while 8 tokens wait for something, others go on.
  template <int blocks, bool halves, End90 end>
  __device__ __forceinline__ void finish_as(int2 corner, int turn) {
    const Args& args = gemm.args;
    constexpr int together = split || blocks > 1 ? 1 : 2;  // times 8 tokens
    const int first_token = corner.x + 2 * t, output = output_of(corner.y);
    const int tokens_left = output < args.m ? args.tokens - first_token : 0;  // from this thread's first on
    uint32_t coef[blocks ? blocks : 1][2][2][4];
    if constexpr (blocks > 0) fragments_of(coef[0], ends.coef);
    if constexpr (blocks > 1) {
      load_coef(ends.coef, output, kRankStep);
      fragments_of(coef[blocks - 1], ends.coef);
    }
    const float2 low_scales = __half22float2(half2_of(ends.scale.x));
    const float2 high_scales = __half22float2(half2_of(ends.scale.y));
    constexpr float unit = mode == kChannel ? 0.0625f : 1.0f;  // its weights entered as 16 · q, the others as c · q
    const float scale[4] = {low_scales.x * unit, low_scales.y * unit, high_scales.x * unit, high_scales.y * unit};
    barrier_wait(gemm.end_full, turn & 1);
    constexpr bool added = end == kAdded, pairs = end == kPairs || end == kSiluPairs;
    constexpr int size = halves ? 2 : 4;
    const int64_t step = static_cast<int64_t>(args.width) * size;
    int64_t at = first_token * step + static_cast<int64_t>(pairs ? output / 2 : output) * size;  // of y here, in bytes
    // 8 · together tokens; sum(i, k, e) is of output i.
    const auto finish_tokens = [&](int start, const auto& sum) {
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
        constexpr int each = blocks ? blocks : 1;
        const int k = i % together, b = i / together % each, part = i / (together * each);
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
        const uint8_t* of_tokens = gemm.shared + (8 * (start + k) + 2 * t) * 4;
        float2 factor = make_float2(0.0f, 0.0f), token_scale = make_float2(0.0f, 0.0f);
        if (blocks > 0) factor = *reinterpret_cast<const float2*>(of_tokens + G::kFactors);
        if (!G::kFolds) token_scale = *reinterpret_cast<const float2*>(of_tokens + G::kEndScales);
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          float v[4];
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            float rest = ends.bias[i];
            if constexpr (blocks > 0) rest = fmaf(branch[k][i / 2 * 4 + i % 2 * 2 + e], e ? factor.y : factor.x, rest);
            if constexpr (G::kFolds) {
              v[i] = fmaf(sum(i, k, e), scale[i], rest);
            } else {
              v[i] = fmaf(static_cast<float>(sum(i, k, e)), (e ? token_scale.y : token_scale.x) * scale[i], rest);
            }
          }
          if (added && args.residual) add_residual<halves>(v, residual[k][e]);
          const bool there = 8 * (start + k) + e < tokens_left;
          if constexpr (pairs) {
            const int gate = end == kSiluPairs ? int(kSiluGate) : args.gate;
            const float y[2] = {gated(v[0], v[1], gate), gated(v[2], v[3], gate)};
            if (there) store<halves>(y, at + e * step);
          } else {
            if (there) store<halves>(v, at + e * step);
          }
        }
      }
      hold(at);  // or the places of all tokens are worked out at once, and take registers
    };
    if constexpr (split) {
      finish_share(at, 8 * step, finish_tokens);
    } else {
#pragma unroll
      for (int start = 0; start < tokens / 8; start += together)
        finish_tokens(start, [&](int i, int k, int e) { return of(i / 2, 4 * (start + k) + i % 2 * 2 + e); });
    }
    release(gemm.end_empty);
  }

  // A sum, of all of this block's features.
  __device__ __forceinline__ auto of(int i, int j) const {
    if constexpr (G::kFolds) {
      return totals[i][j];
    } else {
      return sums[i][j];
    }
  }

  // Sums of 8 tokens go to the block of the cluster that finishes these: 8 a thread, from every block.
  static constexpr int kThreads = G::kConsumers * 128, kTokenBlocks = tokens / 8;
  __device__ __forceinline__ float4* exchanged(int token_block, int from, int i) const {
    return reinterpret_cast<float4*>(gemm.shared + G::kExchange) + ((token_block * gemm.parts + from) * 2 + i) * kThreads +
           (threadIdx.x - 128);
  }
  __device__ __forceinline__ void exchange() const {
    const int part = cluster_rank(), own = kTokenBlocks / gemm.parts;  // token blocks that a block finishes
#pragma unroll
    for (int block = 0; block < kTokenBlocks; ++block) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float v[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          if constexpr (G::kFolds) {
            v[j] = totals[i][4 * block + j];
          } else {
            v[j] = __int_as_float(sums[i][4 * block + j]);
          }
        }
        box_send(exchanged(block % own, part, i), block / own, make_float4(v[0], v[1], v[2], v[3]), gemm.box, gemm.parts);
      }
    }
  }

  // The token blocks of this block of the cluster. at: of y, which moves on by `step` bytes for each.
  template <class Finish>
  __device__ __forceinline__ void finish_share(int64_t& at, int64_t step, const Finish& finish_tokens) const {
    const int own = kTokenBlocks / gemm.parts, start = cluster_rank() * own;
    exchange();
    at += start * step;
    box_wait(gemm.box, gemm.parts);
#pragma unroll 1
    for (int block = 0; block < own; ++block) {
      decltype(of(0, 0)) all[2][4] = {};
#pragma unroll 1
      for (int from = 0; from < gemm.parts; ++from)  // in this order, whoever is first
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const float4 v = *exchanged(block, from, i);
          const float each[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            if constexpr (G::kFolds) {
              all[i][j] += each[j];
            } else {
              all[i][j] += __float_as_int(each[j]);
            }
          }
        }
      finish_tokens(start + block, [&](int i, int, int e) { return all[i / 2][i % 2 * 2 + e]; });
    }
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
  __device__ __forceinline__ void store(const float (&v)[2], int64_t at) const {
    uint8_t* to = static_cast<uint8_t*>(gemm.args.y) + at;
    if constexpr (halves) {
      *reinterpret_cast<uint32_t*>(to) = bits_of(__floats2half2_rn(v[0], v[1]));
    } else {
      *reinterpret_cast<float2*>(to) = make_float2(v[0], v[1]);
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

}  // namespace specquant_cuda
