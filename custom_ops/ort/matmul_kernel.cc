// SpectralBranch, Int4ResidualMatMul, SpecQuantMatMul: a call as a Problem (kernels/cpu/kernels.h).
#include <cstring>

#include "calls.h"

namespace specquant::ort {
namespace {

bool is_zero(const Tensor& one) {
  return one.type == kFloat16 ? (*one.as<uint16_t>() & 0x7FFF) == 0 : *one.as<float>() == 0.0f;
}

// Whether norm [N] and group_scales [P, G, 8] are those of a head in two digits (docs/formats.md): the second half of the
// features counts a sixteenth, by its norm alone.
bool in_two_digits(const Tensor& norm, const Tensor& group_scales) {
  const Shape &features = norm.shape, &groups = group_scales.shape;
  if (features.size() != 1 || features[0] % 2 || groups.size() != 3 || groups[1] % 2) return false;
  const float* const high = norm.as<float>();
  const int64_t half = features[0] / 2, bytes = groups[1] / 2 * groups[2];
  for (int64_t i = 0; i < half; ++i)
    if (high[i] != 16.0f * high[half + i]) return false;
  const char* scales = group_scales.as<char>();
  for (int64_t panel = 0; panel < groups[0]; ++panel, scales += 2 * bytes)
    if (std::memcmp(scales, scales + bytes, size_t(bytes))) return false;
  return true;
}

class MatMulKernel : public CpuKernel {
 public:
  MatMulKernel(const Api& api, const MatMulKind& kind, const KernelInfo* info, std::shared_ptr<SessionThreads> threads,
               float within)
      : CpuKernel(api, info, std::move(threads)), kind_(kind), node_(threads_ ? &threads_->add() : nullptr) {
    read_attributes(*this, kind, info, attributes_);
    if (!kind.weights) return;
    const std::optional<Tensor> &norm = constants_[kind.norm()], &group_scales = constants_[kind.group_scales()];
    if (within > 0.0f && !kind.branch && attributes_.prologue == kRmsNorm && norm && group_scales &&
        in_two_digits(*norm, *group_scales))
      within_ = within;
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
