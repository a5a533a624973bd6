"""`Int4KVAttention`: its reference, the packed cache rows, the kernels of every instruction set, and its function."""

from __future__ import annotations

import ctypes
from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray

from specquant.custom_ops import library
from specquant.custom_ops.attention import rotary, walsh_hadamard
from specquant.custom_ops.errors import SpecQuantError
from specquant.custom_ops.kv_rows import pack_rows, quantize_rows, row_bytes, unpack_rows
from specquant.custom_ops.library_attention import _Attention, int4_kv_attention
from tests.attention import Call, call_model, random_call

try:
    ISAS = [name for name, supported in library.isas().items() if supported]
except SpecQuantError as missing:
    pytest.skip(str(missing), allow_module_level=True)

# past and new tokens of each row, and what differs from 6 heads on 2 of 64.
CALLS: dict[str, tuple[list[int], list[int], dict[str, Any]]] = {
    "prefill": ([0], [37], {"heads": 9, "kv_heads": 3}),
    "unequal prompts": ([0, 0, 0], [9, 4, 1], {"head_dim": 128, "heads": 4, "kv_heads": 4}),
    "chunk": ([70], [45], {"spare": 3}),
    "step": ([13, 0, 300], [1, 1, 1], {"spare": 5}),
    "long step": ([2100, 1030], [1, 1], {"heads": 5, "kv_heads": 1, "head_dim": 32}),
    "blocks": ([255], [260], {"heads": 2, "kv_heads": 2, "head_dim": 16}),
    "window": ([19], [40], {"window": 7}),
    "window step": ([2500], [1], {"window": 1100, "spare": 1}),
    "many heads": ([4], [3], {"heads": 26, "kv_heads": 2, "head_dim": 16, "scale": 0.4}),
    "head of 80": ([20], [11], {"head_dim": 80, "rotary": 8}),
    "head of 256": ([3], [5], {"head_dim": 256, "heads": 2, "kv_heads": 1}),
    "no rotary": ([3], [5], {"rotary": 0}),
    "float16": ([50], [13], {"float_type": np.float16}),
}


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def call_of(rng: np.random.Generator, kind: str) -> Call:
    past, new, options = CALLS[kind]
    head_dim = options.get("head_dim", 64)
    hadamard = int(rng.integers(2)) if head_dim & (head_dim - 1) == 0 else 0
    return random_call(rng, past, new, hadamard=hadamard, clip=float(rng.choice([1.0, 0.93, 0.5])), **options)


def check(call: Call, outputs: list[NDArray[Any]]) -> None:
    """y close, cache rows equal, padding 0."""
    y, *caches = outputs
    expected, *expected_caches = call.expected()
    assert (y.dtype, y.shape) == (expected.dtype, expected.shape)
    tolerance = 1e-4 if y.dtype == np.float32 else 2e-3
    np.testing.assert_allclose(y, expected, rtol=0, atol=tolerance * np.abs(expected.astype(np.float32)).max())
    added = call.inputs["seqlens_k"] + 1 - call.past
    for b, count in enumerate(added):
        assert not y[b, count:].any()
    for cache, expected_cache in zip(caches, expected_caches, strict=True):
        assert cache.shape == expected_cache.shape
        np.testing.assert_array_equal(call.rows(cache), call.rows(expected_cache))


# --- rows of the cache ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spread", [1e-7, 1e-3, 1.0, 3e3])
def test_rows_are_rounded_to_the_nearest_of_16_levels(rng: np.random.Generator, spread: float) -> None:
    x = (spread * (rng.standard_normal((50, 48)) + rng.uniform(-4, 4, (50, 1)))).astype(np.float32)
    rows = pack_rows(x)
    assert rows.shape == (50, row_bytes(48)) == (50, 28)
    step = (x.max(-1, keepdims=True) - x.min(-1, keepdims=True)) / 15
    # Half a step, and what float16 adds: 2^-11 of low and of 15 steps, or half of the smallest float16, 2^-25.
    bound = step / 2 + 2.0**-11 * (np.abs(x).max(-1, keepdims=True) + 15 * step) + 16 * 2.0**-25
    assert (np.abs(unpack_rows(rows) - x) <= bound).all()
    q, scale, low = quantize_rows(x)
    np.testing.assert_array_equal(unpack_rows(rows), low.astype(np.float32) + scale.astype(np.float32) * q)


