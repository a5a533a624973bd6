// The part of ONNX Runtime's C ABI that this library uses, since no package of PyPI or Debian 12 ships its headers.
//
// OrtApi is a table of function pointers that only ever grows at its end, so a function is a slot number and a
// signature. tests/custom_ops/test_ort_abi.py checks all of this against the official header where there is one.
#pragma once

#include <cstddef>
#include <cstdint>

namespace specquant::ort {

constexpr uint32_t kApiVersion = 18;  // the first with KernelInfoGetAllocator; ONNX Runtime 1.18

struct Status;
struct SessionOptions;
struct OpDomain;
struct KernelInfo;
struct KernelContext;
struct ShapeContext;
struct Attribute;
struct TensorInfo;
struct Value;
struct Allocator;

enum ErrorCode : int32_t { kFail = 1, kInvalidArgument = 2 };
enum MemoryType : int32_t { kMemoryCpuInput = -2, kMemoryDefault = 0 };
enum Characteristic : int32_t { kRequired = 0 };
enum AttributeType : int32_t { kInteger = 1 };
enum ElementType : int32_t { kFloat = 1, kInt8 = 3, kInt32 = 6, kInt64 = 7, kFloat16 = 10 };

// X(name, slot, result, arguments)
#define SPECQUANT_ORT_SLOTS(X)                                                                              \
  X(CreateStatus, 0, Status*, (ErrorCode, const char*))                                                     \
  X(CreateCustomOpDomain, 26, Status*, (const char*, OpDomain**))                                           \
  X(CustomOpDomain_Add, 27, Status*, (OpDomain*, const struct CustomOp*))                                   \
  X(AddCustomOpDomain, 28, Status*, (SessionOptions*, OpDomain*))                                           \
  X(GetTensorMutableData, 51, Status*, (Value*, void**))                                                    \
  X(CreateTensorTypeAndShapeInfo, 57, Status*, (TensorInfo**))                                              \
  X(SetTensorElementType, 58, Status*, (TensorInfo*, ElementType))                                          \
  X(SetDimensions, 59, Status*, (TensorInfo*, const int64_t*, size_t))                                      \
  X(GetTensorElementType, 60, Status*, (const TensorInfo*, ElementType*))                                   \
  X(GetDimensionsCount, 61, Status*, (const TensorInfo*, size_t*))                                          \
  X(GetDimensions, 62, Status*, (const TensorInfo*, int64_t*, size_t))                                      \
  X(GetSymbolicDimensions, 63, Status*, (const TensorInfo*, const char**, size_t))                          \
  X(GetTensorTypeAndShape, 65, Status*, (const Value*, TensorInfo**))                                       \
  X(AllocatorAlloc, 75, Status*, (Allocator*, size_t, void**))                                              \
  X(AllocatorFree, 76, Status*, (Allocator*, void*))                                                        \
  X(KernelInfoGetAttribute_float, 85, Status*, (const KernelInfo*, const char*, float*))                    \
  X(KernelInfoGetAttribute_int64, 86, Status*, (const KernelInfo*, const char*, int64_t*))                  \
  X(KernelContext_GetInput, 90, Status*, (const KernelContext*, size_t, const Value**))                     \
  X(KernelContext_GetOutput, 91, Status*, (KernelContext*, size_t, const int64_t*, size_t, Value**))        \
  X(ReleaseStatus, 93, void, (Status*))                                                                     \
  X(ReleaseTensorTypeAndShapeInfo, 99, void, (TensorInfo*))                                                 \
  X(ReleaseCustomOpDomain, 101, void, (OpDomain*))                                                          \
  X(ReleaseAllocator, 132, void, (Allocator*))                                                              \
  X(KernelContext_GetGPUComputeStream, 193, Status*, (const KernelContext*, void**))                        \
  X(KernelInfo_GetInputCount, 230, Status*, (const KernelInfo*, size_t*))                                   \
  X(KernelInfoGetConstantInput_tensor, 249, Status*, (const KernelInfo*, size_t, int*, const Value**))      \
  X(ShapeInferContext_GetInputTypeShape, 268, Status*, (const ShapeContext*, size_t, TensorInfo**))         \
  X(ShapeInferContext_GetAttribute, 269, Status*, (const ShapeContext*, const char*, const Attribute**))    \
  X(ShapeInferContext_SetOutputTypeShape, 270, Status*, (const ShapeContext*, size_t, const TensorInfo*))   \
  X(SetSymbolicDimensions, 271, Status*, (TensorInfo*, const char**, size_t))                               \
  X(ReadOpAttr, 272, Status*, (const Attribute*, AttributeType, void*, size_t, size_t*))                    \
  X(KernelContext_ParallelFor, 274, Status*, (const KernelContext*, void (*)(void*, size_t), size_t, size_t, void*)) \
  X(KernelInfoGetAllocator, 278, Status*, (const KernelInfo*, MemoryType, Allocator**))

// Likewise, but null before ONNX Runtime 1.24.
#define SPECQUANT_ORT_SLOTS_24(X)                                                                           \
  X(GetTensorElementTypeAndShapeDataReference, 414, Status*,                                                \
    (const Value*, ElementType*, const int64_t**, size_t*))

// The slots above as members with their own names, read once from the table.
struct Api {
  const void* table;
#define SPECQUANT_ORT_MEMBER(name, slot, result, arguments) result(*name) arguments;
  SPECQUANT_ORT_SLOTS(SPECQUANT_ORT_MEMBER)
#undef SPECQUANT_ORT_MEMBER
#define SPECQUANT_ORT_MEMBER(name, slot, result, arguments) result(*name) arguments = nullptr;
  SPECQUANT_ORT_SLOTS_24(SPECQUANT_ORT_MEMBER)
#undef SPECQUANT_ORT_MEMBER

