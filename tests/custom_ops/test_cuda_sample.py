"""Sampling by the CUDA kernels against runtime/sampling.py: on a GPU, or compiled for the CPU (docs/cuda.md)."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from specquant.custom_ops import library_cuda_sample
from specquant.custom_ops.errors import SpecQuantError
from specquant.runtime.sampling import Sampling, choose, filter_top_k
from tests.cuda_arrays import DeviceArray, require_kernels

require_kernels()
WIDTH = 9  # of the mask
# Rows and vocabulary: of one block or several, whole slices of one and odd ones.
SIZES = [(1, 1), (3, 2), (2, 255), (5, 1024), (1, 1025), (2, 3333), (1, 5121)]


class Step:
    """Arrays of a step of decoding, in a workspace that steps share."""

    def __init__(self, logits: NDArray[Any], vocab: int | None = None, positions: Any = None) -> None:
        rows = len(logits)
        self.positions = np.zeros(rows, np.int64) if positions is None else np.array(positions)
        self.vocab = vocab
        self.logits = DeviceArray(logits)
        self.ids, self.results = (DeviceArray(np.full(rows, -7)) for _ in range(2))
        self.position_ids = DeviceArray(self.positions)
        self.mask = DeviceArray((np.arange(WIDTH) <= self.positions[:, None]).astype(np.int64))
        self.space: Any = None

    def run(self, uniforms: Any = None, **options: Any) -> NDArray[np.int64]:
        """The tokens; looks at what the next step is given."""
        given = None if uniforms is None else DeviceArray(np.array(uniforms, np.float64))
        problem = library_cuda_sample.sample_problem(
            self.logits,
            self.ids,
            self.results,
            uniforms=given,
            position_ids=self.position_ids,
            attention_mask=self.mask,
            vocab=self.vocab,
            **options,
        )
        if self.space is None:
            self.space = DeviceArray(np.zeros(library_cuda_sample.sample_workspace(problem), np.uint8))
        library_cuda_sample.sample(problem, self.space)
        results: NDArray[np.int64] = self.results.numpy()
        np.testing.assert_array_equal(self.ids.numpy(), np.maximum(results, 0))
        self.positions = self.positions + 1
        np.testing.assert_array_equal(self.position_ids.numpy(), self.positions)
        np.testing.assert_array_equal(self.mask.numpy(), np.arange(WIDTH) <= self.positions[:, None])
        return results


def scaled(logits: NDArray[Any], temperature: float, top_k: int) -> NDArray[np.float32]:
    wide = logits.astype(np.float32)
    wide = (wide - wide.max(axis=-1, keepdims=True)) / np.float32(max(temperature, 1e-6))
    return filter_top_k(wide, top_k) if top_k else wide


def check_draw(logits: NDArray[Any], tokens: NDArray[np.int64], uniforms: Any, temperature: float, top_k: int) -> None:
    """Each token is where the cumulative distribution meets the uniform number, but for rounding of the weights."""
    for row, token, uniform in zip(scaled(logits, temperature, top_k), tokens, uniforms, strict=True):
        weights = np.exp(row.astype(np.float64))
        assert weights[token] > 0
        share = np.concatenate([[0], np.cumsum(weights)]) / weights.sum()
        assert share[token] - 1e-6 <= uniform <= share[token + 1] + 1e-6


@pytest.mark.parametrize("float_type", [np.float32, np.float16])
@pytest.mark.parametrize("sizes", SIZES)
def test_greedy_is_the_first_of_the_largest(rng: np.random.Generator, sizes: tuple[int, int], float_type: Any) -> None:
    logits = rng.standard_normal(sizes).astype(float_type)
    np.testing.assert_array_equal(Step(logits).run(), logits.argmax(-1))
    for value in (0.0, 5.0):  # ties, here of all and of some
        logits[:, rng.integers(0, sizes[1], 9)] = value
        logits = np.minimum(logits, float_type(value))
        np.testing.assert_array_equal(Step(logits).run(), logits.argmax(-1))
    logits[:] = -0.0
    logits[:, sizes[1] // 2] = 0.0
    assert not Step(logits).run().any()


@pytest.mark.parametrize("float_type", [np.float32, np.float16])
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("top_k", [0, 1, 2, 40, 5000, 1 << 40])
def test_tokens_are_drawn_by_their_share(
    rng: np.random.Generator, sizes: tuple[int, int], float_type: Any, top_k: int
) -> None:
    logits = (rng.standard_normal(sizes) * rng.choice([0.01, 1, 6])).astype(float_type)
    step = Step(logits)
    for temperature in (0.7, 3.0):
        for uniforms in (rng.random(sizes[0]), np.zeros(sizes[0]), np.full(sizes[0], 1 - 2.0**-53)):
            tokens = step.run(uniforms, temperature=temperature, top_k=top_k)
            check_draw(logits, tokens, uniforms, temperature, min(top_k, sizes[1]))


@pytest.mark.parametrize("float_type", [np.float32, np.float16])
def test_the_same_seed_gives_the_same_tokens(rng: np.random.Generator, float_type: Any) -> None:
    """As `choose` draws them, step after step; a weight's last bit may tip a draw, but not many."""
    equal = 0
    for sampling in (Sampling(0.8, seed=3), Sampling(1.3, 40, seed=4), Sampling(0.6, 1, seed=5), Sampling()):
        generators = [[sampling.generator(row) for row in range(4)] for _ in range(2)]
        for _ in range(5):
            logits = (rng.standard_normal((4, 1500)) * 3).astype(float_type)
            wanted = choose(logits.astype(np.float32), sampling, [], generators[0])
            uniforms = [generator.random() for generator in generators[1]] if sampling.temperature else None
            options = {"temperature": sampling.temperature, "top_k": sampling.top_k}
            equal += int((Step(logits).run(uniforms, **options) == wanted).sum())
    assert equal >= 79


