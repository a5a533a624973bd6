// A warp's part of the product of one token (compute capability 9.0 and later).
//
// A warp takes 32 outputs and a unit of 512 features at a time: 8 groups of 64, which are the 8 columns of an `mma` whose
// operand B holds the token's levels in their group's column and zeros in the others. So a sum becomes a float once for
// 64 features, and a thread needs the scales of two groups. With g = lane / 4 and t = lane % 4, step k takes 16 bytes
// each of groups 2t and 2t + 1, which hold 4 outputs of 8 features of the group; words 0 and 1 are rows g and g + 8 of one
// product, words 2 and 3 of another. What a thread adds up is of its own bytes alone, so that threads may take outputs and
// features in orders of their own: such that no two of them meet in a bank. Nibbles enter as they lie, as q + 8 and
// 16 · (q + 8): low and high ones have sums of their own, and what the 8 adds is known from the token.
//
// A unit's weights come to the warp's own part of shared memory by two bulk copies of 4 KB, one a panel.
#pragma once

#include "args.h"
#include "levels.cuh"
#include "ptx90.cuh"

namespace specquant_cuda {


constexpr int kTile = 32;     // outputs
constexpr int kGroups = 8;    // of a unit
constexpr int kUnitFeatures = kGroups * kStep;
constexpr int kSteps = kStep / kBlock;  // of a unit
constexpr int kGroupBytes = kSteps * 64;  // of a panel's weights
constexpr int kMostWarps = 16;
constexpr int kPaced = 4;  // warps whose first units are under way at once
constexpr int kZeros = kStep;  // bytes of shared memory that stay zero: the levels of other columns
constexpr int kMostSums = 64 * 1024;  // bytes of a block's sums
constexpr int kPanelBytes = kGroups * kGroupBytes, kUnitBytes = kTile / kPanel * kPanelBytes;  // of a unit
constexpr int kLevelBytes = kStep + 8;  // of a group in shared memory, so that no two threads meet in a bank

// How a product is divided, and where a block keeps things in its shared memory, in bytes.
struct Shares {
  int tiles, units;  // of the product
  int parts, slots;  // warps that share a tile; tiles that a block has under way
  int blocks, least, more;  // of the grid; tiles of a block, the first `more` of which have one more
  int levels, scales, starts, low, sums, bytes;
};

// What a unit needs beside its weights.
struct Constants {
  uint2 group_scales[2];  // of groups 2t and 2t + 1 and the panel
  uint2 column, scales;   // of C: the thread's t-th of the warp's first four; of the outputs. Of a tile's first unit
};

// A tile of 32 outputs and a unit of 512 features.
struct Place {
  int tile, unit;
};

template <Mode mode>
struct OneToken {
  const Args& args;
  const Shares& shares;
  char* const kept;
  const int lane, g, t, part, slot, groups;
  const int quad;  // of the tile's outputs, the thread's
  char* const own;  // the warp's weights
  uint64_t* const arrived;
  Constants now;
  int low[2][4], high[2][4];  // sums of low and high nibbles: [words 0, 1 or 2, 3][2h + e], of output 4 · quad + 2 · pair + h
  float out[4];
  int total[4];  // kMultiples: of the tile

  __device__ __forceinline__ OneToken(const Args& a, const Shares& s, char* shared)
      : args(a), shares(s), kept(shared), lane(threadIdx.x % 32), g(lane / 4), t(lane % 4),
        part(threadIdx.x / 32 % s.parts), slot(threadIdx.x / 32 / s.parts), groups(a.kp / kStep), quad(g ^ (t & 2)),
        own(shared + threadIdx.x / 32 * kUnitBytes),
        arrived(reinterpret_cast<uint64_t*>(shared + s.parts * s.slots * kUnitBytes) + threadIdx.x / 32) {}

  __device__ __forceinline__ Place after(const Place& at) const {
    return at.unit + shares.parts < shares.units ? Place{at.tile, at.unit + shares.parts}
                                                 : Place{at.tile + shares.slots, part};
  }

  // The unit's weights on their way to the warp, by one thread; what a unit at the end lacks stays as it was.
  __device__ __forceinline__ void fetch(const Place& at) const {
    const int panel = at.tile * (kTile / kPanel), panels = min(kTile / kPanel, ceil_div(args.m, kPanel) - panel);
    const int group = at.unit * kGroups, bytes = min(kGroups, groups - group) * kGroupBytes;
    const uint8_t* from = args.qweight + (static_cast<int64_t>(panel) * groups + group) * kGroupBytes;
    barrier_expect(arrived, panels * bytes);
    copy_bulk(own, from, bytes, arrived);
    if (panels > 1) copy_bulk(own + kPanelBytes, from + static_cast<int64_t>(groups) * kGroupBytes, bytes, arrived);
  }

