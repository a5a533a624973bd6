// The ops for ONNX Runtime's CUDA provider, by the kernels of libspecquant_cuda.so. Nothing here waits for the GPU, so
// that a call can be captured in a graph: what the host must know, a rank and the longest row, comes in its memory.
#include "calls.h"
#include "cuda_library.h"

namespace specquant::ort {
namespace {

constexpr uintptr_t kAlignment = 256;  // of a workspace

class CudaKernel : public Kernel {
 protected:
  CudaKernel(const Api& api, const KernelInfo* info) : Kernel(api, info), library_(cuda_library()) {}

  // Calls work(workspace, stream), which returns an error or null, with `bytes` of the session's own GPU memory. They
  // are handed back at once: who gets them next comes later on the same stream.
  template <class Work>
  void run(KernelContext* context, int64_t bytes, const Work& work) const {
    void *stream = nullptr, *memory = nullptr;
    must(api_.KernelContext_GetGPUComputeStream(context, &stream));
    if (bytes) must(api_.AllocatorAlloc(allocator_, size_t(bytes) + kAlignment, &memory));
    const uintptr_t aligned = (reinterpret_cast<uintptr_t>(memory) + kAlignment - 1) / kAlignment * kAlignment;
    const char* wrong = work(reinterpret_cast<void*>(aligned), stream);
    if (bytes) must(api_.AllocatorFree(allocator_, memory));
    if (wrong) throw std::runtime_error(wrong);
  }

  const CudaLibrary& library_;
};

class CudaMatMul : public CudaKernel {
 public:
  CudaMatMul(const Api& api, const MatMulKind& kind, const KernelInfo* info) : CudaKernel(api, info), kind_(kind) {
    read_attributes(*this, kind, info, attributes_);
  }

  void compute(KernelContext* context) const override {
    Inputs given(kind_.inputs());
    read(context, given);
    SpecquantCudaProblem p = attributes_;
    // A residual of one element lies on the GPU and is taken for the dummy without a look.
    const Shape shape = read_call(
        kind_, given, p, [&](const SpecquantCudaProblem& problem) { return library_.check(&problem); },
        [](const Tensor&) { return true; });
    p.y = output(context, 0, shape);
    if (p.tokens == 0) return;
    SpecquantCudaLayout layout;
    if (const char* wrong = library_.layout(&p, &layout)) throw std::runtime_error(wrong);
    run(context, layout.bytes, [&](void* workspace, void* stream) {
      return library_.matmul(&p, workspace, layout.bytes, stream, nullptr);
    });
  }

 private:
  const MatMulKind& kind_;
  SpecquantCudaProblem attributes_{};  // those fields of it that a node fixes
};

class CudaBranch : public CudaKernel {
 public:
  CudaBranch(const Api& api, const MatMulKind& kind, const KernelInfo* info) : CudaKernel(api, info), kind_(kind) {}

  void compute(KernelContext* context) const override {
    Inputs given(kind_.inputs());
    read(context, given);
    SpecquantCudaProblem p{};
    SpecquantCudaBranch b{};
    const auto check = [&](const SpecquantCudaProblem&) {
      b = {p.tokens, p.in_features, p.out_features, p.basis_rank, p.rank, p.half, p.x, p.basis, p.coef, nullptr, nullptr};
      return library_.check_branch(&b);
    };
    Shape shape = read_call(kind_, given, p, check, [](const Tensor&) { return true; });
    b.y = output(context, 0, shape);
    shape.back() = b.basis_rank;
    b.low = output(context, 1, shape);
    if (b.tokens == 0) return;
    int64_t bytes;
    if (const char* wrong = library_.branch_workspace(&b, &bytes)) throw std::runtime_error(wrong);
    run(context, bytes, [&](void* workspace, void* stream) { return library_.branch(&b, workspace, bytes, stream); });
  }

 private:
  const MatMulKind& kind_;
};

class CudaAttention : public CudaKernel {
 public:
  CudaAttention(const Api& api, const AttentionKind& kind, const KernelInfo* info)
      : CudaKernel(api, info), kind_(kind) {
    attributes_.half_cache = kind.kv_bits == 16;
    read_attributes(*this, kind, info, attributes_);
  }

  void compute(KernelContext* context) const override {
    SpecquantCudaAttention a = attributes_;
    Inputs given(kind_.inputs());
    read(context, given);
    const Shape cache = read_call(kind_, given, a);
    if (const char* wrong = library_.check_attention(&a)) throw std::runtime_error(wrong);
    a.y = output(context, 0, {a.batch, a.sequence, a.num_heads * a.head_dim});
    a.present_key = output(context, 1, cache);
    a.present_value = output(context, 2, cache);
    if (a.batch == 0) return;
    int64_t bytes;
    if (const char* wrong = library_.attention_workspace(&a, &bytes)) throw std::runtime_error(wrong);
    run(context, bytes,
        [&](void* workspace, void* stream) { return library_.attention(&a, workspace, bytes, stream); });
  }

 private:
  const AttentionKind& kind_;
  SpecquantCudaAttention attributes_{};
};

}  // namespace

std::unique_ptr<Kernel> make_cuda_matmul(const Api& api, const MatMulKind& kind, const KernelInfo* info) {
  if (!kind.weights) return std::make_unique<CudaBranch>(api, kind, info);
  return std::make_unique<CudaMatMul>(api, kind, info);
}

std::unique_ptr<Kernel> make_cuda_attention(const Api& api, const AttentionKind& kind, const KernelInfo* info) {
  return std::make_unique<CudaAttention>(api, kind, info);
}

}  // namespace specquant::ort
