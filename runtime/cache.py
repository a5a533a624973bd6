"""The KV cache of a batch: buffers that the graph reads and extends in place, grown by doubling."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

_FIRST_CAPACITY = 256  # tokens: a short chat never grows


class KVCache:
    """Per layer a key and a value array [rows, kv_heads, capacity, width]; row b holds lengths[b] tokens.

    width is head_dim floats (of 32 or 16 bits), or the bytes that a 4-bit cache packs them into (int8). Past and
    present are one buffer: the graph's attention writes the new tokens at lengths[b] and reads what is before them, so
    appending costs no copy, and what lies beyond lengths[b] is never read.
    """

    def __init__(self, *, layers: int, rows: int, kv_heads: int, width: int, dtype: np.dtype[Any], limit: int) -> None:
        self.limit = limit
        self.capacity = 0
        self.lengths: NDArray[np.int64] = np.zeros(rows, np.int64)
        self._shape = (kv_heads, width)
        self._dtype = dtype
        self.buffers = [self._empty() for _ in range(2 * layers)]  # key 0, value 0, key 1, …

    @property
    def rows(self) -> int:
        return len(self.lengths)

    @property
    def nbytes(self) -> int:
        """Memory that the buffers take when every row is full to the capacity."""
        return sum(buffer.nbytes for buffer in self.buffers)

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

    def rewind(self, row: int, tokens: int) -> None:
        """Keep a row's first `tokens`. ValueError when it has fewer."""
        if not 0 <= tokens <= self.lengths[row]:
            raise ValueError(f"a row of {self.lengths[row]} tokens cannot keep {tokens}")
        self.lengths[row] = tokens

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

    def _empty(self) -> NDArray[Any]:
        # Not zeroed: the system gives pages as tokens fill them.
        heads, width = self._shape
        return np.empty((self.rows, heads, self.capacity, width), self._dtype)
