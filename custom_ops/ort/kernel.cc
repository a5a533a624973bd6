#include "kernel.h"

#include <cstdlib>

namespace specquant::ort {
namespace {

std::string text(const Shape& shape) {
  std::string list;
  for (const int64_t size : shape) list += (list.empty() ? "" : ", ") + std::to_string(size);
  return "[" + list + "]";
}

Tensor read(const Api& api, const Value* value) {
  Tensor tensor;
  must(api.GetTensorMutableData(const_cast<Value*>(value), &tensor.data));  // read only: inputs are const to us
  size_t count;
  if (api.GetTensorElementTypeAndShapeDataReference) {
    const int64_t* sizes;
    must(api.GetTensorElementTypeAndShapeDataReference(value, &tensor.type, &sizes, &count));
    tensor.shape.resize(count);
    std::copy(sizes, sizes + count, tensor.shape.data());
    return tensor;
  }
  TensorInfo* owned;
  must(api.GetTensorTypeAndShape(value, &owned));
  const std::unique_ptr<TensorInfo, void (*)(TensorInfo*)> info(owned, api.ReleaseTensorTypeAndShapeInfo);
  must(api.GetDimensionsCount(owned, &count));
  tensor.shape.resize(count);
  must(api.GetDimensions(owned, tensor.shape.data(), count));
  must(api.GetTensorElementType(owned, &tensor.type));
  return tensor;
}

}  // namespace

int64_t Tensor::last(const char* name) const {
  if (shape.empty()) throw std::runtime_error(std::string(name) + " is a scalar");
  return shape.back();
}

void Tensor::expect(const char* name, const Shape& wanted) const {
  if (shape != wanted) throw std::runtime_error(std::string(name) + " is " + text(shape) + " and should be " + text(wanted));
}

void CpuKernel::Pool::run(void* self, void (*task)(void*, size_t), void* argument, size_t count) {
  auto& pool = *static_cast<Pool*>(self);
  Status* status = pool.api.KernelContext_ParallelFor(pool.context, task, count, count, argument);
  if (!status) return;
  if (pool.status) pool.api.ReleaseStatus(pool.status);
  pool.status = status;
}

Kernel::Kernel(const Api& api, const KernelInfo* info) : api_(api) {
  must(api_.KernelInfoGetAllocator(info, kMemoryDefault, &allocator_));
}

CpuKernel::CpuKernel(const Api& api, const KernelInfo* info, std::shared_ptr<SessionThreads> threads)
    : Kernel(api, info), threads_(std::move(threads)) {
  char error[256];
  kernels_ = select(std::getenv("SPECQUANT_ISA"), error, sizeof error);
  if (!kernels_) throw std::runtime_error(error);
  size_t count;
  must(api_.KernelInfo_GetInputCount(info, &count));
  constants_.resize(count);
  for (size_t i = 0; i < count; ++i) {
    int constant = 0;
    const Value* value = nullptr;
    must(api_.KernelInfoGetConstantInput_tensor(info, i, &constant, &value));
    if (constant && value) constants_[i] = ort::read(api_, value);
  }
}

int64_t Kernel::attribute(const KernelInfo* info, const char* name, int64_t otherwise) const {
  int64_t value;
  if (Status* status = api_.KernelInfoGetAttribute_int64(info, name, &value)) {
    api_.ReleaseStatus(status);
    return otherwise;
  }
  return value;
}

float Kernel::attribute(const KernelInfo* info, const char* name, float otherwise) const {
  float value;
  if (Status* status = api_.KernelInfoGetAttribute_float(info, name, &value)) {
    api_.ReleaseStatus(status);
    return otherwise;
  }
  return value;
}

void Kernel::read(KernelContext* context, Inputs& inputs) const {
  for (size_t i = 0; i < inputs.size(); ++i) {
    if (i < constants_.size() && constants_[i]) {
      inputs.keep(i, *constants_[i]);
      continue;
    }
    const Value* value = nullptr;
    must(api_.KernelContext_GetInput(context, i, &value));
    if (!value) throw std::runtime_error("input " + std::to_string(i) + " is missing");
    inputs.read(i, ort::read(api_, value));
  }
}

void* Kernel::output(KernelContext* context, size_t index, const Shape& shape) const {
  Value* value;
  void* data;
  must(api_.KernelContext_GetOutput(context, index, shape.data(), shape.size(), &value));
  must(api_.GetTensorMutableData(value, &data));
  return data;
}

}  // namespace specquant::ort
