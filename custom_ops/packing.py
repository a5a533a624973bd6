"""The packed layout of INT4 weights and of their groups' scales (docs/ops.md, "Packed weights"). NumPy only; nothing
else knows it.

Sizes: N in-features, M out-features, P = ⌈M/16⌉ panels of 16 outputs, Q = ⌈N/8⌉ blocks of 8 features,
G weight groups.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from specquant.custom_ops.errors import SpecQuantError

LANES = 16  # outputs in a panel
BLOCK = 8  # features in a block
OFFSET = 8  # the stored nibble is q + OFFSET
MOST = 16  # the largest scale of a group; the stored nibble is one less


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


def pack_group_scales(scales: NDArray[np.int8]) -> NDArray[np.int8]:
    """Pack scales of groups int8 [G, M], values 1…16, into int8 [P, G, 8].

    Eight bytes are two little-endian words of 32 bits: output 16p + lane is nibble lane // 2 of word lane % 2, less
    one. Padding is 1. Raises SpecQuantError on another shape, dtype or range.
    """
    if scales.ndim != 2 or scales.dtype != np.int8 or scales.size == 0:
        raise SpecQuantError(f"scales of groups are {scales.dtype} {list(scales.shape)}; give int8 [groups, out]")
    if scales.min() < 1 or scales.max() > MOST:
        raise SpecQuantError(f"scales of groups reach from {scales.min()} to {scales.max()}; keep them in 1…{MOST}")
    groups, m = scales.shape
    panels = -(-m // LANES)
    nibbles = np.zeros((groups, panels * LANES), np.uint8)
    nibbles[:, :m] = scales - np.int8(1)
    pairs = nibbles.reshape(groups, panels, 4, 2, 2)  # lane = 4 · byte + 2 · half + word
    packed = pairs[..., 0, :] | pairs[..., 1, :] << 4  # [G, P, byte, word]
    return np.ascontiguousarray(packed.transpose(1, 0, 3, 2)).reshape(panels, groups, 8).view(np.int8)


def unpack_group_scales(packed: NDArray[np.int8], groups: int, m: int) -> NDArray[np.int8]:
    """The inverse of `pack_group_scales`: int8 [P, G, 8] → int8 [groups, m]. Raises SpecQuantError on other sizes."""
    panels = -(-m // LANES)
    if packed.dtype != np.int8 or packed.shape != (panels, groups, 8) or groups < 1 or m < 1:
        raise SpecQuantError(
            f"group_scales are {packed.dtype} {list(packed.shape)}; "
            f"those of {groups} groups and {m} outputs are int8 [{panels}, {groups}, 8]: export the model again"
        )
    columns = packed.view(np.uint8).reshape(panels, groups, 2, 4).transpose(1, 0, 3, 2)  # [G, P, byte, word]
    halves = np.stack([columns & 15, columns >> 4], axis=3)  # [G, P, byte, half, word]
    return halves.reshape(groups, panels * LANES)[:, :m].astype(np.int8) + np.int8(1)


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
