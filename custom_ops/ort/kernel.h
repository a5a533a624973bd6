// One node of a session: what the kernels of all ops share. Each op has a file that turns a call of it into a problem.
#pragma once

#include <algorithm>
#include <initializer_list>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "kernels.h"
#include "ort_abi.h"
#include "session.h"

namespace specquant::ort {

// A failed call of ONNX Runtime on its way out: thrown here, handed back at the border.
struct Failure {
  Status* status;
};

inline void must(Status* status) {
  if (status) throw Failure{status};
}

// Sizes of a tensor's axes, in place: a call makes many of these, and a model of small nodes feels each allocation.
class Shape {
 public:
  static constexpr size_t kMost = 8;

  Shape() = default;
  Shape(std::initializer_list<int64_t> sizes) {
    resize(sizes.size());
    std::copy(sizes.begin(), sizes.end(), sizes_);
  }
  // Throws std::runtime_error if there are more than kMost axes.
  void resize(size_t count) {
    if (count > kMost) throw std::runtime_error("a tensor has more than 8 axes");
    count_ = count;
  }
  size_t size() const { return count_; }
  bool empty() const { return count_ == 0; }
  int64_t* data() { return sizes_; }
  const int64_t* data() const { return sizes_; }
  const int64_t* begin() const { return sizes_; }
  const int64_t* end() const { return sizes_ + count_; }
  int64_t& back() { return sizes_[count_ - 1]; }
  int64_t back() const { return sizes_[count_ - 1]; }
  int64_t operator[](size_t axis) const { return sizes_[axis]; }
  bool operator==(const Shape& other) const { return std::equal(begin(), end(), other.begin(), other.end()); }
  bool operator!=(const Shape& other) const { return !(*this == other); }

 private:
  int64_t sizes_[kMost] = {};
  size_t count_ = 0;
};

// An input of a call.
struct Tensor {
  Shape shape;
  ElementType type;
  void* data;

  // The size of the last axis. Throws std::runtime_error for a scalar.
  int64_t last(const char* name) const;
  // Throws std::runtime_error with one line if the shape is another.
  void expect(const char* name, const Shape& wanted) const;

  // An empty tensor may have no address, but a null pointer in a problem says that the operand is not there.
  template <class T>
  const T* as() const {
    alignas(8) static const char nothing[8] = {};
    return static_cast<const T*>(data ? data : nothing);
  }
};

// The inputs of a call, of which the constant ones stay where they are.
class Inputs {
 public:
  static constexpr size_t kMost = 10;

  // Throws std::runtime_error if there are more than kMost.
  explicit Inputs(size_t count) : count_(count) {
    if (count > kMost) throw std::runtime_error("an op has more than 10 inputs");
  }
  size_t size() const { return count_; }
  const Tensor& operator[](size_t index) const { return *at_[index]; }
  void keep(size_t index, const Tensor& constant) { at_[index] = &constant; }
  void read(size_t index, const Tensor& tensor) { at_[index] = &(own_[index] = tensor); }

 private:
  const size_t count_;
  const Tensor* at_[kMost];
  Tensor own_[kMost];
};

class Kernel {
 public:
  virtual ~Kernel() { api_.ReleaseAllocator(allocator_); }
  Kernel(const Kernel&) = delete;
  Kernel& operator=(const Kernel&) = delete;

  // Checks every shape, then computes the outputs. Throws Failure, or std::runtime_error with one line.
  virtual void compute(KernelContext* context) const = 0;

  int64_t attribute(const KernelInfo* info, const char* name, int64_t otherwise) const;
  float attribute(const KernelInfo* info, const char* name, float otherwise) const;

 protected:
  // Throws as `compute`.
  Kernel(const Api& api, const KernelInfo* info);

  // The inputs of a call. Weights are constant, and were looked at when the kernel was made.
  void read(KernelContext* context, Inputs& inputs) const;
  void* output(KernelContext* context, size_t index, const Shape& shape) const;

  const Api api_;
  Allocator* allocator_ = nullptr;  // of the memory that the node's provider computes in
  std::vector<std::optional<Tensor>> constants_;  // by input, of nodes on the CPU; those from its size on are none
};

class CpuKernel : public Kernel {
 protected:
  // Picks the instruction set: what the environment variable SPECQUANT_ISA names, or the fastest. threads: ours, or null
  // for ONNX Runtime's pool. Throws as `compute`.
  CpuKernel(const Api& api, const KernelInfo* info, std::shared_ptr<SessionThreads> threads);

  // Calls work(pool, scratch) with the session's threads and `bytes` of scratch, little of it on the stack, more from
  // the session's own arena. node: the op's, if it has weights.
  template <class Run>
  void run(KernelContext* context, size_t bytes, const Run& work, const SessionThreads::Node* node = nullptr) const {
    alignas(64) char small[kSmallScratch];
    void* memory = small;
    if (bytes > sizeof small) must(api_.AllocatorAlloc(allocator_, bytes, &memory));
    Pool pool{api_, context};
    work(threads_ ? threads_->pool(node) : ThreadPool{Pool::run, &pool}, memory);
    if (bytes > sizeof small) must(api_.AllocatorFree(allocator_, memory));
    must(pool.status);
  }

  const Kernels* kernels_;
  const std::shared_ptr<SessionThreads> threads_;

 private:
  static constexpr size_t kSmallScratch = 64 * 1024;  // a token's

  struct Pool {
    const Api& api;
    const KernelContext* context;
    Status* status = nullptr;

    static void run(void* self, void (*task)(void*, size_t), void* argument, size_t count);
  };
};

// Which inputs a linear op has, and how it is called in messages.
struct MatMulKind {
  const char* name;
  bool branch;   // basis, coef, rank
  bool weights;  // qweight, group_scales, scales, bias, norm, residual

  size_t inputs() const { return 1 + (branch ? 3 : 0) + (weights ? 6 : 0); }
  // Indices of inputs.
  size_t qweight() const { return branch ? 4 : 1; }
  size_t group_scales() const { return qweight() + 1; }
  size_t scales() const { return qweight() + 2; }
  size_t bias() const { return qweight() + 3; }
  size_t norm() const { return qweight() + 4; }
};

// What an attention op keeps in its cache.
struct AttentionKind {
  const char* name;
  int64_t kv_bits;  // 4: packed rows, as int8; 16: float16

  bool key_offset() const { return kv_bits == 4; }
  size_t inputs() const { return key_offset() ? 9 : 8; }
  int64_t row(int64_t head_dim) const { return kv_bits == 4 ? head_dim / 2 + 4 : head_dim; }  // elements of a token
};

std::unique_ptr<Kernel> make_matmul(const Api& api, const MatMulKind& kind, const KernelInfo* info,
                                    std::shared_ptr<SessionThreads> threads, float within);
std::unique_ptr<Kernel> make_attention(const Api& api, const AttentionKind& kind, const KernelInfo* info,
                                       std::shared_ptr<SessionThreads> threads);
std::unique_ptr<Kernel> make_cuda_matmul(const Api& api, const MatMulKind& kind, const KernelInfo* info);
std::unique_ptr<Kernel> make_cuda_attention(const Api& api, const AttentionKind& kind, const KernelInfo* info);

}  // namespace specquant::ort
