"""The ops inside ONNX Runtime with our library registered, against the reference."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from specquant.custom_ops import library
from specquant.custom_ops.errors import SpecQuantError
from specquant.custom_ops.schema import GATES, OPS, PROLOGUES
from tests.ops import REFERENCE, Arrays, op_model, random_input, random_weights

ort = pytest.importorskip("onnxruntime")
try:
    library.library_path()
except SpecQuantError as missing:
    pytest.skip(str(missing), allow_module_level=True)

ATTRIBUTES: dict[str, Any] = {
    "group_size": 16,
    "act_bits": 4,
    "act_group": 8,
    "act_clip": 0.75,
    "hadamard": 16,
    "subtract": 1,
    "prologue": 0,
    "epsilon": 1e-5,
    "gate": 0,
}


def attributes_of(op: str, **changes: float) -> dict[str, Any]:
    return {attribute.name: (ATTRIBUTES | changes)[attribute.name] for attribute in OPS[op].attributes}


def session(model: onnx.ModelProto, threads: int = 1, ours: bool = True, profile: Path | None = None) -> Any:
    options = ort.SessionOptions()
    options.log_severity_level = 4  # the errors that a test provokes need not be printed
    options.intra_op_num_threads = threads
    if profile:
        options.enable_profiling, options.profile_file_prefix = True, str(profile)
    if ours:
        library.register(options)
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def expected_outputs(op: str, x: np.ndarray, weights: Arrays, attributes: dict[str, int]) -> list[np.ndarray]:
    expected = REFERENCE[op](x, **weights, **attributes)
    return list(expected) if isinstance(expected, tuple) else [expected]


@pytest.mark.parametrize("op", REFERENCE)
@pytest.mark.parametrize("float_type", [np.float32, np.float16])
@pytest.mark.parametrize("long", [False, True])
def test_op_equals_reference(rng: np.random.Generator, op: str, float_type: type, long: bool) -> None:
    n, groups = (4104, {"group_size": 0, "act_group": 0, "hadamard": 0}) if long else (48, {})
    attributes = attributes_of(op, **groups)
    weights = random_weights(rng, op, n, 37, 7, attributes.get("group_size", 0))
    run = session(op_model(op, n, weights, float_type, attributes))
    for shape in ((2, 5, n), (1, 1, n), (3, 0, n)):
        x = random_input(rng, shape, float_type)
        for output, value in zip(run.run(None, {"x": x}), expected_outputs(op, x, weights, attributes), strict=True):
            assert (output.dtype, output.shape) == (value.dtype, value.shape)
            size = max(float(np.abs(value.astype(np.float32)).max(initial=0)), 1.0)
            tolerance = 1e-5 if float_type is np.float32 else 2**-10
            np.testing.assert_allclose(output, value, rtol=0, atol=tolerance * size)


@pytest.mark.parametrize("op", list(REFERENCE)[1:])
@pytest.mark.parametrize("prologue", range(len(PROLOGUES)))
@pytest.mark.parametrize("float_type", [np.float32, np.float16])
def test_prologue_and_residual(rng: np.random.Generator, op: str, prologue: int, float_type: type) -> None:
    attributes = attributes_of(op, prologue=prologue, act_bits=16, epsilon=0.25)
    weights = random_weights(rng, op, 48, 37, 7, 16)
    weights["norm"] = (rng.uniform(-2, 2, 48) if prologue == 1 else np.zeros(1)).astype(np.float32)
    for shape in ((2, 5), (1, 1), (3, 0)):
        x = random_input(rng, (*shape, 48), float_type)
        for residual in (rng.standard_normal((*shape, 37)), np.zeros(1)):
            weights["residual"] = residual.astype(float_type)
            (y,) = session(op_model(op, 48, weights, float_type, attributes)).run(None, {"x": x})
            (expected,) = expected_outputs(op, x, weights, attributes)
            assert (y.dtype, y.shape) == (expected.dtype, expected.shape)
            size = max(float(np.abs(expected.astype(np.float32)).max(initial=0)), 1.0)
            tolerance = 1e-5 if float_type is np.float32 else 2e-3
            np.testing.assert_allclose(y, expected, rtol=0, atol=tolerance * size)


@pytest.mark.parametrize("op", list(REFERENCE)[1:])
@pytest.mark.parametrize("gate", range(1, len(GATES)))
@pytest.mark.parametrize("float_type", [np.float32, np.float16])
def test_gate(rng: np.random.Generator, op: str, gate: int, float_type: type) -> None:
    attributes = attributes_of(op, gate=gate)
    weights = random_weights(rng, op, 48, 38, 7, 16)
    model = op_model(op, 48, weights, float_type, attributes)
    model.graph.output[0].type.tensor_type.ClearField("shape")  # the op's own inference says it
    run = session(model)
    assert run.get_outputs()[0].shape == ["a", "b", 19]
    for shape in ((2, 5), (1, 1), (3, 0)):
        x = random_input(rng, (*shape, 48), float_type)
        (y,), (expected,) = run.run(None, {"x": x}), expected_outputs(op, x, weights, attributes)
        assert (y.dtype, y.shape) == (expected.dtype, expected.shape)
        size = max(float(np.abs(expected.astype(np.float32)).max(initial=0)), 1.0)
        np.testing.assert_allclose(y, expected, rtol=0, atol=(1e-5 if float_type is np.float32 else 2e-3) * size)


@pytest.mark.parametrize("rank", [-1, 0, 3, 7, 99])
def test_rank_is_an_input(rng: np.random.Generator, rank: int) -> None:
    attributes = attributes_of("SpecQuantMatMul", act_bits=8)
    weights = random_weights(rng, "SpecQuantMatMul", 48, 37, 7, 16)
    run = session(op_model("SpecQuantMatMul", 48, weights, np.float32, attributes))
    x, weights["rank"] = random_input(rng, (1, 3, 48)), np.array([rank])
    (y,) = run.run(None, {"x": x, "rank": weights["rank"]})
    (expected,) = expected_outputs("SpecQuantMatMul", x, weights, attributes)
    np.testing.assert_allclose(y, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_threads_do_not_change_a_bit(rng: np.random.Generator) -> None:
    attributes = attributes_of("SpecQuantMatMul", group_size=64, act_group=64)
    weights = random_weights(rng, "SpecQuantMatMul", 512, 1000, 31, 64)
    model = op_model("SpecQuantMatMul", 512, weights, np.float32, attributes)
    one, four = session(model, 1), session(model, 4)
    for tokens in (1, 1, 1, 2, 8, 9, 70):  # up to 8 are prepared by one thread while the others fetch weights
        x = rng.standard_normal((1, tokens, 512)).astype(np.float32)
        np.testing.assert_array_equal(one.run(None, {"x": x})[0], four.run(None, {"x": x})[0])


def test_a_bias_of_zeros(rng: np.random.Generator) -> None:
    attributes = attributes_of("SpecQuantMatMul", act_bits=8)
    weights = random_weights(rng, "SpecQuantMatMul", 48, 37, 7, 16) | {"bias": np.zeros(37, np.float32)}
    run, x = session(op_model("SpecQuantMatMul", 48, weights, np.float32, attributes)), random_input(rng, (1, 3, 48))
    (expected,) = expected_outputs("SpecQuantMatMul", x, weights, attributes)
    np.testing.assert_allclose(run.run(None, {"x": x})[0], expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def nodes_run(run: Any) -> set[str]:
    events = json.loads(Path(run.end_profiling()).read_text())
    return {event["args"]["op_name"] for event in events if "op_name" in event.get("args", {})}


@pytest.mark.parametrize("op", REFERENCE)
def test_our_kernel_runs_where_it_is_registered_and_the_function_elsewhere(
    rng: np.random.Generator, tmp_path: Path, op: str
) -> None:
    attributes = attributes_of(op)
    weights = random_weights(rng, op, 48, 37, 7, 16)
    model = op_model(op, 48, weights, np.float32, attributes)
    x = random_input(rng, (2, 3, 48))
    with_us = session(model, profile=tmp_path / "with")
    without = session(model, ours=False, profile=tmp_path / "without")
    y, fallback = with_us.run(None, {"x": x})[0], without.run(None, {"x": x})[0]
    assert nodes_run(with_us) == {op}
    assert "MatMul" in (ran := nodes_run(without))
    assert op not in ran
    np.testing.assert_allclose(y, fallback, rtol=0, atol=1e-5 * np.abs(y).max())


def test_shapes_are_inferred(rng: np.random.Generator, tmp_path: Path) -> None:
    weights = random_weights(rng, "SpecQuantMatMul", 48, 37, 7, 16)
    model = op_model("SpecQuantMatMul", 48, weights, np.float32, attributes_of("SpecQuantMatMul"))
    model.graph.output[0].type.tensor_type.ClearField("shape")
    assert session(model).get_outputs()[0].shape == ["a", "b", 37]
    model.graph.input[0].type.tensor_type.ClearField("shape")  # then nothing can be said, and it still runs
    x = random_input(rng, (4, 48))
    assert session(model).run(None, {"x": x})[0].shape == (4, 37)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bias": np.ones(36, np.float32)}, r"bias is \[36\] and should be \[37\]"),
        ({"residual": np.ones((1, 2, 36), np.float32)}, r"residual is \[1, 2, 36\] and should be \[1, 2, 37\]"),
        ({"residual": np.ones(1, np.float32)}, r"residual is \[1\] and should be \[1, 2, 37\]"),
        ({"qweight": np.ones((3, 5, 64), np.int8)}, r"qweight is \[3, 5, 64\] and should be \[3, 6, 64\]"),
        ({"group_scales": np.ones((3, 2, 8), np.int8)}, r"group_scales is \[3, 2, 8\] and should be \[3, 3, 8\]"),
        ({"scales": np.ones(36, np.float16)}, r"coef is \[7, 37\] and should be \[7, 36\]"),
        ({"basis": np.ones((40, 7), np.float16)}, r"basis is \[40, 7\] and should be \[48, 7\]"),
        ({"coef": np.ones((7, 36), np.float16)}, r"coef is \[7, 36\] and should be \[7, 37\]"),
    ],
)
def test_shapes_that_do_not_fit_are_one_line(rng: np.random.Generator, changes: Arrays, message: str) -> None:
    weights = random_weights(rng, "SpecQuantMatMul", 48, 37, 7, 16) | changes
    model = op_model("SpecQuantMatMul", 48, weights, np.float32, attributes_of("SpecQuantMatMul"))
    model.graph.output[0].type.tensor_type.ClearField("shape")
    with pytest.raises(Exception, match=rf"SpecQuantMatMul: {message}") as error:
        session(model).run(None, {"x": random_input(rng, (1, 2, 48))})
    assert "\n" not in str(error.value).strip()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prologue": 7}, "prologue must be 0 or 1"),
        ({"prologue": 1}, r"norm is \[1\] and should be \[48\]"),
        ({"prologue": 1, "epsilon": -1.0}, "epsilon must be at least 0"),
        ({"gate": 3}, "gate must be 0 to 2"),
        ({"gate": 1}, "with a gate, out-features must be even"),
        ({"hadamard": 24}, "hadamard must be 0, or a power of two"),
        ({"hadamard": -16}, "hadamard must be 0, or a power of two"),
        ({"act_clip": 0.0}, "act_clip must be more than 0"),
        ({"group_size": 20}, "group_size and act_group must be 0, or a divisor"),
        ({"group_size": 40}, "group_size and act_group must be 0, or a divisor"),
        ({"act_group": -8}, "group_size and act_group must be 0, or a divisor"),
        ({"act_group": 24}, "one of group_size and act_group must divide the other"),
        ({"act_bits": 1}, "act_bits must be 2 to 8, or 16"),
        ({"act_bits": 2**33 + 4}, "act_bits must be 2 to 8, or 16"),
    ],
)
def test_attributes_that_do_not_fit_are_one_line(
    rng: np.random.Generator, changes: dict[str, int], message: str
) -> None:
    weights = random_weights(rng, "Int4ResidualMatMul", 48, 37, 0, 16)
    model = op_model("Int4ResidualMatMul", 48, weights, np.float32, attributes_of("Int4ResidualMatMul") | changes)
    with pytest.raises(Exception, match=f"Int4ResidualMatMul: {message}"):
        session(model).run(None, {"x": random_input(rng, (1, 2, 48))})


def test_an_instruction_set_can_be_forced(rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = random_weights(rng, "Int4ResidualMatMul", 48, 37, 0, 16)
    attributes = attributes_of("Int4ResidualMatMul")
    model = op_model("Int4ResidualMatMul", 48, weights, np.float32, attributes)
    x = random_input(rng, (1, 2, 48))
    monkeypatch.setenv("SPECQUANT_ISA", "scalar")
    (y,) = session(model).run(None, {"x": x})
    arguments = {**weights, **attributes, "isa": "scalar"}
    np.testing.assert_array_equal(y[0], library.specquant_matmul(x[0], **arguments)[0])
    monkeypatch.setenv("SPECQUANT_ISA", "sse9")
    with pytest.raises(SpecQuantError, match=r"SPECQUANT_ISA is sse9.*scalar"):
        session(model)
