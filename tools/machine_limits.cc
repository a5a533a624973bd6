// What this machine can do at most: byte products (vpdpbusd) and reads from memory, on THREADS threads at once.
// c++ -O3 -march=native -pthread tools/machine_limits.cc -o limits && ./limits THREADS
// prints {"gops": 10^9 operations a second, null without VNNI, "gbps": 10^9 bytes a second}. Best of many short runs.
#include <immintrin.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <thread>
#include <vector>

namespace {

constexpr int kRuns = 60, kSums = 12, kSteps = 100000;
constexpr size_t kBytes = size_t(192) << 20;  // a thread's; several times any cache

#if defined(__AVX512VNNI__)
typedef int32_t Vector __attribute__((vector_size(64)));
#else
typedef int32_t Vector __attribute__((vector_size(32)));
#endif

#if defined(__AVX512VNNI__) || defined(__AVXVNNI__)
#define HAS_PRODUCT 1
#if defined(__AVX512VNNI__)
#define DOT "vpdpbusd %1, %1, %0"
#else
#define DOT "%{vex%} vpdpbusd %1, %1, %0"
#endif
void multiply() {
  Vector sums[kSums] = {}, factor{};
  for (int i = 0; i < kSteps; ++i)
#pragma GCC unroll 12
    for (int j = 0; j < kSums; ++j) __asm__ volatile(DOT : "+x"(sums[j]) : "x"(factor));
}
#else
#define HAS_PRODUCT 0
void multiply() {}
#endif

// One stream, or four side by side: which is faster depends on the machine.
template <int Streams>
void read(const Vector* from) {
  constexpr size_t length = kBytes / sizeof(Vector) / Streams, line = 4 / Streams;
  Vector sums[4] = {};
  for (size_t i = 0; i < length; i += line)
#pragma GCC unroll 4
    for (size_t j = 0; j < 4; ++j) sums[j] ^= from[j / line * length + i + j % line];
  Vector all = sums[0] ^ sums[1] ^ sums[2] ^ sums[3];
  __asm__ volatile("" : : "x"(all));
}

// Seconds that `work(thread)` takes on all threads together, at best.
template <class Work>
double best(int threads, int runs, Work work) {
  double least = 1e30;
  for (int run = 0; run < runs; ++run) {
    std::atomic<int> waiting{threads};
    std::vector<std::thread> pool;
    std::vector<double> seconds(static_cast<size_t>(threads));
    for (int t = 0; t < threads; ++t)
      pool.emplace_back([&, t] {
        for (--waiting; waiting > 0;) {
        }
        const auto since = std::chrono::steady_clock::now();
        work(t);
        seconds[size_t(t)] = std::chrono::duration<double>(std::chrono::steady_clock::now() - since).count();
      });
    for (auto& thread : pool) thread.join();
    least = std::min(least, *std::max_element(seconds.begin(), seconds.end()));
  }
  return least;
}

}  // namespace

int main(int count, char** arguments) {
  const int threads = count > 1 ? std::max(1, std::atoi(arguments[1])) : 1;
  std::vector<std::unique_ptr<Vector[]>> memory;
  for (int t = 0; t < threads; ++t) memory.emplace_back(new Vector[kBytes / sizeof(Vector)]());
  const double reading = std::min(best(threads, kRuns / 6, [&](int t) { read<1>(memory[size_t(t)].get()); }),
                                  best(threads, kRuns / 6, [&](int t) { read<4>(memory[size_t(t)].get()); }));
  if (HAS_PRODUCT) {
    const double multiplying = best(threads, kRuns, [](int) { multiply(); });
    std::printf("{\"gops\": %.1f, ", 2.0 * sizeof(Vector) * kSums * kSteps * threads / multiplying / 1e9);
  } else {
    std::printf("{\"gops\": null, ");
  }
  std::printf("\"gbps\": %.2f}\n", double(kBytes) * threads / reading / 1e9);
}
