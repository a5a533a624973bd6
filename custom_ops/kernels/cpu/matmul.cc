// One op call: checks, the scratch, and how the work is cut into tasks. Needs no instruction set.
#include <algorithm>
#include <atomic>
#include <cstring>
#include <thread>

#include "half.h"
#include "steps.h"

namespace specquant {
namespace {

constexpr int64_t kMostFeatures = int64_t(1) << 19;  // the int32 sums stay exact up to here: see check()
constexpr int64_t kMostOutputs = int64_t(1) << 31;
constexpr int64_t kTaskBytes = 96 * 1024;        // of weights a task reads: they stay in cache from tile to tile
constexpr int64_t kChunkBytes = 1024 * 1024;     // of quantised activations at a time, so that they stay in cache
constexpr int64_t kChunkRows = 1024;
constexpr int64_t kAlign = 64;
constexpr int kPolls = 10000;
constexpr int64_t kLeastBytes = 48 * 1024, kMostBytes = 192 * 1024;  // of weights that a thread of Together takes at once
constexpr int64_t kMostThreads = 64;
constexpr int64_t kTurnedTokens = 16;   // from so many on the basis is turned
constexpr int64_t kTurnedColumns = 64;  // if it has at most so many: the scratch grows with them
constexpr int64_t kTurnedFeatures = 64;  // of a task

int64_t panels_of(const Problem& p) { return (p.out_features + kPanel - 1) / kPanel; }

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
  *end = arena.next;
  return x;
}

// One chunk, as its tasks see it.
struct Work {
  const Kernels& kernels;
  const Problem& problem;
  const Activations& activations;
  int64_t rows;
  int64_t tile_rows, tile_panels, tiles_down;  // the grid of the multiplication
};

void turn_task(void* argument, size_t index) {
  const Work& work = *static_cast<const Work*>(argument);
  const int64_t from = int64_t(index) * kTurnedFeatures, all = round_up(work.problem.in_features, kTurnedFeatures);
  work.kernels.turn(work.problem, work.activations, from, std::min(from + kTurnedFeatures, all));
}

void prepare_task(void* argument, size_t index) {
  const Work& work = *static_cast<const Work*>(argument);
  const int64_t row = int64_t(index) * kTileTokens, rows = std::min(kTileTokens, work.rows - row);
  work.kernels.prepare(work.problem, work.activations, row, rows);
  if (work.problem.qweight && work.problem.act_bits < 16)
    work.kernels.arrange(work.problem, work.activations, row, rows);
}

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

// Few tokens: one thread prepares, while the others bring their weights nearer; then all multiply. Whoever comes first
// prepares, so that nobody waits for a thread that has not come.
struct Together {
  Work& work;
  const int64_t panels = panels_of(work.problem);
  const int64_t panel_bytes = round_up(work.problem.in_features, kBlock) / kBlock * kPanel * 4;
  const int64_t least = std::max<int64_t>(kLeastBytes / panel_bytes, 1), most = std::max(kMostBytes / panel_bytes, least);
  std::atomic<bool> claimed{false}, prepared{false};
  // Panels of the one who prepared, from the first on, and of the others, from the middle on: each reads a stream, and
  // helps with the other half when its own is done.
  const int64_t ends[2] = {panels / 2, panels};
  std::atomic<int64_t> next[2] = {0, panels / 2};
  std::atomic<int64_t> arrived{0};

  // The next panels of a half, fewer as its end comes nearer, so that all threads end together; 0 if there are none.
  int64_t take(int half, int64_t& panel) {
    panel = next[half].load(std::memory_order_relaxed);
    for (;;) {
      const int64_t left = ends[half] - panel;
      if (left <= 0) return 0;
      const int64_t count = std::min(std::clamp(left / 2, least, most), left);
      if (next[half].compare_exchange_weak(panel, panel + count, std::memory_order_relaxed)) return count;
    }
  }

  void multiply(int half) {
    for (const int h : {half, 1 - half})
      for (int64_t panel, count; (count = take(h, panel)) > 0;)
        work.kernels.multiply(work.problem, work.activations, 0, work.rows, panel, count);
  }

