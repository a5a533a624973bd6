"""What this machine can do at most: byte products and reads from memory, measured with the compiled library."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from threading import Barrier, Thread
from time import perf_counter

import numpy as np

from specquant.custom_ops.library import address, isas, loaded

_RUNS = 12
_STEPS = 1 << 15  # of a run of products: some milliseconds
_BYTES = 128 << 20  # that each thread reads in a run: several times any cache but a server's


@dataclass(frozen=True)
class Limits:
    """gops: 10⁹ operations on bytes a second, a product and its addition being two, with the factors in registers;
    gbps: 10⁹ bytes a second read from memory. Of all threads together, the best of some short runs. isa: whose
    instructions multiply."""

    gops: float
    gbps: float
    isa: str


def measure_limits(threads: int) -> Limits:
    """Takes about a second, and 128 MiB a thread. Raises SpecQuantError if the library is missing or does not fit."""
    library = loaded()
    library.specquant_peak.restype = ctypes.c_int64
    library.specquant_peak.argtypes = [ctypes.c_int64, ctypes.c_char_p]
    library.specquant_read.restype = ctypes.c_uint64
    library.specquant_read.argtypes = [ctypes.c_void_p, ctypes.c_int64]
    name = [isa for isa, supported in isas().items() if supported][-1]
    words = np.ones(_BYTES // 8, np.uint64)  # written to, so that every page is there; threads may read the same

    def multiply() -> int:
        return int(library.specquant_peak(_STEPS, name.encode()))

    def read() -> int:
        library.specquant_read(address(words), words.size)
        return words.nbytes

    return Limits(gops=_best_rate(multiply, threads), gbps=_best_rate(read, threads), isa=name)


def _best_rate(work: Callable[[], int], threads: int) -> float:
    """10⁹ of what `work` counts, a second, on all threads at once. ctypes lets go of the interpreter's lock."""
    best = 0.0
    for _ in range(_RUNS):
        spans: list[tuple[float, float, int]] = []
        barrier = Barrier(threads)

        def run(barrier: Barrier = barrier, spans: list[tuple[float, float, int]] = spans) -> None:
            barrier.wait()
            since = perf_counter()
            done = work()
            spans.append((since, perf_counter(), done))

        pool = [Thread(target=run) for _ in range(threads)]
        for thread in pool:
            thread.start()
        for thread in pool:
            thread.join()
        seconds = max(end for _, end, _ in spans) - min(start for start, _, _ in spans)
        best = max(best, sum(done for _, _, done in spans) / seconds / 1e9)
    return best
