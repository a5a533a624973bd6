"""The head at 8 or 4 bits: rounded to nearest, each row in groups of features.

The embedding stays in float16 beside it: a token reads one row, and 8 bits there cost 1.3 % of perplexity at 4-bit
activations, where such a head costs 0.1 % (SmolLM2, 4 windows of WikiText-2).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from specquant.custom_ops.errors import SpecQuantError
from specquant.exporter.decoder import QuantLinear

ACT_BITS = 8  # of what the head reads
_LONGEST_GROUP = 64
_LARGEST = {8: 119, 4: 7}  # level; 119 = 16 · 7 + 7 is what two 4-bit digits reach, see `digits`
_SHARES = {8: (1.0,), 4: (1.0, 0.95, 0.9, 0.85, 0.8, 0.75)}  # of a group's range that its levels may span
_ROWS = 4096  # at a time: bounds the memory


@dataclass(frozen=True)
class Table:
    """A quantised head, w ≈ scales · q: q int8 [vocab, hidden], scales float16 [vocab, hidden / group]."""

    q: NDArray[np.int8]
    scales: NDArray[np.float16]

    @property
    def group(self) -> int:
        return self.q.shape[1] // self.scales.shape[1]

    def floats(self) -> NDArray[np.float32]:
        """[vocab, hidden]"""
        return np.repeat(self.scales.astype(np.float32), self.group, axis=1) * self.q


def group_of(hidden: int) -> int:
    """Features per scale: the largest divisor of `hidden` up to 64 that 8 divides. SpecQuantError if there is none."""
    groups = [size for size in range(8, _LONGEST_GROUP + 1, 8) if hidden % size == 0]
    if not groups:
        raise SpecQuantError(f"a hidden size of {hidden} has no groups of 8 features; use --head-bits 16")
    return max(groups)


def quantize_table(table: NDArray[np.float32], bits: int) -> Table:
    """Symmetric, the scale of a group being the share of its largest value that leaves the least squared error.

    table [vocab, hidden]; bits: 8 or 4. Raises SpecQuantError if hidden has no groups.
    """
    (vocab, hidden), group = table.shape, group_of(table.shape[1])
    q, scales = np.empty((vocab, hidden), np.int8), np.empty((vocab, hidden // group), np.float16)
    for start in range(0, vocab, _ROWS):
        rows = table[start : start + _ROWS].reshape(-1, hidden // group, group)
        levels, scale = _nearest(rows, _LARGEST[bits], _SHARES[bits])
        q[start : start + _ROWS] = levels.reshape(-1, hidden)
        scales[start : start + _ROWS] = scale
    return Table(q, scales)


def _nearest(
    rows: NDArray[np.float32], largest: int, shares: tuple[float, ...]
) -> tuple[NDArray[np.int8], NDArray[np.float16]]:
    """Levels and scales [R, G] of rows [R, G, group]."""
    peak = np.abs(rows).max(axis=-1)
    best_error = np.full(peak.shape, np.inf, np.float32)
    best_q, best_scale = np.zeros(rows.shape, np.int8), np.zeros(peak.shape, np.float16)
    for share in shares:
        scale = (peak * np.float32(share / largest)).astype(np.float16)
        wide = scale.astype(np.float32)[..., None]
        inverse = np.divide(np.float32(1), wide, out=np.zeros_like(wide), where=wide > 0)
        q = np.clip(np.rint(rows * inverse), -largest, largest)
        error = np.square(q * wide - rows).sum(axis=-1)
        better = error < best_error
        best_error[better], best_q[better], best_scale[better] = error[better], q[better].astype(np.int8), scale[better]
    return best_q, best_scale


def digits(q: NDArray[np.int8]) -> tuple[NDArray[np.int8], NDArray[np.int8]]:
    """(high, low), both in −8…7, with q = 16 · high + low; q in −136…119."""
    high = (q.astype(np.int16) + 8) >> 4
    return high.astype(np.int8), (q - 16 * high).astype(np.int8)


def head_linear(table: NDArray[np.float32], bits: int) -> QuantLinear:
    """The head [vocab, hidden] as an op call. At 8 bits its input is x twice over: the high digits, then the low ones.

    So INT4 kernels multiply 8-bit weights exactly, and read no more than those.
    """
    quantised = quantize_table(table, bits)
    q, scales = quantised.q.T, quantised.scales.T
    if bits == 8:
        q = np.concatenate(digits(q))
        scales = np.concatenate([scales * np.float16(16), scales])
    group = quantised.group
    name, vocab = "lm_head", table.shape[0]
    return QuantLinear(name, {name: vocab}, q, scales, group_size=group, act_bits=ACT_BITS, act_group=group)


def head_bytes(vocab: int, hidden: int, bits: int) -> dict[str, int]:
    """Kind -> bytes of the tensors that the embedding and the head are stored as."""
    groups, inputs = hidden // group_of(hidden), hidden * bits // 4
    packed = -(-vocab // 16) * -(-inputs // 8) * 64
    scales = 2 * vocab * groups * bits // 4
    return {"embedding": 2 * vocab * hidden, "lm_head": packed + scales}
