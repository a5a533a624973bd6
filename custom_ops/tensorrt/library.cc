// What TensorRT finds in the library: the creators of its plugins, and where errors are logged.
#include <atomic>
#include <cstdio>

#include "attention_plugin.h"
#include "branch_plugin.h"
#include "matmul_plugin.h"

namespace specquant_trt {
namespace {

std::atomic<nvinfer1::ILoggerFinder*> logger_finder{nullptr};

}  // namespace

void log_error(const char* plugin, const char* text) noexcept {
  char line[400];
  std::snprintf(line, sizeof line, "%s: %s", plugin, text);
  nvinfer1::ILoggerFinder* finder = logger_finder.load();
  nvinfer1::ILogger* logger = finder ? finder->findLogger() : nullptr;
  if (logger) logger->log(nvinfer1::ILogger::Severity::kERROR, line);
}

}  // namespace specquant_trt

extern "C" __attribute__((visibility("default"))) nvinfer1::IPluginCreatorInterface* const* getCreators(
    int32_t& count) {
  using namespace specquant_trt;
  static Creator<MatMulPlugin> fused(kFused), residual(kResidual);
  static Creator<BranchPlugin> branch(kBranch);
  static Creator<AttentionPlugin> int4(kInt4Cache), half(kHalfCache);
  static nvinfer1::IPluginCreatorInterface* const creators[] = {&fused, &residual, &branch, &int4, &half};
  count = 5;
  return creators;
}

extern "C" __attribute__((visibility("default"))) void setLoggerFinder(nvinfer1::ILoggerFinder* finder) {
  specquant_trt::logger_finder = finder;
}
