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

    @classmethod
    def of(cls, means: NDArray[np.float64], window: int) -> PerplexityResult:
        """From each window's mean negative log-likelihood [windows]. Raises SpecQuantError if one is not finite."""
        wrong = np.flatnonzero(~np.isfinite(means))
        if wrong.size:
            raise SpecQuantError(
                f"the model computed NaN or infinite logits in window {wrong[0] + 1}: its files may be damaged, "
                "check them with `specquant inspect DIR --verify`"
            )
        nll, count = float(means.mean()), len(means)
        return cls(
            perplexity=math.exp(nll) if nll < 700 else math.inf,
            nll=nll,
            nll_standard_error=float(means.std(ddof=1) / math.sqrt(count)) if count > 1 else None,
            tokens=count * (window - 1),
            windows=count,
            window=window,
        )

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
    pieces = windows_of(ids, window, max_windows)
    means = np.empty(len(pieces))
    for index, piece in enumerate(pieces):
        means[index] = _window_nll(logits_fn(piece), piece) / (window - 1)
        if not math.isfinite(means[index]):
            break  # `of` says which window it was
        if progress:
            progress(1)
    return PerplexityResult.of(means[: index + 1], window)


def windows_of(ids: NDArray[np.int64], window: int, max_windows: int | None = None) -> NDArray[np.int64]:
    """ids [T] cut into windows that do not overlap, int64 [windows, window]; the tail is dropped.

    Raises SpecQuantError: a window under 2 tokens, fewer tokens than one window, max_windows under 1.
    """
    if window < 2:
        raise SpecQuantError(f"window = {window} is out of range: it must be 2 tokens or more")
    if max_windows is not None and max_windows < 1:
        raise SpecQuantError(f"windows = {max_windows} is out of range: it must be 1 or more")
    count = len(ids) // window
    if count == 0:
        raise SpecQuantError(f"the text has {len(ids)} tokens and one window needs {window}: give more text")
    count = min(count, max_windows or count)
    return ids[: count * window].reshape(count, window)


def _window_nll(logits: NDArray[np.float32] | Iterable[NDArray[np.float32]], ids: NDArray[np.int64]) -> float:
    """Σ over t ≥ 1 of −log softmax(logits[t − 1])[ids[t]]."""
    blocks = [logits] if isinstance(logits, np.ndarray) else logits
    total, row = 0.0, 0
    for block in blocks:
        for start in range(0, len(block), _ROWS):
            part = block[start : start + _ROWS]
            targets = ids[row + 1 : row + 1 + len(part)]  # one short at the end: the last token predicts nothing
            total += float(token_nll(part[: len(targets)], targets).sum())
            row += len(part)
    if row != len(ids):
        raise ValueError(f"{row} rows of logits for {len(ids)} tokens")
    return total


def token_nll(logits: NDArray[np.float32], targets: NDArray[np.int64]) -> NDArray[np.float64]:
    """−log softmax(logits)[target] of each row: float64 [T] of logits [T, vocab] and targets [T]."""
    with np.errstate(invalid="ignore"):  # infinities are reported by the caller
        shifted = logits - logits.max(axis=-1, keepdims=True)
    chosen = np.take_along_axis(shifted, targets[:, None], axis=-1)[:, 0]
    return np.asarray(np.log(np.exp(shifted).sum(axis=-1, dtype=np.float64)) - chosen)
