"""The CUDA kernels of attention against the reference: on a GPU, or compiled for the CPU (docs/cuda.md)."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from specquant.custom_ops.errors import SpecQuantError
from specquant.custom_ops.kv_rows import unpack_rows
from specquant.custom_ops.library_cuda import Attention
from specquant.custom_ops.library_cuda_attention import (
    attention_bound,
    attention_workspace,
)
from tests.attention import HALF, INT4, random_call
from tests.cuda_arrays import POISON, require_kernels
from tests.cuda_attention import compare, run

require_kernels()
# past and new tokens of each row, and what differs from 6 heads on 2 of 64. Up to 64 rows of a kv head (new tokens
# times heads that share it) are split over the cached tokens; more go tile by tile.
CALLS: dict[str, tuple[list[int], list[int], dict[str, Any]]] = {
    "prefill": ([0], [37], {"heads": 9, "kv_heads": 3}),
    "unequal prompts": ([0, 0, 0], [90, 4, 1], {"head_dim": 128, "heads": 2, "kv_heads": 2}),
    "chunk": ([70], [45], {"spare": 3}),
    "step": ([13, 0, 300], [1, 1, 1], {"spare": 5}),
    "long step": ([1100, 530], [1, 1], {"heads": 5, "kv_heads": 1, "head_dim": 32}),
    "blocks": ([127], [130], {"heads": 2, "kv_heads": 2, "head_dim": 16}),
    "window": ([19], [70], {"window": 7, "heads": 2}),
    "window over tiles": ([100], [140], {"window": 90, "heads": 1, "kv_heads": 1, "head_dim": 112}),
    "window step": ([900], [1], {"window": 400, "spare": 1}),
    "many heads": ([4], [3], {"heads": 26, "kv_heads": 2, "head_dim": 16, "scale": 0.4}),
    "step of many heads": ([40], [1], {"heads": 70, "kv_heads": 1, "head_dim": 48}),
    "head of 80": ([20], [71], {"head_dim": 80, "rotary": 8, "heads": 1, "kv_heads": 1}),
    "step of 256": ([130], [5], {"head_dim": 256, "heads": 2, "kv_heads": 1}),
    "one step of 256": ([130, 0], [1, 1], {"head_dim": 256, "heads": 8, "kv_heads": 1}),
    "step of 80": ([200, 37], [1, 1], {"head_dim": 80, "rotary": 8, "heads": 6, "kv_heads": 2, "window": 90}),
    "step of 112": ([15, 16], [1, 1], {"head_dim": 112, "heads": 7, "kv_heads": 1, "float_type": np.float16}),
    "window of one": ([70], [1], {"window": 1, "heads": 3, "kv_heads": 1}),
    "prefill of 256": ([30], [70], {"head_dim": 256, "heads": 1, "kv_heads": 1}),
    "no rotary": ([3], [5], {"rotary": 0}),
    "tiles in turn": ([2300], [1], {"heads": 4, "kv_heads": 1, "head_dim": 128, "float_type": np.float16}),
    "tiles in turn on a GPU": ([4500], [1], {"heads": 16, "kv_heads": 8, "head_dim": 16, "spare": 2}),
    "float16": ([50], [13], {"float_type": np.float16}),
    "float16 prefill": ([20], [100], {"float_type": np.float16, "heads": 2, "head_dim": 128}),
}


@pytest.mark.parametrize("op", [INT4, HALF])
@pytest.mark.parametrize("kind", CALLS)
def test_attention_equals_reference(rng: np.random.Generator, kind: str, op: str) -> None:
    past, new, options = CALLS[kind]
    head_dim = options.get("head_dim", 64)
    hadamard = int(rng.integers(2)) if head_dim & (head_dim - 1) == 0 else 0
    clip = float(rng.choice([1.0, 0.93, 0.5]))
    call = random_call(rng, past, new, op=op, hadamard=hadamard, clip=clip, **options)
    compare(call, run(call.inputs, call.attributes))


@pytest.mark.parametrize("head_dim", [16, 32, 128, 256])
def test_lengths_from_0(rng: np.random.Generator, head_dim: int) -> None:
    for past in range(0, 140, 23):
        new = int(rng.integers(1, 5))
        options = {"head_dim": head_dim, "heads": 2, "kv_heads": 1, "spare": int(rng.integers(3))}
        call = random_call(rng, [past], [new], hadamard=1, **options)
        compare(call, run(call.inputs, call.attributes))


@pytest.mark.parametrize("past", [[40, 7], [0, 300]])
def test_the_cache_can_be_extended_where_it_lies(rng: np.random.Generator, past: list[int]) -> None:
    call = random_call(rng, past, [1, 1], hadamard=1, spare=9)
    outputs = run(call.inputs, call.attributes, in_place=True)
    compare(call, outputs)
    for cache in outputs[1:]:
        for b, n in enumerate(past):
            assert (cache[b, :, n + 1 :] == -1).all()  # what lies beyond a row's tokens stays


@pytest.mark.parametrize("hostile", ["huge", "tiny", "constant", "denormal"])
def test_cache_rows_are_bit_exact(rng: np.random.Generator, hostile: str) -> None:
    call = random_call(rng, [0], [9], head_dim=48, rotary=0)
    factor = {"huge": 3e4, "tiny": 1e-7, "constant": 0.0, "denormal": 1e-41}[hostile]
    call.inputs["key_offset"][:] = 0
    call.inputs["qkv"][:] = call.inputs["qkv"] * np.float32(factor) + np.float32(factor == 0)
    y, *caches = run(call.inputs, call.attributes)
    expected, *expected_caches = call.expected()
    for cache, expected_cache in zip(caches, expected_caches, strict=True):
        np.testing.assert_array_equal(call.rows(cache), call.rows(expected_cache))
    if hostile in ("tiny", "constant"):
        np.testing.assert_allclose(y, expected, rtol=0, atol=1e-3 * np.abs(expected).max())


@pytest.mark.parametrize(("past", "new"), [([30], [1]), ([30], [40])])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_value_that_is_not_finite_reaches_those_who_see_it(
    rng: np.random.Generator, value: float, past: list[int], new: list[int]
) -> None:
    call = random_call(rng, past, new, heads=4, kv_heads=2, head_dim=32)
    call.inputs["past_value"][0, 1, 5, -3] = 0x7E  # NaN as scale, of the second kv head
    y = run(call.inputs, call.attributes)[0].reshape(-1, 4, 32)
    assert np.isfinite(y[:, :2]).all()
    assert np.isnan(y[:, 2:]).all()
    call.inputs["qkv"][0, -1, 4 * 32] = value  # in the last key of the first kv head
    y, keys, _ = run(call.inputs, call.attributes)
    assert np.isnan(unpack_rows(keys[0, 0, sum(past) + sum(new) - 1])).all()
    assert np.isnan(y.reshape(-1, 4, 32)[-1]).all()


@pytest.mark.parametrize("lengths", [[41, 30], [-2, 30], [36, 30]])
def test_lengths_that_do_not_fit_are_bounded(rng: np.random.Generator, lengths: list[int]) -> None:
    """They lie on the GPU, so nobody can refuse them: the row's y is NaN, its cache stays, the other row is right."""
    call = random_call(rng, [28, 28], [3, 3], head_dim=16)
    expected, good = call.expected(), np.array(lengths, np.int32)
    call.inputs["seqlens_k"][:] = good
    y, keys, values = run(call.inputs, call.attributes)
    assert np.isnan(y[0]).all()
    np.testing.assert_allclose(y[1], expected[0][1], rtol=0, atol=1e-5 * np.abs(expected[0]).max())
    for cache, wanted in ((keys, expected[1]), (values, expected[2])):
        assert (cache[0].view(np.uint8) == POISON).all()
        np.testing.assert_array_equal(cache[1], wanted[1])


