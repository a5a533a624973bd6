// A block's part of the product of up to 32 tokens: loads, multiplications, the branch.
//
// A block of threads takes 32 outputs, its warps steps of 64 features in turn; their sums meet in shared memory.
// Weights are the rows of a fragment here and tokens its columns, so that one token costs what 8 do. With g = lane / 4
// and t = lane % 4, a 16-byte load holds 4 outputs (4g … 4g + 3) of block 4s + t of 8 features; words 0 and 1 are rows
// g and g + 8 of one fragment, words 2 and 3 of another. Column n is token n. The kernel may start before the first
// stage is done: weights, scales and C are on their way by then. What that stage made is copied to shared memory once,
// where it fits, so that the steps wait for weights alone.
#pragma once

#include "args.h"
#include "levels.cuh"
#include "unpack.cuh"

namespace specquant_cuda {

constexpr int kOutputs = 32;

constexpr int kSkew = 32;                     // bytes between staged rows: 8 tokens meet in no bank
constexpr size_t kMostStaged = 48 * 1024;

// What a block keeps of the first stage's result, in bytes: levels, scales of every segment, low.
template <Mode mode, int frags>
struct Staged {
  static constexpr int kTokens = frags * 8;
  int stride, scales, lows, bytes;  // stride: of a token's levels
  __host__ __device__ explicit Staged(const Args& a) {
    stride = a.kp * (mode == kHalf ? 2 : 1) + kSkew;
    scales = a.tokens * stride;
    lows = scales + (mode == kFold ? a.segments * kTokens * 4 : 0);
    bytes = lows + (a.rank ? a.tokens * 4 * a.rp : 0);
  }
};

template <Mode mode, int frags, int warps, bool staged>
struct Matvec {
  static constexpr int kTokens = frags * 8;
  // Steps whose loads are under way together: as many as the registers hold.
  static constexpr int kDepth = mode == kHalf ? (frags == 1 ? 2 : 1) : frags == 4 ? 1 : frags == 2 ? 2 : 4;

  // What a thread reads for one step.
  struct Step {
    uint4 weights[2];                                 // blocks t and 4 + t
    uint4 activations[frags][mode == kHalf ? 2 : 1];  // int8: blocks t and 4 + t side by side
    uint2 group_scales;                               // of the panel
    float2 token_scale[frags];                        // of tokens 2t, 2t + 1
  };

  const Args& args;
  const int warp, lane, g, t, first_output, blocks;
  const uint32_t mask;
  const uint8_t *panel, *of_groups;
  const Staged<mode, frags> places;
  char* const kept;        // the staged bytes
  float acc[2][frags][4];  // [words 0, 1 or 2, 3][f][2h + e]: output 4g + 2·pair + h, token 8f + 2t + e

  __device__ __forceinline__ Matvec(const Args& a, char* shared)
      : args(a), warp(threadIdx.x / 32), lane(threadIdx.x % 32), g(lane / 4), t(lane % 4),
        first_output(blockIdx.x * kOutputs), blocks(ceil_div(a.n, kBlock)), mask(a.high_nibbles), places(a),
        kept(shared) {
    const int panels = ceil_div(args.m, kPanel), wanted = first_output / kPanel + g / 4;
    panel = args.qweight + static_cast<int64_t>(min(wanted, panels - 1)) * blocks * 64 + g % 4 * 16;
    of_groups = args.group_scales + static_cast<int64_t>(min(wanted, panels - 1)) * args.groups * 8;
#pragma unroll
    for (int i = 0; i < 2 * frags * 4; ++i) acc[i / (frags * 4)][i / 4 % frags][i % 4] = 0.0f;
  }

  // What earlier kernels do not write.
  __device__ __forceinline__ void load_weights(Step& s, int step) const {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int block = step * (kStep / kBlock) + 4 * i + t;
      s.weights[i] = block < blocks ? load_stream(panel + static_cast<int64_t>(block) * 64) : make_uint4(0, 0, 0, 0);
    }
    if constexpr (mode != kChannel)
      s.group_scales = __ldg(reinterpret_cast<const uint2*>(of_groups + quotient(step, args.group_steps) * 8));
  }

  // Copies what the first stage made; the block meets before it is read.
  __device__ __forceinline__ void stage() const {
    if constexpr (!staged) return;
    const int threads = warps * 32, pieces = (places.stride - kSkew) / 16, segments = args.segments;
    for (int token = 0; token < args.tokens; ++token) {
      const char* from = static_cast<const char*>(args.levels) + static_cast<int64_t>(token) * (places.stride - kSkew);
      for (int i = threadIdx.x; i < pieces; i += threads)
        copy_async(kept + token * places.stride + 16 * i, from + 16 * i, true);
    }
    commit_async();
    for (int i = threadIdx.x; mode == kFold && i < segments * kTokens; i += threads) {
      const int token = i % kTokens;
      const int64_t at = static_cast<int64_t>(i / kTokens) * args.tp + token;
      reinterpret_cast<float*>(kept + places.scales)[i] = token < args.tokens ? args.scale[at] : 0.0f;
    }
    if (args.rank)
      for (int i = threadIdx.x; i < args.tokens * args.rp; i += threads)  // two halves a word
        reinterpret_cast<uint32_t*>(kept + places.lows)[i] = reinterpret_cast<const uint32_t*>(args.low)[i];
    wait_async<0>();
    __syncthreads();
  }

