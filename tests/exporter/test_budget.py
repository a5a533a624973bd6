"""Budgets of frequencies: each metric against a loop over channels, and what may be spent."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from specquant.exporter.budget import frequencies_per_channel, importance, truncate
from specquant.exporter.recipe_checks import METRICS


def by_a_loop(weight: np.ndarray, act_mean: np.ndarray, metric: str) -> list[float]:
    scores = []
    for column in weight.T:
        size = [abs(w) for w in column]
        share = [s / sum(size) for s in size]
        scores.append(
            {
                "act": abs(sum(a * w for a, w in zip(act_mean, column, strict=True))),
                "entropy": -sum(p * math.log(p) for p in share),
                "abs_mean": sum(size) / len(size),
                "abs_max": max(size),
                "l2": math.sqrt(sum(s * s for s in size)),
                "uniform": 1.0,
            }[metric]
        )
    return scores


@pytest.mark.parametrize("metric", METRICS)
def test_metrics(rng: np.random.Generator, metric: str) -> None:
    weight, act_mean = rng.standard_normal((23, 9)), rng.standard_normal(23)
    score = importance(torch.from_numpy(weight), torch.from_numpy(act_mean), metric)
    np.testing.assert_allclose(score, by_a_loop(weight, act_mean, metric), rtol=1e-9)


@pytest.mark.parametrize("alpha", [0.3, 1.0, 8.0])
@pytest.mark.parametrize("metric", [m for m in METRICS if m != "uniform"])
def test_what_is_spent(rng: np.random.Generator, metric: str, alpha: float) -> None:
    k, channels = 16, 37
    weight = torch.from_numpy(rng.standard_normal((50, channels)) * rng.uniform(0.1, 3, channels))
    score = importance(weight, torch.from_numpy(rng.standard_normal(50)), metric)
    kept = frequencies_per_channel(score, k, alpha)
    assert kept.dtype == torch.int64
    assert int(kept.sum()) <= k * channels
    assert 0 <= int(kept.min()) < int(kept.max()) <= k
    assert (kept[score.argsort()].diff() >= 0).all()  # a channel that matters more never keeps less


@pytest.mark.parametrize("channels", [1, 3, 37, 576])
def test_equal_scores_keep_everything(channels: int) -> None:
    score = importance(torch.ones(5, channels), torch.ones(5), "uniform")
    assert frequencies_per_channel(score, 16, 1.0).tolist() == [16] * channels


def test_truncate(rng: np.random.Generator) -> None:
    """k_j frequencies are the constant and k_j − 1 pairs of cosine and sine."""
    coef = torch.from_numpy(rng.standard_normal((2 * 5 - 1, 4)))
    kept = truncate(coef, torch.tensor([0, 1, 3, 5]))
    assert (kept != 0).sum(0).tolist() == [0, 1, 5, 9]
    torch.testing.assert_close(kept[:5, 2], coef[:5, 2], rtol=0, atol=0)
