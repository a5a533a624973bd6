// softmax(q k̂ᵀ) v̂ of prompts on Hopper. A block takes kPromptRows tokens of one head: a thread copies tiles of keys and
// values to a ring, two warpgroups of 64 tokens multiply. While a warpgroup turns scores into weights, the product of
// the weights before with their values is under way.
#pragma once

#include "prompt_attention.h"
#include "ptx90_half.cuh"
#include "reductions.cuh"

namespace specquant_cuda {

// turns: the warpgroups ask for products by turns, so that one's weights are made while the other multiplies.
template <int d_, int slots, bool turns>
struct Prompt90 {
  static constexpr int d = d_;
  static constexpr bool kTurns = turns;
  static constexpr int kConsumers = 2, kThreads = (kConsumers + 1) * 128, kSlots = slots;
  static constexpr int kRowBytes = kPromptPiece * 2, kPieces = d / kPromptPiece;
  static constexpr int kQueryPiece = 64 * kRowBytes, kQueries = kPieces * kQueryPiece;  // of a warpgroup
  static constexpr int kTilePiece = kPromptTokens * kRowBytes, kTile = kPieces * kTilePiece;
  static constexpr int kKeys = kConsumers * kQueries, kValues = kKeys + kSlots * kTile;
  static constexpr int kBarriers = kValues + kSlots * kTile;
  static constexpr int kShared = kBarriers + (1 + 4 * kSlots) * 8;

  uint8_t* shared;
  uint64_t *queries, *full_keys, *empty_keys, *full_values, *empty_values;
  __device__ __forceinline__ explicit Prompt90(uint8_t* memory)
      : shared(memory), queries(reinterpret_cast<uint64_t*>(memory + kBarriers)), full_keys(queries + 1),
        empty_keys(full_keys + kSlots), full_values(empty_keys + kSlots), empty_values(full_values + kSlots) {}
};

template <class P>
struct PromptConsumer {
  static constexpr int d = P::d, kScores = kPromptTokens / 2, kOutputs = d / 2, kSteps = kPromptTokens / 16;

  const P& block;
  const int group, lane, g, t;
  float scores[kScores], y[kOutputs];
  uint32_t weights[kSteps][4];
  float largest[2], sum[2], factor[2];
  int first[2], last[2];  // rows see tokens (first[h], last[h]]

  __device__ __forceinline__ explicit PromptConsumer(const P& block_)
      : block(block_), group(threadIdx.x / 128 - 1), lane(threadIdx.x % 32), g(lane / 4), t(lane % 4) {}

  __device__ __forceinline__ void release(uint64_t* barrier) const {
    __syncwarp();
    if (lane == 0) barrier_arrive(barrier);
  }

  // The warpgroups' turns, from the first one's on; of the last tile nobody waits for the second one.
  __device__ __forceinline__ void my_turn() const {
    if (P::kTurns) named_wait(1 + group, 256);
  }
  __device__ __forceinline__ void your_turn(bool again) const {
    if (P::kTurns && (group == 0 || again)) named_arrive(2 - group, 256);
  }

  __device__ __forceinline__ void multiply_keys(int at) {
    const int slot = at % P::kSlots;
    barrier_wait(block.full_keys + slot, at / P::kSlots & 1);
    const uint64_t q = wgmma_operand(block.shared + group * P::kQueries);
    const uint64_t k = wgmma_operand(block.shared + P::kKeys + slot * P::kTile);
    wgmma_fence();
#pragma unroll
    for (int s = 0; s < d / 16; ++s)
      wgmma_f16(scores, q + (s / 4 * P::kQueryPiece + s % 4 * 32 >> 4), k + (s / 4 * P::kTilePiece + s % 4 * 32 >> 4),
                s > 0);
    wgmma_commit();
  }

  __device__ __forceinline__ void multiply_values(int at) {
    const int slot = at % P::kSlots;
    barrier_wait(block.full_values + slot, at / P::kSlots & 1);
    const uint64_t v = wgmma_across(block.shared + P::kValues + slot * P::kTile, P::kTilePiece);
    wgmma_fence();
#pragma unroll
    for (int s = 0; s < kSteps; ++s) wgmma_f16(y, weights[s], v + (s * 16 * P::kRowBytes >> 4), s > 0 || at > 0);
    wgmma_commit();
  }

  __device__ __forceinline__ void hold_scores() {
#pragma unroll
    for (int i = 0; i < kScores; ++i) hold(scores[i]);
  }
  __device__ __forceinline__ void hold_outputs() {
#pragma unroll
    for (int i = 0; i < kOutputs; ++i) hold(y[i]);
  }

