// The ops as ONNX Runtime sees them: one CustomOp per op and combination of types, and their registration.
#include <cstdlib>
#include <deque>
#include <memory>
#include <mutex>
#include <new>
#include <utility>

#include "kernel.h"

// tools/cuda_emulator runs the CUDA ops where the CPU's would be.
#ifndef SPECQUANT_CUDA_PROVIDER
#define SPECQUANT_CUDA_PROVIDER "CUDAExecutionProvider"
#endif

namespace specquant::ort {
namespace {

constexpr const char *kCpuProvider = "CPUExecutionProvider", *kCudaProvider = SPECQUANT_CUDA_PROVIDER;
constexpr MatMulKind kBranch{"SpectralBranch", true, false};
constexpr MatMulKind kResidual{"Int4ResidualMatMul", false, true};
constexpr MatMulKind kFused{"SpecQuantMatMul", true, true};
constexpr AttentionKind kInt4Cache{"Int4KVAttention", 4};
constexpr AttentionKind kHalfCache{"HalfKVAttention", 16};

struct Registry;

// An op for one combination of types. ONNX Runtime picks by the node's.
struct Op : CustomOp {
  const char* name;
  const MatMulKind* matmul;  // null for attention
  const AttentionKind* attention;
  bool cuda;
  std::vector<ElementType> inputs, outputs;
  const Api* api;
  Registry* registry;
};

const Op& self(const CustomOp* op) { return *static_cast<const Op*>(op); }

// Runs `work`, and turns what it throws into one line that starts with the op's name.
template <class Work>
Status* guarded(const Op& op, const Work& work) {
  try {
    work();
    return nullptr;
  } catch (const Failure& failure) {
    return failure.status;
  } catch (const std::bad_alloc&) {
    return op.api->CreateStatus(kFail, (std::string(op.name) + ": out of memory").c_str());
  } catch (const std::exception& error) {
    return op.api->CreateStatus(kInvalidArgument, (std::string(op.name) + ": " + error.what()).c_str());
  }
}

struct Node {
  std::unique_ptr<Kernel> kernel;
  const Op& op;
};

Status* create(const CustomOp* custom, const void*, const KernelInfo* info, void** kernel);

Status* compute(void* kernel, KernelContext* context) {
  const Node& node = *static_cast<const Node*>(kernel);
  return guarded(node.op, [&] { node.kernel->compute(context); });
}

void destroy(void* kernel) { delete static_cast<Node*>(kernel); }

// Element type, and sizes and names of the axes, of an input; no axes if they are not known (yet).
ElementType read_axes(const Api& api, const ShapeContext* context, size_t index, Shape& sizes,
                      std::vector<std::string>& names) {
  TensorInfo* info = nullptr;  // stays the context's
  must(api.ShapeInferContext_GetInputTypeShape(context, index, &info));
  ElementType type;
  size_t count;
  must(api.GetTensorElementType(info, &type));
  must(api.GetDimensionsCount(info, &count));
  sizes.resize(count);
  std::vector<const char*> found(count, "");
  if (count) {
    must(api.GetDimensions(info, sizes.data(), count));
    must(api.GetSymbolicDimensions(info, found.data(), count));
  }
  names.assign(found.begin(), found.end());
  return type;
}

// Whether the node has a gate, which leaves half of the outputs.
bool is_gated(const Api& api, const ShapeContext* context) {
  const Attribute* given = nullptr;
  int64_t gate = 0;
  size_t read;
  Status* status = api.ShapeInferContext_GetAttribute(context, "gate", &given);
  if (!status && given) status = api.ReadOpAttr(given, kInteger, &gate, sizeof gate, &read);
  if (status) api.ReleaseStatus(status);
  return gate != 0;
}

// The shape of x with the last axis of input `source`, over `parts`, in place of its own. ONNX Runtime asks the first op of a name
// on behalf of them all, so x's type is the node's, not op.outputs.
void infer_output(const Op& op, ShapeContext* context, size_t output, size_t source, int64_t parts) {
  const Api& api = *op.api;
  Shape sizes, from;
  std::vector<std::string> names, from_names;
  const ElementType type = read_axes(api, context, 0, sizes, names);
  read_axes(api, context, source, from, from_names);
  if (sizes.empty() || from.empty()) return;
  sizes.back() = from.back() > 0 ? from.back() / parts : from.back();
  names.back() = parts == 1 ? from_names.back() : "";
  std::vector<const char*> symbols;
  for (const std::string& name : names) symbols.push_back(name.c_str());
  TensorInfo* owned;
  must(api.CreateTensorTypeAndShapeInfo(&owned));
  const std::unique_ptr<TensorInfo, void (*)(TensorInfo*)> info(owned, api.ReleaseTensorTypeAndShapeInfo);
  must(api.SetTensorElementType(owned, type));
  must(api.SetDimensions(owned, sizes.data(), sizes.size()));
  must(api.SetSymbolicDimensions(owned, symbols.data(), symbols.size()));
  must(api.ShapeInferContext_SetOutputTypeShape(context, output, owned));
}

// Shapes of attention depend on attributes and values, so those that the graph itself states stand.
Status* infer(const CustomOp* custom, ShapeContext* context) {
  const Op& op = self(custom);
  return guarded(op, [&] {
    if (!op.matmul) return;
    const bool gated = op.matmul->weights && is_gated(*op.api, context);
    infer_output(op, context, 0, op.matmul->weights ? op.matmul->scales() : 2, gated ? 2 : 1);  // scales, else coef
    if (!op.matmul->weights) infer_output(op, context, 1, 1, 1);  // low: basis
  });
}

// Which input the host must know before the GPU computes: rank, or total_sequence_length.
size_t host_input(const Op& op) { return op.matmul ? (op.matmul->branch ? 3 : SIZE_MAX) : 4; }

Op describe(Registry* registry, const Api& api, const char* name, const MatMulKind* matmul, const AttentionKind* attention, bool cuda,
            std::vector<ElementType> inputs, std::vector<ElementType> outputs) {
  Op op{{}, name, matmul, attention, cuda, std::move(inputs), std::move(outputs), &api, registry};
  op.version = kApiVersion;
  op.GetName = [](const CustomOp* custom) { return self(custom).name; };
  op.GetExecutionProviderType = [](const CustomOp* custom) {
    return self(custom).cuda ? kCudaProvider : kCpuProvider;
  };
  op.GetInputType = [](const CustomOp* custom, size_t index) { return self(custom).inputs[index]; };
  op.GetInputTypeCount = [](const CustomOp* custom) { return self(custom).inputs.size(); };
  op.GetOutputType = [](const CustomOp* custom, size_t index) { return self(custom).outputs[index]; };
  op.GetOutputTypeCount = [](const CustomOp* custom) { return self(custom).outputs.size(); };
  op.KernelDestroy = destroy;
  op.GetInputCharacteristic = op.GetOutputCharacteristic = [](const CustomOp*, size_t) { return kRequired; };
  op.GetInputMemoryType = [](const CustomOp* custom, size_t index) {
    return self(custom).cuda && index == host_input(self(custom)) ? kMemoryCpuInput : kMemoryDefault;
  };
  op.CreateKernelV2 = create;
  op.KernelComputeV2 = compute;
  op.InferOutputShapeFn = infer;
  op.GetStartVersion = [](const CustomOp*) { return 1; };
  op.GetEndVersion = [](const CustomOp*) { return 1; };
  return op;
}

// Of the CPU's first: ONNX Runtime asks the first of a name for shapes.
std::vector<Op> describe_all(Registry* registry, const Api& api) {
  std::vector<Op> ops;
  for (const bool cuda : {false, true})
    for (const ElementType real : {kFloat, kFloat16}) {
      const auto matmul = [&](const MatMulKind& kind, std::vector<ElementType> inputs,
                              std::vector<ElementType> outputs) {
        ops.push_back(describe(registry, api, kind.name, &kind, nullptr, cuda, std::move(inputs), std::move(outputs)));
      };
      if (!cuda && std::string(kCudaProvider) == kCpuProvider) continue;
      matmul(kBranch, {real, kFloat16, kFloat16, kInt64}, {real, real});
      matmul(kResidual, {real, kInt8, kInt8, kFloat16, kFloat, kFloat, real}, {real});
      matmul(kFused, {real, kFloat16, kFloat16, kInt64, kInt8, kInt8, kFloat16, kFloat, kFloat, real}, {real});
      for (const AttentionKind* kind : {&kInt4Cache, &kHalfCache}) {
        const ElementType cache = kind->kv_bits == 4 ? kInt8 : kFloat16;
        std::vector<ElementType> inputs{real, cache, cache, kInt32, kInt32, kInt64, kFloat, kFloat};
        if (kind->key_offset()) inputs.push_back(kFloat);
        ops.push_back(describe(registry, api, kind->name, nullptr, kind, cuda, std::move(inputs), {real, cache, cache}));
      }
    }
  return ops;
}

// What ONNX Runtime keeps pointers to: lives until the process ends, since sessions may. One with threads is of one
// session at a time.
struct Registry {
  const Api api;
  const Settings settings;
  std::vector<Op> ops;
  OpDomain* domain = nullptr;

