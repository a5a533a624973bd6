"""The comparison with peers: its ratios follow from its runs, and our side of it runs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tools import bench_peers

TOOL = Path(bench_peers.__file__)


def run_of(
    prefill: float, decode: float, first_token: float, load: float = 1.0, memory: float = 100.0
) -> dict[str, float]:
    return {"prefill": prefill, "decode": decode, "first_token": first_token, "load": load, "memory": memory}


def test_ratios_are_of_medians_to_the_best_of_each_column() -> None:
    found = {
        "ours": [run_of(300, 50, 8), run_of(100, 70, 10), run_of(200, 60, 90)],
        "a": [run_of(80, 40, 20), run_of(100, 40, 20), run_of(900, 40, 20)],
        "b": [run_of(50, 120, 40, load=0.5)] * 3,
    }
    result = bench_peers.report(found, ["ours"])
    assert result["best_peer"] == {"prefill": "a", "decode": "b", "first_token": "a", "load": "b", "memory": "a"}
    assert result["ratio"] == {"prefill": 2.0, "decode": 0.5, "first_token": 2.0, "load": 0.5, "memory": 1.0}
    lines = bench_peers.table(result).splitlines()
    assert "| ours | 200 (100-300) | 60.0 (50.0-70.0) | 10.0 (8.0-90.0) |" in lines[2]
    assert lines[-1].startswith("| ours to the best peer | 2.00× a | 0.50× b | 2.00× a |")
    assert len({line.count("|") for line in lines}) == 1


def test_models_of_ours_are_not_each_others_peers() -> None:
    found = {"ours, a": [run_of(300, 50, 8)], "ours, b": [run_of(600, 25, 8)], "peer": [run_of(100, 100, 8)]}
    result = bench_peers.report(found, ["ours, a", "ours, b"])
    assert (result["ratio"]["prefill"], result["ratios"]["ours, b"]["prefill"]) == (3.0, 6.0)
    assert result["ratios"]["ours, b"]["decode"] == 0.25
    assert set(result["best_peer"].values()) == {"peer"}
    assert bench_peers.table(result).splitlines()[-1].startswith("| ours, b to the best peer | 6.00× peer |")


def test_without_peers_it_says_what_to_do(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(TOOL), "nowhere", "--env", str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "setup.sh" in done.stderr


def test_a_contender_that_fails_ends_it_with_one_line(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime", reason="the extra `cpu` is not installed")
    with pytest.raises(SystemExit, match=r"bench_peers: .*is not a folder"):
        bench_peers.measure({"ours": (sys.executable, "ours", tmp_path / "nothing")}, 1, 1)


def test_our_side_measures_every_column(tmp_path: Path) -> None:
    """A stand-in with the interface of a contender: what is timed is counted in tokens of the right number."""
    asked: list[int] = []

    class Engine:
        def __init__(self, path: str, threads: int) -> None:
            self.threads = threads

        def load(self) -> None: ...

        def start(self, ids: list[int]) -> None:
            asked.append(len(ids))

        def next(self) -> int:
            return 5

        def step(self, token: int) -> None:
            asked.append(1)

    bench_peers.CONTENDERS["stand-in"] = Engine
    try:
        result = bench_peers.run_one("stand-in", "", 1)
    finally:
        del bench_peers.CONTENDERS["stand-in"]
    assert set(result) == set(bench_peers.COLUMNS)
    assert asked == ([512, 32] + [1] * 128) * (bench_peers.ROUNDS + 1)
    assert json.loads(json.dumps(result)) == result
