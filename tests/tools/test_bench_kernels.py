"""The kernel benchmark: both contenders compute the same thing, and its figures follow from its times."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from specquant.custom_ops import library
from specquant.custom_ops.errors import SpecQuantError

TOOL = Path(__file__).parents[2] / "tools" / "bench_kernels.py"

try:
    library.isas()
except SpecQuantError as missing:
    pytest.skip(str(missing), allow_module_level=True)


def bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(TOOL), *arguments], capture_output=True, text=True, check=False)


def test_ratio_is_that_of_the_medians() -> None:
    done = bench("--json", "--no-limits", "--threads", "1", "--seconds", "0.05", "--shapes", "3x128x80,9x64x48")
    assert done.returncode == 0, done.stderr
    report: dict[str, Any] = json.loads(done.stdout)
    assert [result["shape"] for result in report["results"]] == [[3, 128, 80], [9, 64, 48]]
    for result in report["results"]:
        ours, peer = result["ours"], result["MatMulNBits"]
        assert result["runs"] >= 5
        assert result["ratio"]["MatMulNBits"] == pytest.approx(peer["median_ms"] / ours["median_ms"])
        tokens, n, m = result["shape"]
        assert ours["gops"] * ours["median_ms"] == pytest.approx(2e-6 * tokens * n * m)
        assert 0 < ours["best_ms"] <= ours["median_ms"]


def test_a_shape_that_is_none_is_explained() -> None:
    done = bench("--shapes", "3x128")
    assert done.returncode == 2
    assert "TOKENSxINxOUT" in done.stderr
