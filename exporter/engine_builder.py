"""The one place that calls TensorRT's parser and builder; TensorRT and TensorRT-RTX share the interface."""

from __future__ import annotations

import contextlib
import ctypes
import re
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import FrameType
from typing import Any, BinaryIO

from specquant.custom_ops.errors import SpecQuantError
from specquant.custom_ops.library_tensorrt import prepare_plugins
from specquant.exporter.timings import keep_timings, use_timings
from specquant.runtime.cuda_driver import Device
from specquant.runtime.engine import MODULES

_COUNTED_PHASE = "Computing profile costs"  # where the time goes; the others nest in it or take no second


@dataclass(frozen=True)
class Limits:
    """max_batch rows of one token or one row of `block` tokens a call; max_seq tokens in a row of the cache."""

    max_batch: int
    max_seq: int
    block: int


@dataclass(frozen=True)
class Built:
    """layers: one line each, as the builder prints them, of both profiles. plugins: the layers that are plugins,
    sorted. Bytes are on the GPU; activation_bytes of prefill and of decode."""

    version: str
    weights_bytes: int
    activation_bytes: list[int]
    layers: list[str]
    plugins: list[str]


def load_api(target: str) -> Any:
    """The Python module of `target`. Raises SpecQuantError if it is not installed."""
    try:
        return import_module(MODULES[target])
    except ImportError as error:
        raise SpecQuantError(
            f"{MODULES[target]} cannot be imported ({error}): pip install 'specquant[{target}]'"
        ) from None


def check_gpu(api: Any, target: str, gpu: str | None, profile: str) -> str:
    """The name of the GPU that the engine is for, `sm89` or such. Raises SpecQuantError if it cannot be."""
    if target == "tensorrt":
        if gpu is not None:
            raise SpecQuantError("--gpu is for --target tensorrt-rtx: TensorRT builds for the GPU of this machine")
        return Device().gpu
    known = [name.lower() for name in api.ComputeCapability.__members__ if name.startswith("SM")]
    if gpu is None or gpu not in known:
        wrong = "needs --gpu" if gpu is None else f"does not build for {gpu!r}"
        raise SpecQuantError(f"TensorRT-RTX {wrong}: give one of {', '.join(known)}")
    if profile == "custom" and int(gpu[2:]) < 80:
        raise SpecQuantError(f"our kernels need compute capability 8.0, {gpu} is older: use --profile portable")
    return gpu


