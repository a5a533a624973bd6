"""The TensorRT backend: sequences over an engine's calls, their KV cache on the GPU and extended in place."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from specquant.custom_ops.errors import SpecQuantError
from specquant.runtime.artifact import ModelInfo
from specquant.runtime.cuda_driver import element_bytes
from specquant.runtime.engine import EngineInfo

PREFILL, DECODE = 0, 1  # optimisation profiles
_MAX_LOGITS = 1 << 24  # elements of a block of prefill that returns all its logits
_MASK_STEP = 128  # the mask is padded with zeros to a multiple, so that few shapes occur


class Memory(Protocol):
    """What of cuda_driver.Device is used here."""

    def allocate(self, size: int) -> int: ...
    def free(self, place: int) -> None: ...
    def upload(self, place: int, array: NDArray[Any]) -> None: ...
    def download(self, array: NDArray[Any], place: int) -> None: ...
    def copy(self, to: int, place: int, size: int) -> None: ...
    def clear(self, place: int, size: int) -> None: ...


class Engine(Protocol):
    """One call of the graph: tensors by name, as (address, shape); in the memory's order."""

    def run(self, profile: int, tensors: dict[str, tuple[int, tuple[int, ...]]], keep: int) -> None: ...


class TensorRT:
    """Implements session.Backend with an engine.

    Its cache is of the engine's float type even where the artifact's is 4-bit (profile `portable`).
    """

    def __init__(self, engine: Engine, memory: Memory, info: EngineInfo, model: ModelInfo, context: int) -> None:
        self.engine, self.memory, self.info, self.model, self.context = engine, memory, info, model, context
        self.dtype: np.dtype[np.floating] = np.dtype(info.float_type)
        self.block = max(1, min(info.block, _MAX_LOGITS // model.vocab_size))  # of prefill with all its logits

    def sequences(self, rows: int) -> TensorRTSequences:
        if rows > self.info.max_batch:
            raise SpecQuantError(
                f"{rows} prompts at once exceed this engine's batch of {self.info.max_batch}: build it with "
                f"`--max-batch {rows}`, or give fewer"
            )
        return TensorRTSequences(self, rows)


class TensorRTSequences:
    """Implements session.Sequences. Rows are prefilled one by one, in blocks, and decoded together."""

    def __init__(self, backend: TensorRT, rows: int) -> None:
        self._backend = backend
        info, model, memory = backend.info, backend.model, backend.memory
        self._lengths: NDArray[np.int64] = np.zeros(rows, np.int64)
        self._row_shape = (model.num_kv_heads, info.max_seq, model.head_dim)
        self._row_bytes = element_bytes(self._row_shape, backend.dtype)
        layers = range(model.num_layers)
        self._names = [f"{i}.{part}" for i in layers for part in ("key", "value")]
        most = max(rows, info.block)
        self._places: list[int] = []
        # Attention multiplies what it does not see by 0, so the cache must start finite.
        self._caches = [self._allocate(rows * self._row_bytes, clear=True) for _ in self._names]
        self._ids, self._positions = (self._allocate(8 * most) for _ in range(2))
        self._mask = self._allocate(8 * rows * info.max_seq)
        self._logits = self._allocate(max(rows, backend.block) * model.vocab_size * backend.dtype.itemsize)
        self._free = memory.free

    def __del__(self) -> None:
        for place in getattr(self, "_places", []):
            self._free(place)

    def prefill(self, row: int, ids: NDArray[np.int64]) -> Iterator[NDArray[np.float32]]:
        for part in _blocks(ids, self._backend.block):
            yield self._prefill(row, part, len(part))

    def prefill_last(self, row: int, ids: NDArray[np.int64]) -> NDArray[np.float32]:
        for part in _blocks(ids, self._backend.info.block):
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

    def _call(self, profile: int, first: int, ids: NDArray[np.int64], keep: int) -> NDArray[np.float32]:
        """Logits [rows, keep, vocab] of the last `keep` of `ids` [rows, tokens], for rows from `first` on."""
        backend, memory, (rows, tokens) = self._backend, self._backend.memory, ids.shape
        lengths = self._lengths[first : first + rows]
        total = lengths + tokens
        longest = int(total.max())
        if longest > backend.context:
            raise SpecQuantError(
                f"{longest} tokens exceed this engine's {backend.context}: build it with `--max-seq {longest}`"
            )
        width = min(backend.info.max_seq, -(-longest // _MASK_STEP) * _MASK_STEP)
        mask = (np.arange(width) < total[:, None]).astype(np.int64)
        positions = lengths[:, None] + np.arange(tokens)
        for place, array in ((self._ids, ids), (self._positions, positions), (self._mask, mask)):
            memory.upload(place, np.ascontiguousarray(array, np.int64))
        tensors = {
            "input_ids": (self._ids, ids.shape),
            "position_ids": (self._positions, ids.shape),
            "attention_mask": (self._mask, mask.shape),
            "logits": (self._logits, (rows, keep, backend.model.vocab_size)),
        }
        for name, start in zip(self._names, self._caches, strict=True):
            cache = (start + first * self._row_bytes, (rows, *self._row_shape))
            tensors[f"past_key_values.{name}"] = tensors[f"present.{name}"] = cache
        backend.engine.run(profile, tensors, keep)
        logits: NDArray[np.floating] = np.empty(tensors["logits"][1], backend.dtype)
        memory.download(logits, self._logits)
        return logits.astype(np.float32, copy=False)

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
