// The C API of sampling: checks, and how a row's vocabulary is shared.
#include <algorithm>

#include "api.h"
#include "sample_args.h"
#include "specquant_cuda.h"

namespace {

using namespace specquant_cuda;

const char* check(const SpecquantCudaSample& p) {
  if (p.rows < 0 || p.rows > 65535) return "the number of rows must be 0 to 65535";
  if (p.vocab < 1 || p.vocab > (int64_t(1) << 24)) return "the vocabulary must have 1 to 16777216 words";
  if (p.stride < p.vocab) return "the stride must be the vocabulary or more";
  if (p.top_k < 0) return "top_k must be 0 or more";
  if (p.width < 0) return "the mask's width must be 0 or more";
  if (p.half != 0 && p.half != 1) return "half must be 0 or 1";
  if (!(p.temperature >= 0)) return "the temperature must be 0 or more";
  return nullptr;
}

}  // namespace

SPECQUANT_EXPORT int64_t specquant_cuda_sample_size(void) { return int64_t(sizeof(SpecquantCudaSample)); }

SPECQUANT_EXPORT const char* specquant_cuda_sample_workspace(const SpecquantCudaSample* problem, int64_t* bytes) {
  if (const char* wrong = check(*problem)) return wrong;
  *bytes = (int64_t(sizeof(SampleRow)) * problem->rows + 255) / 256 * 256;
  return nullptr;
}

SPECQUANT_EXPORT const char* specquant_cuda_sample(const SpecquantCudaSample* problem, void* workspace,
                                                   int64_t workspace_bytes, void* stream) {
  const SpecquantCudaSample& p = *problem;
  int64_t bytes = 0;
  if (const char* wrong = specquant_cuda_sample_workspace(problem, &bytes)) return wrong;
  Device device{};
  if (const char* wrong = current(device)) return wrong;
  if (p.rows == 0) return nullptr;
  if (!p.logits || !p.ids || !p.results || (p.temperature > 0 && !p.uniforms))
    return "logits, uniforms, ids or results are missing";
  if (!workspace || workspace_bytes < bytes || reinterpret_cast<uintptr_t>(workspace) % 256)
    return say("the workspace must have %lld bytes, aligned to 256", static_cast<long long>(bytes));
  const int vocab = int(p.vocab), slice = std::max(kSampleSlice, (vocab + kSampleBlocks - 1) / kSampleBlocks);
  const int blocks = (vocab + slice - 1) / slice;
  SampleArgs args{};
  args.vocab = vocab, args.slice = slice;
  args.top_k = p.temperature > 0 ? int(std::min(p.top_k, p.vocab)) : 0;
  args.temperature = p.temperature, args.half = p.half, args.stride = p.stride, args.width = p.width;
  args.logits = p.logits, args.uniforms = p.uniforms, args.results = p.results;
  args.ids = p.ids, args.position_ids = p.position_ids, args.attention_mask = p.attention_mask;
  args.row = static_cast<SampleRow*>(workspace);
  const cudaError_t error =
      sample(args, dim3(unsigned(blocks), unsigned(p.rows)), device.major >= 9, static_cast<cudaStream_t>(stream));
  return error == cudaSuccess ? nullptr : failed("a CUDA kernel did not start", error);
}
