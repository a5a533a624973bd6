#include "attention_plugin.h"

namespace specquant_trt {

using namespace nvinfer1;

namespace {

enum Input { kQkv, kPastKey, kPastValue, kSeqlens, kTotal, kPositions, kCos, kSin, kKeyOffset, kMostInputs };

#define FIELD(name) SPECQUANT_FIELD(AttentionAttributes, name)
constexpr Field kFields[] = {FIELD(num_heads), FIELD(kv_num_heads), FIELD(local_window_size),
                             FIELD(scale),     FIELD(hadamard),     FIELD(clip)};
#undef FIELD

}  // namespace

const AttentionKind kInt4Cache{"Int4KVAttention", false, 9, kFields, 6};
const AttentionKind kHalfCache{"HalfKVAttention", true, 8, kFields, 4};

int64_t AttentionPlugin::heads() const {
  const int64_t h = attributes_.num_heads, k = attributes_.kv_num_heads, most = 1 << 16;
  return h > 0 && k > 0 && h <= most && k <= most ? h + 2 * k : 0;
}

int32_t AttentionPlugin::getOutputDataTypes(DataType* outputs, int32_t, const DataType* inputs,
                                            int32_t count) const noexcept {
  if (count != kind_.inputs) return 1;
  for (int i = 0; i < 3; ++i) outputs[i] = inputs[i];  // y as qkv, present as past
  return 0;
}

int32_t AttentionPlugin::getOutputShapes(const DimsExprs* inputs, int32_t count, const DimsExprs*, int32_t,
                                         DimsExprs* outputs, int32_t, IExprBuilder& builder) noexcept {
  if (count != kind_.inputs || inputs[kQkv].nbDims != 3 || !heads()) return 1;
  for (int i = 0; i < 3; ++i) outputs[i] = inputs[i];
  const auto number = [&](int64_t value) { return builder.constant(value); };
  const IDimensionExpr *width = inputs[kQkv].d[2], *queries = number(attributes_.num_heads), *all = number(heads());
  if (!queries || !all) return 1;
  const IDimensionExpr* product = builder.operation(DimensionOperation::kPROD, *width, *queries);
  outputs[0].d[2] = product ? builder.operation(DimensionOperation::kFLOOR_DIV, *product, *all) : nullptr;
  return outputs[0].d[2] ? 0 : 1;
}

bool AttentionPlugin::supportsFormatCombination(int32_t position, const DynamicPluginTensorDesc* tensors,
                                                int32_t inputs, int32_t) noexcept {
  const PluginTensorDesc& tensor = tensors[position].desc;
  if (tensor.format != TensorFormat::kLINEAR) return false;
  const DataType type = tensor.type;
  if (position >= inputs) return type == tensors[position - inputs].desc.type;
  switch (position) {
    case kQkv: return type == DataType::kFLOAT || type == DataType::kHALF;
    case kPastKey:
    case kPastValue: return type == (kind_.half ? DataType::kHALF : DataType::kINT8);
    case kSeqlens:
    case kTotal: return type == DataType::kINT32;
    case kPositions: return type == DataType::kINT64;
    default: return type == DataType::kFLOAT;
  }
}

const char* AttentionPlugin::sizes(const Dims* shapes, bool half, SpecquantCudaAttention& a) const {
  const Dims &qkv = shapes[kQkv], &past = shapes[kPastKey], &cos = shapes[kCos];
  if (qkv.nbDims != 3 || past.nbDims != 4 || cos.nbDims != 2) return "qkv, past_key or cos has another number of axes";
  if (!heads() || qkv.d[2] % heads()) return "qkv has another width than num_heads and kv_num_heads say";
  a = {};
  a.batch = qkv.d[0], a.sequence = qkv.d[1], a.head_dim = qkv.d[2] / heads();
  a.num_heads = attributes_.num_heads, a.kv_num_heads = attributes_.kv_num_heads;
  a.past_rows = a.present_rows = past.d[2];
  a.context = cos.d[0], a.rotary = cos.d[1];
  a.window = attributes_.local_window_size;
  a.hadamard = attributes_.hadamard != 0;
  a.half = half, a.half_cache = kind_.half;
  a.scale = attributes_.scale, a.clip = attributes_.clip;
  const int64_t row = kind_.half ? a.head_dim : a.head_dim / 2 + 4;
  for (const int i : {kPastKey, kPastValue})
    if (!fits(shapes[i], {a.batch, a.kv_num_heads, a.past_rows, row})) return "past_key or past_value has another shape";
  if (!fits(shapes[kSeqlens], {a.batch})) return "seqlens_k has another shape";
  if (!fits(shapes[kPositions], {a.batch, a.sequence})) return "position_ids has another shape";
  if (!fits(shapes[kSin], {a.context, a.rotary})) return "sin has another shape than cos";
  if (!kind_.half && !fits(shapes[kKeyOffset], {a.kv_num_heads, a.head_dim})) return "key_offset has another shape";
  return nullptr;
}

size_t AttentionPlugin::getWorkspaceSize(const DynamicPluginTensorDesc* inputs, int32_t,
                                         const DynamicPluginTensorDesc*, int32_t) const noexcept {
  Dims shapes[kMostInputs];
  for (int i = 0; i < kind_.inputs; ++i) shapes[i] = inputs[i].max;
  SpecquantCudaAttention a;
  int64_t bytes = 0;
  const char* wrong = sizes(shapes, inputs[kQkv].desc.type == DataType::kHALF, a);
  if (!wrong) wrong = specquant_cuda_attention_bound(&a, &bytes);
  return sound(wrong) ? with_slack(bytes) : 0;
}

int32_t AttentionPlugin::enqueue(const PluginTensorDesc* descs, const PluginTensorDesc*, const void* const* inputs,
                                 void* const* outputs, void* workspace, cudaStream_t stream) noexcept {
  Dims shapes[kMostInputs];
  for (int i = 0; i < kind_.inputs; ++i) shapes[i] = descs[i].dims;
  SpecquantCudaAttention a;
  const char* wrong = sizes(shapes, descs[kQkv].type == DataType::kHALF, a);
  if (!sound(wrong)) return 1;
  a.qkv = inputs[kQkv];
  a.past_key = inputs[kPastKey];
  a.past_value = inputs[kPastValue];
  a.seqlens_k = static_cast<const int32_t*>(inputs[kSeqlens]);
  a.position_ids = static_cast<const int64_t*>(inputs[kPositions]);
  a.cos = static_cast<const float*>(inputs[kCos]);
  a.sin = static_cast<const float*>(inputs[kSin]);
  a.key_offset = kind_.half ? nullptr : static_cast<const float*>(inputs[kKeyOffset]);
  // Past itself where TensorRT aliases them, as it does wherever a context binds both to one address; else copied to.
  a.y = outputs[0], a.present_key = outputs[1], a.present_value = outputs[2];
  int64_t bytes = 0;
  wrong = specquant_cuda_attention_workspace(&a, &bytes);
  if (!wrong) wrong = specquant_cuda_attention(&a, aligned(workspace), bytes, stream);
  return sound(wrong) ? 0 : 1;
}

}  // namespace specquant_trt
