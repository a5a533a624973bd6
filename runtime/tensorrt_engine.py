"""Opening an engine with TensorRT or TensorRT-RTX, and running it. What does not fit is refused before it is read."""

from __future__ import annotations

import atexit
import mmap
import os
import tempfile
from importlib import import_module
from pathlib import Path
from typing import Any

from specquant.custom_ops.errors import SpecQuantError
from specquant.custom_ops.library_tensorrt import FILE as PLUGIN_LIBRARY
from specquant.custom_ops.library_tensorrt import load_plugins, prepare_plugins
from specquant.runtime.artifact import Manifest
from specquant.runtime.choosing import load_chooser
from specquant.runtime.cuda_driver import Device
from specquant.runtime.engine import ENGINE, MODULES, EngineInfo, engine_folder, open_engine
from specquant.runtime.tensorrt import TensorRT
from specquant.runtime.tensorrt_contexts import Contexts

_CACHE = "runtime.cache"  # kernels that TensorRT-RTX compiled for this GPU, beside the engine


def find_engine(model: Path, gpu: str) -> Path:
    """The folder of an engine of the artifact in `model` for `gpu`, RTX before TensorRT. SpecQuantError for none."""
    for target in MODULES:
        if engine_folder(model, target, gpu).is_dir():
            return engine_folder(model, target, gpu)
    made = sorted(path.name for path in (model / "engine").glob("*") if path.is_dir())
    others = f" (there are {', '.join(made)})" if made else ""
    raise SpecQuantError(
        f"{model} has no engine for this GPU{others}: run `specquant build {model} --target tensorrt-rtx --gpu {gpu}`"
    )


def check_engine(model: Path, manifest: Manifest, info: EngineInfo, gpu: str, allow_host_code: bool) -> Any:
    """The Python module that runs the engine. Raises SpecQuantError with the command that mends it: another model's,
    another GPU's, another version's, host code that was not allowed, no module."""
    files = {name: file.sha256 for name, file in manifest.files.items() if name in info.model}
    if files != info.model:
        raise SpecQuantError(f"the engine is of another export of {manifest.name}: {info.rebuild(model)}")
    if info.gpu != gpu:
        raise SpecQuantError(f"the engine is for {info.gpu} and this GPU is {gpu}: {info.rebuild(model, gpu)}")
    if info.host_code and not allow_host_code:
        raise SpecQuantError(
            "the engine comes with a plugin library, code that would run on this machine: allow it (--allow-host-code) "
            "if you trust who built it, or build it without --embed-plugins and --copy-plugins"
        )
    name = MODULES.get(info.target)
    if name is None:
        raise SpecQuantError(f"the engine is for {info.target!r}, which this version does not know: upgrade specquant")
    try:
        api: Any = import_module(name)
    except ImportError as error:
        raise SpecQuantError(f"{name} cannot be imported ({error}): pip install 'specquant[{info.target}]'") from None
    if api.__version__ != info.version:
        raise SpecQuantError(
            f"the engine was built by {info.target} {info.version} and {api.__version__} is installed: "
            f"{info.rebuild(model)}, or install {info.version}"
        )
    return api


def load_tensorrt(
    model: Path, manifest: Manifest, folder: Path | None, context: int | None, allow_host_code: bool
) -> TensorRT:
    """The backend for the artifact in `model`, of the engine in `folder` or, for None, the one for this GPU.

    context: tokens, by default as many as the engine takes. Raises SpecQuantError: no GPU, and as LoadedEngine.
    """
    device = Device()
    engine = LoadedEngine(model, folder or find_engine(model, device.gpu), manifest, device, allow_host_code)
    backend = TensorRT(engine, device, engine.info, manifest.model, checked_context(model, engine.info, context))
    backend.chooser = load_chooser(device)
    return backend


def checked_context(model: Path, info: EngineInfo, context: int | None) -> int:
    """Tokens of a row. Raises SpecQuantError if the engine takes fewer than are asked for."""
    if context is None:
        return info.max_seq
    if not 1 <= context <= info.max_seq:
        raise SpecQuantError(
            f"context = {context} is out of range: this engine takes 1 to {info.max_seq} tokens; for more, "
            + info.rebuild(model, max_seq=context)
        )
    return context


class LoadedEngine:
    """Implements on_device.Graph: an execution context for each profile, on the device's stream."""

    def __init__(
        self, model: Path, folder: Path, manifest: Manifest, device: Device, allow_host_code: bool = False
    ) -> None:
        """Raises SpecQuantError: a damaged engine, one that does not fit (`check_engine`), missing plugins."""
        self.info = open_engine(model, folder)
        api = check_engine(model, manifest, self.info, device.gpu, allow_host_code)
        self._api, self._device, self._log = api, device, _log(api)
        runtime = api.Runtime(self._log)
        embedded = self.info.host_code and not self.info.plugin_library
        if embedded:
            prepare_plugins(api)
        elif self.info.plugins:
            beside = folder / PLUGIN_LIBRARY if self.info.plugin_library else None
            load_plugins(api, runtime.get_plugin_registry(), beside)
        runtime.engine_host_code_allowed = embedded and allow_host_code
        self._runtime = runtime
        with (folder / ENGINE).open("rb") as file:  # mapped: what TensorRT copies to the GPU is not copied here before
            self._engine = runtime.deserialize_cuda_engine(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        if self._engine is None:
            raise SpecQuantError(f"{folder / ENGINE} cannot be loaded: {self._log.reason()}")
        self._cache_path = folder / _CACHE
        self._config = self._runtime_config()
        contexts = [self._context(profile) for profile in range(2)]
        replay = self.info.target == "tensorrt"
        self.run = Contexts(api, self._engine, contexts, device, replay, self._log.reason).run

    def _runtime_config(self) -> Any:
        """TensorRT-RTX only: CUDA graphs, and the kernels that an earlier run compiled."""
        if self.info.target != "tensorrt-rtx":
            return None
        config = self._engine.create_runtime_config()
        config.cuda_graph_strategy = self._api.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
        cache = config.create_runtime_cache()
        if self._cache_path.is_file():
            cache.deserialize(self._cache_path.read_bytes())  # of another version: it is empty, and is replaced
        config.set_runtime_cache(cache)
        self._runtime_cache = cache
        atexit.register(self._save_cache)
        return config

    def _context(self, profile: int) -> Any:
        made = (
            self._engine.create_execution_context(self._config)
            if self._config is not None
            else self._engine.create_execution_context()
        )
        if made is None or not made.set_optimization_profile_async(profile, self._device.stream):
            raise SpecQuantError(f"TensorRT makes no context for this engine: {self._log.reason()}")
        return made

    def _save_cache(self) -> None:
        """Keep what was compiled beside the engine, when the program ends; a folder that cannot be written stays."""
        try:
            handle, name = tempfile.mkstemp(dir=self._cache_path.parent, prefix=f".{_CACHE}.")
            with os.fdopen(handle, "wb") as file:
                file.write(self._runtime_cache.serialize())
            os.replace(name, self._cache_path)
        except OSError:
            return


def _log(api: Any) -> Any:
    class Log(api.ILogger):
        """Keeps the last error; it may not raise."""

        def __init__(self) -> None:
            super().__init__()
            self.last = ""

        def log(self, severity: Any, message: str) -> None:
            if severity in (api.ILogger.ERROR, api.ILogger.INTERNAL_ERROR):
                self.last = message

        def reason(self) -> str:
            return " ".join(self.last.split())[:300] or "it does not say why"

    return Log()
