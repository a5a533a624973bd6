"""Two models on the same tokens: how far apart their predictions are."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from specquant.custom_ops.errors import SpecQuantError
from specquant.runtime.perplexity import LogitsFn, PerplexityResult, windows_of

_ROWS = 64  # rows of two models' logits whose softmax is held at a time
Logits = NDArray[np.float32]


@dataclass(frozen=True)
class Comparison:
    """a, b: perplexity of each. KL(A‖B) = Σ_v p_A(v) · (log p_A(v) − log p_B(v)) of each predicted token, in nats: its
    mean and its 99th percentile. same_top1: share of tokens whose most likely prediction is the same.
    """

    a: PerplexityResult
    b: PerplexityResult
    kl_mean: float
    kl_p99: float
    same_top1: float

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def compare(
    a: LogitsFn,
    b: LogitsFn,
    ids: NDArray[np.int64],
    window: int = 2048,
    max_windows: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> Comparison:
    """Run both on windows of ids [T], cut and scored as `perplexity` does.

    Raises SpecQuantError as that does, and when the models' vocabularies differ in size.
    """
    pieces = windows_of(ids, window, max_windows)
    means_a, means_b = np.empty(len(pieces)), np.empty(len(pieces))
    divergences: list[NDArray[np.float64]] = []
    same = 0
    for index, piece in enumerate(pieces):
        row, total_a, total_b = 0, 0.0, 0.0
        for rows_a, rows_b in _aligned(a(piece), b(piece)):
            targets = piece[row + 1 : row + 1 + len(rows_a)]  # one short at the end: the last token predicts nothing
            row += len(rows_a)
            rows_a, rows_b = rows_a[: len(targets)], rows_b[: len(targets)]
            nll_a, nll_b, kl = _scores(rows_a, rows_b, targets)
            total_a, total_b = total_a + float(nll_a.sum()), total_b + float(nll_b.sum())
            divergences.append(kl)
            same += int((rows_a.argmax(-1) == rows_b.argmax(-1)).sum())
        if row != window:
            raise ValueError(f"{row} rows of logits for {window} tokens")
        means_a[index], means_b[index] = total_a / (window - 1), total_b / (window - 1)
        if progress:
            progress(1)
    result_a, result_b = PerplexityResult.of(means_a, window), PerplexityResult.of(means_b, window)
    every = np.concatenate(divergences)
    return Comparison(result_a, result_b, float(every.mean()), float(np.percentile(every, 99)), same / len(every))


def _aligned(a: Logits | Iterable[Logits], b: Logits | Iterable[Logits]) -> Iterator[tuple[Logits, Logits]]:
    """The rows of both in step, a few at a time, wherever each cuts its blocks."""
    blocks = [iter([x] if isinstance(x, np.ndarray) else x) for x in (a, b)]
    rest: list[Logits] = [np.empty((0, 0), np.float32)] * 2
    while True:
        for side in (0, 1):
            if len(rest[side]) == 0:  # only then: asking for the next block ends the life of this one
                rest[side] = next(blocks[side], rest[side])
        count = min(len(rest[0]), len(rest[1]), _ROWS)
        if count == 0:
            return
        first, second = rest[0][:count], rest[1][:count]
        if first.shape != second.shape:
            raise SpecQuantError(
                f"the models have vocabularies of {first.shape[1]} and {second.shape[1]}: compare needs two of one kind"
            )
        yield first, second
        rest = [x[count:] for x in rest]


def _scores(a: Logits, b: Logits, targets: NDArray[np.int64]) -> tuple[NDArray[np.float64], ...]:
    """−log p_A(target), −log p_B(target) and KL(A‖B) of each row: float64 [T] each, of logits [T, vocab].

    With z = logits − max and log p = z − log Σ exp z: KL = Σ p_A · (z_A − z_B) − (log Σ exp z_A − log Σ exp z_B). One
    exponential a model, and sums in float64.
    """
    with np.errstate(invalid="ignore"):  # infinities are reported with the perplexity
        z_a, z_b = (x - x.max(axis=-1, keepdims=True) for x in (a, b))
    exp_a = np.exp(z_a)
    sum_a, sum_b = exp_a.sum(axis=-1, dtype=np.float64), np.exp(z_b).sum(axis=-1, dtype=np.float64)
    exp_a *= z_a - z_b
    kl = exp_a.sum(axis=-1, dtype=np.float64) / sum_a - (np.log(sum_a) - np.log(sum_b))
    rows = np.arange(len(targets))
    return np.log(sum_a) - z_a[rows, targets], np.log(sum_b) - z_b[rows, targets], kl
