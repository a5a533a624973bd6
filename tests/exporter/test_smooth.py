"""Smoothing factors and how query heads share them."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from specquant.exporter.smooth import share_over_heads, smoothing_factors, spread_over_heads


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.8, 1.0])
def test_factors(rng: np.random.Generator, alpha: float) -> None:
    act, weight = rng.uniform(0.2, 9, 21), rng.uniform(0.05, 2, 21)
    factors = smoothing_factors(torch.from_numpy(act), torch.from_numpy(weight), alpha).numpy()
    expected = act**alpha / weight ** (1 - alpha)
    np.testing.assert_allclose(factors / factors[0], expected / expected[0], rtol=1e-9)
    assert np.log(factors).mean() == pytest.approx(0, abs=1e-9)


def test_dead_channels_stay_and_do_not_count(rng: np.random.Generator) -> None:
    act, weight = torch.from_numpy(rng.uniform(1, 5, 12)), torch.from_numpy(rng.uniform(1, 5, 12))
    alive = smoothing_factors(act[2:], weight[2:], 0.5)
    act[0] = weight[1] = 0
    factors = smoothing_factors(act, weight, 0.5)
    assert factors[:2].tolist() == [1, 1]
    torch.testing.assert_close(factors[2:], alive)


def test_an_outlier_is_bounded(rng: np.random.Generator) -> None:
    act = torch.from_numpy(rng.uniform(1, 2, 100))
    act[7] = 1e9
    factors = smoothing_factors(act, torch.ones(100, dtype=torch.float64), 0.8)
    assert float(factors.max()) == pytest.approx(math.exp(5.5))


def test_heads_share_the_largest(rng: np.random.Generator) -> None:
    heads, kv_heads, d = 6, 2, 5
    values = rng.standard_normal((heads, d))
    shared = share_over_heads(torch.from_numpy(values.reshape(-1)), heads, kv_heads).numpy()
    # Query heads 0…2 read value head 0, heads 3…5 value head 1.
    np.testing.assert_array_equal(shared, np.concatenate([values[:3].max(0), values[3:].max(0)]))
    spread = spread_over_heads(torch.from_numpy(shared), heads, kv_heads).numpy().reshape(heads, d)
    for head in range(heads):
        np.testing.assert_array_equal(spread[head], shared.reshape(kv_heads, d)[head // 3])
