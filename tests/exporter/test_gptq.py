"""Rounding to INT4: scales, and GPTQ against its own definition written out with an explicit inverse."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from specquant.exporter.gptq import as_float16, expand, gptq, mse_scales, refit_scales, rtn

N, M = 72, 13  # neither a multiple of GPTQ's block below


def correlated(rng: np.random.Generator, tokens: int = 300) -> Tensor:
    """The second moment of inputs whose channels are correlated, float64 [N, N]."""
    x = rng.standard_normal((tokens, N)) @ rng.standard_normal((N, N)) * np.exp(rng.standard_normal(N))
    return torch.from_numpy(x.T @ x / tokens)


def random_weight(rng: np.random.Generator) -> Tensor:
    return torch.from_numpy(rng.standard_normal((N, M)) * rng.uniform(0.01, 1, M))


def output_error(weight: Tensor, q: Tensor, scales: Tensor, hessian: Tensor) -> float:
    """‖X(W − Ŵ)‖² / T."""
    rest = weight - q.double() * expand(scales, len(weight))
    return float((rest * (hessian @ rest)).sum())


@pytest.mark.parametrize("group_size", [0, 24, 8])
def test_scales(rng: np.random.Generator, group_size: int) -> None:
    weight, importance = random_weight(rng), torch.from_numpy(rng.uniform(0, 5, N))
    size = group_size or N

    def error(scales: Tensor, weighting: Tensor) -> Tensor:
        rest = weight - rtn(weight, scales).double() * expand(scales, N)
        return (rest.square() * weighting[:, None]).view(N // size, size, M).sum(1)

    plain, weighted = mse_scales(weight, group_size), mse_scales(weight, group_size, importance)
    largest = as_float16(weight.abs().view(N // size, size, M).amax(1) / 7)
    for scales in (plain, weighted):
        assert scales.shape == (N // size, M)
        assert (scales > 0).all()
        torch.testing.assert_close(scales.half().double(), scales, rtol=0, atol=0)
    ones = torch.ones_like(importance)
    assert error(plain, ones).sum() < 0.98 * error(largest, ones).sum()
    assert (error(weighted, importance) <= error(plain, importance)).all()  # both search the same ratios


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
    scales = mse_scales(weight, group_size)
    q = gptq(weight, hessian, scales, damping=0.01, block=block)
    assert q.dtype == torch.int8
    assert -8 <= int(q.min()) < int(q.max()) <= 7
    assert (q != by_definition(weight, hessian, scales, 0.01)).double().mean() < 0.01  # ties fall either way


@pytest.mark.parametrize("group_size", [0, 8])
def test_gptq_beats_round_to_nearest(rng: np.random.Generator, group_size: int) -> None:
    weight, hessian = random_weight(rng), correlated(rng)
    scales = mse_scales(weight, group_size)
    q = gptq(weight.float(), hessian.float(), scales.float())
    nearest = output_error(weight, rtn(weight, scales), scales, hessian)
    assert output_error(weight, q, scales, hessian) < 0.7 * nearest


def test_independent_features_round_to_nearest(rng: np.random.Generator) -> None:
    """With nothing to gain from other features; features out of order would show."""
    weight, hessian = random_weight(rng), torch.diag(torch.from_numpy(rng.uniform(0.1, 10, N)))
    scales = mse_scales(weight, 24)
    assert torch.equal(gptq(weight, hessian, scales), rtn(weight, scales))


@pytest.mark.parametrize("tokens", [1, 20])
def test_fewer_tokens_than_features(rng: np.random.Generator, tokens: int) -> None:
    """A Hessian without full rank, which float32 sums have pushed below zero by more than the damping."""
    weight, exact = random_weight(rng), correlated(rng, tokens)
    below = 2e-3 * exact.diagonal().mean() * torch.eye(N)
    scales = mse_scales(weight, 0)
    q = gptq(weight, exact - below, scales, damping=1e-3)
    assert -8 <= int(q.min()) < int(q.max()) <= 7
    assert output_error(weight, q, scales, exact) < output_error(weight, rtn(weight, scales), scales, exact)


@pytest.mark.parametrize("group_size", [0, 24, 8])
def test_refitted_scales_are_least_squares(rng: np.random.Generator, group_size: int) -> None:
    """Against numpy's solver on the inputs themselves, one output channel at a time."""
    weight, hessian = random_weight(rng), correlated(rng)
    scales = mse_scales(weight, group_size)
    q = gptq(weight, hessian, scales)
    fitted = refit_scales(weight, hessian, q, scales, damping=1e-12)
    root = np.linalg.cholesky(hessian.numpy() + 1e-9 * np.trace(hessian) / N * np.eye(N)).T
    size = group_size or N
    for m in range(M):
        columns = np.zeros((N, N // size))
        for g in range(N // size):
            columns[g * size : (g + 1) * size, g] = q[g * size : (g + 1) * size, m]
        best = np.linalg.lstsq(root @ columns, root @ weight[:, m].numpy())[0]
        expected = best if (best > 0).all() else scales[:, m].numpy()
        np.testing.assert_allclose(fitted[:, m], expected, rtol=2e-3)  # float16, and what the damping does
    assert output_error(weight, q, fitted, hessian) < output_error(weight, q, scales, hessian)


def test_a_group_of_zeros_keeps_the_rest_solvable(rng: np.random.Generator) -> None:
    weight, hessian = random_weight(rng), correlated(rng)
    scales = mse_scales(weight, 24)
    q = gptq(weight, hessian, scales)
    q[24:48, 3] = 0
    fitted = refit_scales(weight, hessian, q, scales)
    assert fitted.isfinite().all()
    assert (fitted > 0).all()
    assert output_error(weight, q, fitted, hessian) < output_error(weight, q, scales, hessian)
