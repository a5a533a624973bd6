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
    if (!kind.weights) return;
    const std::optional<Tensor>& bias = constants_[kind.branch ? 7 : 4];
    if (!bias || bias->type != kFloat || bias->shape.size() != 1) return;
    const float* const values = bias->as<float>();
    no_bias_ = std::all_of(values, values + bias->shape[0], [](float value) { return value == 0.0f; });
  }

  void compute(KernelContext* context) const override {
    const std::vector<Tensor> given = inputs(context, kind_.inputs());
    Problem p = attributes_;
    Shape shape = read_call(kind_, given, p, [](const Problem& problem) { return check(problem); }, is_zero);
    if (no_bias_) p.bias = nullptr;
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
  bool no_bias_ = false;  // it is all zeros, which need not be read
};

}  // namespace

std::unique_ptr<Kernel> make_matmul(const Api& api, const MatMulKind& kind, const KernelInfo* info) {
  return std::make_unique<MatMulKernel>(api, kind, info);
}

}  // namespace specquant::ort
