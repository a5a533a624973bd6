"""From logits to the next token. Pure functions on logits float32 [batch, vocab]; −inf marks what is excluded.

The order is Hugging Face's: repetition penalty, temperature, top_k, top_p, draw.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from specquant.custom_ops.errors import SpecQuantError

Logits = NDArray[np.float32]
LEAST_TEMPERATURE = 1e-6  # above 0; lesser ones are alike


@dataclass(frozen=True)
class Sampling:
    """temperature 0: greedy. top_k 0 and top_p 1: off. repetition_penalty 1: off. seed None: fresh each time."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        for name, valid, want in (
            ("temperature", 0 <= self.temperature < math.inf, "0 (greedy) or more"),
            ("top_k", self.top_k == int(self.top_k) and self.top_k >= 0, "a whole number, 0 (off) or more"),
            ("top_p", 0 < self.top_p <= 1, "over 0 and at most 1 (off)"),
            ("repetition_penalty", 0 < self.repetition_penalty < math.inf, "over 0; 1 is off"),
            ("seed", self.seed is None or self.seed >= 0, "0 or more"),
        ):
            if not valid:
                raise SpecQuantError(f"{name} = {getattr(self, name)} is out of range: it must be {want}")

    @property
    def plain(self) -> bool:
        """Greedy, or by temperature and top_k alone: what a device may choose by itself (session.Choosing)."""
        return self.repetition_penalty == 1 and (self.temperature == 0 or self.top_p == 1)

    def generator(self, row: int) -> np.random.Generator:
        """The random numbers of one prompt of a batch: the same for the same seed, different between rows."""
        return np.random.default_rng(np.random.SeedSequence(self.seed, spawn_key=(row,)))


def penalize_repetition(logits: Logits, seen: Sequence[NDArray[np.int64]], penalty: float) -> Logits:
    """Divide positive and multiply negative logits of the tokens in seen[b] by `penalty` (arXiv:1909.05858, §4.1)."""
    result = logits.copy()
    for row, tokens in zip(result, seen, strict=True):
        tokens = np.unique(tokens)
        row[tokens] = np.where(row[tokens] > 0, row[tokens] / penalty, row[tokens] * penalty)
    return result


def filter_top_k(logits: Logits, k: int) -> Logits:
    """Keep the k largest logits of each row, and what equals the smallest of them."""
    k = min(k, logits.shape[-1])
    threshold = np.partition(logits, -k, axis=-1)[:, -k, None]
    return np.where(logits < threshold, np.float32(-np.inf), logits)


def filter_top_p(logits: Logits, p: float) -> Logits:
    """Keep the fewest most likely tokens whose probabilities reach p, and what equals the least likely of them."""
    result = np.full_like(logits, -np.inf)
    for row, kept, probabilities in zip(logits, result, softmax(logits), strict=True):
        # Tokens under (1 − p) / vocab sum to less than 1 − p, so p is reached without them: few are left to sort.
        likely = np.sort(probabilities[probabilities >= (1 - p) / row.size])[::-1]
        count = int(np.searchsorted(np.cumsum(likely), p))
        keep = probabilities >= likely[min(count, likely.size - 1)]
        kept[keep] = row[keep]
    return result


def softmax(logits: Logits) -> NDArray[np.float64]:
    """Probabilities, float64 [batch, vocab]."""
    exponentials = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return exponentials / exponentials.sum(axis=-1, keepdims=True, dtype=np.float64)


def draw(logits: Logits, generators: Sequence[np.random.Generator]) -> NDArray[np.int64]:
    """One token per row, by its probability: the inverse of the cumulative distribution at a uniform number."""
    tokens = []
    for row, generator in zip(logits, generators, strict=True):
        candidates = np.flatnonzero(row > -np.inf)
        cumulative = np.cumsum(np.exp(row[candidates] - row.max()), dtype=np.float64)
        # side="right" steps over a probability that was rounded to 0.
        tokens.append(candidates[np.searchsorted(cumulative, generator.random() * cumulative[-1], side="right")])
    return np.array(tokens, np.int64)


def not_finite() -> SpecQuantError:
    """The error for a row with NaN or infinite logits: damaged weights look like that."""
    return SpecQuantError(
        "the model computed NaN or infinite logits: its files may be damaged, "
        "check them with `specquant inspect DIR --verify`"
    )


def choose(
    logits: Logits,
    sampling: Sampling,
    seen: Sequence[NDArray[np.int64]],
    generators: Sequence[np.random.Generator],
) -> NDArray[np.int64]:
    """The next token of each row, int64 [batch]. seen[b]: the tokens of row b so far, prompt included.

    Raises SpecQuantError when a row has NaN or infinite logits.
    """
    if not np.isfinite(logits).all():
        raise not_finite()
    if sampling.repetition_penalty != 1:
        logits = penalize_repetition(logits, seen, sampling.repetition_penalty)
    if sampling.temperature == 0:
        return logits.argmax(axis=-1)
    # From the row's largest, so that a tiny temperature gives −inf and never NaN.
    logits = (logits - logits.max(axis=-1, keepdims=True)) / np.float32(max(sampling.temperature, LEAST_TEMPERATURE))
    if sampling.top_k:
        logits = filter_top_k(logits, sampling.top_k)
    if sampling.top_p < 1:
        logits = filter_top_p(logits, sampling.top_p)
    return draw(logits, generators)
