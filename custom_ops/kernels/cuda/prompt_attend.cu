// Launches of prompt_attend.cuh. Compiled for sm_90a alone: attention_api.cc sends no other GPU here.
#include "launch.h"
#include "prompt_attend.cuh"

namespace specquant_cuda {
namespace {

template <int d>
cudaError_t start(const AttentionArgs& a, int first_item, int items, cudaStream_t stream) {
  using P = Prompt90<d, 2, true>;
  const auto kernel = prompt_attend_kernel<P>;
  static Known known;
  const cudaError_t error = allow(kernel, P::kShared, false, known);
  if (error != cudaSuccess) return error;
  const dim3 grid(items * a.group, ceil_div(a.sequence, kPromptRows));
  return launch_early(kernel, grid, P::kThreads, P::kShared, a.early, stream, a, first_item);
}

}  // namespace

cudaError_t prompt_attend(const AttentionArgs& a, int first_item, int items, cudaStream_t stream) {
  return a.d == 64 ? start<64>(a, first_item, items, stream) : start<128>(a, first_item, items, stream);
}

}  // namespace specquant_cuda
