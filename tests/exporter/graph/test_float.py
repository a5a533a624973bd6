"""The unquantised graph against transformers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
import torch
from numpy.typing import NDArray
from transformers import LlamaForCausalLM

from tests.exporter.graph.running import Running
from tests.tiny import float_decoder, tiny_llama, tiny_model

VOCAB = 128


def logits_of(model: LlamaForCausalLM, ids: NDArray[np.int64]) -> NDArray[np.float32]:
    """[tokens, vocab] of one prompt, computed at once."""
    with torch.no_grad():
        logits: NDArray[np.float32] = model(torch.from_numpy(ids)[None]).logits[0].numpy()
    return logits


def relative(actual: NDArray[np.float32], expected: NDArray[np.float32]) -> float:
    return float(np.abs(actual.astype(np.float32) - expected).max() / np.abs(expected).max())


@pytest.mark.parametrize(("tied", "bias"), [(True, False), (False, True)])
def test_prefill_then_steps_equal_transformers(
    rng: np.random.Generator, tmp_path: Path, tied: bool, bias: bool
) -> None:
    model, decoder = tiny_llama(int(rng.integers(2**31)), tied, bias)
    ids = rng.integers(3, VOCAB, 31)
    expected = logits_of(model, ids)
    running = Running(decoder, tmp_path)
    pieces = [ids[:17], *(ids[t : t + 1] for t in range(17, 25)), ids[25:]]
    logits = [running.step(piece[None], [len(piece)])[0] for piece in pieces]
    assert relative(np.concatenate(logits), expected) < 1e-4


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3"])
def test_unequal_prompts_in_a_batch_equal_each_alone(rng: np.random.Generator, tmp_path: Path, name: str) -> None:
    """The shorter prompt grows beyond the sliding window, the longer one starts beyond it."""
    model = tiny_model(name, int(rng.integers(2**31)))
    decoder = float_decoder(model)
    prompts = rng.integers(3, VOCAB, (2, 20))
    lengths, longest = [13, 6], 13
    running = Running(decoder, tmp_path)
    ids = rng.integers(3, VOCAB, (2, longest))  # the padding is noise, which must not be seen
    for row, length in enumerate(lengths):
        ids[row, :length] = prompts[row, :length]
    first = running.step(ids, lengths)
    steps = []
    for t in range(7):
        tokens = np.array([[prompts[row, length + t]] for row, length in enumerate(lengths)])
        steps.append(running.step(tokens, [1, 1])[:, 0])
    for row, length in enumerate(lengths):
        actual = np.concatenate([first[row, :length], np.stack(steps)[:, row]])
        assert relative(actual, logits_of(model, prompts[row, : length + 7])) < 1e-4


def test_float16_is_close(rng: np.random.Generator, tmp_path: Path) -> None:
    model, decoder = tiny_llama(int(rng.integers(2**31)))
    ids = rng.integers(3, VOCAB, 12)
    running = Running(decoder, tmp_path, "float16")
    logits = np.concatenate([running.step(ids[None, :9], [9])[0], running.step(ids[None, 9:], [3])[0]])
    assert logits.dtype == np.float16
    assert relative(logits, logits_of(model, ids)) < 2e-2


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3"])
def test_cache_can_be_one_buffer_for_past_and_present(rng: np.random.Generator, tmp_path: Path, name: str) -> None:
    """What the runtime relies on: a buffer longer than needed, whose unused rows are never read."""
    model = tiny_model(name, int(rng.integers(2**31)))
    decoder = float_decoder(model)
    shape = (1, decoder.config.num_kv_heads, 40, decoder.config.head_dim)
    running = Running(decoder, tmp_path)
    ids = rng.integers(3, VOCAB, 15)
    buffers = {cache: ort.OrtValue.ortvalue_from_numpy(np.full(shape, np.nan, np.float32)) for cache in running.names}
    logits = []
    for start, end in [(0, 9), (9, 10), (10, 11), (11, 15)]:
        binding = running.session.io_binding()
        binding.bind_cpu_input("input_ids", ids[None, start:end])
        binding.bind_cpu_input("attention_mask", np.ones((1, end), np.int64))
        binding.bind_cpu_input("position_ids", np.arange(start, end)[None])
        binding.bind_output("logits")
        for cache, buffer in buffers.items():
            binding.bind_ortvalue_input(f"past_key_values.{cache}", buffer)
            binding.bind_ortvalue_output(f"present.{cache}", buffer)
        running.session.run_with_iobinding(binding)
        logits.append(binding.get_outputs()[0].numpy()[0])
    assert relative(np.concatenate(logits), logits_of(model, ids)) < 1e-4
