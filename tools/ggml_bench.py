"""ggml's product with Q4_0 weights, repacked as llama.cpp repacks them, called as benchmarks call ONNX Runtime's.

    ggml = load(Path("/tmp/peers/venv/lib/python3.11/site-packages/llama_cpp/lib"))
    run = Product(ggml, x, [(q, scales)], threads=2)
    y = run()                                            # [tokens, m] of the first pair of weights
    run.repacked, run.buffer                             # True, "CPU_REPACK" or "AMX"; False, "CPU": as in a GGUF

bench_kernels.py --ggml PATH does this. The library is a shared build of ggml, such as llama-cpp-python's wheel has;
structures are those of ggml 0.25, and `load` looks whether they fit. Only ggml's public C functions are called. With
OpenMP, as llama.cpp is built by default, its threads are OpenMP's; without, they are a thread pool that stays.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from ctypes import c_bool, c_char_p, c_int, c_int64, c_size_t, c_uint32, c_void_p
from functools import cache
from pathlib import Path
from typing import Any
from weakref import finalize

import numpy as np
from numpy.typing import NDArray

from specquant.custom_ops.errors import SpecQuantError

GGML = "ggml Q4_0"
BLOCK, BLOCK_BYTES = 32, 18  # features of a Q4_0 block; a float16 and 32 nibbles
F32, Q4_0 = 0, 2  # of enum ggml_type


class _InitParams(ctypes.Structure):
    """ggml_init_params"""

    _fields_ = (("mem_size", c_size_t), ("mem_buffer", c_void_p), ("no_alloc", c_bool))


class _PoolParams(ctypes.Structure):
    """ggml_threadpool_params"""

    _fields_ = (
        ("cpumask", c_bool * 512),
        ("n_threads", c_int),
        ("prio", c_int),
        ("poll", c_uint32),
        ("strict_cpu", c_bool),
        ("paused", c_bool),
    )


def _log(level: int, text: bytes, _: int | None) -> None:
    """Warnings and errors; otherwise ggml tells of every tensor that it repacks."""
    if level in (3, 4):
        print(text.decode(errors="replace"), end="", file=sys.stderr)


_LOG = ctypes.CFUNCTYPE(None, c_int, c_char_p, c_void_p)(_log)  # lives as long as ggml calls it
_FUNCTIONS: dict[str, tuple[Any, tuple[Any, ...]]] = {  # name -> what it returns and takes
    "ggml_version": (c_char_p, ()),
    "ggml_log_set": (None, (type(_LOG), c_void_p)),
    "ggml_type_size": (c_size_t, (c_int,)),
    "ggml_tensor_overhead": (c_size_t, ()),
    "ggml_graph_overhead_custom": (c_size_t, (c_size_t, c_bool)),
    "ggml_init": (c_void_p, (_InitParams,)),
    "ggml_free": (None, (c_void_p,)),
    "ggml_new_tensor_2d": (c_void_p, (c_void_p, c_int, c_int64, c_int64)),
    "ggml_mul_mat": (c_void_p, (c_void_p, c_void_p, c_void_p)),
    "ggml_new_graph_custom": (c_void_p, (c_void_p, c_size_t, c_bool)),
    "ggml_build_forward_expand": (None, (c_void_p, c_void_p)),
    "ggml_get_data": (c_void_p, (c_void_p,)),
    "ggml_backend_alloc_ctx_tensors_from_buft": (c_void_p, (c_void_p, c_void_p)),
    "ggml_backend_buffer_free": (None, (c_void_p,)),
    "ggml_backend_tensor_set": (None, (c_void_p, c_void_p, c_size_t, c_size_t)),
    "ggml_backend_buft_name": (c_char_p, (c_void_p,)),
    "ggml_backend_cpu_reg": (c_void_p, ()),
    "ggml_backend_cpu_buffer_type": (c_void_p, ()),
    "ggml_backend_reg_dev_get": (c_void_p, (c_void_p, c_size_t)),
    "ggml_backend_reg_get_proc_address": (c_void_p, (c_void_p, c_char_p)),
    "ggml_backend_dev_supports_op": (c_bool, (c_void_p, c_void_p)),
    "ggml_backend_cpu_init": (c_void_p, ()),
    "ggml_backend_free": (None, (c_void_p,)),
    "ggml_backend_cpu_set_n_threads": (None, (c_void_p, c_int)),
    "ggml_backend_cpu_set_threadpool": (None, (c_void_p, c_void_p)),
    "ggml_backend_graph_compute": (c_int, (c_void_p, c_void_p)),
    "ggml_threadpool_params_init": (None, (ctypes.POINTER(_PoolParams), c_int)),
    "ggml_threadpool_new": (c_void_p, (ctypes.POINTER(_PoolParams),)),
    "ggml_threadpool_free": (None, (c_void_p,)),
}


@cache
def load(path: Path) -> ctypes.CDLL:
    """ggml for the CPU from a folder, or from the library itself, with its functions typed. Raises SpecQuantError if it
    does not load, lacks a function or has other structures."""
    # GCC's OpenMP reads it when it is loaded. Its idle threads would spin for 300000 rounds, 6 ms on a Xeon, in the
    # others' turn; 5000 are 0.1 ms, and ggml was not seen to be slower with them.
    os.environ.setdefault("GOMP_SPINCOUNT", "5000")
    suffix = "dylib" if sys.platform == "darwin" else "so"
    file = path / f"libggml-cpu.{suffix}" if path.is_dir() else path
    try:
        library = ctypes.CDLL(str(file.absolute()))  # its symbols and those of libggml-base, which it brings along
        for name, (result, arguments) in _FUNCTIONS.items():
            function = getattr(library, name)
            function.restype, function.argtypes = result, arguments
    except (OSError, AttributeError) as error:
        reason = str(error).splitlines()[0]
        raise SpecQuantError(f"--ggml {path}: no ggml for the CPU that fits can be loaded ({reason})") from None
    library.ggml_log_set(_LOG, None)
    pool = _pool_params(library, 3)
    if (pool.n_threads, pool.prio, pool.strict_cpu, library.ggml_type_size(Q4_0)) != (3, 0, False, BLOCK_BYTES):
        raise SpecQuantError(f"--ggml {path}: ggml {library.ggml_version().decode()} has other structures than 0.25")
    return library


def _pool_params(library: ctypes.CDLL, threads: int) -> _PoolParams:
    params = _PoolParams()
    library.ggml_threadpool_params_init(ctypes.byref(params), threads)
    return params


def q4_0(q: NDArray[np.int8], scales: NDArray[np.float16]) -> NDArray[np.void]:
    """Blocks [m, n / 32] of q int8 [n, m] and scales [n / group, m]. The weights stay what they are to the bit: Q4_0
    has levels of -8 to 7 and float16 scales, too, only for groups of 32. Raises SpecQuantError for other groups."""
    (n, m), group = q.shape, len(q) // len(scales)
    if n % BLOCK or group % BLOCK:
        raise SpecQuantError(f"{n} features in groups of {group} are no blocks of {BLOCK}, as ggml's Q4_0 needs them")
    levels = (q.T + np.int8(8)).astype(np.uint8).reshape(m, n // BLOCK, 2, BLOCK // 2)
    blocks = np.empty((m, n // BLOCK), [("scale", "<f2"), ("levels", "u1", BLOCK // 2)])
    blocks["scale"] = scales.T.repeat(group // BLOCK, axis=1)
    blocks["levels"] = levels[:, :, 0] | levels[:, :, 1] << 4  # the first half low, the second high
    return blocks


def _buffer_types(library: ctypes.CDLL, device: int) -> Iterator[int]:
    """Where weights may lie, best first, as llama.cpp looks for it: where they are repacked, at last as they are."""
    registry = library.ggml_backend_cpu_reg()
    extra = library.ggml_backend_reg_get_proc_address(registry, b"ggml_backend_dev_get_extra_bufts")
    if extra:
        found = ctypes.CFUNCTYPE(ctypes.POINTER(c_void_p), c_void_p)(extra)(device)
        for index in range(16):  # ends with a null
            if not found or not found[index]:
                break
            yield found[index]
    yield library.ggml_backend_cpu_buffer_type()


class Product:
    """x float32 [tokens, n] times every pair (q, scales), one node each, in one graph. A call computes the graph and
    returns the first node's y, which the next call overwrites. `repacked` and `buffer` tell how the weights lie."""

    def __init__(
        self,
        library: ctypes.CDLL,
        x: NDArray[np.float32],
        weights: Sequence[tuple[NDArray[np.int8], NDArray[np.float16]]],
        threads: int,
    ) -> None:
        self._library, (tokens, n), m = library, x.shape, weights[0][0].shape[1]
        device = library.ggml_backend_reg_dev_get(library.ggml_backend_cpu_reg(), 0)
        for buffer_type in _buffer_types(library, device):
            with ExitStack() as attempt:
                context = self._context(attempt, len(weights), 0)
                matrices = [library.ggml_new_tensor_2d(context, Q4_0, n, m) for _ in weights]
                self._allocate(attempt, context, buffer_type)  # first: an op is supported by where its weights lie
                context = self._context(attempt, len(weights) + 1, len(weights) + 1)
                inputs = library.ggml_new_tensor_2d(context, F32, n, tokens)
                outputs = [library.ggml_mul_mat(context, matrix, inputs) for matrix in matrices]
                if library.ggml_backend_dev_supports_op(device, outputs[0]):
                    stack = attempt.pop_all()
                    break
        else:
            raise SpecQuantError("ggml has no product of Q4_0 weights for this CPU")
        finalize(self, stack.close)
        self.version: str = library.ggml_version().decode()
        self.buffer: str = library.ggml_backend_buft_name(buffer_type).decode()
        self.repacked = buffer_type != library.ggml_backend_cpu_buffer_type()
        self._allocate(stack, context, library.ggml_backend_cpu_buffer_type())
        for matrix, pair in zip(matrices, weights, strict=True):
            self._fill(matrix, q4_0(*pair))  # repacks
        self._fill(inputs, np.ascontiguousarray(x))
        self._graph = library.ggml_new_graph_custom(context, len(weights) + 1, False)
        for output in outputs:
            library.ggml_build_forward_expand(self._graph, output)
        address = ctypes.cast(library.ggml_get_data(outputs[0]), ctypes.POINTER(ctypes.c_float))
        self._y: NDArray[np.float32] = np.ctypeslib.as_array(address, (tokens, m))

        pool = _pool_params(library, threads)
        pool.poll = 0  # without OpenMP: threads sleep between graphs, for the same reason
        self._backend = library.ggml_backend_cpu_init()
        stack.callback(library.ggml_backend_free, self._backend)
        threadpool = library.ggml_threadpool_new(ctypes.byref(pool))
        stack.callback(library.ggml_threadpool_free, threadpool)
        library.ggml_backend_cpu_set_n_threads(self._backend, threads)
        library.ggml_backend_cpu_set_threadpool(self._backend, threadpool)

    def __call__(self) -> NDArray[np.float32]:
        status = self._library.ggml_backend_graph_compute(self._backend, self._graph)
        if status:
            raise SpecQuantError(f"ggml cannot compute the product: status {status}")
        return self._y

    def _context(self, stack: ExitStack, tensors: int, nodes: int) -> int:
        """A ggml_context for that many tensors, whose data lie elsewhere, and with nodes for a graph of that many."""
        size = tensors * self._library.ggml_tensor_overhead()
        size += self._library.ggml_graph_overhead_custom(nodes, False) if nodes else 0
        context: int = self._library.ggml_init(_InitParams(size, None, True))
        stack.callback(self._library.ggml_free, context)
        return context

    def _allocate(self, stack: ExitStack, context: int, buffer_type: int) -> None:
        """Memory of that type for all tensors of the context."""
        buffer = self._library.ggml_backend_alloc_ctx_tensors_from_buft(context, buffer_type)
        if not buffer:
            raise SpecQuantError("ggml has no memory for this product; take a smaller shape")
        stack.callback(self._library.ggml_backend_buffer_free, buffer)

    def _fill(self, tensor: int, array: NDArray[Any]) -> None:
        self._library.ggml_backend_tensor_set(tensor, array.ctypes.data, 0, array.nbytes)
