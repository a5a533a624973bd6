"""`Int4KVAttention` and `HalfKVAttention` by the CUDA kernels, without ONNX Runtime, on arrays of the GPU."""

from __future__ import annotations

import ctypes
import math
from typing import Any

import numpy as np

from specquant.custom_ops.errors import SpecQuantError
from specquant.custom_ops.kv_rows import row_bytes
from specquant.custom_ops.library_cuda import Attention, address, dtype_of, loaded, raise_for


def attention_problem(
    qkv: Any,
    past_key: Any,
    past_value: Any,
    seqlens_k: Any,
    position_ids: Any,
    cos: Any,
    sin: Any,
    key_offset: Any,
    present_key: Any,
    present_value: Any,
    y: Any,
    *,
    num_heads: int,
    kv_num_heads: int,
    local_window_size: int = -1,
    scale: float = 0.0,
    hadamard: int = 0,
    clip: float = 1.0,
) -> Attention:
    """A call on arrays of the GPU, shapes as in `attention.int4_kv_attention`; present may be past itself.

    A cache of float16 [B, K, P, d] makes it `HalfKVAttention`, with key_offset None. Raises SpecQuantError if an array
    does not lie on the GPU, or has another shape or type than it should.
    """
    kind, half_cache = dtype_of("qkv", qkv), dtype_of("past_key", past_key) == np.float16
    if kind not in (np.float32, np.float16) or len(qkv.shape) != 3 or len(past_key.shape) != 4:
        raise SpecQuantError("qkv must be float32 or float16 [batch, sequence, width], and the cache have four axes")
    batch, sequence, width = qkv.shape
    d = width // (num_heads + 2 * kv_num_heads)
    past_rows, present_rows, (context, columns) = past_key.shape[2], present_key.shape[2], cos.shape
    row, cache = (d, np.float16) if half_cache else (row_bytes(d), np.int8)
    past, present = ((batch, kv_num_heads, rows, row) for rows in (past_rows, present_rows))
    addresses = (
        address("qkv", qkv, (batch, sequence, (num_heads + 2 * kv_num_heads) * d), (kind.type,)),
        address("past_key", past_key, past, (cache,)),
        address("past_value", past_value, past, (cache,)),
        address("seqlens_k", seqlens_k, (batch,), (np.int32,)),
        address("position_ids", position_ids, (batch, sequence), (np.int64,)),
        address("cos", cos, (context, columns), (np.float32,)),
        address("sin", sin, (context, columns), (np.float32,)),
        address("key_offset", key_offset, (kv_num_heads, d), (np.float32,)),
        address("present_key", present_key, present, (cache,)),
        address("present_value", present_value, present, (cache,)),
        address("y", y, (batch, sequence, num_heads * d), (kind.type,)),
    )
    lengths = (batch, sequence, past_rows, present_rows, num_heads, kv_num_heads, d, context, columns)
    return Attention(
        *lengths, local_window_size, hadamard, kind == np.float16, half_cache, scale, clip, *addresses
    )  # fmt: skip


def attention_workspace(problem: Attention) -> int:
    """Bytes of workspace of a call on the current GPU. Raises SpecQuantError if sizes or attributes disagree."""
    size = ctypes.c_int64()
    raise_for(loaded().specquant_cuda_attention_workspace(ctypes.byref(problem), ctypes.byref(size)))
    return size.value


def attention(problem: Attention, workspace: Any, *, stream: int = 0) -> None:
    """Append the new keys and values to the cache and compute y, in order on the CUDA stream.

    workspace: int8, `attention_workspace` long, aligned to 256 bytes; the call does not wait for the GPU, so that all
    arrays must live on. Lengths and positions lie on the GPU and are not checked here: what does not fit gives NaN.
    Raises SpecQuantError if sizes or attributes disagree, or a kernel does not start.
    """
    size = math.prod(workspace.shape)
    place = address("workspace", workspace, (size,), (np.int8, np.uint8))
    raise_for(loaded().specquant_cuda_attention(ctypes.byref(problem), place, size, stream))


def attention_bound(problem: Attention) -> int:
    """Bytes of workspace that suffice on every GPU for the problem's batch, tokens and cache or smaller ones; needs no
    GPU, reads no address. Raises SpecQuantError if sizes or attributes disagree."""
    size = ctypes.c_int64()
    raise_for(loaded().specquant_cuda_attention_bound(ctypes.byref(problem), ctypes.byref(size)))
    return size.value


def run_attention(problem: Attention, workspace: int, stream: int) -> None:
    """`attention` of a problem whose addresses are filled in; workspace: an address aligned to 256, of as many bytes as
    `attention_workspace` says. Raises SpecQuantError if sizes or attributes disagree, or a kernel does not start."""
    size = attention_workspace(problem)
    raise_for(loaded().specquant_cuda_attention(ctypes.byref(problem), workspace, size, stream))
