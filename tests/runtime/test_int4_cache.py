"""A model with a 4-bit KV cache: the artifact computes what the simulation does, and its cache is as small as said."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from specquant.runtime import load
from specquant.runtime.generate import Model
from specquant.runtime.onnx_cpu import OnnxSequences
from tests.logits import error_in_pieces, typical

torch = pytest.importorskip("torch", reason="the extra `export` is not installed")


@pytest.fixture(scope="module")
def model(int4_cache_folder: Path) -> Model:
    return load(int4_cache_folder, threads=1)


@pytest.fixture(scope="module")
def simulated(llama: Any, int4_cache_decoder: Any) -> Any:
    from specquant.exporter.families import LLAMA
    from specquant.exporter.simulate import simulate

    return simulate(copy.deepcopy(llama), LLAMA, int4_cache_decoder)


def test_key_offsets_were_measured(int4_cache_decoder: Any) -> None:
    for layer in int4_cache_decoder.layers:
        assert layer.key_offset.shape == (2, 16)
        assert layer.key_offset.dtype == np.float32
        assert np.abs(layer.key_offset).min() > 0


@pytest.mark.parametrize("custom_ops", [True, False])
def test_artifact_equals_simulation(
    simulated: Any, llama: Any, int4_cache_folder: Path, rng: np.random.Generator, custom_ops: bool
) -> None:
    model = load(int4_cache_folder, threads=1, custom_ops=custom_ops)
    errors = []
    for _ in range(6):
        ids = rng.integers(3, 320, 40)
        with torch.no_grad():
            expected, exact = (m(torch.from_numpy(ids)[None]).logits[0].numpy() for m in (simulated, llama))
        errors.append(typical(model.logits(ids), expected))
        assert np.abs(exact - expected).max() > 1e-2 * np.abs(expected).max()  # 4 bits are not nothing
    assert min(errors) < 1e-4


def test_steps_and_blocks_equal_one_pass(model: Model, rng: np.random.Generator) -> None:
    assert min(error_in_pieces(model, rng) for _ in range(5)) < 1e-4


def test_batches_equal_prompts_alone(model: Model) -> None:
    prompts = ["The capital of", "Der Fluß fließt. 日本", "x"]
    assert model.generate_batch(prompts, max_new_tokens=20) == [
        "".join(model.generate(prompt, max_new_tokens=20)) for prompt in prompts
    ]


def test_memory_of_the_cache(model: Model, float_folder: Path) -> None:
    info = model.manifest.model
    assert info.cache_bytes_per_token == 2 * 2 * 2 * (16 // 2 + 4)  # layers, key and value, heads
    assert load(float_folder, threads=1).manifest.model.cache_bytes_per_token == 2 * 2 * 2 * 16 * 4
    sequences = model.sequences(3)
    assert isinstance(sequences, OnnxSequences)
    for row in range(3):
        list(sequences.prefill(row, np.array([5, 6, 7])))
    cache = sequences._cache
    assert cache.nbytes == 3 * cache.capacity * info.cache_bytes_per_token


def test_inspect_says_so(int4_cache_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from specquant.runtime.cli import main

    assert main(["inspect", str(int4_cache_folder)]) == 0
    assert "4 bits, 96 bytes a token" in capsys.readouterr().out
