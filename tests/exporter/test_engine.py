"""Engines that TensorRT-RTX builds, on a machine without a GPU: what they hold, and what is refused."""

from __future__ import annotations

import json
import os
import signal
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("tensorrt_rtx", reason="the extra `tensorrt-rtx` is not installed")

from specquant.custom_ops import library_tensorrt
from specquant.custom_ops.errors import SpecQuantError
from specquant.exporter.engine import EngineOptions, build, estimate
from specquant.exporter.engine_builder import Limits, build_engine, load_api
from specquant.exporter.export import export
from specquant.exporter.graph import save_model
from specquant.exporter.lowering import lower
from specquant.exporter.recipe import Recipe
from specquant.runtime.artifact import open_artifact, sha256_of
from specquant.runtime.cli import main
from specquant.runtime.engine import ENGINE, ENGINE_MANIFEST, open_engine
from tests.model_folder import CONTEXT

RECIPE = Recipe(a_bits=16, k=5, group_size=8, act_group=8, samples=8, sequence_length=32, float_type="float16")
OPTIONS = EngineOptions(gpu="sm89", max_batch=3, block=32)


@pytest.fixture(scope="module")
def artifact(model_folder: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("artifact") / "tiny"
    export(str(model_folder), folder, RECIPE, calibration_text=str(text_file))
    return folder


@pytest.fixture(scope="module")
def engine(artifact: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("engine") / "sm89"
    build(artifact, OPTIONS, folder)
    return folder


@pytest.mark.parametrize("gpu", ["sm86", "sm120"])
def test_an_engine_for_a_gpu_that_is_not_here(artifact: Path, tmp_path: Path, gpu: str) -> None:
    told: list[tuple[str, int, int]] = []
    notes: list[str] = []
    folder = tmp_path / "engine"
    built = build(artifact, replace(OPTIONS, gpu=gpu), folder, False, lambda *step: told.append(step), notes.append)
    assert sorted(p.name for p in folder.iterdir()) == [ENGINE_MANIFEST, ENGINE]
    info = open_engine(artifact, folder)
    assert info == built
    assert (info.gpu, info.max_batch, info.max_seq, info.block) == (gpu, 3, CONTEXT, 32)
    assert info.model == {n: f.sha256 for n, f in open_artifact(artifact).files.items() if n.startswith("model.onnx")}
    assert ("building", 10, 10) in told
    assert notes[0].startswith("estimate: about ")


def test_weights_stay_four_bits(artifact: Path, engine: Path) -> None:
    """What the builder counts as weights is what the lowered graph stores, where a weight takes half a byte."""
    info, manifest = open_engine(artifact, engine), open_artifact(artifact)
    stored = estimate(lower(artifact, "portable", CONTEXT), manifest, Limits(3, CONTEXT, 32), "portable").weights
    weights = sum(layer.in_features * layer.out_features for layer in manifest.layers)
    aligned = 256 * 100  # each of the hundred tensors may be padded
    assert abs(info.weights_bytes - stored) < aligned
    assert info.weights_bytes < stored + weights / 2  # as int8 they would take that much more


def test_prefill_and_decode_are_profiles_of_their_own(engine: Path, artifact: Path) -> None:
    prefill, decode = open_engine(artifact, engine).activation_bytes
    assert prefill > decode > 0


def test_the_layers_are_those_of_the_model(artifact: Path, tmp_path: Path) -> None:
    save_model(lower(artifact, "portable", CONTEXT), tmp_path)
    api = load_api("tensorrt-rtx")
    path, limits = tmp_path / "model.onnx", Limits(1, CONTEXT, 16)
    built = build_engine(api, path, tmp_path / "engine", "tensorrt-rtx", "sm89", limits, lambda *_: None)
    assert built.plugins == []
    assert len(built.layers) > 20


def test_without_a_stream_the_engine_is_the_same(artifact: Path, tmp_path: Path) -> None:
    """Older TensorRTs hand the engine over as a whole."""
    save_model(lower(artifact, "portable", CONTEXT), tmp_path)
    api = load_api("tensorrt-rtx")

    class Older:
        def __init__(self, log: Any) -> None:
            self._builder = api.Builder(log)

        def __getattr__(self, name: str) -> Any:
            if name.endswith("_to_stream"):
                raise AttributeError(name)
            return getattr(self._builder, name)

    class OlderApi:
        Builder = Older

        def __getattr__(self, name: str) -> Any:
            return getattr(api, name)

    path, limits = tmp_path / "model.onnx", Limits(1, CONTEXT, 16)
    for name, module in (("new", api), ("old", OlderApi())):
        build_engine(module, path, tmp_path / name, "tensorrt-rtx", "sm89", limits, lambda *_: None)
    assert (tmp_path / "new").stat().st_size == (tmp_path / "old").stat().st_size > 0


def test_timings_are_kept(artifact: Path, tmp_path: Path) -> None:
    """TensorRT's own are; RTX has the interface, and nothing in it. What is there but does not fit is replaced."""
    save_model(lower(artifact, "portable", CONTEXT), tmp_path)
    path, limits, kept = tmp_path / "model.onnx", Limits(1, CONTEXT, 16), tmp_path / "engine" / "timings-sm89.cache"
    sizes = []
    for before in (None, b"no timings"):
        if before:
            kept.write_bytes(before)
        arguments = (path, tmp_path / "plan", "tensorrt-rtx", "sm89", limits, lambda *_: None)
        build_engine(load_api("tensorrt-rtx"), *arguments, timings=kept)
        assert list(kept.parent.iterdir()) == [kept]
        sizes.append(kept.stat().st_size)
    assert sizes[0] == sizes[1] > len(b"no timings")


def test_a_full_disk_is_said(artifact: Path, tmp_path: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("there is no /dev/full")
    save_model(lower(artifact, "portable", CONTEXT), tmp_path)
    path, limits = tmp_path / "model.onnx", Limits(1, CONTEXT, 16)
    with pytest.raises(OSError, match="No space left"):
        build_engine(load_api("tensorrt-rtx"), path, Path("/dev/full"), "tensorrt-rtx", "sm89", limits, lambda *_: None)


def test_the_command(artifact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "e"
    command = ["build", str(artifact), "--gpu", "sm89", "--max-seq", "24", "-o", str(folder), "-q", "--json"]
    assert main(command) == 0
    assert json.loads(capsys.readouterr().out)["max_seq"] == 24
    assert main(command) == 2
    assert "exists; use --force" in capsys.readouterr().err
    assert main([*command, "--force"]) == 0
    assert main(["build", str(artifact), "--gpu", "sm89", "-o", str(artifact), "-q", "--force"]) == 2
    assert "is not an engine" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gpu": None}, "needs --gpu: give one of sm75"),
        ({"gpu": "sm90"}, "does not build for 'sm90'"),
        ({"gpu": "sm75", "profile": "custom"}, "need compute capability 8.0"),
        ({"max_seq": CONTEXT + 1}, f"at most {CONTEXT}"),
        ({"rank": 6}, "0 to 5"),
        ({"max_batch": 0}, "max_batch = 0 is out of range"),
        ({"target": "openvino"}, "tensorrt-rtx, tensorrt"),
        ({"target": "tensorrt"}, "tensorrt cannot be imported|--gpu is for --target tensorrt-rtx"),
        ({"profile": "fast"}, "portable, custom"),
        ({"embed_plugins": True}, "--profile custom"),
        ({"copy_plugins": True}, "--profile custom"),
        ({"embed_plugins": True, "python_plugins": True, "profile": "custom"}, "give one of --embed-plugins, --copy"),
    ],
)
def test_options_that_do_not_fit(artifact: Path, tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecQuantError, match=message):
        build(artifact, replace(OPTIONS, **options), tmp_path / "engine")
    assert list(tmp_path.iterdir()) == []


def test_a_graph_that_it_does_not_parse(artifact: Path, tmp_path: Path) -> None:
    """The artifact's own: without plugins our ops are their functions, some of whose operators TensorRT lacks."""
    api = load_api("tensorrt-rtx")
    path, limits = artifact / "model.onnx", Limits(1, 8, 8)
    with pytest.raises(SpecQuantError, match=r"tensorrt-rtx does not take this graph: Bit[A-Za-z]+: "):
        build_engine(api, path, tmp_path / "engine", "tensorrt-rtx", "sm89", limits, lambda *_: None)


def test_an_interrupt_leaves_nothing(artifact: Path, tmp_path: Path) -> None:
    if threading.current_thread() is not threading.main_thread():
        pytest.skip("signals reach the main thread only")
    before = signal.getsignal(signal.SIGINT)

    def interrupt(what: str, done: int, total: int) -> None:
        if what == "building":
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        build(artifact, OPTIONS, tmp_path / "engine", report=interrupt)
    assert list(tmp_path.iterdir()) == []
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (ENGINE_MANIFEST, b"{", "is not an engine's manifest"),
        (ENGINE_MANIFEST, b'{"format": 4}', "upgrade specquant"),
        (ENGINE_MANIFEST, b'{"format": 2}', "build the engine again"),
        (ENGINE, b"short", "missing or truncated: run `specquant build .*--gpu sm89"),
        (ENGINE, None, "was changed after it was built"),
    ],
)
def test_a_damaged_engine(
    engine: Path, artifact: Path, tmp_path: Path, name: str, content: bytes | None, message: str
) -> None:
    for path in engine.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    if content is None:
        whole = bytearray((engine / name).read_bytes())
        whole[len(whole) // 2] ^= 1
        content = bytes(whole)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(SpecQuantError, match=message):
        open_engine(artifact, tmp_path)


def test_plugins_beside_an_engine(artifact: Path, tmp_path: Path) -> None:
    """Copied on demand, and known by their hash: whoever exchanges them is found out before they are loaded."""
    try:
        library = library_tensorrt.library_path()
    except SpecQuantError as missing:
        pytest.skip(str(missing))
    info = build(artifact, replace(OPTIONS, profile="custom", copy_plugins=True), tmp_path / "engine")
    copied = tmp_path / "engine" / library_tensorrt.FILE
    assert (info.host_code, info.plugin_library) == (True, sha256_of(copied))
    assert copied.read_bytes() == library.read_bytes()
    assert copied.read_bytes() not in (tmp_path / "engine" / ENGINE).read_bytes()
    with copied.open("ab") as file:
        file.write(b"x")
    with pytest.raises(SpecQuantError, match="was changed after the engine was built: run `specquant build"):
        open_engine(artifact, tmp_path / "engine", verify=False)


def test_a_library_that_an_engine_lacks(artifact: Path, engine: Path, tmp_path: Path) -> None:
    for path in engine.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    told = json.loads((engine / ENGINE_MANIFEST).read_text())
    (tmp_path / ENGINE_MANIFEST).write_text(json.dumps(told | {"host_code": True, "plugin_library": "0" * 64}))
    with pytest.raises(
        SpecQuantError, match=r"libspecquant_trt\.so is missing, or was changed .*: run `specquant build"
    ):
        open_engine(artifact, tmp_path)


def test_no_engine(artifact: Path, tmp_path: Path) -> None:
    with pytest.raises(SpecQuantError, match="holds no engine"):
        open_engine(artifact, tmp_path)
