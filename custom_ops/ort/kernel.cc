#include "kernel.h"

#include <algorithm>
#include <cstdlib>
#include <memory>

namespace specquant::ort {
namespace {

std::string text(const Shape& shape) {
  std::string list;
  for (const int64_t size : shape) list += (list.empty() ? "" : ", ") + std::to_string(size);
  return "[" + list + "]";
}

struct Tensor {
  Shape shape;
  ElementType type;
  void* data;
};

Tensor read(const Api& api, const Value* value) {
  TensorInfo* owned;
  must(api.GetTensorTypeAndShape(value, &owned));
  const std::unique_ptr<TensorInfo, void (*)(TensorInfo*)> info(owned, api.ReleaseTensorTypeAndShapeInfo);
  Tensor tensor;
  size_t count;
  must(api.GetDimensionsCount(owned, &count));
  tensor.shape.resize(count);
  must(api.GetDimensions(owned, tensor.shape.data(), count));
  must(api.GetTensorElementType(owned, &tensor.type));
  must(api.GetTensorMutableData(const_cast<Value*>(value), &tensor.data));  // read only: inputs are const to us
  return tensor;
}

int64_t last(const Tensor& tensor, const char* name) {
  if (tensor.shape.empty()) throw std::runtime_error(std::string(name) + " is a scalar");
  return tensor.shape.back();
}

void expect(const Tensor& tensor, const char* name, const Shape& shape) {
  if (tensor.shape != shape)
    throw std::runtime_error(std::string(name) + " is " + text(tensor.shape) + " and should be " + text(shape));
}

// An empty tensor may have no address, but a null pointer in a Problem says that the operand is not there.
template <class T>
const T* pointer(const Tensor& tensor) {
  alignas(8) static const char nothing[8] = {};
  return static_cast<const T*>(tensor.data ? tensor.data : nothing);
}

struct Pool {
  const Api& api;
  const KernelContext* context;
  Status* status = nullptr;

  static void run(void* self, void (*task)(void*, size_t), void* argument, size_t count) {
    auto& pool = *static_cast<Pool*>(self);
    Status* status = pool.api.KernelContext_ParallelFor(pool.context, task, count, count, argument);
    if (!status) return;
    if (pool.status) pool.api.ReleaseStatus(pool.status);
    pool.status = status;
  }
};

}  // namespace

Kernel::Kernel(const Api& api, const OpKind& kind, const KernelInfo* info) : api_(api), kind_(kind) {
  char error[256];
  kernels_ = select(std::getenv("SPECQUANT_ISA"), error, sizeof error);
  if (!kernels_) throw std::runtime_error(error);
  if (kind.weights) {
    attributes_.group_size = attribute(info, "group_size", 0);
    attributes_.act_bits = int32_t(std::clamp<int64_t>(attribute(info, "act_bits", 16), 0, 99));
    attributes_.act_group = attribute(info, "act_group", 0);
    if (kind.branch) attributes_.subtract = attribute(info, "subtract", 0) != 0;
  }
  must(api_.KernelInfoGetAllocator(info, kMemoryDefault, &allocator_));
}

int64_t Kernel::attribute(const KernelInfo* info, const char* name, int64_t otherwise) const {
  int64_t value;
  if (Status* status = api_.KernelInfoGetAttribute_int64(info, name, &value)) {
    api_.ReleaseStatus(status);
    return otherwise;
  }
  return value;
}

void Kernel::compute(KernelContext* context) const {
  Tensor inputs[8];
  for (size_t i = 0; i < kind_.inputs(); ++i) {
    const Value* value = nullptr;
    must(api_.KernelContext_GetInput(context, i, &value));
    if (!value) throw std::runtime_error("input " + std::to_string(i) + " is missing");
    inputs[i] = read(api_, value);
  }
  const Tensor &x = inputs[0], &basis = inputs[1], &coef = inputs[2], &rank = inputs[3];
  const Tensor* weights = inputs + (kind_.branch ? 4 : 1);
  const Tensor &qweight = weights[0], &scales = weights[1], &row_sums = weights[2], &bias = weights[3];

  Problem p = attributes_;
  const int64_t n = p.in_features = last(x, "x");
  const int64_t m = p.out_features = kind_.weights ? last(scales, "scales") : last(coef, "coef");
  p.tokens = 1;
  for (size_t axis = 0; axis + 1 < x.shape.size(); ++axis) p.tokens *= x.shape[axis];
  p.half = x.type == kFloat16;
  p.x = pointer<void>(x);
  if (kind_.branch) {
    expect(rank, "rank", {1});
    const int64_t r = p.basis_rank = last(basis, "basis"), wanted = *pointer<int64_t>(rank);
    expect(basis, "basis", {n, r});
    expect(coef, "coef", {r, m});
    p.rank = wanted < 0 ? 0 : wanted > r ? r : wanted;
    p.basis = pointer<uint16_t>(basis);
    p.coef = pointer<uint16_t>(coef);
  }
  if (kind_.weights) {
    p.qweight = pointer<uint8_t>(qweight);
    p.scales = pointer<uint16_t>(scales);
    p.row_sums = pointer<void>(row_sums);
    p.wide_sums = row_sums.type == kInt32;
    p.bias = pointer<float>(bias);
  }
  if (const char* wrong = check(p)) throw std::runtime_error(wrong);
  if (kind_.weights) {
    expect(qweight, "qweight", {(m + 15) / 16, (n + 7) / 8, 64});
    expect(scales, "scales", {p.group_size ? n / p.group_size : 1, m});
    expect(row_sums, "row_sums", {n / segment_length(p), m});
    expect(bias, "bias", {m});
  }

  Shape shape = x.shape;
  shape.back() = m;
  p.y = output(context, 0, shape);
  if (!kind_.weights) {
    shape.back() = p.basis_rank;
    p.low = output(context, 1, shape);
  }
  void* memory;
  must(api_.AllocatorAlloc(allocator_, scratch_bytes(p), &memory));
  Pool pool{api_, context};
  matmul(*kernels_, p, ThreadPool{Pool::run, &pool}, memory);
  must(api_.AllocatorFree(allocator_, memory));
  must(pool.status);
}

void* Kernel::output(KernelContext* context, size_t index, const Shape& shape) const {
  Value* value;
  void* data;
  must(api_.KernelContext_GetOutput(context, index, shape.data(), shape.size(), &value));
  must(api_.GetTensorMutableData(value, &data));
  return data;
}

}  // namespace specquant::ort
