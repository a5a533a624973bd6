// The C API of the matmul ops: checks, and the order of the kernels.
#include <algorithm>
#include <cstring>

#include "plan.h"

namespace {

using namespace specquant_cuda;

enum class Path { kCluster, kMatvec, kGemmSmall, kGemmLarge, kWgmmaSmall, kWgmmaLarge, kWgmmaWide, kAny };

// Of more tokens the first stage is sooner done by `prompt`, which takes 16 at once, where it takes the problem.
constexpr int kClusterTokens = 8;

// Which of gemm90's tiles takes the least time, in rounds of all multiprocessors. A round's cost was measured on an H100 (tokens
// of a tile, and what unpacking its weights takes): 27 us of 4096 features are 148.
Path wgmma_path(const Plan& plan, const Device& device) {
  const auto rounds = [&](int tokens, int outputs) {
    return ceil_div(ceil_div(plan.args.tokens, tokens) * ceil_div(plan.args.m, outputs), device.multiprocessors);
  };
  constexpr int of_fold[] = {84, 100}, of_channel[] = {106, 148}, of_multiples[] = {135, 185, 153};
  const int* const cost = plan.mode == kFold ? of_fold : plan.mode == kChannel ? of_channel : of_multiples;
  const int small_tiles = ceil_div(plan.args.tokens, 64) * ceil_div(plan.args.m, 256);
  const int parts = shares_of_tile(plan.args, small_tiles, device.multiprocessors);
  const int small = parts > 1 ? cost[0] / parts + 12 : rounds(64, 256) * cost[0];
  const int large = rounds(plan.mode == kFold ? 80 : 128, 256) * cost[1];
  if (plan.wide && rounds(256, 128) * cost[2] <= std::min(small, large)) return Path::kWgmmaWide;
  return large <= small ? Path::kWgmmaLarge : Path::kWgmmaSmall;
}

// The second stage: the one asked for, if it takes the problem, else the fastest that does.
const char* choose(const Plan& plan, const Device& device, const char* name, Path& path) {
  const int tokens = plan.args.tokens;
  const bool matvec = tokens <= plan.matvec_tokens;
  if (!name || !*name) {
    const int large_tiles = ceil_div(tokens, 128) * ceil_div(plan.args.m, 256);
    const bool large = large_tiles * 4 >= device.multiprocessors * 3;
    const bool cluster = plan.cluster && (tokens <= kClusterTokens || !plan.prompt);
    path = matvec        ? (cluster ? Path::kCluster : Path::kMatvec)
           : plan.gemm90 ? wgmma_path(plan, device)
           : plan.gemm   ? (large ? Path::kGemmLarge : Path::kGemmSmall)
                         : Path::kAny;
    return nullptr;
  }
  const struct {
    const char* name;
    Path path;
    bool fits;
  } known[] = {{"cluster", Path::kCluster, matvec && plan.cluster},
               {"matvec", Path::kMatvec, matvec},
               {"gemm_small", Path::kGemmSmall, plan.gemm},
               {"gemm_large", Path::kGemmLarge, plan.gemm},
               {"wgmma_small", Path::kWgmmaSmall, plan.gemm90},
               {"wgmma_large", Path::kWgmmaLarge, plan.gemm90},
               {"wgmma_wide", Path::kWgmmaWide, plan.wide},
               {"any", Path::kAny, true}};
  for (const auto& entry : known) {
    if (std::strcmp(entry.name, name) != 0) continue;
    path = entry.path;
    if (entry.fits) return nullptr;
    return say("path %s does not take these sizes; leave the choice to the library", name);
  }
  return "path must be cluster, matvec, gemm_small, gemm_large, wgmma_small, wgmma_large, wgmma_wide or any, or empty";
}

// First stage: levels and scales, low; in kernels of their own.
cudaError_t prepare_apart(const Plan& plan, const SpecquantCudaProblem& problem, float* rotated, cudaStream_t stream) {
  const Args& a = plan.args;
  cudaError_t error = cudaSuccess;
  const auto run = [&](cudaError_t result) {
    if (error == cudaSuccess) error = result;
  };
  if (problem.prologue) run(prologue(problem, rotated, stream));
  if (a.hadamard) run(problem.prologue ? rotate(a, rotated, 0, rotated, stream)
                                       : rotate(a, problem.x, problem.half, rotated, stream));
  if (a.rank && !plan.tensor_prepare) run(branch_any(a, stream));
  if (a.rank && plan.tensor_prepare) run(down(a, stream));
  if (plan.direct) {
    run(reduce(a, Reduce::kGroupLevels, stream));
    return error;
  }
  if (plan.two_pass) {
    run(reduce(a, Reduce::kRanges, stream));
    run(reduce(a, Reduce::kTokenLevels, stream));
    return error;
  }
  if (plan.tensor_prepare && a.rank) run(reduce(a, Reduce::kKeep, stream));
  const void* u = a.subtract ? a.reduced : a.x;
  run(quantize(a, u, a.subtract ? 0 : a.x_half, stream));
  return error;
}

}  // namespace