def test_clipped_rows_have_finer_levels(rng: np.random.Generator) -> None:
    x = rng.standard_normal((50, 48)).astype(np.float32)
    lo, span = x.min(-1, keepdims=True), np.ptp(x, axis=-1, keepdims=True)
    _, scale, low = quantize_rows(x, 0.8)
    np.testing.assert_allclose(scale, 0.8 * span / 15, rtol=1e-3)
    np.testing.assert_allclose(low, lo + 0.1 * span, rtol=2e-3, atol=1e-3)
    y = unpack_rows(pack_rows(x, 0.8))
    inside = (x > lo + 0.1 * span) & (x < lo + 0.9 * span)
    assert (np.abs(y - x) <= np.where(inside, 0.51 * scale, 0.11 * span) + 2e-3).all()


def test_levels_that_fit_come_back_exactly(rng: np.random.Generator) -> None:
    q = rng.integers(0, 16, (20, 32)).astype(np.float32)
    q[:, 3], q[:, 30] = 0, 15
    x = q * np.float32(0.125) + rng.integers(-9, 9, (20, 1)).astype(np.float32)
    np.testing.assert_array_equal(unpack_rows(pack_rows(x)), x)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 2e6])
def test_a_row_that_float16_cannot_span_is_nan(rng: np.random.Generator, value: float) -> None:
    x = rng.standard_normal((3, 32)).astype(np.float32)
    x[1, rng.integers(32)] = value
    y = unpack_rows(pack_rows(x))
    assert np.isnan(y[1]).all()
    assert np.isfinite(y[[0, 2]]).all()


@pytest.mark.parametrize("head_dim", [0, 8, 72, 272])
def test_head_sizes_that_do_not_suit(head_dim: int) -> None:
    with pytest.raises(SpecQuantError, match=f"head_dim {head_dim} .*multiples of 16"):
        row_bytes(head_dim)


# --- the reference -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("d", [16, 64, 128])
def test_hadamard_is_orthonormal_and_of_sylvester(rng: np.random.Generator, d: int) -> None:
    matrix = np.ones((1, 1))
    while len(matrix) < d:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    x = rng.standard_normal((7, d)).astype(np.float32)
    np.testing.assert_allclose(walsh_hadamard(x), x @ matrix / np.sqrt(d), atol=1e-5)


