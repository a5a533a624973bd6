"""The compiled library: where it lies, whether it fits this machine and this ONNX Runtime, and its C ABI.

`register(session_options)` is what a session calls. `specquant_matmul` and `quantize_activation` run the kernels
without ONNX Runtime, on one thread, for tests and tools. NumPy and ctypes only.
"""

from __future__ import annotations

import ctypes
import os
import platform
from functools import cache
from importlib import metadata, resources
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from specquant.custom_ops.errors import SpecQuantError
from specquant.custom_ops.packing import segment_length

ABI = 10  # kAbi of kernels/cpu/kernels.h
ORT_MINIMUM = (1, 20)
FILE = "libspecquant_cpu.so"
REBUILD = "run `pip install --force-reinstall .` (it needs g++)"

_POINTERS = ("x", "basis", "coef", "qweight", "group_scales", "scales", "bias", "norm", "residual", "y", "low")
_SIZES = ("tokens", "in_features", "out_features", "basis_rank", "rank", "group_size", "act_group", "hadamard")
_FLAGS = ("act_bits", "subtract", "half", "prologue", "gate")


class _Problem(ctypes.Structure):
    """`Problem` of kernels/cpu/kernels.h, field for field."""

    _fields_ = (
        [(name, ctypes.c_int64) for name in _SIZES]
        + [(name, ctypes.c_int32) for name in _FLAGS]
        + [(name, ctypes.c_float) for name in ("act_clip", "epsilon", "within")]
        + [(name, ctypes.c_void_p) for name in _POINTERS]
    )


def library_path() -> Path:
    """The compiled library: SPECQUANT_LIBRARY if it is set, else the file installed beside this module.

    Raises SpecQuantError if there is no such file.
    """
    named = os.environ.get("SPECQUANT_LIBRARY")
    path = Path(named) if named else Path(str(resources.files("specquant.custom_ops").joinpath(FILE)))
    if not path.is_file():
        origin = "SPECQUANT_LIBRARY names" if named else "the compiled library should be"
        raise SpecQuantError(f"{origin} {path}, which is not there; {REBUILD}")
    return path


def _load(path: Path) -> ctypes.CDLL:
    """The library at `path`. Raises SpecQuantError if it is for another machine or another version of us."""
    try:
        library = ctypes.CDLL(str(path))
        library.specquant_abi.restype = ctypes.c_int32
        library.specquant_problem_size.restype = ctypes.c_int64
        abi, size = library.specquant_abi(), library.specquant_problem_size()
    except OSError as error:
        reason = str(error).splitlines()[0]
        raise SpecQuantError(f"{path} does not load on {platform.machine()} ({reason}); {REBUILD}") from None
    except AttributeError:
        raise SpecQuantError(f"{path} is not SpecQuant's library; {REBUILD}") from None
    if abi != ABI or size != ctypes.sizeof(_Problem):
        raise SpecQuantError(f"{path} has ABI {abi}, this package needs {ABI}; {REBUILD}")
    pointer, text = ctypes.c_void_p, ctypes.c_char_p
    library.specquant_isa.restype = text
    library.specquant_isa.argtypes = [ctypes.c_int32]
    library.specquant_isa_supported.argtypes = [text]
    library.specquant_run.restype = text
    library.specquant_run.argtypes = [ctypes.POINTER(_Problem), text]
    library.specquant_attend.restype = text
    library.specquant_attend.argtypes = [pointer, text]
    library.specquant_quantize.restype = text
    library.specquant_quantize.argtypes = [
        pointer, ctypes.c_int64, ctypes.c_int32, ctypes.c_int64, ctypes.c_float, pointer, pointer, text
    ]  # fmt: skip
    return library


@cache
def loaded() -> ctypes.CDLL:
    """The compiled library, its functions typed. Raises SpecQuantError if it is missing or does not fit."""
    return _load(library_path())


def isas() -> dict[str, bool]:
    """Every instruction set the library was compiled for, slowest first, and whether this CPU has it."""
    library = loaded()
    found: dict[str, bool] = {}
    while name := library.specquant_isa(len(found)):
        found[name.decode()] = bool(library.specquant_isa_supported(name))
    return found


def check_onnxruntime() -> None:
    """Raise SpecQuantError unless exactly one ONNX Runtime is installed, and a version that fits the library."""
    versions = {}
    for name in ("onnxruntime", "onnxruntime-gpu"):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    if not versions:
        raise SpecQuantError("ONNX Runtime is not installed; run `pip install onnxruntime` (or onnxruntime-gpu)")
    if len(versions) > 1:
        raise SpecQuantError(
            "onnxruntime and onnxruntime-gpu overwrite each other; run `pip uninstall -y onnxruntime "
            "onnxruntime-gpu`, then `pip install` the one you want"
        )
    ((name, version),) = versions.items()
    if tuple(int(part) for part in version.split(".")[:2]) < ORT_MINIMUM:
        wanted = ".".join(map(str, ORT_MINIMUM))
        raise SpecQuantError(f"{name} {version} is too old; run `pip install -U '{name}>={wanted}'`")


