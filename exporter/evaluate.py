"""The unquantised model as a function of token ids to logits, for `specquant eval` on a source."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray

from specquant.exporter.sources import load_model, resolve

Logits = Callable[[NDArray[np.int64]], NDArray[np.float32]]


def float_logits(source: str, revision: str | None = None) -> tuple[Logits, Callable[[str], NDArray[np.int64]], str]:
    """(ids int64 [T] -> logits float32 [T, vocab], text -> ids without special tokens, the model's name)."""
    found = resolve(source, revision)
    model, tokenizer = load_model(found, "float32")

    @torch.inference_mode()
    def logits(ids: NDArray[np.int64]) -> NDArray[np.float32]:
        out: NDArray[np.float32] = model(torch.from_numpy(ids)[None]).logits[0].float().numpy()
        return out

    def encode(text: str) -> NDArray[np.int64]:
        return np.array(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], np.int64)

    return logits, encode, found.name
