"""Rounding to INT4: GPTQ against its own definition written out with an explicit inverse, and descent."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

from specquant.exporter.gptq import descend, expand, follow, gptq, rtn
from specquant.exporter.scales import mse_scales
from tests.exporter.rounding import M, N, correlated, output_error, random_weight


def test_round_to_nearest(rng: np.random.Generator) -> None:
    weight, scales = random_weight(rng), torch.full((3, M), 0.125, dtype=torch.float64)
    q = rtn(weight, scales)
    assert q.dtype == torch.int8
    np.testing.assert_array_equal(q, np.clip(np.rint(weight.numpy() / 0.125), -8, 7))


def by_definition(weight: Tensor, hessian: Tensor, scales: Tensor, damping: float) -> Tensor:
    """GPTQ with the inverse Hessian of the features to come, updated feature by feature (Frantar et al., Eq. 3)."""
    h = hessian.clone()
    h += damping * h.diagonal().mean() * torch.eye(N, dtype=h.dtype)
    inverse, w, s = torch.linalg.inv(h), weight.clone(), expand(scales, N)
    q = torch.zeros_like(w)
    for i in hessian.diagonal().argsort(descending=True).tolist():
        q[i] = (w[i] / s[i]).round().clamp(-8, 7)
        w -= inverse[:, i, None] * (w[i] - q[i] * s[i]) / inverse[i, i]
        inverse = inverse - inverse[:, i, None] * inverse[i] / inverse[i, i]
    return q.to(torch.int8)


@pytest.mark.parametrize("group_size", [0, 24])
@pytest.mark.parametrize("block", [5, 128])
def test_gptq_is_its_definition(rng: np.random.Generator, group_size: int, block: int) -> None:
    weight, hessian = random_weight(rng), correlated(rng)
    scales = mse_scales(weight, group_size).product
    q = gptq(weight, hessian, scales, damping=0.01, block=block)
    assert q.dtype == torch.int8
    assert -8 <= int(q.min()) < int(q.max()) <= 7
    assert (q != by_definition(weight, hessian, scales, 0.01)).double().mean() < 0.01  # ties fall either way


@pytest.mark.parametrize("group_size", [0, 8])
def test_gptq_beats_round_to_nearest(rng: np.random.Generator, group_size: int) -> None:
    weight, hessian = random_weight(rng), correlated(rng)
    scales = mse_scales(weight, group_size).product
    q = gptq(weight.float(), hessian.float(), scales.float())
    nearest = output_error(weight, rtn(weight, scales), scales, hessian)
    assert output_error(weight, q, scales, hessian) < 0.7 * nearest


def test_independent_features_round_to_nearest(rng: np.random.Generator) -> None:
    """With nothing to gain from other features; features out of order would show."""
    weight, hessian = random_weight(rng), torch.diag(torch.from_numpy(rng.uniform(0.1, 10, N)))
    scales = mse_scales(weight, 24).product
    assert torch.equal(gptq(weight, hessian, scales), rtn(weight, scales))


@pytest.mark.parametrize("tokens", [1, 20])
def test_fewer_tokens_than_features(rng: np.random.Generator, tokens: int) -> None:
    """A Hessian without full rank, which float32 sums have pushed below zero by more than the damping."""
    weight, exact = random_weight(rng), correlated(rng, tokens)
    below = 2e-3 * exact.diagonal().mean() * torch.eye(N)
    scales = mse_scales(weight, 0).product
    q = gptq(weight, exact - below, scales, damping=1e-3)
    assert -8 <= int(q.min()) < int(q.max()) <= 7
    assert output_error(weight, q, scales, exact) < output_error(weight, rtn(weight, scales), scales, exact)


def test_following_is_least_squares(rng: np.random.Generator) -> None:
    """Against numpy's solver on the inputs themselves, and the share of the step that is asked for."""
    x = rng.standard_normal((300, N)) * np.exp(rng.standard_normal(N))
    exact = x + 0.3 * rng.standard_normal((300, N)) + 0.1 * x @ rng.standard_normal((N, N))
    weight = random_weight(rng)
    hessian, drift = (torch.from_numpy(x.T @ right / 300) for right in (x, exact - x))
    best = torch.from_numpy(np.linalg.lstsq(x, exact @ weight.numpy())[0])
    for share in (1.0, 0.4, 0.0):
        found = follow(weight, hessian, drift, share, damping=1e-12)
        torch.testing.assert_close(found, weight + share * (best - weight), rtol=1e-6, atol=1e-8)
    damped = follow(weight, hessian, drift, 1.0, damping=0.1)
    assert (damped - weight).norm() < (best - weight).norm()


