"""An engine folder, DIR/engine/TARGET-GPU: `model.engine` and what it is, `engine.json` (docs/tensorrt.md)."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from specquant.custom_ops.errors import SpecQuantError
from specquant.custom_ops.library_tensorrt import FILE as PLUGIN_LIBRARY
from specquant.runtime.artifact import ReadBytes, sha256_of, typed

ENGINE, ENGINE_MANIFEST, ENGINE_FORMAT = "model.engine", "engine.json", 3
MODULES = {"tensorrt-rtx": "tensorrt_rtx", "tensorrt": "tensorrt"}  # target -> its Python module


@dataclass(frozen=True)
class EngineInfo:
    """engine.json, format 3 (2: plugins with scales of one level; 1: without norm, residual and cache).

    target: `tensorrt` or `tensorrt-rtx`, of `version`; gpu: `sm89`, …; profile: `portable` or `custom`. A call takes at
    most `max_batch` rows of one token, or one row of `block` tokens, and rows of `max_seq` tokens in the cache.
    rank: columns kept of every spectral branch, None for all. model: sha256 of the artifact's graph files.
    weights_bytes and activation_bytes (prefill, decode): on the GPU, as the builder counts them. plugins: our ops
    that the engine calls; host_code: a plugin library comes with it, within it or, where plugin_library is its sha256,
    beside it.
    """

    format: int
    target: str
    version: str
    gpu: str
    profile: str
    max_batch: int
    max_seq: int
    block: int
    float_type: str
    model: dict[str, str]
    size: int
    sha256: str
    weights_bytes: int
    activation_bytes: list[int]
    rank: int | None = None
    plugins: list[str] = field(default_factory=list)
    host_code: bool = False
    plugin_library: str = ""
    created: str = ""

    def rebuild(self, model: Path, gpu: str | None = None, max_seq: int | None = None) -> str:
        """What to do to have it anew from the artifact in `model`, for another GPU or longer rows if given."""
        target = f"--target {self.target}" + (f" --gpu {gpu or self.gpu}" if self.target == "tensorrt-rtx" else "")
        sizes = f"--max-batch {self.max_batch} --max-seq {max_seq or self.max_seq}"
        return f"run `specquant build {model} {target} --profile {self.profile} {sizes} --force`"


def engine_folder(model: Path, target: str, gpu: str) -> Path:
    """Where the engine of the artifact in `model` lies unless it is told otherwise."""
    return model / "engine" / f"{target}-{gpu}"


def open_engine(model: Path, folder: Path, verify: bool = True, progress: ReadBytes | None = None) -> EngineInfo:
    """Read `folder`/engine.json and check model.engine: its size, and its sha256 unless `verify` is False. A plugin
    library beside it is always checked.

    model: the artifact's folder. Raises SpecQuantError: no engine there, a newer format, a damaged or edited file.
    """
    path = folder / ENGINE_MANIFEST
    if not path.is_file():
        raise SpecQuantError(f"{folder} holds no engine: make one with `specquant build DIR --target tensorrt-rtx`")
    try:
        content: Any = json.loads(path.read_text(encoding="utf-8"))
        version = content.get("format") if isinstance(content, dict) else None
        if isinstance(version, int) and version != ENGINE_FORMAT:
            mend = "upgrade specquant" if version > ENGINE_FORMAT else "build the engine again"
            raise SpecQuantError(f"{path} has format {version}, this version reads {ENGINE_FORMAT}: {mend}")
        info: EngineInfo = typed(content, EngineInfo, "")
    except (ValueError, OSError, RecursionError) as error:
        raise SpecQuantError(f"{path} is not an engine's manifest ({error}): build the engine again") from None
    engine = folder / ENGINE
    if not engine.is_file() or engine.stat().st_size != info.size:
        raise SpecQuantError(f"{engine} is missing or truncated: {info.rebuild(model)}")
    if verify and sha256_of(engine, progress) != info.sha256:
        raise SpecQuantError(f"{engine} was changed after it was built (its sha256 differs): {info.rebuild(model)}")
    library = folder / PLUGIN_LIBRARY
    if info.plugin_library and not (library.is_file() and sha256_of(library) == info.plugin_library):
        raise SpecQuantError(f"{library} is missing, or was changed after the engine was built: {info.rebuild(model)}")
    return info