  Registry(const void* table, int minor, const Settings& settings_)
      : api(table, minor), settings(settings_), ops(describe_all(this, api)) {
    must(api.CreateCustomOpDomain("specquant", &domain));
    for (const Op& op : ops) must(api.CustomOpDomain_Add(domain, &op));
  }

  // Those of the session whose kernels are being made; null if they are ONNX Runtime's.
  std::shared_ptr<SessionThreads> threads() {
    const std::lock_guard<std::mutex> lock(mutex_);
    std::shared_ptr<SessionThreads> found = threads_.lock();
    if (!found && settings.threads > 1) threads_ = found = std::make_shared<SessionThreads>(settings.threads);
    taken_ = false;
    return found;
  }

  // Whether a new session may have it.
  bool take() {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (settings.threads > 1 && (taken_ || !threads_.expired())) return false;
    return taken_ = true;
  }

 private:
  std::mutex mutex_;
  std::weak_ptr<SessionThreads> threads_;
  bool taken_ = false;  // by a session that has no kernels yet
};

Status* create(const CustomOp* custom, const void*, const KernelInfo* info, void** kernel) {
  const Op& op = self(custom);
  return guarded(op, [&] {
    std::unique_ptr<Kernel> made;
    if (op.cuda) {
      made = op.matmul ? make_cuda_matmul(*op.api, *op.matmul, info) : make_cuda_attention(*op.api, *op.attention, info);
    } else if (op.matmul) {
      made = make_matmul(*op.api, *op.matmul, info, op.registry->threads(), op.registry->settings.within);
    } else {
      made = make_attention(*op.api, *op.attention, info, op.registry->threads());
    }
    *kernel = new Node{std::move(made), op};
  });
}

// The ops for a new session.
const Registry& registry_for(const void* table, int minor, const Settings& settings) {
  static std::mutex mutex;
  static std::deque<std::unique_ptr<Registry>>* const all = new std::deque<std::unique_ptr<Registry>>;
  const std::lock_guard<std::mutex> lock(mutex);
  for (const auto& one : *all)
    if (one->settings == settings && one->take()) return *one;
  all->push_back(std::make_unique<Registry>(table, minor, settings));
  all->back()->take();
  return *all->back();
}

thread_local Settings next_session;

}  // namespace
}  // namespace specquant::ort

