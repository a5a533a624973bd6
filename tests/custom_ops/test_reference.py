"""The reference, against docs/ops.md written out a number at a time."""

from __future__ import annotations

import math

import numpy as np
import pytest

from specquant.custom_ops.errors import SpecQuantError
from specquant.custom_ops.packing import unpack_group_scales, unpack_int4
from specquant.custom_ops.reference import (
    int4_residual_matmul,
    quantize_activation,
    specquant_matmul,
    spectral_branch,
)
from tests.ops import random_weights

GROUPS = [(0, 0), (8, 8), (0, 16), (16, 0), (8, 24), (24, 8)]


def quantised_by_hand(group: list[np.float32], bits: int) -> tuple[list[int], np.float32, int]:
    """Levels, scale and zero-point of one group: Eq. 1, with Python's round, half to even; 8 bits are symmetric."""
    zero, qmax = np.float32(0), np.float32(254 if bits == 8 else 2**bits - 1)
    lo, hi = min(zero, *group), max(zero, *group)
    if bits == 8:
        hi = max(-lo, hi)
        lo = -hi
    inv = qmax / (hi - lo)
    z = round(float(-lo * inv))
    return [min(max(round(float(u * inv)) + z, 0), int(qmax)) for u in group], (hi - lo) / qmax, z


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("group", [0, 8, 12])
def test_activations_are_quantised_as_defined(rng: np.random.Generator, bits: int, group: int) -> None:
    u = (rng.standard_normal((2, 3, 24)) + rng.uniform(-2, 2)).astype(np.float32)
    q, scale, zero_point = quantize_activation(u, bits, group)
    length = group or 24
    for t in np.ndindex(2, 3):
        for a in range(24 // length):
            part = slice(a * length, (a + 1) * length)
            levels, s, z = quantised_by_hand(list(u[t][part]), bits)
            assert (list(q[t][part]), scale[t][a], zero_point[t][a]) == (levels, s, z)


def test_half_steps_round_to_even() -> None:
    q, scale, zero_point = quantize_activation(np.array([[0, 0.5, 1.5, 2.5, 15]], np.float32), 4, 0)
    np.testing.assert_array_equal(q, [[0, 0, 2, 2, 15]])
    assert (scale.item(), zero_point.item()) == (1, 0)


def test_a_group_without_range_counts_as_zeros(rng: np.random.Generator) -> None:
    u = (rng.standard_normal((3, 16)) * 1e-32).astype(np.float32)
    q, scale, zero_point = quantize_activation(u, 4, 8)
    assert not scale.any()
    assert not zero_point.any()
    assert not (q * scale.repeat(8, axis=-1)).any()


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("act_group", [0, 8])
def test_a_value_that_is_not_finite_spoils_its_token_only(
    rng: np.random.Generator, value: float, act_group: int
) -> None:
    weights = random_weights(rng, "SpecQuantMatMul", 24, 5, 3, 0)
    x = rng.standard_normal((4, 24)).astype(np.float32)
    x[2, rng.integers(24)] = value
    y = specquant_matmul(x, **weights, act_bits=4, act_group=act_group)
    assert np.isnan(y[2]).all()
    assert np.isfinite(y[[0, 1, 3]]).all()


@pytest.mark.parametrize("bits", [2, 4, 8, 16])
@pytest.mark.parametrize(("group_size", "act_group"), GROUPS)
def test_residual_matmul_number_by_number(rng: np.random.Generator, bits: int, group_size: int, act_group: int) -> None:
    n, m = 48, 7
    weights = random_weights(rng, "Int4ResidualMatMul", n, m, 0, group_size)
    x = rng.standard_normal((2, n)).astype(np.float32)
    y = int4_residual_matmul(x, **weights, group_size=group_size, act_bits=bits, act_group=act_group)
    q_w, length = unpack_int4(weights["qweight"], n, m), act_group or n
    c = unpack_group_scales(weights["group_scales"], n // (group_size or n), m)
    for t in range(2):
        u = [float(value) for value in x[t]]
        if bits < 16:
            for start in range(0, n, length):
                levels, s, z = quantised_by_hand(list(x[t, start : start + length]), bits)
                u[start : start + length] = [float(s) * (level - z) for level in levels]
        for j in range(m):
            scales = [float(weights["scales"][j]) * int(c[i // (group_size or n), j]) for i in range(n)]
            terms = [u[i] * scales[i] * int(q_w[i, j]) for i in range(n)]
            expected = math.fsum([*terms, float(weights["bias"][j])])
            assert y[t, j] == pytest.approx(expected, abs=1e-5 * sum(abs(term) for term in terms) + 1e-6)


def test_integer_part_is_exact(rng: np.random.Generator) -> None:
    weights = random_weights(rng, "Int4ResidualMatMul", 512, 9, 0)
    weights["scales"][:] = 0.5
    weights["bias"] = rng.integers(-9, 9, 9).astype(np.float32)
    x = rng.integers(-127, 128, (3, 512))
    x[:, 0] = -127  # 127 levels to each side, so the scale is 1 and the levels are x itself
    y = int4_residual_matmul(x.astype(np.float32), **weights, act_bits=8)
    total = x.astype(np.int64) @ unpack_int4(weights["qweight"], 512, 9).astype(np.int64)
    np.testing.assert_array_equal(y, total * 0.5 + weights["bias"])


@pytest.mark.parametrize("float_type", [np.float32, np.float16])
@pytest.mark.parametrize("rank", [-1, 0, 3, 6, 99])
def test_spectral_branch(rng: np.random.Generator, float_type: type, rank: int) -> None:
    weights = random_weights(rng, "SpectralBranch", 20, 11, 6) | {"rank": np.array([rank])}
    x = rng.standard_normal((2, 3, 20)).astype(float_type)
    y, low = spectral_branch(x, **weights)
    basis, coef = (weights[name].astype(np.float64) for name in ("basis", "coef"))
    expected = x.astype(np.float64) @ basis * (np.arange(6) < rank)
    tolerance = 1e-5 if float_type == np.float32 else 5e-3
    assert y.dtype == low.dtype == float_type
    np.testing.assert_allclose(low, expected, atol=tolerance)
    np.testing.assert_allclose(y, expected @ coef, atol=10 * tolerance)


@pytest.mark.parametrize("subtract", [0, 1])
def test_fused_op_is_the_two_halves(rng: np.random.Generator, subtract: int) -> None:
    weights = random_weights(rng, "SpecQuantMatMul", 48, 7, 5, 8) | {"rank": np.array([3])}
    x = rng.standard_normal((2, 48)).astype(np.float32)
    groups = {"group_size": 8, "act_bits": 4, "act_group": 16}
    branch, low = spectral_branch(x, weights["basis"], weights["coef"], weights["rank"])
    u = x - subtract * low @ weights["basis"].astype(np.float32).T
    half = {name: weights[name] for name in ("qweight", "group_scales", "scales", "bias")}
    expected = branch + int4_residual_matmul(u, **half, **groups)
    y = specquant_matmul(x, **weights, **groups, subtract=subtract)
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bits", [0, 1, 9, 15])
def test_other_bits_are_refused(rng: np.random.Generator, bits: int) -> None:
    weights = random_weights(rng, "Int4ResidualMatMul", 16, 3, 0)
    with pytest.raises(SpecQuantError, match="act_bits"):
        int4_residual_matmul(np.ones((1, 16), np.float32), **weights, act_bits=bits)


def test_sizes_that_disagree_are_refused(rng: np.random.Generator) -> None:
    weights = random_weights(rng, "Int4ResidualMatMul", 16, 3, 0)
    with pytest.raises(SpecQuantError, match="export the model again"):
        int4_residual_matmul(np.ones((1, 16), np.float32), **weights, act_bits=4, group_size=8)
