"""The blocks that tools/bench_block_cpu.py times, each against a float block of the weights that it holds."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from specquant.custom_ops import library
from specquant.custom_ops.errors import SpecQuantError
from specquant.custom_ops.reference import block_hadamard
from specquant.exporter.decoder import QuantLinear
from tools.bench_block_cpu import bytes_read, runner
from tools.block_graphs import (
    EPSILON,
    ROPE_BASE,
    Numbers,
    Shape,
    nearest,
    our_linear,
    our_model,
    peer_model,
    random_weights,
)
from tools.ort_bench import open_session

Float = NDArray[np.float64]
SHAPE = Shape(hidden=128, inner=192, heads=4, kv_heads=2, head_dim=32)

try:
    library.library_path()
except SpecQuantError as missing:
    pytest.skip(str(missing), allow_module_level=True)


def rms(x: Float) -> Float:
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + EPSILON)


def rotated(x: Float, positions: NDArray[np.int64]) -> Float:
    """x [T, heads, d], its first half of features turned against the second."""
    d = x.shape[-1]
    angles = positions[:, None, None] * ROPE_BASE ** (-np.arange(0, d, 2) / d)
    first, second = np.split(x, 2, -1)
    return np.concatenate(
        [first * np.cos(angles) - second * np.sin(angles), second * np.cos(angles) + first * np.sin(angles)], -1
    )


def block(x: Float, weights: dict[str, Float], past: tuple[Float, Float]) -> Float:
    """x [T, hidden] after the block; past keys (turned) and values [past, kv_heads, d]."""
    cached, heads, kv, d = len(past[0]), SHAPE.heads, SHAPE.kv_heads, SHAPE.head_dim
    positions = np.arange(cached, cached + len(x))
    qkv = (rms(x) @ weights["qkv"]).reshape(len(x), heads + 2 * kv, d)
    q, k, v = rotated(qkv[:, :heads], positions), rotated(qkv[:, heads:-kv], positions), qkv[:, -kv:]
    k, v = (np.concatenate(pair).repeat(heads // kv, 1) for pair in zip(past, (k, v), strict=True))
    scores = np.einsum("qhd,khd->hqk", q, k) * d**-0.5
    scores[:, np.arange(len(k)) > positions[:, None]] = -np.inf
    shares = np.exp(scores - scores.max(-1, keepdims=True))
    shares /= shares.sum(-1, keepdims=True)
    x = x + np.einsum("hqk,khd->qhd", shares, v).reshape(len(x), -1) @ weights["o"]
    gate, up = np.split(rms(x) @ weights["gate_up"], 2, -1)
    return x + (gate / (1 + np.exp(-gate)) * up) @ weights["down"]


def dequantised(q: NDArray[np.int8], scales: NDArray[np.floating]) -> Float:
    return q * scales.astype(np.float64).repeat(len(q) // len(scales), 0)


def product_of(entry: QuantLinear) -> Float:
    """The matrix that a linear of ours multiplies by: H (B C + (1 − B Bᵀ) Ŵ)."""
    weight = dequantised(entry.q, entry.products)
    if entry.basis is not None and entry.coef is not None:
        basis = entry.basis.astype(np.float64)
        weight = weight + basis @ (entry.coef.astype(np.float64) - basis.T @ weight)
    return block_hadamard(weight.T, entry.hadamard).astype(np.float64).T  # H is symmetric


@pytest.mark.parametrize(("rank", "hadamard"), [(0, 0), (16, 64)])
@pytest.mark.parametrize(("new", "cached"), [(9, 0), (1, 20)])
def test_blocks_are_those_of_their_weights(
    rng: np.random.Generator, rank: int, hadamard: int, new: int, cached: int
) -> None:
    """Two blocks in a row, from the cache that the tool fills; 8-bit activations are what is left."""
    numbers, total = Numbers(64, 8, 64, rank, hadamard), new + cached
    weights = random_weights(SHAPE, rng)
    linears = {name: our_linear(name, weight, numbers, rng) for name, weight in weights.items()}
    parts = {name: [dequantised(*nearest(half, 64)) for half in np.split(w, 2, 1)] for name, w in weights.items()}
    graphs = {
        "ours": (our_model(SHAPE, linears, 2, total), {name: product_of(entry) for name, entry in linears.items()}),
        "peer": (peer_model(SHAPE, weights, numbers, 2, total), {n: np.concatenate(p, 1) for n, p in parts.items()}),
    }
    numbers_of_cache = np.random.default_rng(0)  # as runner draws them
    x = numbers_of_cache.standard_normal((new, SHAPE.hidden), dtype=np.float32)
    rows = (1, SHAPE.kv_heads, total, SHAPE.head_dim)
    caches = [numbers_of_cache.standard_normal(rows, np.float32)[0, :, :cached].transpose(1, 0, 2) for _ in range(4)]
    for name, (model, products) in graphs.items():
        session = open_session(model, 1, library.register if name == "ours" else None)
        y = runner(session, SHAPE, new, cached, 2)()[0]
        expected = x.astype(np.float64)
        for past in (caches[:2], caches[2:]):
            expected = block(expected, products, (past[0], past[1]))
        assert np.linalg.norm(y - expected) < 0.03 * np.linalg.norm(expected - x), name


def test_bytes_of_a_token() -> None:
    """A weight of half a byte with its scale, both sides' caches, and the branch."""
    whole = Numbers(group=64, act_bits=8, act_group=64, rank=8, hadamard=0)
    read = bytes_read(SHAPE, whole, 10)
    weights = 128 * 256 + 128 * 128 + 128 * 384 + 192 * 128
    assert read["onnxruntime"] == weights * (1 / 2 + 4 / 64) + 10 * 2 * 2 * 32 * 4
    plain = bytes_read(SHAPE, whole._replace(rank=0), 10)["ours"]
    assert plain == weights * (1 / 2 + 0.5 / 64) + 2 * (256 + 128 + 384 + 128) + 10 * 2 * 2 * 32 * 2
    assert read["ours"] - bytes_read(SHAPE, whole._replace(rank=0), 10)["ours"] == 2 * 8 * (384 + 256 + 512 + 320)


def test_figures_follow_from_times() -> None:
    command = [sys.executable, "-m", "tools.bench_block_cpu", "--shape", "128x192x4x2x32", "--calls", "9+0", "1+20"]
    command += ["--rank", "16", "--copies", "2", "--threads", "1", "--seconds", "0.05", "--no-limits", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout)["results"]
    assert [(result["new"], result["cached"]) for result in results] == [(9, 0), (1, 20)]
    for result in results:
        ours, peer = result["ours"], result["onnxruntime"]
        assert result["ratio_median"] == pytest.approx(peer["median_ms"] / ours["median_ms"])
        weights = 128 * 256 + 128 * 128 + 128 * 384 + 192 * 128
        assert ours["gops"] * ours["median_ms"] == pytest.approx(2e-6 * result["new"] * weights)
        assert 0 < ours["best_ms"] <= ours["quartiles_ms"][0] <= ours["median_ms"] <= ours["quartiles_ms"][1]
        assert result["runs"] >= 5


def test_a_call_that_is_none_is_explained() -> None:
    command = [sys.executable, "-m", "tools.bench_block_cpu", "--calls", "256"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == 2
    assert "write 2 numbers with + between them" in done.stderr