extern "C" __attribute__((visibility("default"))) uint32_t specquant_ort_api() { return specquant::ort::kApiVersion; }

// What the next session that this thread registers the ops for is to have: `threads` of ours (0: ONNX Runtime's pool), and
// Problem::within for the head (0: exact).
extern "C" __attribute__((visibility("default"))) void specquant_next_session(int32_t threads, float within) {
  specquant::ort::next_session = {threads, within};
}

// The entry that ONNX Runtime looks for in a library of custom ops.
extern "C" __attribute__((visibility("default"))) specquant::ort::Status* RegisterCustomOps(
    specquant::ort::SessionOptions* options, const specquant::ort::ApiBase* base) {
  namespace ort = specquant::ort;
  const void* table = base->GetApi(ort::kApiVersion);
  if (!table) {
    // An older ONNX Runtime, whose table is shorter: of API 1 only the slot that carries the message is read.
    const std::string message = "ONNX Runtime " + std::string(base->GetVersionString()) + " is too old for SpecQuant";
    const auto* slots = static_cast<void* const*>(base->GetApi(1));
    return reinterpret_cast<decltype(ort::Api::CreateStatus)>(slots[0])(ort::kFail, message.c_str());
  }
  const char* const version = base->GetVersionString();
  const int minor = version[0] == '1' && version[1] == '.' ? std::atoi(version + 2) : 0;
  try {
    const ort::Registry& registry = ort::registry_for(table, minor, std::exchange(ort::next_session, {}));
    return registry.api.AddCustomOpDomain(options, registry.domain);
  } catch (const ort::Failure& failure) {
    return failure.status;
  } catch (const std::exception& error) {
    return ort::Api(table, minor).CreateStatus(ort::kFail, error.what());
  }
}
