"""Token ids from logits by the CUDA kernels, and what the next step of decoding is given, on arrays of the GPU."""

from __future__ import annotations

import ctypes
import math
from typing import Any

import numpy as np

from specquant.custom_ops.errors import SpecQuantError
from specquant.custom_ops.library_cuda import Sample, address, dtype_of, loaded, raise_for


def sample_problem(
    logits: Any,
    ids: Any,
    results: Any,
    *,
    uniforms: Any = None,
    position_ids: Any = None,
    attention_mask: Any = None,
    temperature: float = 0.0,
    top_k: int = 0,
    vocab: int | None = None,
) -> Sample:
    """A call on arrays of the GPU: logits float16 or float32 [rows, stride], of which the first `vocab` count (None:
    all); ids, results and position_ids int64 [rows], attention_mask int64 [rows, width], uniforms float64 [rows].

    temperature 0 is greedy, top_k 0 off; position_ids and attention_mask may be None. Raises SpecQuantError if an array
    does not lie on the GPU, or has another shape or type than it should.
    """
    kind = dtype_of("logits", logits)
    if kind not in (np.float32, np.float16):
        raise SpecQuantError(f"logits are {kind}; give float32 or float16")
    rows, stride = logits.shape
    width = 0 if attention_mask is None else attention_mask.shape[1]
    addresses = (
        address("logits", logits, (rows, stride), (kind.type,)),
        address("uniforms", uniforms, (rows,), (np.float64,)),
        address("ids", ids, (rows,), (np.int64,)),
        address("position_ids", position_ids, (rows,), (np.int64,)),
        address("attention_mask", attention_mask, (rows, width), (np.int64,)),
        address("results", results, (rows,), (np.int64,)),
    )
    words = stride if vocab is None else vocab
    return Sample(rows, words, stride, top_k, width, kind == np.float16, temperature, *addresses)


def sample_workspace(problem: Sample) -> int:
    """Bytes of workspace for the problem's rows or fewer; needs no GPU, reads no address.

    Raises SpecQuantError if sizes or attributes are out of range.
    """
    size = ctypes.c_int64()
    raise_for(loaded().specquant_cuda_sample_workspace(ctypes.byref(problem), ctypes.byref(size)))
    return size.value


def sample(problem: Sample, workspace: Any, *, stream: int = 0) -> None:
    """Fill ids and results (−1: logits that are not finite), in order on the CUDA stream; add 1 to position_ids and set
    the mask there.

    workspace: int8, `sample_workspace` long, aligned to 256 bytes, zeros before its first use; the call does not wait
    for the GPU, so that all arrays must live on. Raises SpecQuantError if sizes disagree, or a kernel does not start.
    """
    size = math.prod(workspace.shape)
    place = address("workspace", workspace, (size,), (np.int8, np.uint8))
    raise_for(loaded().specquant_cuda_sample(ctypes.byref(problem), place, size, stream))


def run_sample(problem: Sample, workspace: int, stream: int) -> None:
    """`sample` of a problem whose addresses are filled in; workspace: an address aligned to 256, of as many bytes as
    `sample_workspace` says. Raises SpecQuantError if sizes disagree, or a kernel does not start."""
    size = sample_workspace(problem)
    raise_for(loaded().specquant_cuda_sample(ctypes.byref(problem), workspace, size, stream))
