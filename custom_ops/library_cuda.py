"""The CUDA kernels of the op set without ONNX Runtime (kernels/cuda/specquant_cuda.h): ctypes on arrays of the GPU.

Arrays may come from any library that offers `__cuda_array_interface__` (torch, CuPy): nothing is copied or allocated
here. docs/cuda.md says what the kernels take and how. ctypes and NumPy only.
"""

from __future__ import annotations

import ctypes
import math
import os
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from specquant.custom_ops.errors import SpecQuantError
from specquant.custom_ops.packing import segment_length

ABI = 8  # SPECQUANT_CUDA_ABI
FILE = "libspecquant_cuda.so"
PATHS = (
    "cluster",
    "matvec",
    "gemm_small",
    "gemm_large",
    "wgmma_small",
    "wgmma_large",
    "wgmma_wide",
    "any",
)  # kernels of the second stage
REBUILD = "install nvcc of CUDA 12.8 or later and run `pip install --force-reinstall .`, or use the CPU"

_SIZES = ("tokens", "in_features", "out_features", "basis_rank", "rank", "group_size", "act_group", "hadamard")
_FLAGS = ("act_bits", "subtract", "half", "prologue", "gate")
_POINTERS = ("x", "basis", "coef", "qweight", "group_scales", "scales", "bias", "norm", "residual", "y")
_OFFSETS = ("rotated", "reduced", "partial", "low", "low_factor", "levels", "scale", "bytes")
_LENGTHS = ("batch", "sequence", "past_rows", "present_rows", "num_heads", "kv_num_heads", "head_dim")
_CACHE_INPUTS = ("qkv", "past_key", "past_value", "seqlens_k", "position_ids", "cos", "sin", "key_offset")
_STEP = ("logits", "uniforms", "ids", "position_ids", "attention_mask", "results")
_PADDED = ("tokens_padded", "features_padded", "rank_padded", "segments", "splits")


class Problem(ctypes.Structure):
    """`SpecquantCudaProblem`, field for field: sizes, attributes, and addresses on the GPU."""

    _fields_ = (
        [(name, ctypes.c_int64) for name in _SIZES]
        + [(name, ctypes.c_int32) for name in _FLAGS]
        + [(name, ctypes.c_float) for name in ("act_clip", "epsilon")]
        + [(name, ctypes.c_void_p) for name in _POINTERS]
    )


class Layout(ctypes.Structure):
    """`SpecquantCudaLayout`: sizes, and byte offsets of what the first stage leaves behind (−1: not there)."""

    _fields_ = [(name, ctypes.c_int64) for name in (*_OFFSETS, *_PADDED)]


class Branch(ctypes.Structure):
    """`SpecquantCudaBranch`, field for field: sizes, and addresses on the GPU."""

    _fields_ = (
        [(name, ctypes.c_int64) for name in _SIZES[:5]]
        + [("half", ctypes.c_int32)]
        + [(name, ctypes.c_void_p) for name in ("x", "basis", "coef", "y", "low")]
    )


class Attention(ctypes.Structure):
    """`SpecquantCudaAttention`, field for field: sizes, attributes, and addresses on the GPU."""

    _fields_ = (
        [(name, ctypes.c_int64) for name in (*_LENGTHS, "context", "rotary", "window")]
        + [(name, ctypes.c_int32) for name in ("hadamard", "half", "half_cache")]
        + [(name, ctypes.c_float) for name in ("scale", "clip")]
        + [(name, ctypes.c_void_p) for name in (*_CACHE_INPUTS, "present_key", "present_value", "y")]
    )


class Sample(ctypes.Structure):
    """`SpecquantCudaSample`, field for field: sizes, and addresses on the GPU or of pinned memory."""

    _fields_ = (
        [(name, ctypes.c_int64) for name in ("rows", "vocab", "stride", "top_k", "width")]
        + [("half", ctypes.c_int32)]
        + [("temperature", ctypes.c_float)]
        + [(name, ctypes.c_void_p) for name in _STEP]
    )


def library_path() -> Path:
    """The compiled library: SPECQUANT_CUDA_LIBRARY if it is set, else the file installed beside this module.

    Raises SpecQuantError if there is no such file.
    """
    named = os.environ.get("SPECQUANT_CUDA_LIBRARY")
    path = Path(named) if named else Path(str(resources.files("specquant.custom_ops").joinpath(FILE)))
    if not path.is_file():
        if named:
            raise SpecQuantError(f"SPECQUANT_CUDA_LIBRARY names {path}, which is not there; correct or unset it")
        raise SpecQuantError(f"this installation has no CUDA kernels ({path}); {REBUILD}")
    return path


