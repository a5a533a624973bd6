// The first stage of attention of prompts on Hopper: new rows to the cache as in append.cu, bit for bit, and these rows
// and their queries as float16, and beside that the cache's older rows as float16. All of that lies as wgmma reads it
// (prompt_attention.h).
#include <algorithm>

#include "launch.h"
#include "prompt_rows.cuh"

namespace specquant_cuda {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kEnoughWarps = 1 << 13;  // for any GPU: with fewer tokens, several of them share a token's heads
constexpr int kUnpackBlocks = 512;     // enough for every GPU's memory
constexpr int kPieces = kPromptPiece / 8;

// The kv heads at hand of row b of the batch: `count` of them from `first` on; in the workspace they lie from `item`
// on.
struct Heads {
  int b, first, count, item;
  __device__ __forceinline__ Heads(const AttentionArgs& a, int first_item, int items) {
    b = first_item / a.kv_heads + blockIdx.y;
    first = max(first_item - b * a.kv_heads, 0);
    count = min(first_item + items - b * a.kv_heads, a.kv_heads) - first;
    item = b * a.kv_heads + first - first_item;
  }
  // Keys or values of the i-th of them, in float16.
  template <int d>
  __device__ __forceinline__ uint4* unpacked(const AttentionArgs& a, int i, bool value) const {
    const int pieces = static_cast<int>(unpacked_bytes(a.present_rows, d) / 32);
    return static_cast<uint4*>(a.unpacked) + int64_t(2 * (item + i) + value) * pieces;
  }
};

enum Kind { kQuery, kKey, kValue };

// A warp's way through a token's heads, some rows at a time, every shares-th time: queries, then keys, then values. The
// next rows are on their way meanwhile.
template <int d, bool half_cache>
struct Append {
  using Row = NewRow<d>;
  const AttentionArgs& a;
  const Heads& heads;
  const typename Row::Turns& turns;
  float* room;
  int token, position, share, shares, which;
  const __half* from;  // the lane's part of the token's first head
  uint4 raw[2];

  // How many rows there are of a kind, and which head of qkv is the first of them.
  __device__ __forceinline__ static int count(const AttentionArgs& a, const Heads& heads, Kind kind) {
    return kind == kQuery ? heads.count * a.group : heads.count;
  }
  __device__ __forceinline__ static int first(const AttentionArgs& a, const Heads& heads, Kind kind) {
    return kind == kQuery ? heads.first * a.group : a.heads + heads.first + (kind == kValue ? a.kv_heads : 0);
  }
  // The first of these rows that is this lane's: those of all kinds are dealt out in one turn.
  __device__ __forceinline__ static int start(const AttentionArgs& a, const Heads& heads, Kind kind, int share,
                                              int shares, int which) {
    const int queries = ceil_div(heads.count * a.group, Row::kRows), keys = ceil_div(heads.count, Row::kRows);
    const int before = kind == kQuery ? 0 : kind == kKey ? queries : queries + keys;
    return ((share - before) & (shares - 1)) * Row::kRows + which;
  }
  __device__ __forceinline__ static bool has(const AttentionArgs& a, const Heads& heads, Kind kind, int share,
                                             int shares) {
    return start(a, heads, kind, share, shares, 0) < count(a, heads, kind);
  }
  __device__ __forceinline__ static void load(const __half* from, int head, uint4 (&raw)[2]) {
    const uint4* at = reinterpret_cast<const uint4*>(from + head * d);
    raw[0] = at[0], raw[1] = at[d / 16];
  }

  template <Kind kind>
  __device__ __forceinline__ void run() {
    const Kind following = kind == kQuery && has(a, heads, kKey, share, shares) ? kKey : kValue;
    const int rows = count(a, heads, kind), later = start(a, heads, following, share, shares, which);
    for (int i = start(a, heads, kind, share, shares, which); i - which < rows; i += shares * Row::kRows) {
      Row row;
      widen(raw[0], *reinterpret_cast<float(*)[kEach]>(row.x));
      widen(raw[1], *reinterpret_cast<float(*)[kEach]>(row.x + kEach));
      const int next = i + shares * Row::kRows;
      const bool same = next - which < rows;
      load(from, same || kind == kValue ? first(a, heads, kind) + min(next, rows - 1)
                                        : first(a, heads, following) + min(later, count(a, heads, following) - 1), raw);
      if constexpr (kind != kValue) {
        if (a.rotary == d / 2) {
          row.turn(turns);
        } else {
          row.turn_some(a, a.position_ids[static_cast<int64_t>(heads.b) * a.sequence + token], room + which * d);
        }
        if (kind == kKey && a.key_offset) row.subtract(a.key_offset + (heads.first + min(i, rows - 1)) * d);
        if (a.hadamard) row.transform(d == 64 ? 0.125f : 0x1.6a09e6p-4f);  // 1 / √d
      }
      kind == kQuery ? store_query(row, heads.b * a.heads + first(a, heads, kind) + i, i < rows)
                     : store_cached(row, i, kind == kValue, i < rows);
    }
  }

