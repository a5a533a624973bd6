"""The plugin library in TensorRT-RTX's registry, and in engines that it builds; nothing here needs a GPU.

It needs libspecquant_trt.so, installed or named by SPECQUANT_TENSORRT_LIBRARY (docs/tensorrt.md, "Plugins").
"""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("tensorrt_rtx", reason="the extra `tensorrt-rtx` is not installed")
import tensorrt_rtx as trt

from specquant.custom_ops.errors import SpecQuantError
from specquant.custom_ops.library_tensorrt import PLUGINS, library_path, prepare_plugins
from specquant.custom_ops.schema import DOMAIN, OPS, VERSION
from specquant.exporter.engine_builder import Built, Limits, build_engine
from specquant.exporter.graph import build_model, save_model
from specquant.exporter.graph.writer import FloatType
from specquant.exporter.lowering import lower
from tests.ops import branch_graph
from tests.tiny import quantised_decoder, tiny_llama


@pytest.fixture(scope="module")
def library() -> Path:
    try:
        prepare_plugins(trt)
        return library_path()
    except SpecQuantError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def creators(library: Path) -> dict[str, Any]:
    builder = trt.Builder(trt.Logger(trt.Logger.ERROR))
    registry = builder.get_plugin_registry()
    assert registry.load_library(str(library)) is not None
    found = {c.name: c for c in registry.all_creators if c.plugin_namespace == DOMAIN}
    found["keep alive"] = builder
    return found


def tiny_engine(
    rng: np.random.Generator,
    folder: Path,
    library: Path,
    gpu: str,
    rank: int,
    embed: bool,
    kv_bits: int = 4,
    float_type: FloatType = "float16",
) -> Built:
    """Norms, gates and residuals of two layers within their linears, and a head of 8 bits."""
    _, decoder = tiny_llama(int(rng.integers(2**31)))
    decoder = quantised_decoder(decoder, rng, 8, 8, 8, rank, rank > 0)
    decoder = replace(decoder, config=replace(decoder.config, kv_bits=kv_bits, head_bits=8))
    save_model(build_model(decoder, float_type, {}), folder)
    (folder / "lowered").mkdir()
    save_model(lower(folder, "custom", 32), folder / "lowered")
    path = folder / "lowered" / "model.onnx"
    engine = folder / "engine"
    return build_engine(trt, path, engine, "tensorrt-rtx", gpu, Limits(2, 32, 16), lambda *_: None, library, embed)


def test_it_links_no_tensorrt_and_exports_what_tensorrt_looks_for(library: Path) -> None:
    if shutil.which("nm") is None or shutil.which("readelf") is None:
        pytest.skip("binutils are not installed")

    def output(*command: str) -> str:
        return subprocess.run([*command, str(library)], check=True, capture_output=True, text=True).stdout

    symbols = {line.split()[-1] for line in output("nm", "-D", "--defined-only").splitlines()}
    assert symbols == {"getCreators", "setLoggerFinder"}
    needed = re.findall(r"NEEDED.*\[(.*)\]", output("readelf", "-d"))
    assert not [name for name in needed if "nvinfer" in name or "tensorrt" in name or "cudart" in name]


@pytest.mark.parametrize("name", PLUGINS)
def test_the_fields_are_the_schemas(creators: dict[str, Any], name: str) -> None:
    creator = creators[name]
    assert creator.plugin_version == str(VERSION)
    kinds = {int: trt.PluginFieldType.INT64, float: trt.PluginFieldType.FLOAT32}
    wanted = [(a.name, kinds[type(a.default)]) for a in OPS[name].attributes]
    assert [(field.name, field.type) for field in creator.field_names] == wanted


def fields(**values: int | float) -> Any:
    kinds = {int: (np.int64, trt.PluginFieldType.INT64), float: (np.float32, trt.PluginFieldType.FLOAT32)}
    made = [(n, np.array([v], kinds[type(v)][0]), kinds[type(v)][1]) for n, v in values.items()]
    return trt.PluginFieldCollection([trt.PluginField(*each) for each in made])


