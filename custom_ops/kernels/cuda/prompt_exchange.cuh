// Shared memory of a block of `prompt`, and what the blocks of a cluster tell each other of 16 tokens: parts of squares, of
// low, of ranges. All is sent (cluster.cuh), nothing read, so that no fence holds up what was written to global memory.
//
// Nobody sends of the next 16 tokens before all have read what they have of these: with a branch, since low then still
// lacks the share of those who have not; without one, two buffers take turns.
#pragma once

#include "cluster.cuh"
#include "prologue.cuh"

namespace specquant_cuda {

constexpr int kPromptTokens = 16;
constexpr int kPromptSent = 20;  // floats from a token's numbers to the next one's, of blocks or of warps: other banks
static_assert(kPromptSent >= kPromptWarps && kPromptSent % 4 == 0);

// Halves in a row of low: padded, so that rows start in different banks.
__host__ __device__ constexpr int prompt_stride(int rp) { return rp + 8; }

// Halves of 64 features of the basis and 32 of its columns: rows of 64 bytes, two in a line, swizzled.
constexpr int kBasisBlock = kStep * kRankStep;

// Bytes of a feature's norm: in float32, and in two float16 parts over a power of two of the block.
constexpr int kNormBytes = sizeof(float) + 2 * sizeof(__half);

struct PromptPlaces {
  __half *basis, *low;  // [64 features, 32 columns], [2 parts, tokens]
  float* norm;          // with late_norm: [64 features], as threads take them; then their parts, likewise
  float* sums;          // [warps, tokens] of a block; before that, with a Hadamard transform, x̂
  float* shares;        // sent: [tokens of this block, blocks] of low
  __half* finished;     // [tokens of this block, 2 parts] of low, to be sent
  float *squares, *ranges;  // sent: [buffers, tokens, kPromptSent], [buffers, 2, tokens, kPromptSent]; with late_norm
                            // squares of this block's tokens
  float* found;         // of warps: [buffers, 3, tokens, kPromptSent]: squares, −lowest, highest
  float2* token;        // sent, with low: its factor, and with late_norm what x is multiplied by
  float* norm_factor;   // what low is over, of this block's features
  uint64_t* boxes;      // of shares, of low; of squares and of ranges, for each buffer
  int values_stride;    // floats from a token's x̂ to the next

  static constexpr int kBoxes = 6;
  __host__ __device__ static constexpr int buffers(int rp) { return rp ? 1 : 2; }
  // Floats of squares and ranges, and as many of `found`.
  __host__ __device__ static constexpr int sent(int rp) { return buffers(rp) * 3 * kPromptTokens * kPromptSent; }

