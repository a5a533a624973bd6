// Tiles, shared memory and copies of gemm.cuh, which says what lies where: a ring of slots of 64 features, and what is read
// of a slot.
#pragma once

#include "args.h"
#include "ptx.cuh"
#include "unpack.cuh"

namespace specquant_cuda {

constexpr int kOutputsPerWarp = 64;

template <Mode mode, int token_frags, int warps_t, int warps_o, int stages>
struct GemmSlots {
  static constexpr bool kFolds = mode == kFold;
  static constexpr bool kIntegers = mode != kHalf;
  static constexpr int kThreads = warps_t * warps_o * 32;
  static constexpr int kTokens = warps_t * token_frags * 16;
  static constexpr int kOutputs = warps_o * kOutputsPerWarp;
  static constexpr int kRowBytes = kStep * (kIntegers ? 1 : 2);

  // A slot of the ring.
  static constexpr int kWeights = kTokens * kRowBytes;
  static constexpr int kGroupScales = kWeights + kOutputs * kStep / 2;
  static constexpr int kTokenScales = kGroupScales + (mode == kChannel ? 0 : kOutputs / kPanel * 8);
  static constexpr int kSlot = kTokenScales + (kFolds ? kTokens * 4 : 0);
  static constexpr int kShared = kSlot * stages;

  const Args& args;
  uint8_t* shared;
  int first_token, first_output;              // of the block
  int thread, g, t, warp_token, warp_output;  // the last two within the block
  int blocks, panels;
  const uint8_t* levels;  // of the block's first token
  const uint8_t* packed;  // of its first panel

  __device__ __forceinline__ GemmSlots(const Args& a, uint8_t* memory)
      : args(a), shared(memory), first_token(blockIdx.x * kTokens), first_output(blockIdx.y * kOutputs) {
    thread = threadIdx.x;
    const int warp = thread / 32, lane = thread % 32;
    g = lane / 4;
    t = lane % 4;
    warp_token = warp % warps_t * token_frags * 16;
    warp_output = warp / warps_t * kOutputsPerWarp;
    blocks = ceil_div(args.n, kBlock);
    panels = ceil_div(args.m, kPanel) - first_output / kPanel;
    levels = static_cast<const uint8_t*>(args.levels) + static_cast<int64_t>(first_token) * args.kp * (kIntegers ? 1 : 2);
    packed = args.qweight + static_cast<int64_t>(first_output / kPanel) * blocks * 64;
  }

  __device__ __forceinline__ int token_row(int f, int h) const { return warp_token + 2 * token_frags * g + 2 * f + h; }

  // Starts the copies of features 64·step … into their slot. Nothing past the end of an array is read.
  __device__ __forceinline__ void fetch(int step) {
    uint8_t* slot = shared + step % stages * kSlot;
    constexpr int row_pieces = kRowBytes / 16;
    const uint8_t* from_levels = levels + step * kRowBytes;
#pragma unroll
    for (int i = 0; i < kTokens * row_pieces / kThreads; ++i) {
      const int piece = thread + i * kThreads, row = piece / row_pieces, column = piece % row_pieces;
      const int offset = row * args.kp * (kIntegers ? 1 : 2) + column * 16;
      copy_async(slot + place(row, column), from_levels + offset, first_token + row < args.tokens);
    }
    const uint8_t* from_packed = packed + static_cast<int64_t>(step) * (kStep / kBlock * 64);
#pragma unroll
    for (int i = 0; i < kOutputs / kPanel * 32 / kThreads; ++i) {
      const int piece = thread + i * kThreads, panel = piece / 32, block = piece % 32 / 4, quad = piece % 4;
      const int offset = panel * blocks * 64 + block * 64 + quad * 16;
      copy_async(slot + weight_place(panel, block, quad), from_packed + offset,
                 panel < panels && step * (kStep / kBlock) + block < blocks);
    }
    if constexpr (mode != kChannel) {
      if (thread < kOutputs / kPanel) {
        const uint8_t* from = args.group_scales + static_cast<int64_t>(first_output / kPanel) * args.groups * 8;
        const int at = thread * args.groups + quotient(step, args.group_steps);
        copy_async_8(slot + kGroupScales + thread * 8, from + at * 8, thread < panels);
      }
    }
    if constexpr (kFolds) {
      const int64_t segment = step * kStep / args.segment;
      if (thread < kTokens / 4)
        copy_async(slot + kTokenScales + thread * 16, args.scale + segment * args.tp + first_token + thread * 4, true);
    }
  }

  // Where 16 bytes of a token's row go: rows that ldmatrix reads at once lie in different banks.
  __device__ __forceinline__ static int place(int row, int column) {
    const int turn = row / (2 * token_frags) % 8;  // g of the row
    return kIntegers ? (row ^ turn / 4) * kRowBytes + (column ^ turn % 4) * 16 : row * kRowBytes + (column ^ turn) * 16;
  }

  // Where 16 bytes of packed weights go, likewise.
  __device__ __forceinline__ static int weight_place(int panel, int block, int quad) {
    const int line = block / 2;
    return kWeights + panel * 512 + line * 128 + ((block % 2 * 4 + quad) ^ (2 * line)) * 16;
  }

  __device__ __forceinline__ uint4 weights(const uint8_t* slot, int o, int s) const {
    const int panel = warp_output / kPanel + 2 * o + g / 4;
    return *reinterpret_cast<const uint4*>(slot + weight_place(panel, 4 * s + t, g % 4));
  }

  // A fragment: 16 tokens, 16-byte columns 2·pair and 2·pair + 1.
  __device__ __forceinline__ void activations(uint32_t (&a)[4], const uint8_t* slot, int f, int pair) const {
    const int lane = thread % 32, h = lane / 8 % 2;
    const int row = warp_token + 2 * token_frags * (lane % 8) + 2 * f + h;
    load_matrices(a, slot + place(row, 2 * pair + lane / 16));
  }

  // Of panel 2 · o + half of the warp's.
  __device__ __forceinline__ uint2 group_scales(const uint8_t* slot, int o, int half) const {
    return *reinterpret_cast<const uint2*>(slot + kGroupScales + (warp_output / kPanel + 2 * o + half) * 8);
  }

  // c of outputs 32 · o + 8t … 8t + 7.
  __device__ __forceinline__ void group_scales(const uint8_t* slot, int o, float (&scale)[8]) const {
    const uint2 raw = group_scales(slot, o, t / 2);
#pragma unroll
    for (int i = 0; i < 8; ++i) scale[i] = GroupScales(raw, t % 2 * 2 + i / 4).as_float(i % 4);
  }
};

}  // namespace specquant_cuda
