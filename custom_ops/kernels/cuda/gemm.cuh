// The product of many tokens: Y[T, M] in tiles, int8 (or float16) tensor cores, weights unpacked in registers.
//
// A warp owns 16·token_frags tokens and 64 outputs, and takes 64 features at a time from shared memory, which a ring of
// `stages` slots of cp.async keeps filled. Rows, columns and k of a fragment may mean any token, output and feature, as
// long as both operands agree; they are chosen so that every load is of 16 bytes, with g = lane / 4 and t = lane % 4:
//   row g + 8h of fragment f       token 2·token_frags·g + 2f + h
//   column n of fragment (o, w)    output 32·o + 4n + w: word w of the 16 bytes that hold 4 outputs of a block
//   k of thread t, step s of 32    features 32s + 8t … 32s + 8t + 7: a block of packed weights
// The weights are read as they lie in the file: 16 bytes are 8 features of 4 outputs. The first stage has put the
// activations in the order in which ldmatrix hands them out (args.h, place_of).
#pragma once

#include "gate.cuh"
#include "gemm_slots.cuh"

namespace specquant_cuda {

template <Mode mode, int token_frags, int warps_t, int warps_o, int stages>
struct Gemm : GemmSlots<mode, token_frags, warps_t, warps_o, stages> {
  using Base = GemmSlots<mode, token_frags, warps_t, warps_o, stages>;
  using Base::activations, Base::args, Base::first_output, Base::first_token, Base::g, Base::kFolds, Base::kIntegers,
      Base::kSlot, Base::kTokenScales, Base::group_scales, Base::shared, Base::t, Base::token_row, Base::warp_output,
      Base::weights;

  uint32_t mask;
  int magic[4];           // 1.5 · 2^23 as a float, four times
  float acc[2][4][token_frags][4];  // [o][w][f][2h + e]; int32 until the end without segments

  __device__ __forceinline__ Gemm(const Args& a, uint8_t* memory) : Base(a, memory) {
    mask = args.high_nibbles;
#pragma unroll
    for (int i = 0; i < 4; ++i)  // hidden from the compiler, which would set the registers anew for every product
      asm volatile("mov.b32 %0, 0x4B400000;" : "=r"(magic[i]));
#pragma unroll
    for (int i = 0; i < 8 * token_frags * 4; ++i)
      acc[i / (16 * token_frags)][i / (4 * token_frags) % 4][i / 4 % token_frags][i % 4] = 0.0f;
  }

  __device__ __forceinline__ void multiply(int step) {
    const uint8_t* slot = shared + step % stages * kSlot;
    if constexpr (kIntegers) {
      multiply_integers(slot);
    } else {
      multiply_halves(slot);
    }
  }

  __device__ __forceinline__ void multiply_integers(const uint8_t* slot) {
    uint32_t a[token_frags][2][4];  // [f][s]
#pragma unroll
    for (int i = 0; i < token_frags * 2; ++i) activations(a[i / 2][i % 2], slot, i / 2, i % 2);
    float token_scale[token_frags][2];
    if constexpr (kFolds) {
#pragma unroll
      for (int i = 0; i < token_frags; i += 2) {  // token rows are neighbours
        const float4 v = *reinterpret_cast<const float4*>(slot + kTokenScales + token_row(i, 0) * 4);
        token_scale[i][0] = v.x, token_scale[i][1] = v.y, token_scale[i + 1][0] = v.z, token_scale[i + 1][1] = v.w;
      }
    }
#pragma unroll
    for (int o = 0; o < 2; ++o) {
      const uint4 raw[2] = {weights(slot, o, 0), weights(slot, o, 1)};
      float scale[8];
      if constexpr (kFolds) group_scales(slot, o, scale);
      const GroupScales c(mode == kMultiples ? group_scales(slot, o, g / 4) : make_uint2(0, 0), g % 4);
#pragma unroll
      for (int w = 0; w < 4; ++w) {
        uint32_t b[2][2];
#pragma unroll
        for (int s = 0; s < 2; ++s) {
          const uint32_t words[4] = {raw[s].x, raw[s].y, raw[s].z, raw[s].w};
          if constexpr (mode == kMultiples) {
            Multiple(c.of(w)).unpack(words[w], b[s][0], b[s][1]);
          } else {
            unpack_s8(words[w], mask, b[s][0], b[s][1]);
          }
        }
#pragma unroll
        for (int f = 0; f < token_frags; ++f) {
          float(&out)[4] = acc[o][w][f];
          if constexpr (!kFolds) {
            int sum[4];
#pragma unroll
            for (int i = 0; i < 4; ++i) sum[i] = __float_as_int(out[i]);
            mma_s8(sum, a[f][0], b[0], sum);
            mma_s8(sum, a[f][1], b[1], sum);
#pragma unroll
            for (int i = 0; i < 4; ++i) out[i] = __int_as_float(sum[i]);
          } else {
            // The sum starts at 1.5 · 2^23 as a float, so that its bits are those of 1.5 · 2^23 + sum.
            int sum[4];
            mma_s8(sum, a[f][0], b[0], magic);
            mma_s8(sum, a[f][1], b[1], sum);
#pragma unroll
            for (int i = 0; i < 4; ++i) {
              // c is a small whole number: −magic · c is exact, and sum · c, too.
              const float c = scale[i % 2 * 4 + w];
              out[i] = fmaf(fmaf(__int_as_float(sum[i]), c, -kMagic * c), token_scale[f][i / 2], out[i]);
            }
          }
        }
      }
    }
  }

