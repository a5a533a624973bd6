"""Scales of two levels: what they may be, and that they are the best of what is tried."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from specquant.exporter.gptq import damped, expand, gptq, rtn
from specquant.exporter.scales import Scales, as_float16, mse_scales, refit_scales
from tests.exporter.rounding import M, N, correlated, output_error, random_weight

GROUPS = [0, 24, 8]


def check(scales: Scales, groups: int) -> None:
    """They are what the op takes."""
    assert (scales.scales.shape, scales.group_scales.shape) == ((M,), (groups, M))
    assert (scales.scales > 0).all()
    torch.testing.assert_close(scales.scales.half().double(), scales.scales.double(), rtol=0, atol=0)
    assert torch.equal(scales.group_scales, scales.group_scales.round())
    assert scales.group_scales.min() >= 1
    assert scales.group_scales.max() <= (16 if groups > 1 else 1)


def snapped(free: Tensor) -> Scales:
    """Scales of groups [G, M] to the nearest multiples of a sixteenth of the largest, or a little more."""
    best, least = None, None
    for k in range(9):
        base = as_float16(free.amax(0) / 16 * (1 + 0.02 * k))
        whole = (free / base).round().clamp(1, 16)
        error = (whole * base - free).square().sum(0)
        if best is None or least is None:
            best, least = Scales(base, whole), error
        best = Scales(*(torch.where(error < least, a, b) for a, b in zip((base, whole), best, strict=True)))
        least = torch.minimum(error, least)
    assert best is not None
    return best


def rounding_error(weight: Tensor, scales: Tensor, importance: Tensor) -> Tensor:
    """Of every channel, [M]."""
    rest = weight - rtn(weight, scales).to(weight.dtype) * expand(scales, N)
    return (rest.square() * importance[:, None]).sum(0)


def free_scales(weight: Tensor, size: int, importance: Tensor) -> Tensor:
    """Each group's best by itself, [N / size, M]: channels of one group."""
    parts = zip(weight.split(size), importance.split(size), strict=True)
    return torch.stack([mse_scales(w, 0, i).scales for w, i in parts])


