"""The packed rows of a 4-bit KV cache."""

from __future__ import annotations

import numpy as np
import pytest

from specquant.custom_ops.errors import SpecQuantError
from specquant.custom_ops.kv_rows import pack_rows, quantize_rows, row_bytes, unpack_rows


@pytest.mark.parametrize("spread", [1e-7, 1e-3, 1.0, 3e3])
def test_rows_are_rounded_to_the_nearest_of_16_levels(rng: np.random.Generator, spread: float) -> None:
    x = (spread * (rng.standard_normal((50, 48)) + rng.uniform(-4, 4, (50, 1)))).astype(np.float32)
    rows = pack_rows(x)
    assert rows.shape == (50, row_bytes(48)) == (50, 28)
    step = (x.max(-1, keepdims=True) - x.min(-1, keepdims=True)) / 15
    # Half a step, and what float16 adds: 2^-11 of low and of 15 steps, or half of the smallest float16, 2^-25.
    bound = step / 2 + 2.0**-11 * (np.abs(x).max(-1, keepdims=True) + 15 * step) + 16 * 2.0**-25
    assert (np.abs(unpack_rows(rows) - x) <= bound).all()
    q, scale, low = quantize_rows(x)
    np.testing.assert_array_equal(unpack_rows(rows), low.astype(np.float32) + scale.astype(np.float32) * q)


def test_clipped_rows_have_finer_levels(rng: np.random.Generator) -> None:
    x = rng.standard_normal((50, 48)).astype(np.float32)
    lo, span = x.min(-1, keepdims=True), np.ptp(x, axis=-1, keepdims=True)
    _, scale, low = quantize_rows(x, 0.8)
    np.testing.assert_allclose(scale, 0.8 * span / 15, rtol=1e-3)
    np.testing.assert_allclose(low, lo + 0.1 * span, rtol=2e-3, atol=1e-3)
    y = unpack_rows(pack_rows(x, 0.8))
    inside = (x > lo + 0.1 * span) & (x < lo + 0.9 * span)
    assert (np.abs(y - x) <= np.where(inside, 0.51 * scale, 0.11 * span) + 2e-3).all()


def test_levels_that_fit_come_back_exactly(rng: np.random.Generator) -> None:
    q = rng.integers(0, 16, (20, 32)).astype(np.float32)
    q[:, 3], q[:, 30] = 0, 15
    x = q * np.float32(0.125) + rng.integers(-9, 9, (20, 1)).astype(np.float32)
    np.testing.assert_array_equal(unpack_rows(pack_rows(x)), x)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 2e6])
def test_a_row_that_float16_cannot_span_is_nan(rng: np.random.Generator, value: float) -> None:
    x = rng.standard_normal((3, 32)).astype(np.float32)
    x[1, rng.integers(32)] = value
    y = unpack_rows(pack_rows(x))
    assert np.isnan(y[1]).all()
    assert np.isfinite(y[[0, 2]]).all()


@pytest.mark.parametrize("head_dim", [0, 8, 72, 272])
def test_head_sizes_that_do_not_suit(head_dim: int) -> None:
    with pytest.raises(SpecQuantError, match=f"head_dim {head_dim} .*multiples of 16"):
        row_bytes(head_dim)
