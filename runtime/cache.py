"""The KV cache of a batch: buffers that the graph reads and extends in place, grown by doubling."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_FIRST_CAPACITY = 256  # tokens: a short chat never grows


class KVCache:
    """Per layer a key and a value array [rows, kv_heads, capacity, head_dim]; row b holds lengths[b] tokens.

    Past and present are one buffer: GroupQueryAttention writes the new tokens at lengths[b] and reads what is
    before them, so appending costs no copy, and what lies beyond lengths[b] is never read.
    """

    def __init__(
        self, *, layers: int, rows: int, kv_heads: int, head_dim: int, dtype: np.dtype[np.floating], limit: int
    ) -> None:
        self.limit = limit
        self.capacity = 0
        self.lengths: NDArray[np.int64] = np.zeros(rows, np.int64)
        self._shape = (kv_heads, head_dim)
        self._dtype = dtype
        self.buffers = [self._empty() for _ in range(2 * layers)]  # key 0, value 0, key 1, …

    @property
    def rows(self) -> int:
        return len(self.lengths)

    def reserve(self, tokens: int) -> bool:
        """Make room for `tokens` in every row; True when the buffers moved. ValueError beyond the limit."""
        if tokens > self.limit:
            raise ValueError(f"{tokens} tokens exceed the cache's limit of {self.limit}")
        if tokens <= self.capacity:
            return False
        capacity = max(_FIRST_CAPACITY, self.capacity)
        while capacity < tokens:
            capacity *= 2
        self.capacity = min(capacity, self.limit)
        used = int(self.lengths.max(initial=0))
        for index, old in enumerate(self.buffers):  # one at a time: two copies of one buffer, not of the cache
            new = self._empty()
            new[:, :, :used] = old[:, :, :used]
            self.buffers[index] = new
        return True

    def drop(self, row: int) -> None:
        """Forget a row: the last one takes its place, so the rows that are left stay together."""
        last = self.rows - 1
        used = int(self.lengths[last])
        for index, buffer in enumerate(self.buffers):
            if row != last:
                buffer[row, :, :used] = buffer[last, :, :used]
            self.buffers[index] = buffer[:last]
        self.lengths[row] = self.lengths[last]
        self.lengths = self.lengths[:last]

    def _empty(self) -> NDArray[np.floating]:
        # Not zeroed: the system gives pages as tokens fill them.
        heads, head_dim = self._shape
        return np.empty((self.rows, heads, self.capacity, head_dim), self._dtype)
