// What TensorRT does with a plugin, for test_tensorrt_enqueue.py: fields, a serialised copy, a clone, shapes, enqueue.
#include <dlfcn.h>

#include <cstring>
#include <string>
#include <vector>

#include "NvInferRuntime.h"

using namespace nvinfer1;

namespace {

struct Log final : ILogger {
  std::string last;
  void log(Severity, const char* text) noexcept override { last = text; }
} logger;

struct Finder final : ILoggerFinder {
  ILogger* findLogger() override { return &logger; }
} finder;

IPluginCreatorV3One* creator_of(const char* library, const char* op) {
  void* handle = dlopen(library, RTLD_NOW | RTLD_LOCAL);
  if (!handle) {
    logger.last = dlerror();
    return nullptr;
  }
  using GetCreators = IPluginCreatorInterface* const* (*)(int32_t&);
  using SetLoggerFinder = void (*)(ILoggerFinder*);
  reinterpret_cast<SetLoggerFinder>(dlsym(handle, "setLoggerFinder"))(&finder);
  int32_t count = 0;
  IPluginCreatorInterface* const* all = reinterpret_cast<GetCreators>(dlsym(handle, "getCreators"))(count);
  for (int32_t i = 0; i < count; ++i) {
    auto* creator = static_cast<IPluginCreatorV3One*>(all[i]);
    if (std::strcmp(creator->getPluginName(), op) == 0) return creator;
  }
  return nullptr;
}

template <class Interface>
Interface* as(IPluginV3* plugin, PluginCapabilityType type) {
  return static_cast<Interface*>(plugin->getCapabilityInterface(type));
}

}  // namespace

// x, the op's other inputs, y. type: nvinfer1::DataType.
struct Tensor {
  void* data;
  int64_t dims[8];
  int32_t rank, type;
};

extern "C" const char* harness_last() { return logger.last.c_str(); }

// A plugin as a context has it: made from fields, made again from what that serialises, cloned and attached.
// values: int64, or the float act_clip alone.
extern "C" IPluginV3* harness_open(const char* library, const char* op, const char* const* names, const int64_t* ints,
                                   const float* act_clip, int32_t count) {
  logger.last.clear();
  IPluginCreatorV3One* creator = creator_of(library, op);
  if (!creator) return nullptr;
  std::vector<PluginField> fields;
  for (int32_t i = 0; i < count; ++i) {
    if (std::strcmp(names[i], "act_clip") == 0)
      fields.emplace_back(names[i], act_clip, PluginFieldType::kFLOAT32, 1);
    else
      fields.emplace_back(names[i], ints + i, PluginFieldType::kINT64, 1);
  }
  const PluginFieldCollection given{count, fields.data()};
  IPluginV3* built = creator->createPlugin("x", &given, TensorRTPhase::kBUILD);
  if (!built) return nullptr;
  auto* runtime = as<IPluginV3OneRuntime>(built->clone(), PluginCapabilityType::kRUNTIME);
  IPluginV3* loaded = creator->createPlugin("x", runtime->getFieldsToSerialize(), TensorRTPhase::kRUNTIME);
  return loaded ? as<IPluginV3OneRuntime>(loaded, PluginCapabilityType::kRUNTIME)->attachToContext(nullptr) : nullptr;
}

// Workspace for x of up to most_tokens rows; −1 if a type is refused.
extern "C" int64_t harness_workspace(IPluginV3* plugin, const Tensor* tensors, int32_t count, int64_t most_tokens) {
  auto* build = as<IPluginV3OneBuild>(plugin, PluginCapabilityType::kBUILD);
  std::vector<DynamicPluginTensorDesc> descs(count);
  for (int32_t i = 0; i < count; ++i) {
    PluginTensorDesc& desc = descs[i].desc;
    desc.dims.nbDims = tensors[i].rank;
    std::memcpy(desc.dims.d, tensors[i].dims, sizeof tensors[i].dims);
    desc.type = DataType(tensors[i].type);
    desc.format = TensorFormat::kLINEAR;
    descs[i].min = descs[i].opt = descs[i].max = desc.dims;
  }
  descs[0].max.d[0] = most_tokens;
  for (int32_t i = 0; i < count; ++i)
    if (!build->supportsFormatCombination(i, descs.data(), count - 1, 1)) return -1;
  std::vector<DataType> types;
  for (int32_t i = 0; i + 1 < count; ++i) types.push_back(descs[i].desc.type);
  DataType output;
  if (build->getOutputDataTypes(&output, 1, types.data(), count - 1) || output != types[0]) return -1;
  if (build->configurePlugin(descs.data(), count - 1, &descs[count - 1], 1)) return -1;
  return int64_t(build->getWorkspaceSize(descs.data(), count - 1, &descs[count - 1], 1));
}

extern "C" int32_t harness_enqueue(IPluginV3* plugin, const Tensor* tensors, int32_t count, void* workspace,
                                   void* stream) {
  auto* runtime = as<IPluginV3OneRuntime>(plugin, PluginCapabilityType::kRUNTIME);
  std::vector<PluginTensorDesc> descs(count);
  std::vector<const void*> inputs;
  for (int32_t i = 0; i < count; ++i) {
    descs[i].dims.nbDims = tensors[i].rank;
    std::memcpy(descs[i].dims.d, tensors[i].dims, sizeof tensors[i].dims);
    descs[i].type = DataType(tensors[i].type);
    descs[i].format = TensorFormat::kLINEAR;
    inputs.push_back(tensors[i].data);
  }
  void* outputs[] = {tensors[count - 1].data};
  if (runtime->onShapeChange(descs.data(), count - 1, &descs[count - 1], 1)) return 1;
  return runtime->enqueue(descs.data(), &descs[count - 1], inputs.data(), outputs, workspace,
                          static_cast<cudaStream_t>(stream));
}
