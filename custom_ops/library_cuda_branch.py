"""`SpectralBranch` by the CUDA kernels, without ONNX Runtime, on arrays of the GPU."""

from __future__ import annotations

import ctypes
import math
from typing import Any

import numpy as np

from specquant.custom_ops.errors import SpecQuantError
from specquant.custom_ops.library_cuda import Branch, address, dtype_of, loaded, raise_for


def branch_problem(x: Any, basis: Any, coef: Any, y: Any, low: Any, rank: int | None = None) -> Branch:
    """A call on arrays of the GPU: x [T, N], basis [N, r], coef [r, M], y [T, M], low [T, r]. rank None: all columns.

    Raises SpecQuantError if an array does not lie on the GPU, or has another shape or type than it should.
    """
    kind = dtype_of("x", x)
    if kind not in (np.float32, np.float16):
        raise SpecQuantError(f"x is {kind}; give float32 or float16")
    (tokens, n), (r, m) = x.shape, coef.shape
    addresses = (
        address("x", x, (tokens, n), (kind.type,)),
        address("basis", basis, (n, r), (np.float16,)),
        address("coef", coef, (r, m), (np.float16,)),
        address("y", y, (tokens, m), (kind.type,)),
        address("low", low, (tokens, r), (kind.type,)),
    )
    return Branch(tokens, n, m, r, r if rank is None else rank, kind == np.float16, *addresses)


def branch_workspace(problem: Branch) -> int:
    """Bytes of workspace that suffice on every GPU for the problem's tokens or fewer; needs no GPU, reads no address.

    Raises SpecQuantError if sizes disagree.
    """
    size = ctypes.c_int64()
    raise_for(loaded().specquant_cuda_branch_workspace(ctypes.byref(problem), ctypes.byref(size)))
    return size.value


def branch(problem: Branch, workspace: Any, *, stream: int = 0) -> None:
    """Fill y and low, in order on the CUDA stream.

    workspace: int8, `branch_workspace` long, aligned to 256 bytes; the call does not wait for the GPU, so that all
    arrays must live on. Raises SpecQuantError if sizes disagree, or a kernel does not start.
    """
    size = math.prod(workspace.shape)
    place = address("workspace", workspace, (size,), (np.int8, np.uint8))
    raise_for(loaded().specquant_cuda_branch(ctypes.byref(problem), place, size, stream))


def run_branch(problem: Branch, workspace: int, stream: int) -> None:
    """`branch` of a problem whose addresses are filled in; workspace: an address aligned to 256, of as many bytes as
    `branch_workspace` says. Raises SpecQuantError if sizes disagree, or a kernel does not start."""
    size = branch_workspace(problem)
    raise_for(loaded().specquant_cuda_branch(ctypes.byref(problem), workspace, size, stream))
