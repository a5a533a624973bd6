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

// Inputs of an op, then its outputs. most: the largest sizes that a profile allows. type: nvinfer1::DataType.
struct Tensor {
  void* data;
  int64_t dims[8], most[8];
  int32_t rank, type;
};

static DynamicPluginTensorDesc described(const Tensor& tensor) {
  DynamicPluginTensorDesc made;
  made.desc.dims.nbDims = tensor.rank;
  std::memcpy(made.desc.dims.d, tensor.dims, sizeof tensor.dims);
  made.desc.type = DataType(tensor.type);
  made.desc.format = TensorFormat::kLINEAR;
  made.min = made.opt = made.max = made.desc.dims;
  std::memcpy(made.max.d, tensor.most, sizeof tensor.most);
  return made;
}

extern "C" const char* harness_last() { return logger.last.c_str(); }

// A plugin as a context has it: made from fields, made again from what that serialises, cloned and attached.
// A field is of floats[i] where that is not NaN, else of ints[i].
extern "C" IPluginV3* harness_open(const char* library, const char* op, const char* const* names, const int64_t* ints,
                                   const float* floats, int32_t count) {
  logger.last.clear();
  IPluginCreatorV3One* creator = creator_of(library, op);
  if (!creator) return nullptr;
  std::vector<PluginField> fields;
  for (int32_t i = 0; i < count; ++i) {
    if (floats[i] == floats[i])
      fields.emplace_back(names[i], floats + i, PluginFieldType::kFLOAT32, 1);
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

// The input that an output is an alias of, −1 for none, −2 where the plugin cannot say.
extern "C" int32_t harness_alias(IPluginV3* plugin, int32_t output) {
  auto* build = as<IPluginV3OneBuild>(plugin, PluginCapabilityType::kBUILD);
  return build->getInterfaceInfo().major < 2 ? -2 : static_cast<IPluginV3OneBuildV2*>(build)->getAliasedInput(output);
}

// Workspace for sizes up to `most`; −1 if a type is refused.
extern "C" int64_t harness_workspace(IPluginV3* plugin, const Tensor* tensors, int32_t inputs, int32_t outputs) {
  auto* build = as<IPluginV3OneBuild>(plugin, PluginCapabilityType::kBUILD);
  std::vector<DynamicPluginTensorDesc> descs;
  for (int32_t i = 0; i < inputs + outputs; ++i) descs.push_back(described(tensors[i]));
  for (int32_t i = 0; i < inputs + outputs; ++i)
    if (!build->supportsFormatCombination(i, descs.data(), inputs, outputs)) return -1;
  std::vector<DataType> types, made(outputs);
  for (int32_t i = 0; i < inputs; ++i) types.push_back(descs[i].desc.type);
  if (build->getNbOutputs() != outputs || build->getOutputDataTypes(made.data(), outputs, types.data(), inputs))
    return -1;
  for (int32_t i = 0; i < outputs; ++i)
    if (made[i] != descs[inputs + i].desc.type) return -1;
  if (build->configurePlugin(descs.data(), inputs, &descs[inputs], outputs)) return -1;
  return int64_t(build->getWorkspaceSize(descs.data(), inputs, &descs[inputs], outputs));
}

extern "C" int32_t harness_enqueue(IPluginV3* plugin, const Tensor* tensors, int32_t inputs, int32_t outputs,
                                   void* workspace, void* stream) {
  auto* runtime = as<IPluginV3OneRuntime>(plugin, PluginCapabilityType::kRUNTIME);
  std::vector<PluginTensorDesc> descs;
  std::vector<const void*> given;
  std::vector<void*> made;
  for (int32_t i = 0; i < inputs + outputs; ++i) {
    descs.push_back(described(tensors[i]).desc);
    if (i < inputs) given.push_back(tensors[i].data);
    else made.push_back(tensors[i].data);
  }
  if (runtime->onShapeChange(descs.data(), inputs, &descs[inputs], outputs)) return 1;
  return runtime->enqueue(descs.data(), &descs[inputs], given.data(), made.data(), workspace,
                          static_cast<cudaStream_t>(stream));
}
