// What all plugins share: fields from a struct of attributes, cloning, the creator. An op adds shapes, types and its call.
#pragma once

#include <array>
#include <cstddef>
#include <initializer_list>
#include <new>
#include <type_traits>

#include "NvInferRuntime.h"

namespace specquant_trt {

constexpr const char* kNamespace = "specquant";  // the ONNX domain
constexpr const char* kVersion = "1";            // of the op set
constexpr int kMostFields = 9;

// An attribute: a member of a struct of int64_t and float, at `offset` in it.
struct Field {
  const char* name;
  nvinfer1::PluginFieldType type;
  size_t offset;
};

template <class T>
constexpr nvinfer1::PluginFieldType kFieldType =
    std::is_same_v<T, float> ? nvinfer1::PluginFieldType::kFLOAT32 : nvinfer1::PluginFieldType::kINT64;

#define SPECQUANT_FIELD(Attributes, name) \
  specquant_trt::Field { #name, specquant_trt::kFieldType<decltype(Attributes::name)>, offsetof(Attributes, name) }

// The first `count` of `known`, as TensorRT's fields that point into a struct of attributes.
class Fields {
 public:
  Fields(const Field* known, int count, void* attributes);
  // False, and logged with the plugin's name, if a field is unknown or of another type. What is not given stays.
  bool read(const char* plugin, const nvinfer1::PluginFieldCollection& given);
  const nvinfer1::PluginFieldCollection* collection() const { return &collection_; }

 private:
  std::array<nvinfer1::PluginField, kMostFields> list_;
  nvinfer1::PluginFieldCollection collection_;
};

// To TensorRT's logger, with the plugin's name before it.
void log_error(const char* plugin, const char* text) noexcept;

constexpr int64_t kAlignment = 256;  // that kernels want of the workspace; TensorRT promises none

// Bytes to ask for, so that so many lie behind the first aligned address; and that address.
inline size_t with_slack(int64_t bytes) { return size_t(bytes + kAlignment); }
inline void* aligned(void* pointer) {
  const auto address = reinterpret_cast<uintptr_t>(pointer);
  return reinterpret_cast<void*>((address + kAlignment - 1) / kAlignment * kAlignment);
}

inline bool fits(const nvinfer1::Dims& dims, std::initializer_list<int64_t> wanted) {
  if (dims.nbDims != int(wanted.size())) return false;
  const int64_t* given = dims.d;
  for (const int64_t size : wanted)
    if (*given++ != size) return false;
  return true;
}

inline int64_t last(const nvinfer1::Dims& dims) { return dims.nbDims > 0 ? dims.d[dims.nbDims - 1] : 0; }

// A plugin of class Self. It has no state but its attributes, so that the clone which a context makes is safe on several
// streams. Kind: which op, with its name, fields and their number.
template <class Self, class Kind_, class Attributes_>
class Plugin : public nvinfer1::IPluginV3,
               public nvinfer1::IPluginV3OneCore,
               public nvinfer1::IPluginV3OneBuildV2,
               public nvinfer1::IPluginV3OneRuntime {
 public:
  using Kind = Kind_;
  using Attributes = Attributes_;

  Plugin(const Kind& kind, const Attributes& attributes)
      : kind_(kind), attributes_(attributes), fields_(kind.fields, kind.count, &attributes_) {}
  Plugin(const Plugin&) = delete;  // fields_ points into attributes_
  Plugin& operator=(const Plugin&) = delete;

  nvinfer1::IPluginCapability* getCapabilityInterface(nvinfer1::PluginCapabilityType type) noexcept override {
    switch (type) {
      case nvinfer1::PluginCapabilityType::kCORE: return static_cast<nvinfer1::IPluginV3OneCore*>(this);
      case nvinfer1::PluginCapabilityType::kBUILD: return static_cast<nvinfer1::IPluginV3OneBuild*>(this);
      case nvinfer1::PluginCapabilityType::kRUNTIME: return static_cast<nvinfer1::IPluginV3OneRuntime*>(this);
    }
    return nullptr;
  }
  nvinfer1::IPluginV3* clone() noexcept override { return new (std::nothrow) Self(kind_, attributes_); }
  nvinfer1::IPluginV3* attachToContext(nvinfer1::IPluginResourceContext*) noexcept override { return clone(); }

  const char* getPluginName() const noexcept override { return kind_.name; }
  const char* getPluginVersion() const noexcept override { return kVersion; }
  const char* getPluginNamespace() const noexcept override { return kNamespace; }
  const nvinfer1::PluginFieldCollection* getFieldsToSerialize() noexcept override { return fields_.collection(); }

  int32_t configurePlugin(const nvinfer1::DynamicPluginTensorDesc* inputs, int32_t count,
                          const nvinfer1::DynamicPluginTensorDesc* outputs, int32_t made) noexcept override {
    return count == kind_.inputs && this->getWorkspaceSize(inputs, count, outputs, made) > 0 ? 0 : 1;
  }
  int32_t onShapeChange(const nvinfer1::PluginTensorDesc*, int32_t, const nvinfer1::PluginTensorDesc*,
                        int32_t) noexcept override {
    return 0;
  }

 protected:
  // `wrong` is logged if there is one.
  bool sound(const char* wrong) const {
    if (wrong) log_error(kind_.name, wrong);
    return !wrong;
  }

  const Kind& kind_;
  Attributes attributes_;
  Fields fields_;
};

template <class P>
class Creator final : public nvinfer1::IPluginCreatorV3One {
 public:
  explicit Creator(const typename P::Kind& kind) : kind_(kind), fields_(kind.fields, kind.count, &defaults_) {}

  nvinfer1::IPluginV3* createPlugin(const char*, const nvinfer1::PluginFieldCollection* given,
                                    nvinfer1::TensorRTPhase) noexcept override {
    typename P::Attributes attributes;
    if (given && !Fields(kind_.fields, kind_.count, &attributes).read(kind_.name, *given)) return nullptr;
    return new (std::nothrow) P(kind_, attributes);
  }
  const nvinfer1::PluginFieldCollection* getFieldNames() noexcept override { return fields_.collection(); }
  const char* getPluginName() const noexcept override { return kind_.name; }
  const char* getPluginVersion() const noexcept override { return kVersion; }
  const char* getPluginNamespace() const noexcept override { return kNamespace; }

 private:
  const typename P::Kind& kind_;
  typename P::Attributes defaults_;
  Fields fields_;
};

}  // namespace specquant_trt
