// The C API of SpectralBranch: checks, the workspace, and the plan.
#include <algorithm>

#include "api.h"
#include "branch_args.h"
#include "bounds.h"

namespace {

using namespace specquant_cuda;

bool aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

const char* check(const SpecquantCudaBranch& p) {
  if (p.in_features < 1 || p.in_features > kMostFeatures) return "in-features must be 1 to 524288";
  if (p.out_features < 1 || p.out_features > kMostOutputs) return "out-features must be 1 to 4194304";
  if (p.tokens < 0 || p.tokens > kMostTokens) return "the number of tokens must be 0 to 4194304";
  if (p.basis_rank < 0 || p.basis_rank > std::min(p.in_features, kMostBasis))
    return "the basis must have 0 to in-features columns, at most 4096";
  if (p.rank < 0 || p.rank > p.basis_rank) return "rank must be 0 to the columns of the basis";
  if (p.half != 0 && p.half != 1) return "half must be 0 or 1";
  return nullptr;
}

// Shares of the features in `down`, where there are so many multiprocessors.
int splits_of(const SpecquantCudaBranch& p, int64_t multiprocessors) {
  const int tiles = ceil_div(int(std::max<int64_t>(p.tokens, 1)), kDownTokens);
  const int64_t chunks = ceil_div(int(p.in_features), kDownChunk);
  return int(std::clamp<int64_t>(3 * multiprocessors / tiles, 1, std::min(chunks, kSplits)));
}

BranchPlan make_plan(const SpecquantCudaBranch& p, const Device& device, void* workspace) {
  BranchPlan plan{};
  Args& a = plan.args;
  a.tokens = int(p.tokens), a.n = int(p.in_features), a.m = int(p.out_features);
  a.r = int(p.basis_rank), a.rank = int(p.rank), a.rp = int(round_up(p.rank, kRankStep));
  a.x_half = a.y_half = p.half;
  a.x = p.x, a.y = p.y;
  a.basis = static_cast<const __half*>(p.basis), a.coef = static_cast<const __half*>(p.coef);
  a.partial = static_cast<float*>(workspace);
  plan.tensor = a.n % kBlock == 0 && a.r <= kFastRank && aligned(p.x) && aligned(p.basis);
  a.splits = plan.tensor ? splits_of(p, device.multiprocessors) : 1;
  return plan;
}

}  // namespace

SPECQUANT_EXPORT int64_t specquant_cuda_branch_size(void) { return int64_t(sizeof(SpecquantCudaBranch)); }

SPECQUANT_EXPORT const char* specquant_cuda_check_branch(const SpecquantCudaBranch* problem) { return check(*problem); }

SPECQUANT_EXPORT const char* specquant_cuda_branch_workspace(const SpecquantCudaBranch* problem, int64_t* bytes) {
  if (const char* wrong = check(*problem)) return wrong;
  const int64_t columns = round_up(problem->rank, kRankStep);
  *bytes = round_up(std::min<int64_t>(ceil_div(int(problem->in_features), kDownChunk), kSplits) * problem->tokens *
                        columns * int64_t(sizeof(float)),
                    256);
  return nullptr;
}

SPECQUANT_EXPORT const char* specquant_cuda_branch(const SpecquantCudaBranch* problem, void* workspace,
                                                   int64_t workspace_bytes, void* stream) {
  int64_t bytes = 0;
  if (const char* wrong = specquant_cuda_branch_workspace(problem, &bytes)) return wrong;
  Device device{};
  if (const char* wrong = current(device)) return wrong;
  if (problem->tokens == 0) return nullptr;
  if (!problem->x || !problem->y || (problem->basis_rank && (!problem->basis || !problem->coef || !problem->low)))
    return "x, basis, coef, y or low are missing";
  if (bytes && (!workspace || workspace_bytes < bytes || reinterpret_cast<uintptr_t>(workspace) % 256))
    return say("the workspace must have %lld bytes, aligned to 256", static_cast<long long>(bytes));
  const BranchPlan plan = make_plan(*problem, device, workspace);
  const cudaError_t error = branch(plan, problem->low, static_cast<cudaStream_t>(stream));
  return error == cudaSuccess ? nullptr : failed("a CUDA kernel did not start", error);
}
