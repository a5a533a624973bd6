// One call of Int4KVAttention or HalfKVAttention: checks, the scratch, and how the work is cut into tasks. Needs no instruction set.
#include "attention.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "half.h"
#include "steps.h"

namespace specquant {
namespace {

constexpr int64_t kMostSize = int64_t(1) << 31;
constexpr int64_t kAppendTokens = 32;  // tokens of a kv head that a task packs
constexpr int64_t kPartTokens = 1024;  // of a part, where one new token alone would be too few tasks
constexpr int64_t kHalfPartTokens = 512;
constexpr int64_t kManyTiles = 32;     // enough for the threads
constexpr int64_t kSmallWork = 1024;   // scores below which a thread pool costs more than it brings

int64_t after(const Attention& a, int64_t b) { return int64_t(a.seqlens_k[b]) + 1; }
int64_t before(const Attention& a, int64_t b) { return std::max<int64_t>(0, after(a, b) - a.sequence); }

int64_t longest(const Attention& a) {
  int64_t most = 0;
  for (int64_t b = 0; b < a.batch; ++b) most = std::max(most, after(a, b));
  return most;
}

int64_t part_tokens(const Attention& a) { return a.kv_bits == 16 ? kHalfPartTokens : kPartTokens; }

int64_t parts_of(const Attention& a) {
  return a.sequence == 1 ? std::max<int64_t>(1, (longest(a) + part_tokens(a) - 1) / part_tokens(a)) : 1;
}

// Rows of a tile. A block of a 16-bit cache is converted once for all rows of a tile, so they should be many, but
// not so many that there are too few tiles for the threads. Not a matter of how many these are: same bits for all.
int64_t tile_rows_of(const Kernels& kernels, const Attention& a, int64_t heads, int64_t rows) {
  if (a.kv_bits != 16) return kernels.tile_rows;
  const int64_t fit = std::min(kMostHalfRows, kMostTileFloats / a.head_dim) / kHalfRowsMultiple * kHalfRowsMultiple;
  return std::min(fit, round_up(heads * rows / kManyTiles + 1, kHalfRowsMultiple));
}

struct Work {
  const Kernels& kernels;
  const Attention& attention;
  int64_t append_tasks;     // of a kv head
  int64_t tile_rows;        // of a tile, at most
  int64_t tiles, parts;     // of a kv head
  float* partials;          // [B, H, parts, head_dim + 2]: y, largest, sum; only if parts > 1
};

void append_task(void* argument, size_t index) {
  const Work& work = *static_cast<const Work*>(argument);
  const Attention& a = work.attention;
  const int64_t token = int64_t(index) % work.append_tasks * kAppendTokens, head = int64_t(index) / work.append_tasks;
  const int64_t b = head / a.kv_num_heads, added = after(a, b) - before(a, b);
  if (token == 0 || token < added)
    work.kernels.append(a, b, head % a.kv_num_heads, token, std::min(token + kAppendTokens, added));
}

// y of a head, from `at` on.
void store(const Attention& a, int64_t at, const float* values, float factor) {
  if (a.half) {
    for (int64_t i = 0; i < a.head_dim; ++i) static_cast<uint16_t*>(a.y)[at + i] = float_to_half(values[i] * factor);
  } else {
    float* const to = static_cast<float*>(a.y) + at;
    for (int64_t i = 0; i < a.head_dim; ++i) to[i] = values[i] * factor;
  }
}

// Where y of a row of a tile (steps.h) begins.
int64_t output_of(const Attention& a, int64_t b, int64_t kv_head, int64_t row) {
  const int64_t group = a.num_heads / a.kv_num_heads;
  return ((b * a.sequence + row / group) * a.num_heads + kv_head * group + row % group) * a.head_dim;
}

void attend_task(void* argument, size_t index) {
  const Work& work = *static_cast<const Work*>(argument);
  const Attention& a = work.attention;
  const int64_t part = int64_t(index) % work.parts, tile_index = int64_t(index) / work.parts % work.tiles;
  const int64_t head = int64_t(index) / work.parts / work.tiles, group = a.num_heads / a.kv_num_heads;
  QueryTile tile{head / a.kv_num_heads, head % a.kv_num_heads, tile_index * work.tile_rows, 0, 0, 0};
  const int64_t past = before(a, tile.batch), rows = (after(a, tile.batch) - past) * group;
  tile.rows = std::min(work.tile_rows, rows - tile.row);
  if (tile.rows <= 0) return;
  tile.end = past + (tile.row + tile.rows - 1) / group + 1;
  if (a.window > 0) tile.first = std::max<int64_t>(0, past + tile.row / group + 1 - a.window);
  if (work.parts > 1) {
    tile.first += part * part_tokens(a);
    tile.end = std::min(tile.end, tile.first + part_tokens(a));
  }
  float largest[kMostHalfRows], sum[kMostHalfRows];
  alignas(64) float y[kMostTileFloats];
  (a.kv_bits == 16 ? work.kernels.attend_half : work.kernels.attend)(a, tile, Partial{largest, sum, y});
  for (int64_t r = 0; r < tile.rows; ++r) {
    const int64_t at = output_of(a, tile.batch, tile.kv_head, tile.row + r);
    if (work.parts > 1) {
      float* const to = work.partials + (at / a.head_dim * work.parts + part) * (a.head_dim + 2);
      std::memcpy(to, y + r * a.head_dim, size_t(a.head_dim) * sizeof(float));
      to[a.head_dim] = largest[r];
      to[a.head_dim + 1] = sum[r];
    } else {
      store(a, at, y + r * a.head_dim, 1.0f / sum[r]);
    }
  }
}

// y = Σ_parts e^(largest_p − largest) y_p / Σ_parts e^(largest_p − largest) sum_p, for every head of every row.
void merge(const Work& work) {
  const Attention& a = work.attention;
  const int64_t width = a.head_dim + 2;
  for (int64_t head = 0; head < a.batch * a.num_heads; ++head) {
    if (after(a, head / a.num_heads) == 0) continue;
    const float* const parts = work.partials + head * work.parts * width;
    float largest = parts[a.head_dim], sum = 0.0f, y[kMostHeadDim] = {};
    for (int64_t p = 1; p < work.parts; ++p) largest = std::max(largest, parts[p * width + a.head_dim]);
    for (int64_t p = 0; p < work.parts; ++p) {
      const float* const from = parts + p * width;
      const float share = std::exp(from[a.head_dim] - largest);
      sum += share * from[a.head_dim + 1];
      for (int64_t i = 0; i < a.head_dim; ++i) y[i] += share * from[i];
    }
    store(a, head * a.head_dim, y, 1.0f / sum);
  }
}

void clear_padding(const Attention& a) {
  const size_t size = size_t(a.num_heads * a.head_dim) * (a.half ? sizeof(uint16_t) : sizeof(float));
  for (int64_t b = 0; b < a.batch; ++b) {
    const int64_t added = after(a, b) - before(a, b);
    std::memset(static_cast<char*>(a.y) + size_t(b * a.sequence + added) * size, 0, size_t(a.sequence - added) * size);
  }
}

void run(const ThreadPool& pool, bool alone, void (*task)(void*, size_t), Work& work, int64_t count) {
  if (pool.run && !alone && count > 1) {
    pool.run(pool.context, task, &work, size_t(count));
  } else {
    for (int64_t i = 0; i < count; ++i) task(&work, size_t(i));
  }
}

}  // namespace

const char* check(const Attention& a) {
  if (a.head_dim < 1 || a.head_dim > kMostHeadDim || a.head_dim % kHeadDimMultiple)
    return "head_dim must be a multiple of 16, at most 256";
  if (a.num_heads < 1 || a.kv_num_heads < 1 || a.num_heads > kMostSize || a.num_heads % a.kv_num_heads)
    return "kv_num_heads must divide num_heads";
  for (const int64_t size : {a.batch, a.sequence, a.past_rows, a.present_rows, a.context, a.rotary})
    if (size < 0 || size > kMostSize) return "sizes must be 0 to 2^31";
  if (a.present_rows < a.past_rows) return "the cache cannot shrink";
  if (a.present_rows > a.past_rows + a.sequence) return "total_sequence_length exceeds the cache and the new tokens";
  if (2 * a.rotary > a.head_dim) return "cos and sin have more than head_dim / 2 columns";
  if (a.kv_bits != 4 && a.kv_bits != 16) return "the cache must be of 4 or 16 bits";
  if (a.kv_bits == 16 && a.hadamard) return "a 16-bit cache knows no hadamard";
  if (!(a.clip > 0.0f && a.clip <= 1.0f)) return "clip must be more than 0, and at most 1";
  if (a.hadamard && (a.head_dim & (a.head_dim - 1))) return "hadamard needs a head_dim that is a power of two";
  if (!a.qkv || !a.past_key || !a.past_value || !a.seqlens_k || !a.position_ids || !a.cos || !a.sin ||
      (a.kv_bits == 4 && !a.key_offset))
    return "an input is missing";
  for (int64_t b = 0; b < a.batch; ++b) {
    if (a.seqlens_k[b] < -1 || after(a, b) > a.present_rows || before(a, b) > a.past_rows)
      return "seqlens_k does not fit the cache";
    for (int64_t t = 0; t < after(a, b) - before(a, b); ++t) {
      const int64_t position = a.position_ids[b * a.sequence + t];
      if (position < 0 || position >= a.context) return "position_ids are not in the rotary tables: context too long";
    }
  }
  return nullptr;
}

size_t scratch_bytes(const Attention& a) {
  const int64_t parts = parts_of(a);
  return parts > 1 ? size_t(a.batch * a.num_heads * parts * (a.head_dim + 2)) * sizeof(float) + alignof(float) : 0;
}

void attend(const Kernels& kernels, const Attention& a, const ThreadPool& pool, void* scratch) {
  const int64_t heads = a.batch * a.kv_num_heads, rows = a.sequence * (a.num_heads / a.kv_num_heads);
  const int64_t aligned = round_up(int64_t(reinterpret_cast<intptr_t>(scratch)), int64_t(alignof(float)));
  const int64_t tile_rows = tile_rows_of(kernels, a, heads, rows);
  Work work{kernels, a, std::max<int64_t>(1, (a.sequence + kAppendTokens - 1) / kAppendTokens), tile_rows,
            (rows + tile_rows - 1) / tile_rows, parts_of(a), reinterpret_cast<float*>(aligned)};
  run(pool, a.sequence * heads < kAppendTokens, append_task, work, heads * work.append_tasks);
  run(pool, a.batch * a.num_heads * a.sequence * longest(a) < kSmallWork, attend_task, work,
      heads * work.tiles * work.parts);
  if (work.parts > 1) merge(work);
  clear_padding(a);
}

}  // namespace specquant
