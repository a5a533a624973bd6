// The product of up to 32 tokens, bound by how fast the weights come from memory.
#include "gate.cuh"
#include "launch.h"
#include "matvec.cuh"

namespace specquant_cuda {
namespace {

template <Mode mode, int frags, int warps, bool staged>
__global__ void __launch_bounds__(warps * 32) matvec_kernel(const Args args) {
  using M = Matvec<mode, frags, warps, staged>;
  extern __shared__ uint4 kept[];
  __shared__ float4 shares4[warps][M::kTokens * kOutputs / 4];
  M work(args, reinterpret_cast<char*>(kept));
  const int steps = args.kp / kStep;

  // The first weights are under way before the first stage is done.
  typename M::Step loaded[M::kDepth];
#pragma unroll
  for (int i = 0; i < M::kDepth; ++i)
    if (work.warp + i * warps < steps) work.load_weights(loaded[i], work.warp + i * warps);
  uint2 coef[4] = {};
  if (work.warp < work.branch_shares()) work.load_coef(coef, work.warp);
  let_next_start();
  wait_for_previous();
  work.stage();
  for (int first = work.warp; first < steps; first += warps * M::kDepth) {
#pragma unroll
    for (int i = 0; i < M::kDepth; ++i)
      if (first + i * warps < steps) work.load_activations(loaded[i], first + i * warps);
#pragma unroll
    for (int i = 0; i < M::kDepth; ++i) {
      const int step = first + i * warps, next = step + M::kDepth * warps;
      if (step < steps) work.add(loaded[i]);
      if (next < steps) work.load_weights(loaded[i], next);
    }
  }

  work.finish(coef, shares4[work.warp]);
  __syncthreads();

  for (int i = threadIdx.x; i < min(M::kTokens, args.tokens) * kOutputs; i += warps * 32) {
    const int token = i / kOutputs, place = work.first_output + i % kOutputs, output = min(place, args.m - 1);
    float y = 0.0f;
    for (int w = 0; w < warps; ++w) y += reinterpret_cast<const float*>(shares4[w])[i];
    if (args.bias) y += args.bias[output];
    if (args.residual) y += residual_at(args, static_cast<int64_t>(token) * args.m + output);
    store_outputs(args, token, output, y, place < args.m);
  }
}

template <Mode mode, int frags, int warps>
cudaError_t start(const Args& args, cudaStream_t stream) {
  const dim3 blocks(ceil_div(args.m, kOutputs));
  const size_t bytes = Staged<mode, frags>(args).bytes;
  if (frags > 1 || bytes > kMostStaged)
    return launch_early(matvec_kernel<mode, frags, warps, false>, blocks, warps * 32, 0, args.early, stream, args);
  const auto kernel = matvec_kernel<mode, frags, warps, frags == 1>;
  static Known known;
  const cudaError_t error = allow(kernel, kMostStaged, false, known);
  if (error != cudaSuccess) return error;
  return launch_early(kernel, blocks, warps * 32, bytes, args.early, stream, args);
}

template <Mode mode>
cudaError_t launch(const Args& args, int multiprocessors, cudaStream_t stream) {
  if (args.tokens <= 8) {
    // All blocks at once, with about 16 warps on a multiprocessor: more outputs, fewer warps for each.
    const int blocks = ceil_div(args.m, kOutputs) / multiprocessors;
    return blocks >= 3   ? start<mode, 1, 4>(args, stream)
           : blocks >= 1 ? start<mode, 1, 8>(args, stream)
                         : start<mode, 1, 16>(args, stream);
  }
  if (args.tokens <= 16) return start<mode, 2, 8>(args, stream);
  if constexpr (mode == kFold || mode == kHalf) return start<mode, 4, 8>(args, stream);
  return cudaErrorInvalidValue;  // plan.cc sends no more tokens here
}

}  // namespace

cudaError_t matvec(const Args& args, Mode mode, int multiprocessors, cudaStream_t stream) {
  if (takes_one_token(args, mode, multiprocessors)) return one_token(args, mode, multiprocessors, stream);
  switch (mode) {
    case kFold: return launch<kFold>(args, multiprocessors, stream);
    case kChannel: return launch<kChannel>(args, multiprocessors, stream);
    case kMultiples: return launch<kMultiples>(args, multiprocessors, stream);
    default: return launch<kHalf>(args, multiprocessors, stream);
  }
}

}  // namespace specquant_cuda
