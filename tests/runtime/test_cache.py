"""The KV buffers keep what they hold when they grow and when a row leaves."""

from __future__ import annotations

import numpy as np
import pytest

from specquant.runtime.cache import KVCache


def test_growing_and_dropping_keep_the_tokens(rng: np.random.Generator) -> None:
    cache = KVCache(layers=2, rows=3, kv_heads=2, width=4, dtype=np.dtype(np.float32), limit=700)
    assert cache.reserve(5)
    first = cache.capacity
    assert first >= 5
    assert not cache.reserve(first)
    content = [rng.standard_normal((3, 2, 5, 4)).astype(np.float32) for _ in cache.buffers]
    for buffer, values in zip(cache.buffers, content, strict=True):
        buffer[:, :, :5] = values
    cache.lengths[:] = (3, 5, 4)

    assert cache.reserve(first + 1)
    assert cache.capacity == 2 * first
    assert cache.reserve(699)
    assert cache.capacity == 700  # the limit, not the next doubling
    cache.drop(0)  # row 2 takes its place
    assert cache.lengths.tolist() == [4, 5]
    for buffer, values in zip(cache.buffers, content, strict=True):
        assert buffer.shape == (2, 2, 700, 4)
        assert (buffer[0, :, :4] == values[2, :, :4]).all()
        assert (buffer[1, :, :5] == values[1]).all()
    cache.drop(1)
    assert cache.lengths.tolist() == [4]
    cache.drop(0)
    assert cache.rows == 0


def test_limit() -> None:
    cache = KVCache(layers=1, rows=1, kv_heads=1, width=2, dtype=np.dtype(np.float16), limit=10)
    cache.reserve(10)
    with pytest.raises(ValueError, match="limit of 10"):
        cache.reserve(11)
