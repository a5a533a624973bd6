// SpecQuantMatMul and Int4ResidualMatMul (docs/ops.md) as TensorRT plugins: shapes, types and fields; the kernels compute.
#pragma once

#include <array>
#include <string>

#include "NvInferRuntime.h"
#include "specquant_cuda.h"

namespace specquant_trt {

constexpr const char* kNamespace = "specquant";  // the ONNX domain
constexpr const char* kVersion = "1";            // of the op set

// The attributes of schema.py, and where they go; tests/custom_ops/test_tensorrt.py holds the two together.
struct Attributes {
  int64_t group_size = 0, act_bits = 16, act_group = 0, hadamard = 0, subtract = 0;
  float act_clip = 1.0f;
};

// Where an op's inputs are. -1: it has no such input.
struct MatMulKind {
  const char* name;
  int basis, coef, rank, qweight, scales, row_sums, bias, inputs, fields;
};

constexpr MatMulKind kFused{"SpecQuantMatMul", 1, 2, 3, 4, 5, 6, 7, 8, 6};
constexpr MatMulKind kResidual{"Int4ResidualMatMul", -1, -1, -1, 1, 2, 3, 4, 5, 5};

// All of Attributes as fields that point into it, `subtract` last: Int4ResidualMatMul takes the first five.
struct Fields {
  explicit Fields(Attributes& attributes);
  std::array<nvinfer1::PluginField, 6> list;
  nvinfer1::PluginFieldCollection first(int count) { return {count, list.data()}; }
};

// False if a field has another name or type. Fields that are not given keep their defaults.
bool read_fields(const nvinfer1::PluginFieldCollection& given, const MatMulKind& kind, Attributes& attributes);

// Has no state but its attributes, so that a clone a context makes it safe on several streams.
class MatMulPlugin final : public nvinfer1::IPluginV3,
                           public nvinfer1::IPluginV3OneCore,
                           public nvinfer1::IPluginV3OneBuild,
                           public nvinfer1::IPluginV3OneRuntime {
 public:
  MatMulPlugin(const MatMulKind& kind, const Attributes& attributes);

  nvinfer1::IPluginCapability* getCapabilityInterface(nvinfer1::PluginCapabilityType type) noexcept override;
  nvinfer1::IPluginV3* clone() noexcept override;

  const char* getPluginName() const noexcept override { return kind_.name; }
  const char* getPluginVersion() const noexcept override { return kVersion; }
  const char* getPluginNamespace() const noexcept override { return kNamespace; }

  int32_t getNbOutputs() const noexcept override { return 1; }
  int32_t getOutputDataTypes(nvinfer1::DataType* outputs, int32_t, const nvinfer1::DataType* inputs,
                             int32_t count) const noexcept override;
  int32_t getOutputShapes(const nvinfer1::DimsExprs* inputs, int32_t count, const nvinfer1::DimsExprs*, int32_t,
                          nvinfer1::DimsExprs* outputs, int32_t, nvinfer1::IExprBuilder&) noexcept override;
  bool supportsFormatCombination(int32_t position, const nvinfer1::DynamicPluginTensorDesc* tensors, int32_t inputs,
                                 int32_t outputs) noexcept override;
  int32_t configurePlugin(const nvinfer1::DynamicPluginTensorDesc* inputs, int32_t count,
                          const nvinfer1::DynamicPluginTensorDesc*, int32_t) noexcept override;
  size_t getWorkspaceSize(const nvinfer1::DynamicPluginTensorDesc* inputs, int32_t count,
                          const nvinfer1::DynamicPluginTensorDesc*, int32_t) const noexcept override;

  int32_t onShapeChange(const nvinfer1::PluginTensorDesc*, int32_t, const nvinfer1::PluginTensorDesc*,
                        int32_t) noexcept override {
    return 0;
  }
  int32_t enqueue(const nvinfer1::PluginTensorDesc* input_descs, const nvinfer1::PluginTensorDesc*,
                  const void* const* inputs, void* const* outputs, void* workspace,
                  cudaStream_t stream) noexcept override;
  nvinfer1::IPluginV3* attachToContext(nvinfer1::IPluginResourceContext*) noexcept override { return clone(); }
  const nvinfer1::PluginFieldCollection* getFieldsToSerialize() noexcept override { return &serialized_; }

 private:
  // Sizes of the call; the pointers are left null.
  SpecquantCudaProblem problem(const nvinfer1::Dims& x, const nvinfer1::Dims& basis, const nvinfer1::Dims& scales,
                               bool half) const;

  const MatMulKind& kind_;
  Attributes attributes_;
  Fields fields_;
  nvinfer1::PluginFieldCollection serialized_;
};

// To TensorRT's logger, with the plugin's name before it.
void log_error(const char* plugin, const char* text) noexcept;

}  // namespace specquant_trt
