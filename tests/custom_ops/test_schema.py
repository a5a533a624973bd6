"""The op set as data, and what the onnx package makes of it."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import onnx
import pytest
from onnx import shape_inference
from onnx.reference import ReferenceEvaluator

from specquant.custom_ops.onnx_binding import reference_ops, register_schemas
from specquant.custom_ops.schema import GATES, OPS, PROLOGUES
from tests.ops import REFERENCE, Arrays, op_model, random_weights

N, M, RANK = 48, 37, 5


def attributes_of(op: str) -> dict[str, int]:
    given = {"group_size": 16, "act_bits": 4, "act_group": 8, "act_clip": 0.5, "hadamard": 16, "subtract": 1}
    given |= {"prologue": 0, "epsilon": 1e-5, "gate": 0}
    return {attribute.name: given[attribute.name] for attribute in OPS[op].attributes}


def model_without_function(op: str, weights: Arrays) -> onnx.ModelProto:
    return without_function(op_model(op, N, weights, np.float32, attributes_of(op)))


def without_function(model: onnx.ModelProto) -> onnx.ModelProto:
    del model.functions[:]
    return model


@pytest.fixture(autouse=True)
def _registered() -> None:
    register_schemas()
    register_schemas()  # a second time does nothing


@pytest.mark.parametrize("op", REFERENCE)
def test_checker_and_shape_inference_know_the_ops(rng: np.random.Generator, op: str) -> None:
    model = model_without_function(op, random_weights(rng, op, N, M, RANK, 16))
    for output in model.graph.output:
        output.type.tensor_type.shape.dim[-1].dim_param = "unknown"
    onnx.checker.check_model(model, full_check=True)
    inferred = shape_inference.infer_shapes(model, check_type=True, strict_mode=True)
    widths = [output.type.tensor_type.shape.dim[-1].dim_value for output in inferred.graph.output]
    assert widths == [M, RANK][: len(widths)]


@pytest.mark.parametrize("op", REFERENCE)
def test_checker_refuses_what_the_schema_does_not_have(rng: np.random.Generator, op: str) -> None:
    weights = random_weights(rng, op, N, M, RANK, 16)
    model = model_without_function(op, weights)
    model.graph.node[0].attribute.append(onnx.helper.make_attribute("groups", 3))
    with pytest.raises(onnx.checker.ValidationError, match="groups"):
        onnx.checker.check_model(model)
    model = model_without_function(op, weights)
    del model.graph.node[0].input[len(OPS[op].inputs) - 1 :]
    with pytest.raises(onnx.checker.ValidationError, match="input"):
        onnx.checker.check_model(model)


@pytest.mark.parametrize(
    ("op", "wrong"), [("SpectralBranch", "coef"), ("Int4ResidualMatMul", "scales"), ("SpecQuantMatMul", "bias")]
)
def test_shape_inference_refuses_sizes_that_disagree(rng: np.random.Generator, op: str, wrong: str) -> None:
    weights = random_weights(rng, op, N, M, RANK, 16)
    weights[wrong] = np.concatenate([weights[wrong], weights[wrong]], axis=-1)
    weights |= {"basis": weights["basis"][:, :-1]} if wrong == "coef" else {}
    with pytest.raises(shape_inference.InferenceError, match=op):
        onnx.checker.check_model(model_without_function(op, weights), full_check=True)


@pytest.mark.parametrize("op", REFERENCE)
@pytest.mark.parametrize("float_type", [np.float32, np.float16])
def test_reference_evaluator_runs_the_reference(rng: np.random.Generator, op: str, float_type: type) -> None:
    weights = random_weights(rng, op, N, M, RANK, 16)
    model = op_model(op, N, weights, float_type, attributes_of(op))
    x = rng.standard_normal((2, 3, N)).astype(float_type)
    outputs = ReferenceEvaluator(model, new_ops=reference_ops()).run(None, {"x": x, "rank": np.array([3])})
    expected = REFERENCE[op](
        x, **(weights | ({"rank": np.array([3])} if "rank" in weights else {})), **attributes_of(op)
    )
    for output, value in zip(outputs, expected if isinstance(expected, tuple) else [expected], strict=True):
        np.testing.assert_array_equal(output, value)


@pytest.mark.parametrize("op", list(REFERENCE)[1:])
def test_shape_inference_of_prologue_and_residual(rng: np.random.Generator, op: str) -> None:
    arrays = random_weights(rng, op, N, M, RANK, 16)
    arrays |= {"residual": rng.standard_normal((2, 3, M)).astype(np.float32)}
    for prologue in range(len(PROLOGUES)):
        norm = N if prologue == 1 else 1
        weights = arrays | {"norm": np.ones(norm, np.float32)}
        attributes = attributes_of(op) | {"prologue": prologue}
        for changes, accepted in (({}, True), ({"norm": np.ones(N - 8, np.float32)}, False)):
            model = without_function(op_model(op, N, weights | changes, np.float32, attributes))
            if accepted:
                onnx.checker.check_model(model, full_check=True)
            else:
                with pytest.raises(shape_inference.InferenceError, match=op):
                    onnx.checker.check_model(model, full_check=True)
        if op == "SpecQuantMatMul":  # whose basis says what N is
            model = without_function(op_model(op, N + 16, weights, np.float32, attributes))
            with pytest.raises(shape_inference.InferenceError, match="N is 48 in basis"):
                onnx.checker.check_model(model, full_check=True)


@pytest.mark.parametrize("op", list(REFERENCE)[1:])
@pytest.mark.parametrize("gate", range(len(GATES)))
def test_shape_inference_of_a_gate(rng: np.random.Generator, op: str, gate: int) -> None:
    model = op_model(op, N, random_weights(rng, op, N, 38, RANK, 16), np.float32, attributes_of(op) | {"gate": gate})
    model.graph.output[0].type.tensor_type.shape.dim[-1].dim_param = "unknown"
    inferred = shape_inference.infer_shapes(without_function(model), check_type=True, strict_mode=True)
    assert inferred.graph.output[0].type.tensor_type.shape.dim[-1].dim_value == (19 if gate else 38)


def test_a_device_needs_no_onnx() -> None:
    code = "import sys; sys.modules['onnx'] = None; import specquant.custom_ops.schema, specquant.custom_ops.reference"
    subprocess.run([sys.executable, "-c", code], check=True)
