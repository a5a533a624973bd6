"""Perplexity of a text: exp of the mean negative log-likelihood of its tokens, in windows."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from specquant.custom_ops.errors import SpecQuantError

# Token ids int64 [T] -> logits [T, vocab]: an array, or its blocks of rows in order, so that a whole window of
# logits (400 MB at a vocabulary of 49,152) need not exist.
LogitsFn = Callable[[NDArray[np.int64]], NDArray[np.float32] | Iterable[NDArray[np.float32]]]
_ROWS = 64  # rows of logits that are copied at a time


@dataclass(frozen=True)
class PerplexityResult:
    """perplexity = exp(nll). nll: the mean over `tokens` predicted tokens, in nats.

    nll_standard_error: of that mean, from the spread between windows; None for a single window.
    """

    perplexity: float
    nll: float
    nll_standard_error: float | None
    tokens: int
    windows: int
    window: int

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def perplexity(
    logits_fn: LogitsFn,
    ids: NDArray[np.int64],
    window: int = 2048,
    max_windows: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> PerplexityResult:
    """Cut ids [T] into windows that do not overlap, drop the tail, score tokens 2 … window of each from its start.

    A window must fit the model's context: the caller chooses it. progress is told each window (1) as it is done.
    Raises SpecQuantError: a window under 2 tokens, fewer tokens than one window, logits that are not finite.
    """
    if window < 2:
        raise SpecQuantError(f"window = {window} is out of range: it must be 2 tokens or more")
    if max_windows is not None and max_windows < 1:
        raise SpecQuantError(f"windows = {max_windows} is out of range: it must be 1 or more")
    count = len(ids) // window
    if count == 0:
        raise SpecQuantError(f"the text has {len(ids)} tokens and one window needs {window}: give more text")
    count = min(count, max_windows or count)
    means = np.empty(count)
    for index in range(count):
        piece = ids[index * window : (index + 1) * window]
        means[index] = _window_nll(logits_fn(piece), piece) / (window - 1)
        if not math.isfinite(means[index]):
            raise SpecQuantError(
                f"the model computed NaN or infinite logits in window {index + 1}: its files may be damaged, "
                "check them with `specquant inspect DIR --verify`"
            )
        if progress:
            progress(1)
    nll = float(means.mean())
    return PerplexityResult(
        perplexity=math.exp(nll) if nll < 700 else math.inf,
        nll=nll,
        nll_standard_error=float(means.std(ddof=1) / math.sqrt(count)) if count > 1 else None,
        tokens=count * (window - 1),
        windows=count,
        window=window,
    )


def _window_nll(logits: NDArray[np.float32] | Iterable[NDArray[np.float32]], ids: NDArray[np.int64]) -> float:
    """Σ over t ≥ 1 of −log softmax(logits[t − 1])[ids[t]]."""
    blocks = [logits] if isinstance(logits, np.ndarray) else logits
    total, row = 0.0, 0
    for block in blocks:
        for start in range(0, len(block), _ROWS):
            part = block[start : start + _ROWS]
            targets = ids[row + 1 : row + 1 + len(part)]  # one short at the end: the last token predicts nothing
            total += _nll(part[: len(targets)], targets)
            row += len(part)
    if row != len(ids):
        raise ValueError(f"{row} rows of logits for {len(ids)} tokens")
    return total


def _nll(logits: NDArray[np.float32], targets: NDArray[np.int64]) -> float:
    """Σ log Σ exp(z − max z) − (z[target] − max z); sums in float64."""
    with np.errstate(invalid="ignore"):  # infinities are reported by the caller
        shifted = logits - logits.max(axis=-1, keepdims=True)
    chosen = np.take_along_axis(shifted, targets[:, None], axis=-1)[:, 0]
    sums = np.exp(shifted).sum(axis=-1, dtype=np.float64)
    return float((np.log(sums) - chosen).sum(dtype=np.float64))
