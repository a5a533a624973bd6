// SpectralBranch, Int4ResidualMatMul, SpecQuantMatMul: a call as a Problem (kernels/cpu/kernels.h).
#include "calls.h"

namespace specquant::ort {
namespace {

bool is_zero(const Tensor& one) {
  return one.type == kFloat16 ? (*one.as<uint16_t>() & 0x7FFF) == 0 : *one.as<float>() == 0.0f;
}

class MatMulKernel : public CpuKernel {
 public:
  MatMulKernel(const Api& api, const MatMulKind& kind, const KernelInfo* info) : CpuKernel(api, info), kind_(kind) {
    read_attributes(*this, kind, info, attributes_);
  }

  void compute(KernelContext* context) const override {
    const std::vector<Tensor> given = inputs(context, kind_.inputs());
    Problem p = attributes_;
    Shape shape = read_call(kind_, given, p, [](const Problem& problem) { return check(problem); }, is_zero);
    p.y = output(context, 0, shape);
    if (!kind_.weights) {
      shape.back() = p.basis_rank;
      p.low = output(context, 1, shape);
    }
    run(context, scratch_bytes(p),
        [&](const ThreadPool& pool, void* scratch) { matmul(*kernels_, p, pool, scratch); });
  }

 private:
  const MatMulKind& kind_;
  Problem attributes_{};  // those fields of it that a node fixes
};

}  // namespace

std::unique_ptr<Kernel> make_matmul(const Api& api, const MatMulKind& kind, const KernelInfo* info) {
  return std::make_unique<MatMulKernel>(api, kind, info);
}

}  // namespace specquant::ort
