"""TensorRT engines from an artifact: what is built, what it will take, and the folder that it makes."""

from __future__ import annotations

import gc
import json
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import onnx_ir as ir

from specquant.custom_ops.errors import SpecQuantError
from specquant.custom_ops.library_tensorrt import FILE as PLUGIN_LIBRARY
from specquant.custom_ops.library_tensorrt import library_path
from specquant.custom_ops.schema import DOMAIN
from specquant.custom_ops.tensorrt_plugins import register
from specquant.exporter.artifact import whole_folder
from specquant.exporter.engine_builder import Built, Limits, build_engine, check_gpu, load_api
from specquant.exporter.graph import save_model
from specquant.exporter.lowering import PROFILES, lower
from specquant.exporter.lowering.context import dims
from specquant.runtime.artifact import Manifest, open_artifact, sha256_of
from specquant.runtime.engine import ENGINE, ENGINE_FORMAT, ENGINE_MANIFEST, EngineInfo, engine_folder

TARGETS = ("tensorrt-rtx", "tensorrt")
DEFAULT_SEQ, BLOCK = 2048, 512
# Private memory of a build: bytes, of them a layer, and times the weights. Measured (docs/tensorrt.md, Sizes); mapped
# files come on top, which the system takes back when it needs the memory.
_HOST = {"portable": (2.4e8, 1.5e7, 1.95), "custom": (3e8, 1e6, 1.02)}
Report = Callable[[str, int, int], None]  # what, done, total


