// What the runtime asks of one session beyond what ONNX Runtime knows, and its threads, if they are ours.
#pragma once

#include <atomic>
#include <deque>
#include <memory>
#include <mutex>

#include "workers.h"

namespace specquant::ort {

struct Settings {
  int threads = 0;      // of ours, the caller's among them; 0: ONNX Runtime's pool is used
  float within = 0.0f;  // of a head in two digits (Problem::within)

  bool operator==(const Settings& other) const { return threads == other.threads && within == other.within; }
};

// Threads of a session. Between two linear ops of few tokens they ask for the weights of those that came next the last time.
class SessionThreads {
 public:
  // A linear op. Lives as long as the threads, what its weights were may be gone before.
  struct Node {
    Problem problem{};
    std::once_flag known;
    std::atomic<const Node*> next{nullptr};
  };

  explicit SessionThreads(int threads) : workers_(threads) {}

  Node& add();
  // For a call of a node, or of an op without weights.
  ThreadPool pool(const Node* node);
  // The node's call of few tokens is over.
  void done(Node& node, const Problem& problem);

 private:
  static void read_ahead(const void* node, int worker, const Workers& workers);

  std::mutex mutex_;
  std::deque<Node> nodes_;
  std::atomic<Node*> previous_{nullptr};
  Workers workers_;  // the last member: threads end before what they look at
};

}  // namespace specquant::ort
