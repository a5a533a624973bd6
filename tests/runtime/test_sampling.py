"""Sampling against definitions written out token by token."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from specquant.custom_ops.errors import SpecQuantError
from specquant.runtime.sampling import (
    Sampling,
    choose,
    draw,
    filter_top_k,
    filter_top_p,
    penalize_repetition,
    softmax,
)

LOGITS = arrays(np.float32, st.tuples(st.integers(1, 3), st.integers(1, 40)), elements=st.floats(-20, 20, width=32))


@given(LOGITS, st.integers(1, 50))
def test_top_k_keeps_what_no_k_others_beat(logits: np.ndarray, k: int) -> None:
    result = filter_top_k(logits, k)
    for row, kept in zip(logits, result, strict=True):
        for value, after in zip(row, kept, strict=True):
            assert after == (value if sum(other > value for other in row) < k else -np.inf)


@given(LOGITS, st.floats(0.01, 0.999))
def test_top_p_keeps_the_fewest_that_reach_p(logits: np.ndarray, p: float) -> None:
    result = filter_top_p(logits, p)
    for row, kept in zip(logits, result, strict=True):
        weights = [math.exp(float(value) - float(row.max())) for value in row]
        probabilities = [weight / sum(weights) for weight in weights]
        keep = np.isfinite(kept)
        assert (kept[keep] == row[keep]).all()
        mass = sum(value for value, flag in zip(probabilities, keep, strict=True) if flag)
        assert mass >= p - 1e-5
        least = min(value for value, flag in zip(probabilities, keep, strict=True) if flag)
        assert sum(value for value in probabilities if value > least * (1 + 1e-5)) < p + 1e-5
        assert all(flag or value <= least * (1 + 1e-5) for value, flag in zip(probabilities, keep, strict=True))


@given(LOGITS, st.floats(0.5, 3), st.data())
def test_repetition_penalty(logits: np.ndarray, penalty: float, data: st.DataObject) -> None:
    vocab = logits.shape[1]
    tokens = st.lists(st.integers(0, vocab - 1), min_size=1, max_size=8)
    seen = [np.array(data.draw(tokens), np.int64) for _ in logits]
    result = penalize_repetition(logits, seen, penalty)
    for row, after, past in zip(logits, result, seen, strict=True):
        for token in range(vocab):
            value = float(row[token])
            if token in past:
                value = value / penalty if value > 0 else value * penalty
            assert after[token] == pytest.approx(value, rel=1e-6)


def test_softmax_sums_to_one_and_survives_large_logits(rng: np.random.Generator) -> None:
    logits = (rng.standard_normal((4, 1000)) * 30 + 1e4).astype(np.float32)
    probabilities = softmax(logits)
    np.testing.assert_allclose(probabilities.sum(axis=1), 1, rtol=1e-12)
    exact = np.exp(logits.astype(np.float64) - logits.max(axis=1, keepdims=True))
    np.testing.assert_allclose(probabilities, exact / exact.sum(axis=1, keepdims=True), rtol=1e-4, atol=1e-30)


def test_draw_follows_the_probabilities(rng: np.random.Generator) -> None:
    logits = np.array([[1.0, -np.inf, 0.0, 2.0, -1.0]], np.float32)
    count = 20_000
    found = np.bincount([draw(logits, [rng])[0] for _ in range(count)], minlength=5) / count
    expected = softmax(logits)[0]
    assert found[1] == 0
    assert np.abs(found - expected).max() < 5 * math.sqrt(0.25 / count)


@given(LOGITS)
def test_order_is_penalty_temperature_top_k_top_p(logits: np.ndarray) -> None:
    assume(logits.shape[1] > 3)
    sampling = Sampling(temperature=0.7, top_k=3, top_p=0.8, repetition_penalty=1.5, seed=3)
    seen = [np.array([0, 1], np.int64) for _ in logits]
    tokens = choose(logits, sampling, seen, [sampling.generator(row) for row in range(len(logits))])
    expected = penalize_repetition(logits, seen, 1.5)
    expected = (expected - expected.max(axis=1, keepdims=True)) / np.float32(0.7)
    allowed = np.isfinite(filter_top_p(filter_top_k(expected, 3), 0.8))
    assert all(allowed[row, token] for row, token in enumerate(tokens))


def test_greedy_and_tiny_temperature_agree(rng: np.random.Generator) -> None:
    logits = rng.standard_normal((5, 300)).astype(np.float32)
    seen = [np.zeros(1, np.int64)] * 5
    for temperature in (0.0, 1e-9):
        sampling = Sampling(temperature=temperature)
        tokens = choose(logits, sampling, seen, [sampling.generator(row) for row in range(5)])
        assert (tokens == logits.argmax(axis=1)).all()


def test_seed_repeats_and_rows_differ() -> None:
    logits = np.zeros((2, 1000), np.float32)
    sampling = Sampling(temperature=1, seed=11)
    seen = [np.zeros(1, np.int64)] * 2
    first, second = (choose(logits, sampling, seen, [sampling.generator(0), sampling.generator(1)]) for _ in range(2))
    assert (first == second).all()
    assert first[0] != first[1]


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_bad_logits_are_reported(value: float) -> None:
    logits = np.zeros((1, 8), np.float32)
    logits[0, 3] = value
    with pytest.raises(SpecQuantError, match="NaN or infinite"):
        choose(logits, Sampling(), [np.zeros(1, np.int64)], [])


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": -1},
        {"temperature": math.nan},
        {"temperature": math.inf},
        {"top_k": -1},
        {"top_k": 1.5},
        {"top_p": 0},
        {"top_p": 1.01},
        {"repetition_penalty": 0},
        {"seed": -1},
    ],
)
def test_ranges(options: dict) -> None:
    with pytest.raises(SpecQuantError, match=next(iter(options))):
        Sampling(**options)
