"""What tests of models with a quantised or rounded cache compare."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from specquant.runtime.generate import Model


def typical(actual: NDArray[np.float32], expected: NDArray[np.float32]) -> float:
    """The error of half of the tokens, of logits [T, vocab]: where a value lies so near half a step that the order of a
    sum moves it, all later tokens show it."""
    return float(np.median(np.abs(actual - expected).max(axis=1)) / np.abs(expected).max())


def error_in_pieces(model: Model, rng: np.random.Generator) -> float:
    """`typical` error of 50 tokens given in two blocks, one by one, in a block again and one by one to the end, against
    the same in one pass."""
    ids = rng.integers(3, 320, 50)
    sequences = model.sequences(1)
    parts = []
    for start, end in ((0, 6), (6, 10), (12, 17)):
        parts += [sequences.decode(ids[t : t + 1]).copy() for t in range(sum(map(len, parts)), start)]
        parts += [block.copy() for block in sequences.prefill(0, ids[start:end])]
    parts += [sequences.decode(ids[t : t + 1]).copy() for t in range(17, 50)]
    return typical(np.concatenate(parts), model.logits(ids))
