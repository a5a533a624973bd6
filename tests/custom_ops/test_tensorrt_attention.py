"""The compiled plugins of attention as TensorRT uses them, against the reference (tests/tensorrt_harness.py)."""

from __future__ import annotations

import ctypes
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from specquant.custom_ops.schema import OPS
from tests.attention import HALF, INT4, Call, random_call
from tests.cuda_arrays import POISON, require_kernels
from tests.tensorrt_harness import Harness, computed, opened, refusal

require_kernels()
# Past and new tokens of each row, what differs from 6 heads on 2 of 64, and most rows and tokens of the profile.
CALLS: dict[str, tuple[list[int], list[int], dict[str, Any], tuple[int, int]]] = {
    "prompt": ([0], [37], {"heads": 9, "kv_heads": 3, "spare": 50}, (1, 64)),
    "block after a block": ([70], [45], {"spare": 60, "window": 30}, (1, 45)),
    "step of a full profile": ([13, 0, 300], [1, 1, 1], {"spare": 5}, (3, 1)),
    "step of a wide profile": ([130], [1], {"spare": 5, "head_dim": 128, "heads": 2}, (8, 256)),
    "unequal prompts": ([0, 0], [9, 4], {"head_dim": 16, "spare": 20, "rotary": 3, "scale": 0.4}, (2, 9)),
}


def attended(harness: Harness, call: Call, most: tuple[int, int], in_place: bool = True) -> list[NDArray[Any]]:
    """y, present key and value; past and present are one buffer, or where not in_place two."""
    inputs = {name: array.copy() for name, array in call.inputs.items()}
    batch, sequence = most
    largest = {
        index: (batch, *((sequence,) if name in ("qkv", "position_ids") else array.shape[1:2]), *array.shape[2:])
        for index, (name, array) in enumerate(inputs.items())
        if name in ("qkv", "past_key", "past_value", "seqlens_k", "position_ids")
    }
    heads, all_heads = call.attributes["num_heads"], call.attributes["num_heads"] + 2 * call.attributes["kv_num_heads"]
    qkv, past = inputs["qkv"], inputs["past_key"]
    y = np.full((*qkv.shape[:2], qkv.shape[2] // all_heads * heads), np.nan, qkv.dtype)
    empty = np.full(past.nbytes, POISON, np.uint8).view(past.dtype).reshape(past.shape)
    present: list[NDArray[Any] | int] = [1, 2] if in_place else [empty, empty]
    return computed(harness, call.op, list(inputs.values()), [y, *present], call.attributes, largest)


def close(call: Call, outputs: list[NDArray[Any]]) -> None:
    y, *caches = outputs
    expected, *expected_caches = call.expected()
    bound = 1e-5 if y.dtype == np.float32 else 5e-3
    np.testing.assert_allclose(y, expected, rtol=0, atol=bound * np.abs(expected.astype(np.float32)).max())
    for cache, expected_cache in zip(caches, expected_caches, strict=True):
        np.testing.assert_array_equal(call.rows(cache), call.rows(expected_cache))


@pytest.mark.parametrize("op", [INT4, HALF])
@pytest.mark.parametrize("float_type", [np.float32, np.float16])
@pytest.mark.parametrize("kind", CALLS)
def test_attention(rng: np.random.Generator, harness: Harness, kind: str, float_type: Any, op: str) -> None:
    past, new, options, most = CALLS[kind]
    options = {"hadamard": int(rng.integers(2)), "clip": 0.93} | options
    call = random_call(rng, past, new, op=op, float_type=float_type, **options)
    close(call, attended(harness, call, most))


@pytest.mark.parametrize("op", [INT4, HALF])
def test_a_cache_that_tensorrt_did_not_alias(rng: np.random.Generator, harness: Harness, op: str) -> None:
    call = random_call(rng, [40, 7], [1, 1], op=op, spare=3)
    close(call, attended(harness, call, (2, 1), in_place=False))


@pytest.mark.parametrize("op", [INT4, HALF])
def test_every_attribute_of_attention_survives(rng: np.random.Generator, harness: Harness, op: str) -> None:
    call = random_call(rng, [20], [9], op=op, spare=9, heads=4, kv_heads=4)
    other = {"num_heads": 6, "kv_num_heads": 3, "local_window_size": 5, "scale": 0.3, "hadamard": 1, "clip": 0.6}
    names = [a.name for a in OPS[op].attributes]
    assert names == list(other)[: len(names)]
    plain = attended(harness, call, (1, 9))
    for name, value in list(other.items())[2 : len(names)]:
        changed = replace(call, attributes=call.attributes | {name: value})
        assert np.abs(attended(harness, changed, (1, 9))[0] - plain[0]).max() > 0
    for name in names[:2]:  # that the sizes no longer agree says that it was read
        assert refusal(harness, op, list(call.inputs.values()), call.attributes | {name: other[name]}, 3) != b""


def test_the_cache_is_an_alias(harness: Harness) -> None:
    library, _ = harness
    for op, expected in ((INT4, [-1, 1, 2]), (HALF, [-1, 1, 2]), ("SpecQuantMatMul", [-1])):
        plugin = ctypes.c_void_p(opened(harness, op, {}))
        assert [library.harness_alias(plugin, output) for output in range(len(expected))] == expected


@pytest.mark.parametrize("op", [INT4, HALF])
def test_attention_that_is_refused(rng: np.random.Generator, harness: Harness, op: str) -> None:
    call = random_call(rng, [20], [9], op=op, spare=9, head_dim=48)
    shaped = ("past_key", "past_value", "seqlens_k", "position_ids", "sin", *(["key_offset"] if op == INT4 else []))
    for name in shaped:
        inputs = {n: np.concatenate([a, a]) if n == name else a for n, a in call.inputs.items()}
        said = refusal(harness, op, list(inputs.values()), call.attributes, 3)
        assert said.startswith(f"{op}: ".encode())
        assert name.encode() in said
    given = list(call.inputs.values())
    for attributes, word in (
        ({"num_heads": 0}, b"num_heads"),
        ({"num_heads": 5}, b"width"),
        ({"scale": np.inf}, b"scale"),
    ):
        assert word in refusal(harness, op, given, call.attributes | attributes, 3)
    if op == INT4:
        assert b"power of two" in refusal(harness, op, given, call.attributes | {"hadamard": 1}, 3)
