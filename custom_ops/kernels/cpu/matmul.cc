// One op call: checks, the scratch, and how the work is cut into tasks. Needs no instruction set.
#include <algorithm>
#include <cstring>

#include "half.h"
#include "work.h"

namespace specquant {
namespace {

constexpr int64_t kMostFeatures = int64_t(1) << 19;  // the int32 sums stay exact up to here: see check()
constexpr int64_t kMostOutputs = int64_t(1) << 31;
constexpr int64_t kTaskBytes = 96 * 1024;        // of weights a task reads: they stay in cache from tile to tile
constexpr int64_t kChunkBytes = 1024 * 1024;     // of quantised activations at a time, so that they stay in cache
constexpr int64_t kChunkRows = 1024;
constexpr int64_t kAlign = 64;
constexpr int64_t kTurnedTokens = 16;   // from so many on the basis is turned
constexpr int64_t kTurnedColumns = 64;  // if it has at most so many: the scratch grows with them
constexpr int64_t kTurnedFeatures = 64;  // of a task

// Tokens that are prepared, then multiplied, together: bounds the scratch, whatever T is. All chunks are about alike.
int64_t chunk_rows(const Problem& p) {
  const int64_t most = std::clamp<int64_t>(kChunkBytes / p.in_features, 32, kChunkRows);
  const int64_t chunks = std::max<int64_t>((p.tokens + most - 1) / most, 1);
  return std::min(round_up((p.tokens + chunks - 1) / chunks, kTileTokens), p.tokens);
}

struct Arena {
  char* next;
  template <class T>
  T* take(int64_t count) {
    char* at = next;
    next += round_up(count * int64_t(sizeof(T)), kAlign);
    return reinterpret_cast<T*>(at);
  }
};

// Lays the activations out from `base`; the end of the arena is what they need.
Activations lay_out(const Problem& p, char* base, char** end) {
  const int64_t rows = chunk_rows(p);
  Activations x{};
  x.features = round_up(p.in_features, 64) + 64;
  x.columns = round_up(p.basis ? p.rank : 0, kPanel);
  x.panel_bytes = round_up(p.in_features, kBlock) / kBlock * kPanel * 4;
  x.group_bytes = p.qweight ? groups_of(p) * kGroupBytes : 0;
  x.segments = p.qweight ? p.in_features / segment_length(p) : 0;
  Arena arena{base};
  if (p.basis && p.subtract && rows >= kTurnedTokens && x.columns <= kTurnedColumns)
    x.turned = arena.take<float>(x.columns * x.features);
  x.u = arena.take<float>(rows * x.features);
  x.low = arena.take<float>(rows * x.columns);
  x.a = arena.take<int8_t>(rows * x.features);
  x.scale = arena.take<float>(rows * x.segments);
  x.start = arena.take<int32_t>(rows * x.segments);
  const int64_t whole_tiles = rows < kWidestTile ? rows : round_up(rows, kWidestTile);
  x.tiles = arena.take<int8_t>(whole_tiles * x.features);
  x.steps = arena.take<Step>(whole_tiles * x.segments);
  if (p.within > 0.0f && p.tokens == 1) {
    x.largest = arena.take<float>(panels_of(p));
    x.wanted = arena.take<int64_t>(panels_of(p));
    x.kept = arena.take<float>(panels_of(p) * kPanel);
  }
  *end = arena.next;
  return x;
}

void turn_task(void* argument, size_t index) {
  const Work& work = *static_cast<const Work*>(argument);
  const int64_t from = int64_t(index) * kTurnedFeatures, all = round_up(work.problem.in_features, kTurnedFeatures);
  work.kernels.turn(work.problem, work.activations, from, std::min(from + kTurnedFeatures, all));
}

void prepare_task(void* argument, size_t index) { prepare_tile(*static_cast<const Work*>(argument), int64_t(index)); }

void multiply_task(void* argument, size_t index) {
  const Work& work = *static_cast<const Work*>(argument);
  const int64_t row = int64_t(index) % work.tiles_down * work.tile_rows;
  const int64_t panel = int64_t(index) / work.tiles_down * work.tile_panels;
  work.kernels.multiply(work.problem, work.activations, row, std::min(work.tile_rows, work.rows - row), panel,
                        std::min(work.tile_panels, panels_of(work.problem) - panel));
}

void run(const ThreadPool& pool, void (*task)(void*, size_t), Work& work, int64_t count) {
  if (pool.run && count > 1) {
    pool.run(pool.context, task, &work, size_t(count));
  } else {
    for (int64_t i = 0; i < count; ++i) task(&work, size_t(i));
  }
}

// The grid: panels as cache holds them, in an even number of tasks; rows by their products.
void cut(Work& work) {
  const int64_t panels = panels_of(work.problem), blocks = round_up(work.problem.in_features, kBlock) / kBlock;
  const int64_t least = work.rows < kTileTokens ? 4 : 2, fitting = std::max(kTaskBytes / (kPanel * 4 * blocks), least);
  int64_t across = (panels + fitting - 1) / fitting;
  if (across > 1) across = round_up(across, 2);
  work.tile_panels = round_up((panels + across - 1) / across, least);
  const int64_t products = kPanel * kBlock * blocks * work.tile_panels;  // of a token
  const int64_t rows = work.kernels.task_products / products / kWidestTile * kWidestTile;
  work.tile_rows = std::max(std::min(work.rows, 4 * kTileTokens), rows);
  work.tiles_down = (work.rows + work.tile_rows - 1) / work.tile_rows;
}

void store_low(const Problem& p, const Activations& x, int64_t rows) {
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t j = 0; j < p.basis_rank; ++j) {
      const float value = j < p.rank ? x.low[row * x.columns + j] : 0.0f;
      const int64_t at = (x.first_token + row) * p.basis_rank + j;
      if (p.half) {
        static_cast<uint16_t*>(p.low)[at] = float_to_half(value);
      } else {
        static_cast<float*>(p.low)[at] = value;
      }
    }
}

}  // namespace