  // Of groups 2t and 2t + 1, blocks step or the one beside it.
  __device__ __forceinline__ void load(int step, uint4 (&w)[2]) const {
    const int block = step / 2 * 2 + ((step ^ t) & 1);
#pragma unroll
    for (int e = 0; e < 2; ++e)
      w[e] = *reinterpret_cast<const uint4*>(own + quad / 4 * kPanelBytes + (2 * t + e) * kGroupBytes + block * 64 +
                                             quad % 4 * 16);
  }

  __device__ __forceinline__ void load(Constants& to, const Place& at, bool first) const {
    if (args.rank && first) to.column = column(at.tile, 0);
    if (first) to.scales = four(args.scales, at.tile);
    if constexpr (mode == kChannel) return;
    const int panel = min(at.tile * (kTile / kPanel) + quad / 4, ceil_div(args.m, kPanel) - 1);
    const uint8_t* of_groups = args.group_scales + static_cast<int64_t>(panel) * args.groups * 8;
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int group = min(at.unit * kGroups + 2 * t + e, groups - 1);
      to.group_scales[e] = __ldg(reinterpret_cast<const uint2*>(of_groups + quotient(group, args.group_steps) * 8));
    }
  }

  // The thread's column of C: the t-th of four, of which the warp takes every parts-th.
  __device__ __forceinline__ uint2 column(int tile, int i) const {
    const int c = 4 * (part + i * shares.parts) + t;
    return c < args.rank ? four(args.coef + static_cast<int64_t>(c) * args.m, tile) : make_uint2(0, 0);
  }

  // Of a row of M, those of the thread's outputs.
  __device__ __forceinline__ uint2 four(const __half* row, int tile) const {
    const int output = tile * kTile + 4 * quad;
    return output < args.m ? __ldg(reinterpret_cast<const uint2*>(row + output)) : make_uint2(0, 0);
  }

  // What the first stage made, to shared memory; the block meets after it.
  __device__ __forceinline__ void stage() const {
    if (threadIdx.x < kZeros / 16)
      *reinterpret_cast<uint4*>(kept + shares.levels - kZeros + 16 * threadIdx.x) = make_uint4(0, 0, 0, 0);
    for (int i = threadIdx.x; i < shares.units * (kUnitFeatures / 16); i += blockDim.x) {  // whole warps: 4 threads a group
      const int group = i / 4;
      const bool there = group < groups, first = i % 4 == 0;
      uint4 v = make_uint4(0, 0, 0, 0);
      if (there) v = *reinterpret_cast<const uint4*>(static_cast<const char*>(args.levels) + 16 * i);
      if (mode == kFold && first) {
        const int64_t at = static_cast<int64_t>(quotient(group, args.segment_steps)) * args.tp;
        reinterpret_cast<float*>(kept + shares.scales)[group] = there ? args.scale[at] : 0.0f;
      }
      constexpr int ones = 0x01010101;
      int sum = __dp4a(int(v.x), ones, __dp4a(int(v.y), ones, __dp4a(int(v.z), ones, __dp4a(int(v.w), ones, 0))));
      sum += __shfl_xor_sync(~0u, sum, 1);
      sum += __shfl_xor_sync(~0u, sum, 2);
      // Groups of an odd t take two blocks in the other order.
      uint2* to = reinterpret_cast<uint2*>(kept + shares.levels + group * kLevelBytes + i % 4 * 16);
      to[group / 2 % 2] = make_uint2(v.x, v.y), to[1 - group / 2 % 2] = make_uint2(v.z, v.w);
      constexpr int magic = 0x4B400000;  // as in gemm.cuh
      if (first) reinterpret_cast<int*>(kept + shares.starts)[group] = (mode == kFold ? magic : 0) - 128 * sum;
    }
    for (int i = threadIdx.x; args.rank && i < args.rp; i += blockDim.x)
      reinterpret_cast<float*>(kept + shares.low)[i] =
          (__half2float(args.low[i]) + __half2float(args.low[args.rp + i])) * args.low_factor[0];
  }

  // The sums of a unit; without groups they go on.
  __device__ __forceinline__ void begin(const Place& at) {
    const int2 start = *reinterpret_cast<const int2*>(kept + shares.starts + 4 * (at.unit * kGroups + 2 * t));
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int pair = i / 4, e = i % 2;
      if constexpr (mode == kChannel) {
        high[pair][i % 4] += e ? start.y : start.x;
      } else {
        low[pair][i % 4] = 0;
        high[pair][i % 4] = e ? start.y : start.x;
      }
    }
  }

  // lo and hi: operand B of this step's products.
  __device__ __forceinline__ void multiply(const uint4 (&w)[2], const uint32_t (&lo)[2], const uint32_t (&hi)[2]) {
    const uint32_t words[2][4] = {{w[0].x, w[0].y, w[0].z, w[0].w}, {w[1].x, w[1].y, w[1].z, w[1].w}};
    uint32_t a[2][2][4];  // [low, high][pair]
#pragma unroll
    for (int e = 0; e < 2; ++e)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        a[0][i / 2][2 * e + i % 2] = words[e][i] & 0x0F0F0F0Fu;
        a[1][i / 2][2 * e + i % 2] = words[e][i] & 0xF0F0F0F0u;
      }
