"""The quantised graph, with our ops as functions, against the same model simulated in NumPy and torch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from specquant.exporter.decoder import Decoder
from tests.exporter.graph.running import Running
from tests.tiny import quantised_decoder, simulate, tiny_llama


def compare(rng: np.random.Generator, folder: Path, used_rank: int | None, **recipe: int | bool) -> float:
    """Largest difference in logits, over the largest logit, of a prefill and three steps."""
    model, decoder = tiny_llama(int(rng.integers(2**31)), bias=True)
    decoder = quantised_decoder(decoder, rng, **recipe)
    ids = rng.integers(3, 128, 16)
    overrides = {} if used_rank is None else {"rank": np.array([used_rank])}
    running = Running(decoder, folder, **overrides)
    pieces = [ids[:13], ids[13:14], ids[14:15], ids[15:]]
    actual = np.concatenate([running.step(piece[None], [len(piece)])[0] for piece in pieces])
    expected = simulated(model, decoder, ids, 99 if used_rank is None else used_rank)
    return float(np.abs(actual - expected).max() / np.abs(expected).max())


def simulated(model: torch.nn.Module, decoder: Decoder, ids: NDArray[np.int64], rank: int) -> NDArray[np.float32]:
    simulate(model, decoder, rank)
    with torch.no_grad():
        logits: NDArray[np.float32] = model(torch.from_numpy(ids)[None]).logits[0].numpy()
    return logits


@pytest.mark.parametrize("group_size", [0, 8])
@pytest.mark.parametrize(("rank", "subtract"), [(0, False), (5, False), (5, True)])
def test_dequantised_weights(
    rng: np.random.Generator, tmp_path: Path, group_size: int, rank: int, subtract: bool
) -> None:
    error = compare(rng, tmp_path, None, act_bits=16, group_size=group_size, act_group=0, rank=rank, subtract=subtract)
    assert error < 3e-3  # a key near half a step of float16 goes either way


@pytest.mark.parametrize(("group_size", "act_group"), [(0, 0), (8, 8), (0, 8), (8, 0)])
def test_quantised_activations(rng: np.random.Generator, tmp_path: Path, group_size: int, act_group: int) -> None:
    """In one model of twenty, a value so near half a step that the order of summation moves it shows in the logits."""
    recipe = {"act_bits": 8, "group_size": group_size, "act_group": act_group, "rank": 5, "subtract": True}
    assert any(compare(rng, tmp_path, None, **recipe) < 1e-3 for _ in range(10))


@pytest.mark.parametrize("rank", [0, 2])
def test_rank_can_be_lowered_when_running(rng: np.random.Generator, tmp_path: Path, rank: int) -> None:
    error = compare(rng, tmp_path, rank, act_bits=16, group_size=8, act_group=0, rank=5, subtract=True)
    assert error < 3e-3  # a key near half a step of float16 goes either way
