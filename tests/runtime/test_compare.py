"""Two models side by side: against the definitions, and as a user runs it."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("onnxruntime", reason="the extra `cpu` is not installed")

from specquant.custom_ops.errors import SpecQuantError
from specquant.runtime.cli import main
from specquant.runtime.compare import compare
from specquant.runtime.perplexity import perplexity
from specquant.runtime.session import load

VOCAB = 57


def probabilities(row: np.ndarray) -> np.ndarray:
    shifted = np.exp(row.astype(np.float64) - row.max())
    return shifted / shifted.sum()


def test_against_the_definitions(rng: np.random.Generator) -> None:
    a = (rng.standard_normal((VOCAB, VOCAB)) * 3 + 40).astype(np.float32)  # two bigram models
    b = (a + rng.standard_normal((VOCAB, VOCAB)) - 70).astype(np.float32)
    ids, window = rng.integers(0, VOCAB, 3 * 150 + 11), 150

    def blocks(piece: np.ndarray, size: int) -> Iterator[np.ndarray]:
        reused = np.empty((size, VOCAB), np.float32)  # a block is valid only until the next
        for start in range(0, len(piece), size):
            part = a[piece[start : start + size]]
            reused[: len(part)] = part
            yield reused[: len(part)]

    done: list[int] = []
    result = compare(lambda piece: blocks(piece, 47), lambda piece: b[piece], ids, window, None, done.append)
    kl, same = [], 0
    for start in range(0, 450, window):
        for token in ids[start : start + window - 1]:
            p, q = probabilities(a[token]), probabilities(b[token])
            kl.append(sum(x * (math.log(x) - math.log(y)) for x, y in zip(p, q, strict=True)))
            same += int(p.argmax() == q.argmax())
    assert result.kl_mean == pytest.approx(np.mean(kl), rel=1e-5)
    assert result.kl_p99 == pytest.approx(np.percentile(kl, 99), rel=1e-5)
    assert result.same_top1 == pytest.approx(same / len(kl))
    for table, found in ((a, result.a), (b, result.b)):
        assert found.nll == pytest.approx(perplexity(lambda piece, t=table: t[piece], ids, window).nll, rel=1e-9)
        assert (found.windows, found.tokens) == (3, 3 * 149)
    assert sum(done) == 3
    same_model = compare(lambda piece: a[piece], lambda piece: blocks(piece, 7), ids, window, 2)
    assert abs(same_model.kl_mean) < 1e-12
    assert same_model.same_top1 == 1


def test_vocabularies_and_damage(rng: np.random.Generator) -> None:
    a = rng.standard_normal((VOCAB, VOCAB)).astype(np.float32)
    ids = rng.integers(0, VOCAB, 40)
    with pytest.raises(SpecQuantError, match="vocabularies of 57 and 56"):
        compare(lambda piece: a[piece], lambda piece: a[piece, :-1], ids, 20)
    with pytest.raises(SpecQuantError, match="infinite logits in window 1"):
        compare(lambda piece: a[piece], lambda piece: np.full((len(piece), VOCAB), np.nan, np.float32), ids, 20)
    with pytest.raises(ValueError, match="19 rows of logits for 20 tokens"):
        compare(lambda piece: a[piece], lambda piece: a[piece[1:]], ids, 20)


def test_command(
    capsys: pytest.CaptureFixture[str], folder: Path, float_folder: Path, tmp_path: Path, rng: np.random.Generator
) -> None:
    text = tmp_path / "text.raw"
    words = rng.choice(["Paris", "capital", "Fluß", "東京", "of"], 200)
    text.write_text(" ".join(words), encoding="utf-8")
    reference, model = (load(f, custom_ops=False) for f in (float_folder, folder))
    ids = reference.encode(text.read_text(encoding="utf-8"), add_special_tokens=False)
    command = ["eval", "compare", float_folder, folder, "--text", text, "--window", 50, "--windows", 2]
    command += ["--no-custom-ops", "-q"]
    capsys.readouterr()  # the seed
    assert main([*map(str, command), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["a"]["perplexity"] == pytest.approx(perplexity(reference.logits, ids, 50, 2).perplexity, rel=1e-5)
    assert found["b"]["perplexity"] == pytest.approx(perplexity(model.logits, ids, 50, 2).perplexity, rel=1e-5)
    assert found["models"]["b"]["linear_bits_per_weight"] == 5.0
    assert 0 < found["kl_mean"] < found["kl_p99"]
    assert main([*map(str, command)]) == 0
    out = capsys.readouterr().out
    assert f"KL(A‖B) {found['kl_mean']:.4f} nats a token" in out
    assert f"{100 * found['same_top1']:.2f} %" in out


def test_one_tokenizer(capsys: pytest.CaptureFixture[str], folder: Path, tmp_path: Path) -> None:
    """Against a source, in torch, whose tokenizer cuts the text differently."""
    from tests.model_folder import random_llama, save_model_folder

    source = save_model_folder(tmp_path / "source", random_llama(3))
    text = tmp_path / "text.raw"
    text.write_text("The capital of France is Paris, and the river there is the Seine. " * 20)
    common = ["--text", str(text), "--window", "40", "--windows", "1", "--no-custom-ops", "-q"]
    assert main(["eval", "compare", str(source), str(folder), *common]) == 2
    assert "cut this text into different tokens" in capsys.readouterr().err
    assert main(["eval", "compare", str(source), str(source), *common, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert abs(found["kl_mean"]) < 1e-12
    assert found["models"]["a"]["model_bits_per_weight"] == pytest.approx(32, abs=1)  # float32, and a file's header
