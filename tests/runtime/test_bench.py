"""`specquant bench`: what it counts, and that its figures follow from its times."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

pytest.importorskip("onnxruntime", reason="the extra `cpu` is not installed")

from specquant.custom_ops import library
from specquant.custom_ops.errors import SpecQuantError
from specquant.custom_ops.library_limits import Limits, measure_limits
from specquant.runtime.artifact import BitsInfo, open_artifact
from specquant.runtime.bench import Bench, Timing, bench, limits_dict, work
from specquant.runtime.cli import main
from specquant.runtime.session import load

try:
    library.isas()
except SpecQuantError as missing:
    pytest.skip(str(missing), allow_module_level=True)


def test_rounds_are_counted_and_the_first_is_left_out(folder: Path) -> None:
    rounds: list[int] = []
    result = bench(load(folder), 40, 5, 3, rounds.append)
    assert sum(rounds) == 4
    assert result.prefill is not None
    assert result.decode is not None
    assert [len(t.seconds) for t in (result.prefill, result.decode, result.first_token)] == [3, 3, 3]
    assert (result.prefill.tokens, result.decode.tokens, result.first_token.tokens) == (40, 5, 32)
    assert min(result.prefill.seconds + result.decode.seconds + result.first_token.seconds) > 0


def test_what_is_not_asked_for_is_not_measured(folder: Path) -> None:
    result = bench(load(folder), 0, 2, 1)
    assert result.prefill is None
    assert result.decode is not None


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ((-1, 1, 1), r"prompt = -1 is out of range"),
        ((1, 1, 0), r"runs = 0 is out of range"),
        ((97, 1, 1), r"97 tokens exceed the context of 96"),
        ((1, 96, 1), r"97 tokens exceed the context of 96"),
    ],
)
def test_what_cannot_be_measured(folder: Path, asked: tuple[int, int, int], message: str) -> None:
    with pytest.raises(SpecQuantError, match=message):
        bench(load(folder), *asked)


def test_the_work_of_a_token_is_what_the_manifest_says(folder: Path) -> None:
    kinds = {"int4": 1000, "scales": 200, "embedding": 30_000, "rotary": 400_000}
    manifest = dataclasses.replace(open_artifact(folder), bits=BitsInfo(tensor_bytes=kinds))
    hidden, wide = 64, 96  # of the fixture: 4 heads and 2 kv heads of 16, two layers
    linears = hidden * (64 + 2 * 32) + 64 * hidden + hidden * 2 * wide + wide * hidden
    needed = work(manifest, 20)
    assert needed.prefill_ops == 2 * 2 * linears
    cache = 10 * 2 * 2 * 2 * 16 * 2  # tokens, keys and values, layers, kv heads, head_dim, bytes
    assert needed.decode_bytes == 31_200 + cache  # the tied table is the head
    untied = dataclasses.replace(manifest, model=dataclasses.replace(manifest.model, tied_embeddings=False))
    assert work(untied, 20).decode_bytes == 1200 + cache


def test_shares_of_the_limits(folder: Path) -> None:
    manifest = open_artifact(folder)
    needed = work(manifest, 4)
    prefill, decode = Timing(8, [2.0, 1.0, 4.0]), Timing(4, [0.5])
    assert prefill.as_dict() == {"tokens": 8, "runs": 3, "tokens_per_s": 4.0, "slowest": 2.0, "fastest": 8.0}
    found = limits_dict(Limits(2.0, 3.0, "scalar"), Bench(prefill, decode, Timing(32, [1.0])), needed)
    assert found["prefill_of_limit"] == pytest.approx(needed.prefill_ops * 4 / 2e9)
    assert found["decode_of_limit"] == pytest.approx(needed.decode_bytes * 8 / 3e9)


def test_the_limits_are_above_what_kernels_reach() -> None:
    """More threads never give less than a fraction of one, and no memory is as slow as a disk."""
    limits = measure_limits(1)
    assert limits.gops > 1
    assert limits.gbps > 0.2
    assert library.isas()[limits.isa]


def test_command(capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    assert main(["bench", str(folder), "-p", "16", "-n", "3", "-r", "2", "--threads", "1", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["prefill"]["tokens"], report["decode"]["tokens"], report["threads"]) == (16, 3, 1)
    assert report["limits"]["prefill_of_limit"] > 0
    assert report["load_s"] > 0
    assert main(["bench", str(folder), "-p", "16", "-n", "0", "-r", "1"]) == 0
    out = capsys.readouterr().out
    assert "pp16" in out
    assert "tg" not in out
    assert "first token of a prompt of 32" in out
    assert main(["bench", str(folder), "-p", "500"]) == 2
    assert "exceed the context of 96" in capsys.readouterr().err
