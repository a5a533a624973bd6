// The second stage for every shape: a thread per number of y, no tensor cores. Slow, and the oracle of the others.
#include "gate.cuh"

namespace specquant_cuda {
namespace {

constexpr int kThreads = 128;

// Σ q · u over features first … first + count − 1, of float16 activations.
__device__ float dot_halves(const uint8_t* weights, const __half* u, int first, int count) {
  float sum = 0.0f;
  for (int i = first; i < first + count; ++i) {
    const int byte = weights[static_cast<int64_t>(i / kBlock) * 64 + i % 4], nibble = i % kBlock / 4 ? byte >> 4 : byte & 15;
    sum = fmaf(static_cast<float>(nibble - 8), __half2float(u[i]), sum);
  }
  return sum;
}

// Σ q · level over blocks first … first + count − 1.
__device__ int dot_levels(const uint8_t* weights, const int8_t* levels, int first, int count) {
  int sum = 0;
  for (int i = first; i < first + count; ++i) {
    const uint32_t word = *reinterpret_cast<const uint32_t*>(weights + static_cast<int64_t>(i) * 64);
    const int2 a = *reinterpret_cast<const int2*>(levels + static_cast<int64_t>(i) * kBlock);
    sum = __dp4a(static_cast<int>(word & 0x0F0F0F0F), a.x, sum);
    sum = __dp4a(static_cast<int>(word >> 4 & 0x0F0F0F0F), a.y, sum);
    sum -= 8 * __dp4a(0x01010101, a.x, __dp4a(0x01010101, a.y, 0));
  }
  return sum;
}

// An output of a token, residual included.
__device__ float output_of(const Args& args, int token, int output) {
  const int blocks = ceil_div(args.n, kBlock);
  const uint8_t* weights =
      args.qweight + static_cast<int64_t>(output / kPanel) * blocks * 64 + output % kPanel * 4;
  float y = 0.0f;
  if (args.bits == 16) {
    const __half* u = static_cast<const __half*>(args.levels) + static_cast<int64_t>(token) * args.kp;
    for (int group = 0; group < args.n / args.weight_group; ++group)
      y = fmaf(__half2float(args.scales[static_cast<int64_t>(group) * args.m + output]),
               dot_halves(weights, u, group * args.weight_group, args.weight_group), y);
    y *= args.scale[token];
  } else {
    const int8_t* levels = static_cast<const int8_t*>(args.levels) + static_cast<int64_t>(token) * args.kp;
    for (int s = 0; s < args.segments; ++s) {
      const int count = ceil_div(args.segment, kBlock);
      const int sum = dot_levels(weights, levels, s * count, count);
      const int64_t at = static_cast<int64_t>(s) * args.tp + token;
      const int64_t group = static_cast<int64_t>(s) * args.segment / args.weight_group;
      const float scale = args.scale[at] / args.level_unit * __half2float(args.scales[group * args.m + output]);
      y = fmaf(scale, static_cast<float>(sum), y);
    }
  }
  if (args.rank) {
    const __half* low = args.low + static_cast<int64_t>(token) * 2 * args.rp;
    float branch = 0.0f;
    for (int j = 0; j < args.rank; ++j)
      branch = fmaf(__half2float(low[j]) + __half2float(low[args.rp + j]),
                    __half2float(args.coef[static_cast<int64_t>(j) * args.m + output]), branch);
    y = fmaf(branch, args.low_factor[token], y);
  }
  if (args.bias) y += args.bias[output];
  return args.residual ? y + residual_at(args, static_cast<int64_t>(token) * args.m + output) : y;
}

__global__ void __launch_bounds__(kThreads) any_kernel(const Args args) {
  const int column = blockIdx.x * kThreads + threadIdx.x;
  if (column >= args.width) return;
  for (int token = blockIdx.y; token < args.tokens; token += gridDim.y) {
    float y = output_of(args, token, args.gate ? 2 * column : column);
    if (args.gate) y = gated(y, output_of(args, token, 2 * column + 1), args.gate);
    store_output(args, static_cast<int64_t>(token) * args.width + column, y);
  }
}

}  // namespace

cudaError_t multiply_any(const Args& args, cudaStream_t stream) {
  const dim3 grid(ceil_div(args.width, kThreads), min(args.tokens, 65535));
  any_kernel<<<grid, kThreads, 0, stream>>>(args);
  return cudaGetLastError();
}

}  // namespace specquant_cuda
