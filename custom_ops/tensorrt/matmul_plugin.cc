#include "matmul_plugin.h"

#include <cstring>
#include <new>

namespace specquant_trt {

using namespace nvinfer1;

namespace {

constexpr int64_t kAlignment = 256;  // of the workspace; TensorRT promises none

// Bytes to keep free for the first aligned address.
int64_t with_slack(int64_t bytes) { return bytes + kAlignment; }

void* aligned(void* pointer) {
  const auto address = reinterpret_cast<uintptr_t>(pointer);
  return reinterpret_cast<void*>((address + kAlignment - 1) / kAlignment * kAlignment);
}

int64_t last(const Dims& dims) { return dims.nbDims ? dims.d[dims.nbDims - 1] : 0; }

bool integer(const PluginField& field, int64_t& value) {
  if (field.length != 1 || !field.data) return false;
  if (field.type == PluginFieldType::kINT64) value = *static_cast<const int64_t*>(field.data);
  else if (field.type == PluginFieldType::kINT32) value = *static_cast<const int32_t*>(field.data);
  else return false;
  return true;
}

}  // namespace

Fields::Fields(Attributes& a)
    : list{PluginField{"group_size", &a.group_size, PluginFieldType::kINT64, 1},
           PluginField{"act_bits", &a.act_bits, PluginFieldType::kINT64, 1},
           PluginField{"act_group", &a.act_group, PluginFieldType::kINT64, 1},
           PluginField{"act_clip", &a.act_clip, PluginFieldType::kFLOAT32, 1},
           PluginField{"hadamard", &a.hadamard, PluginFieldType::kINT64, 1},
           PluginField{"subtract", &a.subtract, PluginFieldType::kINT64, 1}} {}

bool read_fields(const PluginFieldCollection& given, const MatMulKind& kind, Attributes& attributes) {
  const Fields known(attributes);
  for (int32_t i = 0; i < given.nbFields; ++i) {
    const PluginField& field = given.fields[i];
    bool read = false;
    for (int32_t j = 0; j < kind.fields && !read; ++j) {
      const PluginField& mine = known.list[j];
      if (!field.name || std::strcmp(field.name, mine.name) != 0) continue;
      // `known` points into `attributes`, which is ours to write.
      void* place = const_cast<void*>(mine.data);
      if (mine.type == PluginFieldType::kINT64) {
        read = integer(field, *static_cast<int64_t*>(place));
      } else if (field.type == PluginFieldType::kFLOAT32 && field.length == 1 && field.data) {
        *static_cast<float*>(place) = *static_cast<const float*>(field.data);
        read = true;
      }
    }
    if (!read) {
      log_error(kind.name, field.name ? field.name : "(a field without a name)");
      return false;
    }
  }
  return true;
}

MatMulPlugin::MatMulPlugin(const MatMulKind& kind, const Attributes& attributes)
    : kind_(kind), attributes_(attributes), fields_(attributes_), serialized_(fields_.first(kind.fields)) {}

IPluginCapability* MatMulPlugin::getCapabilityInterface(PluginCapabilityType type) noexcept {
  switch (type) {
    case PluginCapabilityType::kCORE: return static_cast<IPluginV3OneCore*>(this);
    case PluginCapabilityType::kBUILD: return static_cast<IPluginV3OneBuild*>(this);
    case PluginCapabilityType::kRUNTIME: return static_cast<IPluginV3OneRuntime*>(this);
  }
  return nullptr;
}

IPluginV3* MatMulPlugin::clone() noexcept { return new (std::nothrow) MatMulPlugin(kind_, attributes_); }

int32_t MatMulPlugin::getOutputDataTypes(DataType* outputs, int32_t, const DataType* inputs,
                                         int32_t count) const noexcept {
  if (count != kind_.inputs) return 1;
  outputs[0] = inputs[0];
  return 0;
}

int32_t MatMulPlugin::getOutputShapes(const DimsExprs* inputs, int32_t count, const DimsExprs*, int32_t,
                                      DimsExprs* outputs, int32_t, IExprBuilder&) noexcept {
  if (count != kind_.inputs || inputs[0].nbDims < 1 || inputs[kind_.scales].nbDims != 2) return 1;
  outputs[0] = inputs[0];
  outputs[0].d[inputs[0].nbDims - 1] = inputs[kind_.scales].d[1];
  return 0;
}

bool MatMulPlugin::supportsFormatCombination(int32_t position, const DynamicPluginTensorDesc* tensors, int32_t inputs,
                                             int32_t) noexcept {
  const PluginTensorDesc& tensor = tensors[position].desc;
  if (tensor.format != TensorFormat::kLINEAR) return false;
  const DataType type = tensor.type;
  if (position == 0) return type == DataType::kFLOAT || type == DataType::kHALF;
  if (position == inputs) return type == tensors[0].desc.type;
  if (position == kind_.rank) return type == DataType::kINT64;
  if (position == kind_.qweight) return type == DataType::kINT8;
  if (position == kind_.row_sums) return type == DataType::kINT32;
  if (position == kind_.bias) return type == DataType::kFLOAT;
  return type == DataType::kHALF;  // basis, coef, scales
}

SpecquantCudaProblem MatMulPlugin::problem(const Dims& x, const Dims& basis, const Dims& scales, bool half) const {
  SpecquantCudaProblem p{};
  p.tokens = 1;
  for (int32_t i = 0; i + 1 < x.nbDims; ++i) p.tokens *= x.d[i];
  p.in_features = last(x);
  p.out_features = last(scales);
  p.basis_rank = p.rank = last(basis);
  p.group_size = attributes_.group_size;
  p.act_group = attributes_.act_group;
  p.hadamard = attributes_.hadamard;
  p.act_bits = int32_t(attributes_.act_bits);
  p.subtract = int32_t(attributes_.subtract);
  p.act_clip = attributes_.act_clip;
  p.half = half;
  p.wide_sums = 1;
  return p;
}

int32_t MatMulPlugin::configurePlugin(const DynamicPluginTensorDesc* inputs, int32_t count,
                                      const DynamicPluginTensorDesc*, int32_t) noexcept {
  return count == kind_.inputs && getWorkspaceSize(inputs, count, nullptr, 0) > 0 ? 0 : 1;
}

size_t MatMulPlugin::getWorkspaceSize(const DynamicPluginTensorDesc* inputs, int32_t, const DynamicPluginTensorDesc*,
                                      int32_t) const noexcept {
  const Dims none{};
  const SpecquantCudaProblem p = problem(inputs[0].max, kind_.basis < 0 ? none : inputs[kind_.basis].desc.dims,
                                         inputs[kind_.scales].desc.dims, inputs[0].desc.type == DataType::kHALF);
  int64_t bytes = 0;
  if (const char* wrong = specquant_cuda_workspace(&p, &bytes)) {
    log_error(kind_.name, wrong);
    return 0;
  }
  return size_t(with_slack(bytes));
}

int32_t MatMulPlugin::enqueue(const PluginTensorDesc* descs, const PluginTensorDesc*, const void* const* inputs,
                              void* const* outputs, void* workspace, cudaStream_t stream) noexcept {
  const Dims none{};
  SpecquantCudaProblem p = problem(descs[0].dims, kind_.basis < 0 ? none : descs[kind_.basis].dims,
                                   descs[kind_.scales].dims, descs[0].type == DataType::kHALF);
  p.x = inputs[0];
  p.basis = p.basis_rank ? inputs[kind_.basis] : nullptr;
  p.coef = p.basis_rank ? inputs[kind_.coef] : nullptr;
  p.qweight = inputs[kind_.qweight];
  p.scales = inputs[kind_.scales];
  p.row_sums = inputs[kind_.row_sums];
  p.bias = static_cast<const float*>(inputs[kind_.bias]);
  p.y = outputs[0];
  // specquant_cuda_matmul checks the size against the plan of this call; getWorkspaceSize covered the largest.
  SpecquantCudaLayout layout{};
  const char* wrong = specquant_cuda_layout(&p, &layout);
  if (!wrong) wrong = specquant_cuda_matmul(&p, aligned(workspace), layout.bytes, stream, nullptr);
  if (!wrong) return 0;
  log_error(kind_.name, wrong);
  return 1;
}

}  // namespace specquant_trt
