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
  __shared__ float4 shares4[warps][M::kTokens * kOutputs / 4];  // kChannel: int32
  __shared__ float4 branch4[mode == kChannel ? warps : 1][M::kTokens * kOutputs / 4];
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

  work.branch(coef, mode == kChannel ? branch4[work.warp] : shares4[work.warp]);
#pragma unroll
  for (int i = 0; i < frags * 2; ++i) {
    const int f = i / 2, e = i % 2, token = 8 * f + 2 * work.t + e;
    float4& to = shares4[work.warp][token * (kOutputs / 4) + work.g];
    float4 v = make_float4(work.acc[0][f][e], work.acc[0][f][2 + e], work.acc[1][f][e], work.acc[1][f][2 + e]);
    if constexpr (mode != kChannel) {
      const float factor = mode == kHalf && token < args.tokens ? args.scale[token] : 1.0f;
      v = make_float4(fmaf(v.x, factor, to.x), fmaf(v.y, factor, to.y), fmaf(v.z, factor, to.z), fmaf(v.w, factor, to.w));
    }
    to = v;
  }
  __syncthreads();

  for (int i = threadIdx.x; i < min(M::kTokens, args.tokens) * kOutputs; i += warps * 32) {
    const int token = i / kOutputs, place = work.first_output + i % kOutputs, output = min(place, args.m - 1);
    float y = 0.0f;
    if constexpr (mode == kChannel) {
      int sum = 0;
      for (int w = 0; w < warps; ++w) {
        sum += reinterpret_cast<const int*>(shares4[w])[i];
        y += reinterpret_cast<const float*>(branch4[w])[i];
      }
      sum >>= 4;  // a multiple of 16: the weights were
      y += args.scale[token] * __half2float(args.scales[output]) * static_cast<float>(sum);
    } else {
      for (int w = 0; w < warps; ++w) y += reinterpret_cast<const float*>(shares4[w])[i];
    }
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
  if constexpr (mode != kChannel) return start<mode, 4, 8>(args, stream);
  return cudaErrorInvalidValue;  // plan.cc sends no more tokens here
}

}  // namespace

cudaError_t matvec(const Args& args, Mode mode, int multiprocessors, cudaStream_t stream) {
  if (takes_one_token(args, mode, multiprocessors)) return one_token(args, mode, multiprocessors, stream);
  switch (mode) {
    case kFold: return launch<kFold>(args, multiprocessors, stream);
    case kChannel: return launch<kChannel>(args, multiprocessors, stream);
    default: return launch<kHalf>(args, multiprocessors, stream);
  }
}

}  // namespace specquant_cuda
