// Token ids from logits, and what the next step of decoding is given.
//
// A block takes a slice of a row's vocabulary, and the last one of the row to be done puts together what all found: one
// kernel for greedy. top_k: the k-th largest is found 11 bits at a time by histograms of order-preserving keys, a kernel
// each. Then the weights of what is kept are summed, and the last block goes down to the token at the uniform number:
// slice, thread, logit. Sums are float64, in the same order every time.
#include "launch.h"
#include "ptx.cuh"
#include "sample_args.h"

namespace specquant_cuda {
namespace {

constexpr int kThreads = kSampleThreads, kBins = kSampleBins, kWarps = kThreads / 32;
constexpr int kDigit = 11;                 // bits of a histogram; 2^kDigit bins
constexpr int kBinsEach = kBins / kThreads;
constexpr int kTeam = 16;                  // numbers that one thread goes through: kTeam² = kThreads
constexpr int kNone = 0x7FFFFFFF;

__device__ __forceinline__ float float_of(__half v) { return __half2float(v); }
__device__ __forceinline__ float float_of(float v) { return v; }

template <class X>
__device__ __forceinline__ float logit(const SampleArgs& args, int index) {
  return float_of(static_cast<const X*>(args.logits)[blockIdx.y * args.stride + index]);
}

__device__ __forceinline__ bool finite(float v) { return (__float_as_uint(v) & 0x7F800000u) != 0x7F800000u; }

// Unsigned numbers in the order of floats, and back.
__device__ __forceinline__ unsigned key_of(float v) {
  const unsigned bits = __float_as_uint(v);
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}
__device__ __forceinline__ float value_of(unsigned key) {
  return __uint_as_float(key >> 31 ? key & 0x7FFFFFFFu : ~key);
}

struct Found {
  float largest;
  int token;
};

// The larger, of equal ones the first.
__device__ __forceinline__ Found better(Found a, Found b) {
  return b.largest > a.largest || (b.largest == a.largest && b.token < a.token) ? b : a;
}

// Over the threads of a block, for thread 0.
__device__ Found best_of_block(Found mine) {
  __shared__ float values[kWarps];
  __shared__ int tokens[kWarps];
  for (int d = 16; d > 0; d /= 2)
    mine = better(mine, Found{__shfl_xor_sync(~0u, mine.largest, d), __shfl_xor_sync(~0u, mine.token, d)});
  __syncthreads();  // what an earlier call left has been read
  if (threadIdx.x % 32 == 0) values[threadIdx.x / 32] = mine.largest, tokens[threadIdx.x / 32] = mine.token;
  __syncthreads();
  if (threadIdx.x == 0)
    for (int w = 1; w < kWarps; ++w) mine = better(mine, Found{values[w], tokens[w]});
  return mine;
}

// Whether this block is the last of its row to come here: it then sees what the others wrote, by __ldcg.
__device__ bool is_last(SampleRow& row) {
  __shared__ int last;
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) {
    last = atomicAdd(&row.arrived, 1) == static_cast<int>(gridDim.x) - 1;
    if (last) row.arrived = 0;
    __threadfence();
  }
  __syncthreads();
  return last;
}

// Thread 0 of a row's last block: the id to the host, and to the next step. −1: logits that are not finite.
__device__ void finish(const SampleArgs& args, int token) {
  const int row = blockIdx.y;
  args.results[row] = token;
  args.ids[row] = token < 0 ? 0 : token;  // the step that follows, which nobody will look at, needs a token, too
  if (!args.position_ids) return;
  const int64_t position = args.position_ids[row] + 1;
  args.position_ids[row] = position;
  if (args.attention_mask && position < args.width) args.attention_mask[row * args.width + position] = 1;
}

__device__ void clear(int (&counts)[kBins]) {
  for (int i = threadIdx.x; i < kBins; i += kThreads) counts[i] = 0;
  __syncthreads();
}

__device__ void add_to_row(SampleRow& row, const int (&counts)[kBins]) {
  __syncthreads();
  for (int i = threadIdx.x; i < kBins; i += kThreads)
    if (counts[i]) atomicAdd(row.histogram + i, counts[i]);
}

// The last block: the bin of the row's `left`-th largest, counted from above, becomes the next `bits` of its key. Leaves
// the histogram empty.
__device__ void narrow(SampleRow& row, int bits, unsigned prefix, int left) {
  __shared__ int sums[2][kThreads];
  int mine[kBinsEach], sum = 0;
  const int highest = kBins - 1 - static_cast<int>(threadIdx.x) * kBinsEach;
  for (int i = 0; i < kBinsEach; ++i) {
    sum += mine[i] = __ldcg(row.histogram + highest - i);
    row.histogram[highest - i] = 0;
  }
  int from = 0, total = sum;
  sums[0][threadIdx.x] = sum;
  for (int d = 1; d < kThreads; d *= 2, from ^= 1) {
    __syncthreads();
    if (static_cast<int>(threadIdx.x) >= d) total += sums[from][threadIdx.x - d];
    sums[from ^ 1][threadIdx.x] = total;
  }
  int above = total - sum;
  if (above >= left || total < left) return;
  for (int i = 0; i < kBinsEach; ++i) {
    if (above + mine[i] >= left) {
      row.prefix = prefix << bits | static_cast<unsigned>(highest - i);
      row.left = left - above;
      return;
    }
    above += mine[i];
  }
}

// The largest logit and whether all are finite; greedy ends here. With top_k also its first digit.
template <class X>
__global__ void __launch_bounds__(kThreads) largest_kernel(const SampleArgs args) {
  __shared__ int counts[kBins];
  let_next_start();
  SampleRow& row = args.row[blockIdx.y];
  const int first = static_cast<int>(blockIdx.x) * args.slice, end = min(first + args.slice, args.vocab);
  // Asked for now, since it may lie in the host's memory.
  double uniform = 0.0;
  const bool draws = args.temperature > 0.0f && blockIdx.x == 0 && threadIdx.x == 0;
  if (draws) uniform = args.uniforms[blockIdx.y];
  if (args.top_k) clear(counts);
  Found best{-INFINITY, kNone};
#pragma unroll 4
  for (int i = first + static_cast<int>(threadIdx.x); i < end; i += kThreads) {
    const float v = logit<X>(args, i);
    best = better(best, finite(v) ? Found{v, i} : Found{INFINITY, -1});
    if (args.top_k) atomicAdd(counts + (key_of(v) >> (32 - kDigit)), 1);
  }
  if (args.top_k) add_to_row(row, counts);
  best = best_of_block(best);
  SamplePart& part = row.part[blockIdx.x];
  if (threadIdx.x == 0) part.largest = best.largest, part.token = best.token;
  if (draws) row.uniform = uniform;
  if (!is_last(row)) return;
  best = Found{-INFINITY, kNone};
  const SamplePart& theirs = row.part[threadIdx.x];
  if (threadIdx.x < gridDim.x) best = Found{__ldcg(&theirs.largest), __ldcg(&theirs.token)};
  best = best_of_block(best);
  if (threadIdx.x == 0) {
    row.largest = best.largest;
    row.token = best.token;
    if (args.temperature == 0.0f) finish(args, best.token);
  }
  if (args.top_k) narrow(row, kDigit, 0, args.top_k);
}

// Another digit: the `bits` above the last `shift` of those whose key begins as the k-th largest does.
template <class X>
__global__ void __launch_bounds__(kThreads) digit_kernel(const SampleArgs args, int shift, int bits) {
  __shared__ int counts[kBins];
  let_next_start();
  clear(counts);
  wait_for_previous();
  SampleRow& row = args.row[blockIdx.y];
  const unsigned prefix = row.prefix;
  const int left = row.left;
  const int first = static_cast<int>(blockIdx.x) * args.slice, end = min(first + args.slice, args.vocab);
  for (int i = first + static_cast<int>(threadIdx.x); i < end; i += kThreads) {
    const unsigned key = key_of(logit<X>(args, i)) >> shift;
    if (key >> bits == prefix) atomicAdd(counts + (key & ((1u << bits) - 1)), 1);
  }
  add_to_row(row, counts);
  if (is_last(row)) narrow(row, bits, prefix, left);
}

// What runtime/sampling.py makes of a logit: 0 for what top_k leaves out.
struct Weight {
  float largest, temperature, least;
  __device__ float scaled(float v) const { return __fdiv_rn(__fsub_rn(v, largest), temperature); }
  __device__ float operator()(float v) const {
    const float x = scaled(v);
    return x >= least ? expf(x) : 0.0f;
  }
};

// The first of `count` numbers with which their sum exceeds `target`, from which the sum before it is then taken. Where
// rounding has it that none does, the last: never one that is 0, if there is another.
template <class Number>
__device__ int pick(Number number, int count, double& target) {
  double sum = 0.0, before = 0.0;
  int chosen = 0;
  for (int i = 0; i < count; ++i) {
    const double next = number(i);
    if (!(next > 0.0)) continue;
    chosen = i, before = sum, sum += next;
    if (sum > target) break;
  }
  target -= before;
  return chosen;
}

// Of a number of each thread: their sum; where `share` of it is reached (thread 0), and what is left of that within.
struct Place {
  double total, rest;
  int thread;
};
__device__ Place place_of(double mine, double share, bool relative) {
  __shared__ double numbers[kThreads], teams[kTeam];
  __syncthreads();  // what an earlier call left has been read
  numbers[threadIdx.x] = mine;
  __syncthreads();
  if (threadIdx.x < kTeam) {
    double sum = 0.0;
    for (int i = 0; i < kTeam; ++i) sum += numbers[threadIdx.x * kTeam + i];
    teams[threadIdx.x] = sum;
  }
  __syncthreads();
  Place place{0.0, share, 0};
  if (threadIdx.x) return place;
  for (int i = 0; i < kTeam; ++i) place.total += teams[i];
  if (relative) place.rest *= place.total;
  const double* from = teams;
  const auto number = [&](int i) { return from[i]; };
  const int team = pick(number, kTeam, place.rest);
  from = numbers + team * kTeam;
  place.thread = team * kTeam + pick(number, kTeam, place.rest);
  return place;
}

// The weights' sum, and the token at the uniform number's share of it.
template <class X>
__global__ void __launch_bounds__(kThreads) draw_kernel(const SampleArgs args, int unknown) {
  __shared__ Place place;
  wait_for_previous();
  SampleRow& row = args.row[blockIdx.y];
  Weight weight{row.largest, args.temperature, -INFINITY};
  if (args.top_k) {  // of float16 logits the last bits of all keys are alike: those of the key's sign
    const unsigned prefix = row.prefix << unknown;
    weight.least = weight.scaled(value_of(prefix >> 31 ? prefix : prefix | ((1u << unknown) - 1)));
  }
  const int first = static_cast<int>(blockIdx.x) * args.slice, end = min(first + args.slice, args.vocab);
  double sum = 0.0;
  for (int i = first + static_cast<int>(threadIdx.x); i < end; i += kThreads) sum += weight(logit<X>(args, i));
  Place found = place_of(sum, 0.0, true);
  if (threadIdx.x == 0) row.part[blockIdx.x].sum = found.total;
  if (!is_last(row)) return;
  if (row.token < 0) {
    if (threadIdx.x == 0) finish(args, -1);
    return;
  }
  found = place_of(threadIdx.x < gridDim.x ? __ldcg(&row.part[threadIdx.x].sum) : 0.0, row.uniform, true);
  if (threadIdx.x == 0) place = found;
  __syncthreads();
  // The chosen slice again, in order: each thread some neighbours.
  const int start = place.thread * args.slice, stop = min(start + args.slice, args.vocab);
  const int each = (args.slice + kThreads - 1) / kThreads;
  const int mine = start + static_cast<int>(threadIdx.x) * each;
  sum = 0.0;
  for (int i = mine; i < min(mine + each, stop); ++i) sum += weight(logit<X>(args, i));
  found = place_of(sum, place.rest, false);
  if (threadIdx.x) return;
  const int from = start + found.thread * each;
  const auto number = [&](int i) { return static_cast<double>(weight(logit<X>(args, from + i))); };
  finish(args, from + pick(number, min(each, stop - from), found.rest));
}

template <class X>
cudaError_t launch(const SampleArgs& args, dim3 grid, bool early, cudaStream_t stream) {
  // What comes before on the stream knows nothing of kernels that start early.
  cudaError_t error = launch_early(largest_kernel<X>, grid, kThreads, 0, false, stream, args);
  if (args.temperature == 0.0f || error != cudaSuccess) return error;
  int unknown = 32 - kDigit;
  // A float16 has 10 bits of mantissa: two digits hold sign, exponent and mantissa of its float.
  for (const int bits : {kDigit, 32 - 2 * kDigit}) {
    if (!args.top_k || (sizeof(X) == 2 && bits != kDigit)) break;
    unknown -= bits;
    error = launch_early(digit_kernel<X>, grid, kThreads, 0, early, stream, args, unknown, bits);
    if (error != cudaSuccess) return error;
  }
  return launch_early(draw_kernel<X>, grid, kThreads, 0, early, stream, args, unknown);
}

}  // namespace

cudaError_t sample(const SampleArgs& args, dim3 grid, bool early, cudaStream_t stream) {
  return args.half ? launch<__half>(args, grid, early, stream) : launch<float>(args, grid, early, stream);
}

}  // namespace specquant_cuda
