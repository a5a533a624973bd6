// What this machine can do at most: byte products (vpdpbusd, and AMX's tdpbssd), multiply-adds of float32 and reads from
// memory, on THREADS threads at once. c++ -O3 -march=native -pthread tools/machine_limits.cc -o limits && ./limits THREADS
// prints {"gops": 10^9 operations a second, null without VNNI, "amx_gops": likewise, null without AMX, "gflops":
// of float32, null without FMA, "gbps": 10^9 bytes a second}. Best of many short runs.
#include <immintrin.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

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

#if defined(__AVX512F__) || defined(__FMA__)
#if defined(__AVX512F__)
typedef float Floats __attribute__((vector_size(64)));
#else
typedef float Floats __attribute__((vector_size(32)));
#endif
#define HAS_FMA 1
#define SUM(j) __asm__ volatile("vfmadd231ps %1, %1, %0" : "+x"(s##j) : "x"(factor));
void multiply_floats() {
  Floats s0{}, s1{}, s2{}, s3{}, s4{}, s5{}, s6{}, s7{}, s8{}, s9{}, s10{}, s11{}, factor{};
  for (int i = 0; i < kSteps; ++i) {
    SUM(0) SUM(1) SUM(2) SUM(3) SUM(4) SUM(5) SUM(6) SUM(7) SUM(8) SUM(9) SUM(10) SUM(11)
  }
}
#else
typedef float Floats;
#define HAS_FMA 0
void multiply_floats() {}
#endif

// Tiles of 16 x 16 sums of 64 products; false where there are none, or Linux does not let us use them.
#if defined(__AMX_INT8__) && defined(__linux__)
constexpr int kTileSteps = 20000;
bool may_use_tiles() { return syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* tile data */) == 0; }
void multiply_tiles() {
  alignas(64) unsigned char layout[64] = {1};
  for (int i = 0; i < 8; ++i) layout[16 + 2 * i] = 64, layout[48 + i] = 16;
  __asm__ volatile("ldtilecfg %0" : : "m"(layout));
  for (int i = 0; i < kTileSteps; ++i) {
    _tile_dpbssd(0, 4, 6);
    _tile_dpbssd(1, 4, 7);
    _tile_dpbssd(2, 5, 6);
    _tile_dpbssd(3, 5, 7);
  }
  _tile_release();
}
#else
constexpr int kTileSteps = 0;
bool may_use_tiles() { return false; }
void multiply_tiles() {}
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
  if (may_use_tiles()) {
    const double multiplying = best(threads, kRuns, [](int) { multiply_tiles(); });
    std::printf("\"amx_gops\": %.1f, ", 2.0 * 16 * 16 * 64 * 4 * kTileSteps * threads / multiplying / 1e9);
  } else {
    std::printf("\"amx_gops\": null, ");
  }
  if (HAS_FMA) {
    const double multiplying = best(threads, kRuns, [](int) { multiply_floats(); });
    std::printf("\"gflops\": %.1f, ", 2.0 * sizeof(Floats) / sizeof(float) * kSums * kSteps * threads / multiplying / 1e9);
  } else {
    std::printf("\"gflops\": null, ");
  }
  std::printf("\"gbps\": %.2f}\n", double(kBytes) * threads / reading / 1e9);
}
