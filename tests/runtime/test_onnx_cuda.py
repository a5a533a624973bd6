"""The CUDA backend: its sequences and bindings over a session of the CPU, on memory of the host, and its refusals.

With a GPU and onnxruntime-gpu, the last tests run on it.
"""

from __future__ import annotations

from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("onnxruntime", reason="the extra `cpu` or `gpu` is not installed")

from specquant.custom_ops.errors import SpecQuantError
from specquant.runtime.artifact import open_artifact
from specquant.runtime.cuda_driver import Device
from specquant.runtime.generate import Model
from specquant.runtime.on_device import DECODE, Tensors
from specquant.runtime.onnx_cuda import BoundGraph, OnnxCuda, check_capability, check_memory, load_cuda
from specquant.runtime.onnx_graph import open_graph
from specquant.runtime.session import load
from tests.host_memory import HostMemory

CONTEXT = 80


def on_host(folder: Path, rank: int | None = None, fixed_mask: bool = True) -> Model:
    manifest = open_artifact(folder)
    session, bound_rank = open_graph(folder, manifest.model, 1, True, ["CPUExecutionProvider"], rank)
    backend = OnnxCuda(BoundGraph(session, manifest.model, bound_rank, "cpu"), HostMemory(), manifest.model, CONTEXT)
    backend.fixed_mask = fixed_mask  # as where steps are replayed
    return Model(folder, manifest, backend, CONTEXT)


@pytest.fixture(params=["folder", "int4_cache_folder"])
def artifact(request: pytest.FixtureRequest) -> Path:
    return Path(request.getfixturevalue(request.param))