  // rp: 0 without a branch.
  __host__ __device__ static size_t take(PromptPlaces* at, uint8_t* memory, int warps, int spread, int rp, bool rotates,
                                         bool late_norm) {
    const int stride = prompt_stride(rp), values = warps * kStep + 8;
    size_t end = 0;
    const auto next = [&](size_t bytes) {
      uint8_t* place = memory + end;
      end += (bytes + 15) / 16 * 16;
      return place;
    };
    uint8_t* basis = next(warps * (rp / kRankStep) * kBasisBlock * sizeof(__half));
    uint8_t* norm = next(late_norm ? warps * kStep * kNormBytes : 0);
    uint8_t* low = next(rp ? 2 * kPromptTokens * stride * sizeof(__half) : 0);
    const size_t sums = warps * kPromptTokens * rp * sizeof(float);
    const size_t rotated = rotates ? kPromptTokens * values * sizeof(float) : 0;
    uint8_t* all_sums = next(sums > rotated ? sums : rotated);
    uint8_t* shares = next(kPromptTokens * rp * sizeof(float));
    uint8_t* finished = next(kPromptTokens / spread * 2 * rp * sizeof(__half));
    uint8_t* squares = next(sent(rp) * sizeof(float));
    uint8_t* found = next(sent(rp) * sizeof(float));
    uint8_t* token = next((kPromptTokens + 1) * sizeof(float2));
    uint8_t* boxes = next(kBoxes * sizeof(uint64_t));
    if (at) {
      at->basis = reinterpret_cast<__half*>(basis), at->low = reinterpret_cast<__half*>(low);
      at->norm = reinterpret_cast<float*>(norm);
      at->sums = reinterpret_cast<float*>(all_sums), at->shares = reinterpret_cast<float*>(shares);
      at->finished = reinterpret_cast<__half*>(finished), at->squares = reinterpret_cast<float*>(squares);
      at->ranges = at->squares + buffers(rp) * kPromptTokens * kPromptSent;
      at->found = reinterpret_cast<float*>(found), at->token = reinterpret_cast<float2*>(token);
      at->norm_factor = reinterpret_cast<float*>(at->token + kPromptTokens);
      at->boxes = reinterpret_cast<uint64_t*>(boxes), at->values_stride = values;
    }
    return end;
  }
};

template <int rank_blocks, bool late_norm>
struct PromptExchange {
  static constexpr int kColumns = rank_blocks * kRankStep, kStride = prompt_stride(kColumns);
  static constexpr int kBuffers = PromptPlaces::buffers(kColumns), kFloat = sizeof(float);
  static constexpr int kShareBytes = kPromptTokens * (kColumns + late_norm) * kFloat;
  static constexpr int kLowBytes = kPromptTokens * (2 * kColumns * int(sizeof(__half)) + int(sizeof(float2)));

  const Args& args;
  const Source& source;
  PromptPlaces at;
  int warps, rank;
  uint32_t warp, lane;
  int round = 0;

  __device__ __forceinline__ PromptExchange(const Args& a, const Source& s, uint8_t* memory)
      : args(a), source(s), warps(blockDim.x / 32), rank(cluster_rank()), warp(threadIdx.x / 32),
        lane(threadIdx.x % 32) {
    PromptPlaces::take(&at, memory, warps, a.spread, kColumns, a.hadamard, late_norm);
  }

  // Before all others' `cluster_wait`.
  __device__ __forceinline__ void open() const {
    for (int i = threadIdx.x; i < PromptPlaces::sent(kColumns); i += blockDim.x) {  // read, written by nobody
      if (i % kPromptSent >= args.spread) at.squares[i] = 0.0f;
      if (i % kPromptSent >= warps) at.found[i] = 0.0f;
    }
    if (threadIdx.x == 0) {
      box_open(at.boxes, kShareBytes);
      box_open(at.boxes + 1, kLowBytes);
      for (int i = 0; i < kBuffers; ++i) {
        box_open(at.boxes + 2 + i, square_bytes());
        box_open(at.boxes + 4 + i, 2 * square_bytes());
      }
    }
    __syncthreads();
  }

  __device__ __forceinline__ int square_bytes() const { return args.spread * kPromptTokens * kFloat; }
  __device__ __forceinline__ int buffer() const { return kBuffers == 1 ? 0 : round % 2; }

  // Until a box is full; then it is open for the next time.
  __device__ __forceinline__ void receive(uint64_t* box, int bytes, bool mine, int turn) const {
    box_wait(box, args.spread, turn % 2);
    if (mine && args.spread > 1) box_again(box, bytes);
  }
  __device__ __forceinline__ void receive_numbers(uint64_t* box, int bytes) const {
    receive(box + buffer(), bytes, threadIdx.x == 0, round / kBuffers);
  }

  // What the warps found of a token.
  __device__ __forceinline__ float* found(int which, int token) const {
    return at.found + ((buffer() * 3 + which) * kPromptTokens + token) * kPromptSent;
  }

