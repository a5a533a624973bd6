"""What benchmarks of graphs on ONNX Runtime share: the peer's INT4 product, sessions, and runs that take turns."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Mapping
from time import perf_counter
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import helper

PEER = "MatMulNBits"
Run = Callable[[], NDArray[np.float32]]
Register = Callable[[ort.SessionOptions], None]


def peer_node(
    x: str, y: str, q: NDArray[np.int8], scales: NDArray[np.float16]
) -> tuple[onnx.NodeProto, dict[str, NDArray[Any]]]:
    """y = x times q int8 [N, M] and scales [N / group, M] by MatMulNBits with 8-bit activations, and its initialisers:
    nibbles of even features low, zero-point 8, blocks along the features."""
    (n, m), group = q.shape, len(q) // len(scales)
    levels = (q.T + np.int8(8)).astype(np.uint8)
    arrays: dict[str, NDArray[Any]] = {
        f"{y}.weight": (levels[:, ::2] | levels[:, 1::2] << 4).reshape(m, n // group, group // 2),
        f"{y}.scales": np.ascontiguousarray(scales.T.astype(np.float32)).reshape(-1),
    }
    attributes = {"K": n, "N": m, "bits": 4, "block_size": group, "accuracy_level": 4}
    return helper.make_node(PEER, [x, *arrays], [y], domain="com.microsoft", **attributes), arrays


def open_session(model: bytes, threads: int, register: Register | None) -> ort.InferenceSession:
    """The model on the CPU; `register` makes ops of ours known to its options."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3  # no warning about `rank`, an initialiser that may be set
    options.add_session_config_entry("session.force_spinning_stop", "1")  # one's idle threads in the other's turn
    chosen = os.environ.get("SPECQUANT_ISA")
    try:
        if register:
            register(options)
        return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    finally:  # a register may have set the variable for this session
        os.environ.pop("SPECQUANT_ISA", None)
        if chosen is not None:
            os.environ["SPECQUANT_ISA"] = chosen


def in_turns(
    runs: Mapping[str, Run], seconds: float, clock: Callable[[], float] = perf_counter
) -> dict[str, list[float]]:
    """Seconds by `clock` of every call, at least five of each run, in an order shuffled each time."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    end = perf_counter() + seconds
    order, shuffled = list(runs), random.Random(0)
    while perf_counter() < end or len(times[order[0]]) < 5:
        shuffled.shuffle(order)  # what ran before leaves its mark on caches and clocks
        for name in order:
            since = clock()
            runs[name]()
            times[name].append(clock() - since)
    return times


def in_place(
    session: ort.InferenceSession, inputs: Mapping[str, NDArray[Any]], outputs: Mapping[str, NDArray[Any]]
) -> Run:
    """A call that reads and writes these very arrays, and returns the first output; the same array may be both."""
    binding, first = session.io_binding(), next(iter(outputs.values()))
    for name, array in inputs.items():
        binding.bind_input(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)
    for name, array in outputs.items():
        binding.bind_output(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)
    alive = inputs, outputs  # ONNX Runtime has their addresses only

    def run(alive: Any = alive) -> NDArray[np.float32]:
        session.run_with_iobinding(binding)
        return first

    return run
