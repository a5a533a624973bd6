"""The model-local functions in ONNX Runtime without our library, against the reference."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from specquant.custom_ops.functions import function_protos
from specquant.custom_ops.packing import unpack_group_scales, unpack_int4
from specquant.custom_ops.schema import GATES, OPS, PROLOGUES
from tests.ops import REFERENCE, Arrays, op_model, random_input, random_weights

ort = pytest.importorskip("onnxruntime")

GROUPS = [(0, 0), (8, 8), (0, 16), (16, 0), (8, 24), (24, 8)]
VARIANTS = [("SpectralBranch", None), ("Int4ResidualMatMul", None), ("SpecQuantMatMul", 0), ("SpecQuantMatMul", 1)]


def attributes_of(
    op: str, group_size: int, bits: int, act_group: int, subtract: int | None, hadamard: int = 0, act_clip: float = 1.0
) -> dict[str, Any]:
    given = {"group_size": group_size, "act_bits": bits, "act_group": act_group, "subtract": subtract or 0}
    given |= {"hadamard": hadamard, "act_clip": act_clip, "prologue": 0, "epsilon": 1e-5, "gate": 0}
    return {attribute.name: given[attribute.name] for attribute in OPS[op].attributes}


def session(model: onnx.ModelProto, optimised: Path | None = None) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.log_severity_level = 3  # it warns that `rank` is an input
    if optimised:
        options.optimized_model_filepath = str(optimised)
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def check(op: str, model: onnx.ModelProto, x: np.ndarray, weights: Arrays, attributes: dict[str, Any]) -> None:
    run, feeds = session(model), {"x": x}
    ranks: list[int | None] = [3, 0, 99] if "rank" in weights else [None]
    for rank in ranks:
        if rank is not None:
            feeds["rank"] = weights["rank"] = np.array([rank])
        expected = REFERENCE[op](x, **weights, **attributes)
        for output, value in zip(
            run.run(None, feeds), expected if isinstance(expected, tuple) else [expected], strict=True
        ):
            assert output.dtype == value.dtype
            size = max(float(np.abs(value.astype(np.float32)).max()), 1.0)
            tolerance = 1e-5 if x.dtype == np.float32 else 2e-3
            np.testing.assert_allclose(output, value, rtol=0, atol=tolerance * size)


@pytest.mark.parametrize(("op", "subtract"), VARIANTS)
@pytest.mark.parametrize(("group_size", "act_group"), GROUPS)
@pytest.mark.parametrize("bits", [3, 4, 8, 16])
def test_function_equals_reference(
    rng: np.random.Generator, op: str, subtract: int | None, group_size: int, act_group: int, bits: int
) -> None:
    weights = random_weights(rng, op, 48, 37, 7, group_size)
    attributes = attributes_of(op, group_size, bits, act_group, subtract)
    float_type = rng.choice([np.float32, np.float16])
    model = op_model(op, 48, weights, float_type, attributes)
    check(op, model, random_input(rng, (2, 5, 48), float_type), weights, attributes)


@pytest.mark.parametrize(("op", "subtract"), VARIANTS[1:])
@pytest.mark.parametrize("bits", [4, 16])
@pytest.mark.parametrize(("hadamard", "act_clip"), [(16, 1.0), (64, 0.5), (0, 0.75)])
def test_rotated_and_clipped(
    rng: np.random.Generator, op: str, subtract: int | None, bits: int, hadamard: int, act_clip: float
) -> None:
    weights = random_weights(rng, op, 192, 21, 7, 16)
    attributes = attributes_of(op, 16, bits, 64, subtract, hadamard, act_clip)
    x = random_input(rng, (2, 3, 192))
    check(op, op_model(op, 192, weights, np.float32, attributes), x, weights, attributes)


@pytest.mark.parametrize(("op", "subtract"), VARIANTS[1:])
@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("prologue", range(len(PROLOGUES)))
@pytest.mark.parametrize("float_type", [np.float32, np.float16])
def test_prologue_and_residual(
    rng: np.random.Generator, op: str, subtract: int | None, bits: int, prologue: int, float_type: type
) -> None:
    """x̂ is float32, a unit in the last place apart: where it is quantised, a level may be the next one."""
    n = 48
    weights = random_weights(rng, op, n, 37, 7, 16)
    weights["norm"] = (rng.uniform(-2, 2, n) if prologue == 1 else np.zeros(1)).astype(np.float32)
    attributes = attributes_of(op, 16, bits, 16, subtract, int(rng.choice([0, 16])))
    attributes |= {"prologue": prologue, "epsilon": float(rng.choice([1e-6, 0.25]))}
    x = random_input(rng, (2, 3, n), float_type)
    for residual in (rng.standard_normal((2, 3, 37)), np.zeros(1)):
        weights["residual"] = residual.astype(float_type)
        model = op_model(op, n, weights, float_type, attributes)
        onnx.checker.check_model(model, full_check=True)
        (y,), expected = session(model).run(None, {"x": x}), REFERENCE[op](x, **weights, **attributes)
        assert y.dtype == expected.dtype
        size = max(float(np.abs(expected.astype(np.float32)).max()), 1.0)
        tolerance = 2e-2 if bits == 8 else 1e-5 if float_type is np.float32 else 2e-3
        np.testing.assert_allclose(y, expected, rtol=0, atol=tolerance * size)


@pytest.mark.parametrize(("op", "subtract"), VARIANTS[1:])
@pytest.mark.parametrize("gate", range(1, len(GATES)))
@pytest.mark.parametrize("float_type", [np.float32, np.float16])
def test_gate(rng: np.random.Generator, op: str, subtract: int | None, gate: int, float_type: type) -> None:
    weights = random_weights(rng, op, 48, 38, 7, 16)
    attributes = attributes_of(op, 16, 4, 16, subtract) | {"gate": gate}
    model = op_model(op, 48, weights, float_type, attributes)
    x = random_input(rng, (2, 3, 48), float_type)
    (y,), expected = session(model).run(None, {"x": x}), REFERENCE[op](x, **weights, **attributes)
    assert (y.dtype, y.shape) == (expected.dtype, expected.shape) == (float_type, (2, 3, 19))
    size = max(float(np.abs(expected.astype(np.float32)).max()), 1.0)
    np.testing.assert_allclose(y, expected, rtol=0, atol=(1e-5 if float_type is np.float32 else 2e-3) * size)


@pytest.mark.parametrize(("op", "subtract"), VARIANTS)
@pytest.mark.parametrize("bits", [4, 16])
def test_features_need_not_fill_a_block(rng: np.random.Generator, op: str, subtract: int | None, bits: int) -> None:
    weights = random_weights(rng, op, 45, 16, 7)
    attributes = attributes_of(op, 0, bits, 0, subtract)
    model = op_model(op, 45, weights, np.float32, attributes)
    check(op, model, random_input(rng, (1, 3, 45)), weights, attributes)


@pytest.mark.parametrize("act_group", [0, 32])
def test_integers_are_exact(rng: np.random.Generator, act_group: int) -> None:
    weights = random_weights(rng, "Int4ResidualMatMul", 96, 21, 0, 32)
    weights["scales"] = (2.0 ** rng.integers(-3, 4, 21)).astype(np.float16)
    weights["bias"] = rng.integers(-9, 9, 21).astype(np.float32)
    attributes = {"group_size": 32, "act_bits": 4, "act_group": act_group}
    x = rng.integers(-7, 9, (2, 4, 96)).astype(np.float32)
    x[..., ::32], x[..., 1::32] = -7, 8  # a range of 15: the scale is 1, so that nothing is rounded
    (y,) = session(op_model("Int4ResidualMatMul", 96, weights, np.float32, attributes)).run(None, {"x": x})
    scales = weights["scales"].astype(np.float64) * unpack_group_scales(weights["group_scales"], 3, 21)
    weight = np.repeat(scales, 32, axis=0) * unpack_int4(weights["qweight"], 96, 21)
    np.testing.assert_array_equal(y, x @ weight + weights["bias"])


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("act_group", [0, 16])
def test_a_value_that_is_not_finite_spoils_its_token_only(
    rng: np.random.Generator, value: float, act_group: int
) -> None:
    weights = random_weights(rng, "Int4ResidualMatMul", 48, 21, 0, 0)
    attributes = {"group_size": 0, "act_bits": 4, "act_group": act_group}
    x = rng.standard_normal((48, 2, 48)).astype(np.float32)
    x[range(48), 1, range(48)] = value
    (y,) = session(op_model("Int4ResidualMatMul", 48, weights, np.float32, attributes)).run(None, {"x": x})
    assert np.isnan(y[:, 1]).all()
    assert np.isfinite(y[:, 0]).all()


@pytest.mark.parametrize("op", ["Int4ResidualMatMul", "SpecQuantMatMul"])
@pytest.mark.parametrize("bits", [4, 16])
def test_weights_are_unpacked_when_the_session_is_made(
    rng: np.random.Generator, tmp_path: Path, op: str, bits: int
) -> None:
    weights = random_weights(rng, op, 48, 37, 7, 16)
    model = op_model(op, 48, weights, np.float32, attributes_of(op, 16, bits, 16, 1))
    session(model, tmp_path / "optimised.onnx")
    graph = onnx.load(tmp_path / "optimised.onnx").graph
    kept = {(tuple(tensor.dims), tensor.data_type) for tensor in graph.initializer}
    assert ((48, 37), onnx.TensorProto.FLOAT) in kept
    assert not any(kind == onnx.TensorProto.INT8 for _, kind in kept)
    assert not {"If", "BitwiseAnd", "Transpose", "Slice"} & {node.op_type for node in graph.node}


@pytest.mark.parametrize(("op", "subtract"), VARIANTS)
@pytest.mark.parametrize("float_type", [np.float32, np.float16])
def test_functions_pass_the_checker(rng: np.random.Generator, op: str, subtract: int | None, float_type: type) -> None:
    weights = random_weights(rng, op, 48, 37, 7, 16)
    model = op_model(op, 48, weights, float_type, attributes_of(op, 16, 4, 8, subtract))
    onnx.checker.check_model(model, full_check=True)
    onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True, data_prop=True)


def test_functions_are_made_of_standard_operators() -> None:
    for function in function_protos(set(OPS)):
        schema = OPS[function.name]
        assert list(function.input) == [tensor.name for tensor in schema.inputs]
        assert list(function.output) == [tensor.name for tensor in schema.outputs]
        assert {node.domain for node in function.node} <= {"", "specquant"}


@pytest.mark.parametrize(
    ("used", "attached"),
    [
        ({"Int4ResidualMatMul"}, ["Int4ResidualMatMul"]),
        ({"SpecQuantMatMul"}, ["SpectralBranch", "Int4ResidualMatMul", "SpecQuantMatMul"]),
        (set(), []),
    ],
)
def test_only_what_is_called_is_attached(used: set[str], attached: list[str]) -> None:
    assert [function.name for function in function_protos(used)] == attached