  // A value of tokens g and g + 8, the same in the four threads that share them, for the block to combine.
  __device__ __forceinline__ void tell(int which, const float (&value)[2]) const {
    const int g = lane / 4;
    if (lane % 4 == 0) found(which, g)[warp] = value[0], found(which, g + 8)[warp] = value[1];
  }

  // The same of squares, which one of the four threads has.
  __device__ __forceinline__ void tell_squares(const float (&squares)[2]) const {
    const int g = lane / 4;
    if (lane % 4 == g / 2) found(0, g)[warp] = squares[0], found(0, g + 8)[warp] = squares[1];
  }

  // What the warps told of a token as one, to all blocks: a warp for each of them. `to` is the token's.
  template <class F>
  __device__ __forceinline__ void send(int which, int token, float* to, uint64_t* box, F combine) const {
    if (warp >= args.spread) return;
    const float value = together(found(which, token), warps, combine);
    for (int b = warp; b < args.spread; b += warps) box_send(to + rank, b, value, box, args.spread);
  }

  // `count` numbers of a token, of warps or blocks, as one, in their order. 0 must not matter.
  template <class F>
  __device__ __forceinline__ static float together(const float* from, int count, F combine) {
    float all = 0.0f;
#pragma unroll
    for (int i = 0; i < kPromptSent; i += 4) {
      if (i >= count) break;
      const float4 four = *reinterpret_cast<const float4*>(from + i);
      all = combine(combine(combine(combine(all, four.x), four.y), four.z), four.w);
    }
    return all;
  }

  // Squares of a token's features, of all blocks: lane i gets that of token i % 16. squares: of tokens g and g + 8.
  __device__ __forceinline__ float square(const float (&squares)[2]) const {
    tell(0, squares);
    __syncthreads();
    float* mine = at.squares + (buffer() * kPromptTokens + lane % 16) * kPromptSent;
    if (lane < kPromptTokens) send(0, lane, mine, at.boxes + 2 + buffer(), Sum());
    receive_numbers(at.boxes + 2, square_bytes());
    return together(mine, args.spread, Sum());
  }

  // Lowest and highest of a token's features, of all blocks, as `square`.
  __device__ __forceinline__ float2 range(const float (&lowest)[2], const float (&highest)[2]) const {
    const float below[2] = {-lowest[0], -lowest[1]};
    tell(1, below);
    tell(2, highest);
    __syncthreads();
    float* mine = at.ranges + (buffer() * 2 * kPromptTokens + lane) * kPromptSent;
    send(1 + lane / 16, lane % 16, mine, at.boxes + 4 + buffer(), Largest());
    receive_numbers(at.boxes + 4, 2 * square_bytes());
    const float one = together(mine, args.spread, Largest()), other = __shfl_xor_sync(~0u, one, 16);
    return lane < 16 ? make_float2(-one, other) : make_float2(-other, one);
  }

  // Where a warp's part of low lies, rows in other banks.
  __device__ __forceinline__ static uint32_t place(uint32_t row, uint32_t column) {
    return row * kColumns + (column ^ row % 4 * 8);
  }

  // The warp's part of 32 columns of low, the b-th (project).
  __device__ __forceinline__ void put(const float (&sum)[4][4], int b) const {
    const uint32_t g = lane / 4, t = lane % 4;
    float* to = at.sums + warp * kPromptTokens * kColumns;
#pragma unroll
    for (int i = 0; i < 8; ++i)
      *reinterpret_cast<float2*>(to + place(g + i % 2 * 8, b * kRankStep + i / 2 * 8 + 2 * t)) =
          make_float2(sum[i / 2][i % 2 * 2], sum[i / 2][i % 2 * 2 + 1]);
  }

