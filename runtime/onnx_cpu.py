"""The CPU backend: one ONNX Runtime session, its KV cache bound in place."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from specquant.runtime.artifact import ModelInfo
from specquant.runtime.cache import KVCache
from specquant.runtime.onnx_graph import open_graph, run_graph

# A block of prefill has at most this many logits: its longest buffer stays at 64 MB whatever the prompt.
_MAX_LOGITS = 1 << 24
# Tokens of a block. GroupQueryAttention multiplies all tokens of a call with one another, those ahead too, so that 512
# tokens take 0.55 s of one core in blocks of 128, 0.82 s at once; ours does not, but longer blocks need more memory
# (docs/performance.md).
_BLOCK, _BLOCK_OUR_ATTENTION = 128, 256


# Logits further than this below the largest one stay at the first digit of a head of 8 bits when one token is decoded:
# KL divergence 0.003, for 11 of the 28 MB that SmolLM2's head has (docs/performance.md).
_WITHIN = 10.0


class OnnxCpu:
    """Implements session.Backend with ONNX Runtime's CPU provider."""

    def __init__(
        self,
        folder: Path,
        model: ModelInfo,
        threads: int,
        *,
        custom_ops: bool,
        rank: int | None,
        context: int,
        exact_logits: bool,
    ) -> None:
        """Raises SpecQuantError: ONNX Runtime or our library missing, a damaged graph, one of another model."""
        self.model = model
        self.context = context
        self.dtype: np.dtype[np.floating] = np.dtype(model.float_type)
        ours = self.our_attention = model.kv_bits == 4 or model.attention == "HalfKVAttention"
        self.prompt_block = _BLOCK_OUR_ATTENTION if ours else _BLOCK
        self.block = max(1, min(self.prompt_block, _MAX_LOGITS // model.vocab_size))  # of prefill with all its logits
        # A head that is ONNX Runtime's own product needs its threads awake.
        own_threads = custom_ops and ours and model.head_bits < 16 and threads > 1
        self.session, self.rank = open_graph(
            folder,
            model,
            threads,
            custom_ops,
            ["CPUExecutionProvider"],
            rank,
            own_threads,
            within=0.0 if exact_logits else _WITHIN,
        )

    def sequences(self, rows: int) -> OnnxSequences:
        return OnnxSequences(self, rows)


class OnnxSequences:
    """Implements session.Sequences. Rows are prefilled one by one, in blocks, and decoded together.

    GroupQueryAttention takes several new tokens after a past for one row only; one row at a time also means that
    no prompt is padded. attention_mask row b has as many ones as it has tokens, docs/formats.md.
    """

    def __init__(self, backend: OnnxCpu, rows: int) -> None:
        self._backend = backend
        model = backend.model
        width, dtype = model.cache_row
        self._cache = KVCache(
            layers=model.num_layers,
            rows=rows,
            kv_heads=model.num_kv_heads,
            width=width,
            dtype=dtype,
            limit=backend.context,
        )
        self._step: _Binding | None = None  # of decode: kept while rows and buffers stay

    def prefill(self, row: int, ids: NDArray[np.int64]) -> Iterator[NDArray[np.float32]]:
        yield from self._prefill(row, ids, self._backend.block, 0)

    def prefill_last(self, row: int, ids: NDArray[np.int64]) -> NDArray[np.float32]:
        for logits in self._prefill(row, ids, self._backend.prompt_block, 1):
            last = logits[-1]
        return last.copy()

    def _prefill(self, row: int, ids: NDArray[np.int64], block: int, keep: int) -> Iterator[NDArray[np.float32]]:
        cache = self._cache
        cache.reserve(int(cache.lengths[row]) + len(ids))
        self._step = None  # its mask does not have these tokens
        for part in (ids[start : start + block] for start in range(0, len(ids), block)):
            binding = _Binding(self._backend, cache, slice(row, row + 1), len(part), keep)
            logits = binding.run(part[None], cache.lengths[row : row + 1])[0]
            cache.lengths[row] += len(part)
            yield logits

    def decode(self, ids: NDArray[np.int64]) -> NDArray[np.float32]:
        cache = self._cache
        moved = cache.reserve(int(cache.lengths.max()) + 1)
        if moved or self._step is None:
            self._step = _Binding(self._backend, cache, slice(0, cache.rows), 1)
        logits = self._step.run(ids[:, None], cache.lengths)[:, 0]
        cache.lengths += 1
        return logits

    def rewind(self, row: int, tokens: int) -> None:
        self._cache.rewind(row, tokens)
        self._step = None

    def drop(self, row: int) -> None:
        self._cache.drop(row)
        self._step = None


class _Binding:
    """The graph's inputs and outputs bound to fixed memory, for `tokens` new tokens in each of some rows, with logits
    of the last `keep` of them, or of all for 0.

    GroupQueryAttention computes as many scores as the mask is long, so that a step binds another mask. Ours looks at
    the ones in it alone: its mask has the cache's capacity, nothing changes its shape from step to step, and ONNX
    Runtime plans its memory once.
    """

    def __init__(self, backend: OnnxCpu, cache: KVCache, rows: slice, tokens: int, keep: int = 0) -> None:
        count = rows.stop - rows.start
        self._session = backend.session
        self._binding = self._session.io_binding()
        self._ids = np.empty((count, tokens), np.int64)
        self._positions = np.empty((count, tokens), np.int64)
        shape = (count, keep or tokens, backend.model.vocab_size)
        self._logits: NDArray[np.floating] = np.empty(shape, backend.dtype)
        self._keep = np.array([keep], np.int64)
        self._kept = [buffer[rows] for buffer in cache.buffers]  # views, alive while they are bound
        self._rank = backend.rank
        self._in_place = backend.our_attention
        self._mask: NDArray[np.int64] = _mask(cache.lengths[rows], cache.capacity)
        self._input("input_ids", self._ids)
        self._input("position_ids", self._positions)
        if keep:
            self._input("logits_to_keep", self._keep)
        if self._rank is not None:
            self._input("rank", self._rank)
        self._input("attention_mask", self._mask)
        for index, buffer in enumerate(self._kept):
            name = f"{index // 2}.{('key', 'value')[index % 2]}"
            self._input(f"past_key_values.{name}", buffer)
            self._output(f"present.{name}", buffer)
        self._output("logits", self._logits)

    def run(self, ids: NDArray[np.int64], lengths: NDArray[np.int64]) -> NDArray[np.float32]:
        """Logits [rows, kept, vocab] of `ids` [rows, tokens], after `lengths` [rows] tokens in the cache."""
        tokens = ids.shape[1]
        self._ids[:] = ids
        self._positions[:] = lengths[:, None] + np.arange(tokens)
        if self._in_place:
            for row, length in enumerate(lengths):
                self._mask[row, length : length + tokens] = 1
        else:
            self._mask = _mask(lengths + tokens, int(lengths.max()) + tokens)
            self._input("attention_mask", self._mask)
        run_graph(self._session, self._binding)
        return self._logits.astype(np.float32, copy=False)

    def _input(self, name: str, array: NDArray[Any]) -> None:
        self._binding.bind_input(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)

    def _output(self, name: str, array: NDArray[Any]) -> None:
        self._binding.bind_output(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)


def _mask(lengths: NDArray[np.int64], width: int) -> NDArray[np.int64]:
    """int64 [rows, width]: as many ones in a row as it has tokens."""
    return (np.arange(width) < lengths[:, None]).astype(np.int64)
