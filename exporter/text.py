"""Calibration text, as token windows: a file, a data set of the hub, or the text the product brings itself."""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from specquant.custom_ops.errors import SpecQuantError
from specquant.exporter.recipe import Recipe

BUILTIN = "builtin"
HUB = "hub:"
_CHARACTERS_A_TOKEN = 8  # read of a hub data set: more than any tokenizer needs


@dataclass(frozen=True)
class Calibration:
    """tokens int64 [samples, sequence_length]; the rest says where they come from, for the manifest."""

    tokens: Tensor
    text: str
    sha256: str
    samples: int
    sequence_length: int
    seed: int

    def to_dict(self) -> dict[str, Any]:
        return {k: v for k, v in asdict(self).items() if k != "tokens"}


def calibration(source: str, tokenizer: Any, recipe: Recipe) -> Calibration:
    """Windows that do not overlap, drawn at random (recipe.seed) from the whole text tokenised as one string.

    source: `builtin`, a file, or `hub:NAME[/CONFIG][#SPLIT]`. Raises SpecQuantError if it cannot be read or is too
    short for recipe.windows windows of recipe.sequence_length tokens.
    """
    wanted = recipe.windows * recipe.sequence_length
    text = read_text(source, wanted * _CHARACTERS_A_TOKEN)
    ids = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], dtype=torch.int64)
    windows = len(ids) // recipe.sequence_length
    if windows < recipe.windows:
        option = "--samples" if recipe.samples == recipe.windows else "--refine-samples"
        raise SpecQuantError(
            f"calibration text '{source}' has {len(ids):,} tokens and {recipe.windows} samples of "
            f"{recipe.sequence_length} need {wanted:,}: give more text, or {option} {windows}"
            + ("" if windows else " is not possible either: use a shorter --sequence-length")
        )
    drawn = torch.randperm(windows, generator=torch.Generator().manual_seed(recipe.seed))[: recipe.windows]
    tokens = ids[: windows * recipe.sequence_length].view(windows, -1)[drawn]
    digest = hashlib.sha256(text.encode()).hexdigest()
    name = source if source == BUILTIN or source.startswith(HUB) else Path(source).name  # no paths of this machine
    return Calibration(tokens, name, digest, recipe.windows, recipe.sequence_length, recipe.seed)


def read_text(source: str, characters: int) -> str:
    """The whole text, or of a data set the first `characters`."""
    if source == BUILTIN:
        return resources.files("specquant.exporter").joinpath("calibration.txt").read_text(encoding="utf-8")
    if source.startswith(HUB):
        return _hub_text(source.removeprefix(HUB), characters)
    try:
        return Path(source).read_bytes().decode("utf-8")
    except UnicodeDecodeError as e:
        raise SpecQuantError(f"calibration text {source} is not UTF-8 (byte {e.start}): convert it first") from None
    except OSError as e:
        raise SpecQuantError(
            f"calibration text {source} cannot be read ({e.strerror}); give a file, {HUB}NAME, or {BUILTIN}"
        ) from None


def _hub_text(name: str, characters: int) -> str:
    """The rows' `text` (or first string) column, joined by blank lines."""
    try:
        from datasets import load_dataset
    except ModuleNotFoundError:
        raise SpecQuantError("a hub data set needs the package datasets: pip install 'specquant[eval]'") from None
    name, _, split = name.partition("#")
    parts = name.split("/")
    config = parts[2] if len(parts) > 2 else None
    texts, total = [], 0
    try:
        for row in load_dataset("/".join(parts[:2]), config, split=split or "train", streaming=True):
            text = row.get("text") or next((v for v in row.values() if isinstance(v, str)), "")
            texts.append(text)
            total += len(text)
            if total >= characters:
                break
    except Exception as e:
        reason = (str(e).strip() or type(e).__name__).splitlines()[0][:200]
        raise SpecQuantError(f"data set '{name}' cannot be read from the hub: {reason}") from None
    return "\n\n".join(texts)
