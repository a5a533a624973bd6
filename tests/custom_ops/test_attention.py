"""`Int4KVAttention` and `HalfKVAttention`: reference, kernels of every instruction set, and function."""

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
from specquant.custom_ops.kv_rows import unpack_rows
from specquant.custom_ops.library_attention import _Attention
from tests.attention import HALF, INT4, Call, call_model, random_call

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
    "several blocks": ([300], [150], {"heads": 2, "kv_heads": 1, "head_dim": 256}),
    "window": ([19], [40], {"window": 7}),
    "window over blocks": ([200], [190], {"window": 140, "heads": 3, "kv_heads": 1, "head_dim": 112}),
    "window step": ([2500], [1], {"window": 1100, "spare": 1}),
    "many heads": ([4], [3], {"heads": 26, "kv_heads": 2, "head_dim": 16, "scale": 0.4}),
    "step of many heads": ([40], [1], {"heads": 30, "kv_heads": 1, "head_dim": 48}),
    "head of 80": ([20], [11], {"head_dim": 80, "rotary": 8}),
    "head of 256": ([3], [5], {"head_dim": 256, "heads": 2, "kv_heads": 1}),
    "no rotary": ([3], [5], {"rotary": 0}),
    "float16": ([50], [13], {"float_type": np.float16}),
}


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=[INT4, HALF])
def op(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def call_of(rng: np.random.Generator, op: str, kind: str) -> Call:
    past, new, options = CALLS[kind]
    head_dim = options.get("head_dim", 64)
    hadamard = int(rng.integers(2)) if head_dim & (head_dim - 1) == 0 else 0
    clip = float(rng.choice([1.0, 0.93, 0.5]))
    return random_call(rng, past, new, op=op, hadamard=hadamard, clip=clip, **options)


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


# --- the reference -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("d", [16, 64, 128])
def test_hadamard_is_orthonormal_and_of_sylvester(rng: np.random.Generator, d: int) -> None:
    matrix = np.ones((1, 1))
    while len(matrix) < d:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    x = rng.standard_normal((7, d)).astype(np.float32)
    np.testing.assert_allclose(walsh_hadamard(x), x @ matrix / np.sqrt(d), atol=1e-5)


def naive(call: Call) -> NDArray[np.float64]:
    """The attention of one row without padding, in float64, a query and a head at a time, on the cache's values."""
    a, x = call.attributes, call.inputs
    heads, kv_heads, window = a["num_heads"], a["kv_num_heads"], a["local_window_size"]
    caches = (cache[0] for cache in call.expected()[1:])
    keys, values = ((unpack_rows(c) if call.op == INT4 else c).astype(np.float64) for c in caches)
    d, past = keys.shape[-1], int(call.past[0])
    qkv = x["qkv"][0].astype(np.float64).reshape(-1, heads + 2 * kv_heads, d)
    y = np.zeros((len(qkv), heads, d))
    for t in range(len(qkv)):
        for h in range(heads):
            position = x["position_ids"][0, t]
            q = rotary(qkv[t, h].astype(np.float32), x["cos"][position], x["sin"][position])
            q = walsh_hadamard(q) if a.get("hadamard") else q
            first = max(0, past + t + 1 - window) if window > 0 else 0
            seen = slice(first, past + t + 1)
            scores = keys[h * kv_heads // heads, seen] @ q.astype(np.float64) * (a["scale"] or d**-0.5)
            weights = np.exp(scores - scores.max())
            y[t, h] = weights @ values[h * kv_heads // heads, seen] / weights.sum()
    return y.reshape(len(qkv), heads * d)


@pytest.mark.parametrize("kind", ["prefill", "chunk", "window", "many heads", "head of 80"])
def test_reference_equals_naive_attention(rng: np.random.Generator, op: str, kind: str) -> None:
    call = call_of(rng, op, kind)
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


def test_chunks_and_steps_equal_one_pass(rng: np.random.Generator, op: str) -> None:
    whole = random_call(rng, [0], [11], op=op, hadamard=1)
    y, keys, values = whole.expected()
    past, parts = [whole.inputs["past_key"], whole.inputs["past_value"]], []
    for start, end in [(0, 5), (5, 6), (6, 11)]:
        piece = {name: whole.inputs[name][:, start:end] for name in ("qkv", "position_ids")}
        piece |= {"seqlens_k": np.array([end - 1], np.int32), "total_sequence_length": np.array(end, np.int32)}
        piece |= {"past_key": past[0], "past_value": past[1]}
        part, *past = Call(op, whole.inputs | piece, whole.attributes, np.array([start])).expected()
        parts.append(part)
    np.testing.assert_allclose(np.concatenate(parts, axis=1), y, rtol=0, atol=1e-5)
    np.testing.assert_array_equal(past[0], keys)
    np.testing.assert_array_equal(past[1], values)


# --- the kernels ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", CALLS)
def test_kernel_equals_reference(rng: np.random.Generator, op: str, isa: str, kind: str) -> None:
    call = call_of(rng, op, kind)
    check(call, call.kernel(isa))


def test_lengths_from_0(rng: np.random.Generator, op: str, isa: str) -> None:
    for past in range(0, 70, 3):
        new, spare = [int(rng.integers(1, 5))], int(rng.integers(3))
        call = random_call(rng, [past], new, op=op, head_dim=32, hadamard=1, spare=spare)
        check(call, call.kernel(isa))


@pytest.mark.parametrize("head_dim", range(16, 257, 16))
def test_sizes_of_heads(rng: np.random.Generator, op: str, isa: str, head_dim: int) -> None:
    past, new, heads = rng.integers(0, 40, 2), rng.integers(1, 30, 2), int(rng.integers(1, 8))
    if rng.integers(2):
        past[:] = 0
    else:
        new[:] = new[0]  # only prompts are padded
    window = int(rng.choice([-1, rng.integers(1, 40)]))
    options = {"head_dim": head_dim, "heads": 2 * heads, "kv_heads": 2, "window": window}
    call = random_call(rng, past.tolist(), new.tolist(), op=op, **options)
    check(call, call.kernel(isa))


def test_the_cache_can_be_extended_where_it_lies(rng: np.random.Generator, op: str, isa: str) -> None:
    call = random_call(rng, [40, 7], [1, 1], op=op, hadamard=1, spare=9)
    expected = call.expected()
    y, keys, values = call.kernel(isa, in_place=True)
    assert keys is call.inputs["past_key"]
    np.testing.assert_allclose(y, expected[0], rtol=0, atol=1e-4 * np.abs(expected[0]).max())
    for cache, expected_cache in ((keys, expected[1]), (values, expected[2])):
        np.testing.assert_array_equal(call.rows(cache), call.rows(expected_cache))
        beyond = cache[1, :, 8:]  # a row's tokens: it stays
        assert (beyond == -1 if op == INT4 else np.isnan(beyond)).all()


@pytest.mark.parametrize("hostile", ["huge", "tiny", "constant", "denormal"])
def test_cache_rows_are_bit_exact(rng: np.random.Generator, op: str, isa: str, hostile: str) -> None:
    """Of huge values a float16 cache makes infinities, too."""
    call = random_call(rng, [0], [9], op=op, head_dim=48, rotary=0)
    factor = {"huge": 3e4, "tiny": 1e-7, "constant": 0.0, "denormal": 1e-41}[hostile]
    if op == INT4:
        call.inputs["key_offset"][:] = 0
    call.inputs["qkv"][:] = call.inputs["qkv"] * np.float32(factor) + np.float32(factor == 0)
    with np.errstate(invalid="ignore"):
        expected_caches = call.expected()[1:]
    for cache, expected in zip(call.kernel(isa)[1:], expected_caches, strict=True):
        np.testing.assert_array_equal(call.rows(cache), call.rows(expected))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_value_that_is_not_finite_reaches_those_who_see_it(rng: np.random.Generator, isa: str, value: float) -> None:
    call = random_call(rng, [30], [1], heads=4, kv_heads=2, head_dim=32)
    call.inputs["past_value"][0, 1, 5, -3] = 0x7E  # NaN as scale, of the second kv head
    y, *_ = call.kernel(isa)
    by_head = y.reshape(4, 32)
    assert np.isfinite(by_head[:2]).all()
    assert np.isnan(by_head[2:]).all()
    call.inputs["qkv"][0, 0, 4 * 32] = value  # in the first key
    y, keys, _ = call.kernel(isa)
    assert np.isnan(unpack_rows(keys[0, 0, 30])).all()
    assert np.isnan(y).all()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e5])
@pytest.mark.parametrize("part", ["query", "key", "value", "past_key", "past_value"])
def test_a_float16_cache_and_what_is_not_finite(rng: np.random.Generator, isa: str, part: str, value: float) -> None:
    """Queries that see it get what NumPy gets; others of the same call may be NaN. 1e5 is infinite in the cache."""
    call = random_call(rng, [30], [7], op=HALF, heads=4, kv_heads=2, head_dim=32, rotary=0, window=20)
    token = 3
    if part.startswith("past"):
        with np.errstate(over="ignore"):
            call.inputs[part][0, 1, 30 - 17 + token - 1, 5] = value  # from here on it has left the window
        seen = slice(0, token)
    else:
        head = {"query": 2, "key": 4, "value": 6}[part]
        call.inputs["qkv"][0, token, head * 32 + 5] = value
        seen = slice(token, token + 1) if part == "query" else slice(token, 7)
    with np.errstate(invalid="ignore"):
        expected = call.expected()[0][0, seen]
    assert not np.isfinite(expected).all() or abs(value) == np.inf or value == 1e5
    # Scores of such a query are near 1e5: float32 rounds them to 0.01, and two keys may be that close.
    near = 5e-2 if part == "query" and value == 1e5 else 1e-3
    np.testing.assert_allclose(call.kernel(isa)[0][0, seen], expected, rtol=near, atol=near)


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
        replace(call, inputs=call.inputs | changed, attributes=call.attributes | attributes).kernel()


def test_a_float16_cache_of_another_shape_is_refused(rng: np.random.Generator) -> None:
    call = random_call(rng, [30], [3], op=HALF, head_dim=16)
    for name, past in {
        "past_key": np.zeros((1, 2, 30, 32), np.float16),
        "past_value": np.zeros((1, 2, 30, 16)),
    }.items():
        with pytest.raises(SpecQuantError, match=f"{name} is"):
            replace(call, inputs=call.inputs | {name: past}).kernel()
        with pytest.raises(SpecQuantError, match=f"{name} is"):
            replace(call, inputs=call.inputs | {name: past}).expected()


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
def test_op_and_function_equal_reference(rng: np.random.Generator, op: str, kind: str, ours: bool) -> None:
    call = call_of(rng, op, kind)
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
def test_past_and_present_can_be_one_buffer(rng: np.random.Generator, op: str, ours: bool) -> None:
    call = random_call(rng, [21, 3], [1, 1], op=op, hadamard=1, spare=6)
    run, expected = session(call_model(call), ours), call.expected()
    binding, cache = run.io_binding(), {name: call.inputs[f"past_{name}"].copy() for name in ("key", "value")}
    for name, array in call.inputs.items():
        if not name.startswith("past_"):
            binding.bind_cpu_input(name, array)
    for name, array in cache.items():
        place = "cpu", 0, array.dtype.type, array.shape, array.ctypes.data
        binding.bind_input(f"past_{name}", *place)
        binding.bind_output(f"present_{name}", *place)
    binding.bind_output("y")
    run.run_with_iobinding(binding)
    y = binding.get_outputs()[2].numpy()
    np.testing.assert_allclose(y, expected[0], rtol=0, atol=1e-4 * np.abs(expected[0]).max())
    for array, wanted in zip(cache.values(), expected[1:], strict=True):
        np.testing.assert_array_equal(call.rows(array), call.rows(wanted))


def test_threads_do_not_change_a_bit(rng: np.random.Generator, op: str) -> None:
    for past, new in (([0], [200]), ([3000], [1])):
        call = random_call(rng, past, new, op=op, hadamard=1)
        model = call_model(call)
        one, four = (session(model, True, threads).run(None, call.inputs) for threads in (1, 4))
        for a, b in zip(one, four, strict=True):
            np.testing.assert_array_equal(a, b)


def test_what_does_not_fit_is_one_line(rng: np.random.Generator, op: str) -> None:
    call = random_call(rng, [4], [2], op=op)
    run = session(call_model(call), ours=True)
    with pytest.raises(Exception, match=f"{op}: seqlens_k does not fit the cache") as error:
        run.run(None, call.inputs | {"seqlens_k": np.array([7], np.int32)})
    assert "\n" not in str(error.value).strip()
