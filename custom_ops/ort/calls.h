// A call's tensors as a problem of the kernels. The CPU's structures and the GPU's name their fields alike.
#pragma once

#include <algorithm>

#include "kernel.h"

namespace specquant::ort {

constexpr int32_t kRmsNormed = 1;  // a value of `prologue`, docs/ops.md

template <class T>
void point(const T*& field, const Tensor& tensor) {
  field = tensor.as<T>();
}

// Attributes of a linear op, in a problem that is otherwise empty.
template <class P>
void read_attributes(const Kernel& kernel, const MatMulKind& kind, const KernelInfo* info, P& p) {
  if (!kind.weights) return;
  p.group_size = kernel.attribute(info, "group_size", int64_t(0));
  p.act_bits = int32_t(std::clamp<int64_t>(kernel.attribute(info, "act_bits", int64_t(16)), 0, 99));
  p.act_group = kernel.attribute(info, "act_group", int64_t(0));
  p.hadamard = kernel.attribute(info, "hadamard", int64_t(0));
  p.act_clip = kernel.attribute(info, "act_clip", 1.0f);
  p.prologue = int32_t(std::clamp<int64_t>(kernel.attribute(info, "prologue", int64_t(0)), -1, 99));
  p.epsilon = kernel.attribute(info, "epsilon", 1e-5f);
  p.gate = int32_t(std::clamp<int64_t>(kernel.attribute(info, "gate", int64_t(0)), -1, 99));
  if (kind.branch) p.subtract = kernel.attribute(info, "subtract", int64_t(0)) != 0;
}

// Sizes and operands of a call, and the shape of y. `check`, which says in one line what is wrong, sees them before
// shapes are compared. no_residual(tensor): whether a `residual` of one element is the dummy. Throws std::runtime_error.
template <class P, class Check, class NoResidual>
Shape read_call(const MatMulKind& kind, const Inputs& given, P& p, const Check& check,
                const NoResidual& no_residual) {
  const Tensor& x = given[0];
  // basis, coef, rank; qweight, group_scales, scales, bias, norm, residual
  const auto branch = [&](size_t i) -> const Tensor& { return given[1 + i]; };
  const auto weights = [&](size_t i) -> const Tensor& { return given[kind.qweight() + i]; };
  const int64_t n = p.in_features = x.last("x");
  const int64_t m = p.out_features = kind.weights ? weights(2).last("scales") : branch(1).last("coef");
  p.tokens = 1;
  for (size_t axis = 0; axis + 1 < x.shape.size(); ++axis) p.tokens *= x.shape[axis];
  p.half = x.type == kFloat16;
  p.x = x.as<void>();
  if (kind.branch) {
    const Tensor &basis = branch(0), &coef = branch(1), &rank = branch(2);
    rank.expect("rank", {1});
    const int64_t r = p.basis_rank = basis.last("basis"), wanted = *rank.as<int64_t>();
    basis.expect("basis", {n, r});
    coef.expect("coef", {r, m});
    p.rank = wanted < 0 ? 0 : wanted > r ? r : wanted;
    point(p.basis, basis);
    point(p.coef, coef);
  }
  if (kind.weights) {
    point(p.qweight, weights(0));
    point(p.group_scales, weights(1));
    point(p.scales, weights(2));
    point(p.bias, weights(3));
    point(p.norm, weights(4));
  }
  if (const char* wrong = check(p)) throw std::runtime_error(wrong);
  Shape y = x.shape;
  y.back() = p.gate ? m / 2 : m;
  if (!kind.weights) return y;
  weights(0).expect("qweight", {(m + 15) / 16, (n + 7) / 8, 64});
  weights(1).expect("group_scales", {(m + 15) / 16, p.group_size ? n / p.group_size : 1, 8});
  weights(2).expect("scales", {m});
  weights(3).expect("bias", {m});
  if (p.prologue == kRmsNormed) weights(4).expect("norm", {n});
  const Tensor& residual = weights(5);
  if (residual.shape != Shape{1} || y == Shape{1} || !no_residual(residual)) {
    if (p.gate) throw std::runtime_error("with a gate there is no residual");
    residual.expect("residual", y);
    point(p.residual, residual);
  }
  return y;
}

template <class P>
void read_attributes(const Kernel& kernel, const AttentionKind&, const KernelInfo* info, P& p) {
  p.num_heads = kernel.attribute(info, "num_heads", int64_t(1));
  p.kv_num_heads = kernel.attribute(info, "kv_num_heads", int64_t(1));
  p.window = kernel.attribute(info, "local_window_size", int64_t(-1));
  p.hadamard = kernel.attribute(info, "hadamard", int64_t(0)) != 0;
  p.scale = kernel.attribute(info, "scale", 0.0f);
  p.clip = kernel.attribute(info, "clip", 1.0f);
  for (const int64_t heads : {p.num_heads, p.kv_num_heads})
    if (heads < 1 || heads > 1 << 16) throw std::runtime_error("num_heads and kv_num_heads must be 1 to 65536");
}

// Sizes and operands of a call of attention, not checked but for shapes; the shape of its cache. Throws
// std::runtime_error.
template <class P>
Shape read_call(const AttentionKind& kind, const Inputs& given, P& p) {
  const Tensor &qkv = given[0], &past_key = given[1], &past_value = given[2], &seqlens = given[3];
  const Tensor &total = given[4], &positions = given[5], &cos = given[6], &sin = given[7];
  if (qkv.shape.size() != 3) throw std::runtime_error("qkv must be [batch, sequence, width]");
  if (past_key.shape.size() != 4) throw std::runtime_error("past_key must be [batch, kv heads, tokens, row]");
  p.batch = qkv.shape[0], p.sequence = qkv.shape[1];
  const int64_t heads = p.num_heads + 2 * p.kv_num_heads;
  p.head_dim = qkv.shape[2] / heads;
  qkv.expect("qkv", {p.batch, p.sequence, p.head_dim * heads});
  p.past_rows = past_key.shape[2];
  const int64_t row = kind.row(p.head_dim);
  past_key.expect("past_key", {p.batch, p.kv_num_heads, p.past_rows, row});
  past_value.expect("past_value", {p.batch, p.kv_num_heads, p.past_rows, row});
  seqlens.expect("seqlens_k", {p.batch});
  total.expect("total_sequence_length", {});
  positions.expect("position_ids", {p.batch, p.sequence});
  p.rotary = cos.last("cos"), p.context = cos.shape[0];
  cos.expect("cos", {p.context, p.rotary});
  sin.expect("sin", {p.context, p.rotary});
  p.present_rows = std::max<int64_t>(p.past_rows, *total.as<int32_t>());
  p.half = qkv.type == kFloat16;
  point(p.qkv, qkv);
  point(p.past_key, past_key);
  point(p.past_value, past_value);
  point(p.seqlens_k, seqlens);
  point(p.position_ids, positions);
  point(p.cos, cos);
  point(p.sin, sin);
  if (kind.key_offset()) {
    given[8].expect("key_offset", {p.kv_num_heads, p.head_dim});
    point(p.key_offset, given[8]);
  }
  return {p.batch, p.kv_num_heads, p.present_rows, row};
}

}  // namespace specquant::ort
