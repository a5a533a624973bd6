"""The compiled plugins as TensorRT uses them, against the reference: on a GPU, or on the CUDA kernels' emulator.

It needs g++ and TensorRT's headers (TENSORRT_INCLUDE_DIR), and what test_cuda_kernels.py needs; on a GPU also
libspecquant_trt.so. With the emulator the plugins' sources are compiled here, against its kernels.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from specquant.custom_ops import library_cuda
from specquant.custom_ops.library_tensorrt import PLUGINS, library_path
from specquant.custom_ops.schema import OPS, core
from tests.cuda_arrays import EMULATED, DeviceArray, require_kernels
from tests.ops import REFERENCE, random_input, random_weights

require_kernels()
ROOT = Path(__file__).resolve().parents[2]
CUDA = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "include"
TYPES = {"float32": 0, "float16": 1, "int8": 2, "int32": 3, "int64": 8}  # nvinfer1::DataType


class Tensor(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        ("dims", ctypes.c_int64 * 8),
        ("rank", ctypes.c_int32),
        ("type", ctypes.c_int32),
    ]


def compiled(folder: Path, name: str, *arguments: str) -> Path:
    headers = os.environ["TENSORRT_INCLUDE_DIR"]
    target = folder / name
    flags = ["-std=c++17", "-O1", "-Wall", "-Wextra", "-fPIC", "-shared", f"-isystem{headers}", f"-isystem{CUDA}"]
    subprocess.run(["g++", *flags, *arguments, "-o", str(target)], check=True)
    return target


@pytest.fixture(scope="module")
def harness(tmp_path_factory: pytest.TempPathFactory) -> tuple[ctypes.CDLL, bytes]:
    """The harness, and the plugin library."""
    if (
        shutil.which("g++") is None
        or not Path(os.environ.get("TENSORRT_INCLUDE_DIR", ""), "NvInferRuntime.h").is_file()
    ):
        pytest.skip("TENSORRT_INCLUDE_DIR names no folder of TensorRT's headers, or there is no g++")
    folder = tmp_path_factory.mktemp("harness")
    library = ctypes.CDLL(str(compiled(folder, "harness.so", str(Path(__file__).with_name("tensorrt_harness.cc")))))
    library.harness_open.restype = ctypes.c_void_p
    library.harness_workspace.restype = ctypes.c_int64
    library.harness_last.restype = ctypes.c_char_p
    if not EMULATED:
        return library, str(library_path()).encode()
    kernels = library_cuda.library_path()
    sources = [str(path) for path in (ROOT / "custom_ops" / "tensorrt").glob("*.cc")]
    include = f"-I{ROOT / 'custom_ops' / 'kernels' / 'cuda'}"
    linked = [include, *sources, str(kernels), f"-Wl,-rpath,{kernels.parent}"]
    return library, str(compiled(folder, "libspecquant_trt.so", *linked)).encode()


def opened(harness: tuple[ctypes.CDLL, bytes], op: str, attributes: dict[str, Any]) -> int | None:
    library, plugins = harness
    count, clip = len(attributes), ctypes.c_float(attributes.get("act_clip", 0))
    names = (ctypes.c_char_p * count)(*(name.encode() for name in attributes))
    ints = (ctypes.c_int64 * count)(*(0 if isinstance(value, float) else value for value in attributes.values()))
    found: int | None = library.harness_open(plugins, op.encode(), names, ints, ctypes.byref(clip), count)
    return found


def tensors_of(arrays: list[Any], dtypes: list[np.dtype[Any]]) -> Any:
    made = (Tensor * len(arrays))()
    for tensor, array, dtype in zip(made, arrays, dtypes, strict=True):
        tensor.data = array.__cuda_array_interface__["data"][0]
        tensor.dims[: len(array.shape)] = array.shape
        tensor.rank, tensor.type = len(array.shape), TYPES[dtype.name]
    return made


def computed(
    harness: tuple[ctypes.CDLL, bytes],
    op: str,
    x: NDArray[Any],
    weights: dict[str, NDArray[Any]],
    attributes: dict[str, Any],
) -> NDArray[Any]:
    library, _ = harness
    plugin = ctypes.c_void_p(opened(harness, op, attributes))
    assert plugin, library.harness_last()
    y = np.full((*x.shape[:-1], weights["scales"].shape[1]), np.nan, x.dtype)
    host = [x, *weights.values(), y]
    arrays = [DeviceArray(array) for array in host]
    tensors = tensors_of(arrays, [array.dtype for array in host])
    size = library.harness_workspace(plugin, tensors, len(host), ctypes.c_int64(x.shape[0] + 100))
    assert size > 0, library.harness_last()
    # Three bytes off: TensorRT promises no alignment.
    workspace = DeviceArray(np.full(size, 0xC5, np.uint8), 3)
    place = ctypes.c_void_p(workspace.__cuda_array_interface__["data"][0])
    assert library.harness_enqueue(plugin, tensors, len(host), place, None) == 0, library.harness_last()
    result: NDArray[Any] = arrays[-1].numpy()
    return result


@pytest.mark.parametrize("op", PLUGINS)
@pytest.mark.parametrize("float_type", [np.float32, np.float16])
@pytest.mark.parametrize(
    ("act_bits", "group", "act_group", "hadamard", "clip"),
    [(8, 64, 64, 64, 1.0), (4, 64, 64, 0, 0.9), (4, 0, 0, 16, 1.0), (8, 32, 64, 0, 1.0), (16, 64, 0, 0, 1.0)],
)
@pytest.mark.parametrize("tokens", [1, 37])
def test_enqueue(
    rng: np.random.Generator,
    harness: tuple[ctypes.CDLL, bytes],
    op: str,
    float_type: type[np.floating[Any]],
    act_bits: int,
    group: int,
    act_group: int,
    hadamard: int,
    clip: float,
    tokens: int,
) -> None:
    attributes = {"group_size": group, "act_bits": act_bits, "act_group": act_group, "act_clip": clip}
    attributes |= {"hadamard": hadamard} | ({"subtract": 1} if op == "SpecQuantMatMul" else {})
    weights = random_weights(rng, op, 128, 72, 5, group, act_group)
    x = random_input(rng, (tokens, 128), float_type)
    expected = REFERENCE[op](x, *weights.values(), **attributes)
    weights["row_sums"] = weights["row_sums"].astype(np.int32)
    actual = computed(harness, op, x, weights, attributes)
    bound = 2e-3 if float_type == np.float16 or act_bits == 16 else 1e-4
    np.testing.assert_allclose(actual, expected, rtol=bound, atol=bound * np.abs(expected).max())


def test_leading_axes_and_no_tokens(rng: np.random.Generator, harness: tuple[ctypes.CDLL, bytes]) -> None:
    attributes = {"group_size": 64, "act_bits": 8, "act_group": 64, "subtract": 1}
    weights = random_weights(rng, "SpecQuantMatMul", 64, 40, 5, 64, 64)
    x = random_input(rng, (2, 3, 64))
    expected = REFERENCE["SpecQuantMatMul"](x, *weights.values(), **attributes)
    weights["row_sums"] = weights["row_sums"].astype(np.int32)
    actual = computed(harness, "SpecQuantMatMul", x, weights, attributes)
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())
    assert computed(harness, "SpecQuantMatMul", x[:0], weights, attributes).shape == (0, 3, 40)


def test_every_attribute_survives(rng: np.random.Generator, harness: tuple[ctypes.CDLL, bytes]) -> None:
    """Serialised and read again, each changes what is computed."""
    base = {"group_size": 64, "act_bits": 8, "act_group": 64, "act_clip": 1.0, "hadamard": 0, "subtract": 0}
    assert list(base) == [a.name for a in core(OPS["SpecQuantMatMul"]).attributes]
    other = {"act_bits": 4, "act_clip": 0.7, "hadamard": 16, "subtract": 1}
    weights = random_weights(rng, "SpecQuantMatMul", 64, 40, 5, 64, 64)
    weights["row_sums"] = weights["row_sums"].astype(np.int32)
    x = random_input(rng, (5, 64))
    plain = computed(harness, "SpecQuantMatMul", x, weights, base)
    for name, value in other.items():
        assert np.abs(computed(harness, "SpecQuantMatMul", x, weights, base | {name: value}) - plain).max() > 0


def test_what_is_refused_is_logged(rng: np.random.Generator, harness: tuple[ctypes.CDLL, bytes]) -> None:
    library, _ = harness
    assert opened(harness, "Int4ResidualMatMul", {"subtract": 1}) is None
    assert library.harness_last() == b"Int4ResidualMatMul: subtract"
    plugin = ctypes.c_void_p(opened(harness, "Int4ResidualMatMul", {"act_bits": 9}))
    weights = random_weights(rng, "Int4ResidualMatMul", 64, 40, 5)
    weights["row_sums"] = weights["row_sums"].astype(np.int32)
    host = [random_input(rng, (5, 64)), *weights.values(), np.zeros((5, 40), np.float32)]
    arrays = [DeviceArray(array) for array in host]
    tensors = tensors_of(arrays, [array.dtype for array in host])
    assert library.harness_workspace(plugin, tensors, len(host), ctypes.c_int64(5)) == -1
    assert library.harness_last() == b"Int4ResidualMatMul: act_bits must be 2 to 8, or 16"
    tensors[0].type = TYPES["int8"]
    assert library.harness_workspace(plugin, tensors, len(host), ctypes.c_int64(5)) == -1
