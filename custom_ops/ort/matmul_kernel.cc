// SpectralBranch, Int4ResidualMatMul, SpecQuantMatMul: a call as a Problem (kernels/cpu/kernels.h).
#include "calls.h"
#include "half.h"

namespace specquant::ort {
namespace {

bool is_zero(const Tensor& one) {
  return one.type == kFloat16 ? (*one.as<uint16_t>() & 0x7FFF) == 0 : *one.as<float>() == 0.0f;
}

// Whether scales [G, M] are those of a head in two digits (docs/formats.md): the first half 16 times the second.
bool in_two_digits(const Tensor& scales) {
  if (scales.shape.size() != 2 || scales.shape[0] % 2) return false;
  const uint16_t* const high = scales.as<uint16_t>();
  const int64_t half = scales.shape[0] / 2 * scales.shape[1];
  for (int64_t i = 0; i < half; ++i)
    if (half_to_float(high[i]) != 16.0f * half_to_float(high[half + i])) return false;
  return half > 0;
}

class MatMulKernel : public CpuKernel {
 public:
  MatMulKernel(const Api& api, const MatMulKind& kind, const KernelInfo* info, std::shared_ptr<SessionThreads> threads,
               float within)
      : CpuKernel(api, info, std::move(threads)), kind_(kind), node_(threads_ ? &threads_->add() : nullptr) {
    read_attributes(*this, kind, info, attributes_);
    if (!kind.weights) return;
    if (within > 0.0f && !kind.branch && constants_[2] && in_two_digits(*constants_[2])) within_ = within;
    const std::optional<Tensor>& bias = constants_[kind.bias()];
    if (!bias || bias->type != kFloat || bias->shape.size() != 1) return;
    const float* const values = bias->as<float>();
    no_bias_ = std::all_of(values, values + bias->shape[0], [](float value) { return value == 0.0f; });
  }

  void compute(KernelContext* context) const override {
    Inputs given(kind_.inputs());
    read(context, given);
    Problem p = attributes_;
    Shape shape = read_call(kind_, given, p, [](const Problem& problem) { return check(problem); }, is_zero);
    if (no_bias_) p.bias = nullptr;
    if (p.tokens == 1 && !p.half && !p.residual && p.act_bits < 16) p.within = within_;
    p.y = output(context, 0, shape);
    if (!kind_.weights) {
      shape.back() = p.basis_rank;
      p.low = output(context, 1, shape);
    }
    run(context, scratch_bytes(p),
        [&](const ThreadPool& pool, void* scratch) { matmul(*kernels_, p, pool, scratch); }, node_);
    if (node_ && p.tokens <= kFewTokens) threads_->done(*node_, p);
  }

 private:
  const MatMulKind& kind_;
  Problem attributes_{};  // those fields of it that a node fixes
  SessionThreads::Node* const node_;
  float within_ = 0.0f;
  bool no_bias_ = false;  // it is all zeros, which need not be read
};

}  // namespace

std::unique_ptr<Kernel> make_matmul(const Api& api, const MatMulKind& kind, const KernelInfo* info,
                                    std::shared_ptr<SessionThreads> threads, float within) {
  return std::make_unique<MatMulKernel>(api, kind, info, std::move(threads), within);
}

}  // namespace specquant::ort
