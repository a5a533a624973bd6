"""The little of the CUDA driver that a backend needs: memory, copies, a stream. ctypes only: nothing is linked."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from specquant.custom_ops.errors import SpecQuantError

_MAJOR, _MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_…


class Device:
    """The first GPU that CUDA_VISIBLE_DEVICES leaves, and one stream of it. Addresses are ints.

    capability: its compute capability, (8, 9) or such; gpu: `sm89`. Raises SpecQuantError if there is no driver or GPU.
    """

    def __init__(self) -> None:
        try:
            self._cuda = ctypes.CDLL("libcuda.so.1")
        except OSError:
            raise SpecQuantError(
                "this machine has no NVIDIA driver (libcuda.so.1), or no NVIDIA GPU: use --device cpu"
            ) from None
        device, context, stream = ctypes.c_int(), ctypes.c_void_p(), ctypes.c_void_p()
        self._call("cuInit", 0)
        self._call("cuDeviceGet", ctypes.byref(device), 0)
        major, minor = ctypes.c_int(), ctypes.c_int()
        for attribute, part in ((_MAJOR, major), (_MINOR, minor)):
            self._call("cuDeviceGetAttribute", ctypes.byref(part), attribute, device)
        self.capability = (major.value, minor.value)
        self.gpu = f"sm{major.value}{minor.value}"
        # The primary context is the one that TensorRT and the CUDA runtime use, too.
        self._call("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
        self._call("cuCtxSetCurrent", context)
        self._call("cuStreamCreate", ctypes.byref(stream), 1)  # 1: does not wait for the default stream
        self.stream = int(stream.value or 0)

    def allocate(self, size: int) -> int:
        """`size` bytes, of undefined content. Raises SpecQuantError if the GPU has not as many."""
        place = ctypes.c_uint64()
        self._call("cuMemAlloc_v2", ctypes.byref(place), ctypes.c_size_t(max(1, size)))
        return place.value

    def free_bytes(self) -> int:
        """Memory of the GPU that nobody uses."""
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        self._call("cuMemGetInfo_v2", ctypes.byref(free), ctypes.byref(total))
        return free.value

    def free(self, place: int) -> None:
        self._call("cuMemFree_v2", ctypes.c_uint64(place))

    def upload(self, place: int, array: NDArray[Any]) -> None:
        """In the stream's order; array contiguous. The driver has copied an array of the host's when this returns."""
        source = ctypes.c_void_p(array.ctypes.data)
        self._call("cuMemcpyHtoDAsync_v2", ctypes.c_uint64(place), source, ctypes.c_size_t(array.nbytes), self._stream)

    def download(self, array: NDArray[Any], place: int) -> None:
        """Fill `array`, contiguous, after all that the stream holds."""
        to = ctypes.c_void_p(array.ctypes.data)
        self._call("cuMemcpyDtoHAsync_v2", to, ctypes.c_uint64(place), ctypes.c_size_t(array.nbytes), self._stream)
        self._call("cuStreamSynchronize", self._stream)

    def copy(self, to: int, place: int, size: int) -> None:
        """Between two places of the GPU that do not overlap, in the stream's order."""
        self._call(
            "cuMemcpyDtoDAsync_v2", ctypes.c_uint64(to), ctypes.c_uint64(place), ctypes.c_size_t(size), self._stream
        )

    def clear(self, place: int, size: int) -> None:
        """Zeros, in the stream's order."""
        self._call("cuMemsetD8Async", ctypes.c_uint64(place), ctypes.c_ubyte(0), ctypes.c_size_t(size), self._stream)

    def pin(self, size: int) -> int:
        """`size` bytes of the host's memory that the GPU reads and writes at the same address."""
        place = ctypes.c_void_p()
        self._call("cuMemAllocHost_v2", ctypes.byref(place), ctypes.c_size_t(max(1, size)))
        return int(place.value or 0)

    def unpin(self, place: int) -> None:
        self._call("cuMemFreeHost", ctypes.c_void_p(place))

    def event(self) -> int:
        """A point in the stream's order, to be marked."""
        event = ctypes.c_void_p()
        self._call("cuEventCreate", ctypes.byref(event), 0)
        return int(event.value or 0)

    def mark(self, event: int) -> None:
        """The event is from now on when all is done that the stream holds now."""
        self._call("cuEventRecord", ctypes.c_void_p(event), self._stream)

    def done(self, event: int) -> bool:
        """Whether a marked event has come."""
        error = self._cuda.cuEventQuery(ctypes.c_void_p(event))
        if error == 600:  # CUDA_ERROR_NOT_READY
            return False
        self._check("cuEventQuery", error)
        return True

    def wait(self, event: int) -> None:
        self._call("cuEventSynchronize", ctypes.c_void_p(event))

    def seconds(self, since: int, until: int) -> float:
        """Between two events that have come."""
        found = ctypes.c_float()
        self._call("cuEventElapsedTime", ctypes.byref(found), ctypes.c_void_p(since), ctypes.c_void_p(until))
        return found.value / 1e3

    def drop_event(self, event: int) -> None:
        self._call("cuEventDestroy_v2", ctypes.c_void_p(event))

    def record(self, work: Callable[[], None]) -> int:
        """What `work` puts in the stream as a CUDA graph, in place of doing it. Raises SpecQuantError, also where work
        does what cannot be recorded, and what work raises."""
        graph, recorded = ctypes.c_void_p(), ctypes.c_void_p()
        self._call("cuStreamBeginCapture_v2", self._stream, 1)  # 1: what other threads do is no concern of it
        try:
            work()
        except BaseException:
            self._cuda.cuStreamEndCapture(self._stream, ctypes.byref(graph))
            self._cuda.cuGraphDestroy(graph)
            raise
        self._call("cuStreamEndCapture", self._stream, ctypes.byref(graph))
        try:
            self._call("cuGraphInstantiateWithFlags", ctypes.byref(recorded), graph, ctypes.c_ulonglong(0))
        finally:
            self._cuda.cuGraphDestroy(graph)
        return int(recorded.value or 0)

    def replay(self, graph: int) -> None:
        self._call("cuGraphLaunch", ctypes.c_void_p(graph), self._stream)

    def forget(self, graph: int) -> None:
        self._call("cuGraphExecDestroy", ctypes.c_void_p(graph))

    @property
    def _stream(self) -> ctypes.c_void_p:
        return ctypes.c_void_p(self.stream)

    def _call(self, name: str, *arguments: Any) -> None:
        self._check(name, getattr(self._cuda, name)(*arguments))

    def _check(self, name: str, error: int) -> None:
        if error == 2:  # CUDA_ERROR_OUT_OF_MEMORY
            raise SpecQuantError("the GPU has not enough free memory: use a shorter context or fewer prompts at once")
        if error:
            text = ctypes.c_char_p()
            self._cuda.cuGetErrorString(error, ctypes.byref(text))
            reason = (text.value or b"unknown error").decode()
            raise SpecQuantError(f"the NVIDIA driver failed in {name}: {reason} ({error}); check nvidia-smi")


def element_bytes(shape: tuple[int, ...], dtype: Any) -> int:
    """Bytes of an array."""
    return int(np.prod(shape, dtype=np.int64)) * int(np.dtype(dtype).itemsize)
