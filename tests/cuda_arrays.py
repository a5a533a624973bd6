"""Arrays where the CUDA kernels read and write: on a GPU, or on the host when the kernels are compiled for it."""

from __future__ import annotations

import ctypes
import os
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from specquant.custom_ops import library_cuda
from specquant.custom_ops.errors import SpecQuantError

POISON = 0xFF  # of floats: NaN
EMULATED = os.environ.get("SPECQUANT_CUDA_EMULATED") == "1"


class HostArray:
    """Memory of the host that says it is a GPU's: for kernels compiled to run on the CPU."""

    def __init__(self, array: NDArray[Any], offset: int = 0) -> None:
        whole = np.full(array.nbytes + 256 + offset, POISON, np.uint8)
        start = -whole.ctypes.data % 256 + offset
        self.array = whole[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
        self.array[...] = array
        self.shape = array.shape

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return self.array.__array_interface__

    def numpy(self) -> NDArray[Any]:
        return self.array.copy()


class Driver:
    """What the tests need of the CUDA driver, on the context that the kernels use too."""

    def __init__(self) -> None:
        self.cuda = ctypes.CDLL("libcuda.so.1")
        device, context = ctypes.c_int(), ctypes.c_void_p()
        self.call("cuInit", 0)
        self.call("cuDeviceGet", ctypes.byref(device), 0)
        self.call("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
        self.call("cuCtxSetCurrent", context)

    def call(self, name: str, *arguments: Any) -> None:
        error = getattr(self.cuda, name)(*arguments)
        if error:
            raise OSError(f"{name} says {error}")

    def capability(self) -> tuple[int, int]:
        parts = ctypes.c_int(), ctypes.c_int()
        for attribute, part in zip((75, 76), parts, strict=True):  # compute capability, major and minor
            self.call("cuDeviceGetAttribute", ctypes.byref(part), attribute, 0)
        return parts[0].value, parts[1].value

    def allocate(self, size: int) -> int:
        place = ctypes.c_uint64()
        self.call("cuMemAlloc_v2", ctypes.byref(place), ctypes.c_size_t(max(size, 1)))
        return place.value


class GpuArray:
    """The same on a GPU, `offset` bytes off an aligned address."""

    driver: Driver

    def __init__(self, array: NDArray[Any], offset: int = 0) -> None:
        array = np.ascontiguousarray(array)
        self.shape, self.dtype, self.nbytes = array.shape, array.dtype, array.nbytes
        self.place = self.driver.allocate(array.nbytes + offset)
        self.first = self.place + offset
        if array.size:
            source = ctypes.c_void_p(array.ctypes.data)
            self.driver.call("cuMemcpyHtoD_v2", ctypes.c_uint64(self.first), source, ctypes.c_size_t(array.nbytes))

    def __del__(self) -> None:
        self.driver.call("cuMemFree_v2", ctypes.c_uint64(self.place))  # waits for the GPU

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return {"shape": self.shape, "typestr": self.dtype.str, "data": (self.first, False), "version": 3}

    def numpy(self) -> NDArray[Any]:
        array: NDArray[Any] = np.empty(self.shape, self.dtype)
        if array.size:
            to = ctypes.c_void_p(array.ctypes.data)
            self.driver.call("cuMemcpyDtoH_v2", to, ctypes.c_uint64(self.first), ctypes.c_size_t(self.nbytes))
        return array


def require_kernels() -> None:
    """Skip the module that calls this while it is imported, where the kernels cannot run."""
    try:
        if not EMULATED:
            GpuArray.driver = Driver()
        library_cuda.check_device()
    except (OSError, SpecQuantError) as missing:
        pytest.skip(f"no GPU, or no kernels for it: {missing}", allow_module_level=True)


def capability() -> tuple[int, int]:
    """Compute capability of the GPU, or of the one that is emulated."""
    return (int(os.environ.get("SPECQUANT_CUDA_EMULATED_MAJOR", "9")), 0) if EMULATED else GpuArray.driver.capability()


DeviceArray: Any = HostArray if EMULATED else GpuArray