def test_logits_are_those_of_the_cpu_backend(rng: np.random.Generator, artifact: Path) -> None:
    ids = rng.integers(3, 300, CONTEXT)
    expected = load(artifact, threads=1).logits(ids)
    np.testing.assert_allclose(on_host(artifact).logits(ids), expected, rtol=0, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize("fixed_mask", [False, True])
def test_generation_is_that_of_the_cpu_backend(rng: np.random.Generator, artifact: Path, fixed_mask: bool) -> None:
    """Rows of unequal length that end at different steps: dropped rows leave their places to the last ones."""
    prompts = [rng.integers(3, 300, count).tolist() for count in (2, 37, CONTEXT - 5)]
    expected = load(artifact, threads=1, context=CONTEXT).generate_batch(prompts, max_new_tokens=24)
    assert on_host(artifact, fixed_mask=fixed_mask).generate_batch(prompts, max_new_tokens=24) == expected


def test_steps_keep_their_addresses(rng: np.random.Generator, artifact: Path) -> None:
    """What a CUDA graph needs: the same tensors at the same places at every step. Values are those of the CPU."""
    model, cpu = on_host(artifact), load(artifact, threads=1)
    graph, seen = model._backend.graph, []  # type: ignore[attr-defined]
    run = graph.run

    def watched(kind: int, tensors: Tensors, keep: int) -> None:
        if kind == DECODE:
            seen.append((dict(tensors), keep))
        run(kind, tensors, keep)

    graph.run = watched
    ours, theirs = model.sequences(2), cpu.sequences(2)
    for row, count in enumerate((5, 30)):
        ids = rng.integers(3, 300, count)
        for sequences in (ours, theirs):
            sequences.prefill_last(row, ids)
    for step in range(8):
        if step == 5:  # the mask is made anew
            for sequences in (ours, theirs):
                sequences.rewind(1, 28)
        ids = rng.integers(3, 300, 2)
        expected = theirs.decode(ids)
        np.testing.assert_allclose(ours.decode(ids), expected, rtol=0, atol=1e-4 * np.abs(expected).max())
    assert all(call == seen[0] for call in seen)
    assert seen[0][0]["attention_mask"][1] == (2, CONTEXT)


def test_memory_is_given_back(artifact: Path) -> None:
    model = on_host(artifact)
    memory = model._backend.memory  # type: ignore[attr-defined]
    sequences = model.sequences(2)
    assert memory.arrays
    del sequences
    assert memory.arrays == {}


def test_a_rank_reaches_the_graph(rng: np.random.Generator, folder: Path) -> None:
    ids = rng.integers(3, 300, 20)
    expected = load(folder, threads=1, rank=1).logits(ids)
    np.testing.assert_allclose(on_host(folder, rank=1).logits(ids), expected, atol=1e-4 * np.abs(expected).max())
    assert np.abs(on_host(folder).logits(ids) - expected).max() > 1e-3


def test_rows_beyond_the_context(rng: np.random.Generator, folder: Path) -> None:
    with pytest.raises(ValueError, match=f"{CONTEXT + 1} tokens exceed the context of {CONTEXT}"):
        on_host(folder).sequences(1).prefill_last(0, rng.integers(3, 300, CONTEXT + 1))


# --- what is refused, before anything is loaded ---------------------------------------------------------------------


def test_without_onnxruntime_gpu(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", missing)
    with pytest.raises(SpecQuantError, match=r"needs onnxruntime-gpu: pip uninstall -y onnxruntime, then pip install"):
        load(folder, device="cuda")


def test_without_a_cuda_provider(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import onnxruntime as ort

    monkeypatch.setattr(metadata, "version", lambda name: "1.31.1")
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(SpecQuantError, match="has no CUDA provider"):
        load(folder, device="cuda")


@pytest.fixture
def gpu_package(monkeypatch: pytest.MonkeyPatch) -> None:
    """An environment that has onnxruntime-gpu, up to the GPU."""
    import onnxruntime as ort

    monkeypatch.setattr(metadata, "version", lambda name: "1.31.1")
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"])
    monkeypatch.setattr(ort, "preload_dlls", lambda: None, raising=False)


@pytest.mark.usefixtures("gpu_package")
def test_without_a_gpu(folder: Path) -> None:
    try:
        Device()
    except SpecQuantError:
        with pytest.raises(SpecQuantError, match=r"NVIDIA (driver|GPU)"):
            load(folder, device="cuda")
    else:
        pytest.skip("this machine has a GPU")


@pytest.mark.usefixtures("gpu_package")
def test_without_our_kernels(folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class SomeDevice:
        capability = (9, 0)

    monkeypatch.setattr("specquant.runtime.onnx_cuda.Device", SomeDevice)
    monkeypatch.setenv("SPECQUANT_CUDA_LIBRARY", str(tmp_path / "none.so"))
    from specquant.custom_ops import library_cuda

    monkeypatch.setattr(library_cuda, "loaded", library_cuda.loaded.__wrapped__)
    with pytest.raises(SpecQuantError, match="SPECQUANT_CUDA_LIBRARY names"):
        load(folder, device="cuda")


def test_an_old_gpu() -> None:
    check_capability((7, 5))
    with pytest.raises(SpecQuantError, match=r"compute capability 7\.0 and 7\.5 is needed: use --device cpu"):
        check_capability((7, 0))


def test_too_little_memory(folder: Path) -> None:
    manifest = open_artifact(folder)
    needed = sum(info.size for name, info in manifest.files.items() if name.startswith("model.onnx"))
    needed += 64 * manifest.model.cache_bytes_per_token
    check_memory(folder, manifest, 64, needed)
    with pytest.raises(SpecQuantError, match=r"GB of GPU memory \(.* of cache for 64 tokens\) and .* are free: use"):
        check_memory(folder, manifest, 64, needed - 1)


# --- on a GPU ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def on_gpu(artifact: Path) -> Any:
    try:
        metadata.version("onnxruntime-gpu")
        return load_cuda(artifact, open_artifact(artifact), CONTEXT, threads=1, custom_ops=True, rank=None)
    except (metadata.PackageNotFoundError, SpecQuantError) as missing:
        pytest.skip(f"no GPU that can be used: {missing}")


def test_a_gpu_says_what_the_cpu_says(rng: np.random.Generator, artifact: Path, on_gpu: OnnxCuda) -> None:
    ids = rng.integers(3, 300, CONTEXT)
    expected = load(artifact, threads=1).logits(ids)
    model = Model(artifact, open_artifact(artifact), on_gpu, CONTEXT)
    # A sum in another order moves a level of the activations now and then: a token in ten may differ by more than 2 %.
    apart = np.abs(model.logits(ids) - expected).max(-1) / np.abs(expected).max()
    assert np.quantile(apart, 0.9) < 0.02
    assert apart.max() < 0.05
    ours, theirs = model.sequences(2), load(artifact, threads=1).sequences(2)
    steps = []
    for _ in range(12):  # recorded after some, then replayed
        ids = rng.integers(3, 300, 2)
        expected = theirs.decode(ids)
        steps.append(np.abs(ours.decode(ids) - expected).max() / np.abs(expected).max())
    assert np.quantile(steps, 0.9) < 0.02
    assert max(steps) < 0.05


def test_a_gpu_chooses_as_the_host_does(rng: np.random.Generator, artifact: Path, on_gpu: OnnxCuda) -> None:
    """Rows that end at different steps; a text that ends early; calls that follow each other."""
    assert on_gpu.chooser
    model, chooser = Model(artifact, open_artifact(artifact), on_gpu, CONTEXT), on_gpu.chooser
    prompts = [rng.integers(3, 300, count).tolist() for count in (2, 37, CONTEXT - 5)]
    for options in ({}, {"temperature": 0.9, "seed": 3}, {"temperature": 1.2, "top_k": 20, "seed": 4}):
        for asked in (prompts, prompts[:1]):
            found = []
            for on_gpu.chooser in (chooser, None):
                found.append(model.generate_batch(asked, max_new_tokens=24, **options))
                assert model.stats is not None
                found.append(model.stats.new_tokens)
            assert found[:2] == found[2:]
    on_gpu.chooser = chooser
    text = "".join(model.generate(prompts[0], max_new_tokens=40))
    for start in (0, 3, len(text) // 2):
        stop = text[start : start + 3]
        assert "".join(model.generate(prompts[0], max_new_tokens=40, stop=stop)) == text[: text.index(stop)]
