"""From an artifact folder to a model that runs: which backend, with which files, threads and rank."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from specquant.custom_ops.errors import SpecQuantError
from specquant.runtime.artifact import Manifest, ReadBytes, open_artifact
from specquant.runtime.stats import physical_cores

if TYPE_CHECKING:
    from specquant.runtime.generate import Model

DEVICES = ("cpu", "cuda")
BACKENDS = ("onnxruntime", "tensorrt")


class Sequences(Protocol):
    """A batch of token sequences and their KV cache, on the device. Row numbers stay 0 … rows − 1."""

    def prefill(self, row: int, ids: NDArray[np.int64]) -> Iterator[NDArray[np.float32]]:
        """Append `ids` [T] to one row; yields its logits in order, blocks [t, vocab] valid until the next."""

    def prefill_last(self, row: int, ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """Append `ids` [T], T > 0, to one row; the last one's logits [vocab]."""

    def decode(self, ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """Append one token to each row, ids [rows]; logits [rows, vocab], valid until the next call."""

    def rewind(self, row: int, tokens: int) -> None:
        """Forget what a row holds beyond its first `tokens`: the next ones continue from there."""

    def drop(self, row: int) -> None:
        """Forget a finished row; the last one takes its number."""


@runtime_checkable
class Choosing(Protocol):
    """What Sequences may offer besides: steps of decoding whose tokens are chosen on the device (Sampling.plain),
    several under way at a time. The caller takes what is under way before it calls anything else.

    ahead: steps that may be under way.
    """

    ahead: int

    def start(self, ids: NDArray[np.int64], temperature: float, top_k: int) -> None:
        """The tokens [rows] that the next step appends, and how all that follow are chosen; none is under way."""

    def enqueue(self, uniforms: NDArray[np.float64]) -> None:
        """Begin a step: append a token to each row, choose the next. uniforms: a number in [0, 1) for each row, none at
        all where tokens are greedy."""

    def ready(self) -> bool:
        """Whether the oldest step under way is done."""

    def take(self) -> tuple[NDArray[np.int64], float]:
        """Of the oldest step under way, for which this waits: the tokens int64 [rows] that it chose, −1 where logits
        were not finite, and the seconds that it took on the device."""


class Backend(Protocol):
    """One loaded graph on one device. A new device implements this and Sequences; nothing else changes."""

    def sequences(self, rows: int) -> Sequences:
        """An empty batch; the caller keeps every row within the context."""


def load(
    folder: str | Path,
    device: str = "cpu",
    threads: int | None = None,
    rank: int | None = None,
    custom_ops: bool = True,
    verify: bool = False,
    context: int | None = None,
    progress: ReadBytes | None = None,
    backend: str = "onnxruntime",
    engine: str | Path | None = None,
    allow_host_code: bool = False,
    exact_logits: bool = False,
) -> Model:
    """A model ready to generate, from the folder that `specquant export` wrote.

    device: `cpu`, or `cuda` for an NVIDIA GPU, which the CPU never replaces (docs/cuda.md); its KV cache has room for
    the whole context. threads: default, the physical cores that this process may use. rank: how many columns of each
    spectral branch are used, default all. custom_ops=False runs the functions of standard operators that travel in the
    file instead of our kernels: slower, the same result. verify: also check the sha256 of every file (`progress` is
    told the bytes). context: a shorter context than the model's, in tokens. backend `tensorrt` runs an engine of
    `specquant build`: `engine` is its folder, default the one for this GPU; allow_host_code lets it run the plugins it
    carries. exact_logits: on a CPU, read all of a head of 8 bits even when one token of one text is decoded; else
    logits of more than 10 below the largest are those of its first 4 bits.
    Raises SpecQuantError for a folder that is no whole artifact and for options that do not fit it.
    """
    from specquant.runtime.generate import Model

    folder = Path(folder)
    if device not in DEVICES:
        raise SpecQuantError(f"device {device!r} is not supported: this version runs on {', '.join(DEVICES)}")
    if threads is not None and threads < 1:
        raise SpecQuantError(f"threads = {threads} is out of range: it must be 1 or more")
    if backend not in BACKENDS:
        raise SpecQuantError(f"backend {backend!r} is unknown: it is one of {', '.join(BACKENDS)}")
    manifest = open_artifact(folder, verify, progress)
    if backend == "tensorrt":
        from specquant.runtime.tensorrt_engine import load_tensorrt

        if rank is not None:
            raise SpecQuantError("an engine's rank is fixed: build it with `specquant build --rank`")
        on_gpu = load_tensorrt(folder, manifest, None if engine is None else Path(engine), context, allow_host_code)
        return Model(folder, manifest, on_gpu, on_gpu.context)
    if engine is not None:
        raise SpecQuantError("an engine is for backend tensorrt: set that too, or leave out the engine")
    context = _context(manifest, context)
    _check_rank(manifest, rank)
    if device == "cuda":
        from specquant.runtime.onnx_cuda import load_cuda

        on_cuda = load_cuda(folder, manifest, context, threads=threads or 1, custom_ops=custom_ops, rank=rank)
        return Model(folder, manifest, on_cuda, context)

    from specquant.runtime.onnx_cpu import OnnxCpu

    on_cpu = OnnxCpu(
        folder,
        manifest.model,
        threads or physical_cores(),
        custom_ops=custom_ops,
        rank=rank,
        context=context,
        exact_logits=exact_logits,
    )
    return Model(folder, manifest, on_cpu, context)


def _context(manifest: Manifest, context: int | None) -> int:
    limit = manifest.model.context_length
    if context is None:
        return limit
    if not 1 <= context <= limit:
        raise SpecQuantError(f"context = {context} is out of range: this model takes 1 to {limit} tokens")
    return context


def _check_rank(manifest: Manifest, rank: int | None) -> None:
    if rank is None:
        return
    if manifest.max_rank == 0:
        raise SpecQuantError(f"rank = {rank} cannot be set: {manifest.name} has no spectral branch")
    if not 0 <= rank <= manifest.max_rank:
        raise SpecQuantError(f"rank = {rank} is out of range: this model's branches have 0 to {manifest.max_rank}")
