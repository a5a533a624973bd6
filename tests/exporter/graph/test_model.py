"""What an exported file looks like: signature, names, checker, external data, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

from specquant.custom_ops.errors import SpecQuantError
from specquant.custom_ops.packing import unpack_group_scales, unpack_int4
from specquant.exporter.decoder import Decoder, FloatLinear
from specquant.exporter.graph import build_model, save_model
from specquant.exporter.graph.writer import FloatType
from tests.tiny import float_decoder, quantised_decoder, tiny_llama, tiny_model

RECIPE = {"act_bits": 4, "group_size": 8, "act_group": 8, "rank": 5, "subtract": True}


def dims(value: onnx.ValueInfoProto) -> list[str | int]:
    return [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]


@pytest.mark.parametrize("float_type", ["float32", "float16"])
@pytest.mark.parametrize("quantised", [False, True])
def test_signature_and_checker(
    rng: np.random.Generator, tmp_path: Path, float_type: FloatType, quantised: bool
) -> None:
    _, decoder = tiny_llama(int(rng.integers(2**31)))
    decoder = quantised_decoder(decoder, rng, **RECIPE) if quantised else decoder
    save_model(build_model(decoder, float_type, {"specquant.recipe": "a recipe"}), tmp_path)
    path = tmp_path / "model.onnx"
    onnx.checker.check_model(str(path), full_check=True)
    model = onnx.load(path)
    onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True, data_prop=True)

    caches = [f"{i}.{part}" for i in range(2) for part in ("key", "value")]
    expected = {
        "input_ids": ["batch", "sequence"],
        "attention_mask": ["batch", "total_sequence"],
        "position_ids": ["batch", "sequence"],
        **{f"past_key_values.{name}": ["batch", 2, "past_sequence", 16] for name in caches},
        "logits_to_keep": [1],
        **({"rank": [1]} if quantised else {}),
    }
    assert {value.name: dims(value) for value in model.graph.input} == expected
    assert {value.name: dims(value) for value in model.graph.output} == {
        "logits": ["batch", "kept", 128],
        **{f"present.{name}": ["batch", 2, "total_sequence", 16] for name in caches},
    }
    kinds = {value.name: value.type.tensor_type.elem_type for value in [*model.graph.input, *model.graph.output]}
    single, half = onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16
    assert kinds["logits"] == (single if float_type == "float32" else half)
    cache = half if quantised else kinds["logits"]
    assert {kinds[name] for name in kinds if name.startswith(("past", "present"))} == {cache}
    attention = {node.op_type for node in model.graph.node if node.op_type.endswith("Attention")}
    assert attention == {"HalfKVAttention" if quantised else "GroupQueryAttention"}
    assert {prop.key: prop.value for prop in model.metadata_props} == {"specquant.recipe": "a recipe"}
    known = {value.name for value in [*model.graph.value_info, *model.graph.output]}
    assert {name for node in model.graph.node for name in node.output} <= known


def test_logits_of_the_last_positions(rng: np.random.Generator, tmp_path: Path) -> None:
    _, decoder = tiny_llama(int(rng.integers(2**31)))
    save_model(build_model(decoder, "float32", {}), tmp_path)
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
    ids = rng.integers(0, 128, (1, 9))
    feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids), "position_ids": np.arange(9)[None]}
    feeds |= {i.name: np.zeros((1, 2, 0, 16), np.float32) for i in session.get_inputs() if i.name.startswith("past")}
    (whole,) = session.run(["logits"], feeds)
    assert whole.shape == (1, 9, 128)
    for keep in (0, 1, 4, 9, 100):
        (kept,) = session.run(["logits"], feeds | {"logits_to_keep": np.array([keep])})
        np.testing.assert_allclose(kept, whole[:, -keep:], rtol=1e-5, atol=1e-5)


def test_only_functions_that_are_called_are_attached(rng: np.random.Generator) -> None:
    _, decoder = tiny_llama(int(rng.integers(2**31)))
    names = {
        rank: [
            f.name
            for f in build_model(
                quantised_decoder(decoder, rng, **RECIPE | {"rank": rank}), "float32", {}
            ).functions.values()
        ]
        for rank in (0, 5)
    }
    assert names == {
        0: ["Int4ResidualMatMul", "HalfKVAttention"],
        5: ["SpectralBranch", "Int4ResidualMatMul", "SpecQuantMatMul", "HalfKVAttention"],
    }
    assert not build_model(decoder, "float32", {}).functions


def nodes_of_layer(decoder: Decoder, layer: int) -> list[str]:
    nodes = build_model(decoder, "float32", {}).graph
    return [node.op_type for node in nodes if str(node.name).startswith(f"model.layers.{layer}.")]


def test_a_quantised_layer_of_llama_is_five_nodes(rng: np.random.Generator) -> None:
    _, decoder = tiny_llama(int(rng.integers(2**31)))
    quantised = quantised_decoder(decoder, rng, **RECIPE)
    ours = "SpecQuantMatMul"
    qkv, _, *rest = nodes_of_layer(quantised, 0)
    assert [qkv, *rest] == [ours] * 4
    *_, gate_up, down, add = nodes_of_layer(quantised, 1)  # its down_proj is a float one
    assert (gate_up, down, add) == (ours, "MatMul", "Add")
    assert len(nodes_of_layer(quantised, 1)) == 6
    assert len(nodes_of_layer(decoder, 0)) == 13


def test_norms_between_a_block_and_its_residual_stay_nodes(rng: np.random.Generator) -> None:
    decoder = quantised_decoder(float_decoder(tiny_model("gemma3", int(rng.integers(2**31)))), rng, **RECIPE)
    nodes = nodes_of_layer(decoder, 0)
    ours = "SpecQuantMatMul"
    assert nodes[0] == ours
    assert nodes[-7:] == [ours, "RMSNormalization", "Add", ours, ours, "RMSNormalization", "Add"]


def test_tensors_have_the_names_of_their_modules(rng: np.random.Generator, tmp_path: Path) -> None:
    _, decoder = tiny_llama(int(rng.integers(2**31)))
    decoder = quantised_decoder(decoder, rng, **RECIPE)
    save_model(build_model(decoder, "float32", {}), tmp_path)
    tensors = {tensor.name: tensor for tensor in onnx.load(tmp_path / "model.onnx").graph.initializer}
    arrays = {name: onnx.numpy_helper.to_array(tensor) for name, tensor in tensors.items()}
    entry = decoder.layers[1].qkv
    assert not isinstance(entry, FloatLinear)
    name = "model.layers.1.self_attn.qkv_proj"
    np.testing.assert_array_equal(unpack_int4(arrays[f"{name}.qweight"], *entry.q.shape), entry.q)
    found = unpack_group_scales(arrays[f"{name}.group_scales"], *entry.group_scales.shape)
    np.testing.assert_array_equal(found, entry.group_scales)
    np.testing.assert_array_equal(arrays[f"{name}.scales"], entry.scales)
    np.testing.assert_array_equal(arrays["model.norm.weight"], decoder.final_norm)
    np.testing.assert_array_equal(arrays["model.layers.1.mlp_norm.weight"], decoder.layers[1].mlp_norm)
    assert arrays["rank"].tolist() == [5]


def test_large_tensors_lie_outside_and_once(rng: np.random.Generator, tmp_path: Path) -> None:
    _, decoder = tiny_llama(int(rng.integers(2**31)), tied=True)
    save_model(build_model(decoder, "float32", {}), tmp_path)
    model = onnx.load(tmp_path / "model.onnx", load_external_data=False)
    size = {tensor.name: int(np.prod(tensor.dims)) * 4 for tensor in model.graph.initializer}
    outside = {t.name for t in model.graph.initializer if t.data_location == onnx.TensorProto.EXTERNAL}
    assert outside == {name for name in size if size[name] > 1024}
    assert (tmp_path / "model.onnx.data").stat().st_size == sum(size[name] for name in outside)
    assert sum(list(tensor.dims) == [128, 64] for tensor in model.graph.initializer) == 1  # the tied embedding


def test_float16_refuses_what_it_cannot_hold(rng: np.random.Generator) -> None:
    _, decoder = tiny_llama(int(rng.integers(2**31)))
    norm = decoder.final_norm.copy()
    norm[rng.integers(norm.size)] = -70000.0
    with pytest.raises(SpecQuantError, match=r"\Amodel\.norm\.weight [^\n]*float32\Z"):
        build_model(replace(decoder, final_norm=norm), "float16", {})


def test_groups_that_do_not_fit_are_refused(rng: np.random.Generator) -> None:
    _, decoder = tiny_llama(int(rng.integers(2**31)))
    decoder = quantised_decoder(decoder, rng, **RECIPE | {"group_size": 0, "act_group": 0})
    layer = replace(decoder.layers[0], qkv=replace(decoder.layers[0].qkv, act_group=24))
    with pytest.raises(SpecQuantError, match="act_group 24"):
        build_model(replace(decoder, layers=[layer, *decoder.layers[1:]]), "float32", {})
