"""Figures about the process and the machine are plausible."""

from __future__ import annotations

import os

import numpy as np

from specquant.runtime.stats import available_cpus, machine_info, peak_memory, physical_cores


def test_peak_memory_counts_what_was_used() -> None:
    before = peak_memory()
    if before is None:
        return
    block = np.ones(8 << 20)  # 64 MiB, written
    assert block.sum() == 8 << 20
    after = peak_memory()
    assert after is not None
    assert after >= 64 << 20
    assert after >= before


def test_cores() -> None:
    assert 1 <= physical_cores() <= len(available_cpus()) <= (os.cpu_count() or 1)


def test_machine() -> None:
    info = machine_info()
    assert info["processor"]
    assert info["memory_bytes"] > 1 << 28
