"""The packed layout of INT4 weights (docs/ops.md, "Packed weights"). NumPy only; nothing else knows it.

Sizes: N in-features, M out-features, P = ⌈M/16⌉ panels of 16 outputs, Q = ⌈N/8⌉ blocks of 8 features.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from specquant.custom_ops.errors import SpecQuantError

LANES = 16  # outputs in a panel
BLOCK = 8  # features in a block
OFFSET = 8  # the stored nibble is q + OFFSET


def pack_int4(q: NDArray[np.int8]) -> NDArray[np.int8]:
    """Pack q int8 [N, M], values −8…7, into int8 [P, Q, 64].

    packed[p, k, 4·lane + j] holds output 16p + lane: feature 8k + j in its low nibble, 8k + 4 + j in its high
    one, each plus 8. Padding is q = 0. Raises SpecQuantError on another shape, dtype or range.
    """
    if q.ndim != 2 or q.dtype != np.int8 or q.size == 0:
        raise SpecQuantError(f"INT4 weights are {q.dtype} {list(q.shape)}; give int8 [in, out]")
    if q.min() < -8 or q.max() > 7:
        raise SpecQuantError(f"INT4 weights reach from {q.min()} to {q.max()}; keep them in -8…7")
    n, m = q.shape
    blocks, panels = -(-n // BLOCK), -(-m // LANES)
    nibbles = np.full((blocks * BLOCK, panels * LANES), OFFSET, np.uint8)
    nibbles[:n, :m] = q + np.int8(OFFSET)
    halves = nibbles.reshape(blocks, 2, 4, panels, LANES)
    packed = halves[:, 0] | halves[:, 1] << 4  # [Q, 4, P, 16]
    return np.ascontiguousarray(packed.transpose(2, 0, 3, 1)).reshape(panels, blocks, 64).view(np.int8)


def unpack_int4(packed: NDArray[np.int8], n: int, m: int) -> NDArray[np.int8]:
    """The inverse of `pack_int4`: int8 [P, Q, 64] → int8 [n, m]. Raises SpecQuantError if sizes disagree."""
    panels, blocks = -(-m // LANES), -(-n // BLOCK)
    if packed.dtype != np.int8 or packed.shape != (panels, blocks, 64) or n < 1 or m < 1:
        raise SpecQuantError(
            f"packed weights are {packed.dtype} {list(packed.shape)}; "
            f"{n} x {m} weights are int8 [{panels}, {blocks}, 64]: export the model again"
        )
    columns = packed.view(np.uint8).reshape(panels, blocks, LANES, 4).transpose(1, 3, 0, 2)  # [Q, 4, P, 16]
    halves = np.stack([columns & 15, columns >> 4], axis=1)  # [Q, 2, 4, P, 16]
    q = halves.reshape(blocks * BLOCK, panels * LANES)[:n, :m].astype(np.int8)
    return q - np.int8(OFFSET)


def segment_length(n: int, group_size: int, act_group: int) -> int:
    """Features that share one weight scale and one activation scale: the smaller non-zero group, or n.

    Raises SpecQuantError if a group is no multiple of 8 that divides n, or neither divides the other.
    """
    for name, size in (("group_size", group_size), ("act_group", act_group)):
        if size < 0 or size % BLOCK or (size and n % size):
            raise SpecQuantError(f"{name} {size} does not fit {n} features; use 0 or a divisor that 8 divides")
    groups = [size for size in (group_size, act_group) if size] or [n]
    if max(groups) % min(groups):
        raise SpecQuantError(f"group_size {group_size} and act_group {act_group}: let one divide the other")
    return min(groups)