@pytest.mark.parametrize("phase", ["BUILD", "RUNTIME"])
def test_fields_it_takes_and_those_it_refuses(creators: dict[str, Any], phase: str) -> None:
    at = getattr(trt.TensorRTPhase, phase)
    fused, residual, branch, int4, half = (creators[name] for name in PLUGINS)
    assert fused.create_plugin("x", fields(group_size=64, act_clip=0.9, subtract=1), at) is not None
    assert residual.create_plugin("x", fields(group_size=64), at) is not None
    assert residual.create_plugin("x", fields(subtract=1), at) is None  # of the other op
    assert fused.create_plugin("x", fields(group_size=64.0), at) is None
    assert fused.create_plugin("x", fields(act_clip=1), at) is None
    assert branch.create_plugin("x", fields(), at) is not None
    assert branch.create_plugin("x", fields(subtract=1), at) is None
    assert int4.create_plugin("x", fields(num_heads=4, scale=0.5, clip=0.9, hadamard=1), at) is not None
    assert half.create_plugin("x", fields(num_heads=4, scale=0.5), at) is not None
    assert half.create_plugin("x", fields(clip=0.9), at) is None


@pytest.mark.parametrize(
    ("gpu", "rank", "embed", "kv_bits", "float_type"),
    [
        ("sm86", 5, False, 4, "float16"),
        ("sm89", 0, False, 16, "float16"),
        ("sm89", 5, False, 16, "float32"),
        ("sm120", 5, True, 4, "float32"),
    ],
)
def test_every_node_of_ours_is_a_plugin_layer(
    rng: np.random.Generator,
    tmp_path: Path,
    library: Path,
    gpu: str,
    rank: int,
    embed: bool,
    kv_bits: int,
    float_type: FloatType,
) -> None:
    built = tiny_engine(rng, tmp_path, library, gpu, rank, embed, kv_bits, float_type)
    parts = ("self_attn.qkv_proj", "self_attn", "self_attn.o_proj", "mlp.gate_up_proj")
    names = [f"model.layers.{i}.{part}" for i in range(2) for part in parts]
    names += ["model.layers.0.mlp.down_proj", "lm_head"]
    assert built.plugins == sorted(names)
    # In the engine too, once a profile: layers there are named after the node, with TensorRT's numbers behind it.
    custom = [line for line in built.layers if re.search("LayerType: (custom_layer|PluginV3),", line)]
    assert len(custom) == 2 * len(names)
    for name in names:
        assert sum(re.match(rf"Name: {re.escape(name)}(,| \[|_U\d|_myl)", line) is not None for line in custom) == 2
    # Nothing copies or converts the cache: only attention touches it.
    touch = [line for line in built.layers if "past_key_values." in line or "present." in line]
    assert touch == [line for line in built.layers if "LayerType: PluginV3," in line]
    assert len(touch) == 4
    assert (library.read_bytes() in (tmp_path / "engine").read_bytes()) == embed


@pytest.mark.parametrize("float_type", ["float16", "float32"])
def test_a_branch_is_a_plugin_layer(
    rng: np.random.Generator, tmp_path: Path, library: Path, float_type: FloatType
) -> None:
    """Both outputs go straight from the plugin to the network's: no export holds the op, so a graph of its own does."""
    path = branch_graph(rng, tmp_path / "branch.onnx", float_type)
    engine = tmp_path / "engine"
    built = build_engine(trt, path, engine, "tensorrt-rtx", "sm89", Limits(2, 32, 16), lambda *_: None, library)
    assert built.plugins == ["branch"]
    custom = [line for line in built.layers if re.search("LayerType: (custom_layer|PluginV3),", line)]
    assert len(custom) == 2
    assert all("y" in line and "low" in line for line in custom)


def test_a_graph_with_plugins_but_no_library(rng: np.random.Generator, tmp_path: Path, library: Path) -> None:
    with pytest.raises(SpecQuantError, match="Plugin not found"):
        tiny_engine(rng, tmp_path, None, "sm89", 5, False)  # type: ignore[arg-type]


def test_a_library_that_is_none(rng: np.random.Generator, tmp_path: Path, library: Path) -> None:
    (tmp_path / "text.so").write_text("no library")
    with pytest.raises(SpecQuantError, match=r"cannot load .*text\.so"):
        tiny_engine(rng, tmp_path, tmp_path / "text.so", "sm89", 5, False)


def test_the_name_that_rtx_opens() -> None:
    """Without it, building a plugin aborts the process."""
    prepare_plugins(trt)
    ctypes.CDLL("libtensorrt_rtx.so")


def test_a_missing_library_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPECQUANT_TENSORRT_LIBRARY", "/nowhere/x.so")
    with pytest.raises(SpecQuantError, match=r"names /nowhere/x\.so, which is not there"):
        library_path()
