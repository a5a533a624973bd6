// Int4KVAttention and HalfKVAttention: a call as an Attention (kernels/cpu/attention.h).
#include "attention.h"

#include <algorithm>

#include "kernel.h"

namespace specquant::ort {
namespace {

class AttentionKernel : public Kernel {
 public:
  AttentionKernel(const Api& api, const AttentionKind& kind, const KernelInfo* info) : Kernel(api, info), kind_(kind) {
    attributes_.kv_bits = kind.kv_bits;
    attributes_.num_heads = attribute(info, "num_heads", int64_t(1));
    attributes_.kv_num_heads = attribute(info, "kv_num_heads", int64_t(1));
    attributes_.window = attribute(info, "local_window_size", int64_t(-1));
    attributes_.hadamard = attribute(info, "hadamard", int64_t(0)) != 0;
    attributes_.scale = attribute(info, "scale", 0.0f);
    attributes_.clip = attribute(info, "clip", 1.0f);
    for (const int64_t heads : {attributes_.num_heads, attributes_.kv_num_heads})
      if (heads < 1 || heads > 1 << 16) throw std::runtime_error("num_heads and kv_num_heads must be 1 to 65536");
  }

  void compute(KernelContext* context) const override {
    const std::vector<Tensor> given = inputs(context, kind_.inputs());
    const Tensor &qkv = given[0], &past_key = given[1], &past_value = given[2], &seqlens = given[3];
    const Tensor &total = given[4], &positions = given[5], &cos = given[6], &sin = given[7];

    Attention a = attributes_;
    if (qkv.shape.size() != 3) throw std::runtime_error("qkv must be [batch, sequence, width]");
    if (past_key.shape.size() != 4) throw std::runtime_error("past_key must be [batch, kv heads, tokens, row]");
    a.batch = qkv.shape[0], a.sequence = qkv.shape[1];
    const int64_t heads = a.num_heads + 2 * a.kv_num_heads;
    a.head_dim = qkv.shape[2] / heads;
    qkv.expect("qkv", {a.batch, a.sequence, a.head_dim * heads});
    a.past_rows = past_key.shape[2];
    const int64_t row = row_bytes(a) / kind_.element_bytes();
    for (const Tensor* past : {&past_key, &past_value})
      past->expect(past == &past_key ? "past_key" : "past_value", {a.batch, a.kv_num_heads, a.past_rows, row});
    seqlens.expect("seqlens_k", {a.batch});
    total.expect("total_sequence_length", {});
    positions.expect("position_ids", {a.batch, a.sequence});
    a.rotary = cos.last("cos"), a.context = cos.shape[0];
    cos.expect("cos", {a.context, a.rotary});
    sin.expect("sin", {a.context, a.rotary});
    a.present_rows = std::max<int64_t>(a.past_rows, *total.as<int32_t>());
    a.half = qkv.type == kFloat16;
    a.qkv = qkv.as<void>();
    a.past_key = past_key.as<uint8_t>(), a.past_value = past_value.as<uint8_t>();
    a.seqlens_k = seqlens.as<int32_t>();
    a.position_ids = positions.as<int64_t>();
    a.cos = cos.as<float>(), a.sin = sin.as<float>();
    if (kind_.key_offset()) {
      given[8].expect("key_offset", {a.kv_num_heads, a.head_dim});
      a.key_offset = given[8].as<float>();
    }
    if (const char* wrong = check(a)) throw std::runtime_error(wrong);

    const Shape cache = {a.batch, a.kv_num_heads, a.present_rows, row};
    a.y = output(context, 0, {a.batch, a.sequence, a.num_heads * a.head_dim});
    a.present_key = static_cast<uint8_t*>(output(context, 1, cache));
    a.present_value = static_cast<uint8_t*>(output(context, 2, cache));
    run(context, scratch_bytes(a),
        [&](const ThreadPool& pool, void* scratch) { attend(*kernels_, a, pool, scratch); });
  }

 private:
  const AttentionKind& kind_;
  Attention attributes_{};  // those fields of it that a node fixes
};

}  // namespace

std::unique_ptr<Kernel> make_attention(const Api& api, const AttentionKind& kind, const KernelInfo* info) {
  return std::make_unique<AttentionKernel>(api, kind, info);
}

}  // namespace specquant::ort
