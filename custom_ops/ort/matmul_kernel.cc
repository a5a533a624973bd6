// SpectralBranch, Int4ResidualMatMul, SpecQuantMatMul: a call as a Problem (kernels/cpu/kernels.h).
#include <algorithm>

#include "kernel.h"

namespace specquant::ort {
namespace {

// Whether `residual` is the dummy of one zero that says there is none.
bool is_absent(const Tensor& residual, const Shape& y) {
  if (residual.shape != Shape{1} || y == Shape{1}) return false;
  return residual.type == kFloat16 ? (*residual.as<uint16_t>() & 0x7FFF) == 0 : *residual.as<float>() == 0.0f;
}

class MatMulKernel : public Kernel {
 public:
  MatMulKernel(const Api& api, const MatMulKind& kind, const KernelInfo* info) : Kernel(api, info), kind_(kind) {
    if (!kind.weights) return;
    attributes_.group_size = attribute(info, "group_size", int64_t(0));
    attributes_.act_bits = int32_t(std::clamp<int64_t>(attribute(info, "act_bits", int64_t(16)), 0, 99));
    attributes_.act_group = attribute(info, "act_group", int64_t(0));
    attributes_.hadamard = attribute(info, "hadamard", int64_t(0));
    attributes_.act_clip = attribute(info, "act_clip", 1.0f);
    attributes_.prologue = int32_t(std::clamp<int64_t>(attribute(info, "prologue", int64_t(0)), -1, 99));
    attributes_.epsilon = attribute(info, "epsilon", 1e-5f);
    if (kind.branch) attributes_.subtract = attribute(info, "subtract", int64_t(0)) != 0;
  }

  void compute(KernelContext* context) const override {
    const std::vector<Tensor> given = inputs(context, kind_.inputs());
    const Tensor& x = given[0];
    const Tensor* const branch = kind_.branch ? &given[1] : nullptr;                       // basis, coef, rank
    const Tensor* const weights = kind_.weights ? &given[kind_.branch ? 4 : 1] : nullptr;  // qweight, scales, …

    Problem p = attributes_;
    const int64_t width = x.last("x"), parts = p.prologue == kSiluGate || p.prologue == kGeluGate ? 2 : 1;
    if (width % parts) throw std::runtime_error("x must be a gate and what it gates, of one size");
    const int64_t n = p.in_features = width / parts;
    const int64_t m = p.out_features = weights ? weights[1].last("scales") : branch[1].last("coef");
    p.tokens = 1;
    for (size_t axis = 0; axis + 1 < x.shape.size(); ++axis) p.tokens *= x.shape[axis];
    p.half = x.type == kFloat16;
    p.x = x.as<void>();
    if (branch) {
      const Tensor &basis = branch[0], &coef = branch[1], &rank = branch[2];
      rank.expect("rank", {1});
      const int64_t r = p.basis_rank = basis.last("basis"), wanted = *rank.as<int64_t>();
      basis.expect("basis", {n, r});
      coef.expect("coef", {r, m});
      p.rank = wanted < 0 ? 0 : wanted > r ? r : wanted;
      p.basis = basis.as<uint16_t>();
      p.coef = coef.as<uint16_t>();
    }
    if (weights) {
      p.qweight = weights[0].as<uint8_t>();
      p.scales = weights[1].as<uint16_t>();
      p.row_sums = weights[2].as<void>();
      p.wide_sums = weights[2].type == kInt32;
      p.bias = weights[3].as<float>();
      p.norm = weights[4].as<float>();
    }
    if (const char* wrong = check(p)) throw std::runtime_error(wrong);
    if (weights) {
      weights[0].expect("qweight", {(m + 15) / 16, (n + 7) / 8, 64});
      weights[1].expect("scales", {p.group_size ? n / p.group_size : 1, m});
      weights[2].expect("row_sums", {n / segment_length(p), m});
      weights[3].expect("bias", {m});
      if (p.prologue == kRmsNorm) weights[4].expect("norm", {n});
    }

    Shape shape = x.shape;
    shape.back() = m;
    if (weights && !is_absent(weights[5], shape)) {
      weights[5].expect("residual", shape);
      p.residual = weights[5].as<void>();
    }
    p.y = output(context, 0, shape);
    if (!weights) {
      shape.back() = p.basis_rank;
      p.low = output(context, 1, shape);
    }
    run(context, scratch_bytes(p),
        [&](const ThreadPool& pool, void* scratch) { matmul(*kernels_, p, pool, scratch); });
  }

 private:
  const MatMulKind kind_;
  Problem attributes_{};  // those fields of it that a node fixes
};

}  // namespace

std::unique_ptr<Kernel> make_matmul(const Api& api, const MatMulKind& kind, const KernelInfo* info) {
  return std::make_unique<MatMulKernel>(api, kind, info);
}

}  // namespace specquant::ort
