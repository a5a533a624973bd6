"""custom_ops/ort/ort_abi.h against the official header, where there is one (Debian 13: libonnxruntime-dev)."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

OURS = Path(__file__).parents[2] / "custom_ops" / "ort"
PLACES = ["/usr/include/onnxruntime", "/usr/include/onnxruntime/core/session", "/usr/local/include/onnxruntime"]

# Two signatures agree if each pair of types has the same size, and is or is not a pointer, in the same order:
# every opaque pointer and enum has a name of its own on either side.
PROGRAM = r"""
#include <onnxruntime_c_api.h>
#include <ort_abi.h>
#include <type_traits>

template <class A, class B>
constexpr bool alike() {
  if constexpr (std::is_void_v<A> || std::is_void_v<B>) {
    return std::is_void_v<A> && std::is_void_v<B>;
  } else {
    return sizeof(A) == sizeof(B) && std::is_pointer_v<A> == std::is_pointer_v<B>;
  }
}
template <class A, class B>
struct Same : std::false_type {};
template <class R, class... A, class S, class... B>
struct Same<R (*)(A...), S (*)(B...)> {
  static constexpr bool check() {
    if constexpr (sizeof...(A) == sizeof...(B)) return alike<R, S>() && (alike<A, B>() && ...);
    return false;
  }
  static constexpr bool value = check();
};
template <class R, class... A, class S, class... B>  // the official pointers are noexcept
struct Same<R (*)(A...), S (*)(B...) noexcept> : Same<R (*)(A...), S (*)(B...)> {};

namespace ours = specquant::ort;

#define SLOT(name, slot, result, arguments)                                          \
  static_assert(offsetof(OrtApi, name) == slot * sizeof(void*), #name " is elsewhere"); \
  static_assert(Same<decltype(ours::Api::name), decltype(OrtApi::name)>::value, #name " differs");
SPECQUANT_ORT_SLOTS(SLOT)
#if ORT_API_VERSION >= 24
SPECQUANT_ORT_SLOTS_24(SLOT)
#endif

#define FIELD(name)                                                                                 \
  static_assert(offsetof(ours::CustomOp, name) == offsetof(OrtCustomOp, name), #name " is elsewhere"); \
  static_assert(Same<decltype(ours::CustomOp::name), decltype(OrtCustomOp::name)>::value, #name " differs");
FIELD(GetName) FIELD(GetExecutionProviderType) FIELD(GetInputType) FIELD(GetInputTypeCount) FIELD(GetOutputType)
FIELD(GetOutputTypeCount) FIELD(KernelDestroy) FIELD(GetInputCharacteristic) FIELD(GetOutputCharacteristic)
FIELD(GetInputMemoryType) FIELD(CreateKernelV2) FIELD(KernelComputeV2) FIELD(InferOutputShapeFn)
FIELD(GetStartVersion) FIELD(GetEndVersion) FIELD(GetMayInplace) FIELD(ReleaseAliasMap)
static_assert(offsetof(ours::CustomOp, version) == offsetof(OrtCustomOp, version));

static_assert(offsetof(ours::ApiBase, GetApi) == offsetof(OrtApiBase, GetApi));
static_assert(offsetof(ours::ApiBase, GetVersionString) == offsetof(OrtApiBase, GetVersionString));
static_assert(ours::kApiVersion <= ORT_API_VERSION);
static_assert(int(ours::kFail) == ORT_FAIL && int(ours::kInvalidArgument) == ORT_INVALID_ARGUMENT);
static_assert(int(ours::kMemoryCpuInput) == OrtMemTypeCPUInput);
static_assert(int(ours::kMemoryDefault) == OrtMemTypeDefault && int(ours::kRequired) == INPUT_OUTPUT_REQUIRED);
static_assert(int(ours::kFloat) == ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT);
static_assert(int(ours::kInt8) == ONNX_TENSOR_ELEMENT_DATA_TYPE_INT8);
static_assert(int(ours::kInt32) == ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32);
static_assert(int(ours::kInt64) == ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64);
static_assert(int(ours::kFloat16) == ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16);
"""


def official_header() -> Path:
    named = os.environ.get("ONNXRUNTIME_INCLUDE_DIR")
    for place in [named] if named else PLACES:
        if (Path(place) / "onnxruntime_c_api.h").is_file():
            return Path(place)
    pytest.skip("no onnxruntime_c_api.h; set ONNXRUNTIME_INCLUDE_DIR to its folder")


def compile_with(program: str, ours: Path, official: Path) -> subprocess.CompletedProcess[str]:
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("needs g++")
    command = [compiler, "-std=c++17", "-fsyntax-only", "-Wno-invalid-offsetof", f"-I{ours}", f"-I{official}"]
    return subprocess.run([*command, "-x", "c++", "-"], input=program, capture_output=True, text=True)


def test_our_slots_and_structs_are_the_official_ones() -> None:
    result = compile_with(PROGRAM, OURS, official_header())
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("X(GetDimensions, 62,", "X(GetDimensions, 63,"),
        ("(const TensorInfo*, int64_t*, size_t)", "(const TensorInfo*, int64_t*)"),
        ("size_t (*GetInputTypeCount)(const CustomOp*);", ""),
    ],
)
def test_a_difference_would_be_found(tmp_path: Path, right: str, wrong: str) -> None:
    official = official_header()
    header = (OURS / "ort_abi.h").read_text()
    assert right in header
    (tmp_path / "ort_abi.h").write_text(header.replace(right, wrong))
    assert compile_with(PROGRAM, tmp_path, official).returncode != 0
