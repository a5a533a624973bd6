"""The ops inside ONNX Runtime on its CUDA provider, or by the emulated kernels on its CPU provider (docs/cuda.md)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

pytest.importorskip("onnxruntime")
import onnxruntime as ort

from specquant.custom_ops import library
from specquant.custom_ops.schema import OPS, PROLOGUES
from tests.attention import HALF, INT4, call_model, random_call
from tests.cuda_arrays import EMULATED, require_kernels
from tests.ops import REFERENCE, op_model, random_input, random_weights

require_kernels()
PROVIDER, DEVICE = ("CPUExecutionProvider", "cpu") if EMULATED else ("CUDAExecutionProvider", "cuda")
if PROVIDER not in ort.get_available_providers():
    pytest.skip("onnxruntime-gpu is not installed", allow_module_level=True)
if EMULATED and not os.environ.get("SPECQUANT_LIBRARY"):
    pytest.skip("the emulated ONNX Runtime library was not built: --ort", allow_module_level=True)

ATTRIBUTES: dict[str, Any] = {"group_size": 16, "act_bits": 4, "act_group": 8, "act_clip": 0.75, "hadamard": 16}
ATTRIBUTES |= {"subtract": 1, "prologue": 0, "epsilon": 0.25, "gate": 0}


def session(model: onnx.ModelProto, profile: Path | None = None, **provider: str) -> Any:
    options = ort.SessionOptions()
    options.log_severity_level = 4
    if profile:
        options.enable_profiling, options.profile_file_prefix = True, str(profile)
    library.register(options)
    made = ort.InferenceSession(model.SerializeToString(), options, providers=[(PROVIDER, provider)])
    assert PROVIDER in made.get_providers()
    return made


def matmul_case(rng: np.random.Generator, op: str, float_type: Any, **changes: int) -> tuple[Any, Any, dict[str, Any]]:
    """A model of one op, its weights and attributes, N = 128, M = 40."""
    attributes = {a.name: (ATTRIBUTES | changes)[a.name] for a in OPS[op].attributes}
    weights = random_weights(rng, op, 128, 40, 7, attributes["group_size"])
    return op_model(op, 128, weights, float_type, attributes), weights, attributes


@pytest.mark.parametrize("op", ["Int4ResidualMatMul", "SpecQuantMatMul"])
@pytest.mark.parametrize("float_type", [np.float32, np.float16])
def test_matmul_equals_reference(rng: np.random.Generator, op: str, float_type: Any) -> None:
    for changes in ({}, {"group_size": 64, "act_group": 64, "hadamard": 64}, {"group_size": 0, "act_group": 0}):
        model, weights, attributes = matmul_case(rng, op, float_type, **changes)
        run = session(model)
        for shape in ((2, 5, 128), (1, 1, 128), (3, 0, 128)):
            x = random_input(rng, shape, float_type)
            expected = REFERENCE[op](x, **weights, **attributes)
            (y,) = run.run(None, {"x": x})
            assert (y.dtype, y.shape) == (expected.dtype, expected.shape)
            size = max(float(np.abs(expected.astype(np.float32)).max(initial=0)), 1.0)
            tolerance = 1e-5 if float_type is np.float32 else 2**-9
            np.testing.assert_allclose(y, expected, rtol=0, atol=tolerance * size)


@pytest.mark.parametrize("prologue", range(len(PROLOGUES)))
@pytest.mark.parametrize("float_type", [np.float32, np.float16])
def test_prologue_and_residual(rng: np.random.Generator, prologue: int, float_type: Any) -> None:
    op = "SpecQuantMatMul"
    _, weights, attributes = matmul_case(rng, op, float_type, prologue=prologue, act_bits=16)
    weights["norm"] = (rng.uniform(-2, 2, 128) if prologue == 1 else np.zeros(1)).astype(np.float32)
    for residual in (rng.standard_normal((2, 5, 40)), np.zeros(1)):
        weights["residual"] = residual.astype(float_type)
        x = random_input(rng, (2, 5, 128), float_type)
        (y,) = session(op_model(op, 128, weights, float_type, attributes)).run(None, {"x": x})
        expected = REFERENCE[op](x, **weights, **attributes)
        size = max(float(np.abs(expected.astype(np.float32)).max()), 1.0)
        tolerance = 1e-3 if float_type is np.float32 else 4e-3  # activations are float16 inside
        np.testing.assert_allclose(y, expected, rtol=0, atol=tolerance * size)


@pytest.mark.parametrize("gate", [1, 2])
@pytest.mark.parametrize("op", ["Int4ResidualMatMul", "SpecQuantMatMul"])
def test_gate(rng: np.random.Generator, op: str, gate: int) -> None:
    """y has half as many outputs, of every shape of x."""
    model, weights, attributes = matmul_case(rng, op, np.float32, gate=gate)
    run = session(model)
    for shape in ((2, 5, 128), (1, 1, 128), (3, 0, 128)):
        x = random_input(rng, shape)
        expected = REFERENCE[op](x, **weights, **attributes)
        (y,) = run.run(None, {"x": x})
        assert y.shape == expected.shape == (*shape[:2], 20)
        np.testing.assert_allclose(y, expected, rtol=0, atol=1e-5 * np.abs(expected).max(initial=1))


@pytest.mark.parametrize("float_type", [np.float32, np.float16])
def test_branch_equals_reference(rng: np.random.Generator, float_type: Any) -> None:
    """Any rank of the host, beyond the columns too; y and low."""
    weights = random_weights(rng, "SpectralBranch", 128, 40, 7)
    run = session(op_model("SpectralBranch", 128, weights, float_type, {}))
    for rank, shape in ((7, (2, 5, 128)), (3, (1, 1, 128)), (0, (1, 2, 128)), (99, (1, 2, 128)), (7, (3, 0, 128))):
        x, weights["rank"] = random_input(rng, shape, float_type), np.array([rank])
        found = run.run(None, {"x": x, "rank": weights["rank"]})
        expected = REFERENCE["SpectralBranch"](x, **weights)
        for actual, wanted in zip(found, expected, strict=True):
            assert (actual.dtype, actual.shape) == (wanted.dtype, wanted.shape)
            size = max(float(np.abs(wanted.astype(np.float32)).max(initial=0)), 1.0)
            tolerance = 1e-5 if float_type is np.float32 else 2**-9
            np.testing.assert_allclose(actual, wanted, rtol=0, atol=tolerance * size)


@pytest.mark.parametrize("rank", [-1, 0, 3, 99])
def test_rank_is_an_input_of_the_host(rng: np.random.Generator, rank: int) -> None:
    model, weights, attributes = matmul_case(rng, "SpecQuantMatMul", np.float32)
    x, weights["rank"] = random_input(rng, (1, 3, 128)), np.array([rank])
    (y,) = session(model).run(None, {"x": x, "rank": weights["rank"]})
    expected = REFERENCE["SpecQuantMatMul"](x, **weights, **attributes)
    np.testing.assert_allclose(y, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("op", [INT4, HALF])
@pytest.mark.parametrize(("past", "new"), [([0], [37]), ([13, 0, 70], [1, 1, 1]), ([20, 3], [9, 4])])
@pytest.mark.parametrize("float_type", [np.float32, np.float16])
def test_attention_equals_reference(
    rng: np.random.Generator, op: str, past: list[int], new: list[int], float_type: Any
) -> None:
    call = random_call(rng, past, new, op=op, hadamard=1, clip=0.9, spare=2, float_type=float_type)
    y, *caches = session(call_model(call)).run(None, call.inputs)
    expected, *expected_caches = call.expected()
    tolerance = 1e-5 if float_type is np.float32 else 5e-3
    np.testing.assert_allclose(y, expected, rtol=0, atol=tolerance * np.abs(expected.astype(np.float32)).max())
    for cache, wanted in zip(caches, expected_caches, strict=True):
        np.testing.assert_array_equal(call.rows(cache), call.rows(wanted))


@pytest.mark.parametrize("op", [INT4, HALF])
def test_a_cache_is_extended_where_it_lies(rng: np.random.Generator, op: str) -> None:
    call = random_call(rng, [21, 3], [1, 1], op=op, hadamard=1, spare=6)
    run, expected = session(call_model(call)), call.expected()
    binding, cache = run.io_binding(), {}
    for name, array in call.inputs.items():
        if name == "total_sequence_length":
            binding.bind_cpu_input(name, array)
            continue
        value = ort.OrtValue.ortvalue_from_numpy(array, DEVICE, 0)
        binding.bind_ortvalue_input(name, value)
        if name.startswith("past_"):
            cache[name] = value
            binding.bind_ortvalue_output(name.replace("past_", "present_"), value)
    binding.bind_output("y", DEVICE)
    run.run_with_iobinding(binding)
    y = binding.get_outputs()[-1].numpy()
    np.testing.assert_allclose(y, expected[0], rtol=0, atol=1e-5 * np.abs(expected[0]).max())
    for value, wanted in zip(cache.values(), expected[1:], strict=True):
        np.testing.assert_array_equal(call.rows(value.numpy()), call.rows(wanted))


def test_what_does_not_fit_is_one_line(rng: np.random.Generator) -> None:
    call = random_call(rng, [4], [2], op=INT4)
    inputs = call.inputs | {"total_sequence_length": np.array(99, np.int32)}
    with pytest.raises(Exception, match="Int4KVAttention: total_sequence_length exceeds the cache") as error:
        session(call_model(call)).run(None, inputs)
    assert "\n" not in str(error.value).strip()


def test_without_the_kernels_a_session_says_so(rng: np.random.Generator, tmp_path: Path) -> None:
    """They are opened when a node is made; what is missing is no reason to compute elsewhere."""
    model, _, _ = matmul_case(rng, "Int4ResidualMatMul", np.float32)
    onnx.save(model, tmp_path / "model.onnx")
    program = (
        "import sys; import onnxruntime as ort; from specquant.custom_ops import library; o = ort.SessionOptions(); "
        "o.log_severity_level = 4; library.register(o); ort.InferenceSession(sys.argv[1], o, providers=[sys.argv[2]])"
    )
    variables = os.environ | {"SPECQUANT_CUDA_LIBRARY": str(tmp_path / "none.so")}
    command = [sys.executable, "-c", program, str(tmp_path / "model.onnx"), PROVIDER]
    done = subprocess.run(command, env=variables, capture_output=True, text=True)
    assert done.returncode
    assert "Int4ResidualMatMul: no CUDA kernels" in done.stderr


@pytest.mark.skipif(EMULATED, reason="there is one provider")
def test_nodes_run_on_the_gpu(rng: np.random.Generator, tmp_path: Path) -> None:
    call = random_call(rng, [4], [2], op=INT4)
    run = session(call_model(call), profile=tmp_path / "profile")
    run.run(None, call.inputs)
    events = json.loads(Path(run.end_profiling()).read_text())
    where = {e["args"]["op_name"]: e["args"].get("provider") for e in events if "op_name" in e.get("args", {})}
    assert where[INT4] == PROVIDER


@pytest.mark.skipif(EMULATED, reason="CUDA graphs are of GPUs")
@pytest.mark.parametrize("op", ["SpecQuantMatMul", INT4])
def test_calls_are_replayed_as_a_graph(rng: np.random.Generator, op: str) -> None:
    """Recorded after some runs, then replayed with what has been written to the same memory since."""
    if op == INT4:
        calls = [random_call(rng, [n], [1], op=INT4, hadamard=1, spare=40 - n) for n in range(20, 26)]
        model, feeds = call_model(calls[0]), [call.inputs for call in calls]
        expected = [call.expected()[0] for call in calls]
    else:
        model, weights, attributes = matmul_case(rng, op, np.float32)
        feeds = [{"x": random_input(rng, (1, 2, 128))} for _ in range(6)]
        expected = [REFERENCE[op](feed["x"], **weights, **attributes) for feed in feeds]
    run = session(model, enable_cuda_graph="1")
    binding, values = run.io_binding(), {}
    for name, array in feeds[0].items():
        if name == "total_sequence_length":
            binding.bind_cpu_input(name, array)
        else:
            values[name] = ort.OrtValue.ortvalue_from_numpy(array, DEVICE, 0)
            binding.bind_ortvalue_input(name, values[name])
    outputs = {"y": ort.OrtValue.ortvalue_from_numpy(np.zeros_like(expected[0]), DEVICE, 0)}
    if op == INT4:
        outputs |= {f"present_{part}": values[f"past_{part}"] for part in ("key", "value")}
    for name, value in outputs.items():
        binding.bind_ortvalue_output(name, value)
    for feed, wanted in zip(feeds, expected, strict=True):
        for name, value in values.items():
            value.update_inplace(np.ascontiguousarray(feed[name]))
        run.run_with_iobinding(binding)
        np.testing.assert_allclose(outputs["y"].numpy(), wanted, rtol=0, atol=1e-4 * np.abs(wanted).max())
