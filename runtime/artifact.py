"""Opening an artifact folder: its manifest as a typed object, and the check that every file is whole."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import MISSING, Field, dataclass, field, fields
from functools import cache
from pathlib import Path
from types import NoneType
from typing import Any, TypeVar, cast, get_args, get_origin, get_type_hints

import numpy as np

from specquant.custom_ops.errors import SpecQuantError
from specquant.custom_ops.kv_rows import row_bytes

MANIFEST = "specquant.json"
# 5: scales of two levels; 4: no sums of weights; 3: gates at the end of products; 2: norms and residuals inside
FORMAT = 5
ATTENTION = {"": (4, 16), "Int4KVAttention": (4,), "HalfKVAttention": (16,), "GroupQueryAttention": (16,)}  # kv_bits
REQUIRED_FILES = ("model.onnx", "tokenizer.json")
_BLOCK = 1 << 20

T = TypeVar("T")
ReadBytes = Callable[[int], None]  # told how many more bytes have been hashed


@dataclass(frozen=True)
class ModelInfo:
    """The sizes of the decoder, in elements. float_type is `float32` or `float16`: the type of logits, and of
    GroupQueryAttention's KV cache.

    kv_bits 4: the cache is packed, rows of head_dim / 2 + 4 bytes. attention: the graph's op, of ATTENTION; by default
    (in artifacts from before HalfKVAttention) what kv_bits says. head_bits: of the head, 16 being float_type.
    """

    family: str
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    context_length: int
    eos_token_ids: list[int]
    float_type: str
    bos_token_id: int | None = None
    tied_embeddings: bool = False
    kv_bits: int = 16
    attention: str = ""
    head_bits: int = 16

    @property
    def cache_row(self) -> tuple[int, np.dtype[Any]]:
        """What a token takes in the cache of one kv head, keys or values: elements, and their type."""
        if self.kv_bits == 4:
            return row_bytes(self.head_dim), np.dtype(np.int8)
        return self.head_dim, np.dtype(np.float16) if self.attention == "HalfKVAttention" else self.float_dtype

    @property
    def float_dtype(self) -> np.dtype[Any]:
        return np.dtype(self.float_type)

    @property
    def cache_bytes_per_token(self) -> int:
        """Keys and values of all layers."""
        elements, dtype = self.cache_row
        return 2 * self.num_layers * self.num_kv_heads * elements * dtype.itemsize


@dataclass(frozen=True)
class FileInfo:
    """size in bytes, sha256 as 64 hexadecimal digits."""

    size: int
    sha256: str


@dataclass(frozen=True)
class BitsInfo:
    """Bits per weight as docs/formats.md counts them; tensor_bytes: kind of tensor -> bytes."""

    linear_bits_per_weight: float | None = None
    model_bits_per_weight: float | None = None
    tensor_bytes: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class LayerInfo:
    """One op call. rank 0: no branch; group_size 0: per channel; hadamard 0: not rotated; error: ‖y − ŷ‖² / ‖y‖² on
    calibration data."""

    name: str
    linears: list[str]
    in_features: int
    out_features: int
    rank: int = 0
    group_size: int = 0
    act_bits: int = 16
    act_clip: float = 1.0
    hadamard: int = 0
    alpha: float | None = None
    bits_per_weight: float | None = None
    error: float | None = None


@dataclass(frozen=True)
class Manifest:
    """specquant.json, of this FORMAT (docs/formats.md)."""

    format: int
    name: str
    model: ModelInfo
    files: dict[str, FileInfo]
    created: str = ""
    recipe: dict[str, Any] = field(default_factory=dict)
    source: dict[str, Any] = field(default_factory=dict)
    calibration: dict[str, Any] | None = None
    versions: dict[str, Any] = field(default_factory=dict)
    bits: BitsInfo = field(default_factory=BitsInfo)
    layers: list[LayerInfo] = field(default_factory=list)
    evaluation: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def max_rank(self) -> int:
        """The largest rank of any spectral branch; 0 when the model has none."""
        return max((layer.rank for layer in self.layers), default=0)


def open_artifact(folder: str | Path, verify: bool = False, progress: ReadBytes | None = None) -> Manifest:
    """Read `folder`/specquant.json and check the files it names: size always, sha256 when `verify`.

    model.onnx points into model.onnx.data by offset, so a data file of the right size covers every offset.
    Raises SpecQuantError: no artifact there, an older or newer format, a manifest that is not one, a file that is
    missing, truncated or (with `verify`) edited.
    """
    folder = Path(folder)
    manifest = _read_manifest(folder)
    for name, info in manifest.files.items():
        path = folder / name
        if not path.is_file():
            raise SpecQuantError(f"{path} is missing: copy the whole folder again or re-export the model")
        size = path.stat().st_size
        if size != info.size:
            state = "truncated" if size < info.size else "not the file that was exported"
            raise SpecQuantError(
                f"{path} is {state} ({size:,} bytes, {info.size:,} expected): copy it again or re-export the model"
            )
        if verify and sha256_of(path, progress) != info.sha256:
            raise SpecQuantError(
                f"{path} was changed after the export (its sha256 differs): copy it again or re-export the model"
            )
    return manifest


def record_evaluation(folder: str | Path, text_name: str, result: Mapping[str, Any]) -> None:
    """Set evaluation[text_name] in `folder`/specquant.json; the old manifest stays until the new one is whole."""
    path = Path(folder) / MANIFEST
    content = _load_json(path)
    content.setdefault("evaluation", {})[text_name] = dict(result)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{MANIFEST}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(content, file, indent=2, ensure_ascii=False)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, path.stat().st_mode)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _read_manifest(folder: Path) -> Manifest:
    if not folder.is_dir():
        raise SpecQuantError(
            f"{folder} is not a folder: give the folder that `specquant export MODEL -o {folder}` makes"
        )
    path = folder / MANIFEST
    if not path.is_file():
        raise SpecQuantError(
            f"{folder} has no {MANIFEST}, so it is not an exported model: make one with `specquant export MODEL -o DIR`"
        )
    content = _load_json(path)
    version = content.get("format")
    if isinstance(version, int) and version > FORMAT:
        raise SpecQuantError(
            f"{path} has format {version} and this version reads up to {FORMAT}: pip install --upgrade specquant"
        )
    if isinstance(version, int) and version < FORMAT:
        raise SpecQuantError(f"{path} has format {version}, which this version no longer reads: re-export the model")
    try:
        manifest = typed(content, Manifest, "")
    except ValueError as error:
        raise SpecQuantError(f"{path} is not a valid manifest ({error}): re-export the model") from None
    _check_values(manifest, path)
    return manifest


def _load_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError, OSError) as error:
        raise SpecQuantError(f"{path} cannot be read as JSON ({_first_line(error)}): re-export the model") from None
    if not isinstance(content, dict):
        raise SpecQuantError(f"{path} is not a JSON object: re-export the model")
    return content


def _check_values(manifest: Manifest, path: Path) -> None:
    for name in manifest.files:
        # A manifest is untrusted: it may name only plain files of its own folder.
        if not name or name in (".", "..", MANIFEST) or any(mark in name for mark in "/\\:\0"):
            raise SpecQuantError(f"{path} names the file {name!r}, outside its own folder: do not trust this model")
    missing = [name for name in REQUIRED_FILES if name not in manifest.files]
    if missing:
        raise SpecQuantError(f"{path} lists no {missing[0]}: re-export the model")
    model = manifest.model
    for item in fields(model):
        value = getattr(model, item.name)
        if isinstance(value, int) and not isinstance(value, bool) and item.name != "bos_token_id" and value < 1:
            raise SpecQuantError(f"{path} says {item.name} = {value}, which must be positive: re-export the model")
    if model.kv_bits not in (4, 16):
        raise SpecQuantError(f"{path} says kv_bits = {model.kv_bits}, not 4 or 16: re-export the model")
    if model.kv_bits not in ATTENTION.get(model.attention, ()):
        raise SpecQuantError(
            f"{path} says attention = {model.attention!r} with kv_bits = {model.kv_bits}: re-export the model"
        )
    if model.head_bits not in (4, 8, 16):
        raise SpecQuantError(f"{path} says head_bits = {model.head_bits}, not 4, 8 or 16: re-export the model")
    if model.float_type not in ("float32", "float16"):
        raise SpecQuantError(
            f"{path} says float_type = {model.float_type!r}, not float32 or float16: re-export the model"
        )


def typed(value: Any, kind: Any, where: str) -> Any:
    """`value`, from JSON, as `kind`: a dataclass, dict, list, union or scalar. ValueError says where it is not one."""
    if kind is Any:
        return value
    if isinstance(kind, type) and hasattr(kind, "__dataclass_fields__"):
        return _typed_fields(value, kind, where)
    origin, arguments = get_origin(kind), get_args(kind)
    if NoneType in arguments:  # X | None
        return None if value is None else typed(value, arguments[0], where)
    if origin is dict and isinstance(value, dict):
        return {key: typed(item, arguments[1], f"{where}.{key}") for key, item in value.items()}
    if origin is list and isinstance(value, list):
        return [typed(item, arguments[0], f"{where}[{index}]") for index, item in enumerate(value)]
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if origin is None and type(value) is kind:
        return value
    raise ValueError(f"{where.lstrip('.')} should be {getattr(kind, '__name__', kind)}")


@cache
def _types_of(kind: type) -> tuple[dict[str, Any], tuple[Field[Any], ...]]:
    """Looked up once: a manifest has a row per call of an op, and the lookup is slow."""
    return get_type_hints(kind), fields(kind)


def _typed_fields(value: Any, kind: type[T], where: str) -> T:
    if not isinstance(value, dict):
        raise ValueError(f"{where.lstrip('.') or 'the whole'} should be an object")
    hints, items = _types_of(cast(Any, kind))
    arguments = {}
    for item in items:
        if item.name in value:
            arguments[item.name] = typed(value[item.name], hints[item.name], f"{where}.{item.name}")
        elif item.default is MISSING and item.default_factory is MISSING:
            raise ValueError(f"{where}.{item.name} is missing".lstrip("."))
    return kind(**arguments)


def sha256_of(path: Path, progress: ReadBytes | None = None) -> str:
    """64 hexadecimal digits; progress is told the bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
            if progress:
                progress(len(block))
    return digest.hexdigest()


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