  __device__ __forceinline__ void load_activations(Step& s, int step) const {
#pragma unroll
    for (int f = 0; f < frags; ++f) {
      const int token = 8 * f + g;
      const bool there = token < args.tokens;
      constexpr int size = mode == kHalf ? 2 : 1;
      const char* row = staged ? kept + token * places.stride
                               : static_cast<const char*>(args.levels) + static_cast<int64_t>(token) * args.kp * size;
      row += (step * kStep + 8 * t) * size;
      if constexpr (mode == kHalf) {
        s.activations[f][0] = there ? *reinterpret_cast<const uint4*>(row) : make_uint4(0, 0, 0, 0);
        s.activations[f][1] = there ? *reinterpret_cast<const uint4*>(row + 64) : make_uint4(0, 0, 0, 0);
      } else {
        const uint2 a = there ? *reinterpret_cast<const uint2*>(row) : make_uint2(0, 0);
        const uint2 b = there ? *reinterpret_cast<const uint2*>(row + 32) : make_uint2(0, 0);
        s.activations[f][0] = make_uint4(a.x, a.y, b.x, b.y);
      }
    }
    if constexpr (mode == kFold) {
      const int segment = quotient(step, args.segment_steps);
      const int64_t at = staged ? segment * kTokens : static_cast<int64_t>(segment) * args.tp;
      const float* scale = staged ? reinterpret_cast<const float*>(kept + places.scales) : args.scale;
#pragma unroll
      for (int f = 0; f < frags; ++f)
        s.token_scale[f] = *reinterpret_cast<const float2*>(scale + at + 8 * f + 2 * t);
    }
  }

  __device__ __forceinline__ void add(const Step& s) {
    const GroupScales c(mode == kChannel ? make_uint2(0, 0) : s.group_scales, g % 4);
    if constexpr (mode == kHalf) {
      add_halves(s, c);
    } else {
      add_integers(s, c);
    }
  }

  __device__ __forceinline__ void add_integers(const Step& s, const GroupScales& c) {
    uint32_t a[2][2][4];  // [pair][i]
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint32_t words[4] = {s.weights[i].x, s.weights[i].y, s.weights[i].z, s.weights[i].w};
#pragma unroll
      for (int w = 0; w < 4; ++w) unpack_s8(words[w], mask, a[w / 2][i][w % 2], a[w / 2][i][w % 2 + 2]);
    }
#pragma unroll
    for (int f = 0; f < frags; ++f) {
      const uint4& v = s.activations[f][0];
      const uint32_t b[2][2] = {{v.x, v.y}, {v.z, v.w}};
#pragma unroll
      for (int pair = 0; pair < 2; ++pair) {
        float(&out)[4] = acc[pair][f];
        int sum[4];
        if constexpr (mode == kChannel) {
#pragma unroll
          for (int i = 0; i < 4; ++i) sum[i] = __float_as_int(out[i]);
        } else {
          constexpr int magic = 0x4B400000;  // as in gemm.cuh
#pragma unroll
          for (int i = 0; i < 4; ++i) sum[i] = mode == kFold ? magic : 0;
        }
        mma_s8(sum, a[pair][0], b[0], sum);
        mma_s8(sum, a[pair][1], b[1], sum);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          if constexpr (mode == kChannel) {
            out[i] = __int_as_float(sum[i]);
          } else if constexpr (mode == kMultiples) {  // without the weights' 16 times, or a long sum would not fit
            out[i] = __int_as_float(__float_as_int(out[i]) + c.of(2 * pair + i / 2) * (sum[i] >> 4));
          } else {
            const float factor = c.as_float(2 * pair + i / 2);
            out[i] = fmaf(fmaf(__int_as_float(sum[i]), factor, -kMagic * factor),
                          i % 2 ? s.token_scale[f].y : s.token_scale[f].x, out[i]);
          }
        }
      }
    }
  }

  __device__ __forceinline__ void add_halves(const Step& s, const GroupScales& c) {
    float part[2][frags][4] = {};
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint32_t words[4] = {s.weights[i].x, s.weights[i].y, s.weights[i].z, s.weights[i].w};
      uint32_t a[2][2][4];  // [pair][k]: features 4k … 4k + 3 of the block
#pragma unroll
      for (int w = 0; w < 4; ++w) {
        uint32_t pairs[4];
        unpack_half(words[w], pairs);
#pragma unroll
        for (int k = 0; k < 2; ++k) {
          a[w / 2][k][w % 2] = pairs[2 * k];
          a[w / 2][k][w % 2 + 2] = pairs[2 * k + 1];
        }
      }
#pragma unroll
      for (int f = 0; f < frags; ++f) {
        const uint4& v = s.activations[f][i];
        const uint32_t b[2][2] = {{v.x, v.y}, {v.z, v.w}};
#pragma unroll
        for (int pair = 0; pair < 2; ++pair)
#pragma unroll
          for (int k = 0; k < 2; ++k) mma_f16(part[pair][f], a[pair][k], b[k]);
      }
    }