def test_following_inputs_that_did_not_drift(rng: np.random.Generator) -> None:
    weight, hessian = random_weight(rng), correlated(rng, tokens=20)
    assert torch.equal(follow(weight, hessian, torch.zeros_like(hessian), 1.0), weight)


@pytest.mark.parametrize("block", [1, 5, 128])
@pytest.mark.parametrize("group_size", [0, 24])
def test_descent_ends_where_no_single_change_helps(rng: np.random.Generator, group_size: int, block: int) -> None:
    """Every integer of every channel tried one up and one down."""
    weight, hessian = random_weight(rng), correlated(rng)
    scales = mse_scales(weight, group_size).product
    damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(N)
    q = gptq(weight, hessian, scales)
    errors = [output_error(weight, q, scales, damped)]
    while len(errors) < 2 or errors[-1] < errors[-2]:
        q = descend(weight, hessian, q, scales, sweeps=1, block=block)
        errors.append(output_error(weight, q, scales, damped))
    assert q.dtype == torch.int8
    assert -8 <= int(q.min()) < int(q.max()) <= 7
    assert all(b <= a * (1 + 1e-9) for a, b in pairwise(errors))
    assert errors[-1] < errors[0]
    s = expand(scales, N)
    rest = weight - q.double() * s
    gradient = damped @ rest
    for step in (-1, 1):
        # ‖X(W − Ŵ)‖² after one integer changes by `step`, less what it is now
        gain = (step * s).square() * damped.diagonal()[:, None] - 2 * step * s * gradient
        gain[(q + step > 7) | (q + step < -8)] = 1
        assert gain.min() >= -1e-9 * errors[-1]


def test_sweeps_follow_each_other(rng: np.random.Generator) -> None:
    weight, hessian = random_weight(rng), correlated(rng)
    scales = mse_scales(weight, 24).product
    start = rtn(weight, scales)
    once = descend(weight, hessian, start, scales, sweeps=1)
    assert torch.equal(descend(weight, hessian, start, scales, sweeps=0), start)
    assert torch.equal(descend(weight, hessian, start, scales), descend(weight, hessian, once, scales, sweeps=1))
    assert output_error(weight, once, scales, hessian) < 0.9 * output_error(weight, start, scales, hessian)


def test_descent_finds_the_best_of_two_integers(rng: np.random.Generator) -> None:
    """Two features that pull almost alike: all 256 pairs of levels tried."""
    hessian = torch.tensor([[1.0, 0.6], [0.6, 1.0]], dtype=torch.float64)
    weight, scales = torch.from_numpy(rng.uniform(-1, 1, (2, 50))), torch.full((1, 50), 0.25, dtype=torch.float64)
    q = descend(weight, hessian, rtn(weight, scales), scales, 1e-12, sweeps=20)
    levels = torch.arange(-8, 8, dtype=torch.float64) * 0.25
    rest = weight[:, None, None] - torch.stack(torch.meshgrid(levels, levels, indexing="ij"))[..., None]
    errors = rest[0] ** 2 + rest[1] ** 2 + 1.2 * rest[0] * rest[1]
    best = errors.flatten(0, 1).amin(0)
    found = weight - q.double() * 0.25
    error = found[0] ** 2 + found[1] ** 2 + 1.2 * found[0] * found[1]
    assert ((error - best).abs() < 1e-9).double().mean() > 0.8