  // minor: of ONNX Runtime's version 1.minor.
  Api(const void* from, int minor) : table(from) {
    const auto* slots = static_cast<void* const*>(from);
#define SPECQUANT_ORT_READ(name, slot, result, arguments) name = reinterpret_cast<result(*) arguments>(slots[slot]);
    SPECQUANT_ORT_SLOTS(SPECQUANT_ORT_READ)
    if (minor >= 24) {
      SPECQUANT_ORT_SLOTS_24(SPECQUANT_ORT_READ)
    }
#undef SPECQUANT_ORT_READ
  }
};

struct ApiBase {
  const void* (*GetApi)(uint32_t version);  // null if this ONNX Runtime is older than `version`
  const char* (*GetVersionString)();
};

// What ONNX Runtime asks of an op: its fields as of API 18.
struct CustomOp {
  uint32_t version;
  void* (*CreateKernel)(const CustomOp*, const void* api, const KernelInfo*);
  const char* (*GetName)(const CustomOp*);
  const char* (*GetExecutionProviderType)(const CustomOp*);
  ElementType (*GetInputType)(const CustomOp*, size_t index);
  size_t (*GetInputTypeCount)(const CustomOp*);
  ElementType (*GetOutputType)(const CustomOp*, size_t index);
  size_t (*GetOutputTypeCount)(const CustomOp*);
  void (*KernelCompute)(void* kernel, KernelContext*);
  void (*KernelDestroy)(void* kernel);
  Characteristic (*GetInputCharacteristic)(const CustomOp*, size_t index);
  Characteristic (*GetOutputCharacteristic)(const CustomOp*, size_t index);
  MemoryType (*GetInputMemoryType)(const CustomOp*, size_t index);
  int (*GetVariadicInputMinArity)(const CustomOp*);
  int (*GetVariadicInputHomogeneity)(const CustomOp*);
  int (*GetVariadicOutputMinArity)(const CustomOp*);
  int (*GetVariadicOutputHomogeneity)(const CustomOp*);
  Status* (*CreateKernelV2)(const CustomOp*, const void* api, const KernelInfo*, void** kernel);
  Status* (*KernelComputeV2)(void* kernel, KernelContext*);
  Status* (*InferOutputShapeFn)(const CustomOp*, ShapeContext*);
  int (*GetStartVersion)(const CustomOp*);
  int (*GetEndVersion)(const CustomOp*);
  size_t (*GetMayInplace)(int** input_index, int** output_index);
  void (*ReleaseMayInplace)(int* input_index, int* output_index);
  size_t (*GetAliasMap)(int** input_index, int** output_index);
  void (*ReleaseAliasMap)(int* input_index, int* output_index);
};

}  // namespace specquant::ort
