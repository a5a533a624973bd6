"""The compiled plugins as TensorRT uses them: on a GPU, or on the CUDA kernels' emulator.

It needs g++ and TensorRT's headers (TENSORRT_INCLUDE_DIR), and what test_cuda_kernels.py needs; on a GPU also
libspecquant_trt.so. With the emulator the plugins' sources are compiled here, against its kernels.
"""

from __future__ import annotations

import ctypes
import math
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from specquant.custom_ops import library_cuda
from specquant.custom_ops.library_tensorrt import library_path
from tests.cuda_arrays import EMULATED, POISON, DeviceArray

ROOT = Path(__file__).resolve().parents[1]
CUDA = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "include"
TYPES = {"float32": 0, "float16": 1, "int8": 2, "int32": 3, "int64": 8}  # nvinfer1::DataType
Harness = tuple[ctypes.CDLL, bytes]


class Tensor(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        ("dims", ctypes.c_int64 * 8),
        ("most", ctypes.c_int64 * 8),
        ("rank", ctypes.c_int32),
        ("type", ctypes.c_int32),
    ]


def compiled(folder: Path, name: str, *arguments: str) -> Path:
    headers = os.environ["TENSORRT_INCLUDE_DIR"]
    target = folder / name
    flags = ["-std=c++17", "-O1", "-Wall", "-Wextra", "-fPIC", "-shared", f"-isystem{headers}", f"-isystem{CUDA}"]
    subprocess.run(["g++", *flags, *arguments, "-o", str(target)], check=True)
    return target


def build_harness(folder: Path) -> Harness:
    """The harness, and the plugin library, made in `folder`. Skips the test that asks where they cannot be made."""
    if (
        shutil.which("g++") is None
        or not Path(os.environ.get("TENSORRT_INCLUDE_DIR", ""), "NvInferRuntime.h").is_file()
    ):
        pytest.skip("TENSORRT_INCLUDE_DIR names no folder of TensorRT's headers, or there is no g++")
    source = ROOT / "tests" / "custom_ops" / "tensorrt_harness.cc"
    library = ctypes.CDLL(str(compiled(folder, "harness.so", str(source))))
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


def opened(harness: Harness, op: str, attributes: dict[str, Any]) -> int | None:
    library, plugins = harness
    count = len(attributes)
    names = (ctypes.c_char_p * count)(*(name.encode() for name in attributes))
    ints = (ctypes.c_int64 * count)(*(0 if isinstance(value, float) else value for value in attributes.values()))
    reals = (value if isinstance(value, float) else math.nan for value in attributes.values())
    found: int | None = library.harness_open(plugins, op.encode(), names, ints, (ctypes.c_float * count)(*reals), count)
    return found


def tensors_of(host: list[NDArray[Any]], arrays: list[Any], most: dict[int, tuple[int, ...]]) -> Any:
    """most: by the index of an array, the largest shape that the plugin is made for, where it is another."""
    made = (Tensor * len(arrays))()
    for index, (tensor, before, array) in enumerate(zip(made, host, arrays, strict=True)):
        tensor.data = array.__cuda_array_interface__["data"][0]
        tensor.dims[: before.ndim] = before.shape
        tensor.most[: before.ndim] = most.get(index, before.shape)
        tensor.rank, tensor.type = before.ndim, TYPES[before.dtype.name]
    return made


def computed(
    harness: Harness,
    op: str,
    inputs: list[NDArray[Any]],
    outputs: list[NDArray[Any] | int],
    attributes: dict[str, Any],
    most: dict[int, tuple[int, ...]],
) -> list[NDArray[Any]]:
    """What a plugin that has been serialised makes of `outputs`: arrays that it fills, or the inputs they are."""
    library, _ = harness
    plugin = ctypes.c_void_p(opened(harness, op, attributes))
    assert plugin, library.harness_last()
    arrays = [DeviceArray(array) for array in inputs]
    arrays += [arrays[array] if isinstance(array, int) else DeviceArray(array) for array in outputs]
    host = [*inputs, *(inputs[array] if isinstance(array, int) else array for array in outputs)]
    tensors, counts = tensors_of(host, arrays, most), (len(inputs), len(outputs))
    size = library.harness_workspace(plugin, tensors, *counts)
    assert size > 0, library.harness_last()
    # Three bytes off: TensorRT promises no alignment.
    workspace = DeviceArray(np.full(size + 64, POISON, np.uint8), 3)
    place = ctypes.c_void_p(workspace.__cuda_array_interface__["data"][0])
    assert library.harness_enqueue(plugin, tensors, *counts, place, None) == 0, library.harness_last()
    assert (workspace.numpy()[size:] == POISON).all(), "wrote past the end of the workspace"
    return [array.numpy() for array in arrays[len(inputs) :]]


def refusal(harness: Harness, op: str, inputs: list[NDArray[Any]], attributes: dict[str, Any], outputs: int) -> bytes:
    """What is logged when the plugin is configured for these inputs; their types are not looked at after the first."""
    library, _ = harness
    plugin = ctypes.c_void_p(opened(harness, op, attributes))
    assert plugin, library.harness_last()
    host = [*inputs, *inputs[:outputs]]
    tensors = tensors_of(host, [DeviceArray(array) for array in host], {})
    assert library.harness_workspace(plugin, tensors, len(inputs), outputs) == -1
    said: bytes = library.harness_last()
    return said
