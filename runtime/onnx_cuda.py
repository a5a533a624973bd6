"""The CUDA backend: an ONNX Runtime session on a GPU, its KV cache there, every step of decoding at fixed addresses."""

from __future__ import annotations

import contextlib
import io
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from specquant.custom_ops.errors import SpecQuantError
from specquant.runtime.artifact import Manifest, ModelInfo
from specquant.runtime.choosing import ChoosingOnDevice, load_chooser
from specquant.runtime.cuda_driver import Device
from specquant.runtime.on_device import DECODE, Memory, Tensors
from specquant.runtime.onnx_graph import open_graph, run_graph

PROVIDER = "CUDAExecutionProvider"
PROMPT_BLOCK = 2048  # tokens of a prompt at a time: enough to fill a GPU
_OLDEST = (7, 5)  # compute capability that ONNX Runtime's CUDA 13 builds still run on
_CAPTURE = "graph capture"  # ONNX Runtime's words for a graph that it cannot replay as one


class OnnxCuda(ChoosingOnDevice):
    """Implements session.Backend with ONNX Runtime's CUDA provider."""

    def __init__(self, graph: BoundGraph, memory: Memory, model: ModelInfo, context: int) -> None:
        super().__init__(
            graph,
            memory,
            model,
            context,
            capacity=context,
            prompt_block=min(PROMPT_BLOCK, context),
            dtype=model.float_dtype,
            cache_row=model.cache_row,
            fixed_mask=graph.capture,
        )


class BoundGraph:
    """Implements on_device.Graph with a session: tensors are bound where they lie, and stay bound while they do.

    device: where that is, `cuda`, or `cpu` in tests. capture: steps of decoding are recorded once as a CUDA graph and
    then replayed; the session was made for it.
    """

    def __init__(
        self,
        session: Any,
        model: ModelInfo,
        rank: NDArray[np.int64] | None,
        device: str = "cuda",
        capture: bool = False,
    ) -> None:
        self.capture = capture
        self._session, self._model, self._rank, self._device = session, model, rank, device
        # kind -> what is bound, its binding and options, and what these must keep alive
        self._bound: dict[int, tuple[Any, Any, Any, Any]] = {}
        self._recorded: dict[Any, int] = {}  # what -> the id of its CUDA graph

    def run(self, kind: int, tensors: Tensors, keep: int) -> None:
        """Enqueue one call. Raises SpecQuantError if ONNX Runtime fails."""
        what = (keep, *tensors.values())
        if kind not in self._bound or self._bound[kind][0] != what:
            binding, kept = self._bind(tensors, keep)
            self._bound[kind] = (what, binding, self._options(kind, what), kept)
        run_graph(self._session, *self._bound[kind][1:3])

    def _bind(self, tensors: Tensors, keep: int) -> tuple[Any, Any]:
        binding, model = self._session.io_binding(), self._model
        for name, (place, shape) in tensors.items():
            cached = name.startswith(("past_", "present."))
            dtype = model.cache_row[1] if cached else model.float_dtype if name == "logits" else np.dtype(np.int64)
            bind = binding.bind_output if name.startswith(("present.", "logits")) else binding.bind_input
            bind(name, self._device, 0, dtype.type, shape, place)
        on_host = {"logits_to_keep": np.array([keep], np.int64), "rank": self._rank}
        for name, array in on_host.items():
            if array is not None:
                binding.bind_input(name, "cpu", 0, np.int64, array.shape, array.ctypes.data)
        return binding, on_host

    def _options(self, kind: int, what: Any) -> Any:
        import onnxruntime as ort

        options = ort.RunOptions()
        # The caller's download waits, on the same stream.
        options.add_run_config_entry("disable_synchronize_execution_providers", "1")
        if self.capture:
            number = self._recorded.setdefault(what, len(self._recorded) + 1) if kind == DECODE else -1
            options.add_run_config_entry("gpu_graph_id", str(number))
        return options


def load_cuda(
    folder: Path, manifest: Manifest, context: int, *, threads: int, custom_ops: bool, rank: int | None
) -> OnnxCuda:
    """The backend for an artifact, on the first GPU that CUDA_VISIBLE_DEVICES leaves.

    Raises SpecQuantError with what to do: onnxruntime-gpu or our CUDA kernels are missing, there is no GPU, an old one,
    or one with too little free memory, ONNX Runtime's CUDA provider does not start, a damaged graph. Never runs on the
    CPU instead.
    """
    _check_package()
    device = Device()
    check_capability(device.capability)
    if custom_ops:
        from specquant.custom_ops.library_cuda import check_device

        check_device()
    check_memory(folder, manifest, context, device.free_bytes())
    for capture in (True, False):
        provider = {
            "device_id": "0",
            "user_compute_stream": str(device.stream),  # that of copies: all is in one order
            "enable_cuda_graph": str(int(capture)),
            "arena_extend_strategy": "kSameAsRequested",
            "use_tf32": "0",
        }
        try:
            session, bound_rank = open_graph(folder, manifest.model, threads, custom_ops, [(PROVIDER, provider)], rank)
        except SpecQuantError as error:
            if capture and _CAPTURE in str(error):
                continue
            raise
        if PROVIDER not in session.get_providers():
            raise SpecQuantError(
                "ONNX Runtime cannot start its CUDA provider (CUDA 13 or cuDNN 9 is missing or older): "
                "pip install 'onnxruntime-gpu[cuda,cudnn]'"
            )
        graph = BoundGraph(session, manifest.model, bound_rank, capture=capture)
        backend = OnnxCuda(graph, device, manifest.model, context)
        backend.chooser = load_chooser(device)
        return backend
    raise AssertionError("unreachable")


def check_capability(capability: tuple[int, int]) -> None:
    """Raise SpecQuantError for a GPU that is too old."""
    if capability < _OLDEST:
        found, wanted = (".".join(map(str, pair)) for pair in (capability, _OLDEST))
        raise SpecQuantError(f"the GPU has compute capability {found} and {wanted} is needed: use --device cpu")


def check_memory(folder: Path, manifest: Manifest, context: int, free: int) -> None:
    """Raise SpecQuantError unless weights and the cache of one sequence fit into `free` bytes."""
    weights = sum(info.size for name, info in manifest.files.items() if name.startswith("model.onnx"))
    cache = context * manifest.model.cache_bytes_per_token
    if weights + cache > free:
        sizes = (f"{size / 1e9:.2f} GB" for size in (weights + cache, weights, cache, free))
        text = "{} needs {} of GPU memory ({} of weights, {} of cache for {:,} tokens) and {} are free"
        total, of_weights, of_cache, left = sizes
        text = text.format(folder, total, of_weights, of_cache, context, left)
        raise SpecQuantError(f"{text}: use a shorter --context, or --device cpu")


def _check_package() -> None:
    try:
        metadata.version("onnxruntime-gpu")
    except metadata.PackageNotFoundError:
        raise SpecQuantError(
            "--device cuda needs onnxruntime-gpu: pip uninstall -y onnxruntime, then pip install 'specquant[gpu]'"
        ) from None
    import onnxruntime as ort

    if PROVIDER not in ort.get_available_providers():
        raise SpecQuantError("this onnxruntime-gpu has no CUDA provider: pip install --force-reinstall onnxruntime-gpu")
    if preload := getattr(ort, "preload_dlls", None):
        with contextlib.redirect_stdout(io.StringIO()):  # it prints what it does not find
            preload()
