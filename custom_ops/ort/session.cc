#include "session.h"

namespace specquant::ort {
namespace {

constexpr int64_t kBytes = 1024 * 1024;  // that a thread asks for beforehand: half of what many a second-level cache holds
constexpr int kNodes = 3;

}  // namespace

SessionThreads::Node& SessionThreads::add() {
  const std::lock_guard<std::mutex> lock(mutex_);
  return nodes_.emplace_back();
}

ThreadPool SessionThreads::pool(const Node* node) {
  ThreadPool pool = workers_.pool();
  if (const Node* const next = node ? node->next.load(std::memory_order_acquire) : nullptr) pool.next = &next->problem;
  return pool;
}

void SessionThreads::done(Node& node, const Problem& problem) {
  std::call_once(node.known, [&] { node.problem = problem; });
  Node* const before = previous_.exchange(&node);
  if (before && before->next.load(std::memory_order_relaxed) != &node)  // a store would take the line from who reads ahead
    before->next.store(&node, std::memory_order_release);
  workers_.meanwhile(read_ahead, &node);
}

void SessionThreads::read_ahead(const void* argument, int worker, const Workers& workers) {
  const auto stop = [](const void* w) { return static_cast<const Workers*>(w)->wanted(); };
  const Node* node = static_cast<const Node*>(argument);
  int64_t bytes = kBytes;
  for (int i = 0; i < kNodes && bytes > 0; ++i) {
    node = node->next.load(std::memory_order_acquire);
    if (!node || !specquant::read_ahead(node->problem, workers.layout(), worker, bytes, stop, &workers)) return;
  }
}

}  // namespace specquant::ort