  // The lane's two runs to tiles of so many rows.
  __device__ __forceinline__ static void put(uint4* to, const Row& row, int token, int rows) {
    const int place = static_cast<int>(piece_place(token, Row::lane(), rows, d));
    to[place] = row.halves(0), to[d == 128 ? place + rows * kPieces : place ^ kPieces / 2] = row.halves(1);
  }

  __device__ __forceinline__ void store_query(Row& row, int head, bool there) const {
    float largest = 0.0f, factor, inverse;
#pragma unroll
    for (int j = 0; j < 2 * kEach; ++j) row.x[j] *= a.factor, largest = max_nan(largest, fabsf(row.x[j]));
    half_factor(Row::over_row(largest, Largest()), factor, inverse);
#pragma unroll
    for (int j = 0; j < 2 * kEach; ++j) row.x[j] *= inverse;
    if (!there) return;
    const int64_t first = static_cast<int64_t>(head) * static_cast<int>(a.turned_rows);
    put(static_cast<uint4*>(a.turned) + first * (d / 8), row, token, 64);
    if (Row::lane() == 0) a.turned_factors[first + token] = factor;
  }

  __device__ __forceinline__ void store_cached(Row& row, int i, bool value, bool there) const {
    const int64_t at = static_cast<int64_t>(heads.b * a.kv_heads + heads.first + i) * a.present_rows + position;
    void* cache = value ? a.present_value : a.present_key;
    if constexpr (half_cache) {
      __half* to = static_cast<__half*>(cache) + at * d + kEach * Row::lane();
#pragma unroll
      for (int run = 0; run < 2; ++run, to += d / 2) {
        const uint4 packed = row.halves(run);
        if (there && aligned(cache)) {
          *reinterpret_cast<uint4*>(to) = packed;
        } else if (there) {
          uint32_t* words = reinterpret_cast<uint32_t*>(to);
          words[0] = packed.x, words[1] = packed.y, words[2] = packed.z, words[3] = packed.w;
        }
      }
    } else {
      row.pack(a.cut, there, static_cast<uint32_t*>(cache) + at * (d / 8 + 1));
    }
    if (there) put(heads.unpacked<d>(a, i, value), row, position, kPromptTokens);
  }
};

template <int d, bool half_cache>
__device__ __forceinline__ void append_rows(const AttentionArgs& a, const Heads& heads, int token, int share, int shares,
                                            float* room) {
  using This = Append<d, half_cache>;
  using Row = NewRow<d>;
  const int64_t at = static_cast<int64_t>(heads.b) * a.sequence + token;
  const int which = threadIdx.x % 32 / Row::kLanes;
  const __half* from = static_cast<const __half*>(a.qkv) + at * (a.heads + 2 * a.kv_heads) * d + kEach * Row::lane();
  const Kind kind = This::has(a, heads, kQuery, share, shares) ? kQuery  // of the share's first rows
                    : This::has(a, heads, kKey, share, shares) ? kKey : kValue;
  uint4 raw[2];  // before it is known whether the token counts
  This::load(from, This::first(a, heads, kind) + min(This::start(a, heads, kind, share, shares, which),
                                                     This::count(a, heads, kind) - 1), raw);
  const typename Row::Turns turns(a, a.position_ids[at]);
  const Lengths lengths = lengths_of(a, heads.b);
  const int position = lengths.before + token;
  if (!lengths.sound || position >= lengths.after) return;
  This append{a, heads, turns, room, token, position, share, shares, which, from, {raw[0], raw[1]}};
  append.template run<kQuery>();
  append.template run<kKey>();
  append.template run<kValue>();
}

// low + scale · level within what float16 holds: only rounding, or a key that was turned, comes beyond.
__device__ __forceinline__ float level_value(uint32_t level, float2 parameters) {
  const float value = fmaf(static_cast<float>(level), parameters.x, parameters.y);
  return fabsf(value) > 65504.0f ? copysignf(65504.0f, value) : value;
}

// Features [8p, 8p + 8) and [d/2 + 8p, …) of a cached token a thread, of the i-th kv head at hand: of rows that are older
// than the call, and zeros up to the end of the last tile. By `blocks`, of which this is one.
template <int d, bool half_cache>
__device__ __forceinline__ void unpack_rows(const AttentionArgs& a, const Heads& heads, int i, bool value, int block,
                                            int blocks) {
  constexpr int threads = d / 16, tokens = kThreads / threads;  // of a token, of a block
  const int piece = threadIdx.x % threads;
  const Lengths lengths = lengths_of(a, heads.b);
  if (!lengths.sound) return;
  const int rest = static_cast<int>(round_up(lengths.after, kPromptTokens)) - lengths.after;
  uint4* to = heads.unpacked<d>(a, i, value);
  const void* cache = value ? a.present_value : a.present_key;
  for (int j = block * tokens + threadIdx.x / threads; j < lengths.before + rest; j += blocks * tokens) {
    const bool old = j < lengths.before;
    const int token = old ? j : lengths.after + j - lengths.before;
    uint4 low = make_uint4(0, 0, 0, 0), high = low;
    const int64_t row = static_cast<int64_t>(heads.b * a.kv_heads + heads.first + i) * a.present_rows + token;
    if (old && half_cache) {
      const uint32_t* from = static_cast<const uint32_t*>(cache) + row * (d / 2) + 4 * piece;
      if (aligned(cache)) {
        low = *reinterpret_cast<const uint4*>(from), high = *reinterpret_cast<const uint4*>(from + d / 4);
      } else {
        low = make_uint4(from[0], from[1], from[2], from[3]);
        high = make_uint4(from[d / 4], from[d / 4 + 1], from[d / 4 + 2], from[d / 4 + 3]);
      }
    } else if (old) {
      const uint32_t* from = static_cast<const uint32_t*>(cache) + row * (d / 8 + 1);
      const float2 parameters = __half22float2(half2_of(from[d / 8]));
      NewRow<d> values;
#pragma unroll
      for (int k = 0; k < kEach; ++k) {
        const uint32_t byte = from[2 * piece + k / 4] >> 8 * (k % 4) & 255;
        values.x[k] = level_value(byte & 15, parameters), values.x[kEach + k] = level_value(byte >> 4, parameters);
      }
      low = values.halves(0), high = values.halves(1);
    }
    to[piece_place(token, piece, kPromptTokens, d)] = low;
    to[piece_place(token, piece + threads, kPromptTokens, d)] = high;
  }
}

// Of `items` kv heads of the batch from `first_item` on: the first blocks take new tokens, the others unpack.
template <int d, bool half_cache>
__global__ void __launch_bounds__(kThreads, 3) append_kernel(const AttentionArgs a, int first_item, int items,
                                                             int new_blocks, int shares) {
  __shared__ float room[kWarps][NewRow<d>::kRows * d];
  const Heads heads(a, first_item, items);
  const int warp = threadIdx.x / 32, block = blockIdx.x;
  let_next_start();
  wait_for_previous();
  if (block < new_blocks) {
    const int token = block * (kWarps / shares) + warp / shares;
    if (token < a.sequence) append_rows<d, half_cache>(a, heads, token, warp % shares, shares, room[warp]);
  } else {
    for (int i = 0; i < 2 * heads.count; ++i)
      unpack_rows<d, half_cache>(a, heads, i / 2, i % 2, block - new_blocks, gridDim.x - new_blocks);
  }
}

}  // namespace

cudaError_t prompt_append(const AttentionArgs& a, int first_item, int items, cudaStream_t stream) {
  const int batches = (first_item + items - 1) / a.kv_heads - first_item / a.kv_heads + 1;
  int shares = 1;
  while (shares < kWarps && int64_t(a.sequence) * batches * shares < kEnoughWarps) shares *= 2;
  const int new_blocks = ceil_div(a.sequence, kWarps / shares), tokens = kThreads * 16 / a.d;
  // The host does not know how many rows are older: often there are none.
  const int most = ceil_div(static_cast<int>(round_up(a.present_rows, kPromptTokens)), tokens);
  const dim3 grid(new_blocks + std::min(most, ceil_div(kUnpackBlocks, batches)), batches);
  const auto start = [&](auto kernel) {
    return launch_early(kernel, grid, kThreads, 0, a.early, stream, a, first_item, items, new_blocks, shares);
  };
  if (a.d == 64) return a.half_cache ? start(append_kernel<64, true>) : start(append_kernel<64, false>);
  return a.half_cache ? start(append_kernel<128, true>) : start(append_kernel<128, false>);
}

}  // namespace specquant_cuda