def build_engine(
    api: Any,
    path: Path,
    engine: Path,
    target: str,
    gpu: str,
    limits: Limits,
    report: Callable[[str, int, int], None],
    plugins: Path | None = None,
    embed: bool = False,
    timings: Path | None = None,
) -> Built:
    """Write an engine of the lowered graph at `path` to `engine`; optimisation profile 0 is prefill, 1 is decode.

    plugins: the library of those that the graph calls; embed: the engine carries it. timings: what earlier builds
    measured, and this one adds to.

    Raises SpecQuantError with TensorRT's first error, OSError if the engine cannot be written, KeyboardInterrupt if one
    came meanwhile: TensorRT is told to stop, since an exception may not pass through it.
    """
    _return_freed_memory()
    log = _log(api)
    builder = api.Builder(log)
    if plugins is not None:
        _load_plugins(api, builder, target, plugins, log)
    network = builder.create_network(1 << int(api.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = api.OnnxParser(network, log)
    report("reading the graph", 0, 1)
    if not parser.parse_from_file(str(path)):
        raise SpecQuantError(f"{target} does not take this graph: {_refusal(parser, log)}")
    _let_attention_decompose(api, network)
    config = builder.create_builder_config()
    if target == "tensorrt-rtx":
        config.num_compute_capabilities = 1
        config.set_compute_capability(api.ComputeCapability.__members__[gpu.upper()], 0)
    if aliased := getattr(api.PreviewFeature, "ALIASED_PLUGIN_IO_10_03", None):  # attention's cache, in place
        config.set_preview_feature(aliased, True)
    if plugins is not None and embed:
        config.plugins_to_serialize = [str(plugins)]
    if timings is not None:
        use_timings(config, timings)
    config.profiling_verbosity = api.ProfilingVerbosity.DETAILED  # names of layers, in the log and in the engine
    for profile in optimization_profiles(builder, network, limits):
        config.add_optimization_profile(profile)
    with _interrupts_deferred() as interrupted, engine.open("wb") as file:
        config.progress_monitor = _monitor(api, report, interrupted)
        written = _write(api, builder, network, config, file)
    if interrupted.is_set():
        raise KeyboardInterrupt
    if not written:
        raise SpecQuantError(f"{target} cannot build this engine for {gpu}: {log.reason()}")
    if timings is not None:
        keep_timings(config, timings)
    kinds = (network.get_layer(i) for i in range(network.num_layers))
    ours = sorted(layer.name for layer in kinds if layer.type == api.LayerType.PLUGIN_V3)
    return Built(api.__version__, log.bytes("Weights")[0], log.bytes("Activation"), log.layers(), ours)


def _write(api: Any, builder: Any, network: Any, config: Any, file: BinaryIO) -> bool:
    """Build and write, piece by piece where TensorRT can, since it holds the weights twice already. Raises OSError."""
    if not hasattr(builder, "build_serialized_network_to_stream"):  # before TensorRT had it
        plan = builder.build_serialized_network(network, config)
        return plan is not None and file.write(memoryview(plan)) > 0
    failed: list[OSError] = []

    class Writer(api.IStreamWriter):
        def write(self, data: bytes) -> int:
            try:
                return file.write(data)
            except OSError as error:
                failed.append(error)
                return 0

    written = builder.build_serialized_network_to_stream(network, config, Writer())
    if failed:
        raise failed[0]
    return bool(written)


def _return_freed_memory() -> None:
    """Let malloc give large blocks back as soon as they are freed; glibc's keeps ever larger ones for the next."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(-3, 1 << 18)  # M_MMAP_THRESHOLD


def _load_plugins(api: Any, builder: Any, target: str, plugins: Path, log: Any) -> None:
    prepare_plugins(api)
    if builder.get_plugin_registry().load_library(str(plugins)) is None:
        raise SpecQuantError(f"{target} cannot load {plugins}: {log.reason()}")


def _let_attention_decompose(api: Any, network: Any) -> None:
    """Several kernels where no fused one takes the type or head size: float32 has none."""
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        if layer.type == api.LayerType.ATTENTION_INPUT:
            layer.__class__ = api.IAttentionInputLayer  # how TensorRT's binding downcasts
            layer.attention.decomposable = True


def optimization_profiles(builder: Any, network: Any, limits: Limits) -> list[Any]:
    """Of prefill and of decode."""
    calls = ((1, limits.block), (limits.max_batch, 1))
    return [_profile(builder, network, rows, tokens, limits.max_seq) for rows, tokens in calls]


def _profile(builder: Any, network: Any, rows: int, tokens: int, max_seq: int) -> Any:
    """Up to `rows` rows of up to `tokens` new tokens each; fastest for the most, and for half a cache."""
    profile = builder.create_optimization_profile()
    most = {"batch": rows, "sequence": tokens, "total": max_seq}
    axes = {
        "input_ids": ("batch", "sequence"),
        "position_ids": ("batch", "sequence"),
        "attention_mask": ("batch", "total"),
    }
    for index in range(network.num_inputs):
        tensor = network.get_input(index)
        if tensor.name == "logits_to_keep":
            profile.set_shape_input(tensor.name, [1], [1], [tokens])
            continue
        symbols = axes.get(tensor.name, ("batch", *tensor.shape[1:]))
        least = [1 if isinstance(s, str) else s for s in symbols]
        usual = [max(1, max_seq // 2) if s == "total" else most.get(s, s) for s in symbols]
        profile.set_shape(tensor.name, least, usual, [most.get(s, s) for s in symbols])
    return profile


def _refusal(parser: Any, log: Any) -> str:
    """Why, as the parser says first; of an operator that TensorRT lacks, all that it says is a condition: "false"."""
    if not parser.num_errors:
        return str(log.reason())
    error = parser.get_error(0)
    operator = error.node_operator()
    return f"{operator}: {error.desc()}" if operator else str(error.desc())


def _log(api: Any) -> Any:
    """A logger that keeps what the builder says of memory, layers and errors; it may not raise."""

    class Log(api.ILogger):
        def __init__(self) -> None:
            super().__init__()
            self.kept: list[str] = []
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (api.ILogger.ERROR, api.ILogger.INTERNAL_ERROR):
                self.errors.append(message)
            elif "Memory: " in message or "LayerType: " in message:
                self.kept.append(message)

        def bytes(self, kind: str) -> list[int]:
            """Of each `Total KIND Memory` that was logged; [0] for none."""
            found = (re.search(rf"Total {kind} Memory: (\d+)", message) for message in self.kept)
            return [int(match[1]) for match in found if match] or [0]

        def layers(self) -> list[str]:
            return [line for message in self.kept for line in message.splitlines() if "LayerType: " in line]

        def reason(self) -> str:
            return " ".join((self.errors[0] if self.errors else "it does not say why").split())[:300]

    return Log()


def _monitor(api: Any, report: Callable[[str, int, int], None], interrupted: threading.Event) -> Any:
    class Monitor(api.IProgressMonitor):
        def __init__(self) -> None:
            super().__init__()
            self.steps = 1

        def phase_start(self, phase: str, parent: str | None, steps: int) -> None:
            if phase == _COUNTED_PHASE:
                self.steps = steps
                report("building", 0, steps)

        def phase_finish(self, phase: str) -> None:
            pass

        def step_complete(self, phase: str, step: int) -> bool:
            if phase == _COUNTED_PHASE:
                report("building", step + 1, self.steps)
            return not interrupted.is_set()

    return Monitor()


@contextlib.contextmanager
def _interrupts_deferred() -> Iterator[threading.Event]:
    """Ctrl-C and SIGTERM set the event and raise nothing. Signals are the main thread's: elsewhere nothing changes."""
    interrupted = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield interrupted
        return

    def handler(number: int, frame: FrameType | None) -> None:
        interrupted.set()

    before = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield interrupted
    finally:
        for number, old in before.items():
            signal.signal(number, old)
