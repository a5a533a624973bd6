#include "plan.h"

#include <algorithm>

#include "bounds.h"

namespace specquant_cuda {
namespace {

constexpr int64_t kMostHadamard = 4096;
constexpr int64_t kChannelFeatures = 131071;  // 16 · 8 · 128 · N stays below 2^31
constexpr int kClusterFeatures = 256;  // of a block that shares a token, where there are enough blocks
constexpr int64_t kSharedLeast = 98 * 1024;  // bytes that a block may take on any GPU
// 64 features each that a block of `prompt` takes, where there are enough blocks: more of many tokens, of which all blocks
// have enough, and fewer then have to agree.
constexpr int kPromptUnits = 10, kPromptUnitsOfMany = 14, kManyTokens = 2048;

bool aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

bool divides(int64_t group, int64_t n) { return group == 0 || (group > 0 && group % kBlock == 0 && n % group == 0); }

// Byte offsets of the workspace, one array after another.
struct Arena {
  int64_t end = 0;
  int64_t take(bool wanted, int64_t bytes) {
    if (!wanted) return -1;
    const int64_t at = end;
    end += round_up(bytes, 256);
    return at;
  }
};

}  // namespace

const char* check(const SpecquantCudaProblem& p) {
  if (p.in_features < 1 || p.in_features > kMostFeatures) return "in-features must be 1 to 524288";
  if (p.out_features < 1 || p.out_features > kMostOutputs) return "out-features must be 1 to 4194304";
  if (p.tokens < 0 || p.tokens > kMostTokens) return "the number of tokens must be 0 to 4194304";
  if (!p.qweight || !p.group_scales || !p.scales) return "qweight, group_scales or scales are missing";
  if (p.hadamard && (p.hadamard < kBlock || p.hadamard > kMostHadamard || (p.hadamard & (p.hadamard - 1)) ||
                     p.in_features % p.hadamard))
    return "hadamard must be 0, or a power of two from 8 to 4096 that divides in-features";
  if (p.basis_rank < 0 || p.basis_rank > std::min(p.in_features, kMostBasis))
    return "the basis must have 0 to in-features columns, at most 4096";
  if (p.rank < 0 || p.rank > p.basis_rank) return "rank must be 0 to the columns of the basis";
  if (p.basis ? p.basis_rank && !p.coef : p.basis_rank != 0) return "basis and coef must both be there, or neither";
  if (p.prologue < 0 || p.prologue > 1) return "prologue must be 0 or 1";
  if (p.gate < 0 || p.gate > 2) return "gate must be 0 to 2";
  if (p.gate && p.out_features % 2) return "with a gate, out-features must be even";
  if (p.gate && p.residual) return "with a gate there is no residual";
  if (p.prologue && !p.norm) return "norm is missing";
  if (p.prologue && !(p.epsilon >= 0.0f && p.epsilon <= 3.4e38f)) return "epsilon must be 0 or more, and finite";
  if (p.act_bits != 16 && (p.act_bits < 2 || p.act_bits > 8)) return "act_bits must be 2 to 8, or 16";
  if (!(p.act_clip > 0.0f && p.act_clip <= 1.0f)) return "act_clip must be more than 0, and at most 1";
  if (!divides(p.group_size, p.in_features) || !divides(p.act_group, p.in_features))
    return "group_size and act_group must be 0, or a divisor of in-features that 8 divides";
  const auto [small, large] = std::minmax(p.group_size, p.act_group);
  if (small && large % small) return "one of group_size and act_group must divide the other";
  for (const int32_t flag : {p.subtract, p.half})
    if (flag != 0 && flag != 1) return "subtract and half must be 0 or 1";
  if (reinterpret_cast<uintptr_t>(p.qweight) % 4) return "qweight must be aligned to 4 bytes";
  if (reinterpret_cast<uintptr_t>(p.group_scales) % 8) return "group_scales must be aligned to 8 bytes";
  return nullptr;
}

Plan make_plan(const SpecquantCudaProblem& p, const Device& device) {
  Plan plan{};
  Args& a = plan.args;
  a.tokens = int(p.tokens), a.n = int(p.in_features), a.m = int(p.out_features);
  a.r = int(p.basis_rank), a.rank = int(p.rank), a.rp = int(round_up(p.rank, kRankStep));
  a.kp = int(round_up(a.n, kStep)), a.tp = int(round_up(a.tokens, kTokenPad));
  a.bits = p.act_bits;
  const bool halves = a.bits == 16;
  a.group = p.group_size ? int(p.group_size) : a.n;
  a.groups = a.n / a.group;
  a.segment = p.act_group && !halves ? int(p.act_group) : a.n;
  a.segments = a.n / a.segment;
  a.group_steps = reciprocal(ceil_div(a.group, kStep)), a.segment_steps = reciprocal(ceil_div(a.segment, kStep));
  a.hadamard = int(p.hadamard), a.gate = p.gate, a.width = p.gate ? a.m / 2 : a.m;
  const bool moved = a.hadamard || p.prologue;
  a.x_half = p.half && !moved, a.y_half = p.half;
  a.subtract = p.subtract && a.rank;
  a.early = device.major >= 9;
  a.high_nibbles = 0xF0F0F0F0u;
  a.clip = p.act_clip;
  a.basis = static_cast<const __half*>(p.basis), a.coef = static_cast<const __half*>(p.coef);
  a.qweight = static_cast<const uint8_t*>(p.qweight), a.scales = static_cast<const __half*>(p.scales);
  a.group_scales = static_cast<const uint8_t*>(p.group_scales);
  a.bias = p.bias, a.residual = p.residual;
  a.x = p.x, a.y = p.y;

  plan.mode = halves ? kHalf : a.segments > 1 ? kFold : a.groups > 1 ? kMultiples : kChannel;

  const bool vectors = a.m % 8 == 0 && aligned(p.qweight) && aligned(p.scales) && aligned(p.bias) &&
                       aligned(p.coef) && aligned(p.residual) && aligned(p.y);
  const bool whole_steps = (a.segment % kStep == 0 || a.segments == 1) && (a.group % kStep == 0 || a.groups == 1);
  const bool sums_fit = plan.mode == kFold || halves || a.n <= kChannelFeatures;
  plan.gemm = vectors && whole_steps && sums_fit;
  // gemm90: on Hopper, whole chunks and panels; segments and groups are multiples of 64 features here.
  plan.gemm90 = plan.gemm && device.major == 9 && device.minor == 0 && !halves && a.n % kChunk == 0 &&
                a.m % kPanel == 0 && a.rp <= kFastRank;
  plan.wide = plan.gemm90 && plan.mode == kMultiples && a.rp <= kRankStep;
  plan.matvec_tokens = !plan.gemm ? 0 : plan.mode == kChannel || plan.mode == kMultiples ? kMatvecTokens / 2 : kMatvecTokens;

  const bool hopper = device.major == 9;
  const int64_t shared = hopper ? kSharedHopper : kSharedLeast;
  const int units = a.kp / kStep;
  a.spread = 1;
  const int each = a.tokens < kManyTokens ? kPromptUnits : kPromptUnitsOfMany;
  while (a.spread * each < units && a.spread < (hopper ? 16 : 8)) a.spread *= 2;
  a.units = int(round_up(ceil_div(units, a.spread), std::max(1, a.hadamard / kStep)));
  a.late_norm = p.prologue && p.half && !a.hadamard && a.rank;
  plan.prompt = device.major >= 9 && a.n % kBlock == 0 && a.r <= kFastRank && aligned(p.x) && aligned(p.basis) &&
                (!p.prologue || aligned(p.norm)) && a.units <= kPromptWarps &&
                (a.segments == 1 || a.segment == kStep) &&
                int64_t(prompt_shared(a)) <= shared;

  plan.tensor_prepare =
      !plan.prompt && a.n % kBlock == 0 && a.r <= kFastRank && (moved || aligned(p.x)) && aligned(p.basis);
  plan.direct = plan.tensor_prepare && !halves && a.segment == kStep;
  // 16 blocks are more than other GPUs than Hopper take.
  a.most_shared = int(shared);
  a.cluster = 1;
  while (a.cluster * kClusterFeatures < a.n && a.cluster < (hopper ? 16 : 8)) a.cluster *= 2;
  plan.cluster = device.major >= 9 && plan.matvec_tokens && a.r <= kFastRank && (!a.rank || aligned(p.basis)) &&
                 int64_t(cluster_shared(a)) <= shared;
  plan.two_pass = plan.tensor_prepare && !halves && a.segments == 1 && !plan.direct;
  const int tiles = ceil_div(std::max(a.tokens, 1), kDownTokens), chunks = ceil_div(a.n, kDownChunk);
  a.splits = int(std::clamp<int64_t>(3 * device.multiprocessors / tiles, 1, std::min<int64_t>(chunks, kSplits)));

  a.shares = std::clamp(ceil_div(4 * device.multiprocessors, ceil_div(std::max(a.tokens, 1), kReduceTokens)), 1,
                        ceil_div(a.n, kStep));

  SpecquantCudaLayout& at = plan.layout;
  const int64_t elements = p.tokens * a.n;
  Arena arena;
  at.rotated = arena.take(moved && !plan.prompt, elements * 4);
  at.reduced = arena.take(a.subtract && !plan.direct && !plan.two_pass && !plan.prompt, elements * 4);
  at.partial = arena.take(a.rank && plan.tensor_prepare, int64_t(a.splits) * a.tokens * a.rp * 4);
  at.low = arena.take(a.rank, p.tokens * 2 * a.rp * 2);
  at.low_factor = arena.take(a.rank, int64_t(a.tp) * 4);
  at.levels = arena.take(true, int64_t(plan.gemm90 ? a.tp : a.tokens) * a.kp * (halves ? 2 : 1));
  at.scale = arena.take(true, int64_t(a.segments) * a.tp * 4);
  plan.range = arena.take(plan.two_pass, int64_t(a.shares) * p.tokens * 8);
  at.bytes = arena.end;
  at.tokens_padded = a.tp, at.features_padded = a.kp, at.rank_padded = a.rp;
  at.segments = a.segments, at.splits = a.splits;
  return plan;
}

}  // namespace specquant_cuda
