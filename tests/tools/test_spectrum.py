"""What tools/spectrum.py measures, against direct computation."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch", reason="the extra `export` is not installed")
pytest.importorskip("matplotlib", reason="the extra `eval` is not installed")

import torch

from specquant.exporter.basis import dft_basis
from tests.model_folder import random_llama, save_model_folder
from tools import spectrum


@pytest.mark.parametrize("n", [96, 101])
def test_low_frequency_share(n: int, rng: np.random.Generator) -> None:
    weight = torch.from_numpy(rng.standard_normal((n, 7)))
    power = np.abs(np.fft.fft(weight.numpy(), axis=0)) ** 2
    bins = np.abs(np.fft.fftfreq(n) * n).round()
    kept = bins < max(1, round(0.2 * (n // 2 + 1)))
    np.testing.assert_allclose(spectrum.low_frequency_share(weight), power[kept].sum(0) / power.sum(0), rtol=1e-9)
    i = torch.arange(n, dtype=torch.float64)[:, None]
    waves = torch.cos(2 * math.pi * i * torch.tensor([0, 3, n // 2 - 1]) / n)
    np.testing.assert_allclose(spectrum.low_frequency_share(waves), [1, 1, 0], atol=1e-9)
    noise = torch.from_numpy(rng.standard_normal((1000, 200)))
    assert float(spectrum.low_frequency_share(noise).mean()) == pytest.approx(0.2, abs=0.01)


def test_energies(rng: np.random.Generator) -> None:
    n, m, k = 48, 75, 9
    weight = torch.from_numpy(rng.standard_normal((n, m)) * rng.uniform(0.2, 3, (n, 1))).float()
    x = torch.from_numpy(rng.standard_normal((400, n)) @ rng.standard_normal((n, n))).float()
    (row,) = spectrum.energies(weight, x.T @ x, [k])
    rank = (2 * k - 1) * m // (n + m)
    assert row["rank"] == rank
    values = torch.linalg.svdvals(weight)
    assert row["svd"]["weight"] == pytest.approx(float(values[:rank].square().sum() / values.square().sum()), rel=1e-4)
    vectors = torch.linalg.eigh((x.T @ x).double()).eigenvectors.float()
    bases = {"dft": dft_basis(n, k).float(), "klt": vectors[:, -rank:]}
    y = x @ weight
    for name, basis in bases.items():
        missed = y - x @ (basis @ (basis.T @ weight))
        assert row[name]["output"] == pytest.approx(float(1 - missed.square().sum() / y.square().sum()), abs=1e-4)
    whole = spectrum.energies(weight, x.T @ x, [n // 2])[0]["dft"]  # every frequency but the highest, (−1)^i
    highest = torch.tensor([1.0, -1.0]).repeat(n // 2) / n**0.5
    assert 1 - whole["weight"] == pytest.approx(
        float((highest @ weight).square().sum() / weight.square().sum()), abs=1e-5
    )


def test_inputs_are_those_of_the_linears(rng: np.random.Generator) -> None:
    model = random_llama(int(rng.integers(2**31)))
    tokens = torch.from_numpy(rng.integers(3, 320, (3, 17)))
    layers = list(spectrum.stages(model, tokens))
    assert [layer.name for layer in layers[:4]] == ["0.qkv_proj", "0.o_proj", "0.gate_up_proj", "0.down_proj"]
    with torch.inference_mode():
        x = model.model.layers[0].input_layernorm(model.model.embed_tokens(tokens)).reshape(-1, 64)
    torch.testing.assert_close(layers[0].inputs.moment, x.T @ x, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(layers[0].inputs.largest, x.abs().amax(0))
    attention = model.model.layers[0].self_attn
    torch.testing.assert_close(layers[0].weight[:, :64], attention.q_proj.weight.T)
    heads = layers[1].factors.view(2, 2, 16)  # kv head, query head of its group, channel
    assert torch.equal(heads[:, 0], heads[:, 1])


def test_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = save_model_folder(tmp_path / "tiny", random_llama(3))
    text = tmp_path / "text.txt"
    text.write_text("The capital of France is Paris, and the river there is the Seine. " * 40)
    results = tmp_path / "docs" / "results.md"
    arguments = [str(source), "--text", str(text), "--samples", "3", "--sequence-length", "24", "--ks", "2", "5"]
    assert spectrum.run([*arguments, "--work", str(tmp_path / "work"), "--results", str(results)]) == 0
    rows = json.loads((tmp_path / "work" / "spectrum.json").read_text())
    assert len(rows) == 8
    written = results.read_text()
    assert f"{spectrum.mean([r for r in rows if r['kind'] == 'down_proj'], 'low20'):.3f}" in written
    assert str(tmp_path) not in written  # no path of the machine that ran it
    assert all((tmp_path / "docs" / name).stat().st_size > 5000 for name in ("energy.png", "outliers.png"))
    assert "(25) holds" in capsys.readouterr().out
