"""`Int4KVAttention` and `HalfKVAttention` by the compiled kernels, on one thread and without ONNX Runtime."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
from numpy.typing import NDArray

from specquant.custom_ops import library
from specquant.custom_ops.errors import SpecQuantError
from specquant.custom_ops.kv_rows import row_bytes

_LENGTHS = ("batch", "sequence", "past_rows", "present_rows")
_SIZES = (*_LENGTHS, "num_heads", "kv_num_heads", "head_dim", "context", "rotary", "window", "kv_bits")
_INPUTS = ("qkv", "past_key", "past_value", "seqlens_k", "position_ids", "cos", "sin", "key_offset")
_POINTERS = (*_INPUTS, "present_key", "present_value", "y")


class _Attention(ctypes.Structure):
    """`Attention` of kernels/cpu/attention.h, field for field."""

    _fields_ = (
        [(name, ctypes.c_int64) for name in _SIZES]
        + [(name, ctypes.c_int32) for name in ("hadamard", "half")]
        + [(name, ctypes.c_float) for name in ("scale", "clip")]
        + [(name, ctypes.c_void_p) for name in _POINTERS]
    )


def int4_kv_attention(
    qkv: NDArray[Any],
    past_key: NDArray[np.int8],
    past_value: NDArray[np.int8],
    seqlens_k: NDArray[np.int32],
    total_sequence_length: NDArray[np.int32],
    position_ids: NDArray[np.int64],
    cos: NDArray[np.float32],
    sin: NDArray[np.float32],
    key_offset: NDArray[np.float32],
    *,
    num_heads: int,
    kv_num_heads: int,
    local_window_size: int = -1,
    scale: float = 0.0,
    hadamard: int = 0,
    clip: float = 1.0,
    in_place: bool = False,
    isa: str | None = None,
) -> tuple[NDArray[Any], NDArray[np.int8], NDArray[np.int8]]:
    """y, present_key and present_value; shapes as in `attention.int4_kv_attention`. isa None: the fastest.

    in_place: past_key and past_value are extended where they lie, and returned; they must have room.
    Raises SpecQuantError if sizes disagree, the kernels refuse them or this CPU lacks `isa`.
    """
    inputs = (qkv, past_key, past_value, seqlens_k, total_sequence_length, position_ids, cos, sin)
    heads = num_heads, kv_num_heads
    return _attend(inputs, key_offset, heads, local_window_size, scale, hadamard, clip, in_place, isa)


def half_kv_attention(
    qkv: NDArray[Any],
    past_key: NDArray[np.float16],
    past_value: NDArray[np.float16],
    seqlens_k: NDArray[np.int32],
    total_sequence_length: NDArray[np.int32],
    position_ids: NDArray[np.int64],
    cos: NDArray[np.float32],
    sin: NDArray[np.float32],
    *,
    num_heads: int,
    kv_num_heads: int,
    local_window_size: int = -1,
    scale: float = 0.0,
    in_place: bool = False,
    isa: str | None = None,
) -> tuple[NDArray[Any], NDArray[np.float16], NDArray[np.float16]]:
    """As `int4_kv_attention`, shapes as in `attention.half_kv_attention`."""
    inputs = (qkv, past_key, past_value, seqlens_k, total_sequence_length, position_ids, cos, sin)
    return _attend(inputs, None, (num_heads, kv_num_heads), local_window_size, scale, 0, 1.0, in_place, isa)


def _attend(
    inputs: tuple[NDArray[Any], ...],
    key_offset: NDArray[np.float32] | None,
    heads: tuple[int, int],
    window: int,
    scale: float,
    hadamard: int,
    clip: float,
    in_place: bool,
    isa: str | None,
) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    """Either op: of a 4-bit cache if there is a key_offset."""
    qkv, past_key, past_value, seqlens_k, total_sequence_length, position_ids, cos, sin = inputs
    num_heads, kv_num_heads = heads
    if qkv.dtype not in (np.float32, np.float16) or qkv.ndim != 3 or past_key.ndim != 4:
        raise SpecQuantError("qkv must be float32 or float16 [batch, sequence, width], and the cache have four axes")
    batch, sequence, width = qkv.shape
    head_dim = width // (num_heads + 2 * kv_num_heads)
    past_rows, (context, columns) = past_key.shape[2], cos.shape
    rows = max(past_rows, int(total_sequence_length))
    kind: type[np.generic] = np.float16 if key_offset is None else np.int8
    cache = (batch, kv_num_heads, past_rows, head_dim if key_offset is None else row_bytes(head_dim))
    operands = {
        "qkv": np.ascontiguousarray(qkv),
        "past_key": library.operand("past_key", past_key, cache, kind),
        "past_value": library.operand("past_value", past_value, cache, kind),
        "seqlens_k": library.operand("seqlens_k", seqlens_k, (batch,), np.int32),
        "position_ids": library.operand("position_ids", position_ids, (batch, sequence), np.int64),
        "cos": library.operand("cos", cos, (context, columns), np.float32),
        "sin": library.operand("sin", sin, (context, columns), np.float32),
    }
    if key_offset is not None:
        operands["key_offset"] = library.operand("key_offset", key_offset, (kv_num_heads, head_dim), np.float32)
    if in_place and (rows != past_rows or operands["past_key"] is not past_key):
        raise SpecQuantError("a cache that is extended in place must have room, and be in one piece")
    present = [
        past if in_place else np.empty((batch, kv_num_heads, rows, cache[-1]), kind) for past in (past_key, past_value)
    ]
    y = np.empty((batch, sequence, num_heads * head_dim), qkv.dtype)
    operands |= {"present_key": present[0], "present_value": present[1], "y": y}
    problem = _Attention(
        batch, sequence, past_rows, rows, num_heads, kv_num_heads, head_dim, context, columns, window,
        16 if key_offset is None else 4, hadamard, qkv.dtype == np.float16, scale, clip,
        *(library.address(operands[name]) if name in operands else None for name in _POINTERS),
    )  # fmt: skip
    error = library.loaded().specquant_attend(ctypes.byref(problem), None if isa is None else isa.encode())
    if error:
        raise SpecQuantError(error.decode())
    return y, present[0], present[1]
