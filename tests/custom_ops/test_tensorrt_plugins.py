"""The plugins in Python: in engines that TensorRT-RTX builds, and what their enqueue computes.

Computing needs libspecquant_cuda.so (SPECQUANT_CUDA_LIBRARY), for the emulator (docs/cuda.md).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

pytest.importorskip("tensorrt_rtx", reason="the extra `tensorrt-rtx` is not installed")
import tensorrt_rtx as trt

from specquant.custom_ops import tensorrt_plugins
from specquant.custom_ops.schema import OPS
from specquant.exporter.engine_builder import Limits, build_engine
from specquant.exporter.graph import build_model, save_model
from specquant.exporter.lowering import lower
from tests.attention import HALF, INT4, random_call
from tests.ops import REFERENCE, branch_graph, random_input, random_weights
from tests.python_plugins import registered
from tests.tiny import quantised_decoder, tiny_llama

EMULATED = os.environ.get("SPECQUANT_CUDA_EMULATED") == "1"


@pytest.fixture
def creators(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    with registered(trt, monkeypatch) as found:
        tensorrt_plugins.register(trt)  # does nothing
        yield found


def fields(op: str, **given: int | float) -> Any:
    kinds = {int: (np.int64, trt.PluginFieldType.INT64), float: (np.float32, trt.PluginFieldType.FLOAT32)}
    values = {a.name: type(a.default)(given.get(a.name, a.default)) for a in OPS[op].attributes}
    made = [(n, np.array([v], kinds[type(v)][0]), kinds[type(v)][1]) for n, v in values.items()]
    return trt.PluginFieldCollection([trt.PluginField(*each) for each in made])


@pytest.mark.parametrize(("gpu", "rank", "kv_bits"), [("sm86", 5, 4), ("sm89", 0, 16), ("sm120", 5, 4)])
def test_engines(
    rng: np.random.Generator, tmp_path: Path, creators: dict[str, Any], gpu: str, rank: int, kv_bits: int
) -> None:
    _, decoder = tiny_llama(int(rng.integers(2**31)))
    decoder = quantised_decoder(decoder, rng, 4, 8, 8, rank, rank > 0)
    decoder = replace(decoder, config=replace(decoder.config, kv_bits=kv_bits))
    save_model(build_model(decoder, "float16", {}), tmp_path)
    (tmp_path / "lowered").mkdir()
    save_model(lower(tmp_path, "custom", 32), tmp_path / "lowered")
    path = tmp_path / "lowered" / "model.onnx"
    built = build_engine(trt, path, tmp_path / "engine", "tensorrt-rtx", gpu, Limits(2, 32, 16), lambda *_: None)
    assert len(built.plugins) == 7 + 2
    assert sum("LayerType: custom_layer" in line for line in built.layers) == 2 * 7
    caches = [line for line in built.layers if "past_key_values." in line or "present." in line]
    assert caches == [line for line in built.layers if "LayerType: PluginV3" in line]  # nothing copies them
    assert len(caches) == 2 * 2


def test_a_branch_in_an_engine(rng: np.random.Generator, tmp_path: Path, creators: dict[str, Any]) -> None:
    path = branch_graph(rng, tmp_path / "branch.onnx", "float16")
    built = build_engine(trt, path, tmp_path / "engine", "tensorrt-rtx", "sm89", Limits(2, 32, 16), lambda *_: None)
    assert built.plugins == ["branch"]


def aligned(array: NDArray[Any]) -> NDArray[Any]:
    """A copy at a multiple of 256, as a GPU's memory is."""
    buffer = np.zeros(array.nbytes + 256, np.uint8)
    start = -buffer.ctypes.data % 256
    copy = buffer[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy


def run(
    creator: Any, op: str, attributes: dict[str, Any], inputs: list[NDArray[Any]], outputs: list[NDArray[Any]]
) -> None:
    """Fill `outputs`, which may be inputs, by a plugin that has been serialised and attached, in a dirty workspace."""
    if not EMULATED:
        pytest.skip("memory of the host is the GPU's only under SPECQUANT_CUDA_EMULATED=1")
    built = creator.create_plugin("x", fields(op, **attributes), trt.TensorRTPhase.BUILD)
    plugin = creator.create_plugin("x", built.get_fields_to_serialize(), trt.TensorRTPhase.RUNTIME)
    plugin = plugin.attach_to_context(None)
    types = {np.float32: trt.float32, np.float16: trt.float16, np.int8: trt.int8}
    types |= {np.int32: trt.int32, np.int64: trt.int64}
    descs, dynamic = [], []
    for array in [*inputs, *outputs]:
        desc = trt.PluginTensorDesc()
        desc.dims, desc.type = trt.Dims(array.shape), types[array.dtype.type]
        desc.format = trt.TensorFormat.LINEAR
        descs.append(desc)
        range_of = trt.DynamicPluginTensorDesc()
        range_of.desc, range_of.max, range_of.min = desc, desc.dims, desc.dims
        dynamic.append(range_of)
    assert all(plugin.supports_format_combination(i, dynamic, len(inputs)) for i in range(len(dynamic)))
    assert plugin.get_output_data_types([d.type for d in descs[: len(inputs)]]) == [
        d.type for d in descs[len(inputs) :]
    ]
    size = plugin.get_workspace_size(dynamic[: len(inputs)], dynamic[len(inputs) :])
    workspace = np.full(size, 0xC5, np.uint8)
    addresses = [[array.ctypes.data for array in arrays] for arrays in (inputs, outputs)]
    plugin.enqueue(descs[: len(inputs)], descs[len(inputs) :], *addresses, workspace.ctypes.data, 0)


@pytest.mark.parametrize("op", ["SpecQuantMatMul", "Int4ResidualMatMul"])
@pytest.mark.parametrize("float_type", [np.float32, np.float16])
@pytest.mark.parametrize(
    ("act_bits", "group", "hadamard", "prologue", "gate"),
    [(8, 64, 64, 0, 0), (4, 64, 0, 0, 1), (4, 0, 16, 0, 0), (16, 64, 0, 1, 0), (16, 0, 16, 0, 2)],
)
def test_linears(
    rng: np.random.Generator,
    creators: dict[str, Any],
    op: str,
    float_type: type[np.floating[Any]],
    act_bits: int,
    group: int,
    hadamard: int,
    prologue: int,
    gate: int,
) -> None:
    """Sizes that do not divide the tiles; with a prologue a residual too."""
    n, m, tokens = 128, 40, 19
    attributes = {"group_size": group, "act_bits": act_bits, "act_group": group, "hadamard": hadamard}
    attributes |= {"subtract": 1} if op == "SpecQuantMatMul" else {}
    attributes |= {"prologue": prologue, "gate": gate}
    weights = random_weights(rng, op, n, m, 5, group)
    x = random_input(rng, (1, tokens, n), float_type)
    residual = rng.standard_normal((1, tokens, m) if prologue else 1).astype(float_type) * bool(prologue)
    weights |= {"norm": rng.uniform(0.2, 3, n).astype(np.float32), "residual": residual.astype(float_type)}
    expected = REFERENCE[op](x, **weights, **attributes)
    y = np.full((1, tokens, m // 2 if gate else m), np.nan, float_type)
    run(creators[op], op, attributes, [aligned(array) for array in (x, *weights.values())], [y])
    bound = 2e-3 if float_type == np.float16 or act_bits == 16 else 1e-4
    np.testing.assert_allclose(y, expected, rtol=bound, atol=bound * np.abs(expected).max())


@pytest.mark.parametrize("float_type", [np.float32, np.float16])
@pytest.mark.parametrize("tokens", [0, 1, 19])
def test_a_branch(rng: np.random.Generator, creators: dict[str, Any], float_type: Any, tokens: int) -> None:
    op = "SpectralBranch"
    weights = random_weights(rng, op, 128, 40, 5)
    x = random_input(rng, (1, tokens, 128), float_type)
    outputs = [np.full((1, tokens, width), np.nan, float_type) for width in (40, 5)]
    run(creators[op], op, {}, [aligned(array) for array in (x, *weights.values())], outputs)
    bound = 2e-3 if float_type == np.float16 else 1e-5
    for actual, expected in zip(outputs, REFERENCE[op](x, **weights), strict=True):
        largest = np.abs(expected.astype(np.float32)).max(initial=0)
        np.testing.assert_allclose(actual, expected, rtol=bound, atol=bound * largest)


@pytest.mark.parametrize("op", [INT4, HALF])
@pytest.mark.parametrize("float_type", [np.float32, np.float16])
@pytest.mark.parametrize(("past", "new"), [([0], [23]), ([40, 7], [1, 1])])
def test_attention(
    rng: np.random.Generator, creators: dict[str, Any], op: str, float_type: Any, past: list[int], new: list[int]
) -> None:
    """The cache is extended where it lies."""
    call = random_call(rng, past, new, op=op, float_type=float_type, spare=30, hadamard=1, clip=0.9, window=20)
    expected, *caches = call.expected()
    inputs = [aligned(array) for array in call.inputs.values()]
    y = np.full(expected.shape, np.nan, float_type)
    run(creators[op], op, call.attributes, inputs, [y, *inputs[1:3]])
    bound = 1e-5 if float_type == np.float32 else 5e-3
    np.testing.assert_allclose(y, expected, rtol=0, atol=bound * np.abs(expected.astype(np.float32)).max())
    for cache, expected_cache in zip(inputs[1:3], caches, strict=True):
        np.testing.assert_array_equal(call.rows(cache), call.rows(expected_cache))
    built = creators[op].create_plugin("x", fields(op, **call.attributes), trt.TensorRTPhase.BUILD)
    assert [built.get_aliased_input(i) for i in range(3)] == [-1, 1, 2]
