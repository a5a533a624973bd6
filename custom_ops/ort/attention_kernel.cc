// Int4KVAttention and HalfKVAttention: a call as an Attention (kernels/cpu/attention.h).
#include "attention.h"

#include "calls.h"

namespace specquant::ort {
namespace {

class AttentionKernel : public CpuKernel {
 public:
  AttentionKernel(const Api& api, const AttentionKind& kind, const KernelInfo* info,
                  std::shared_ptr<SessionThreads> threads)
      : CpuKernel(api, info, std::move(threads)), kind_(kind) {
    attributes_.kv_bits = kind.kv_bits;
    read_attributes(*this, kind, info, attributes_);
  }

  void compute(KernelContext* context) const override {
    Attention a = attributes_;
    Inputs given(kind_.inputs());
    read(context, given);
    const Shape cache = read_call(kind_, given, a);
    if (const char* wrong = check(a)) throw std::runtime_error(wrong);

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

std::unique_ptr<Kernel> make_attention(const Api& api, const AttentionKind& kind, const KernelInfo* info,
                                       std::shared_ptr<SessionThreads> threads) {
  return std::make_unique<AttentionKernel>(api, kind, info, std::move(threads));
}

}  // namespace specquant::ort
