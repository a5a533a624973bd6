"""A row of the 4-bit KV cache: one token of one kv head (docs/ops.md, "Packed cache"). NumPy only.

A row of d values is d/2 + 4 bytes: byte i holds value i in its low nibble and value d/2 + i in its high one; then come
scale and low, each a float16 in little-endian order.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from specquant.custom_ops.errors import SpecQuantError

PARAMETERS = 4  # bytes of scale and low
LEVELS = np.float32(15)  # the largest 4-bit level
ROW_MULTIPLE, LARGEST_ROW = 16, 256  # head sizes that the kernels take


def rotates_keys(head_dim: int) -> bool:
    """Whether queries and keys pass through a Hadamard transform before the cache: it needs a power of two."""
    return head_dim & (head_dim - 1) == 0


def row_bytes(head_dim: int) -> int:
    """Bytes of a cache row. Raises SpecQuantError unless head_dim is a multiple of 16, at most 256."""
    if head_dim % ROW_MULTIPLE or not 0 < head_dim <= LARGEST_ROW:
        raise SpecQuantError(
            f"head_dim {head_dim} does not suit a 4-bit KV cache, which takes multiples of {ROW_MULTIPLE} "
            f"up to {LARGEST_ROW}; use a 16-bit cache"
        )
    return head_dim // 2 + PARAMETERS


def quantize_rows(
    x: NDArray[np.float32], clip: float = 1.0
) -> tuple[NDArray[np.uint8], NDArray[np.float16], NDArray[np.float16]]:
    """x [..., d] → q uint8 [..., d] in 0…15, scale and low float16 [..., 1], so that x ≈ low + scale · q.

    The levels span the middle `clip` of the range: with cut = (max x − min x) (1 − clip) / 2, low = min x + cut and
    scale = (max x − min x − 2 cut) / 15, both rounded to float16 first; q = clip(rint((x − low) / scale), 0, 15), and 0
    where scale is 0. Where float16 holds neither, or x a NaN or an infinity, scale and low are NaN, q is 0.
    """
    with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
        lo, hi = x.min(axis=-1, keepdims=True), x.max(axis=-1, keepdims=True)
        span = hi - lo
        cut = span * (np.float32(0.5) * (np.float32(1) - np.float32(clip)))
        scale = ((span - (cut + cut)) / LEVELS).astype(np.float16)
        low = (lo + cut).astype(np.float16) + np.float16(0)  # −0 becomes 0
        finite = np.isfinite(scale) & np.isfinite(low)
        inverse = np.where(scale > 0, np.float32(1) / scale.astype(np.float32), np.float32(0))
        q = np.where(finite, np.clip(np.rint((x - low.astype(np.float32)) * inverse), 0, LEVELS), np.float32(0))
    nan = np.float16(np.nan)
    return q.astype(np.uint8), np.where(finite, scale, nan), np.where(finite, low, nan)


def pack_rows(x: NDArray[np.float32], clip: float = 1.0) -> NDArray[np.int8]:
    """Quantise and pack x [..., d] → int8 [..., d/2 + 4]. Raises SpecQuantError as `row_bytes`."""
    row_bytes(x.shape[-1])
    half = x.shape[-1] // 2
    q, scale, low = quantize_rows(x, clip)
    nibbles = q[..., :half] | q[..., half:] << 4
    parameters = np.concatenate([scale, low], axis=-1).astype("<f2").view(np.uint8)
    return np.concatenate([nibbles, parameters], axis=-1).view(np.int8)


def unpack_rows(rows: NDArray[np.int8]) -> NDArray[np.float32]:
    """The values low + scale · q of packed rows: int8 [..., d/2 + 4] → float32 [..., d]."""
    data = np.ascontiguousarray(rows).view(np.uint8)
    nibbles, parameters = data[..., :-PARAMETERS], np.ascontiguousarray(data[..., -PARAMETERS:]).view("<f2")
    q = np.concatenate([nibbles & 15, nibbles >> 4], axis=-1)
    scale, low = parameters[..., :1].astype(np.float32), parameters[..., 1:].astype(np.float32)
    values: NDArray[Any] = low + scale * q.astype(np.float32)
    return values
