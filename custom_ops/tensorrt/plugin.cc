#include "plugin.h"

#include <cstring>

namespace specquant_trt {

using namespace nvinfer1;

namespace {

bool integer(const PluginField& field, int64_t& value) {
  if (field.length != 1 || !field.data) return false;
  if (field.type == PluginFieldType::kINT64) value = *static_cast<const int64_t*>(field.data);
  else if (field.type == PluginFieldType::kINT32) value = *static_cast<const int32_t*>(field.data);
  else return false;
  return true;
}

}  // namespace

Fields::Fields(const Field* known, int count, void* attributes) {
  for (int i = 0; i < count; ++i)
    list_[i] = PluginField{known[i].name, static_cast<char*>(attributes) + known[i].offset, known[i].type, 1};
  collection_ = {count, list_.data()};
}

bool Fields::read(const char* plugin, const PluginFieldCollection& given) {
  for (int32_t i = 0; i < given.nbFields; ++i) {
    const PluginField& field = given.fields[i];
    bool read = false;
    for (int32_t j = 0; j < collection_.nbFields && !read; ++j) {
      if (!field.name || std::strcmp(field.name, list_[j].name) != 0) continue;
      void* place = const_cast<void*>(list_[j].data);  // in attributes, which were given to be written
      if (list_[j].type == PluginFieldType::kINT64) {
        read = integer(field, *static_cast<int64_t*>(place));
      } else if (field.type == PluginFieldType::kFLOAT32 && field.length == 1 && field.data) {
        *static_cast<float*>(place) = *static_cast<const float*>(field.data);
        read = true;
      }
    }
    if (!read) {
      log_error(plugin, field.name ? field.name : "(a field without a name)");
      return false;
    }
  }
  return true;
}

}  // namespace specquant_trt
