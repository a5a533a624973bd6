"""The CPU backend: one ONNX Runtime session, its KV cache bound in place."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from specquant.custom_ops.errors import SpecQuantError
from specquant.custom_ops.library import check_onnxruntime, register
from specquant.runtime.artifact import ModelInfo
from specquant.runtime.cache import KVCache

# A block of prefill has at most this many logits: its longest buffer stays at 64 MB whatever the prompt.
_MAX_LOGITS = 1 << 24
# Tokens of a block. GroupQueryAttention multiplies all tokens of a call with one another, those ahead too, so that 512
# tokens take 0.55 s of one core in blocks of 128, 0.82 s at once (docs/performance.md); ours does not.
_BLOCK, _BLOCK_OUR_ATTENTION = 128, 512


class OnnxCpu:
    """Implements session.Backend with ONNX Runtime's CPU provider."""

    def __init__(
        self, folder: Path, model: ModelInfo, threads: int, *, custom_ops: bool, rank: int | None, context: int
    ) -> None:
        """Raises SpecQuantError: ONNX Runtime or our library missing, a damaged graph, one of another model."""
        self.model = model
        self.context = context
        self.dtype: np.dtype[np.floating] = np.dtype(model.float_type)
        ours = model.kv_bits == 4 or model.attention == "HalfKVAttention"
        self.prompt_block = _BLOCK_OUR_ATTENTION if ours else _BLOCK
        self.block = max(1, min(self.prompt_block, _MAX_LOGITS // model.vocab_size))  # of prefill with all its logits
        self.session = _open(folder, threads, custom_ops)
        names = {item.name for item in self.session.get_overridable_initializers()}
        if rank is not None and "rank" not in names:
            raise SpecQuantError(f"{folder / 'model.onnx'} has no `rank` to set: re-export the model")
        self.rank = None if rank is None else np.array([rank], np.int64)
        if "logits_to_keep" not in names:
            raise SpecQuantError(f"{folder / 'model.onnx'} has no `logits_to_keep`: re-export the model")
        _check_graph(folder, self.session, model)

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
        if cache.reserve(int(cache.lengths[row]) + len(ids)):
            self._step = None
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

    def drop(self, row: int) -> None:
        self._cache.drop(row)
        self._step = None


class _Binding:
    """The graph's inputs and outputs bound to fixed memory, for `tokens` new tokens in each of some rows, with logits
    of the last `keep` of them, or of all for 0.

    Everything but the mask keeps its shape from step to step, so a step binds one thing.
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
        self._mask: NDArray[np.int64]
        self._input("input_ids", self._ids)
        self._input("position_ids", self._positions)
        if keep:
            self._input("logits_to_keep", self._keep)
        if self._rank is not None:
            self._input("rank", self._rank)
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
        total = lengths + tokens
        self._mask = (np.arange(total.max()) < total[:, None]).astype(np.int64)
        self._input("attention_mask", self._mask)
        try:
            self._session.run_with_iobinding(self._binding)
        except Exception as error:  # onnxruntime's classes share no base of their own
            raise SpecQuantError(f"ONNX Runtime failed on this model: {_reason(error)}") from error
        return self._logits.astype(np.float32, copy=False)

    def _input(self, name: str, array: NDArray[Any]) -> None:
        self._binding.bind_input(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)

    def _output(self, name: str, array: NDArray[Any]) -> None:
        self._binding.bind_output(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)


def _open(folder: Path, threads: int, custom_ops: bool) -> Any:
    check_onnxruntime()
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 4  # its errors reach the user as ours, in one line
    # Threads wait actively during a run, for speed, and not between runs: a slow reader costs no processor time.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    if custom_ops:
        register(options)
    path = folder / "model.onnx"
    try:
        return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except MemoryError:
        raise
    except Exception as error:
        raise SpecQuantError(_open_failure(path, error)) from error


def _open_failure(path: Path, error: Exception) -> str:
    if "external" in str(error).lower():  # ONNX's word for what lies in model.onnx.data
        path = path.with_name(f"{path.name}.data")
    return f"{path} cannot be loaded, it is damaged or made for another version: re-export the model ({_reason(error)})"


def _check_graph(folder: Path, session: Any, model: ModelInfo) -> None:
    """The graph has the inputs and outputs of docs/formats.md, in the sizes that the manifest gives."""
    past = [f"past_key_values.{i}.{kind}" for i in range(model.num_layers) for kind in ("key", "value")]
    present = [name.replace("past_key_values", "present") for name in past]
    inputs = {item.name: item for item in session.get_inputs()}
    outputs = {item.name: item for item in session.get_outputs()}
    names = {"float32": "tensor(float)", "float16": "tensor(float16)", "int8": "tensor(int8)"}
    width, dtype = model.cache_row
    fits = set(inputs) == {"input_ids", "attention_mask", "position_ids", *past}
    fits = fits and set(outputs) == {"logits", *present}
    fits = fits and all(
        inputs[name].type == names[dtype.name] and list(inputs[name].shape[1::2]) == [model.num_kv_heads, width]
        for name in past
    )
    fits = fits and outputs["logits"].type == names[model.float_type]
    fits = fits and outputs["logits"].shape[-1] == model.vocab_size
    if not fits:
        raise SpecQuantError(f"{folder / 'model.onnx'} is not the graph that specquant.json describes: re-export it")


def _reason(error: Exception) -> str:
    """ONNX Runtime's message in a line, without the codes and function names before it."""
    return " ".join(str(error).split()).rsplit(" : ", 1)[-1][:200]
