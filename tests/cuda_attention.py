"""A call of attention by the CUDA kernels, and what it should give."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from specquant.custom_ops.library_cuda_attention import attention, attention_problem, attention_workspace
from tests.attention import Call
from tests.cuda_arrays import POISON, DeviceArray

INPUTS = ("qkv", "past_key", "past_value", "seqlens_k", "position_ids", "cos", "sin", "key_offset")


def run(
    inputs: dict[str, Any], attributes: dict[str, Any], in_place: bool = False, offsets: dict[str, int] | None = None
) -> list[NDArray[Any]]:
    """y, present_key and present_value of the kernels. What nobody may write is poison, and looked at afterwards.

    offsets: bytes that inputs lie off an aligned address.
    """
    off = offsets or {}
    arrays = {n: None if inputs.get(n) is None else DeviceArray(inputs[n], off.get(n, 0)) for n in INPUTS}
    batch, sequence, _ = inputs["qkv"].shape
    heads, kv_heads = attributes["num_heads"], attributes["kv_num_heads"]
    d = inputs["qkv"].shape[2] // (heads + 2 * kv_heads)
    past = inputs["past_key"]
    rows = max(past.shape[2], int(inputs["total_sequence_length"]))
    if in_place:
        present = [arrays["past_key"], arrays["past_value"]]
    else:
        empty = np.full((batch, kv_heads, rows, past.shape[3] * past.itemsize), POISON, np.uint8).view(past.dtype)
        present = [DeviceArray(empty), DeviceArray(empty)]
    y = DeviceArray(np.full((batch, sequence, heads * d), np.nan, inputs["qkv"].dtype))
    problem = attention_problem(**arrays, present_key=present[0], present_value=present[1], y=y, **attributes)
    size = attention_workspace(problem)
    space = DeviceArray(np.full(size + 256, POISON, np.uint8))
    attention(problem, space)
    assert (space.numpy()[size:] == POISON).all(), "wrote past the end of the workspace"
    return [y.numpy(), present[0].numpy(), present[1].numpy()]


def compare(call: Call, outputs: list[NDArray[Any]]) -> None:
    """y close, cache rows equal, padding 0."""
    y, *caches = outputs
    expected, *expected_caches = call.expected()
    assert (y.dtype, y.shape) == (expected.dtype, expected.shape)
    # Queries and weights go through the tensor cores as float16, in two parts where y is float32.
    tolerance = 1e-5 if y.dtype == np.float32 else 5e-3
    np.testing.assert_allclose(y, expected, rtol=0, atol=tolerance * np.abs(expected.astype(np.float32)).max())
    for b, count in enumerate(call.inputs["seqlens_k"] + 1 - call.past):
        assert not y[b, count:].any()
    for cache, expected_cache in zip(caches, expected_caches, strict=True):
        assert cache.shape == expected_cache.shape
        np.testing.assert_array_equal(call.rows(cache), call.rows(expected_cache))
