"""The unquantised model, run in torch: what `specquant eval` compares an artifact with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from specquant.exporter.sources import load_model, resolve


@dataclass(frozen=True)
class FloatModel:
    """logits: ids int64 [T] -> float32 [T, vocab]; encode: text -> ids int64 [T], without special tokens.

    bits_per_weight: of the source's weight files, over the model's parameters (a tied head counts once).
    """

    name: str
    encode: Callable[[str], NDArray[np.int64]]
    logits: Callable[[NDArray[np.int64]], NDArray[np.float32]]
    bits_per_weight: float


def float_model(source: str, revision: str | None = None) -> FloatModel:
    """Raises SpecQuantError if there is no such model or it cannot be read."""
    found = resolve(source, revision)
    model, tokenizer = load_model(found, "float32")

    @torch.inference_mode()
    def logits(ids: NDArray[np.int64]) -> NDArray[np.float32]:
        out: NDArray[np.float32] = model(torch.from_numpy(ids)[None]).logits[0].float().numpy()
        return out

    def encode(text: str) -> NDArray[np.int64]:
        return np.array(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], np.int64)

    stored = sum(path.stat().st_size for path in found.weight_files())
    return FloatModel(found.name, encode, logits, 8 * stored / sum(p.numel() for p in model.parameters()))
