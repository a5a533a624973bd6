// A call of few tokens: how threads share its weights, and read those of the next call ahead. It waits for memory, and a
// core reads only so fast, so none of them may ever stop reading.
#include <algorithm>
#include <atomic>
#include <thread>

#include "work.h"

namespace specquant {
namespace {

constexpr int kPolls = 10000;
constexpr int64_t kLeastBytes = 48 * 1024, kMostBytes = 192 * 1024;  // of weights that a thread takes at once
constexpr int64_t kAskedPanels = 4;  // between two looks at how far the thread has asked
constexpr int kMostShares = 64;      // threads beyond it help the others

// Of a panel's weights, and of its groups' scales, what is read.
int64_t panel_bytes(const Problem& p) { return round_up(p.in_features, kBlock) / kBlock * kPanel * 4; }
int64_t group_bytes(const Problem& p) { return groups_of(p) * kGroupBytes; }

// Panels of each of several threads: the caller's share, and the rest in equal parts. A pool whose threads have no numbers
// has two: of who prepares, and of all others.
struct Shares {
  int64_t panels;
  int count;
  double callers;

  Shares(const Problem& p, const ThreadPool& pool)
      : panels(panels_of(p)), count(pool.self ? std::clamp(pool.threads, 1, kMostShares) : 2), callers(pool.callers_share) {}

  int64_t start(int share) const {
    if (share == 0) return 0;
    const int64_t own = int64_t(double(panels) * callers);
    return own + (panels - own) * (share - 1) / (count - 1);
  }
  int64_t end(int share) const { return share == count - 1 ? panels : start(share + 1); }
};

// How far this thread has asked for the weights of calls to come.
struct Asked {
  static constexpr int kMost = 4;
  const uint8_t* weights[kMost] = {};
  int64_t panel[kMost] = {};
  int oldest = 0;

  int64_t& of(const uint8_t* wanted, int64_t start) {
    for (int i = 0; i < kMost; ++i)
      if (weights[i] == wanted) return panel[i];
    const int place = oldest;
    oldest = (oldest + 1) % kMost;
    weights[place] = wanted, panel[place] = start;
    return panel[place];
  }
  void forget(const uint8_t* wanted) {
    for (int i = 0; i < kMost; ++i)
      if (weights[i] == wanted) weights[i] = nullptr;
  }
};
thread_local Asked asked;

// What tells a call's weights from others'.
const uint8_t* weights_of(const Problem& p) { return p.qweight ? p.qweight : reinterpret_cast<const uint8_t*>(p.coef); }

// Asks for what panels [panel, end) need until stop(): then false. panel moves on.
template <class Stop>
bool ask(const Problem& p, int64_t& panel, int64_t end, const Stop& stop) {
  const auto lines = [&](const void* from, int64_t bytes) {
    for (int64_t i = 0; i < bytes; i += 64) {
      if (i % 512 == 0 && stop()) return false;
      __builtin_prefetch(static_cast<const char*>(from) + i, 0, 2);
    }
    return true;
  };
  while (panel < end) {
    const int64_t count = std::min(kAskedPanels, end - panel), column = panel * kPanel;
    const int64_t row = std::min(count * kPanel, p.out_features - column) * int64_t(sizeof(uint16_t));
    if (p.qweight && !lines(p.scales + column, row)) return false;
    if (p.qweight && !lines(p.group_scales + panel * group_bytes(p), count * group_bytes(p))) return false;
    for (int64_t k = 0; p.basis && k < p.rank; ++k)
      if (!lines(p.coef + k * p.out_features + column, row)) return false;
    if (p.qweight && !lines(p.qweight + panel * panel_bytes(p), count * panel_bytes(p))) return false;
    panel += count;
  }
  return true;
}

float largest_of_panel(const Problem& p, int64_t panel) {
  const float* const y = static_cast<const float*>(p.y) + panel * kPanel;
  const int64_t count = std::min(kPanel, p.out_features - panel * kPanel);
  return *std::max_element(y, y + count);
}

// One thread prepares, while the others bring their weights nearer; then all multiply. Whoever comes first prepares, so that
// nobody waits for a thread that has not come.
struct Together {
  const Work& work;
  const ThreadPool& pool;
  const Problem& problem;      // what is multiplied: the work's, or part of it
  const Activations& activations;
  float* largest;              // of y in each panel, or null
  const Shares shares{work.problem, pool};
  const int64_t most = std::max<int64_t>(kMostBytes / panel_bytes(work.problem), 1);
  const int64_t least = std::clamp<int64_t>(kLeastBytes / panel_bytes(work.problem), 1, most);
  std::atomic<bool> claimed{false}, prepared{false};
  std::atomic<uint64_t> left[kMostShares];  // of each share: its first panel << 32 | its end
  std::atomic<int64_t> arrived{0};