#pragma unroll
    for (int pair = 0; pair < 2; ++pair) {
      mma_u8s8(low[pair], a[0][pair], lo);
      mma_u8s8(high[pair], a[1][pair], hi);
    }
  }

  // The unit's sums, times the scales of their groups and of the token. They are of 16 · q, and start with what makes up for
  // the nibbles' 8.
  __device__ __forceinline__ void fold(const Place& at, const Constants& constants) {
    if constexpr (mode == kChannel) return;
    float2 token = make_float2(0.0f, 0.0f);
    if constexpr (mode == kFold)
      token = *reinterpret_cast<const float2*>(kept + shares.scales + 4 * (at.unit * kGroups + 2 * t));
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const GroupScales c(constants.group_scales[e], quad % 4);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int at = 2 * (i % 2) + e, sum = 16 * low[i / 2][at] + high[i / 2][at];
        if constexpr (mode == kFold) {
          out[i] = fmaf((__int_as_float(sum) - kMagic) * c.as_float(i), e ? token.y : token.x, out[i]);
        } else {  // without the 16, or a long sum would not fit
          total[i] += c.of(i) * (sum >> 4);
        }
      }
    }
  }

  __device__ __forceinline__ void add_column(const uint2& c, float low_of, float (&to)[4]) const {
    const float2 lower = __half22float2(half2_of(c.x)), upper = __half22float2(half2_of(c.y));
    to[0] = fmaf(low_of, lower.x, to[0]), to[1] = fmaf(low_of, lower.y, to[1]);
    to[2] = fmaf(low_of, upper.x, to[2]), to[3] = fmaf(low_of, upper.y, to[3]);
  }

  // This warp's share of low · C.
  __device__ __forceinline__ void branch(int tile, const uint2& own, float (&to)[4]) const {
    const float* factors = reinterpret_cast<const float*>(kept + shares.low);
    if (4 * part + t < args.rank) add_column(own, factors[4 * part + t], to);
    for (int i = 1; 4 * (part + i * shares.parts) < args.rank; ++i) {
      const int c = 4 * (part + i * shares.parts) + t;
      if (c < args.rank) add_column(column(tile, i), factors[c], to);
    }
  }

  // Values of four threads' t as one: each is left with that of output 4 · quad + t.
  __device__ __forceinline__ float over_threads(const float (&v)[4]) const {
    const bool odd = t % 2, upper = t / 2;
    float a = odd ? v[1] : v[0], b = odd ? v[3] : v[2];
    a += __shfl_xor_sync(~0u, odd ? v[0] : v[1], 1);
    b += __shfl_xor_sync(~0u, odd ? v[2] : v[3], 1);
    return (upper ? b : a) + __shfl_xor_sync(~0u, upper ? a : b, 10);  // the same quad
  }

  // index: of the tile in its block.
  __device__ __forceinline__ void finish(int tile, int index, const Constants& constants) {
    constexpr float unit = mode == kMultiples ? 1.0f : 0.0625f;  // the others' are sums of 16 · q
    const float of_token = mode == kFold ? unit : unit * args.scale[0];
    const float2 lower = __half22float2(half2_of(constants.scales.x)), upper = __half22float2(half2_of(constants.scales.y));
    const float scale[4] = {lower.x * of_token, lower.y * of_token, upper.x * of_token, upper.y * of_token};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int pair = i / 2, h = i % 2;
      if constexpr (mode == kChannel)
        total[i] = 16 * (low[pair][2 * h] + low[pair][2 * h + 1]) + high[pair][2 * h] + high[pair][2 * h + 1];
      out[i] = scale[i] * (mode == kFold ? out[i] : static_cast<float>(total[i]));
    }
    if (args.rank) branch(tile, constants.column, out);
    reinterpret_cast<float*>(kept + shares.sums)[((index * shares.parts) + part) * kTile + 4 * quad + t] = over_threads(out);
    clear_sums();
  }

  __device__ __forceinline__ void clear_sums() {
#pragma unroll
    for (int i = 0; i < 8; ++i) low[i / 4][i % 4] = high[i / 4][i % 4] = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) out[i] = 0.0f, total[i] = 0;
  }
};

}  // namespace specquant_cuda
