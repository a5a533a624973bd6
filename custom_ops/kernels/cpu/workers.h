// Threads of our own for the calls of one session. They look for work all the time, and sleep a millisecond after the
// last of it; between two calls they may do something that is dropped when the next one comes.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <thread>
#include <vector>

#include "kernels.h"

namespace specquant {

class Workers {
 public:
  // threads >= 1: of these one is the caller's. Throws std::system_error if the system has no more threads.
  explicit Workers(int threads);
  ~Workers();
  Workers(const Workers&) = delete;
  Workers& operator=(const Workers&) = delete;

  // Of a second caller while the first one is busy nothing is shared out: it works alone.
  ThreadPool pool() { return {run, this, threads(), self, callers_share()}; }
  // How `pool` shares out, for those who may not run anything.
  ThreadPool layout() const { return {nullptr, nullptr, threads(), self, callers_share()}; }
  int threads() const { return int(threads_.size()) + 1; }

  // Each worker calls task(argument, its number from 1 on, *this) once when it has nothing else to do, if it is not
  // replaced before, and the task returns soon after `wanted()`. What argument points to must outlive this.
  using Meanwhile = void (*)(const void* argument, int worker, const Workers& workers);
  void meanwhile(Meanwhile task, const void* argument);
  bool wanted() const { return left(ticket_.load(std::memory_order_relaxed)) > 0; }

 private:
  // The caller has more to do than the others, who read ahead: with two threads 0.4 was best, 0.33 and 0.5 within 1 %.
  double callers_share() const { return 0.8 / threads(); }


  static void run(void* context, void (*task)(void*, size_t), void* argument, size_t count);
  static int self();
  // A ticket: 32 bits of the job's number, 16 of its tasks, 16 of those that are taken.
  static uint64_t left(uint64_t ticket) { return (ticket >> 16 & 0xFFFF) - (ticket & 0xFFFF); }
  bool work();  // one task of the job at hand; false if there is none left
  void share_out(void (*task)(void*, size_t), void* argument, size_t first, size_t count);
  void serve(int number);
  void sleep();

  alignas(64) std::atomic<uint64_t> ticket_{0};
  void (*task_)(void*, size_t) = nullptr;
  void* argument_ = nullptr;
  size_t first_ = 0;
  std::atomic<uint32_t> meanwhiles_{0};
  std::atomic<Meanwhile> meanwhile_{nullptr};
  std::atomic<const void*> meanwhile_argument_{nullptr};
  alignas(64) std::atomic<size_t> done_{0};
  alignas(64) std::atomic<bool> busy_{false};
  std::atomic<int> sleeping_{0};
  std::atomic<bool> stop_{false};
  std::mutex mutex_;
  std::condition_variable awake_;
  std::vector<std::thread> threads_;
};

}  // namespace specquant
