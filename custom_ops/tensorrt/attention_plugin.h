// Int4KVAttention and HalfKVAttention (docs/ops.md) as TensorRT plugins. Past and present are one buffer with room for
// the new tokens: outputs 1 and 2 are aliases of inputs 1 and 2.
#pragma once

#include "plugin.h"
#include "specquant_cuda.h"

namespace specquant_trt {

// The attributes of schema.py; HalfKVAttention has the first four.
struct AttentionAttributes {
  int64_t num_heads = 1, kv_num_heads = 1, local_window_size = -1;
  float scale = 0.0f;
  int64_t hadamard = 0;
  float clip = 1.0f;
};

// half: of the cache's rows, else they are packed. Inputs: qkv, past_key, past_value, seqlens_k, total_sequence_length, position_ids,
// cos, sin and, of a packed cache, key_offset.
struct AttentionKind {
  const char* name;
  bool half;
  int inputs;
  const Field* fields;
  int count;
};

extern const AttentionKind kInt4Cache, kHalfCache;

class AttentionPlugin final : public Plugin<AttentionPlugin, AttentionKind, AttentionAttributes> {
 public:
  using Plugin::Plugin;

  int32_t getNbOutputs() const noexcept override { return 3; }
  int32_t getAliasedInput(int32_t output) noexcept override { return output > 0 ? output : -1; }
  int32_t getOutputDataTypes(nvinfer1::DataType* outputs, int32_t, const nvinfer1::DataType* inputs,
                             int32_t count) const noexcept override;
  int32_t getOutputShapes(const nvinfer1::DimsExprs* inputs, int32_t count, const nvinfer1::DimsExprs*, int32_t,
                          nvinfer1::DimsExprs* outputs, int32_t, nvinfer1::IExprBuilder& builder) noexcept override;
  bool supportsFormatCombination(int32_t position, const nvinfer1::DynamicPluginTensorDesc* tensors, int32_t inputs,
                                 int32_t outputs) noexcept override;
  size_t getWorkspaceSize(const nvinfer1::DynamicPluginTensorDesc* inputs, int32_t count,
                          const nvinfer1::DynamicPluginTensorDesc*, int32_t) const noexcept override;
  int32_t enqueue(const nvinfer1::PluginTensorDesc* input_descs, const nvinfer1::PluginTensorDesc*,
                  const void* const* inputs, void* const* outputs, void* workspace,
                  cudaStream_t stream) noexcept override;

 private:
  // Heads side by side in qkv; 0 if the attributes make no sense.
  int64_t heads() const;
  // A call on inputs of these shapes, its pointers null; returns null, or one line that says which does not fit.
  const char* sizes(const nvinfer1::Dims* shapes, bool half, SpecquantCudaAttention& a) const;
};

}  // namespace specquant_trt
