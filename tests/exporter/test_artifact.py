"""The artifact folder: whole or not at all, whatever happens while it is written."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx
import pytest
from transformers import PreTrainedTokenizerFast

from specquant.custom_ops.errors import SpecQuantError
from specquant.exporter import artifact
from specquant.exporter.artifact import check_target, whole_folder
from specquant.exporter.export import export
from specquant.exporter.recipe import Recipe, float_recipe
from specquant.runtime.artifact import open_artifact
from tests.model_folder import small_tokenizer

FLOAT = float_recipe()


def put(target: Path, text: str, force: bool = False) -> None:
    with whole_folder(target, force) as work:
        (work / artifact.MANIFEST).write_text(text)


def content(target: Path) -> str:
    return (target / artifact.MANIFEST).read_text()


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "place" / "model [1]"  # brackets mean something to glob


def test_a_folder_appears_whole(target: Path) -> None:
    with whole_folder(target, False) as work:
        assert work.parent == target.parent
        (work / "file").write_text("x")
        assert not target.exists()
    assert [p.name for p in target.iterdir()] == ["file"]
    assert list(target.parent.iterdir()) == [target]


@pytest.mark.parametrize("exchange", [True, False], ids=["in one step", "in two"])
def test_force_replaces(monkeypatch: pytest.MonkeyPatch, target: Path, exchange: bool) -> None:
    if not exchange:  # file systems and platforms that cannot
        monkeypatch.setattr(artifact, "_exchange", lambda a, b: False)
    put(target, "old")
    with pytest.raises(SpecQuantError, match="exists; use --force"):
        put(target, "new")
    assert content(target) == "old"
    put(target, "new", force=True)
    assert content(target) == "new"
    assert list(target.parent.iterdir()) == [target]


def test_force_spares_what_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "1.jpg").write_text("x")
    (tmp_path / "file").write_text("x")
    for name in ("photos", "file"):
        with pytest.raises(SpecQuantError, match="is not an exported model"):
            check_target(tmp_path / name, force=True)
    with pytest.raises(SpecQuantError, match="cannot be written to"):
        check_target(tmp_path / "file" / "model", force=False)
    (tmp_path / "empty").mkdir()
    check_target(tmp_path / "empty", force=True)


@pytest.mark.parametrize("failure", [RuntimeError("x"), KeyboardInterrupt(), SystemExit(1), OSError(errno.EIO, "x")])
@pytest.mark.parametrize("old", [False, True])
def test_a_failure_leaves_nothing_new(target: Path, failure: BaseException, old: bool) -> None:
    if old:
        put(target, "old")

    def write() -> None:
        with whole_folder(target, force=True) as work:
            (work / artifact.MANIFEST).write_text("new")
            raise failure

    with pytest.raises(type(failure)):
        write()
    assert list(target.parent.iterdir()) == ([target] if old else [])
    assert not old or content(target) == "old"


@pytest.mark.parametrize("step", ["_exchange", "rename"])
def test_a_failure_in_the_last_step(monkeypatch: pytest.MonkeyPatch, target: Path, step: str) -> None:
    put(target, "old")
    rename = Path.rename

    def fail(self: Path, other: Path) -> Path:
        if self.name.endswith(str(os.getpid())):  # the new folder: the old one has been moved away
            raise KeyboardInterrupt
        return rename(self, other)

    def fail_at_once(a: Path, b: Path) -> bool:
        raise KeyboardInterrupt

    monkeypatch.setattr(artifact, "_exchange", fail_at_once if step == "_exchange" else lambda a, b: False)
    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(KeyboardInterrupt):
        put(target, "new", force=True)
    assert content(target) == "old"
    assert list(target.parent.iterdir()) == [target]


def ended_process() -> int:
    """The id of a process that is no more."""
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        process.wait()
    return process.pid


def test_what_a_killed_export_left_is_cleaned(target: Path) -> None:
    abandoned = target.parent / f".{target.name}.partial-{ended_process()}"
    running = target.parent / f".{target.name}.partial-{os.getppid()}"
    other = target.parent / f".another.partial-{ended_process()}"
    for path in (abandoned, running, other):
        path.mkdir(parents=True)
    put(target, "new")
    assert sorted(target.parent.iterdir()) == sorted([target, running, other])


def test_an_old_folder_that_was_moved_away_comes_back(target: Path) -> None:
    """Killed between the two renames, where folders cannot be exchanged in one step."""
    put(target, "old")
    target.rename(target.parent / f".{target.name}.partial-{ended_process()}.old")
    with pytest.raises(RuntimeError), whole_folder(target, False):
        raise RuntimeError
    assert content(target) == "old"


@contextlib.contextmanager
def no_file_over(size: int) -> Iterator[None]:
    """Writes beyond `size` bytes of any file fail in the kernel, whichever library makes them."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("step", ["build_model", "save_model", "_write_configs"])
