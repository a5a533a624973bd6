// SpecQuantMatMul and Int4ResidualMatMul (docs/ops.md) as TensorRT plugins: shapes, types and fields; the kernels compute.
#pragma once

#include "plugin.h"
#include "specquant_cuda.h"

namespace specquant_trt {

// The attributes of schema.py; tests/custom_ops/test_tensorrt.py holds the two together.
struct MatMulAttributes {
  int64_t group_size = 0, act_bits = 16, act_group = 0;
  float act_clip = 1.0f;
  int64_t hadamard = 0, subtract = 0, prologue = 0;
  float epsilon = 1e-5f;
  int64_t gate = 0;
};

// first: the index of qweight, which group_scales, scales, bias, norm and residual follow. Before it come x and, where
// that leaves room, basis, coef and rank.
struct MatMulKind {
  const char* name;
  int first, inputs;
  const Field* fields;
  int count;
};

extern const MatMulKind kFused, kResidual;

class MatMulPlugin final : public Plugin<MatMulPlugin, MatMulKind, MatMulAttributes> {
 public:
  using Plugin::Plugin;

  int32_t getNbOutputs() const noexcept override { return 1; }
  int32_t getOutputDataTypes(nvinfer1::DataType* outputs, int32_t, const nvinfer1::DataType* inputs,
                             int32_t count) const noexcept override;
  int32_t getOutputShapes(const nvinfer1::DimsExprs* inputs, int32_t count, const nvinfer1::DimsExprs*, int32_t,
                          nvinfer1::DimsExprs* outputs, int32_t, nvinfer1::IExprBuilder&) noexcept override;
  bool supportsFormatCombination(int32_t position, const nvinfer1::DynamicPluginTensorDesc* tensors, int32_t inputs,
                                 int32_t outputs) noexcept override;
  size_t getWorkspaceSize(const nvinfer1::DynamicPluginTensorDesc* inputs, int32_t count,
                          const nvinfer1::DynamicPluginTensorDesc*, int32_t) const noexcept override;
  int32_t enqueue(const nvinfer1::PluginTensorDesc* input_descs, const nvinfer1::PluginTensorDesc*,
                  const void* const* inputs, void* const* outputs, void* workspace,
                  cudaStream_t stream) noexcept override;

 private:
  // A call on inputs of these shapes, its pointers null; returns null, or one line that says which does not fit.
  const char* sizes(const nvinfer1::Dims* shapes, bool half, SpecquantCudaProblem& p) const;
  // Whether the input `residual` is one, and not the dummy.
  bool adds(const nvinfer1::Dims* shapes) const;
};

}  // namespace specquant_trt