  bool all_taken() const {
    return next[0].load(std::memory_order_relaxed) >= ends[0] && next[1].load(std::memory_order_relaxed) >= ends[1];
  }

  // Asks for lines of memory until all is prepared: false.
  bool fetch(const void* from, int64_t bytes) const {
    for (int64_t i = 0; i < bytes; i += 64) {
      if (i % 512 == 0 && prepared.load(std::memory_order_relaxed)) return false;
      __builtin_prefetch(static_cast<const char*>(from) + i, 0, 2);
    }
    return true;
  }

  // What the panels from `panel` on need, in the order of `multiply`.
  void fetch_panels(int64_t panel) const {
    const Problem& p = work.problem;
    const int64_t groups = p.group_size ? p.in_features / p.group_size : 1;
    for (; panel < panels; panel += most) {
      const int64_t count = std::min(most, panels - panel), column = panel * kPanel;
      const int64_t row = std::min(count * kPanel, p.out_features - column) * int64_t(sizeof(uint16_t));
      for (int64_t g = 0; p.qweight && g < groups; ++g)
        if (!fetch(p.scales + g * p.out_features + column, row)) return;
      for (int64_t k = 0; p.basis && k < p.rank; ++k)
        if (!fetch(p.coef + k * p.out_features + column, row)) return;
      if (p.qweight && !fetch(p.qweight + panel * panel_bytes, count * panel_bytes)) return;
    }
  }

  static void run(void* argument, size_t) {
    auto& together = *static_cast<Together*>(argument);
    if (!together.claimed.exchange(true)) {
      prepare_task(&together.work, 0);
      together.prepared.store(true, std::memory_order_release);
      return together.multiply(0);
    }
    if (together.all_taken()) return;
    const int64_t before = together.arrived.fetch_add(1, std::memory_order_relaxed);  // other threads fetch, too
    together.fetch_panels(together.ends[0] + before * together.most);
    // Mostly some microseconds; longer where the thread that prepares has lost its core.
    for (int polls = 0; !together.prepared.load(std::memory_order_acquire); ++polls)
      if (polls > kPolls) std::this_thread::yield();
    together.multiply(1);
  }
};

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
  if (p.prologue < kNoPrologue || p.prologue > kGeluGate) return "prologue must be 0 to 3";
  if (p.prologue == kRmsNorm && !p.norm) return "norm is missing";
  if (p.prologue == kRmsNorm && !(p.epsilon >= 0.0f)) return "epsilon must be at least 0";
  if (p.basis) {
    if (!p.coef) return "coef is missing";
    if (p.basis_rank < 0 || p.basis_rank > p.in_features) return "the basis must have 0 to in-features columns";
    if (p.rank < 0 || p.rank > p.basis_rank) return "rank must be 0 to the columns of the basis";
  }
  if (p.qweight) {
    if (!p.scales || !p.row_sums) return "scales or row_sums are missing";
    if (!(p.act_clip > 0.0f && p.act_clip <= 1.0f)) return "act_clip must be more than 0, and at most 1";
    if (p.act_bits != 16 && (p.act_bits < 2 || p.act_bits > 8)) return "act_bits must be 2 to 8, or 16";
    for (const int64_t group : {p.group_size, p.act_group})
      if (group < 0 || group % kBlock || (group && p.in_features % group))
        return "group_size and act_group must be 0, or a divisor of in-features that 8 divides";
    const auto [small, large] = std::minmax(p.group_size, p.act_group);
    if (small && large % small) return "one of group_size and act_group must divide the other";
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
    if (pool.run && rows <= kTileTokens && tasks > 1) {
      Together together{work};
      pool.run(pool.context, Together::run, &together, size_t(std::min(tasks, kMostThreads)));
    } else {
      run(pool, prepare_task, work, (rows + kTileTokens - 1) / kTileTokens);
      run(pool, multiply_task, work, tasks);
    }
    if (p.low) store_low(p, x, rows);
  }
}

}  // namespace specquant
