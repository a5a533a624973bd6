"""Memory of the host in the place of a GPU's (runtime/on_device.py)."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from time import perf_counter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from specquant.custom_ops.library_cuda import Sample
from specquant.runtime.sampling import Sampling, choose


class HostMemory:
    """Memory with addresses, never zeroed unless asked. slow: steps are done only when they are waited for."""

    stream = 0

    def __init__(self, slow: bool = False) -> None:
        self.arrays: dict[int, NDArray[np.uint8]] = {}
        self.events: dict[int, float] = {}
        self.slow = slow

    def allocate(self, size: int) -> int:
        whole = np.full(size + 256, 0xFF, np.uint8)  # NaN as floats
        start = -whole.ctypes.data % 256
        array = whole[start : start + max(1, size)]
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

    def pin(self, size: int) -> int:
        return self.allocate(size)

    def unpin(self, place: int) -> None:
        self.free(place)

    def event(self) -> int:
        self.events[len(self.events) + 1] = 0.0
        return len(self.events)

    def mark(self, event: int) -> None:
        self.events[event] = perf_counter()

    def done(self, event: int) -> bool:
        return not self.slow

    def wait(self, event: int) -> None:
        assert self.events[event]

    def seconds(self, since: int, until: int) -> float:
        assert self.events[since] <= self.events[until]
        return self.events[until] - self.events[since]

    def drop_event(self, event: int) -> None:
        self.events[event] = 0.0


class HostSampler:
    """What custom_ops.library_cuda_sample does, by runtime/sampling.py; `seen` is told each call."""

    def __init__(self, seen: Callable[[Sample], None] = lambda problem: None) -> None:
        self.seen = seen

    def sample_workspace(self, problem: Sample) -> int:
        return 8 * problem.rows

    def run_sample(self, problem: Sample, workspace: int, stream: int) -> None:
        rows = problem.rows
        dtype = np.float16 if problem.half else np.float32
        logits = view(problem.logits, (rows, problem.stride), dtype).astype(np.float32)[:, : problem.vocab]
        uniforms = view(problem.uniforms, (rows,), np.float64)
        mask = view(problem.attention_mask, (rows, problem.width), np.int64)
        ids, positions, results = (
            view(place, (rows,), np.int64) for place in (problem.ids, problem.position_ids, problem.results)
        )
        sampling = Sampling(problem.temperature, problem.top_k)
        for row in range(rows):
            finite = np.isfinite(logits[row]).all()
            generators: Any = [Drawn(float(uniforms[row]))]
            results[row] = choose(logits[row : row + 1], sampling, [], generators)[0] if finite else -1
            positions[row] += 1
            if positions[row] < problem.width:
                mask[row, positions[row]] = 1
        ids[:] = np.maximum(results, 0)
        self.seen(problem)


class Drawn:
    """A generator of one number."""

    def __init__(self, number: float) -> None:
        self.number = number

    def random(self) -> float:
        return self.number


def view(place: int, shape: tuple[int, ...], dtype: Any) -> NDArray[Any]:
    """The array that lies at an address."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    return np.frombuffer((ctypes.c_byte * size).from_address(place), dtype).reshape(shape)
