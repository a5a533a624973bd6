"""The ablation tool on a tiny model: every run a real export, measured and resumed."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="the extra `export` is not installed")
pytest.importorskip("onnxruntime", reason="the extra `cpu` is not installed")
pytest.importorskip("matplotlib", reason="the extra `eval` is not installed")

from specquant.custom_ops.errors import SpecQuantError
from specquant.exporter.export import export
from specquant.exporter.recipe import preset
from specquant.runtime import load
from specquant.runtime.perplexity import perplexity
from tests.model_folder import random_llama, save_model_folder
from tools import ablation

TEXT = "The capital of France is Paris, and the river there is the Seine. She said it was the best of times. " * 40


def test_tables_differ_in_what_they_name() -> None:
    tables = ablation.tables([16, 32, 64], 64)
    column = "4-4-16 per channel"
    paper = tables["recipes"]["paper"][column]
    assert paper == preset("paper") == tables["table4"]["K = 16"][column] == tables["table5"]["act"][column]
    assert [tables["table4"][f"K = {k}"][column].k for k in (16, 32, 64)] == [16, 32, 64]
    assert {r[column].budget for r in tables["table5"].values()} == set(tables["table5"])
    grid = {name: (r[column].smooth, r[column].basis != "none") for name, r in tables["table3"].items()}
    assert grid == {
        "neither": (False, False),
        "smoothing": (True, False),
        "truncation": (False, True),
        "both": (True, True),
    }
    klt = tables["recipes"]["… and a descent, asymmetry 0.5: preset klt"]
    assert klt["4-4-16 groups of 64"] == replace(preset("klt"), a_bits=4)
    assert {name: r.a_bits for name, r in klt.items() if "groups" in name} == {
        "4-16-16 groups of 64": 16,
        "4-4-16 groups of 64": 4,
    }


def test_table4_from_start_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = save_model_folder(tmp_path / "tiny", random_llama(11))
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    work, results = tmp_path / "work", tmp_path / "docs" / "results.md"
    arguments = [str(source), "--text", str(text), "--calibration", str(text), "--only", "table4", "--ks", "9"]
    arguments += ["--samples", "6", "--sequence-length", "32", "--window", "48", "--windows", "3", "--latency"]
    arguments += ["--work", str(work), "--results", str(results), "--threads", "1"]
    assert ablation.run(arguments) == 0
    runs = {path.name: json.loads(path.read_text()) for path in work.glob("run-*.json")}
    assert len(runs) == 1 + 2 * 2  # full precision, then no branch and K = 9, each at 16-bit and 4-bit activations
    assert {path.name for path in work.iterdir() if path.suffix != ".json"} == set()  # no artifact is left
    # One of them again, by hand.
    recipe = replace(preset("paper"), k=9, samples=6, sequence_length=32)
    export(str(source), tmp_path / "again", recipe, calibration_text=str(text))
    model = load(tmp_path / "again")
    expected = perplexity(model.logit_blocks, model.encode(TEXT, add_special_tokens=False), 48, 3)
    found = next(r for r in runs.values() if r["recipe"] == recipe.to_dict())
    assert found["perplexity"] == pytest.approx(expected.perplexity, rel=1e-6)
    written = results.read_text()
    row = next(line for line in written.splitlines() if line.startswith("| K = 9 |"))
    cells = [cell.strip() for cell in row.split("|")[2:-1]]
    assert cells[1] == f"{expected.perplexity:.2f}"
    assert cells[2] == f"{model.manifest.bits.linear_bits_per_weight:.2f}"
    assert all(float(cell) > 0 for cell in cells[3:])
    assert str(tmp_path) not in written  # no path of the machine that ran it
    assert (results.parent / "perplexity_over_k.png").stat().st_size > 5000
    # Nothing is done twice.
    times = {path: path.stat().st_mtime_ns for path in work.glob("*.json")}
    assert ablation.run(arguments) == 0
    assert {path: path.stat().st_mtime_ns for path in work.glob("*.json")} == times
    capsys.readouterr()


def test_the_device_side_measures_the_same(tmp_path: Path) -> None:
    """The simulation that runs where there is a GPU, on this CPU, in two shares."""
    source = save_model_folder(tmp_path / "tiny", random_llama(12))
    (tmp_path / "text.txt").write_text(TEXT)
    found = {}
    for way, shares in (("_exported", ["0/1"]), ("_simulated", ["0/2", "1/2"])):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ablation.Ablation, "_exported", getattr(ablation.Ablation, way))
            for share in shares:
                arguments = [str(source), "--text", str(tmp_path / "text.txt"), "--share", share]
                arguments += ["--calibration", str(tmp_path / "text.txt"), "--only", "table4", "--ks", "9"]
                arguments += ["--samples", "6", "--sequence-length", "32", "--window", "48", "--windows", "3"]
                assert ablation.run([*arguments, "--work", str(tmp_path / way)]) == 0
        found[way] = {path.name: json.loads(path.read_text()) for path in (tmp_path / way).glob("run-*.json")}
    assert found["_exported"].keys() == found["_simulated"].keys()
    for name, run in found["_exported"].items():
        assert found["_simulated"][name]["perplexity"] == pytest.approx(run["perplexity"], rel=5e-3), name
        assert found["_simulated"][name]["bits"] == run["bits"]


def test_a_missing_text_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(SpecQuantError, match="cannot be read"):
        ablation.run([str(tmp_path), "--text", str(tmp_path / "nothing"), "--work", str(tmp_path / "work")])