  __device__ __forceinline__ void multiply_halves(const uint8_t* slot) {
#pragma unroll
    for (int s = 0; s < 2; ++s) {
      uint32_t a[token_frags][2][4];  // [f][k]
#pragma unroll
      for (int i = 0; i < token_frags * 2; ++i) activations(a[i / 2][i % 2], slot, i / 2, 2 * s + i % 2);
#pragma unroll
      for (int o = 0; o < 2; ++o) {
        const uint4 raw = weights(slot, o, s);
        const uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w};
        float scale[8];
        group_scales(slot, o, scale);
#pragma unroll
        for (int w = 0; w < 4; ++w) {
          uint32_t pairs[4];
          unpack_half(words[w], pairs);
          const uint32_t b[2][2] = {{pairs[0], pairs[1]}, {pairs[2], pairs[3]}};
#pragma unroll
          for (int f = 0; f < token_frags; ++f) {
            float part[4] = {};
            mma_f16(part, a[f][0], b[0]);
            mma_f16(part, a[f][1], b[1]);
#pragma unroll
            for (int i = 0; i < 4; ++i) acc[o][w][f][i] = fmaf(part[i], scale[i % 2 * 4 + w], acc[o][w][f][i]);
          }
        }
      }
    }
  }

  // Times the outputs' scales, and of the token's activations what was not multiplied yet. All but c · q entered as 16 · q.
  __device__ __forceinline__ void finish() {
#pragma unroll
    for (int f = 0; f < token_frags; ++f)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int token = first_token + token_row(f, h);
        if (token >= args.tokens) continue;
        constexpr float unit = mode == kFold || mode == kChannel ? 0.0625f : 1.0f;
        const float of_token = (kFolds ? 1.0f : args.scale[token]) * unit;
#pragma unroll
        for (int o = 0; o < 2; ++o) {
          const int output = first_output + warp_output + 32 * o + 8 * t;
          if (output >= args.m) continue;
          float scale[8];
          load8(scale, args.scales + output, true);
#pragma unroll
          for (int i = 0; i < 8; ++i) {
            float& out = acc[o][i % 4][f][2 * h + i / 4];
            const float sum = mode == kChannel || mode == kMultiples ? static_cast<float>(__float_as_int(out)) : out;
            out = of_token * scale[i] * sum;
          }
        }
      }
  }

  // + low · C, both parts of low on float16 tensor cores. k of thread t: columns 8t … 8t + 7 of 32.
  __device__ __forceinline__ void add_branch() {
    for (int i = 0; i < args.rp / kRankStep * 2; ++i) {
      const int part = i % 2, block = i / 2 * kRankStep;
      uint32_t low[token_frags][2][4];  // [f][k]
      float factor[token_frags][2];
#pragma unroll
      for (int j = 0; j < token_frags * 2; ++j) {
        const int f = j / 2, h = j % 2, token = first_token + token_row(f, h);
        const __half* from = args.low + (static_cast<int64_t>(token) * 2 + part) * args.rp + block + 8 * t;
        uint4 row = make_uint4(0, 0, 0, 0);
        if (token < args.tokens) row = *reinterpret_cast<const uint4*>(from);
        low[f][0][h] = row.x, low[f][0][h + 2] = row.y, low[f][1][h] = row.z, low[f][1][h + 2] = row.w;
        factor[f][h] = token < args.tokens ? args.low_factor[token] : 0.0f;
      }
#pragma unroll
      for (int o = 0; o < 2; ++o) {
        const int output = first_output + warp_output + 32 * o + 4 * g;
        uint2 rows[8];  // 4 outputs of each of this thread's columns
#pragma unroll
        for (int j = 0; j < 8; ++j) {
          const int column = block + 8 * t + j;
          rows[j] = make_uint2(0, 0);
          if (column < args.rank && output < args.m)
            rows[j] = __ldg(reinterpret_cast<const uint2*>(args.coef + static_cast<int64_t>(column) * args.m + output));
        }
#pragma unroll
        for (int w = 0; w < 4; ++w) {
          uint32_t b[2][2];
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            const uint2 even = rows[2 * j], odd = rows[2 * j + 1];
            b[j / 2][j % 2] = __byte_perm(w < 2 ? even.x : even.y, w < 2 ? odd.x : odd.y, w % 2 ? 0x7632 : 0x5410);
          }
#pragma unroll
          for (int f = 0; f < token_frags; ++f) {
            float sum[4] = {};
            mma_f16(sum, low[f][0], b[0]);
            mma_f16(sum, low[f][1], b[1]);
#pragma unroll
            for (int j = 0; j < 4; ++j) acc[o][w][f][j] = fmaf(sum[j], factor[f][j / 2], acc[o][w][f][j]);
          }
        }
      }
    }
  }

  // y of 4 pairs. at: of the first; a row may start at a multiple of 8 bytes only.
  __device__ __forceinline__ void store_pairs(const float (&v)[8], int64_t at) const {
    float y[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) y[i] = gated(v[2 * i], v[2 * i + 1], args.gate);
    if (args.y_half) {
      *reinterpret_cast<uint2*>(static_cast<__half*>(args.y) + at) =
          make_uint2(bits_of(__floats2half2_rn(y[0], y[1])), bits_of(__floats2half2_rn(y[2], y[3])));
    } else {
      *reinterpret_cast<float4*>(static_cast<float*>(args.y) + at) = make_float4(y[0], y[1], y[2], y[3]);
    }
  }

  // + bias and residual, or gated, and out: 8 neighbouring outputs of a token a thread.
  __device__ __forceinline__ void store() const {
#pragma unroll
    for (int o = 0; o < 2; ++o) {
      const int output = first_output + warp_output + 32 * o + 8 * t;
      if (output >= args.m) continue;
      float bias[8] = {};
      if (args.bias) load8(bias, args.bias + output, true);
#pragma unroll
      for (int f = 0; f < token_frags; ++f)
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const int token = first_token + token_row(f, h);
          if (token >= args.tokens) continue;
          float v[8];
#pragma unroll
          for (int i = 0; i < 8; ++i) v[i] = acc[o][i % 4][f][2 * h + i / 4] + bias[i];
          if (args.gate) {
            store_pairs(v, static_cast<int64_t>(token) * args.width + output / 2);
            continue;
          }
          const int64_t at = static_cast<int64_t>(token) * args.m + output;
          if (args.residual) {
            float residual[8];
            if (args.y_half) {
              load8(residual, static_cast<const __half*>(args.residual) + at, true);
            } else {
              load8(residual, static_cast<const float*>(args.residual) + at, true);
            }
#pragma unroll
            for (int i = 0; i < 8; ++i) v[i] += residual[i];
          }
          if (args.y_half) {
            *reinterpret_cast<uint4*>(static_cast<__half*>(args.y) + at) =
                make_uint4(bits_of(__floats2half2_rn(v[0], v[1])), bits_of(__floats2half2_rn(v[2], v[3])),
                           bits_of(__floats2half2_rn(v[4], v[5])), bits_of(__floats2half2_rn(v[6], v[7])));
          } else {
            float4* to = reinterpret_cast<float4*>(static_cast<float*>(args.y) + at);
            to[0] = make_float4(v[0], v[1], v[2], v[3]);
            to[1] = make_float4(v[4], v[5], v[6], v[7]);
          }
        }
    }
  }
};

template <class G, int stages>
__global__ void __launch_bounds__(G::kThreads) gemm_kernel(const Args args) {
  extern __shared__ __align__(128) uint8_t memory[];
  G gemm(args, memory);
  const int steps = args.kp / kStep;
#pragma unroll
  for (int i = 0; i < stages - 1; ++i) {
    if (i < steps) gemm.fetch(i);
    commit_async();
  }
  for (int step = 0; step < steps; ++step) {
    wait_async<stages - 2>();
    __syncthreads();  // this slot is filled, and the one before it is done with
    if (step + stages - 1 < steps) gemm.fetch(step + stages - 1);
    commit_async();
    gemm.multiply(step);
  }
  gemm.finish();
  gemm.add_branch();
  gemm.store();
}

}  // namespace specquant_cuda
