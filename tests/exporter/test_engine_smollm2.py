"""Engines of a real model, for GPUs that are not here: SmolLM2-135M, quantised as quickly as it goes, in a minute."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import pytest

pytest.importorskip("tensorrt_rtx", reason="the extra `tensorrt-rtx` is not installed")

import specquant.exporter.engine as engine_module
from specquant.custom_ops.errors import SpecQuantError
from specquant.custom_ops.library_tensorrt import library_path
from specquant.exporter.engine import EngineOptions, build, estimate
from specquant.exporter.engine_builder import Built, Limits, load_api
from specquant.exporter.export import export
from specquant.exporter.lowering import lower
from specquant.exporter.recipe import Recipe
from specquant.exporter.sources import sample_gguf
from specquant.runtime.artifact import open_artifact
from specquant.runtime.engine import EngineInfo, open_engine
from tests.python_plugins import registered
from tools.build_memory import watched

RECIPE = Recipe(
    rounding="rtn",
    descents=0,
    asymmetry=0.0,
    smooth=False,
    samples=2,
    sequence_length=32,
    float_type="float16",
    kv_bits=4,
)
OPTIONS = EngineOptions(gpu="sm89", max_batch=4, max_seq=1024)
LAYERS, ARTIFACT_BYTES = 30, 162e6  # 4-bit weights, an 8-bit table, and branches of rank 32


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    try:
        sample_gguf()
    except SpecQuantError as error:
        pytest.skip(str(error))
    folder = tmp_path_factory.mktemp("smollm2") / "artifact"
    export("sample", folder, RECIPE)
    return folder


def built_by_command(artifact: Path, folder: Path, profile: str) -> tuple[EngineInfo, float, float]:
    """The engine of a command of its own, bytes that it estimated, and the most private memory that it took (Linux)."""
    sizes = [
        "--gpu",
        "sm89",
        "--max-batch",
        "4",
        "--max-seq",
        "1024",
        "--profile",
        profile,
        "-o",
        str(folder),
        "--json",
    ]
    command = [sys.executable, "-m", "specquant.runtime.cli", "build", str(artifact), *sizes]
    done, peaks = watched(command)
    assert done.returncode == 0, done.stderr
    estimated = re.search(r"estimate: about ([\d,]+) MB", done.stderr)
    assert estimated
    info = open_engine(artifact, folder)
    assert json.loads(done.stdout) == asdict(info)
    return info, float(estimated[1].replace(",", "")) * 1e6, peaks["RssAnon"]


def test_a_portable_engine(artifact: Path, tmp_path: Path) -> None:
    info, estimated, taken = built_by_command(artifact, tmp_path / "engine", "portable")
    assert info.plugins == []
    assert 0.9 * ARTIFACT_BYTES < info.weights_bytes < 1.05 * ARTIFACT_BYTES  # 4 bits stay 4 bits
    assert info.size < 1.2 * ARTIFACT_BYTES
    assert not taken or 0.8 * estimated < taken < 1.15 * estimated


def test_memory_of_a_custom_engine(artifact: Path, tmp_path: Path) -> None:
    try:
        library_path()
    except SpecQuantError as error:
        pytest.skip(str(error))
    _, estimated, taken = built_by_command(artifact, tmp_path / "engine", "custom")
    assert not taken or 0.8 * estimated < taken < 1.15 * estimated


@pytest.fixture
def python(monkeypatch: pytest.MonkeyPatch) -> Iterator[bool]:
    """Whether the plugins in Python, of the same names, stand in for the compiled library."""
    try:
        library_path()
    except SpecQuantError:
        with registered(load_api("tensorrt-rtx"), monkeypatch):
            yield True
    else:
        yield False


@pytest.mark.parametrize("gpu", ["sm86", "sm89", "sm120"])
def test_a_custom_engine(
    artifact: Path, tmp_path: Path, gpu: str, python: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every node of ours is a plugin layer, in both profiles, and nothing but attention touches the cache."""
    made: list[Built] = []

    def remembered(*arguments: object) -> Built:
        made.append(build_engine(*arguments))  # type: ignore[arg-type]
        return made[-1]

    build_engine = engine_module.build_engine
    monkeypatch.setattr(engine_module, "build_engine", remembered)
    options = replace(OPTIONS, gpu=gpu, profile="custom", python_plugins=python)
    info = build(artifact, options, tmp_path / "engine")
    assert info.plugins == ["Int4KVAttention", "Int4ResidualMatMul", "SpecQuantMatMul"]
    assert len(made[0].plugins) == LAYERS * 5 + 1  # four linears and attention, and the head
    layers = made[0].layers
    assert sum(re.search("LayerType: (custom_layer|PluginV3),", line) is not None for line in layers) == 2 * 151
    caches = [line for line in layers if "past_key_values." in line or "present." in line]
    assert caches == [line for line in layers if "LayerType: PluginV3," in line]
    assert 0.95 * ARTIFACT_BYTES < info.weights_bytes < 1.05 * ARTIFACT_BYTES
    assert info.size < 1.1 * ARTIFACT_BYTES


def test_the_cache_of_an_engine(artifact: Path) -> None:
    """4 bits where the plugins read it, else floats; as the estimate has it."""
    manifest, limits = open_artifact(artifact), Limits(4, 1024, 512)
    tokens = limits.max_batch * limits.max_seq
    profiles = ("custom", "portable")
    packed, floats = (estimate(lower(artifact, profile, 1024), manifest, limits, profile) for profile in profiles)
    assert packed.cache == tokens * manifest.model.cache_bytes_per_token == tokens * 6480
    assert floats.cache == tokens * 23040