@cache
def loaded() -> ctypes.CDLL:
    """The compiled library, its functions typed. Raises SpecQuantError if it is missing or does not fit."""
    path = library_path()
    try:
        library = ctypes.CDLL(str(path))
        sizes = [library.specquant_cuda_problem_size, library.specquant_cuda_layout_size]
        sizes += [library.specquant_cuda_attention_size, library.specquant_cuda_branch_size]
        sizes += [library.specquant_cuda_sample_size]
        for size in sizes:
            size.restype = ctypes.c_int64
        found = (library.specquant_cuda_abi(), *(size() for size in sizes))
    except OSError as error:
        raise SpecQuantError(f"{path} does not load ({str(error).splitlines()[0]}); {REBUILD}") from None
    except AttributeError:
        raise SpecQuantError(f"{path} is not SpecQuant's CUDA library; {REBUILD}") from None
    if found != (ABI, *map(ctypes.sizeof, (Problem, Layout, Attention, Branch, Sample))):
        raise SpecQuantError(f"{path} has ABI {found[0]}, this package needs {ABI}; {REBUILD}")
    problem, layout, attention, branch = (ctypes.POINTER(kind) for kind in (Problem, Layout, Attention, Branch))
    sample = ctypes.POINTER(Sample)
    signatures = {
        "specquant_cuda_device": [],
        "specquant_cuda_check": [problem],
        "specquant_cuda_layout": [problem, layout],
        "specquant_cuda_workspace": [problem, ctypes.POINTER(ctypes.c_int64)],
        "specquant_cuda_matmul": [problem, ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p, ctypes.c_char_p],
        "specquant_cuda_check_attention": [attention],
        "specquant_cuda_attention_workspace": [attention, ctypes.POINTER(ctypes.c_int64)],
        "specquant_cuda_attention_bound": [attention, ctypes.POINTER(ctypes.c_int64)],
        "specquant_cuda_attention": [attention, ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p],
        "specquant_cuda_check_branch": [branch],
        "specquant_cuda_branch_workspace": [branch, ctypes.POINTER(ctypes.c_int64)],
        "specquant_cuda_branch": [branch, ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p],
        "specquant_cuda_sample_workspace": [sample, ctypes.POINTER(ctypes.c_int64)],
        "specquant_cuda_sample": [sample, ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p],
    }
    for name, arguments in signatures.items():
        function = getattr(library, name)
        function.restype, function.argtypes = ctypes.c_char_p, arguments
    return library


def check_device() -> None:
    """Raise SpecQuantError, with what to do, unless the current GPU can run the kernels."""
    raise_for(loaded().specquant_cuda_device())


def raise_for(error: bytes | None) -> None:
    """Raise SpecQuantError with what a function of the library returned, if it is a message."""
    if error:
        raise SpecQuantError(error.decode())


def address(name: str, array: Any, shape: tuple[int, ...], dtypes: tuple[type[np.generic], ...]) -> int | None:
    """Where an array of the GPU lies; None for None. Raises SpecQuantError if it is not one, or of another kind."""
    if array is None:
        return None
    view = getattr(array, "__cuda_array_interface__", None)
    if view is None:
        raise SpecQuantError(f"{name} does not lie on the GPU; give a CUDA array of torch or CuPy")
    found, dtype, strides = tuple(view["shape"]), np.dtype(view["typestr"]), view.get("strides")
    if found != shape or dtype not in dtypes:
        wanted = " or ".join(np.dtype(kind).name for kind in dtypes)
        raise SpecQuantError(f"{name} is {dtype} {list(found)}; it should be {wanted} {list(shape)}")
    steps = [dtype.itemsize * math.prod(shape[i + 1 :]) for i in range(len(shape))]
    if strides and math.prod(shape) and any(s != w for s, w, n in zip(strides, steps, shape, strict=True) if n > 1):
        raise SpecQuantError(f"{name} is not contiguous; give a contiguous copy")
    return int(view["data"][0]) or None


def dtype_of(name: str, array: Any) -> np.dtype[Any]:
    view = getattr(array, "__cuda_array_interface__", None)
    if view is None:
        raise SpecQuantError(f"{name} does not lie on the GPU; give a CUDA array of torch or CuPy")
    return np.dtype(view["typestr"])