@dataclass(frozen=True)
class EngineOptions:
    """What an engine is for. gpu: `sm86`, `sm89`, … for TensorRT-RTX, None for TensorRT, which takes this machine's.

    max_batch: rows decoded together. max_seq: tokens in a row of the KV cache, None for the model's context or 2,048,
    whichever is shorter. block: the most tokens of a prompt that one call takes. rank: columns kept of every spectral
    branch, None for all. embed_plugins: carry the plugin library in the engine, copy_plugins: put it beside the engine,
    else it is found where the engine runs. python_plugins: build with those of tensorrt_plugins.py, where there is no
    compiled library.
    """

    target: str = "tensorrt-rtx"
    gpu: str | None = None
    profile: str = "portable"
    max_batch: int = 1
    max_seq: int | None = None
    block: int = BLOCK
    rank: int | None = None
    embed_plugins: bool = False
    copy_plugins: bool = False
    python_plugins: bool = False

    def __post_init__(self) -> None:
        for name, allowed in (("target", TARGETS), ("profile", PROFILES)):
            if getattr(self, name) not in allowed:
                raise SpecQuantError(f"{name} {getattr(self, name)!r} is unknown: it is one of {', '.join(allowed)}")
        for name in ("max_batch", "max_seq", "block"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise SpecQuantError(f"{name} = {value} is out of range: it must be 1 or more")
        chosen = [self.embed_plugins, self.copy_plugins, self.python_plugins]
        if any(chosen) and self.profile != "custom":
            raise SpecQuantError("a portable engine has no plugins: use --profile custom")
        if sum(chosen) > 1:
            raise SpecQuantError("give one of --embed-plugins, --copy-plugins and --python-plugins")


@dataclass(frozen=True)
class Estimate:
    """Bytes that a build and its engine will take; activations are known once it is built."""

    host: int
    weights: int
    cache: int
    logits: int

    def __str__(self) -> str:
        gpu = self.weights + self.cache + self.logits
        return (
            f"about {self.host / 1e6:,.0f} MB of memory here while it builds; on the GPU {gpu / 1e6:,.0f} MB and "
            f"activations (weights {self.weights / 1e6:,.0f}, KV cache {self.cache / 1e6:,.0f}, "
            f"logits {self.logits / 1e6:,.0f})"
        )


def build(
    folder: Path,
    options: EngineOptions,
    output: Path | None = None,
    force: bool = False,
    report: Report = lambda what, done, total: None,
    note: Callable[[str], None] = lambda text: None,
) -> EngineInfo:
    """Build an engine of the artifact in `folder`, and write it to `output` (default: DIR/engine/TARGET-GPU).

    report is told of progress, note of the estimate of memory. Raises SpecQuantError for everything a user can mend,
    KeyboardInterrupt after Ctrl-C; both leave no folder, and an old one as it was.
    """
    manifest = open_artifact(folder)
    limits = _limits(manifest, options)
    api = load_api(options.target)
    gpu = check_gpu(api, options.target, options.gpu, options.profile)
    plugins = None
    if options.python_plugins:
        register(api)
    elif options.profile == "custom":
        plugins = library_path()
    target = output or engine_folder(folder, options.target, gpu)
    with whole_folder(target, force, ENGINE_MANIFEST, "engine") as work:
        report("lowering the graph", 0, 1)
        model = lower(folder, options.profile, limits.max_seq, options.rank)
        note(f"estimate: {estimate(model, manifest, limits, options.profile)}")
        with tempfile.TemporaryDirectory(dir=work) as scratch:
            save_model(model, Path(scratch))
            ops = sorted({node.op_type for node in model.graph if node.domain == DOMAIN})
            del model
            gc.collect()  # a graph's values and nodes point at each other
            path, embed = Path(scratch) / "model.onnx", options.embed_plugins
            timings = folder / "engine" / f"timings-{gpu}.cache" if options.target == "tensorrt" else None
            built = build_engine(api, path, work / ENGINE, options.target, gpu, limits, report, plugins, embed, timings)
        if plugins is not None and options.copy_plugins:
            shutil.copyfile(plugins, work / PLUGIN_LIBRARY)
        info = _info(manifest, options, limits, gpu, built, ops, work)
        text = json.dumps(asdict(info), indent=2, ensure_ascii=False)
        (work / ENGINE_MANIFEST).write_text(text + "\n", encoding="utf-8")
    return info


def estimate(model: ir.Model, manifest: Manifest, limits: Limits, profile: str) -> Estimate:
    """Of a model that was lowered to this profile."""
    weights = sum(v.const_value.nbytes for v in model.graph.initializers.values() if v.const_value is not None)
    info = manifest.model
    caches = [value for value in model.graph.inputs if str(value.name).startswith("past_key_values.")]
    a_token = sum(info.num_kv_heads * int(dims(cache)[3]) * cache.dtype.itemsize for cache in caches if cache.dtype)
    cache = int(a_token * limits.max_batch * limits.max_seq)
    logits = max(limits.block, limits.max_batch) * info.vocab_size * info.float_dtype.itemsize
    fixed, of_a_layer, copies = _HOST[profile]
    return Estimate(int(fixed + of_a_layer * info.num_layers + copies * weights), weights, cache, logits)


def _limits(manifest: Manifest, options: EngineOptions) -> Limits:
    context = manifest.model.context_length
    max_seq = min(context, DEFAULT_SEQ) if options.max_seq is None else options.max_seq
    if max_seq > context:
        raise SpecQuantError(f"--max-seq {max_seq} exceeds the model's context: at most {context}")
    if options.rank is not None and not 0 <= options.rank <= manifest.max_rank:
        raise SpecQuantError(
            f"--rank {options.rank} is out of range: this model's branches have 0 to {manifest.max_rank}"
        )
    return Limits(options.max_batch, max_seq, min(options.block, max_seq))


def _info(
    manifest: Manifest, options: EngineOptions, limits: Limits, gpu: str, built: Built, ops: list[str], work: Path
) -> EngineInfo:
    engine = work / ENGINE
    return EngineInfo(
        format=ENGINE_FORMAT,
        target=options.target,
        version=built.version,
        gpu=gpu,
        profile=options.profile,
        max_batch=limits.max_batch,
        max_seq=limits.max_seq,
        block=limits.block,
        float_type=manifest.model.float_type,
        model={name: info.sha256 for name, info in manifest.files.items() if name.startswith("model.onnx")},
        size=engine.stat().st_size,
        sha256=sha256_of(engine),
        weights_bytes=built.weights_bytes,
        activation_bytes=built.activation_bytes,
        rank=options.rank,
        plugins=ops,
        host_code=options.embed_plugins or options.copy_plugins,
        plugin_library=sha256_of(work / PLUGIN_LIBRARY) if options.copy_plugins else "",
        created=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    )
