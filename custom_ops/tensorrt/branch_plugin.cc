#include "branch_plugin.h"

namespace specquant_trt {

using namespace nvinfer1;

namespace {

enum Input { kX, kBasis, kCoef, kRank, kInputs };

}  // namespace

const BranchKind kBranch{"SpectralBranch", kInputs, nullptr, 0};

int32_t BranchPlugin::getOutputDataTypes(DataType* outputs, int32_t, const DataType* inputs,
                                         int32_t count) const noexcept {
  if (count != kInputs) return 1;
  outputs[0] = outputs[1] = inputs[kX];
  return 0;
}

int32_t BranchPlugin::getOutputShapes(const DimsExprs* inputs, int32_t count, const DimsExprs*, int32_t,
                                      DimsExprs* outputs, int32_t, IExprBuilder&) noexcept {
  if (count != kInputs || inputs[kX].nbDims < 1 || inputs[kBasis].nbDims != 2 || inputs[kCoef].nbDims != 2) return 1;
  outputs[0] = outputs[1] = inputs[kX];
  outputs[0].d[inputs[kX].nbDims - 1] = inputs[kCoef].d[1];
  outputs[1].d[inputs[kX].nbDims - 1] = inputs[kBasis].d[1];
  return 0;
}

bool BranchPlugin::supportsFormatCombination(int32_t position, const DynamicPluginTensorDesc* tensors, int32_t,
                                             int32_t) noexcept {
  const PluginTensorDesc& tensor = tensors[position].desc;
  if (tensor.format != TensorFormat::kLINEAR) return false;
  const DataType type = tensor.type;
  switch (position) {
    case kX: return type == DataType::kFLOAT || type == DataType::kHALF;
    case kBasis:
    case kCoef: return type == DataType::kHALF;
    case kRank: return type == DataType::kINT64;
    default: return type == tensors[kX].desc.type;  // y and low
  }
}

const char* BranchPlugin::sizes(const Dims* shapes, bool half, SpecquantCudaBranch& b) const {
  const Dims& x = shapes[kX];
  if (x.nbDims < 1 || shapes[kCoef].nbDims != 2) return "x or coef have too few axes";
  b = {};
  b.tokens = 1;
  for (int32_t i = 0; i + 1 < x.nbDims; ++i) b.tokens *= x.d[i];
  b.in_features = last(x), b.out_features = last(shapes[kCoef]);
  b.basis_rank = b.rank = shapes[kCoef].d[0];
  b.half = half;
  return fits(shapes[kBasis], {b.in_features, b.basis_rank}) ? nullptr : "basis or coef has another shape";
}

size_t BranchPlugin::getWorkspaceSize(const DynamicPluginTensorDesc* inputs, int32_t, const DynamicPluginTensorDesc*,
                                      int32_t) const noexcept {
  const Dims shapes[kInputs] = {inputs[kX].max, inputs[kBasis].desc.dims, inputs[kCoef].desc.dims, {}};
  SpecquantCudaBranch b;
  int64_t bytes = 0;
  const char* wrong = sizes(shapes, inputs[kX].desc.type == DataType::kHALF, b);
  if (!wrong) wrong = specquant_cuda_branch_workspace(&b, &bytes);
  return sound(wrong) ? with_slack(bytes) : 0;
}

int32_t BranchPlugin::enqueue(const PluginTensorDesc* descs, const PluginTensorDesc*, const void* const* inputs,
                              void* const* outputs, void* workspace, cudaStream_t stream) noexcept {
  const Dims shapes[kInputs] = {descs[kX].dims, descs[kBasis].dims, descs[kCoef].dims, {}};
  SpecquantCudaBranch b;
  const char* wrong = sizes(shapes, descs[kX].type == DataType::kHALF, b);
  if (!sound(wrong)) return 1;
  b.x = inputs[kX], b.basis = inputs[kBasis], b.coef = inputs[kCoef];
  b.y = outputs[0], b.low = outputs[1];
  int64_t bytes = 0;
  wrong = specquant_cuda_branch_workspace(&b, &bytes);
  if (!wrong) wrong = specquant_cuda_branch(&b, aligned(workspace), bytes, stream);
  return sound(wrong) ? 0 : 1;
}

}  // namespace specquant_trt
