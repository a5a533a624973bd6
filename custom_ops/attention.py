"""What `Int4KVAttention` computes, in NumPy (docs/ops.md): the oracle of its kernels' tests.

Sizes: B batch, S new tokens (padding included), H heads, K kv heads, d head_dim, E = d/2 + 4 bytes of a cache row,
P and T capacity of the cache before and after, C rows of the rotary tables, R their columns (2R ≤ d).
"""

from __future__ import annotations

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
    batch, sequence, width = qkv.shape
    d = width // (num_heads + 2 * kv_num_heads)
    capacity = max(past_key.shape[2], int(total_sequence_length))
    for name, past in (("past_key", past_key), ("past_value", past_value)):
        if past.shape != (batch, kv_num_heads, past_key.shape[2], row_bytes(d)) or past.dtype != np.int8:
            raise SpecQuantError(f"{name} is {past.dtype} {list(past.shape)}; its rows should be {row_bytes(d)} bytes")
    heads = qkv.astype(np.float32).reshape(batch, sequence, num_heads + 2 * kv_num_heads, d).transpose(0, 2, 1, 3)
    turned = rotary(heads[:, :-kv_num_heads], cos[position_ids][:, None], sin[position_ids][:, None])
    q, k = turned[:, :num_heads], turned[:, num_heads:] - key_offset[:, None]
    if hadamard:
        q, k = walsh_hadamard(q), walsh_hadamard(k)
    v = heads[:, -kv_num_heads:]
    present = [np.zeros((batch, kv_num_heads, capacity, row_bytes(d)), np.int8) for _ in range(2)]
    y = np.zeros((batch, sequence, num_heads, d), np.float32)
    for b in range(batch):
        total = int(seqlens_k[b]) + 1
        start = max(0, total - sequence)  # where the new tokens go
        for cache, past, new in zip(present, (past_key, past_value), (k, v), strict=True):
            cache[b, :, :start] = past[b, :, :start]
            cache[b, :, start:total] = pack_rows(new[b, :, : total - start], clip)
        keys, values = (np.repeat(unpack_rows(c[b, :, :total]), num_heads // kv_num_heads, axis=0) for c in present)
        for t in range(total - start):
            seen = slice(max(0, start + t + 1 - local_window_size) if local_window_size > 0 else 0, start + t + 1)
            scores = np.einsum("hd,hjd->hj", q[b, :, t], keys[:, seen]) * np.float32(scale or d**-0.5)
            weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
            weights /= weights.sum(axis=-1, keepdims=True)
            y[b, t] = np.einsum("hj,hjd->hd", weights, values[:, seen])
    return y.reshape(batch, sequence, num_heads * d).astype(qkv.dtype), present[0], present[1]
