"""A quantised model with a float16 KV cache, which is what `kv_bits` 16 means where a linear is quantised."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from specquant.runtime import load
from specquant.runtime.generate import Model
from specquant.runtime.onnx_cpu import OnnxSequences
from tests.logits import error_in_pieces, typical


@pytest.fixture(scope="module")
def model(folder: Path) -> Model:
    return load(folder, threads=1)


def test_op_and_function_compute_the_same(model: Model, folder: Path, rng: np.random.Generator) -> None:
    plain = load(folder, threads=1, custom_ops=False)
    prompts = [rng.integers(3, 320, 40) for _ in range(10)]
    assert any(typical(model.logits(ids), plain.logits(ids)) < 1e-4 for ids in prompts)


def test_steps_and_blocks_equal_one_pass(model: Model, rng: np.random.Generator) -> None:
    assert min(error_in_pieces(model, rng) for _ in range(5)) < 1e-4


def test_batches_equal_prompts_alone(model: Model) -> None:
    prompts = ["The capital of", "Der Fluß fließt. 日本", "x"]
    assert model.generate_batch(prompts, max_new_tokens=20) == [
        "".join(model.generate(prompt, max_new_tokens=20)) for prompt in prompts
    ]


def test_memory_of_the_cache(model: Model) -> None:
    info = model.manifest.model
    assert info.attention == "HalfKVAttention"
    assert info.cache_bytes_per_token == 2 * 2 * 2 * 16 * 2  # layers, key and value, heads, head_dim, bytes
    sequences = model.sequences(3)
    assert isinstance(sequences, OnnxSequences)
    for row in range(3):
        list(sequences.prefill(row, np.array([5, 6, 7])))
    cache = sequences._cache
    assert cache.nbytes == 3 * cache.capacity * info.cache_bytes_per_token
    assert cache.buffers[0].dtype == np.float16


def test_an_artifact_from_before_this_op(
    float_folder: Path,
    tmp_path: Path,
    edit_manifest: Callable[[Path, Callable[[dict[str, Any]], object]], None],
    rng: np.random.Generator,
) -> None:
    """Its manifest does not name the graph's attention: the cache is of float_type."""
    old = tmp_path / "old"
    shutil.copytree(float_folder, old)
    edit_manifest(old, lambda manifest: manifest["model"].pop("attention"))
    ids = rng.integers(3, 320, 20)
    np.testing.assert_array_equal(load(old, threads=1).logits(ids), load(float_folder, threads=1).logits(ids))
