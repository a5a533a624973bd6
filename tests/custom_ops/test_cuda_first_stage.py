"""The first stage of the CUDA kernels' matmul: levels, rotations, the branch's low. Against the reference."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from specquant.custom_ops import reference
from tests.cuda_arrays import EMULATED, capability, require_kernels
from tests.cuda_matmul import Call
from tests.ops import random_input, random_weights

require_kernels()
HOPPER = capability() == (9, 0)
APART = {"x": 4}  # off its alignment: x that only the kernels of several passes take


def assert_levels(call: Call, hat: NDArray[Any], bits: int, act_group: int, clip: float) -> None:
    """Levels less zero-points, and scales, in the workspace are those of the reference, down to the last bit."""
    q, scale, zero = reference.quantize_activation(hat, bits, act_group, clip)
    at, (tokens, n) = call.layout, hat.shape
    stored = call.read("levels", np.int8, (tokens, at.features_padded))[:, :n].astype(np.int32)
    np.testing.assert_array_equal(stored, q - np.repeat(zero, act_group or n, axis=-1))
    scales = call.read("scale", np.float32, (at.segments, at.tokens_padded))[:, :tokens].T
    np.testing.assert_array_equal(scales, scale)


@pytest.mark.parametrize("offsets", [{}, APART])
@pytest.mark.parametrize("bits", [2, 4, 7, 8])
@pytest.mark.parametrize(
    ("group_size", "act_group", "n"), [(64, 64, 192), (0, 0, 72), (32, 16, 96), (64, 128, 256), (64, 0, 1344)]
)
def test_levels_are_exact(
    rng: np.random.Generator, bits: int, group_size: int, act_group: int, n: int, offsets: dict[str, int]
) -> None:
    """Of any activations."""
    weights = random_weights(rng, "Int4ResidualMatMul", n, 8, 0, group_size)
    x = (rng.standard_normal((37, n)) * 10.0 ** rng.integers(-9, 9, (37, n))).astype(np.float32)
    x[0], x[1], x[2], x[3] = 0, 1e-33, -np.abs(x[3]), np.abs(x[4])
    clip = float(rng.choice([1.0, 0.9, 0.3]))
    attributes: dict[str, Any] = {"group_size": group_size, "act_bits": bits, "act_group": act_group, "act_clip": clip}
    assert_levels(Call(x, weights, "any", offsets, **attributes), x, bits, act_group, clip)


@pytest.mark.parametrize("block", [8, 16, 32, 128, 512])
def test_rotation_is_exact(rng: np.random.Generator, block: int) -> None:
    n = block * int(rng.integers(1, 4))
    weights = random_weights(rng, "Int4ResidualMatMul", n, 8, 0, 0)
    x = rng.standard_normal((21, n)).astype(rng.choice([np.float32, np.float16]))
    expected = reference.block_hadamard(x, block)
    call = Call(x, weights, "any", APART, act_bits=8, hadamard=block)
    np.testing.assert_array_equal(call.read("rotated", np.float32, x.shape), expected)
    assert_levels(Call(x, weights, "any", act_bits=8, hadamard=block), expected, 8, 0, 1.0)


@pytest.mark.skipif(not HOPPER, reason="clusters of 16 blocks are Hopper's")
@pytest.mark.parametrize(("n", "act_group", "prologue"), [(4160, 64, 1), (4096, 0, 0), (7168, 64, 0)])
def test_clusters_of_sixteen(rng: np.random.Generator, n: int, act_group: int, prologue: int) -> None:
    """A token of many features: the stage in one kernel gives what the separate kernels give."""
    weights = random_weights(rng, "SpecQuantMatMul", n, 32, 32, 64)
    x = random_input(rng, (2, n))
    if prologue == 1:
        weights["norm"] = np.ones(n, np.float32)
    attributes: dict[str, Any] = {"group_size": 64, "act_group": act_group, "subtract": 1, "prologue": prologue}
    found, wanted = (Call(x, weights, path, **attributes, act_bits=16, epsilon=0.01).y for path in ("cluster", "any"))
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-3 * np.abs(wanted).max())


@pytest.mark.parametrize(
    ("prologue", "act_group", "kind"), [(0, 0, np.float16), (1, 0, np.float16), (1, 64, np.float32)]
)
def test_many_tokens(rng: np.random.Generator, prologue: int, act_group: int, kind: Any) -> None:
    """More than all blocks take at once: they go on to others."""
    tokens, n, m = 2100 if EMULATED else 6000, 1408, 48
    weights = random_weights(rng, "SpecQuantMatMul", n, m, 31, act_group)
    x = random_input(rng, (tokens, n), kind)
    x[:, 3] *= rng.choice([1, 8], tokens).astype(kind)
    if prologue == 1:
        weights["norm"] = rng.uniform(-2, 2, n).astype(np.float32)
    attributes: dict[str, Any] = {"group_size": act_group, "act_group": act_group, "subtract": 1, "prologue": prologue}
    attributes |= {"act_bits": 4 if prologue == 0 else 16, "epsilon": 0.01}
    expected = reference.specquant_matmul(x.astype(np.float32), **weights, **attributes)
    y = Call(x, weights, **attributes).y.astype(np.float32)
    np.testing.assert_allclose(y, expected, rtol=0, atol=1e-3 * np.abs(expected).max())


@pytest.mark.parametrize("act_group", [0, 96])  # 96: by the kernels of several passes
@pytest.mark.parametrize("kind", [np.float32, np.float16])
@pytest.mark.parametrize("tokens", [2, 40])
@pytest.mark.parametrize("prologue", [0, 1])
def test_branch_of_any_numbers(rng: np.random.Generator, kind: Any, tokens: int, act_group: int, prologue: int) -> None:
    """low and what is left of x̂, on numbers that no order of summation gets exactly."""
    n, m, r = 672 if act_group else 1344, 64, int(rng.choice([31, 32, 40]))
    weights = random_weights(rng, "SpecQuantMatMul", n, m, r, 0)
    weights["basis"] = np.linalg.qr(rng.standard_normal((n, r)))[0].astype(np.float16)
    x = rng.standard_normal((tokens, n)).astype(kind)
    x[:, ::97] *= 60
    hat = x.astype(np.float64)
    if prologue:
        weights["norm"] = (rng.standard_normal(n) * 10.0 ** rng.integers(-3, 3)).astype(np.float32)
        hat *= weights["norm"] / np.sqrt(np.mean(hat * hat, axis=-1, keepdims=True) + 0.01)
    attributes: dict[str, Any] = {"act_group": act_group, "subtract": 1, "act_bits": 4 if act_group else 16}
    call = Call(x, weights, "any", **attributes, prologue=prologue, epsilon=0.01)
    low = hat @ weights["basis"].astype(np.float64)
    parts = call.read("low", np.float16, (tokens, 2, call.layout.rank_padded)).astype(np.float64).sum(1)
    found = parts[:, :r] * call.read("low_factor", np.float32, (tokens, 1))
    np.testing.assert_allclose(found, low, rtol=0, atol=2e-6 * np.abs(low).max())
    left = hat - low @ weights["basis"].astype(np.float64).T
    if act_group:
        u, tolerance = call.read("reduced", np.float32, (tokens, n)), 2e-6 * np.abs(hat).max()
    else:
        at = call.layout
        halves = call.read("levels", np.float16, (tokens, at.features_padded))[:, :n].astype(np.float32)
        u, tolerance = halves * call.read("scale", np.float32, (at.tokens_padded,))[:tokens, None], 2e-3 * np.abs(left)
    np.testing.assert_array_less(np.abs(u - left), tolerance + 2e-6 * np.abs(hat).max())