def naive(call: Call) -> NDArray[np.float64]:
    """The attention of one row without padding, in float64, a query and a head at a time, on the dequantised cache."""
    a, x = call.attributes, call.inputs
    heads, kv_heads, window = a["num_heads"], a["kv_num_heads"], a["local_window_size"]
    keys, values = (unpack_rows(cache[0]).astype(np.float64) for cache in call.expected()[1:])
    d, past = keys.shape[-1], int(call.past[0])
    qkv = x["qkv"][0].astype(np.float64).reshape(-1, heads + 2 * kv_heads, d)
    y = np.zeros((len(qkv), heads, d))
    for t in range(len(qkv)):
        for h in range(heads):
            position = x["position_ids"][0, t]
            q = rotary(qkv[t, h].astype(np.float32), x["cos"][position], x["sin"][position])
            q = walsh_hadamard(q) if a["hadamard"] else q
            first = max(0, past + t + 1 - window) if window > 0 else 0
            seen = slice(first, past + t + 1)
            scores = keys[h * kv_heads // heads, seen] @ q.astype(np.float64) * (a["scale"] or d**-0.5)
            weights = np.exp(scores - scores.max())
            y[t, h] = weights @ values[h * kv_heads // heads, seen] / weights.sum()
    return y.reshape(len(qkv), heads * d)


@pytest.mark.parametrize("kind", ["prefill", "chunk", "window", "many heads", "head of 80"])
def test_reference_equals_naive_attention(rng: np.random.Generator, kind: str) -> None:
    call = call_of(rng, kind)
    expected = naive(call)
    np.testing.assert_allclose(call.expected()[0][0], expected, rtol=0, atol=1e-4 * np.abs(expected).max())


def test_a_key_offset_changes_rounding_only(rng: np.random.Generator) -> None:
    """Softmax does not see what all keys share, so y moves by no more than 4 bits allow, and the cache a lot."""
    call = random_call(rng, [0], [30], hadamard=1)
    y, keys, _ = call.expected()
    other = replace(call, inputs=call.inputs | {"key_offset": call.inputs["key_offset"] + np.float32(0.5)})
    moved, moved_keys, _ = other.expected()
    assert (keys != moved_keys).mean() > 0.1
    assert np.linalg.norm(moved - y) < 0.3 * np.linalg.norm(y)


def test_chunks_and_steps_equal_one_pass(rng: np.random.Generator) -> None:
    whole = random_call(rng, [0], [11], hadamard=1)
    y, keys, values = whole.expected()
    past, parts = [whole.inputs["past_key"], whole.inputs["past_value"]], []
    for start, end in [(0, 5), (5, 6), (6, 11)]:
        piece = {name: whole.inputs[name][:, start:end] for name in ("qkv", "position_ids")}
        piece |= {"seqlens_k": np.array([end - 1], np.int32), "total_sequence_length": np.array(end, np.int32)}
        piece |= {"past_key": past[0], "past_value": past[1]}
        part, *past = Call(whole.inputs | piece, whole.attributes, np.array([start])).expected()
        parts.append(part)
    np.testing.assert_allclose(np.concatenate(parts, axis=1), y, rtol=0, atol=1e-5)
    np.testing.assert_array_equal(past[0], keys)
    np.testing.assert_array_equal(past[1], values)


# --- the kernels ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", CALLS)
def test_kernel_equals_reference(rng: np.random.Generator, isa: str, kind: str) -> None:
    call = call_of(rng, kind)
    check(call, list(int4_kv_attention(**call.inputs, **call.attributes, isa=isa)))


def test_lengths_from_0(rng: np.random.Generator, isa: str) -> None:
    for past in range(0, 70, 3):
        call = random_call(rng, [past], [int(rng.integers(1, 5))], head_dim=32, hadamard=1, spare=int(rng.integers(3)))
        check(call, list(int4_kv_attention(**call.inputs, **call.attributes, isa=isa)))


def test_the_cache_can_be_extended_where_it_lies(rng: np.random.Generator, isa: str) -> None:
    call = random_call(rng, [40, 7], [1, 1], hadamard=1, spare=9)
    expected = call.expected()
    y, keys, values = int4_kv_attention(**call.inputs, **call.attributes, in_place=True, isa=isa)
    assert keys is call.inputs["past_key"]
    np.testing.assert_allclose(y, expected[0], rtol=0, atol=1e-4 * np.abs(expected[0]).max())
    for cache, expected_cache in ((keys, expected[1]), (values, expected[2])):
        np.testing.assert_array_equal(call.rows(cache), call.rows(expected_cache))
        assert (cache[1, :, 8:] == -1).all()  # what lies beyond a row's tokens stays


@pytest.mark.parametrize("hostile", ["huge", "tiny", "constant", "denormal"])
def test_cache_rows_are_bit_exact(rng: np.random.Generator, isa: str, hostile: str) -> None:
    call = random_call(rng, [0], [9], head_dim=48, rotary=0)
    factor = {"huge": 3e4, "tiny": 1e-7, "constant": 0.0, "denormal": 1e-41}[hostile]
    call.inputs["key_offset"][:] = 0
    call.inputs["qkv"][:] = call.inputs["qkv"] * np.float32(factor) + np.float32(factor == 0)
    _, *caches = int4_kv_attention(**call.inputs, **call.attributes, isa=isa)
    for cache, expected in zip(caches, call.expected()[1:], strict=True):
        np.testing.assert_array_equal(call.rows(cache), call.rows(expected))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_value_that_is_not_finite_reaches_those_who_see_it(rng: np.random.Generator, isa: str, value: float) -> None:
    call = random_call(rng, [30], [1], heads=4, kv_heads=2, head_dim=32)
    call.inputs["past_value"][0, 1, 5, -3] = 0x7E  # NaN as scale, of the second kv head
    y, *_ = int4_kv_attention(**call.inputs, **call.attributes, isa=isa)
    by_head = y.reshape(4, 32)
    assert np.isfinite(by_head[:2]).all()
    assert np.isnan(by_head[2:]).all()
    call.inputs["qkv"][0, 0, 4 * 32] = value  # in the first key
    y, keys, _ = int4_kv_attention(**call.inputs, **call.attributes, isa=isa)
    assert np.isnan(unpack_rows(keys[0, 0, 30])).all()
    assert np.isnan(y).all()


@pytest.mark.parametrize(
    ("inputs", "attributes", "message"),
    [
        ({"seqlens_k": [41]}, {}, "seqlens_k"),
        ({"seqlens_k": [-2]}, {}, "seqlens_k"),
        ({"seqlens_k": [38], "total_sequence_length": 99}, {}, "total_sequence_length exceeds"),
        ({"position_ids": [[30, 31, 99]]}, {}, "position_ids"),
        ({"position_ids": [[-1, 31, 32]]}, {}, "position_ids"),
        ({"cos": np.ones((40, 9)), "sin": np.ones((40, 9))}, {}, "head_dim / 2 columns"),
        ({"key_offset": np.ones((2, 8))}, {}, "key_offset is"),
        ({}, {"hadamard": 1}, "power of two"),
        ({}, {"clip": 0.0}, "clip"),
        ({}, {"clip": 1.5}, "clip"),
        ({}, {"num_heads": 8, "kv_num_heads": 1}, "past_key is"),
    ],
)
def test_what_does_not_fit_is_refused(
    rng: np.random.Generator, inputs: dict[str, Any], attributes: dict[str, int], message: str
) -> None:
    size = {"head_dim": 48} if attributes.get("hadamard") else {"head_dim": 16}
    call = random_call(rng, [30], [3], **size)
    changed = {name: np.asarray(value, call.inputs[name].dtype) for name, value in inputs.items()}
    with pytest.raises(SpecQuantError, match=message):
        int4_kv_attention(**(call.inputs | changed), **(call.attributes | attributes))


def test_the_struct_is_the_kernels() -> None:
    size = library.loaded().specquant_attention_size
    size.restype = ctypes.c_int64
    assert ctypes.sizeof(_Attention) == size()


# --- inside ONNX Runtime -------------------------------------------------------------------------------------------


def session(model: onnx.ModelProto, ours: bool, threads: int = 1) -> Any:
    ort = pytest.importorskip("onnxruntime")
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = threads
    if ours:
        library.register(options)
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


@pytest.mark.parametrize("ours", [True, False])
@pytest.mark.parametrize("kind", CALLS)
def test_op_and_function_equal_reference(rng: np.random.Generator, kind: str, ours: bool) -> None:
    call = call_of(rng, kind)
    model = call_model(call)
    onnx.checker.check_model(model, full_check=True)
    check(call, session(model, ours).run(None, call.inputs))


def test_function_packs_every_float16(rng: np.random.Generator) -> None:
    """Rows whose scale and low go through all exponents, subnormals and negative lows included."""
    call = random_call(rng, [0], [48], heads=1, kv_heads=1, head_dim=16, rotary=0)
    call.inputs["key_offset"][:] = 0
    call.inputs["qkv"][:] *= (2.0 ** (np.arange(48) - 32))[None, :, None].astype(np.float32)
    outputs = session(call_model(call), ours=False).run(None, call.inputs)
    for cache, expected in zip(outputs[1:], call.expected()[1:], strict=True):
        np.testing.assert_array_equal(call.rows(cache), call.rows(expected))


@pytest.mark.parametrize("ours", [True, False])
def test_past_and_present_can_be_one_buffer(rng: np.random.Generator, ours: bool) -> None:
    call = random_call(rng, [21, 3], [1, 1], hadamard=1, spare=6)
    run, expected = session(call_model(call), ours), call.expected()
    binding, cache = run.io_binding(), {name: call.inputs[f"past_{name}"].copy() for name in ("key", "value")}
    for name, array in call.inputs.items():
        if not name.startswith("past_"):
            binding.bind_cpu_input(name, array)
    for name, array in cache.items():
        binding.bind_input(f"past_{name}", "cpu", 0, np.int8, array.shape, array.ctypes.data)
        binding.bind_output(f"present_{name}", "cpu", 0, np.int8, array.shape, array.ctypes.data)
    binding.bind_output("y")
    run.run_with_iobinding(binding)
    y = binding.get_outputs()[2].numpy()
    np.testing.assert_allclose(y, expected[0], rtol=0, atol=1e-4 * np.abs(expected[0]).max())
    for array, wanted in zip(cache.values(), expected[1:], strict=True):
        np.testing.assert_array_equal(call.rows(array), call.rows(wanted))


def test_threads_do_not_change_a_bit(rng: np.random.Generator) -> None:
    for past, new in (([0], [200]), ([3000], [1])):
        call = random_call(rng, past, new, hadamard=1)
        model = call_model(call)
        one, four = (session(model, True, threads).run(None, call.inputs) for threads in (1, 4))
        for a, b in zip(one, four, strict=True):
            np.testing.assert_array_equal(a, b)


def test_what_does_not_fit_is_one_line(rng: np.random.Generator) -> None:
    call = random_call(rng, [4], [2])
    run = session(call_model(call), ours=True)
    with pytest.raises(Exception, match="Int4KVAttention: seqlens_k does not fit the cache") as error:
        run.run(None, call.inputs | {"seqlens_k": np.array([7], np.int32)})
    assert "\n" not in str(error.value).strip()