  // −∞ for what a row does not see of the tile that starts at `start`.
  __device__ __forceinline__ void mask(int start) {
#pragma unroll
    for (int i = 0; i < kScores; ++i) {
      const int h = i / 2 % 2, token = start + i / 4 * 8 + 2 * t + i % 2;
      if (token <= first[h] || token > last[h]) scores[i] = -INFINITY;
    }
  }

  // Scores become weights relative to the largest so far; correction: of what was summed before.
  __device__ __forceinline__ void soften(float (&correction)[2]) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float most = -INFINITY;
#pragma unroll
      for (int i = 0; i < kScores; i += 4) most = fmaxf(most, fmaxf(scores[i + 2 * h], scores[i + 2 * h + 1]));
      most = fmaxf(most, __shfl_xor_sync(~0u, most, 1));
      most = fmaxf(most, __shfl_xor_sync(~0u, most, 2));
      most = fmaxf(most * factor[h], largest[h]);
      const float base = most == -INFINITY ? 0.0f : most;
      correction[h] = power_of_two(largest[h] - base);
      largest[h] = most;
      float total = 0.0f;
#pragma unroll
      for (int i = 0; i < kScores; i += 4)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          float& score = scores[i + 2 * h + e];
          score = power_of_two(fmaf(score, factor[h], -base));
          total += score;
        }
      sum[h] = fmaf(sum[h], correction[h], total);
    }
  }

  __device__ __forceinline__ void narrow() {
#pragma unroll
    for (int s = 0; s < kSteps; ++s)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        weights[s][i] = bits_of(__floats2half2_rn(scores[8 * s + 2 * i], scores[8 * s + 2 * i + 1]));
  }

  // All tiles, the last one first. No row of the block misses a token of (all_first, all_last].
  __device__ __forceinline__ void run(int first_tile, int tiles, int all_first, int all_last) {
    const auto soften_tile = [&](int at, float(&correction)[2]) {
      const int start = (first_tile + tiles - 1 - at) * kPromptTokens;
      if (start <= all_first || start + kPromptTokens - 1 > all_last) mask(start);
      soften(correction);
    };
    float correction[2];
    if (P::kTurns && group == 1) named_arrive(1, 256);
    my_turn();
    multiply_keys(0);
    your_turn(tiles > 1);
    wgmma_wait<0>();
    hold_scores();
    release(block.empty_keys);
    soften_tile(0, correction);
    narrow();
    for (int at = 1; at < tiles; ++at) {
      my_turn();
      multiply_keys(at);
      multiply_values(at - 1);
      your_turn(at + 1 < tiles);
      wgmma_wait<1>();
      hold_scores();
      release(block.empty_keys + at % P::kSlots);
      soften_tile(at, correction);
      wgmma_wait<0>();
      hold_outputs();
      release(block.empty_values + (at - 1) % P::kSlots);
#pragma unroll
      for (int i = 0; i < kOutputs; ++i) y[i] *= correction[i / 2 % 2];
      narrow();
    }
    multiply_values(tiles - 1);
    wgmma_wait<0>();
    hold_outputs();
  }

  // y of rows `row` + g and g + 8 of one head, whose rows are `stride` apart; 0 from `count` on, nothing from `rows` on.
  __device__ __forceinline__ void write(__half* to, int64_t stride, int row, int count, int rows) {
    const bool wide = reinterpret_cast<uintptr_t>(to) % 16 == 0 && stride % 8 == 0;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float total = sum[h];
      total += __shfl_xor_sync(~0u, total, 1);
      total += __shfl_xor_sync(~0u, total, 2);
      const int r = row + g + 8 * h;
      const float inverse = __fdiv_rn(1.0f, total);
      __half* line = to + r * stride;
#pragma unroll
      for (int block_ = 0; block_ < kOutputs / 4; block_ += 4) {
        uint32_t words[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float* from = y + 4 * (block_ + i) + 2 * h;
          words[i] = r < count ? bits_of(__floats2half2_rn(from[0] * inverse, from[1] * inverse)) : 0;
        }
        // Four threads turn their words about: each then has 8 features next to each other.
#pragma unroll
        for (int step = 1; step < 4; step *= 2)
#pragma unroll
          for (int i = 0; i < 4; ++i)
            if (!(i & step)) {
              const uint32_t got = __shfl_xor_sync(~0u, t & step ? words[i] : words[i + step], step);
              (t & step ? words[i] : words[i + step]) = got;
            }
        if (r >= rows) continue;
        __half* place = line + 8 * (block_ + t);
        if (wide) {
          *reinterpret_cast<uint4*>(place) = make_uint4(words[0], words[1], words[2], words[3]);
        } else {
#pragma unroll
          for (int i = 0; i < 4; ++i)
            place[2 * i] = __low2half(half2_of(words[i])), place[2 * i + 1] = __high2half(half2_of(words[i]));
        }
      }
    }
  }
};