def _problem(
    x: Any,
    y: Any,
    *,
    qweight: Any,
    group_scales: Any,
    scales: Any,
    bias: Any = None,
    basis: Any = None,
    coef: Any = None,
    rank: int | None = None,
    group_size: int = 0,
    act_bits: int = 16,
    act_group: int = 0,
    subtract: int = 0,
    act_clip: float = 1.0,
    hadamard: int = 0,
    prologue: int = 0,
    epsilon: float = 1e-5,
    gate: int = 0,
    norm: Any = None,
    residual: Any = None,
) -> Problem:
    kind = dtype_of("x", x)
    if kind not in (np.float32, np.float16):
        raise SpecQuantError(f"x is {kind}; give float32 or float16")
    (tokens, n), m = x.shape, scales.shape[0]
    r = 0 if basis is None else basis.shape[1]
    segment_length(n, group_size, act_group)  # says which group does not fit
    addresses = {
        "x": address("x", x, (tokens, n), (kind.type,)),
        "basis": address("basis", basis, (n, r), (np.float16,)),
        "coef": address("coef", coef, (r, m), (np.float16,)),
        "qweight": address("qweight", qweight, (-(-m // 16), -(-n // 8), 64), (np.int8,)),
        "group_scales": address("group_scales", group_scales, (-(-m // 16), n // (group_size or n), 8), (np.int8,)),
        "scales": address("scales", scales, (m,), (np.float16,)),
        "bias": address("bias", bias, (m,), (np.float32,)),
        "norm": address("norm", norm, (n,), (np.float32,)),
        "residual": address("residual", residual, (tokens, m), (kind.type,)),
        "y": address("y", y, (tokens, m // 2 if gate else m), (kind.type,)),
    }
    sizes = (tokens, n, m, r, r if rank is None else rank, group_size, act_group, hadamard)
    flags = (act_bits, subtract, kind == np.float16, prologue, gate)
    return Problem(*sizes, *flags, act_clip, epsilon, *(addresses[name] for name in _POINTERS))


def layout(x: Any, **operands: Any) -> Layout:
    """The workspace that `matmul` needs for these operands (all of its, but y and workspace), on the current GPU.

    Raises SpecQuantError if sizes or attributes disagree, or there is no GPU that fits.
    """
    problem, found = _problem(x, None, **operands), Layout()
    raise_for(loaded().specquant_cuda_layout(ctypes.byref(problem), ctypes.byref(found)))
    return found


def matmul(x: Any, y: Any, workspace: Any, *, stream: int = 0, path: str | None = None, **operands: Any) -> None:
    """y [T, M], or [T, M/2] with a gate, = `SpecQuantMatMul` of x [T, N], in order on the CUDA stream.

    x and y are both float32 or float16. Operands are the op's inputs and attributes by name (docs/ops.md), arrays on
    the GPU, norm and residual None where unused; without basis and coef it is `Int4ResidualMatMul`. rank None: all
    columns. workspace: int8, `layout(...).bytes` long, aligned to 256 bytes; the call does not wait for the GPU, so it
    must live on. path: one of PATHS, None for the fastest that takes the sizes.
    Raises SpecQuantError if sizes or attributes disagree, or a kernel does not start.
    """
    problem = _problem(x, y, **operands)
    size = math.prod(workspace.shape)
    place = address("workspace", workspace, (size,), (np.int8, np.uint8))
    name = path.encode() if path else None
    raise_for(loaded().specquant_cuda_matmul(ctypes.byref(problem), place, size, stream, name))


def workspace_bound(problem: Problem) -> int:
    """Bytes of workspace that suffice on every GPU for the problem's tokens or fewer; needs no GPU, reads no address.

    Raises SpecQuantError if sizes or attributes disagree.
    """
    size = ctypes.c_int64()
    raise_for(loaded().specquant_cuda_workspace(ctypes.byref(problem), ctypes.byref(size)))
    return size.value


def run(problem: Problem, workspace: int, size: int, stream: int) -> None:
    """`matmul` of a problem whose addresses are filled in; workspace: an address, of `size` bytes, aligned to 256.

    Raises SpecQuantError if sizes or attributes disagree, or a kernel does not start.
    """
    raise_for(loaded().specquant_cuda_matmul(ctypes.byref(problem), workspace, size, stream, None))