@pytest.mark.parametrize("group_size", GROUPS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_scales_of_least_squared_error(rng: np.random.Generator, group_size: int, dtype: torch.dtype) -> None:
    weight, importance = random_weight(rng).to(dtype), torch.from_numpy(rng.uniform(0, 5, N)).to(dtype)
    size, ones = group_size or N, torch.ones(N, dtype=dtype)
    plain, weighted = mse_scales(weight, group_size), mse_scales(weight, group_size, importance)
    for scales in (plain, weighted):
        check(scales, N // size)
    largest = as_float16(weight.abs().view(N // size, size, M).amax(1) / 7)
    if not group_size:
        largest = largest.expand(1, M)
        assert rounding_error(weight, plain.product, ones).sum() < 0.98 * rounding_error(weight, largest, ones).sum()
    assert rounding_error(weight, weighted.product, importance).sum() < (
        1.0001 * rounding_error(weight, plain.product, importance).sum()
    )


@pytest.mark.parametrize("group_size", [24, 8])
def test_whole_numbers_are_chosen_by_the_error_they_make(rng: np.random.Generator, group_size: int) -> None:
    """Better than the nearest ones, and little worse than scales of their own."""
    weight = torch.cat([random_weight(rng) for _ in range(20)], 1)
    importance = torch.from_numpy(rng.uniform(0.1, 5, N))
    free = free_scales(weight, group_size, importance)
    error = {
        name: float(rounding_error(weight, scales, importance).sum())
        for name, scales in (
            ("free", free),
            ("snapped", snapped(free).product),
            ("chosen", mse_scales(weight, group_size, importance).product),
        )
    }
    assert error["chosen"] < error["snapped"]
    assert error["chosen"] < 1.15 * error["free"]


def test_groups_far_smaller_than_the_largest(rng: np.random.Generator) -> None:
    """They have at least a sixteenth of its scale."""
    weight = random_weight(rng)
    weight[24:48] *= 1e-3
    weight[:, 3] = 0
    scales = mse_scales(weight, 24)
    check(scales, 3)
    assert (scales.group_scales[1] == 1).all()
    error = rounding_error(weight, scales.product, torch.ones(N, dtype=torch.float64))
    assert (error <= 0.05 * weight.square().sum(0)).all()


def test_scales_that_float16_barely_holds(rng: np.random.Generator) -> None:
    for size in (1e-6, 1e-4, 1e3):
        weight = random_weight(rng) * size
        scales = mse_scales(weight, 24)
        check(scales, 3)
        if size > 1e-5:
            error = rounding_error(weight, scales.product, torch.ones(N, dtype=torch.float64)).sum()
            assert error < 0.05 * weight.square().sum()


@pytest.mark.parametrize("group_size", GROUPS)
def test_refitted_scales_beside_least_squares(rng: np.random.Generator, group_size: int) -> None:
    """Numpy's solver on the inputs themselves, one output channel at a time: what one group has, and what no scales of
    two levels can be better than."""
    weight, hessian = random_weight(rng), correlated(rng)
    start = mse_scales(weight, group_size)
    q = gptq(weight, hessian, start.product)
    fitted = refit_scales(weight, hessian, q, start, damping=1e-12)
    size = group_size or N
    check(fitted, N // size)
    root = np.linalg.cholesky(hessian.numpy() + 1e-9 * np.trace(hessian) / N * np.eye(N)).T
    free, valid = np.zeros((N // size, M)), np.zeros(M, bool)
    for m in range(M):
        columns = np.zeros((N, N // size))
        for g in range(N // size):
            columns[g * size : (g + 1) * size, g] = q[g * size : (g + 1) * size, m]
        free[:, m] = np.linalg.lstsq(root @ columns, root @ weight[:, m].numpy())[0]
        valid[m] = (free[:, m] > 0).all()
    least = torch.from_numpy(free)
    channels = [m for m in range(M) if valid[m]]
    if not group_size:
        torch.testing.assert_close(fitted.product[:, channels], least[:, channels], rtol=2e-3, atol=0)
    for m in range(M):
        column = slice(m, m + 1)
        error = [
            output_error(weight[:, column], q[:, column], scales[:, column], hessian)
            for scales in (least, fitted.product, start.product)
        ]
        assert error[0] <= error[1] * (1 + 1e-6)
        assert error[1] <= error[2] * (1 + 1e-3 * (not group_size))  # one group's is rounded to float16
        if valid[m] and group_size:
            rounded = snapped(least[:, column]).product
            assert error[1] <= output_error(weight[:, column], q[:, column], rounded, hessian) * 1.1
    assert output_error(weight, q, fitted.product, hessian) < output_error(weight, q, start.product, hessian)


def test_refitting_gains_on_rounding_what_was_fitted(rng: np.random.Generator) -> None:
    """The scale of the channel is fitted to whole numbers once they are there: over many channels, that is less error
    than rounding the solution alone."""
    weight = torch.cat([random_weight(rng) for _ in range(20)], 1)
    hessian = correlated(rng)
    start = mse_scales(weight, 8)
    q = gptq(weight, hessian, start.product)
    fitted = refit_scales(weight, hessian, q, start)
    rounded = snapped(_least_squares(weight, damped(hessian, 0.01), q, start))
    error = [output_error(weight, q, scales.product, damped(hessian, 0.01)) for scales in (fitted, rounded)]
    assert error[0] < error[1]


def _least_squares(weight: Tensor, hessian: Tensor, q: Tensor, start: Scales) -> Tensor:
    """[G, M], or where that is not positive what it was."""
    root = torch.linalg.cholesky(hessian).T
    groups = len(start.group_scales)
    columns = torch.zeros(weight.shape[1], N, groups, dtype=torch.float64)
    for g, rows in enumerate(torch.arange(N).chunk(groups)):
        columns[:, rows, g] = q[rows].T.double()
    solved = torch.linalg.lstsq(root @ columns, (root @ weight).T[..., None], driver="gelsd").solution[..., 0].T
    return torch.where((solved > 0).all(0), solved, start.product)


def test_a_group_of_zeros_keeps_the_rest_solvable(rng: np.random.Generator) -> None:
    weight, hessian = random_weight(rng), correlated(rng)
    start = mse_scales(weight, 24)
    q = gptq(weight, hessian, start.product)
    q[24:48, 3] = 0
    fitted = refit_scales(weight, hessian, q, start)
    check(fitted, 3)
    assert output_error(weight, q, fitted.product, hessian) < output_error(weight, q, start.product, hessian)
