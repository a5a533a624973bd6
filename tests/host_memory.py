"""Memory of the host in the place of a GPU's (runtime/on_device.py)."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
from numpy.typing import NDArray


class HostMemory:
    """Memory with addresses, never zeroed unless asked."""

    def __init__(self) -> None:
        self.arrays: dict[int, NDArray[np.uint8]] = {}

    def allocate(self, size: int) -> int:
        array = np.full(max(1, size), 0xFF, np.uint8)  # NaN as floats
        self.arrays[array.ctypes.data] = array
        return array.ctypes.data

    def free(self, place: int) -> None:
        del self.arrays[place]

    def upload(self, place: int, array: NDArray[Any]) -> None:
        ctypes.memmove(place, array.ctypes.data, array.nbytes)

    def download(self, array: NDArray[Any], place: int) -> None:
        ctypes.memmove(array.ctypes.data, place, array.nbytes)

    def copy(self, to: int, place: int, size: int) -> None:
        ctypes.memmove(to, place, size)

    def clear(self, place: int, size: int) -> None:
        ctypes.memset(place, 0, size)
