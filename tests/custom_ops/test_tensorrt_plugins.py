"""The plugins in Python: in engines that TensorRT-RTX builds, and what their enqueue computes.

Building needs libspecquant_cuda.so (SPECQUANT_CUDA_LIBRARY), computing a GPU or its emulator (docs/cuda.md).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("tensorrt_rtx", reason="the extra `tensorrt-rtx` is not installed")
import tensorrt_rtx as trt

from specquant.custom_ops import tensorrt_plugins
from specquant.custom_ops.errors import SpecQuantError
from specquant.custom_ops.library_tensorrt import PLUGINS
from specquant.custom_ops.schema import DOMAIN, OPS, VERSION, core
from specquant.exporter.engine_builder import Limits, build_engine
from specquant.exporter.graph import build_model, save_model
from specquant.exporter.lowering import lower
from tests.ops import REFERENCE, random_input, random_weights
from tests.tiny import quantised_decoder, tiny_llama

EMULATED = os.environ.get("SPECQUANT_CUDA_EMULATED") == "1"


@pytest.fixture
def creators() -> Iterator[dict[str, Any]]:
    """Of the registry, where they must not stay: other tests look for an op that no one has registered."""
    try:
        tensorrt_plugins.register(trt)
    except SpecQuantError as error:
        pytest.skip(str(error))
    registry = trt.get_plugin_registry()
    tensorrt_plugins.register(trt)  # does nothing
    found = {name: registry.get_creator(name, str(VERSION), DOMAIN) for name in PLUGINS}
    yield found
    for creator in found.values():
        registry.deregister_creator(creator)


def fields(op: str, **given: int | float) -> Any:
    kinds = {int: (np.int64, trt.PluginFieldType.INT64), float: (np.float32, trt.PluginFieldType.FLOAT32)}
    values = {a.name: type(a.default)(given.get(a.name, a.default)) for a in core(OPS[op]).attributes}
    made = [(n, np.array([v], kinds[type(v)][0]), kinds[type(v)][1]) for n, v in values.items()]
    return trt.PluginFieldCollection([trt.PluginField(*each) for each in made])


@pytest.mark.parametrize(("gpu", "rank"), [("sm86", 5), ("sm89", 0), ("sm120", 5)])
def test_engines(rng: np.random.Generator, tmp_path: Path, creators: dict[str, Any], gpu: str, rank: int) -> None:
    _, decoder = tiny_llama(int(rng.integers(2**31)))
    save_model(build_model(quantised_decoder(decoder, rng, 4, 8, 8, rank, rank > 0), "float16", {}), tmp_path)
    (tmp_path / "lowered").mkdir()
    save_model(lower(tmp_path, "custom", 32), tmp_path / "lowered")
    path = tmp_path / "lowered" / "model.onnx"
    built = build_engine(trt, path, "tensorrt-rtx", gpu, Limits(2, 32, 16), lambda *_: None)
    assert len(built.plugins) == 7
    assert sum("LayerType: custom_layer" in line for line in built.layers) == 14


@pytest.mark.parametrize("op", PLUGINS)
@pytest.mark.parametrize("float_type", [np.float32, np.float16])
@pytest.mark.parametrize(("act_bits", "group", "hadamard"), [(8, 64, 64), (4, 64, 0), (4, 0, 16), (16, 64, 0)])
def test_enqueue(
    rng: np.random.Generator,
    creators: dict[str, Any],
    op: str,
    float_type: type[np.floating[Any]],
    act_bits: int,
    group: int,
    hadamard: int,
) -> None:
    """A plugin that has been serialised and attached, at sizes that do not divide the tiles, in a dirty workspace."""
    if not EMULATED:
        pytest.skip("memory of the host is the GPU's only under SPECQUANT_CUDA_EMULATED=1")
    n, m, tokens = 128, 40, 19
    attributes = {"group_size": group, "act_bits": act_bits, "act_group": group, "hadamard": hadamard}
    attributes |= {"subtract": 1} if op == "SpecQuantMatMul" else {}
    weights = random_weights(rng, op, n, m, 5, group, group)
    x = random_input(rng, (tokens, n), float_type)
    expected = REFERENCE[op](x, *weights.values(), **attributes)
    weights["row_sums"] = weights["row_sums"].astype(np.int32)

    built = creators[op].create_plugin("x", fields(op, **attributes), trt.TensorRTPhase.BUILD)
    plugin = creators[op].create_plugin("x", built.get_fields_to_serialize(), trt.TensorRTPhase.RUNTIME)
    plugin = plugin.attach_to_context(None)
    inputs = [x, *weights.values()]
    types = {np.float32: trt.float32, np.float16: trt.float16, np.int8: trt.int8}
    types |= {np.int32: trt.int32, np.int64: trt.int64}
    descs, dynamic = [], []
    y = np.empty((tokens, m), float_type)
    for array in [*inputs, y]:
        desc = trt.PluginTensorDesc()
        desc.dims, desc.type = trt.Dims(array.shape), types[array.dtype.type]
        desc.format = trt.TensorFormat.LINEAR
        descs.append(desc)
        range_of = trt.DynamicPluginTensorDesc()
        range_of.desc, range_of.max, range_of.min = desc, trt.Dims((64, *array.shape[1:])), desc.dims
        dynamic.append(range_of)
    assert all(plugin.supports_format_combination(i, dynamic, len(inputs)) for i in range(len(dynamic)))
    size = plugin.get_workspace_size(dynamic[:-1], dynamic[-1:])
    workspace = np.full(size, 0xC5, np.uint8)
    aligned = [np.zeros(array.nbytes + 256, np.uint8) for array in inputs]
    places = [-(-buffer.ctypes.data // 256) * 256 for buffer in aligned]
    for array, buffer, place in zip(inputs, aligned, places, strict=True):
        start = place - buffer.ctypes.data
        buffer[start : start + array.nbytes] = np.frombuffer(np.ascontiguousarray(array).tobytes(), np.uint8)
    plugin.enqueue(descs[:-1], descs[-1:], places, [y.ctypes.data], workspace.ctypes.data, 0)
    bound = 2e-3 if float_type == np.float16 or act_bits == 16 else 1e-4
    np.testing.assert_allclose(y, expected, rtol=bound, atol=bound * np.abs(expected).max())