  // low of all tokens, and its factors, from the warps' parts of it. A token is finished by one block.
  __device__ __forceinline__ void add_up(int token) const {
    __syncthreads();
    const int spread = args.spread, owned = kPromptTokens / spread, shift = __popc(owned - 1);  // a power of two
    if (late_norm && warp == warps - 1 && lane < kPromptTokens)
      box_send(at.squares + (lane & (owned - 1)) * kPromptSent + rank, lane >> shift,
               together(found(0, lane), warps, Sum()), at.boxes, spread);
    for (int i = threadIdx.x; i < kPromptTokens * kColumns / 4; i += warps * 32) {
      const int row = i / (kColumns / 4), column = i % (kColumns / 4) * 4;
      const float* from = at.sums + place(row, column);
      float4 all = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll 4
      for (int w = 0; w < warps; ++w) {
        const float4 more = *reinterpret_cast<const float4*>(from + w * kPromptTokens * kColumns);
        all = make_float4(all.x + more.x, all.y + more.y, all.z + more.z, all.w + more.w);
      }
      if constexpr (late_norm) {
        const float factor = *at.norm_factor;
        all = make_float4(all.x * factor, all.y * factor, all.z * factor, all.w * factor);
      }
      float* to = at.shares + ((row & (owned - 1)) * spread + rank) * kColumns + column;
      box_send(reinterpret_cast<float4*>(to), row >> shift, all, at.boxes, spread);
    }
    if (warp < owned || spread == 1) {
      receive(at.boxes, kShareBytes, threadIdx.x == 0, round);
      for (int i = warp; i < owned; i += warps) finish_low(i, rank * owned + i, token);
    }
    receive(at.boxes + 1, kLowBytes, threadIdx.x == 0, round);
  }

  // The i-th token that this block finishes, by a warp: low in two float16 numbers to all blocks and the second stage.
  __device__ __forceinline__ void finish_low(int i, int row, int token) const {
    const int spread = args.spread;
    float low[rank_blocks ? rank_blocks : 1], largest = 0.0f, factor, inverse;
    const float inverse_root =
        late_norm ? inverse_rms(together(at.squares + i * kPromptSent, spread, Sum()), args.n, source.epsilon) : 1.0f;
#pragma unroll
    for (int b = 0; b < rank_blocks; ++b) {
      const int column = 32 * b + lane;
      const float* from = at.shares + i * spread * kColumns + column;
      low[b] = 0.0f;
#pragma unroll 8
      for (int block = 0; block < spread; ++block) low[b] += from[block * kColumns];
      if (late_norm) low[b] *= inverse_root;
      if (column >= args.rank) low[b] = 0.0f;
      largest = max_nan(largest, fabsf(low[b]));
    }
    half_factor(over_warp(largest, Largest()), factor, inverse);
    const bool stores = token + row < args.tokens;
    __half *mine = at.finished + i * 2 * kColumns, *to = args.low + static_cast<int64_t>(token + row) * 2 * kColumns;
#pragma unroll
    for (int b = 0; b < rank_blocks; ++b) {
      __half parts[2];
      split_half(low[b] * inverse, parts[0], parts[1]);
#pragma unroll
      for (int part = 0; part < 2; ++part) {
        const int column = part * kColumns + 32 * b + lane;
        mine[column] = parts[part];
        if (stores) to[column] = parts[part];
      }
    }
    __syncwarp();
    constexpr int kPieces = kColumns ? kColumns / 4 : 1;  // of 8 halves, of both parts
    const int piece = lane % kPieces, part = piece / (kPieces / 2 + !rank_blocks);
    const float4 halves = *reinterpret_cast<const float4*>(mine + 8 * piece);
    __half* there = at.low + (part * kPromptTokens + row) * kStride + 8 * piece - part * kColumns;
    for (int block = lane / kPieces; block < spread; block += 32 / kPieces)
      box_send(reinterpret_cast<float4*>(there), block, halves, at.boxes + 1, spread);
    if (lane < spread) box_send(at.token + row, lane, make_float2(factor, inverse_root), at.boxes + 1, spread);
    if (lane == 0 && stores) args.low_factor[token + row] = factor;
  }
};

}  // namespace specquant_cuda
