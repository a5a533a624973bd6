"""Perplexity against its definition."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import pytest

from specquant.custom_ops.errors import SpecQuantError
from specquant.runtime.perplexity import perplexity

VOCAB = 57


def direct(tables: np.ndarray, ids: np.ndarray, window: int, windows: int) -> float:
    """exp of the mean of −log p, token by token, in float64."""
    losses = []
    for start in range(0, windows * window, window):
        for t in range(start + 1, start + window):
            row = tables[ids[t - 1]].astype(np.float64)
            losses.append(math.log(sum(math.exp(value - row.max()) for value in row)) - (row[ids[t]] - row.max()))
    return math.exp(sum(losses) / len(losses))


@pytest.mark.parametrize(("length", "window", "limit"), [(300, 70, None), (210, 70, 2), (129, 128, None), (9, 2, None)])
def test_against_the_definition(rng: np.random.Generator, length: int, window: int, limit: int | None) -> None:
    tables = (rng.standard_normal((VOCAB, VOCAB)) * 8 + 50).astype(np.float32)  # a bigram model
    ids = rng.integers(0, VOCAB, length)
    done: list[int] = []
    result = perplexity(lambda piece: tables[piece], ids, window, limit, done.append)
    windows = min(length // window, limit or length)
    assert result.perplexity == pytest.approx(direct(tables, ids, window, windows), rel=1e-6)
    assert (result.windows, result.window, result.tokens) == (windows, window, windows * (window - 1))
    assert sum(done) == windows

    def blocks(piece: np.ndarray) -> Iterator[np.ndarray]:
        reused = np.empty((13, VOCAB), np.float32)  # a block is valid only until the next
        for start in range(0, len(piece), 13):
            part = tables[piece[start : start + 13]]
            reused[: len(part)] = part
            yield reused[: len(part)]

    assert perplexity(blocks, ids, window, limit).nll == pytest.approx(result.nll, rel=1e-12)


def test_standard_error_is_of_the_windows(rng: np.random.Generator) -> None:
    tables = rng.standard_normal((VOCAB, VOCAB)).astype(np.float32)
    ids = rng.integers(0, VOCAB, 500)
    result = perplexity(lambda piece: tables[piece], ids, 50)
    parts = [perplexity(lambda piece: tables[piece], ids[start : start + 50], 50) for start in range(0, 500, 50)]
    nlls = [part.nll for part in parts]
    assert result.nll == pytest.approx(np.mean(nlls))
    assert result.nll_standard_error == pytest.approx(np.std(nlls, ddof=1) / math.sqrt(10))
    assert parts[0].nll_standard_error is None


def test_errors(rng: np.random.Generator) -> None:
    tables = rng.standard_normal((VOCAB, VOCAB)).astype(np.float32)
    ids = rng.integers(0, VOCAB, 40)
    with pytest.raises(SpecQuantError, match="40 tokens and one window needs 41"):
        perplexity(lambda piece: tables[piece], ids, 41)
    with pytest.raises(SpecQuantError, match="window = 1"):
        perplexity(lambda piece: tables[piece], ids, 1)
    with pytest.raises(SpecQuantError, match="windows = 0"):
        perplexity(lambda piece: tables[piece], ids, 10, 0)
    tables[ids[15]] = np.nan
    with pytest.raises(SpecQuantError, match="infinite logits in window"):
        perplexity(lambda piece: tables[piece], ids, 10)
    with pytest.raises(ValueError, match="9 rows of logits for 10 tokens"):
        perplexity(lambda piece: np.zeros((9, VOCAB), np.float32), ids, 10)
