// The second stage for every shape: a thread per number of y, no tensor cores. Slow, and the oracle of the others.
#include "gate.cuh"
#include "unpack.cuh"

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
  const uint8_t* of_groups = args.group_scales + static_cast<int64_t>(output / kPanel) * args.groups * 8;
  const int run = min(args.group, args.segment), blocks_of_run = ceil_div(run, kBlock);
  float y = 0.0f;
  for (int i = 0; i < args.n / run; ++i) {
    const int64_t first = static_cast<int64_t>(i) * run;
    const uint2 raw = *reinterpret_cast<const uint2*>(of_groups + first / args.group * 8);
    const float c = GroupScales(raw, output % kPanel / 4).as_float(output % 4);
    if (args.bits == 16) {
      const __half* u = static_cast<const __half*>(args.levels) + static_cast<int64_t>(token) * args.kp;
      y = fmaf(c * args.scale[token], dot_halves(weights, u, static_cast<int>(first), run), y);
    } else {
      const int8_t* levels = static_cast<const int8_t*>(args.levels) + static_cast<int64_t>(token) * args.kp;
      const int sum = dot_levels(weights, levels, i * blocks_of_run, blocks_of_run);
      y = fmaf(c * args.scale[first / args.segment * args.tp + token], static_cast<float>(sum), y);
    }
  }
  y *= __half2float(args.scales[output]);
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