SPECQUANT_EXPORT int64_t specquant_cuda_problem_size(void) { return int64_t(sizeof(SpecquantCudaProblem)); }
SPECQUANT_EXPORT int64_t specquant_cuda_layout_size(void) { return int64_t(sizeof(SpecquantCudaLayout)); }

SPECQUANT_EXPORT const char* specquant_cuda_check(const SpecquantCudaProblem* problem) { return check(*problem); }

SPECQUANT_EXPORT const char* specquant_cuda_layout(const SpecquantCudaProblem* problem, SpecquantCudaLayout* layout) {
  if (const char* wrong = check(*problem)) return wrong;
  Device device{};
  if (const char* wrong = current(device)) return wrong;
  *layout = make_plan(*problem, device).layout;
  return nullptr;
}

SPECQUANT_EXPORT const char* specquant_cuda_workspace(const SpecquantCudaProblem* problem, int64_t* bytes) {
  // More multiprocessors only split the features further; unaligned arrays take slower kernels, which keep more.
  const Device widest[] = {{8, 0, 1 << 20}, {9, 0, 1 << 20}};
  static const char arena[32] __attribute__((aligned(16))) = {};
  *bytes = 0;
  for (const char* place : {arena, arena + 4}) {
    SpecquantCudaProblem p = *problem;
    p.x = p.qweight = p.scales = place;
    p.group_scales = arena;
    p.bias = p.norm = reinterpret_cast<const float*>(place);
    p.basis = p.coef = p.basis_rank ? place : nullptr;
    if (const char* wrong = check(p)) return wrong;
    for (const Device& device : widest) *bytes = std::max(*bytes, make_plan(p, device).layout.bytes);
  }
  return nullptr;
}

SPECQUANT_EXPORT const char* specquant_cuda_matmul(const SpecquantCudaProblem* problem, void* workspace,
                                                   int64_t workspace_bytes, void* stream, const char* path) {
  if (const char* wrong = check(*problem)) return wrong;
  Device device{};
  if (const char* wrong = current(device)) return wrong;
  Plan plan = make_plan(*problem, device);
  Path chosen;
  if (const char* wrong = choose(plan, device, path, chosen)) return wrong;
  if (problem->tokens == 0) return nullptr;
  if (!problem->x || !problem->y) return "x or y is missing";
  if (!workspace || workspace_bytes < plan.layout.bytes || reinterpret_cast<uintptr_t>(workspace) % 256) {
    return say("the workspace must have %lld bytes, aligned to 256", static_cast<long long>(plan.layout.bytes));
  }

  Args& a = plan.args;
  char* base = static_cast<char*>(workspace);
  const auto at = [base](int64_t offset) { return offset < 0 ? nullptr : base + offset; };
  float* rotated = reinterpret_cast<float*>(at(plan.layout.rotated));
  if (rotated) a.x = rotated;
  a.reduced = reinterpret_cast<float*>(at(plan.layout.reduced));
  a.partial = reinterpret_cast<float*>(at(plan.layout.partial));
  a.range = reinterpret_cast<float2*>(at(plan.range));
  a.low = reinterpret_cast<__half*>(at(plan.layout.low));
  a.low_factor = reinterpret_cast<float*>(at(plan.layout.low_factor));
  a.levels = at(plan.layout.levels);
  a.scale = reinterpret_cast<float*>(at(plan.layout.scale));
  a.order = chosen == Path::kWgmmaWide                                   ? kWideTiles
            : chosen == Path::kWgmmaSmall || chosen == Path::kWgmmaLarge ? kTiles
            : chosen == Path::kGemmSmall || chosen == Path::kGemmLarge ? kFragments
                                                                       : kRows;

  const cudaStream_t on = static_cast<cudaStream_t>(stream);
  const Source source{problem->x, problem->norm, problem->epsilon, problem->prologue, problem->half};
  cudaError_t error = chosen == Path::kCluster ? first_stage(a, source, on)
                      : plan.prompt            ? prompt(a, source, on)
                                               : prepare_apart(plan, *problem, rotated, on);
  if (error == cudaSuccess) {
    switch (chosen) {
      case Path::kCluster:
      case Path::kMatvec: error = matvec(a, plan.mode, device.multiprocessors, on); break;
      case Path::kGemmSmall: error = gemm(a, plan.mode, false, on); break;
      case Path::kGemmLarge: error = gemm(a, plan.mode, true, on); break;
      case Path::kWgmmaSmall: error = gemm90(a, plan.mode, Tile90::kSmall, device.multiprocessors, on); break;
      case Path::kWgmmaLarge: error = gemm90(a, plan.mode, Tile90::kLarge, device.multiprocessors, on); break;
      case Path::kWgmmaWide: error = gemm90(a, plan.mode, Tile90::kWide, device.multiprocessors, on); break;
      case Path::kAny: error = multiply_any(a, on); break;
    }
  }
  return error == cudaSuccess ? nullptr : failed("a CUDA kernel did not start", error);
}
