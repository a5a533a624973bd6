"""The head at 8 or 4 bits: rounded to nearest, each row in groups of features.

The embedding stays in float16 beside it: a token reads one row, and 8 bits there cost 1.3 % of perplexity at 4-bit
activations, where such a head costs 0.1 % (SmolLM2, 4 windows of WikiText-2).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from specquant.custom_ops.errors import SpecQuantError
from specquant.custom_ops.packing import MOST
from specquant.exporter.decoder import QuantLinear

ACT_BITS = 8  # of what the head reads
DIGIT = 16  # what a high digit is worth, see `digits`
_LONGEST_GROUP = 64
_LARGEST = {8: 119, 4: 7}  # level; 119 = 16 · 7 + 7 is what two 4-bit digits reach
_SHARES = {8: (1.0,), 4: (1.0, 0.95, 0.9, 0.85, 0.8, 0.75)}  # of a group's range that its levels may span
_ROWS = 4096  # at a time: bounds the memory


@dataclass(frozen=True)
class Table:
    """A quantised head, w ≈ scales · group_scales · q: q int8 [vocab, hidden], scales float16 [vocab], group_scales
    int8 [vocab, hidden / group] in 1…16."""

    q: NDArray[np.int8]
    group_scales: NDArray[np.int8]
    scales: NDArray[np.float16]

    @property
    def group(self) -> int:
        return self.q.shape[1] // self.group_scales.shape[1]

    def floats(self) -> NDArray[np.float32]:
        """[vocab, hidden]"""
        products = self.scales.astype(np.float32)[:, None] * self.group_scales.astype(np.float32)
        return np.repeat(products, self.group, axis=1) * self.q


def group_of(hidden: int) -> int:
    """Features per scale: the largest divisor of `hidden` up to 64 that 8 divides. SpecQuantError if there is none."""
    groups = [size for size in range(8, _LONGEST_GROUP + 1, 8) if hidden % size == 0]
    if not groups:
        raise SpecQuantError(f"a hidden size of {hidden} has no groups of 8 features; use --head-bits 16")
    return max(groups)


def quantize_table(table: NDArray[np.float32], bits: int) -> Table:
    """Symmetric: a group's scale is that of the share of its largest value that leaves the least squared error, or the
    next larger one that two levels reach: clipping more than that would cost the logits more than it gains.

    table [vocab, hidden]; bits: 8 or 4. Raises SpecQuantError if hidden has no groups.
    """
    (vocab, hidden), group, largest = table.shape, group_of(table.shape[1]), _LARGEST[bits]
    q, scales = np.empty((vocab, hidden), np.int8), np.empty(vocab, np.float16)
    group_scales = np.empty((vocab, hidden // group), np.int8)
    for start in range(0, vocab, _ROWS):
        rows = slice(start, start + _ROWS)
        weights = table[rows].reshape(-1, hidden // group, group)
        group_scales[rows], scales[rows] = two_levels(_free_scales(weights, largest, _SHARES[bits]))
        products = scales[rows, None].astype(np.float32) * group_scales[rows]
        q[rows] = _rounded(weights, products, largest).reshape(-1, hidden)
    return Table(q, group_scales, scales)


def _free_scales(weights: NDArray[np.float32], largest: int, shares: tuple[float, ...]) -> NDArray[np.float32]:
    """The best scale of each group by itself, [R, G], of weights [R, G, group]."""
    peak = np.maximum(np.abs(weights).max(axis=-1), np.float32(1e-6))
    best, least = peak / np.float32(largest), np.full(peak.shape, np.inf, np.float32)
    for share in shares if len(shares) > 1 else ():
        scale = peak * np.float32(share / largest)
        error = np.square(_rounded(weights, scale, largest) * scale[..., None] - weights).sum(axis=-1)
        best, least = np.where(error < least, scale, best), np.minimum(error, least)
    return best


def two_levels(free: NDArray[np.float32]) -> tuple[NDArray[np.int8], NDArray[np.float16]]:
    """Scales of groups int8 [R, G] and of rows float16 [R] whose products reach `free` [R, G] and have the least sum of
    squares among some scales of rows. One group has scale 1."""
    most = MOST if free.shape[1] > 1 else 1
    top, least = free.max(axis=1) / most, np.full(len(free), np.inf, np.float32)
    best_groups, best = np.ones(free.shape, np.int8), np.ones(len(free), np.float16)
    for factor in np.linspace(1, 1.2, 9, dtype=np.float32):
        scales = np.clip(top * factor, 4e-6, 4000).astype(np.float16)  # positive, and 16-fold finite
        wide = scales.astype(np.float32)
        groups = np.clip(np.ceil(free / wide[:, None]), 1, most)
        size = np.square(groups * wide[:, None]).sum(axis=1)
        better = size < least
        best_groups[better], best[better], least[better] = groups[better], scales[better], size[better]
    return best_groups, best


def _rounded(weights: NDArray[np.float32], scales: NDArray[np.float32], largest: int) -> NDArray[np.float32]:
    """Levels of weights [R, G, group] for scales [R, G]."""
    return np.clip(np.rint(weights / scales[..., None]), -largest, largest)


def digits(q: NDArray[np.int8]) -> tuple[NDArray[np.int8], NDArray[np.int8]]:
    """(high, low), both in −8…7, with q = 16 · high + low; q in −136…119."""
    high = (q.astype(np.int16) + 8) >> 4
    return high.astype(np.int8), (q - DIGIT * high).astype(np.int8)


def head_linear(table: NDArray[np.float32], bits: int) -> QuantLinear:
    """The head [vocab, hidden] as an op call. At 8 bits its input is x for the high digits, x / 16 for the low ones.

    So INT4 kernels multiply 8-bit weights exactly, and read no more than those: both halves of the input have the same
    levels, of scales that differ by that factor.
    """
    quantised = quantize_table(table, bits)
    q, group_scales, scales = quantised.q.T, quantised.group_scales.T, quantised.scales
    if bits == 8:
        q, group_scales = np.concatenate(digits(q)), np.concatenate([group_scales, group_scales])
        scales = scales * np.float16(DIGIT)
    name, vocab, group = "lm_head", table.shape[0], quantised.group
    return QuantLinear(name, {name: vocab}, q, group_scales, scales, group, ACT_BITS, group)


def head_bytes(vocab: int, hidden: int, bits: int) -> dict[str, int]:
    """Kind -> bytes of the tensors that the embedding and the head are stored as."""
    groups, inputs = hidden // group_of(hidden) * bits // 4, hidden * bits // 4
    panels = -(-vocab // 16)
    packed = panels * -(-inputs // 8) * 64
    return {"embedding": 2 * vocab * hidden, "lm_head": packed + panels * groups * 8 + 2 * vocab}