def test_what_equals_the_least_kept_is_kept(rng: np.random.Generator) -> None:
    """As filter_top_k; of equal logits, of both zeros, of negative ones, and of those that dividing makes equal."""
    for values in ([3, 2, 2, 2, 1, -1], [0.0, -0.0, 0.0, -0.0, -5, -6], [-1, -2, -2, -2, -2, -3]):
        logits = rng.permutation(np.repeat(np.array(values, np.float32), 300))[None]
        for top_k in (1, 250, 301, 302, 1000, 1501, 1800):
            uniforms = rng.random(1)
            tokens = Step(logits).run(uniforms, temperature=0.9, top_k=top_k)
            check_draw(logits, tokens, uniforms, 0.9, top_k)
    logits = np.float32(1) + np.arange(8, dtype=np.float32)[None] * np.float32(2**-23)
    seen = {int(Step(logits).run([u], temperature=1e30, top_k=1)[0]) for u in (0.01, 0.3, 0.6, 0.99)}
    assert seen == {int(choose(logits, Sampling(1e30, 1), [], [Fixed(u)])[0]) for u in (0.01, 0.3, 0.6, 0.99)}


class Fixed:
    """A generator that knows one number."""

    def __init__(self, number: float) -> None:
        self.number = number

    def random(self) -> float:
        return self.number


def test_a_tiny_temperature_is_greedy(rng: np.random.Generator) -> None:
    """Differences overflow, and weights are 0 or 1."""
    logits = (rng.standard_normal((3, 2000)) * 1e30).astype(np.float32)
    for top_k in (0, 7, 2000):
        tokens = Step(logits).run(rng.random(3), temperature=1e-6, top_k=top_k)
        np.testing.assert_array_equal(tokens, logits.argmax(-1))


@pytest.mark.parametrize("float_type", [np.float32, np.float16])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_logits_that_are_not_finite(rng: np.random.Generator, float_type: Any, bad: float) -> None:
    """−1 for their row, the others as ever, and nothing is left for later calls."""
    logits = rng.standard_normal((3, 2500)).astype(float_type)
    damaged = logits.copy()
    damaged[1, int(rng.integers(0, 2500))] = bad
    for options in ({}, {"temperature": 1.0}, {"temperature": 1.0, "top_k": 5}):
        uniforms = rng.random(3) if options else None
        step = Step(logits)
        wanted = step.run(uniforms, **options)
        broken = Step(damaged)
        wanted[1] = -1
        np.testing.assert_array_equal(broken.run(uniforms, **options), wanted)
        step.space = broken.space
        wanted[1] = Step(logits).run(uniforms, **options)[1]
        np.testing.assert_array_equal(step.run(uniforms, **options), wanted)


def test_part_of_wider_rows(rng: np.random.Generator) -> None:
    """A vocabulary that is less than the stride, and a workspace that rows of another number left."""
    logits = rng.standard_normal((3, 1300)).astype(np.float32)
    logits[:, 1200:] = 100
    step = Step(logits, vocab=1200)
    np.testing.assert_array_equal(step.run(), logits[:, :1200].argmax(-1))
    uniforms = rng.random(3)
    check_draw(logits[:, :1200], step.run(uniforms, temperature=1.0, top_k=30), uniforms, 1.0, 30)
    fewer = Step(logits[:1], vocab=1299)
    fewer.space = step.space
    check_draw(logits[:1, :1299], fewer.run(uniforms[:1], temperature=2.0, top_k=9), uniforms[:1], 2.0, 9)


def test_the_end_of_the_mask(rng: np.random.Generator) -> None:
    """A position beyond it sets nothing, in no row."""
    step = Step(rng.standard_normal((3, 50)).astype(np.float32), positions=[WIDTH - 1, 0, WIDTH - 2])
    step.run()
    step.run()


def test_what_is_refused() -> None:
    logits, ids = DeviceArray(np.ones((2, 30), np.float32)), DeviceArray(np.zeros(2, np.int64))
    make = library_cuda_sample.sample_problem
    with pytest.raises(SpecQuantError, match="logits are float64"):
        make(DeviceArray(np.ones((2, 30))), ids, ids)
    with pytest.raises(SpecQuantError, match=r"ids is int64 \[2\]; it should be int64 \[3\]"):
        make(DeviceArray(np.ones((3, 30), np.float32)), ids, ids)
    space = DeviceArray(np.zeros(library_cuda_sample.sample_workspace(make(logits, ids, ids)), np.uint8))
    changes: list[tuple[dict[str, Any], str]] = [
        ({"vocab": 0}, "the vocabulary must have"),
        ({"vocab": 31}, "the stride must be"),
        ({"top_k": -1}, "top_k must be"),
        ({"rows": 1 << 20}, "number of rows"),
        ({"half": 2}, "half must be"),
        ({"width": -1}, "width"),
        ({"temperature": float("nan")}, "temperature"),
        ({"temperature": 1.0}, "uniforms, ids or results are missing"),
        ({"results": None}, "results are missing"),
    ]
    for change, words in changes:
        problem = make(logits, ids, ids)
        for name, value in change.items():
            setattr(problem, name, value)
        with pytest.raises(SpecQuantError, match=words):
            library_cuda_sample.sample(problem, space)
    with pytest.raises(SpecQuantError, match="the workspace must have"):
        library_cuda_sample.sample(make(logits, ids, ids), DeviceArray(np.zeros(0, np.uint8)))