  Together(const Work& work_, const ThreadPool& pool_, const Problem& problem_, const Activations& activations_,
           float* largest_)
      : work(work_), pool(pool_), problem(problem_), activations(activations_), largest(largest_) {
    for (int i = 0; i < shares.count; ++i)
      left[i].store(uint64_t(shares.start(i)) << 32 | uint64_t(shares.end(i)), std::memory_order_relaxed);
  }

  // The next panels of a share, fewer as its end comes nearer, so that all threads end together; 0 if there are none. Whose
  // share it is takes from its start, others from its end.
  int64_t take(int share, bool own, int64_t& panel) {
    uint64_t ends = left[share].load(std::memory_order_relaxed);
    for (;;) {
      const int64_t first = int64_t(ends >> 32), end = int64_t(ends & 0xFFFFFFFF);
      if (first >= end) return 0;
      const int64_t count = std::min(std::clamp((end - first) / 2, least, most), end - first);
      panel = own ? first : end - count;
      const uint64_t rest = own ? uint64_t(first + count) << 32 | uint64_t(end) : uint64_t(first) << 32 | uint64_t(panel);
      if (left[share].compare_exchange_weak(ends, rest, std::memory_order_relaxed)) return count;
    }
  }

  void multiply(int own) {
    for (int i = 0; i < shares.count; ++i) {
      const int share = (own + i) % shares.count;
      for (int64_t panel, count; (count = take(share, i == 0, panel)) > 0;) {
        work.kernels.multiply(problem, activations, 0, work.rows, panel, count);
        for (int64_t j = panel; largest && j < panel + count; ++j) largest[j] = largest_of_panel(problem, j);
      }
    }
  }

  bool all_taken() const {
    for (int i = 0; i < shares.count; ++i) {
      const uint64_t ends = left[i].load(std::memory_order_relaxed);
      if (ends >> 32 < (ends & 0xFFFFFFFF)) return false;
    }
    return true;
  }

  // Until all is prepared.
  void read_ahead(int own) {
    const Problem& p = work.problem;
    const auto stop = [&] { return prepared.load(std::memory_order_relaxed); };
    if (!pool.self) {
      int64_t panel = shares.start(own) + arrived.fetch_add(1, std::memory_order_relaxed) * most;
      ask(p, panel, shares.end(own), stop);
      return;
    }
    const bool all = ask(p, asked.of(weights_of(p), shares.start(own)), shares.end(own), stop);
    asked.forget(weights_of(p));
    if (!all || !pool.next) return;
    const Shares next(*pool.next, pool);
    ask(*pool.next, asked.of(weights_of(*pool.next), next.start(own)), next.end(own), stop);
  }

