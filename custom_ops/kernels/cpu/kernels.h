// The CPU kernels of the op set (docs/ops.md) on raw pointers and sizes: no framework header here or below.
//
// Symbols: N in-features, M out-features, r columns of the basis, T tokens, G weight groups, S segments,
// P = ceil(M / 16) panels, Q = ceil(N / 8) blocks. All arrays are contiguous, row by row.
#pragma once

#include <cstddef>
#include <cstdint>

namespace specquant {

constexpr int32_t kAbi = 10;  // raised when Problem, Attention, or an exported function, changes

// What becomes of x before anything else, row by row in float32.
enum Prologue : int32_t {
  kNoPrologue,
  kRmsNorm,  // x / √(mean(x²) + epsilon) · norm
};

// What becomes of pairs of outputs last: y[i] = act(v[2i]) · v[2i + 1].
enum Gate : int32_t {
  kNoGate,
  kSiluGate,
  kGeluGate,  // by tanh
};

// One call of an op. SpectralBranch: qweight is null; Int4ResidualMatMul: basis is null; SpecQuantMatMul: neither.
// Passed across the C ABI as it is (custom_ops/library.py mirrors it), hence the plain types.
struct Problem {
  int64_t tokens;        // T >= 0
  int64_t in_features;   // N
  int64_t out_features;  // M
  int64_t basis_rank;    // r, the columns stored
  int64_t rank;          // columns used, 0..r
  int64_t group_size;    // features per weight scale; 0: all N
  int64_t act_group;     // features per activation scale; 0: all N
  int64_t hadamard;      // features of a Hadamard transform that x passes through first; 0: none
  int32_t act_bits;      // 2..8, or 16: activations are not quantised
  int32_t subtract;      // 1: the branch's part of x is removed before it is quantised
  int32_t half;          // 1: x, y and low are float16; 0: float32
  int32_t prologue;      // a Prologue
  int32_t gate;          // a Gate; with one, y has M / 2 columns
  float act_clip;        // share of a group's range that the levels span, in (0, 1]
  float epsilon;         // of kRmsNorm
  float within;          // 0, or what outputs may lie below the largest before the second half of the features is left out
  const void* x;         // [T, N]
  const uint16_t* basis;   // float16 [N, r]
  const uint16_t* coef;    // float16 [r, M]
  const uint8_t* qweight;  // [P, Q, 64], two nibbles a byte
  const uint8_t* group_scales;  // [P, G, 8], 16 nibbles: 1 less than a group's scale (docs/ops.md, "Packed weights")
  const uint16_t* scales;  // float16 [M]
  const float* bias;       // [M], or null
  const float* norm;       // [N], of kRmsNorm
  const void* residual;    // [T, M], added to y; or null, as it is with a gate
  void* y;                 // [T, M], with a gate [T, M / 2]
  void* low;               // [T, r], or null when nobody asks for it
};

// How tasks reach a thread pool: run(context, task, argument, count) calls task(argument, i) for every i < count
// in any order, on any threads, and returns when all are done. run == null: one after another, on this thread.
// Where self is there, it gives the number of the thread that calls it, 0 being who called `run`, below `threads`.
struct ThreadPool {
  void (*run)(void* context, void (*task)(void* argument, size_t index), void* argument, size_t count) = nullptr;
  void* context = nullptr;
  int threads = 0;
  int (*self)() = nullptr;
  double callers_share = 0.5;     // of what is shared out beforehand
  const Problem* next = nullptr;  // what will probably come next, of few tokens
};

// Calls of so many tokens wait for memory: their weights are read ahead.
constexpr int64_t kFewTokens = 8;

struct Kernels;  // the steps, compiled for one instruction set (steps.h)

// Sizes, attributes and pointers of a problem, before anything is read: null if sound, else one line that says
// what is wrong. y and low are not looked at: they may be allocated afterwards. That the arrays have the sizes that
// Problem states is the caller's to check.
const char* check(const Problem& problem);

// Features that share one weight scale and one activation scale: the smaller non-zero group, or N.
int64_t segment_length(const Problem& problem);

// Bytes that `matmul` needs as scratch, for a problem that passed `check`. The start may have any alignment.
size_t scratch_bytes(const Problem& problem);

// y (and low) of the problem. Same bits for every pool and every number of threads.
void matmul(const Kernels& kernels, const Problem& problem, const ThreadPool& pool, void* scratch);

// Asks for the weights that thread `number` of the pool will read first in a call of few tokens, at most `bytes` of them,
// which become fewer, until stop(argument): then false. Addresses may be stale: nothing is read.
bool read_ahead(const Problem& problem, const ThreadPool& pool, int number, int64_t& bytes, bool (*stop)(const void*),
                const void* argument);

// Every instruction set that was compiled, slowest first, ended by null; `supported` asks this CPU and its system.
extern const Kernels* const kCompiled[];
bool supported(const Kernels& kernels);

// The kernels called `name`, or the fastest if name is null or empty. Null if there are none, with one line in
// `error` (of `size` bytes).
const Kernels* select(const char* name, char* error, size_t size);

}  // namespace specquant
