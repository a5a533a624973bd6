// SpectralBranch (docs/ops.md) as a TensorRT plugin: y and low, of all columns of the branch.
#pragma once

#include "plugin.h"
#include "specquant_cuda.h"

namespace specquant_trt {

struct BranchAttributes {};  // it has none

// Inputs: x, basis, coef, rank.
struct BranchKind {
  const char* name;
  int inputs;
  const Field* fields;
  int count;
};

extern const BranchKind kBranch;

class BranchPlugin final : public Plugin<BranchPlugin, BranchKind, BranchAttributes> {
 public:
  using Plugin::Plugin;

  int32_t getNbOutputs() const noexcept override { return 2; }
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
  const char* sizes(const nvinfer1::Dims* shapes, bool half, SpecquantCudaBranch& b) const;
};

}  // namespace specquant_trt
