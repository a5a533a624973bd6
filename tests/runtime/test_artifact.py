"""The manifest and the folder: what is accepted, and one clear line for everything else."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from specquant.custom_ops.errors import SpecQuantError
from specquant.runtime.artifact import FORMAT, open_artifact, record_evaluation

Edit = Callable[[Path, Callable[[dict[str, Any]], object]], None]


def test_a_whole_folder(plain_folder: Path) -> None:
    hashed: list[int] = []
    manifest = open_artifact(plain_folder, verify=True, progress=hashed.append)
    assert manifest.model.eos_token_ids == [2]
    assert manifest.bits.linear_bits_per_weight == 5.0
    assert sum(hashed) == sum(info.size for info in manifest.files.values())


def test_not_an_artifact(tmp_path: Path) -> None:
    with pytest.raises(SpecQuantError, match="is not a folder"):
        open_artifact(tmp_path / "nowhere")
    with pytest.raises(SpecQuantError, match=r"no specquant\.json.*specquant export"):
        open_artifact(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", "[" * 100_000, '"x"', "\udcff"])
def test_not_json(plain_folder: Path, text: str) -> None:
    (plain_folder / "specquant.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(SpecQuantError, match=r"specquant\.json (cannot be read|is not a JSON object)"):
        open_artifact(plain_folder)


def test_newer_format(plain_folder: Path, edit_manifest: Edit) -> None:
    edit_manifest(plain_folder, lambda content: content.update(format=FORMAT + 1, model="something else"))
    with pytest.raises(SpecQuantError, match=rf"format {FORMAT + 1} .*--upgrade"):
        open_artifact(plain_folder)


def test_older_format(plain_folder: Path, edit_manifest: Edit) -> None:
    edit_manifest(plain_folder, lambda content: content.update(format=1))
    with pytest.raises(SpecQuantError, match=r"\A[^\n]*format 1, which [^\n]*: re-export the model\Z"):
        open_artifact(plain_folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.pop("model"), "model is missing"),
        (lambda c: c["model"].pop("vocab_size"), r"model\.vocab_size is missing"),
        (lambda c: c["model"].update(num_layers="2"), r"model\.num_layers should be int"),
        (lambda c: c["model"].update(num_layers=True), r"model\.num_layers should be int"),
        (lambda c: c["model"].update(head_dim=0), "head_dim = 0"),
        (lambda c: c["model"].update(float_type="int8"), "float_type = 'int8'"),
        (lambda c: c["model"].update(attention="Attention"), "attention = 'Attention'"),
        (lambda c: c["model"].update(attention="HalfKVAttention", kv_bits=4), "with kv_bits = 4"),
        (lambda c: c["model"].update(eos_token_ids=[2, "x"]), r"eos_token_ids\[1\] should be int"),
        (lambda c: c.update(files=[]), "files should be"),
        (lambda c: c["files"].pop("model.onnx"), r"lists no model\.onnx"),
        (lambda c: c.update(layers=[{"name": "q"}]), r"layers\[0\]\.linears is missing"),
        (lambda c: c.update(format="one"), "format should be int"),
    ],
)
def test_a_manifest_that_is_wrong(
    plain_folder: Path, edit_manifest: Edit, change: Callable[[dict[str, Any]], object], message: str
) -> None:
    edit_manifest(plain_folder, change)
    with pytest.raises(SpecQuantError, match=message) as caught:
        open_artifact(plain_folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "a/b", "a\\b", "C:x", "..", "", "specquant.json"])
def test_files_elsewhere_are_refused(plain_folder: Path, edit_manifest: Edit, name: str) -> None:
    (plain_folder.parent / "secret").write_text("x")
    edit_manifest(plain_folder, lambda content: content["files"].update({name: {"size": 1, "sha256": "0" * 64}}))
    with pytest.raises(SpecQuantError, match="outside its own folder"):
        open_artifact(plain_folder)


def test_files_that_changed(plain_folder: Path) -> None:
    data = plain_folder / "model.onnx.data"
    content = data.read_bytes()
    data.write_bytes(content[:-1])
    with pytest.raises(SpecQuantError, match=r"model\.onnx\.data is truncated \(199 bytes, 200 expected\)"):
        open_artifact(plain_folder)
    data.write_bytes(content + b"x")
    with pytest.raises(SpecQuantError, match="not the file that was exported"):
        open_artifact(plain_folder)
    data.write_bytes(content[:-1] + b"x")
    open_artifact(plain_folder)  # the size is right: only the hash can tell
    with pytest.raises(SpecQuantError, match="changed after the export"):
        open_artifact(plain_folder, verify=True)
    data.unlink()
    with pytest.raises(SpecQuantError, match="is missing"):
        open_artifact(plain_folder)


def test_recording_an_evaluation(plain_folder: Path) -> None:
    before = json.loads((plain_folder / "specquant.json").read_text())
    record_evaluation(plain_folder, "wiki", {"perplexity": 21.5, "tokens": 10})
    record_evaluation(plain_folder, "c4", {"perplexity": 30.5})
    record_evaluation(plain_folder, "wiki", {"perplexity": 20.5})
    manifest = open_artifact(plain_folder, verify=True)
    assert manifest.evaluation == {"wiki": {"perplexity": 20.5}, "c4": {"perplexity": 30.5}}
    after = json.loads((plain_folder / "specquant.json").read_text())
    assert after | {"evaluation": {}} == before
    assert sorted(path.name for path in plain_folder.iterdir()) == sorted([*before["files"], "specquant.json"])


def test_a_failed_recording_leaves_the_manifest(plain_folder: Path) -> None:
    before = (plain_folder / "specquant.json").read_bytes()
    with pytest.raises(TypeError):
        record_evaluation(plain_folder, "wiki", {"perplexity": object()})
    assert (plain_folder / "specquant.json").read_bytes() == before
    assert len(list(plain_folder.iterdir())) == 4
