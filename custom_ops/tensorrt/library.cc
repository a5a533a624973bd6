// What TensorRT finds in the library: the creators of its plugins, and where errors are logged.
#include <atomic>
#include <cstdio>
#include <new>

#include "matmul_plugin.h"

namespace specquant_trt {
namespace {

using namespace nvinfer1;

std::atomic<ILoggerFinder*> logger_finder{nullptr};

class Creator final : public IPluginCreatorV3One {
 public:
  explicit Creator(const MatMulKind& kind) : kind_(kind), names_(defaults_), fields_(names_.first(kind.fields)) {}

  IPluginV3* createPlugin(const char*, const PluginFieldCollection* given, TensorRTPhase) noexcept override {
    Attributes attributes;
    if (given && !read_fields(*given, kind_, attributes)) return nullptr;
    return new (std::nothrow) MatMulPlugin(kind_, attributes);
  }
  const PluginFieldCollection* getFieldNames() noexcept override { return &fields_; }
  const char* getPluginName() const noexcept override { return kind_.name; }
  const char* getPluginVersion() const noexcept override { return kVersion; }
  const char* getPluginNamespace() const noexcept override { return kNamespace; }

 private:
  const MatMulKind& kind_;
  Attributes defaults_;
  Fields names_;
  PluginFieldCollection fields_;
};

}  // namespace

void log_error(const char* plugin, const char* text) noexcept {
  char line[400];
  std::snprintf(line, sizeof line, "%s: %s", plugin, text);
  ILoggerFinder* finder = logger_finder.load();
  ILogger* logger = finder ? finder->findLogger() : nullptr;
  if (logger) logger->log(ILogger::Severity::kERROR, line);
}

}  // namespace specquant_trt

extern "C" __attribute__((visibility("default"))) nvinfer1::IPluginCreatorInterface* const* getCreators(
    int32_t& count) {
  static specquant_trt::Creator fused(specquant_trt::kFused), residual(specquant_trt::kResidual);
  static nvinfer1::IPluginCreatorInterface* const creators[] = {&fused, &residual};
  count = 2;
  return creators;
}

extern "C" __attribute__((visibility("default"))) void setLoggerFinder(nvinfer1::ILoggerFinder* finder) {
  specquant_trt::logger_finder = finder;
}
