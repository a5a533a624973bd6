"""How long prefill and decode take, for several artifacts in turn: what a slow moment of the machine costs, all pay."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from statistics import median
from time import perf_counter

import numpy as np

from specquant.runtime import load

PREFILL, DECODE, RUNS = 512, 64, 5


def measure(folders: Mapping[str, Path], threads: int | None = None) -> dict[str, dict[str, float]]:
    """name -> prefill_ms of 512 tokens (or half the context) and decode_ms of one token after them, medians of 5 runs
    that take turns; the first, which warms up, is not counted."""
    models = {name: load(folder, threads=threads) for name, folder in folders.items()}
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in models}
    for _ in range(RUNS + 1):
        for name, model in models.items():
            tokens = min(PREFILL, model.context // 2)
            steps = min(DECODE, model.context - tokens)
            ids = np.arange(tokens, dtype=np.int64) % model.manifest.model.vocab_size
            sequences = model.sequences()
            since = perf_counter()
            for _block in sequences.prefill(0, ids):
                pass
            filled = perf_counter()
            for token in ids[:steps]:
                sequences.decode(token[None])
            times[name].append((filled - since, (perf_counter() - filled) / steps))
    return {
        name: {
            "prefill_ms": 1e3 * median(prefill for prefill, _ in found[1:]),
            "decode_ms": 1e3 * median(decode for _, decode in found[1:]),
        }
        for name, found in times.items()
    }