def register(session_options: Any, threads: int = 0, within: float = 0.0) -> None:
    """Register the ops of domain `specquant` with an onnxruntime.SessionOptions, for one session.

    threads: of our own, the caller's among them, instead of ONNX Runtime's pool (0), which is then best told not to
    spin: while it waits for the next call of few tokens, a thread of ours reads its weights ahead. within: of a head in
    two digits (docs/formats.md), how far below the largest logit, by the first digit, a token may lie before its second
    one is left out where one token is decoded; 0: nothing is left out.

    Raises SpecQuantError if ONNX Runtime or the library is missing, doubled, too old or for another machine, or if
    SPECQUANT_ISA asks for an instruction set that this CPU lacks.
    """
    check_onnxruntime()
    path = library_path()
    loaded()
    wanted = os.environ.get("SPECQUANT_ISA")
    here = [name for name, supported in isas().items() if supported]
    if wanted and wanted not in here:
        raise SpecQuantError(f"SPECQUANT_ISA is {wanted}, which this CPU lacks; set it to one of {', '.join(here)}")
    ctypes.CDLL(str(path)).specquant_next_session(ctypes.c_int32(threads), ctypes.c_float(within))
    try:
        session_options.register_custom_ops_library(str(path))
    except Exception as error:  # what onnxruntime raises is in no public module
        raise SpecQuantError(str(error).splitlines()[0]) from None


def address(array: NDArray[Any] | None) -> int | None:
    """Where the array's elements lie; None, a null pointer, for none."""
    return None if array is None else array.ctypes.data


def operand(
    name: str, array: NDArray[Any] | None, shape: tuple[int, ...], dtype: type[np.generic]
) -> NDArray[Any] | None:
    """The array in one piece. Raises SpecQuantError if it has another shape or type."""
    if array is None:
        return None
    if array.shape != shape or array.dtype != dtype:
        wanted = f"{np.dtype(dtype).name} {list(shape)}"
        raise SpecQuantError(f"{name} is {array.dtype} {list(array.shape)}; it should be {wanted}")
    return np.ascontiguousarray(array)


def _encoded(isa: str | None) -> bytes | None:
    return None if isa is None else isa.encode()


def quantize_activation(
    u: NDArray[np.float32], bits: int, group: int, isa: str | None = None, clip: float = 1.0
) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """`reference.quantize_activation` of u float32 [T, N], by the kernels: q − zero_point [T, N] and scale [T, A].

    isa None: the fastest.
    Raises SpecQuantError if the kernels refuse the sizes or this CPU lacks `isa`.
    """
    tokens, n = u.shape
    groups = n // group if group else 1
    levels, scale = np.empty((tokens, n), np.int8), np.empty((tokens, groups), np.float32)
    u = np.ascontiguousarray(u, np.float32)
    for row in range(tokens):
        outputs = (address(a[row]) for a in (levels, scale))
        error = loaded().specquant_quantize(address(u[row]), n, bits, group, clip, *outputs, _encoded(isa))
        if error:
            raise SpecQuantError(error.decode())
    return levels, scale


def specquant_matmul(
    x: NDArray[Any],
    *,
    basis: NDArray[np.float16] | None = None,
    coef: NDArray[np.float16] | None = None,
    rank: int | None = None,
    qweight: NDArray[np.int8] | None = None,
    group_scales: NDArray[np.int8] | None = None,
    scales: NDArray[np.float16] | None = None,
    bias: NDArray[np.float32] | None = None,
    group_size: int = 0,
    act_bits: int = 16,
    act_group: int = 0,
    act_clip: float = 1.0,
    hadamard: int = 0,
    subtract: int = 0,
    prologue: int = 0,
    epsilon: float = 1e-5,
    gate: int = 0,
    norm: NDArray[np.float32] | None = None,
    residual: NDArray[Any] | None = None,
    isa: str | None = None,
    within: float = 0.0,
) -> tuple[NDArray[Any], NDArray[Any] | None]:
    """y and low of x [T, N] (float32 or float16), by the kernels, on one thread.

    Shapes as in docs/ops.md, but that norm and residual are None where unused.

    Without qweight this is `SpectralBranch`, without basis `Int4ResidualMatMul` (then low is None), else
    `SpecQuantMatMul`. rank None: all columns; isa None: the fastest. within, of one token: what lies so far below the
    largest y by the first half of the features stays at that half. Raises SpecQuantError if sizes disagree.
    """
    if x.dtype not in (np.float32, np.float16):
        raise SpecQuantError(f"x is {x.dtype}; give float32 or float16")
    source = scales if scales is not None else coef
    if source is None or source.ndim != (2 if scales is None else 1):
        raise SpecQuantError("there are neither scales [M] nor coef [r, M]; give weights, a branch or both")
    (tokens, n), m, r = x.shape, source.shape[-1], 0 if basis is None else basis.shape[1]
    segment_length(n, group_size, act_group)  # says which group does not fit
    y = np.empty((tokens, m // 2 if gate else m), x.dtype)
    low = None if basis is None else np.empty((tokens, r), x.dtype)
    operands = (
        np.ascontiguousarray(x),
        operand("basis", basis, (n, r), np.float16),
        operand("coef", coef, (r, m), np.float16),
        operand("qweight", qweight, (-(-m // 16), -(-n // 8), 64), np.int8),
        operand("group_scales", group_scales, (-(-m // 16), n // (group_size or n), 8), np.int8),
        operand("scales", scales, (m,), np.float16),
        operand("bias", bias, (m,), np.float32),
        operand("norm", norm, (n,), np.float32),
        operand("residual", residual, (tokens, m), x.dtype.type),
        y,
        low,
    )
    sizes = (tokens, n, m, r, r if rank is None else rank, group_size, act_group, hadamard)
    flags = (act_bits, subtract, x.dtype == np.float16, prologue, gate)
    problem = _Problem(*sizes, *flags, act_clip, epsilon, within, *map(address, operands))
    error = loaded().specquant_run(ctypes.byref(problem), _encoded(isa))
    if error:
        raise SpecQuantError(error.decode())
    return y, low