void interleave(const Problem& p, const Activations& x, int64_t row, int64_t rows) {
  const int64_t blocks = round_up(p.in_features, kBlock) / kBlock;
  for (int64_t t = 0; t < rows; ++t) {
    const int8_t* a = x.a + (row + t) * x.features;
    int8_t* to = x.tiles + row * x.features + t * kBlock;
    for (int64_t k = 0; k < blocks; ++k) std::memcpy(to + k * rows * kBlock, a + k * kBlock, kBlock);
    for (int64_t s = 0; s < x.segments; ++s) {
      const int64_t at = (row + t) * x.segments + s;
      x.steps[s * x.rows + row + t] = {x.scale[at], x.start[at]};
    }
  }
}

int64_t segment_length(const Problem& p) {
  if (p.group_size && p.act_group) return std::min(p.group_size, p.act_group);
  return p.group_size ? p.group_size : p.act_group ? p.act_group : p.in_features;
}

const char* check(const Problem& p) {
  // Σ w·a and 8 Σ a are at most 15·127·N and 8·127·N: 2921 · 2^19 < 2^31.
  if (p.in_features < 1 || p.in_features > kMostFeatures) return "in-features must be 1 to 524288";
  if (p.out_features < 1 || p.out_features > kMostOutputs) return "out-features must be 1 to 2^31";
  if (p.tokens < 0 || p.tokens > kMostOutputs) return "the number of tokens must be 0 to 2^31";
  if (!p.basis && !p.qweight) return "there are neither weights nor a branch";
  if (p.tokens && !p.x) return "x is missing";
  const bool power = p.hadamard >= kBlock && p.hadamard <= 4096 && (p.hadamard & (p.hadamard - 1)) == 0;
  if (p.hadamard && (!power || p.in_features % p.hadamard))
    return "hadamard must be 0, or a power of two from 8 to 4096 that divides in-features";
  if (p.prologue < kNoPrologue || p.prologue > kRmsNorm) return "prologue must be 0 or 1";
  if (p.gate < kNoGate || p.gate > kGeluGate) return "gate must be 0 to 2";
  if (p.gate && p.out_features % 2) return "with a gate, out-features must be even";
  if (p.gate && p.residual) return "with a gate there is no residual";
  if (p.prologue == kRmsNorm && !p.norm) return "norm is missing";
  if (p.prologue == kRmsNorm && !(p.epsilon >= 0.0f)) return "epsilon must be at least 0";
  if (p.basis) {
    if (!p.coef) return "coef is missing";
    if (p.basis_rank < 0 || p.basis_rank > p.in_features) return "the basis must have 0 to in-features columns";
    if (p.rank < 0 || p.rank > p.basis_rank) return "rank must be 0 to the columns of the basis";
  }
  if (p.qweight) {
    if (!p.group_scales) return "group_scales are missing";
    if (!p.scales) return "scales are missing";
    if (!(p.act_clip > 0.0f && p.act_clip <= 1.0f)) return "act_clip must be more than 0, and at most 1";
    if (p.act_bits != 16 && (p.act_bits < 2 || p.act_bits > 8)) return "act_bits must be 2 to 8, or 16";
    for (const int64_t group : {p.group_size, p.act_group})
      if (group < 0 || group % kBlock || (group && p.in_features % group))
        return "group_size and act_group must be 0, or a divisor of in-features that 8 divides";
    const auto [small, large] = std::minmax(p.group_size, p.act_group);
    if (small && large % small) return "one of group_size and act_group must divide the other";
  }
  if (p.within != 0.0f) {
    if (!(p.within > 0.0f)) return "within must be 0 or more";
    const bool halves = p.qweight && p.group_size && p.in_features / p.group_size % 2 == 0 && p.act_bits < 16 &&
                        (!p.act_group || p.in_features / p.act_group % 2 == 0);
    if (p.basis || p.residual || p.gate || p.half || !halves)
      return "within needs two halves of whole groups, quantised activations, float32, no branch, gate or residual";
  }
  return nullptr;
}

size_t scratch_bytes(const Problem& p) {
  char* end;
  lay_out(p, nullptr, &end);
  return size_t(end - static_cast<char*>(nullptr)) + kAlign;
}

void matmul(const Kernels& kernels, const Problem& p, const ThreadPool& pool, void* scratch) {
  if (p.tokens == 0) return;
  char *end, *base = reinterpret_cast<char*>(round_up(int64_t(reinterpret_cast<intptr_t>(scratch)), kAlign));
  Activations x = lay_out(p, base, &end);
  const int64_t chunk = chunk_rows(p);
  for (x.first_token = 0; x.first_token < p.tokens; x.first_token += chunk) {
    const int64_t rows = x.rows = std::min(chunk, p.tokens - x.first_token);
    Work work{kernels, p, x, rows, rows, 0, 0};
    cut(work);
    if (x.turned && !x.first_token)
      run(pool, turn_task, work, (p.in_features + kTurnedFeatures - 1) / kTurnedFeatures);
    const int64_t tasks = work.tiles_down * ((panels_of(p) + work.tile_panels - 1) / work.tile_panels);
    if (x.largest || (pool.run && rows <= kTileTokens && tasks > 1)) {
      multiply_few(work, pool);
    } else {
      run(pool, prepare_task, work, (rows + kTileTokens - 1) / kTileTokens);
      run(pool, multiply_task, work, tasks);
    }
    if (p.low) store_low(p, x, rows);
  }
}

}  // namespace specquant
