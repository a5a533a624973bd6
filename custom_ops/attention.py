"""What `Int4KVAttention` and `HalfKVAttention` compute, in NumPy (docs/ops.md): the oracle of their kernels' tests.

Sizes: B batch, S new tokens (padding included), H heads, K kv heads, d head_dim, E = d/2 + 4 bytes of a packed row,
P and T capacity of the cache before and after, C rows of the rotary tables, R their columns (2R ≤ d).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from specquant.custom_ops.errors import SpecQuantError
from specquant.custom_ops.kv_rows import pack_rows, row_bytes, unpack_rows

Float = NDArray[np.floating[Any]]


def walsh_hadamard(x: NDArray[np.float32]) -> NDArray[np.float32]:
    """x [..., d] times the orthonormal Hadamard matrix of Sylvester's order; d is a power of two.

    Butterflies between neighbours first, then at distance 2, 4, …: every implementation keeps this order, so that the
    levels in the cache are the same everywhere.
    """
    d = x.shape[-1]
    step = 1
    while step < d:
        pairs = x.reshape(*x.shape[:-1], d // (2 * step), 2, step)
        x = np.stack([pairs[..., 0, :] + pairs[..., 1, :], pairs[..., 0, :] - pairs[..., 1, :]], axis=-2)
        x = x.reshape(*x.shape[:-3], d)
        step *= 2
    return x * (np.float32(1) / np.sqrt(np.float32(d)))


def rotary(x: NDArray[np.float32], cos: NDArray[np.float32], sin: NDArray[np.float32]) -> NDArray[np.float32]:
    """Rotary positions: x [..., d], cos and sin [..., R]; features i and R + i turn together, those from 2R on stay."""
    r = cos.shape[-1]
    a, b = x[..., :r], x[..., r : 2 * r]
    return np.concatenate([a * cos - b * sin, b * cos + a * sin, x[..., 2 * r :]], axis=-1)


def int4_kv_attention(
    qkv: Float,
    past_key: NDArray[np.int8],
    past_value: NDArray[np.int8],
    seqlens_k: NDArray[np.int32],
    total_sequence_length: NDArray[np.int32],
    position_ids: NDArray[np.int64],
    cos: NDArray[np.float32],
    sin: NDArray[np.float32],
    key_offset: NDArray[np.float32],
    *,
    num_heads: int = 1,
    kv_num_heads: int = 1,
    local_window_size: int = -1,
    scale: float = 0.0,
    hadamard: int = 0,
    clip: float = 1.0,
) -> tuple[Float, NDArray[np.int8], NDArray[np.int8]]:
    """`Int4KVAttention`: append k and v to the packed cache, then y = softmax(scale · q k̂ᵀ) v̂ over what is in it.

    Keys are cached as H (rotary(k) − key_offset), and met by H rotary(q): with an orthonormal H that is every score but
    a term that all keys of a query share. scale 0 is 1 / √d; clip as in `kv_rows.quantize_rows`.

    qkv [B, S, (H + 2K) · d], past_key and past_value int8 [B, K, P, E], seqlens_k [B], total_sequence_length [],
    position_ids [B, S], cos and sin [C, R], key_offset [K, d] → y [B, S, H · d], present_key and present_value int8
    [B, K, T, E], of which rows from seqlens_k + 1 on are zero here and undefined in a kernel. Raises SpecQuantError if
    sizes disagree.
    """
    if not 0 < clip <= 1:
        raise SpecQuantError(f"clip is {clip}; use more than 0, and at most 1")
    q, k, v = _heads(qkv, num_heads, kv_num_heads, cos[position_ids], sin[position_ids])
    for name, past in (("past_key", past_key), ("past_value", past_value)):
        _check_cache(name, past, (len(qkv), kv_num_heads, past_key.shape[2], row_bytes(q.shape[-1])), np.int8)
    k = k - key_offset[:, None]
    if hadamard:
        q, k = walsh_hadamard(q), walsh_hadamard(k)
    new = pack_rows(k, clip), pack_rows(v, clip)
    capacity = max(past_key.shape[2], int(total_sequence_length))
    present = _append((past_key, past_value), new, seqlens_k, capacity)
    y = _attend(q, unpack_rows, present, seqlens_k, local_window_size, scale)
    return y.astype(qkv.dtype), present[0], present[1]


def half_kv_attention(
    qkv: Float,
    past_key: NDArray[np.float16],
    past_value: NDArray[np.float16],
    seqlens_k: NDArray[np.int32],
    total_sequence_length: NDArray[np.int32],
    position_ids: NDArray[np.int64],
    cos: NDArray[np.float32],
    sin: NDArray[np.float32],
    *,
    num_heads: int = 1,
    kv_num_heads: int = 1,
    local_window_size: int = -1,
    scale: float = 0.0,
) -> tuple[Float, NDArray[np.float16], NDArray[np.float16]]:
    """`HalfKVAttention`: the same over a cache of float16, to which keys (after their rotation) and values are rounded.

    past_key and past_value float16 [B, K, P, d], present_key and present_value [B, K, T, d], and the rest as in
    `int4_kv_attention`. Raises SpecQuantError if sizes disagree.
    """
    q, k, v = _heads(qkv, num_heads, kv_num_heads, cos[position_ids], sin[position_ids])
    for name, past in (("past_key", past_key), ("past_value", past_value)):
        _check_cache(name, past, (len(qkv), kv_num_heads, past_key.shape[2], q.shape[-1]), np.float16)
    with np.errstate(over="ignore"):
        new = k.astype(np.float16), v.astype(np.float16)
    capacity = max(past_key.shape[2], int(total_sequence_length))
    present = _append((past_key, past_value), new, seqlens_k, capacity)
    y = _attend(q, lambda rows: rows.astype(np.float32), present, seqlens_k, local_window_size, scale)
    return y.astype(qkv.dtype), present[0], present[1]


def _heads(qkv: Float, num_heads: int, kv_num_heads: int, cos: Float, sin: Float) -> tuple[Float, Float, Float]:
    """q, k, v float32 [B, heads, S, d] of qkv; q and k turned by cos and sin [B, S, R]."""
    batch, sequence, width = qkv.shape
    count = num_heads + 2 * kv_num_heads
    heads = qkv.astype(np.float32).reshape(batch, sequence, count, width // count).transpose(0, 2, 1, 3)
    turned = rotary(heads[:, :-kv_num_heads], cos[:, None], sin[:, None])
    return turned[:, :num_heads], turned[:, num_heads:], heads[:, -kv_num_heads:]


def _check_cache(name: str, past: NDArray[Any], shape: tuple[int, ...], kind: Any) -> None:
    if past.shape != shape or past.dtype != kind:
        wanted = f"{np.dtype(kind)} {list(shape)}"
        raise SpecQuantError(f"{name} is {past.dtype} {list(past.shape)} and should be {wanted}")


def _append(
    caches: tuple[NDArray[Any], NDArray[Any]],
    new: tuple[NDArray[Any], NDArray[Any]],
    seqlens_k: NDArray[np.int32],
    capacity: int,
) -> list[NDArray[Any]]:
    """Key and value cache [B, K, T, E] of [B, K, P, E] and the new rows [B, K, S, E]."""
    present = []
    for past, rows in zip(caches, new, strict=True):
        cache = np.zeros((*past.shape[:2], capacity, past.shape[3]), past.dtype)
        for b, last in enumerate(seqlens_k):
            total, start = int(last) + 1, max(0, int(last) + 1 - rows.shape[2])
            cache[b, :, :start] = past[b, :, :start]
            cache[b, :, start:total] = rows[b, :, : total - start]
        present.append(cache)
    return present


def _attend(
    q: Float,
    unpack: Callable[[NDArray[Any]], NDArray[np.float32]],
    present: list[NDArray[Any]],
    seqlens_k: NDArray[np.int32],
    window: int,
    scale: float,
) -> NDArray[np.float32]:
    """softmax(scale · q k̂ᵀ) v̂ float32 [B, S, H · d]; 0 for padding. unpack: rows of the cache → their values."""
    batch, num_heads, sequence, d = q.shape
    y = np.zeros((batch, sequence, num_heads, d), np.float32)
    for b in range(batch):
        total = int(seqlens_k[b]) + 1
        start = max(0, total - sequence)  # where the new tokens went
        group = num_heads // present[0].shape[1]
        keys, values = (np.repeat(unpack(cache[b, :, :total]), group, axis=0) for cache in present)
        for t in range(total - start):
            seen = slice(max(0, start + t + 1 - window) if window > 0 else 0, start + t + 1)
            scores = np.einsum("hd,hjd->hj", q[b, :, t], keys[:, seen]) * np.float32(scale or d**-0.5)
            weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
            weights /= weights.sum(axis=-1, keepdims=True)
            y[b, t] = np.einsum("hj,hjd->hd", weights, values[:, seen])
    return y.reshape(batch, sequence, num_heads * d)
