"""Sequences over a graph's calls on the memory of a device: their KV cache lies there and is extended in place."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from specquant.runtime.artifact import ModelInfo
from specquant.runtime.cuda_driver import element_bytes

PREFILL, DECODE = 0, 1  # kinds of calls
Tensors = dict[str, tuple[int, tuple[int, ...]]]  # name -> address and shape
_MAX_LOGITS = 1 << 24  # elements of a block of prefill that returns all its logits
_MASK_STEP = 128  # the mask is padded with zeros to a multiple, so that few shapes occur
_ALIGNMENT = 256  # bytes, of what is bound
_ONE = np.ones(1, np.int64)


class Memory(Protocol):
    """What of cuda_driver.Device is used here."""

    def allocate(self, size: int) -> int: ...
    def free(self, place: int) -> None: ...
    def upload(self, place: int, array: NDArray[Any]) -> None: ...
    def download(self, array: NDArray[Any], place: int) -> None: ...
    def copy(self, to: int, place: int, size: int) -> None: ...
    def clear(self, place: int, size: int) -> None: ...


class Graph(Protocol):
    """One call of the graph, with logits of the last `keep` tokens; in the memory's order."""

    def run(self, kind: int, tensors: Tensors, keep: int) -> None: ...


class OnDevice:
    """Implements session.Backend.

    capacity: tokens that a row of the cache has room for; prompt_block: of a prompt at a time; dtype: of the logits;
    cache_row: elements of a token in the cache of one kv head, keys or values, and their type. fixed_mask: decoding
    gives the graph a mask of the whole capacity, so that its shapes stay.
    """

    def __init__(
        self,
        graph: Graph,
        memory: Memory,
        model: ModelInfo,
        context: int,
        *,
        capacity: int,
        prompt_block: int,
        dtype: np.dtype[np.floating],
        cache_row: tuple[int, np.dtype[Any]],
        fixed_mask: bool = False,
    ) -> None:
        self.graph, self.memory, self.model, self.context = graph, memory, model, context
        self.capacity, self.prompt_block, self.dtype, self.cache_row = capacity, prompt_block, dtype, cache_row
        self.fixed_mask = fixed_mask
        self.block = max(1, min(prompt_block, _MAX_LOGITS // model.vocab_size))  # of prefill with all its logits

    def sequences(self, rows: int) -> DeviceSequences:
        return DeviceSequences(self, rows)

    def check_length(self, tokens: int) -> None:
        """Raise unless a row of so many tokens fits. ValueError: the caller keeps within the context."""
        if tokens > self.context:
            raise ValueError(f"{tokens} tokens exceed the context of {self.context}")


class DeviceSequences:
    """Implements session.Sequences. Rows are prefilled one by one, in blocks, and decoded together."""

    def __init__(self, backend: OnDevice, rows: int) -> None:
        self._backend = backend
        model, memory, capacity = backend.model, backend.memory, backend.capacity
        width, dtype = backend.cache_row
        self._lengths: NDArray[np.int64] = np.zeros(rows, np.int64)
        self._row_shape = (model.num_kv_heads, capacity, width)
        self._row_bytes = element_bytes(self._row_shape, dtype)
        layers = range(model.num_layers)
        self._names = [f"{i}.{part}" for i in layers for part in ("key", "value")]
        most = max(rows, backend.prompt_block)
        self._places: list[int] = []
        # In one piece: allocations take longer than a layer. Attention may multiply what it does not see by 0, so all
        # of it must start finite.
        size = -(-rows * self._row_bytes // _ALIGNMENT) * _ALIGNMENT
        first = self._allocate(size * len(self._names), clear=True)
        self._caches = [first + size * index for index in range(len(self._names))]
        self._ids, self._positions = (self._allocate(8 * most) for _ in range(2))
        self._mask = self._allocate(8 * rows * capacity)
        self._masked: tuple[Any, ...] = ()  # what the mask on the device says: first row, width, tokens of each
        self._logits = self._allocate(max(rows, backend.block) * model.vocab_size * backend.dtype.itemsize)
        self._free = memory.free

    def __del__(self) -> None:
        for place in getattr(self, "_places", []):
            self._free(place)

    def prefill(self, row: int, ids: NDArray[np.int64]) -> Iterator[NDArray[np.float32]]:
        for part in _blocks(ids, self._backend.block):
            yield self._prefill(row, part, len(part))

    def prefill_last(self, row: int, ids: NDArray[np.int64]) -> NDArray[np.float32]:
        for part in _blocks(ids, self._backend.prompt_block):
            logits = self._prefill(row, part, 1)
        return logits[-1]

    def decode(self, ids: NDArray[np.int64]) -> NDArray[np.float32]:
        logits = self._call(DECODE, 0, ids[:, None], 1)[:, 0]
        self._lengths += 1
        return logits

    def rewind(self, row: int, tokens: int) -> None:
        if not 0 <= tokens <= self._lengths[row]:
            raise ValueError(f"a row of {self._lengths[row]} tokens cannot keep {tokens}")
        self._lengths[row] = tokens

    def drop(self, row: int) -> None:
        last = len(self._lengths) - 1
        if row != last:
            for place in self._caches:
                to, source = (place + index * self._row_bytes for index in (row, last))
                self._backend.memory.copy(to, source, self._row_bytes)
        self._lengths[row] = self._lengths[last]
        self._lengths = self._lengths[:last]

    def _prefill(self, row: int, part: NDArray[np.int64], keep: int) -> NDArray[np.float32]:
        logits = self._call(PREFILL, row, part[None], keep)[0]
        self._lengths[row] += len(part)
        return logits

    def _call(self, kind: int, first: int, ids: NDArray[np.int64], keep: int) -> NDArray[np.float32]:
        """Logits [rows, keep, vocab] of the last `keep` of `ids` [rows, tokens], for rows from `first` on."""
        backend, memory = self._backend, self._backend.memory
        width = self._give(kind, first, ids)
        tensors = self._tensors(first, ids.shape, width, keep)
        backend.graph.run(kind, tensors, keep)
        logits: NDArray[np.floating] = np.empty(tensors["logits"][1], backend.dtype)
        memory.download(logits, self._logits)
        return logits.astype(np.float32, copy=False)

    def _give(self, kind: int, first: int, ids: NDArray[np.int64]) -> int:
        """Put what a call of `ids` [rows, tokens] reads on the device; the width of its mask."""
        memory, (rows, tokens) = self._backend.memory, ids.shape
        lengths = self._lengths[first : first + rows]
        width = self._width(kind, int(lengths.max()) + tokens)
        self._show_mask(first, width, lengths + tokens)
        positions = lengths[:, None] + np.arange(tokens)
        for place, array in ((self._ids, ids), (self._positions, positions)):
            memory.upload(place, np.ascontiguousarray(array, np.int64))
        return width

    def _width(self, kind: int, longest: int) -> int:
        """Of the mask, where the longest row has so many tokens."""
        backend = self._backend
        backend.check_length(longest)
        if backend.fixed_mask and kind == DECODE:
            return backend.capacity
        return min(backend.capacity, -(-longest // _MASK_STEP) * _MASK_STEP)

    def _tensors(self, first: int, shape: tuple[int, ...], width: int, keep: int) -> Tensors:
        """Of a call with ids [rows, tokens] = `shape`, for rows from `first` on."""
        rows = shape[0]
        tensors = {
            "input_ids": (self._ids, shape),
            "position_ids": (self._positions, shape),
            "attention_mask": (self._mask, (rows, width)),
            "logits": (self._logits, (rows, keep, self._backend.model.vocab_size)),
        }
        for name, start in zip(self._names, self._caches, strict=True):
            cache = (start + first * self._row_bytes, (rows, *self._row_shape))
            tensors[f"past_key_values.{name}"] = tensors[f"present.{name}"] = cache
        return tensors

    def _show_mask(self, first: int, width: int, total: NDArray[np.int64]) -> None:
        """The mask [rows, width] of rows of `total` tokens: only what a step adds, if that is all that changes."""
        memory = self._backend.memory
        if self._masked == (first, width, *total.tolist()):
            return
        if self._masked == (first, width, *(total - 1).tolist()):
            for row, tokens in enumerate(total.tolist()):
                memory.upload(self._mask + 8 * (row * width + tokens - 1), _ONE)
        else:
            memory.upload(self._mask, (np.arange(width) < total[:, None]).astype(np.int64))
        self._masked = (first, width, *total.tolist())

    def _allocate(self, size: int, clear: bool = False) -> int:
        memory = self._backend.memory
        place = memory.allocate(size)
        self._places.append(place)
        self._free = memory.free
        if clear:
            memory.clear(place, size)
        return place


def _blocks(ids: NDArray[np.int64], size: int) -> Iterator[NDArray[np.int64]]:
    return (ids[start : start + size] for start in range(0, len(ids), size))
