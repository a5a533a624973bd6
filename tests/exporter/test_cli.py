"""`specquant export` as a user runs it."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

pytest.importorskip("onnxruntime", reason="the extra `cpu` is not installed")

from specquant.exporter.recipe import Recipe, float_recipe, preset
from specquant.runtime.cli import main
from specquant.runtime.session import load
from tests.model_folder import QUICK, VOCAB


@pytest.fixture(autouse=True)
def _process_state(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The command owns its process: what it sets there is put back."""
    monkeypatch.setenv("TQDM_DISABLE", "1")
    handler = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, handler)


def run(capfd: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    code = main(["export", *map(str, arguments)])
    out, err = capfd.readouterr()
    return code, out, err


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ([], preset("klt")),
        (["--preset", "paper"], preset("paper")),
        (["--preset", "fast"], replace(preset("klt"), name="fast", basis="none", subtract=False)),
        (["--a-bits", "8", "--k", "16", "--no-smooth"], replace(preset("klt"), a_bits=8, k=16, smooth=False)),
        (["--preset", "paper", "--budget", "l2"], replace(preset("paper"), budget="l2")),
        (["--basis", "none"], replace(preset("klt"), basis="none", subtract=False)),
        (["--w-bits", "16", "--a-bits", "16", "--float-type", "float16"], float_recipe("float16")),
        (["--damping", "0.5", "--seed", "3"], replace(preset("klt"), damping=0.5, seed=3)),
        (["--descents", "2", "--asymmetry", "0.7"], replace(preset("klt"), descents=2, asymmetry=0.7)),
    ],
)
def test_the_recipe_that_is_printed_is_the_recipe(
    capfd: pytest.CaptureFixture[str], tmp_path: Path, options: list[str], expected: Recipe
) -> None:
    code, out, err = run(capfd, "anything", "-o", tmp_path / "model", "--print-recipe", *options)
    assert (code, err) == (0, "")
    path = tmp_path / "recipe.yaml"
    path.write_text(out)
    assert Recipe.from_yaml(path) == expected
    code, again, _ = run(capfd, "anything", "-o", tmp_path / "model", "--print-recipe", "--recipe", path)
    assert (code, again) == (0, out)
    assert list(tmp_path.iterdir()) == [path]


def test_a_quantised_export(
    capfd: pytest.CaptureFixture[str], model_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    arguments = [model_folder, "-o", tmp_path / "model", "--calibration", text_file, *QUICK]
    code, out, err = run(capfd, *arguments)
    assert code == 0
    assert out.startswith(f"{tmp_path / 'model'}: {model_folder.name}, 0 MB, ")
    assert out.count("\n") == 1
    for step in ("loading the model", "reading the calibration text", "quantising", "writing the artifact"):
        assert f"{step} …\n" in err
    assert f"try: specquant generate {tmp_path / 'model'}" in err
    code, out, err = run(capfd, *arguments, "--force", "-q")
    assert (code, err) == (0, "")


def test_json_is_the_manifest(capfd: pytest.CaptureFixture[str], model_folder: Path, tmp_path: Path) -> None:
    options = ["--w-bits", 16, "--a-bits", 16, "--context-length", 40]
    code, out, err = run(capfd, model_folder, "-o", tmp_path / "model", *options, "--json", "-q")
    assert (code, err) == (0, "")
    assert json.loads(out) == json.loads((tmp_path / "model" / "specquant.json").read_text())
    assert json.loads(out)["model"]["context_length"] == 40


def test_a_float_export_equals_transformers(
    rng: np.random.Generator,
    capfd: pytest.CaptureFixture[str],
    model_folder: Path,
    llama: LlamaForCausalLM,
    tmp_path: Path,
) -> None:
    code, _, _ = run(capfd, model_folder, "-o", tmp_path / "model", "--w-bits", 16, "--a-bits", 16)
    assert code == 0
    ids = rng.integers(3, VOCAB, 50)
    with torch.no_grad():
        expected = llama(torch.from_numpy(ids)[None]).logits[0].numpy()
    actual = load(tmp_path / "model").logits(ids)
    assert np.abs(actual - expected).max() < 1e-3 * np.abs(expected).max()
