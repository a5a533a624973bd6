// One node of a session: its attributes, and how a call of it becomes a Problem (kernels/cpu/kernels.h).
#pragma once

#include <stdexcept>
#include <string>
#include <vector>

#include "kernels.h"
#include "ort_abi.h"

namespace specquant::ort {

// A failed call of ONNX Runtime on its way out: thrown here, handed back at the border.
struct Failure {
  Status* status;
};

inline void must(Status* status) {
  if (status) throw Failure{status};
}

// Which inputs an op has, and how it is called in messages.
struct OpKind {
  const char* name;
  bool branch;   // basis, coef, rank
  bool weights;  // qweight, scales, row_sums, bias

  size_t inputs() const { return 1 + (branch ? 3 : 0) + (weights ? 4 : 0); }
};

using Shape = std::vector<int64_t>;

class Kernel {
 public:
  // Reads the attributes (schema.py has the defaults), and picks the instruction set: what the environment variable
  // SPECQUANT_ISA names, or the fastest. Throws Failure, or std::runtime_error with one line.
  Kernel(const Api& api, const OpKind& kind, const KernelInfo* info);
  ~Kernel() { api_.ReleaseAllocator(allocator_); }
  Kernel(const Kernel&) = delete;
  Kernel& operator=(const Kernel&) = delete;

  // Checks every shape and type, then computes the outputs. Throws as the constructor does.
  void compute(KernelContext* context) const;

 private:
  int64_t attribute(const KernelInfo* info, const char* name, int64_t otherwise) const;
  void* output(KernelContext* context, size_t index, const Shape& shape) const;

  const Api api_;
  const OpKind kind_;
  const Kernels* kernels_;
  Allocator* allocator_ = nullptr;  // the session's own: scratch comes from its arena
  Problem attributes_{};            // those fields of it that a node fixes
};

}  // namespace specquant::ort
