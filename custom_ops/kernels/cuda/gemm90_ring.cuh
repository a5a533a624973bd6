// Tiles, shared memory and copies of gemm90.cuh: a ring of slots of 128 features, filled by four warps.
#pragma once

#include "args.h"
#include "ptx90.cuh"

namespace specquant_cuda {

// tokens: 64, 80 or 128, or 256 (gemm90_wide.cuh) of half as many outputs. folds: of each 128 features, where there are
// segments. split: the blocks of a cluster share a tile's features and exchange their sums (gemm90_end.cuh).
template <Mode mode, int tokens, int folds, bool split = false>
struct Gemm90 {
  static constexpr bool kFolds = mode == kFold;
  static constexpr int kConsumers = 2, kThreads = (kConsumers + 1) * 128;
  static constexpr bool kWide = tokens > 128;
  static constexpr int kOutputs = kConsumers * (kWide ? 64 : 128), kPanels = kOutputs / kPanel, kSlots = kWide ? 4 : split ? 5 : 6;
  static constexpr int kSums = tokens / 2;  // of a fragment, in each thread
  static constexpr int kBandBytes = 12 << 20, kLeastBand = 8;  // of activations; tiles of tokens

  // A slot.
  // Of a panel. Wide tiles have it in two halves, the second moved, so that what a warp loads from both is in all banks.
  static constexpr int kPieces = kWide ? 2 : 1, kPieceBytes = kChunk * kPanel / 2 / kPieces;
  static constexpr int kSecondPiece = kPieceBytes + 32, kPanelBytes = kWide ? 2 * kSecondPiece : kPieceBytes;
  static constexpr int kWeights = tokens * kChunk;
  static constexpr int kTokenScales = kWeights + kPanels * kPanelBytes;
  static constexpr int kSlot = (kTokenScales + (kFolds ? folds * tokens * 4 : 0) + 1023) / 1024 * 1024;
  // What the end of a tile needs: low of its tokens and its factors, and scales.
  static constexpr int kLow = kSlot * kSlots;
  static constexpr int kMostRank = kWide ? kRankStep : kFastRank;
  static constexpr int kEndScales = kLow + tokens * kMostRank * 4;
  static constexpr int kFactors = kEndScales + tokens * 4;
  static constexpr int kBarriers = kFactors + tokens * 4;
  static constexpr int kExchange = (kBarriers + (2 * kSlots + 3) * 8 + 15) / 16 * 16;
  static constexpr int kShared = kExchange + (split ? tokens * kOutputs * 4 : 0);

  const Args& args;
  uint8_t* shared;
  uint64_t *full, *empty, *end_full, *end_empty, *box;
  int parts;          // blocks that share a tile
  int first, chunks;  // of the features, this block's
  int tiles_t, tiles, band;

  __device__ __forceinline__ Gemm90(const Args& a, int parts_, uint8_t* memory)
      : args(a), shared(memory), full(reinterpret_cast<uint64_t*>(memory + kBarriers)), empty(full + kSlots),
        end_full(empty + kSlots), end_empty(end_full + 1), box(end_empty + 1), parts(split ? parts_ : 1), first(0),
        chunks(a.n / kChunk), tiles_t(ceil_div(a.tokens, tokens)), tiles(tiles_t * ceil_div(a.m, kOutputs)),
        band(min(tiles_t, max(kLeastBand, kBandBytes / (tokens * a.n)))) {
    if constexpr (split) {
      const int part = static_cast<int>(blockIdx.x) % parts, all = chunks;
      first = part * all / parts;
      chunks = (part + 1) * all / parts - first;
    }
  }

  __device__ __forceinline__ int first_tile() const { return static_cast<int>(blockIdx.x) / parts; }
  __device__ __forceinline__ int next_tile(int tile) const { return split ? tiles : tile + static_cast<int>(gridDim.x); }

  // Tiles of a band of tokens, whose activations the second-level cache holds, for all outputs, then the next band: all
  // tokens for the first outputs would read the activations of a long prompt from memory again for every 256 outputs.
  // Tiles with fewer outputs are the last.
  __device__ __forceinline__ int2 corner(int tile) const {
    const int strips = args.m / kOutputs, inside = tiles_t * strips;
    if (tile >= inside) return make_int2((tile - inside) * tokens, strips * kOutputs);
    const int which = tile / (band * strips), rest = tile - which * band * strips;
    const int rows = min(band, tiles_t - which * band), strip = rest / rows;
    return make_int2((which * band + rest - strip * rows) * tokens, strip * kOutputs);
  }

  // Where a warp that multiplies is in the ring.
  struct Turn {
    int slot = 0, last = 0;  // last: the slot before
    uint32_t parity = 0;

