// A stress of the session's threads, for ThreadSanitizer: calls of few tokens by kernels that only count, other tasks between
// them, reading ahead, pauses in which the workers fall asleep, and a second caller.
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <thread>
#include <vector>

#include "work.h"
#include "workers.h"

using namespace specquant;

namespace {

constexpr int64_t kFeatures = 64, kOutputs = 16 * 500;
std::vector<int> multiplied(kOutputs / kPanel);  // by whoever owns a panel: two at once would be a race
int prepared = 0;
std::atomic<int> failures{0};

void expect(bool right, const char* what) {
  if (!right && failures++ < 5) std::fprintf(stderr, "%s\n", what);
}

void prepare(const Problem&, const Activations&, int64_t, int64_t) { ++prepared; }
void arrange(const Problem&, const Activations&, int64_t, int64_t) {}
void multiply(const Problem&, const Activations&, int64_t, int64_t, int64_t panel, int64_t panels) {
  expect(prepared > 0, "multiplied before it was prepared");
  for (int64_t i = panel; i < panel + panels; ++i) ++multiplied[i];
}

void count(void* counts, size_t index) { ++static_cast<std::vector<int>*>(counts)->at(index); }

void read(const void* problem, int worker, const Workers& workers) {
  int64_t bytes = 1 << 20;
  const auto stop = [](const void* w) { return static_cast<const Workers*>(w)->wanted(); };
  read_ahead(*static_cast<const Problem*>(problem), workers.layout(), worker, bytes, stop, &workers);
}

}  // namespace

int main() {
  std::vector<uint8_t> weights(kOutputs * kFeatures / 2), groups(kOutputs / kPanel * kGroupBytes);
  std::vector<uint16_t> scales(kOutputs);
  Problem p{};
  p.tokens = 1, p.in_features = kFeatures, p.out_features = kOutputs, p.group_size = 64, p.act_bits = 8;
  p.qweight = weights.data(), p.group_scales = groups.data(), p.scales = scales.data();
  Activations x{};
  Kernels kernels{};
  kernels.prepare = prepare, kernels.arrange = arrange, kernels.multiply = multiply;
  const Work work{kernels, p, x, 1, 1, 0, 0};
  for (const int threads : {1, 2, 3, 5}) {
    Workers workers(threads);
    ThreadPool pool = workers.pool();
    pool.next = &p;
    std::atomic<bool> over{false};
    std::thread second([&] {
      for (int i = 0; !over; ++i) {
        std::vector<int> counts(1 + i % 90);
        pool.run(pool.context, count, &counts, counts.size());
        for (const int n : counts) expect(n == 1, "a second caller's task ran twice, or never");
      }
    });
    for (int i = 0; i < 1500; ++i) {
      prepared = 0;
      multiplied.assign(multiplied.size(), 0);
      multiply_few(work, pool);
      for (const int n : multiplied) expect(n == 1, "a panel was multiplied twice, or never");
      workers.meanwhile(read, &p);
      std::vector<int> counts(i % 7 ? i % 300 : 70000);
      pool.run(pool.context, count, &counts, counts.size());
      for (const int n : counts) expect(n == 1, "a task ran twice, or never");
      if (i % 400 == 0) std::this_thread::sleep_for(std::chrono::milliseconds(4));
    }
    over = true;
    second.join();
  }
  return failures ? 1 : 0;
}
