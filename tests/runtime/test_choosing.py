"""Decoding whose tokens the device chooses, some steps ahead of the host: over a session of the CPU, on memory of the
host, by runtime/sampling.py in the place of the kernels, or by the kernels themselves compiled for the CPU
(docs/cuda.md). What is expected is what the same backend does when the host chooses."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("onnxruntime", reason="the extra `cpu` or `gpu` is not installed")

from specquant.custom_ops import library_cuda_sample
from specquant.custom_ops.errors import SpecQuantError
from specquant.custom_ops.library_cuda import Sample
from specquant.runtime.artifact import open_artifact
from specquant.runtime.bench import bench
from specquant.runtime.choosing import AHEAD, Chooser
from specquant.runtime.decoding import Ahead
from specquant.runtime.generate import Model
from specquant.runtime.on_device import DECODE, Tensors
from specquant.runtime.onnx_cuda import BoundGraph, OnnxCuda
from specquant.runtime.onnx_graph import open_graph
from specquant.runtime.sampling import Sampling
from specquant.runtime.session import Choosing
from tests.cuda_arrays import EMULATED
from tests.host_memory import HostMemory, HostSampler, view

CONTEXT = 80


@pytest.fixture(params=["host", "kernels"])
def sampler(request: pytest.FixtureRequest) -> Any:
    if request.param == "host":
        return HostSampler()
    if not EMULATED:
        pytest.skip("the kernels are not compiled for the CPU")
    return library_cuda_sample


def opened(folder: Path, sampler: Any = None, fixed_mask: bool = True, slow: bool = False, ends: Any = None) -> Model:
    """sampler None: the host chooses. slow: steps are done when they are waited for. ends: end-of-text tokens."""
    manifest = open_artifact(folder)
    if ends is not None:
        manifest = replace(manifest, model=replace(manifest.model, eos_token_ids=ends))
    session, rank = open_graph(folder, manifest.model, 1, True, ["CPUExecutionProvider"], None)
    memory = HostMemory(slow)
    backend = OnnxCuda(BoundGraph(session, manifest.model, rank, "cpu"), memory, manifest.model, CONTEXT)
    backend.fixed_mask = fixed_mask
    if sampler:
        backend.chooser = Chooser(memory, sampler)
    return Model(folder, manifest, backend, CONTEXT)


def steps_of(model: Model) -> list[Tensors]:
    """The tensors of each step of decoding from now on."""
    graph: Any = model._backend.graph  # type: ignore[attr-defined]
    run, seen = graph.run, []

    def watched(kind: int, tensors: Tensors, keep: int) -> None:
        if kind == DECODE:
            seen.append(tensors)
        run(kind, tensors, keep)

    graph.run = watched
    return seen


def tokens_of(model: Model, prompt: list[int], count: int) -> list[int]:
    """What a prompt is continued with, greedily, step by step."""
    sequences = model.sequences()
    tokens = [int(sequences.prefill_last(0, np.array(prompt)).argmax())]
    while len(tokens) < count:
        tokens.append(int(sequences.decode(np.array(tokens[-1:])).argmax()))
    return tokens


def damage(model: Model, step: int) -> None:
    """The last row of a step of decoding gets a logit that is NaN."""
    graph: Any = model._backend.graph  # type: ignore[attr-defined]
    run, kinds = graph.run, []

    def damaged(kind: int, tensors: Tensors, keep: int) -> None:
        run(kind, tensors, keep)
        kinds.append(kind)
        if kinds.count(DECODE) == step:
            place, (rows, _, vocab) = tensors["logits"]
            view(place, (rows, vocab), np.float32)[-1, 7] = np.nan

    graph.run = damaged


@pytest.fixture
def prompts(rng: np.random.Generator) -> list[list[int]]:
    """Of unequal length; the last one fills the context before the others end."""
    return [rng.integers(3, 300, count).tolist() for count in (2, 37, CONTEXT - 5)]


@pytest.mark.parametrize("slow", [False, True])
@pytest.mark.parametrize("fixed_mask", [False, True])
@pytest.mark.parametrize("options", [{}, {"temperature": 0.9, "seed": 5}, {"temperature": 1.4, "top_k": 20, "seed": 6}])
def test_texts_are_those_of_the_host(
    half_folder: Path, prompts: Any, sampler: Any, options: Any, fixed_mask: bool, slow: bool
) -> None:
    model, host = opened(half_folder, sampler, fixed_mask, slow), opened(half_folder, None, fixed_mask)
    expected = host.generate_batch(prompts, max_new_tokens=24, **options)
    assert model.generate_batch(prompts, max_new_tokens=24, **options) == expected
    assert model.stats is not None
    assert host.stats is not None
    assert model.stats.new_tokens == host.stats.new_tokens
    for prompt in prompts[:2]:
        pieces = list(model.generate(prompt, max_new_tokens=70, **options))
        assert pieces == list(host.generate(prompt, max_new_tokens=70, **options))


@pytest.mark.parametrize("name", ["folder", "int4_cache_folder"])
def test_artifacts_of_other_kinds(request: pytest.FixtureRequest, prompts: Any, sampler: Any, name: str) -> None:
    """float32 logits, quantised linears, a packed cache."""
    folder = request.getfixturevalue(name)
    for options in ({}, {"temperature": 0.7, "top_k": 5, "seed": 1}):
        texts = [opened(folder, how).generate_batch(prompts, max_new_tokens=20, **options) for how in (None, sampler)]
        assert texts[0] == texts[1]


@pytest.mark.parametrize("slow", [False, True])
def test_an_end_of_text_that_is_found_late(float_folder: Path, prompts: Any, sampler: Any, slow: bool) -> None:
    """In one row of several, whose steps go on until then, and in a row alone, whose later steps nobody sees."""
    texts = [tokens_of(opened(float_folder), prompt, 24) for prompt in prompts[:2]]
    for own, prompt in zip(texts, prompts[:2], strict=True):
        end = next((token for token in own[5:] if token not in own[:5]), own[5])
        model, host = (opened(float_folder, how, slow=slow, ends=(end,)) for how in (sampler, None))
        steps = steps_of(model)
        for asked in (prompts[:2], [*prompts, *prompts], [prompt]):
            steps.clear()
            assert model.generate_batch(asked, max_new_tokens=24) == host.generate_batch(asked, max_new_tokens=24)
            assert model.stats is not None
            assert host.stats is not None
            assert model.stats.new_tokens == host.stats.new_tokens
            assert model.stats.finish_reason == host.stats.finish_reason
        ended = own.index(end)  # the first token is of no step
        assert ended <= len(steps) < ended + AHEAD


def test_stop_strings(float_folder: Path, prompts: Any, sampler: Any) -> None:
    model = opened(float_folder, sampler, slow=True)
    text = "".join(model.generate(prompts[0], max_new_tokens=40))
    assert len(text) > 12
    for start in (0, 3, 8):
        stop = text[start : start + 4]
        assert (
            "".join(model.generate(prompts[0], max_new_tokens=40, stop=["never so", stop])) == text[: text.index(stop)]
        )
        assert model.stats is not None
        assert model.stats.finish_reason == "stop"
        assert "".join(model.generate(prompts[0], max_new_tokens=40)) == text  # nothing is left of the steps too far


@pytest.mark.parametrize("slow", [False, True])
def test_no_step_is_made_that_cannot_count(float_folder: Path, prompts: Any, sampler: Any, slow: bool) -> None:
    """max_new_tokens and the end of the context are known beforehand; every step keeps its addresses."""
    model = opened(float_folder, sampler, slow=slow, ends=())  # random text may end by chance
    steps = steps_of(model)
    for prompt, most, count in ((prompts[0], 9, 9), (prompts[0], 1, 1), (prompts[0], 2, 2), (prompts[2], 50, 6)):
        steps.clear()
        "".join(model.generate(prompt, max_new_tokens=most))
        assert model.stats is not None
        assert (model.stats.new_tokens, model.stats.finish_reason) == (count, "length")
        assert len(steps) == count - 1
        assert all(step == steps[0] for step in steps)


def test_how_many_steps_are_under_way(float_folder: Path, prompts: Any) -> None:
    """As many as may be while none is done; else each token comes before later steps keep it waiting."""
    for slow, most in ((True, AHEAD), (False, 2)):
        model, seen = opened(float_folder, HostSampler(), slow=slow), []
        sequences = model.sequences()
        sequences.prefill_last(0, np.array(prompts[0]))
        steps = steps_of(model)
        for count, _ in enumerate(Ahead(sequences, np.array([5]), Sampling(), (), 12)):  # type: ignore[arg-type]
            seen.append(len(steps) - count)
        assert max(seen) == most
        assert seen[-1] == 1
        assert len(steps) == 12


def test_what_the_host_must_choose(float_folder: Path, prompts: Any) -> None:
    def refuse(problem: Sample) -> None:
        raise AssertionError("the device was asked")

    model, host = opened(float_folder, HostSampler(refuse)), opened(float_folder)
    for options in ({"repetition_penalty": 1.2}, {"temperature": 0.8, "top_p": 0.9, "seed": 2}):
        expected = host.generate_batch(prompts, max_new_tokens=12, **options)
        assert model.generate_batch(prompts, max_new_tokens=12, **options) == expected
    with pytest.raises(AssertionError, match="was asked"):
        model.generate_batch(prompts, max_new_tokens=12, top_p=0.9)  # greedy: top_p says nothing
    assert isinstance(model.sequences(), Choosing)
    assert not isinstance(host.sequences(), Choosing)


def test_logits_that_are_not_finite(float_folder: Path, prompts: Any, sampler: Any) -> None:
    """The error of `choose`, after the tokens before."""
    model = opened(float_folder, sampler, slow=True)
    damage(model, 5)
    with pytest.raises(SpecQuantError, match="NaN or infinite logits: its files may be damaged"):
        model.generate_batch(prompts[:2], max_new_tokens=20)
    assert model.stats is not None
    assert (model.stats.new_tokens, model.stats.finish_reason) == (2 * 5, "cancelled")


def test_what_comes_after_the_end_is_no_error(float_folder: Path, rng: np.random.Generator, sampler: Any) -> None:
    """NaN in a row whose text ended in a step before, while the other goes on."""
    host = opened(float_folder)
    for _ in range(50):
        prompts = rng.integers(3, 300, (2, 5)).tolist()
        other, own = (tokens_of(host, prompt, 12) for prompt in prompts)
        if own[3] not in own[:3] + other:
            break
    model, host = (opened(float_folder, how, slow=True, ends=(own[3],)) for how in (sampler, None))
    damage(model, 5)
    assert model.generate_batch(prompts, max_new_tokens=12) == host.generate_batch(prompts, max_new_tokens=12)


def test_calls_that_overlap_or_stop_early(float_folder: Path, prompts: Any, sampler: Any) -> None:
    """Each has slots of its own; those of one that ended serve the next, and all memory is given back."""
    model = opened(float_folder, sampler, slow=True)
    alone = ["".join(model.generate(prompt, max_new_tokens=15)) for prompt in prompts[:2]]
    first, second = (model.generate(prompt, max_new_tokens=15) for prompt in prompts[:2])
    texts = ["", ""]
    for _ in range(20):
        texts[0] += next(first, "")
        texts[1] += next(second, "")
    assert texts == alone
    unfinished = model.generate(prompts[0], max_new_tokens=15)
    next(unfinished)
    unfinished.close()
    assert model.stats is not None
    assert model.stats.finish_reason == "cancelled"
    backend: Any = model._backend
    assert len(backend.chooser._spare) == 2
    backend.chooser = None
    assert backend.memory.arrays == {}


def test_steps_and_other_calls_in_turn(
    float_folder: Path, prompts: Any, sampler: Any, rng: np.random.Generator
) -> None:
    """A rewind, a dropped row and a step of the host's between steps of the device's: as all by the host."""
    ours, theirs = opened(float_folder, sampler).sequences(3), opened(float_folder).sequences(3)
    for row, prompt in enumerate(([5, 6], prompts[1], [9] * 20)):
        for sequences in (ours, theirs):
            sequences.prefill_last(row, np.array(prompt))
    last = np.array([7, 8, 9])
    for turn in range(3):
        tokens = [ids for ids, _ in Ahead(ours, last, Sampling(), (), 5)]  # type: ignore[arg-type]
        for ids in tokens:
            np.testing.assert_array_equal(ids, theirs.decode(last).argmax(-1))
            last = ids
        np.testing.assert_array_equal(ours.decode(last), theirs.decode(last))
        for sequences in (ours, theirs):
            sequences.rewind(0, 3)
            if turn == 1:
                sequences.drop(0)
        last = last[: 3 - (turn >= 1)]


def test_times_are_the_devices_where_it_works_alone(float_folder: Path, prompts: Any) -> None:
    """A caller that takes its time does not make decoding look faster than the device is."""
    model = opened(float_folder, HostSampler(), slow=True)
    memory: Any = model._backend.memory  # type: ignore[attr-defined]
    memory.seconds = lambda since, until: 10.0
    assert sum(1 for _ in model.generate(prompts[0], max_new_tokens=9)) <= 9
    assert model.stats is not None
    assert model.stats.decode_tokens_per_s == pytest.approx(0.1)
    assert model.stats.time_to_first_token_s < 5


def test_bench_decodes_as_generate_does(float_folder: Path) -> None:
    calls: list[Sample] = []
    result = bench(opened(float_folder, HostSampler(calls.append)), 0, 8, 2)
    assert result.decode is not None
    assert len(calls) == 3 * 8
    assert not any(problem.temperature for problem in calls)
