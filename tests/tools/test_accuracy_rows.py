"""The accuracy table on a tiny model: a real export, measured, and not made twice."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="the extra `export` is not installed")
pytest.importorskip("onnxruntime", reason="the extra `cpu` is not installed")

from specquant.runtime import load
from specquant.runtime.perplexity import perplexity
from tests.model_folder import random_llama, save_model_folder
from tools import accuracy_rows

TEXT = "The capital of France is Paris, and the river there is the Seine. She said it was the best of times. " * 60


def test_rows_from_start_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = save_model_folder(tmp_path / "tiny", random_llama(11))
    text, out = tmp_path / "text.txt", tmp_path / "out"
    text.write_text(TEXT)
    arguments = [str(source), "--calibration", str(text), "--text", str(text), "--out", str(out), "--device", "cpu"]
    arguments += ["--rows", "4-4-4", "--steps", "2", "--threads", "1", "--windows", "1", "--keep", "--"]
    arguments += ["--samples", "4", "--sequence-length", "32", "--refine-samples", "4", "--refine-batch", "2"]
    arguments += ["--k", "4", "--group-size", "8", "--act-group", "8"]
    assert accuracy_rows.run(arguments) == 0
    row = json.loads((out / "4-4-4.json").read_text())
    model = load(out / "4-4-4")
    assert model.manifest.model.kv_bits == 4
    assert model.manifest.recipe["refine_steps"] == 2
    ids = model.encode(TEXT, add_special_tokens=False)
    expected = perplexity(model.logit_blocks, ids, row["window"], row["windows"])
    assert row["perplexity"] == pytest.approx(expected.perplexity, rel=1e-5)
    capsys.readouterr()
    assert accuracy_rows.run(arguments) == 0  # nothing is left to do
    assert capsys.readouterr().out == ""


def test_a_row_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    with pytest.raises(SystemExit) as stop:
        accuracy_rows.run(["x", "--calibration", str(text), "--text", str(text), "--out", "y", "--rows", "4-2-1"])
    assert stop.value.code == 2
    assert "no row is called '4-2-1'" in capsys.readouterr().err