    __device__ __forceinline__ void next() {
      last = slot;
      if (++slot == kSlots) slot = 0, parity ^= 1;
    }
  };

  // One of the copies that fill a slot: a lane's, from tile to tile the same kind.
  struct Job {
    bool there = false;
    uint32_t to, bytes;  // within the slot
    const uint8_t* from;
    int64_t stride;      // bytes from one index to the next
    int every = 1, step = 1, index = 0, rest = 0;  // a slot is `step` of `every` folds that share an index

    __device__ __forceinline__ void set(uint32_t to_, const void* from_, int64_t stride_, uint32_t bytes_, int index_) {
      there = true, to = to_, from = static_cast<const uint8_t*>(from_), stride = stride_, bytes = bytes_, index = index_;
    }
    __device__ __forceinline__ void count(int features, int fold) {
      every = features / (kChunk / folds), step = folds, index = fold / every, rest = fold % every;
    }
    __device__ __forceinline__ void next() {
      for (rest += step; rest >= every; rest -= every) ++index;
    }
  };

  // What lane `lane` of producing warp `warp` copies: four pieces of panels a warp, and the rest where there is room. Lanes issue
  // one after another, some 80 cycles a copy of the 1,000 for a slot, and a division takes longer: hence four warps,
  // which count.
  __device__ __forceinline__ Job job(int warp, int lane, int token, int output, int rows, int outputs) const {
    Job job;
    const int panel = (4 * warp + lane) / kPieces, piece = lane % kPieces, fold = warp - 1;
    const int64_t panel_bytes = static_cast<int64_t>(args.n / kBlock) * 64;
    if (lane < 4 && panel < outputs / kPanel)
      job.set(kWeights + panel * kPanelBytes + piece * kSecondPiece,
              args.qweight + (output / kPanel + panel) * panel_bytes + piece * kPieceBytes, kPieces * kPieceBytes, kPieceBytes,
              first);
    if (warp == 0 && lane == 4)
      job.set(0, static_cast<const uint8_t*>(args.levels) + static_cast<int64_t>(token) * kChunk,
              static_cast<int64_t>(args.tp) * kChunk, rows * kChunk, first);
    if (!kFolds || fold < 0 || fold >= folds || lane < 4) return job;
    if (lane == 4)
      job.set(kTokenScales + fold * tokens * 4, args.scale + token, static_cast<int64_t>(args.tp) * 4, rows * 4, 0);
    job.count(args.segment, first * folds + fold);
    return job;
  }

  // Four warps: everything that is read, in the order in which it is wanted.
  __device__ __forceinline__ void produce(int warp, int lane) const {
    int slot = 0, turn = 0;
    uint32_t parity = 1;
    for (int tile = first_tile(); tile < tiles; tile = next_tile(tile), ++turn) {
      const int2 at = corner(tile);
      const int token = at.x, output = at.y;
      const int rows = min(tokens, args.tp - token), outputs = min(kOutputs, args.m - output);
      const int bytes =
          rows * kChunk + outputs * kChunk / 2 + (kFolds ? folds * rows * 4 : 0);
      // A warp without a job could fall two rounds behind, then wait for ever. Its later tiles have the same outputs.
      if (warp * 4 >= outputs / kPanel * kPieces && !(kFolds && warp <= folds)) return;
      Job mine = job(warp, lane, token, output, rows, outputs);
      for (int chunk = 0; chunk < chunks; ++chunk) {
        barrier_wait(empty + slot, parity);
        if (warp == 0 && lane == 0) barrier_expect(full + slot, bytes);
        if (mine.there)
          copy_bulk(shared + slot * kSlot + mine.to, mine.from + mine.index * mine.stride, mine.bytes, full + slot);
        mine.next();
        if (++slot == kSlots) slot = 0, parity ^= 1;
      }
      if (warp == 0 && lane == 0) produce_end(token, rows, turn);
      __syncwarp();
    }
  }

  // After the tile's last slot, so that waiting for the end of the tile before keeps nothing back.
  __device__ __forceinline__ void produce_end(int token, int rows, int turn) const {
    barrier_wait(end_empty, (turn & 1) ^ 1);
    const int low_bytes = args.rank ? min(rows, args.tokens - token) * args.rp * 4 : 0;
    barrier_expect(end_full, low_bytes + ((low_bytes > 0) + !kFolds) * rows * 4);
    if (low_bytes) {
      copy_bulk(shared + kLow, args.low + static_cast<int64_t>(token) * args.rp * 2, low_bytes, end_full);
      copy_bulk(shared + kFactors, args.low_factor + token, rows * 4, end_full);
    }
    if (!kFolds) copy_bulk(shared + kEndScales, args.scale + token, rows * 4, end_full);
  }
};

}  // namespace specquant_cuda