  static void run(void* argument, size_t) {
    auto& together = *static_cast<Together*>(argument);
    const int number = together.pool.self ? together.pool.self() % together.shares.count : 0;
    if (!together.claimed.exchange(true)) {
      prepare_tile(together.work, 0);
      together.prepared.store(true, std::memory_order_release);
      return together.multiply(number);
    }
    if (together.all_taken()) return;
    const int own = together.pool.self ? number : 1;
    together.read_ahead(own);
    // Mostly some microseconds; longer where the thread that prepares has lost its core.
    for (int polls = 0; !together.prepared.load(std::memory_order_acquire); ++polls)
      if (polls > kPolls) std::this_thread::yield();
    together.multiply(own);
  }
};

}  // namespace

namespace {

void share_out(const ThreadPool& pool, void (*task)(void*, size_t), void* argument, int64_t count) {
  if (pool.run && count > 1) return pool.run(pool.context, task, argument, size_t(count));
  for (int64_t i = 0; i < count; ++i) task(argument, size_t(i));
}

void run(Together& together) {
  const ThreadPool& pool = together.pool;
  const int64_t threads = pool.self ? pool.threads : kMostShares;
  const int64_t tasks = (together.shares.panels + together.least - 1) / together.least;
  share_out(pool, Together::run, &together, pool.run ? std::min(tasks, threads) : 1);
}

// The second half of the features, for some panels.
struct Rest {
  const Work& work;
  const Problem& problem;
  const Activations& activations;
  const int64_t* panels;
  int64_t count;

  static constexpr int64_t kEach = 16;  // panels of a task
  static void run(void* argument, size_t index) {
    const Rest& rest = *static_cast<const Rest*>(argument);
    const int64_t first = int64_t(index) * kEach, end = std::min(first + kEach, rest.count);
    rest.ask(first, std::min(first + kAhead, end));
    for (int64_t i = first; i < end; ++i) {
      rest.ask(i + kAhead, std::min(i + kAhead + 1, end));
      rest.work.kernels.multiply(rest.problem, rest.activations, 0, 1, rest.panels[i], 1);
    }
  }

  // They lie too far apart for the hardware to see them coming.
  static constexpr int64_t kAhead = 2;
  void ask(int64_t from, int64_t to) const {
    for (; from < to; ++from) {
      const uint8_t* const weights = problem.qweight + panels[from] * activations.panel_bytes;
      for (int64_t i = 0; i < panel_bytes(problem); i += 64) __builtin_prefetch(weights + i, 0, 2);
      const uint8_t* const scales = problem.group_scales + panels[from] * activations.group_bytes;
      for (int64_t i = 0; i < group_bytes(problem); i += 64) __builtin_prefetch(scales + i, 0, 2);
    }
  }
};

}  // namespace

void multiply_few(const Work& work, const ThreadPool& pool) {
  const Problem& p = work.problem;
  const Activations& x = work.activations;
  if (!x.largest) {
    Together together(work, pool, p, x, nullptr);
    return run(together);
  }
  Problem half = p;
  Activations part = x;
  half.in_features /= 2;
  part.segments /= 2;
  {
    Together together(work, pool, half, part, x.largest);
    run(together);
  }
  const int64_t panels = panels_of(p);
  const float least = *std::max_element(x.largest, x.largest + panels) - p.within;
  int64_t count = 0;
  for (int64_t i = 0; i < panels; ++i)
    if (!(x.largest[i] < least)) x.wanted[count++] = i;
  part.begun = true;
  half.qweight += x.panel_bytes / 2;
  half.group_scales += x.group_bytes / 2;
  part.tiles += half.in_features;
  part.steps += part.segments;
  Rest rest{work, half, part, x.wanted, count};
  share_out(pool, Rest::run, &rest, (count + Rest::kEach - 1) / Rest::kEach);
}

bool read_ahead(const Problem& p, const ThreadPool& pool, int number, int64_t& bytes, bool (*stop)(const void*),
                const void* argument) {
  const Shares shares(p, pool);
  const int own = number % shares.count;
  const int64_t start = shares.start(own), end = std::min(shares.end(own), start + bytes / panel_bytes(p));
  bytes -= (end - start) * panel_bytes(p);
  return ask(p, asked.of(weights_of(p), start), end, [&] { return stop(argument); });
}

}  // namespace specquant