def test_no_space(monkeypatch: pytest.MonkeyPatch, model_folder: Path, target: Path, step: str) -> None:
    """From one step of writing on: in the graph's data, in the tokenizer, in the manifest."""
    export(str(model_folder), target, FLOAT)
    old, limit, do = content(target), contextlib.ExitStack(), getattr(artifact, step)

    def then_no_space(*arguments: Any) -> Any:
        result = do(*arguments)
        limit.enter_context(no_file_over(500))
        return result

    monkeypatch.setattr(artifact, step, then_no_space)
    with limit, pytest.raises(SpecQuantError, match="no space for it; nothing is left") as caught:
        export(str(model_folder), target, FLOAT, force=True)
    assert "\n" not in str(caught.value)
    assert content(target) == old
    assert list(target.parent.iterdir()) == [target]


def test_a_disk_that_is_full_when_the_data_reach_it(
    monkeypatch: pytest.MonkeyPatch, model_folder: Path, target: Path
) -> None:
    def fsync(file: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(SpecQuantError, match="no space for it; nothing is left"):
        export(str(model_folder), target, FLOAT)
    assert list(target.parent.iterdir()) == []


def test_a_disk_that_is_too_small(monkeypatch: pytest.MonkeyPatch, model_folder: Path, target: Path) -> None:
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(artifact.shutil, "disk_usage", lambda path: usage._replace(free=1_000_000))
    with pytest.raises(SpecQuantError, match=r"needs 3\d MB and .* has 1 MB free"):
        export(str(model_folder), target, FLOAT)
    assert not target.exists()


def test_the_manifest_is_true(model_folder: Path, text_file: Path, target: Path) -> None:
    recipe = Recipe(k=5, group_size=8, act_group=8, samples=8, sequence_length=32)
    manifest = export(str(model_folder), target, recipe, calibration_text=str(text_file))
    assert json.loads(content(target)) == manifest
    assert open_artifact(target, verify=True).layers[0].rank == 5
    assert set(manifest["files"]) == {p.name for p in target.iterdir()} - {artifact.MANIFEST}
    assert manifest["source"]["id"] == model_folder.name
    assert manifest["calibration"]["text"] == text_file.name
    assert str(model_folder.parent) not in content(target)
    model = onnx.load(target / "model.onnx", load_external_data=False)
    stored = {t.name: t for t in model.graph.initializer}
    one = sum(
        len(t.raw_data) or int(next(e.value for e in t.external_data if e.key == "length"))
        for name, t in stored.items()
        if name.startswith("model.layers.0.mlp.down_proj")
    )
    row = next(r for r in manifest["layers"] if r["name"].startswith("model.layers.0.mlp.down_proj"))
    assert row["bits_per_weight"] == pytest.approx(8 * one / (88 * 64), abs=1e-3)
    bits = manifest["bits"]
    data = (target / "model.onnx.data").stat().st_size
    assert sum(bits["tensor_bytes"].values()) == pytest.approx(data, rel=0.2)  # small tensors lie in model.onnx
    assert json.loads({p.key: p.value for p in model.metadata_props}["specquant.recipe"]) == manifest["recipe"]


def test_settings_that_published_models_have(model_folder: Path, tmp_path: Path) -> None:
    """A temperature without do_sample, several end tokens, and more than one chat template."""
    source = tmp_path / "source"
    shutil.copytree(model_folder, source)
    generation = {"temperature": 0.6, "top_p": 0.9, "eos_token_id": [2, 0]}
    (source / "generation_config.json").write_text(json.dumps(generation))
    tokenizer: PreTrainedTokenizerFast = small_tokenizer()
    tokenizer.chat_template = {"default": "first", "tool_use": "second"}
    tokenizer.save_pretrained(source)
    manifest = export(str(source), tmp_path / "model", FLOAT)
    assert manifest["model"]["eos_token_ids"] == [0, 2]
    assert json.loads((tmp_path / "model" / "generation_config.json").read_text())["temperature"] == 0.6
    assert (tmp_path / "model" / "chat_template.jinja").read_text() == "first"
    open_artifact(tmp_path / "model", verify=True)
