"""tools/bench_attention.py on calls so small that it takes a second."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from specquant.custom_ops import library
from specquant.custom_ops.errors import SpecQuantError

TOOLS = Path(__file__).parents[2] / "tools"

pytest.importorskip("onnxruntime")
try:
    library.library_path()
except SpecQuantError as missing:
    pytest.skip(str(missing), allow_module_level=True)


def test_both_are_timed_and_agree() -> None:
    command = [sys.executable, str(TOOLS / "bench_attention.py"), "--heads", "4x2x32", "--calls", "9+0,1+20"]
    command += ["--json", "--no-limits", "--cpu-time", "--seconds", "0.05"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    results = json.loads(done.stdout)["results"]
    assert [(result["new"], result["past"]) for result in results] == [(9, 0), (1, 20)]
    for result in results:
        ours, peer = result["HalfKVAttention"], result["GroupQueryAttention"]
        assert result["ratio"] == pytest.approx(peer["median_ms"] / ours["median_ms"])
        assert 0 < ours["best_ms"] <= ours["median_ms"]


def test_calls_that_are_none() -> None:
    command = [sys.executable, str(TOOLS / "bench_attention.py"), "--calls", "9"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert "write 2 numbers with + between them" in done.stderr