def test_positions_that_no_table_has_are_nan(rng: np.random.Generator) -> None:
    call = random_call(rng, [5], [3], head_dim=16)
    call.inputs["position_ids"][0, 1] = 1 << 40
    y, keys, _ = run(call.inputs, call.attributes)
    assert np.isfinite(y[0, 0]).all()
    assert np.isnan(y[0, 1:]).all()
    assert np.isnan(unpack_rows(keys[0, :, 6])).all()


def test_a_workspace_that_is_made_without_a_gpu(rng: np.random.Generator) -> None:
    """It covers every smaller call, and does not grow with the context without end."""
    for _ in range(200):
        heads, kv_heads = (int(n) for n in rng.choice([(8, 8), (9, 3), (32, 4), (70, 1)]))
        most = [int(n) for n in (rng.integers(1, 9), rng.integers(1, 600), rng.integers(1, 9000))]
        sizes = dict(zip(("batch", "sequence", "past_rows"), most, strict=True))
        fixed = {"num_heads": heads, "kv_num_heads": kv_heads, "head_dim": 64, "half_cache": 1, "clip": 1.0}
        bound = attention_bound(Attention(**fixed, **sizes, present_rows=sizes["past_rows"]))
        place = np.zeros(8, np.int64)
        for _ in range(20):
            sizes = {name: int(rng.integers(1, n + 1)) for name, n in zip(sizes, most, strict=True)}
            call = Attention(**fixed, **sizes, present_rows=sizes["past_rows"])
            for name in ("qkv", "past_key", "past_value", "seqlens_k", "position_ids"):
                setattr(call, name, place.ctypes.data)
            assert attention_workspace(call) <= bound
        queries = most[0] * most[1] * heads * 64 * 4
        assert bound < queries + 20e6


@pytest.mark.parametrize(
    ("inputs", "attributes", "message"),
    [
        ({"total_sequence_length": np.array(99, np.int32)}, {}, "total_sequence_length exceeds"),
        ({"cos": np.ones((40, 9), np.float32), "sin": np.ones((40, 9), np.float32)}, {}, "head_dim / 2 columns"),
        ({"key_offset": np.ones((2, 8), np.float32)}, {}, "key_offset is"),
        ({}, {"hadamard": 1}, "power of two"),
        ({}, {"clip": 0.0}, "clip"),
        ({}, {"num_heads": 8, "kv_num_heads": 1}, "past_key is"),
    ],
)
def test_what_is_refused(
    rng: np.random.Generator, inputs: dict[str, Any], attributes: dict[str, Any], message: str
) -> None:
    call = random_call(rng, [30], [3], head_dim=48 if attributes.get("hadamard") else 16)
    with pytest.raises(SpecQuantError, match=message):
        run(call.inputs | inputs, call.attributes | attributes)
