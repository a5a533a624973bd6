"""Writing an artifact folder: whole or not at all. Reading one is `runtime/artifact.py`."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import glob
import json
import os
import platform
import shutil
import sys
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

from specquant.custom_ops.errors import SpecQuantError
from specquant.exporter.decoder import Decoder, DecoderLayer, FloatLinear, Linear, QuantLinear
from specquant.exporter.graph import build_model, save_model
from specquant.exporter.head import head_bytes
from specquant.exporter.sources import Source, sha256
from specquant.runtime.artifact import FORMAT, MANIFEST

_PARTIAL = "partial"
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # disk full, quota used up, more than the file system can hold


def check_target(target: Path, force: bool, manifest: str = MANIFEST, what: str = "exported model") -> None:
    """Raises SpecQuantError if `target` is taken (unless `force`), or its place cannot be written.

    manifest: the file without which it is not `what`, and is not replaced.
    """
    if target.exists() and not force:
        raise SpecQuantError(f"{target} exists; use --force to replace it, or another -o")
    if force and target.exists() and not (target / manifest).is_file() and (target.is_file() or any(target.iterdir())):
        raise SpecQuantError(f"{target} exists and is not an {what}; --force replaces only {what}s")
    place = next(p for p in target.absolute().parents if p.exists())
    if not place.is_dir() or not os.access(place, os.W_OK):
        raise SpecQuantError(f"{target}: {place} cannot be written to; choose another -o")


@contextlib.contextmanager
def whole_folder(target: Path, force: bool, manifest: str = MANIFEST, what: str = "exported model") -> Iterator[Path]:
    """A temporary folder beside `target` that takes its place at the end of the block, and is gone if that fails.

    Until that moment an old `target` stays as it is: on Linux the two are exchanged in one step. manifest and what:
    see `check_target`.
    """
    check_target(target, force, manifest, what)
    target = target.absolute()
    _remove_abandoned(target)
    work = target.parent / f".{target.name}.{_PARTIAL}-{os.getpid()}"
    try:
        work.mkdir(parents=True)
        yield work
        for path in work.iterdir():
            with path.open("rb+") as f:
                os.fsync(f.fileno())
        _put(work, target)
    except Exception as e:
        if not _out_of_space(e):
            raise
        raise SpecQuantError(f"{target}: no space for it; nothing is left of it, free some or choose another -o") from e
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _out_of_space(e: Exception) -> bool:
    if isinstance(e, OSError) and e.errno is not None:
        return e.errno in _NO_SPACE
    # Only their texts say so: ndarray.tofile, and tokenizers.
    return " requested and " in str(e) or any(f"(os error {n})" in str(e) for n in _NO_SPACE)


def _put(work: Path, target: Path) -> None:
    if not target.exists():
        work.rename(target)
    elif not _exchange(work, target):
        old = work.with_name(f"{work.name}.old")
        target.rename(old)
        try:
            work.rename(target)
        except BaseException:
            old.rename(target)
            raise
        shutil.rmtree(old, ignore_errors=True)


def _exchange(a: Path, b: Path) -> bool:
    """Swap two folders atomically (renameat2 with RENAME_EXCHANGE); False where that does not exist."""
    if sys.platform != "linux":
        return False
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "renameat2"):
        return False
    at_fdcwd, rename_exchange = -100, 2
    return bool(libc.renameat2(at_fdcwd, os.fsencode(a), at_fdcwd, os.fsencode(b), rename_exchange) == 0)


def _remove_abandoned(target: Path) -> None:
    """Folders that a killed export of the same target left behind."""
    for path in target.parent.glob(f".{glob.escape(target.name)}.{_PARTIAL}-*"):
        pid = path.name.rsplit("-", 1)[-1].split(".")[0]
        if Path(f"/proc/{pid}").exists():
            continue
        if path.suffix == ".old" and not target.exists():
            path.rename(target)  # killed between the two renames of `_put`
        else:
            shutil.rmtree(path, ignore_errors=True)


def write_artifact(
    target: Path,
    decoder: Decoder,
    source: Source,
    model: Any,
    tokenizer: Any,
    calibration: dict[str, Any] | None,
    force: bool = False,
) -> dict[str, Any]:
    """Write the whole folder and return its manifest. model, tokenizer: transformers objects, for their configs."""
    import onnx

    float_type: Any = decoder.recipe["float_type"]
    check_space(target, decoder)
    manifest = manifest_of(decoder, source, model, calibration)
    metadata = {
        "specquant.version": manifest["versions"]["specquant"],
        "specquant.recipe": json.dumps(decoder.recipe, sort_keys=True),
        "specquant.source": json.dumps(manifest["source"], sort_keys=True),
        "specquant.calibration": json.dumps(calibration, sort_keys=True),
    }
    with whole_folder(target, force) as work:
        save_model(build_model(decoder, float_type, metadata), work)
        onnx.checker.check_model(str(work / "model.onnx"))
        tokenizer.save_pretrained(work)
        # Templates besides the default one: an artifact has no sub-folders, and the runtime reads only that one.
        shutil.rmtree(work / "additional_chat_templates", ignore_errors=True)
        _write_configs(work, model)
        files = sorted(p for p in work.iterdir())
        manifest["files"] = {p.name: {"size": p.stat().st_size, "sha256": sha256(p)} for p in files}
        (work / MANIFEST).write_text(json.dumps(manifest, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return manifest


def _write_configs(work: Path, model: Any) -> None:
    config = model.config.to_dict()
    config.pop("quantization_config", None)  # of the source: these weights are no longer those
    config.pop("_name_or_path", None)
    (work / "config.json").write_text(
        json.dumps(config, indent=2, sort_keys=True, default=str) + "\n", encoding="utf-8"
    )
    if model.generation_config is not None:
        # Its save_pretrained refuses settings that published models have (a temperature without do_sample).
        (work / "generation_config.json").write_text(model.generation_config.to_json_string(), encoding="utf-8")
    # transformers 5 writes a class name that only it knows; every version knows this one.
    path = work / "tokenizer_config.json"
    tokenizer_config = json.loads(path.read_text(encoding="utf-8"))
    if tokenizer_config.get("tokenizer_class") == "TokenizersBackend":
        tokenizer_config["tokenizer_class"] = "PreTrainedTokenizerFast"
        tokenizer_config.setdefault("model_input_names", ["input_ids", "attention_mask"])
        path.write_text(json.dumps(tokenizer_config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def manifest_of(decoder: Decoder, source: Source, model: Any, calibration: dict[str, Any] | None) -> dict[str, Any]:
    """specquant.json without `files` (docs/formats.md)."""
    c = decoder.config
    eos = getattr(model.generation_config, "eos_token_id", None)
    eos = c.eos_token_ids if eos is None else eos if isinstance(eos, list) else [eos]
    sizes = ("hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads", "head_dim", "vocab_size")
    tensors = tensor_bytes(decoder)
    weights = parameter_count(decoder)
    linears = [x for layer in decoder.layers for x in layer.linears]
    inside = sum(n_weights(x) for x in linears)
    packages = ("specquant", "torch", "transformers", "onnx")
    return {
        "format": FORMAT,
        "name": source.name,
        "model": {
            "family": c.family,
            **{name: getattr(c, name) for name in sizes},
            "context_length": c.context_length,
            "bos_token_id": c.bos_token_id,
            "eos_token_ids": sorted(set(eos) | set(c.eos_token_ids)),
            "float_type": decoder.recipe["float_type"],
            "tied_embeddings": decoder.lm_head is None,
            "kv_bits": c.kv_bits,
            "attention": decoder.attention_op,
            "head_bits": c.head_bits,
        },
        "recipe": decoder.recipe,
        "source": source.to_dict(),
        "calibration": calibration,
        "versions": {**{p: version(p) for p in packages}, "python": platform.python_version()},
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "files": {},
        "bits": {
            "linear_bits_per_weight": round(8 * sum(linear_bytes(x, decoder) for x in linears) / inside, 4),
            "model_bits_per_weight": round(8 * sum(tensors.values()) / weights, 4),
            "tensor_bytes": tensors,
        },
        "layers": [layer_row(x, decoder) for x in linears],
        "evaluation": {},
    }


def layer_row(x: Linear, decoder: Decoder) -> dict[str, Any]:
    n, m = (x.weight if isinstance(x, FloatLinear) else x.q).shape
    row = {"name": x.name, "linears": list(x.parts), "in_features": n, "out_features": m}
    row["bits_per_weight"] = round(8 * linear_bytes(x, decoder) / (n * m), 4)
    if isinstance(x, FloatLinear):
        return row
    rank = 0 if x.basis is None else x.basis.shape[1]
    return row | {
        "rank": rank,
        "group_size": x.group_size,
        "act_bits": x.act_bits,
        "act_clip": x.act_clip,
        "hadamard": x.hadamard,
        "alpha": x.alpha,
        "error": None if x.error is None else float(f"{x.error:.4g}"),
    }


def n_weights(x: Linear) -> int:
    return int((x.weight if isinstance(x, FloatLinear) else x.q).size)


def linear_bytes(x: Linear, decoder: Decoder) -> int:
    """All tensors of an op call as they are stored."""
    return sum(_linear_bytes_by_kind(x, decoder).values())


def _linear_bytes_by_kind(x: Linear, decoder: Decoder) -> dict[str, int]:
    if isinstance(x, FloatLinear):
        floats = x.weight.size + (0 if x.bias is None else x.bias.size)
        return {"float_linears": floats * _float_bytes(decoder)}
    n, m = x.q.shape
    branch = 0 if x.basis is None or x.coef is None else x.basis.nbytes + x.coef.nbytes
    panels = -(-m // 16)
    return {
        "int4": panels * -(-n // 8) * 64,
        "scales": panels * len(x.group_scales) * 8 + x.scales.nbytes,
        "branch": branch,
        "bias": 0 if x.bias is None else 4 * m,
    }


def _float_bytes(decoder: Decoder) -> int:
    return 2 if decoder.recipe["float_type"] == "float16" else 4


def tensor_bytes(decoder: Decoder) -> dict[str, int]:
    """Bytes of every stored tensor by kind, but for zeros that all linears without a bias share."""
    out: dict[str, int] = {}
    for layer in decoder.layers:
        for x in layer.linears:
            for kind, size in _linear_bytes_by_kind(x, decoder).items():
                out[kind] = out.get(kind, 0) + size
    wide = _float_bytes(decoder)
    vocab, hidden = decoder.embedding.shape
    if decoder.config.head_bits != 16:
        out |= head_bytes(vocab, hidden, decoder.config.head_bits)
    else:
        out["embedding"] = decoder.embedding.size * wide
        if decoder.lm_head is not None:
            out["lm_head"] = decoder.lm_head.size * wide
    last = {16: wide, 8: 2 * 4, 4: 4}[decoder.config.head_bits]  # in the head's op: float32, once for either digit
    out["norms"] = decoder.final_norm.size * last + sum(_norm_bytes(layer, wide) for layer in decoder.layers)
    out["rotary"] = (decoder.rope_cos.size + decoder.rope_sin.size) * wide
    return out


def parameter_count(decoder: Decoder) -> int:
    """Weights of the model itself; a tied head counts once."""
    total = decoder.embedding.size + decoder.final_norm.size + (0 if decoder.lm_head is None else decoder.lm_head.size)
    for layer in decoder.layers:
        total += sum(n_weights(x) for x in layer.linears)
    return int(total + _norm_weights(decoder))


def _norm_bytes(layer: DecoderLayer, wide: int) -> int:
    """float32 inside a quantised linear's op (graph/linear.py), else `wide` bytes a factor."""
    inside = {"input_norm": layer.qkv, "mlp_norm": layer.gate_up}
    return sum(x.size * (4 if isinstance(inside.get(k), QuantLinear) else wide) for k, x in layer.norms.items())


def _norm_weights(decoder: Decoder) -> int:
    return sum(norm.size for layer in decoder.layers for norm in layer.norms.values())


def check_space(target: Path, decoder: Decoder) -> None:
    """Raises SpecQuantError if the artifact cannot fit where it is to go."""
    needed = sum(tensor_bytes(decoder).values()) + 32_000_000  # graph, tokenizer and slack
    place = next(p for p in target.absolute().parents if p.exists())
    free = shutil.disk_usage(place).free
    if free < needed:
        raise SpecQuantError(f"{target}: needs {needed / 1e6:,.0f} MB and {place} has {free / 1e6:,.0f} MB free")
