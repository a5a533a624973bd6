#include "workers.h"

#include <algorithm>
#include <chrono>

namespace specquant {
namespace {

constexpr size_t kMostTasks = 0xFFFF;  // of a ticket
constexpr auto kAwake = std::chrono::milliseconds(1);
constexpr int kPollsPerClock = 64;  // looks for work between two looks at the clock
constexpr int kPolls = 10000;       // then the caller lets others have its core

thread_local int number_of_thread = 0;

inline void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

}  // namespace

Workers::Workers(int threads) {
  threads_.reserve(size_t(std::max(threads, 1) - 1));
  try {
    for (int i = 1; i < threads; ++i) threads_.emplace_back([this, i] { serve(i); });
  } catch (...) {
    this->~Workers();
    throw;
  }
}

Workers::~Workers() {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    stop_.store(true);
  }
  awake_.notify_all();
  for (std::thread& thread : threads_) thread.join();
}

int Workers::self() { return number_of_thread; }

void Workers::run(void* context, void (*task)(void*, size_t), void* argument, size_t count) {
  Workers& workers = *static_cast<Workers*>(context);
  if (count < 2 || workers.threads_.empty() || workers.busy_.exchange(true, std::memory_order_acquire)) {
    for (size_t i = 0; i < count; ++i) task(argument, i);
    return;
  }
  for (size_t first = 0; first < count; first += kMostTasks)
    workers.share_out(task, argument, first, std::min(count - first, kMostTasks));
  workers.busy_.store(false, std::memory_order_release);
}

void Workers::share_out(void (*task)(void*, size_t), void* argument, size_t first, size_t count) {
  task_ = task, argument_ = argument, first_ = first;
  done_.store(0, std::memory_order_relaxed);
  const uint64_t number = (ticket_.load(std::memory_order_relaxed) >> 32) + 1;
  ticket_.store(number << 32 | uint64_t(count) << 16);
  if (sleeping_.load()) {
    { const std::lock_guard<std::mutex> lock(mutex_); }  // who is about to sleep looks once more, or hears this
    awake_.notify_all();
  }
  while (work()) continue;
  for (int polls = 0; done_.load(std::memory_order_acquire) < count; ++polls) {
    pause();
    if (polls > kPolls) std::this_thread::yield();
  }
}

bool Workers::work() {
  uint64_t ticket = ticket_.load(std::memory_order_acquire);
  do {
    if (!left(ticket)) return false;
  } while (!ticket_.compare_exchange_weak(ticket, ticket + 1, std::memory_order_acq_rel, std::memory_order_acquire));
  // This task is not done, so nobody has replaced the job.
  task_(argument_, first_ + (ticket & 0xFFFF));
  done_.fetch_add(1, std::memory_order_release);
  return true;
}

void Workers::meanwhile(Meanwhile task, const void* argument) {
  meanwhile_.store(task, std::memory_order_relaxed);
  meanwhile_argument_.store(argument, std::memory_order_relaxed);
  meanwhiles_.fetch_add(1, std::memory_order_release);
}

void Workers::serve(int number) {
  number_of_thread = number;
  uint32_t seen = 0;
  auto last = std::chrono::steady_clock::now();
  for (int polls = 0; !stop_.load(std::memory_order_relaxed);) {
    if (work()) {
      polls = 0;
      continue;
    }
    if (const uint32_t now = meanwhiles_.load(std::memory_order_acquire); now != seen) {
      seen = now;
      meanwhile_.load(std::memory_order_relaxed)(meanwhile_argument_.load(std::memory_order_relaxed), number, *this);
      polls = 0;
      continue;
    }
    pause();
    if (polls++ % kPollsPerClock) continue;
    const auto now = std::chrono::steady_clock::now();
    if (polls == 1) last = now;
    if (now - last < kAwake) continue;
    sleep();
    polls = 0;
  }
}

void Workers::sleep() {
  std::unique_lock<std::mutex> lock(mutex_);
  sleeping_.fetch_add(1);
  awake_.wait(lock, [this] { return wanted() || stop_.load(); });
  sleeping_.fetch_sub(1);
}

}  // namespace specquant