template <class P>
__global__ void __launch_bounds__(P::kThreads, 1) prompt_attend_kernel(const AttentionArgs a, int first_item) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL) || !defined(__CUDA_ARCH__)
  constexpr int d = P::d;
  extern __shared__ __align__(1024) uint8_t memory[];
  const P block(memory);
  let_next_start();
  wait_for_previous();
  const int item = first_item + blockIdx.x / a.group, b = item / a.kv_heads;
  const int head = item % a.kv_heads * a.group + blockIdx.x % a.group;
  const int row = (gridDim.y - 1 - blockIdx.y) * kPromptRows;  // the last rows see most: they start first
  const Lengths lengths = lengths_of(a, b);
  const int count = lengths.after - lengths.before, used = min(kPromptRows, count - row);
  const int64_t stride = static_cast<int64_t>(a.heads) * d;
  __half* y = static_cast<__half*>(a.y) + b * a.sequence * stride + static_cast<int64_t>(head) * d;
  if (used <= 0) {  // padding, or lengths that do not fit
    const __half value = __float2half_rn(lengths.sound ? 0.0f : __int_as_float(0x7FC00000));
    for (int i = threadIdx.x; i < kPromptRows * d; i += P::kThreads)
      if (row + i / d < a.sequence) y[(row + i / d) * stride + i % d] = value;
    return;
  }
  const int before = lengths.before + row;  // tokens before the block's first
  const int first_tile = a.window > 0 ? max(0, before + 1 - a.window) / kPromptTokens : 0;
  const int tiles = (before + used - 1) / kPromptTokens + 1 - first_tile;
  if (threadIdx.x == 0) {
    barrier_init(block.queries, 1);
    for (int i = 0; i < P::kSlots; ++i) {
      barrier_init(block.full_keys + i, 1), barrier_init(block.full_values + i, 1);
      barrier_init(block.empty_keys + i, 4 * P::kConsumers), barrier_init(block.empty_values + i, 4 * P::kConsumers);
    }
    barriers_ready();
  }
  __syncthreads();
  const int64_t turned = (static_cast<int64_t>(b) * a.heads + head) * a.turned_rows + row;
  if (threadIdx.x < 128) {
    leave_registers<24>();
    if (threadIdx.x > 0) return;
    const int64_t bytes = unpacked_bytes(a.present_rows, d) / 2;
    const uint8_t* keys = static_cast<const uint8_t*>(a.unpacked) + (item - first_item) * 2 * bytes;
    barrier_expect(block.queries, P::kConsumers * P::kQueries);
    copy_bulk(block.shared, static_cast<const uint8_t*>(a.turned) + turned * d * 2, P::kConsumers * P::kQueries,
              block.queries);
    for (int at = 0; at < tiles; ++at) {
      const int slot = at % P::kSlots;
      const uint32_t parity = (at / P::kSlots & 1) ^ 1;
      const uint8_t* from = keys + static_cast<int64_t>(first_tile + tiles - 1 - at) * P::kTile;
      barrier_wait(block.empty_keys + slot, parity);
      barrier_expect(block.full_keys + slot, P::kTile);
      copy_bulk(block.shared + P::kKeys + slot * P::kTile, from, P::kTile, block.full_keys + slot);
      barrier_wait(block.empty_values + slot, parity);
      barrier_expect(block.full_values + slot, P::kTile);
      copy_bulk(block.shared + P::kValues + slot * P::kTile, from + bytes, P::kTile, block.full_values + slot);
    }
    return;
  }
  take_registers<240>();
  PromptConsumer<P> consumer(block);
  const int own = 64 * consumer.group + threadIdx.x % 128 / 32 * 16;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int r = own + consumer.g + 8 * h;
    consumer.last[h] = r < used ? before + r : -1;
    consumer.first[h] = a.window > 0 ? before + r - a.window : -1;
    consumer.factor[h] = r < used ? a.turned_factors[turned + r] : 1.0f;
    consumer.largest[h] = -INFINITY, consumer.sum[h] = 0.0f;
  }
  barrier_wait(block.queries, 0);
  consumer.run(first_tile, tiles, a.window > 0 ? before + used - 1 - a.window : -1, before);
  consumer.write(y, stride, row + own, count, a.sequence);
#endif
}

}  // namespace specquant_cuda