#pragma unroll
    for (int i = 0; i < 2 * frags * 4; ++i) {
      const int pair = i / (frags * 4), f = i / 4 % frags, j = i % 4;
      acc[pair][f][j] = fmaf(part[pair][f][j], c.as_float(2 * pair + j / 2), acc[pair][f][j]);
    }
  }

  // C of 16 columns and the block's outputs, as a thread multiplies it: columns 2t, 2t + 1, 2t + 8, 2t + 9 of 4 outputs.
  __device__ __forceinline__ void load_coef(uint2 (&rows)[4], int share) const {
    const int output = first_output + 4 * g;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int column = share / 2 * 16 + 2 * t + i % 2 + i / 2 * 8;
      const bool there = column < args.rank && output < args.m;
      const __half* from = args.coef + static_cast<int64_t>(column) * args.m + output;
      rows[i] = there ? __ldg(reinterpret_cast<const uint2*>(from)) : make_uint2(0, 0);
    }
  }

  // Shares of low · C: 16 columns of its leading or trailing bits each.
  __device__ __forceinline__ int branch_shares() const { return args.rank ? args.rp / 8 : 0; }

  // + a share, outputs and tokens as in acc.
  __device__ __forceinline__ void add_branch(float (&sum)[2][frags][4], const uint2 (&rows)[4], int share) const {
    uint32_t a[2][4];  // [pair][h + 2j]
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int pair = i / 4, h = i % 2, j = i / 2 % 2;
      const uint2 even = rows[2 * j], odd = rows[2 * j + 1];
      a[pair][h + 2 * j] = __byte_perm(pair ? even.y : even.x, pair ? odd.y : odd.x, h ? 0x7632 : 0x5410);
    }
#pragma unroll
    for (int f = 0; f < frags; ++f) {
      const int token = 8 * f + g;
      const __half* all = staged ? reinterpret_cast<const __half*>(kept + places.lows) : args.low;
      const __half* low = all + (token * 2 + share % 2) * args.rp + share / 2 * 16 + 2 * t;
      uint32_t b[2] = {};
      if (token < args.tokens)
        b[0] = *reinterpret_cast<const uint32_t*>(low), b[1] = *reinterpret_cast<const uint32_t*>(low + 8);
#pragma unroll
      for (int pair = 0; pair < 2; ++pair) mma_f16(sum[pair][f], a[pair], b);
    }
  }

  // This warp's share of y, float32 [tokens, outputs]: scales, and its shares of low · C. coef: of the first of these.
  __device__ __forceinline__ void finish(uint2 (&coef)[4], float4* to) const {
    float sum[2][frags][4] = {};
    for (int share = warp; share < branch_shares(); share += warps) {
      if (share != warp) load_coef(coef, share);
      add_branch(sum, coef, share);
    }
    const int output = min(first_output + 4 * g, args.m - 4);
    const uint2 raw = __ldg(reinterpret_cast<const uint2*>(args.scales + output));
    const float2 lower = __half22float2(half2_of(raw.x)), upper = __half22float2(half2_of(raw.y));
    const float scale[2][2] = {{lower.x, lower.y}, {upper.x, upper.y}};
    constexpr float unit = mode == kFold || mode == kChannel ? 0.0625f : 1.0f;  // their weights entered as 16 · q
    constexpr bool integers = mode == kChannel || mode == kMultiples;
#pragma unroll
    for (int i = 0; i < frags * 2; ++i) {
      const int f = i / 2, e = i % 2, token = 8 * f + 2 * t + e;
      const bool there = token < args.tokens;
      const float factor = args.rank && there ? args.low_factor[token] : 0.0f;
      const float of_token = mode == kFold || !there ? unit : unit * args.scale[token];
      float v[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float all = acc[j / 2][f][j % 2 * 2 + e];
        v[j] = fmaf(integers ? static_cast<float>(__float_as_int(all)) : all, of_token * scale[j / 2][j % 2],
                    sum[j / 2][f][j % 2 * 2 + e] * factor);
      }
      to[token * (kOutputs / 4) + g] = make_float4(v[0], v[1], v[2], v[3]);
    }
  }
};

}  // namespace specquant_cuda
