#include "matmul_plugin.h"

#include <algorithm>
#include <iterator>

namespace specquant_trt {

using namespace nvinfer1;

namespace {

constexpr int kMostInputs = 10;
enum Branch { kBasis = 1, kCoef, kRank };
enum Weights { kQWeight, kGroupScales, kScales, kBias, kNorm, kResidualInput };  // from `first` on

#define FIELD(name) SPECQUANT_FIELD(MatMulAttributes, name)
constexpr Field kFusedFields[] = {FIELD(group_size), FIELD(act_bits), FIELD(act_group), FIELD(act_clip),
                                  FIELD(hadamard),   FIELD(subtract), FIELD(prologue),  FIELD(epsilon),
                                  FIELD(gate)};
constexpr Field kResidualFields[] = {FIELD(group_size), FIELD(act_bits), FIELD(act_group), FIELD(act_clip),
                                     FIELD(hadamard),   FIELD(prologue), FIELD(epsilon),  FIELD(gate)};
#undef FIELD
static_assert(std::size(kFusedFields) <= kMostFields && std::size(kResidualFields) <= kMostFields);

}  // namespace

const MatMulKind kFused{"SpecQuantMatMul", 4, 10, kFusedFields, int(std::size(kFusedFields))};
const MatMulKind kResidual{"Int4ResidualMatMul", 1, 7, kResidualFields, int(std::size(kResidualFields))};

int32_t MatMulPlugin::getOutputDataTypes(DataType* outputs, int32_t, const DataType* inputs,
                                         int32_t count) const noexcept {
  if (count != kind_.inputs) return 1;
  outputs[0] = inputs[0];
  return 0;
}

int32_t MatMulPlugin::getOutputShapes(const DimsExprs* inputs, int32_t count, const DimsExprs*, int32_t,
                                      DimsExprs* outputs, int32_t, IExprBuilder& builder) noexcept {
  if (count != kind_.inputs || inputs[0].nbDims < 1 || inputs[kind_.first + kScales].nbDims != 1) return 1;
  outputs[0] = inputs[0];
  const IDimensionExpr* const m = inputs[kind_.first + kScales].d[0];
  outputs[0].d[inputs[0].nbDims - 1] =
      attributes_.gate ? builder.operation(DimensionOperation::kFLOOR_DIV, *m, *builder.constant(2)) : m;
  return 0;
}

bool MatMulPlugin::supportsFormatCombination(int32_t position, const DynamicPluginTensorDesc* tensors, int32_t inputs,
                                             int32_t) noexcept {
  const PluginTensorDesc& tensor = tensors[position].desc;
  if (tensor.format != TensorFormat::kLINEAR) return false;
  const DataType type = tensor.type;
  if (position == 0) return type == DataType::kFLOAT || type == DataType::kHALF;
  if (position == inputs) return type == tensors[0].desc.type;
  if (position < kind_.first) return type == (position == kRank ? DataType::kINT64 : DataType::kHALF);
  switch (position - kind_.first) {
    case kQWeight:
    case kGroupScales: return type == DataType::kINT8;
    case kScales: return type == DataType::kHALF;
    case kBias:
    case kNorm: return type == DataType::kFLOAT;
    default: return type == tensors[0].desc.type;  // residual
  }
}

bool MatMulPlugin::adds(const Dims* shapes) const {
  const Dims& residual = shapes[kind_.first + kResidualInput];
  return residual.nbDims == shapes[0].nbDims && last(residual) == last(shapes[kind_.first + kScales]);
}

const char* MatMulPlugin::sizes(const Dims* shapes, bool half, SpecquantCudaProblem& p) const {
  const Dims &x = shapes[0], *weights = shapes + kind_.first;
  if (x.nbDims < 1 || weights[kScales].nbDims != 1) return "x or scales has another number of axes";
  p = {};
  p.tokens = 1;
  for (int32_t i = 0; i + 1 < x.nbDims; ++i) p.tokens *= x.d[i];
  p.group_size = attributes_.group_size;
  p.act_group = attributes_.act_group;
  p.hadamard = attributes_.hadamard;
  p.act_bits = int32_t(std::clamp<int64_t>(attributes_.act_bits, 0, 99));
  p.subtract = attributes_.subtract != 0;
  p.prologue = int32_t(std::clamp<int64_t>(attributes_.prologue, -1, 99));
  p.act_clip = attributes_.act_clip;
  p.epsilon = attributes_.epsilon;
  p.gate = int32_t(std::clamp<int64_t>(attributes_.gate, -1, 99));
  p.half = half;
  const int64_t n = p.in_features = last(x), m = p.out_features = last(weights[kScales]);
  if (kind_.first > kBasis) {
    const int64_t r = p.basis_rank = p.rank = last(shapes[kBasis]);
    if (!fits(shapes[kBasis], {n, r}) || !fits(shapes[kCoef], {r, m})) return "basis or coef has another shape";
  }
  if (n < 1 || (p.group_size > 0 && n % p.group_size)) return "groups do not divide the features of x";
  const int64_t panels = (m + 15) / 16, groups = p.group_size > 0 ? n / p.group_size : 1;
  if (!fits(weights[kQWeight], {panels, (n + 7) / 8, 64})) return "qweight has another shape";
  if (!fits(weights[kGroupScales], {panels, groups, 8})) return "group_scales has another shape";
  if (!fits(weights[kBias], {m})) return "bias has another shape";
  if (p.prologue == 1 && !fits(weights[kNorm], {n})) return "norm has another shape";
  if (!adds(shapes)) return fits(weights[kResidualInput], {1}) ? nullptr : "residual has another shape";
  for (int32_t i = 0; i + 1 < x.nbDims; ++i)
    if (weights[kResidualInput].d[i] != x.d[i]) return "residual has another shape";
  return nullptr;
}

size_t MatMulPlugin::getWorkspaceSize(const DynamicPluginTensorDesc* inputs, int32_t, const DynamicPluginTensorDesc*,
                                      int32_t) const noexcept {
  Dims shapes[kMostInputs];
  for (int i = 0; i < kind_.inputs; ++i) shapes[i] = inputs[i].desc.dims;
  for (const int i : {0, kind_.first + kResidualInput}) shapes[i] = inputs[i].max;
  SpecquantCudaProblem p;
  int64_t bytes = 0;
  const char* wrong = sizes(shapes, inputs[0].desc.type == DataType::kHALF, p);
  if (!wrong) wrong = specquant_cuda_workspace(&p, &bytes);
  return sound(wrong) ? with_slack(bytes) : 0;
}

int32_t MatMulPlugin::enqueue(const PluginTensorDesc* descs, const PluginTensorDesc*, const void* const* inputs,
                              void* const* outputs, void* workspace, cudaStream_t stream) noexcept {
  Dims shapes[kMostInputs];
  for (int i = 0; i < kind_.inputs; ++i) shapes[i] = descs[i].dims;
  const void* const* weights = inputs + kind_.first;
  SpecquantCudaProblem p;
  const char* wrong = sizes(shapes, descs[0].type == DataType::kHALF, p);
  if (!sound(wrong)) return 1;
  p.x = inputs[0];
  p.basis = p.basis_rank ? inputs[kBasis] : nullptr;
  p.coef = p.basis_rank ? inputs[kCoef] : nullptr;
  p.qweight = weights[kQWeight];
  p.group_scales = weights[kGroupScales];
  p.scales = weights[kScales];
  p.bias = static_cast<const float*>(weights[kBias]);
  p.norm = static_cast<const float*>(weights[kNorm]);
  p.residual = adds(shapes) ? weights[kResidualInput] : nullptr;
  p.y = outputs[0];
  // specquant_cuda_matmul checks the size against the plan of this call; getWorkspaceSize covered the largest.
  SpecquantCudaLayout layout{};
  wrong = specquant_cuda_layout(&p, &layout);
  if (!wrong) wrong = specquant_cuda_matmul(&p, aligned(workspace), layout.bytes, stream, nullptr);
  return sound(wrong) ? 0 : 1;
}

}  // namespace specquant_trt
