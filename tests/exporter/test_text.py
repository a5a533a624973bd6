"""Calibration text: which windows are drawn, and what is said when there are too few."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

import pytest

from specquant.custom_ops.errors import SpecQuantError
from specquant.exporter.recipe import Recipe, preset
from specquant.exporter.text import BUILTIN, calibration, read_text
from tests.model_folder import small_tokenizer

QUICK = Recipe(samples=5, sequence_length=16)


def test_the_builtin_text_is_long_enough() -> None:
    """For the default recipe, also with a tokenizer of many more tokens than this one's 320, which makes fewer."""
    recipe = preset("klt")
    tokens = calibration(BUILTIN, small_tokenizer(), recipe).tokens
    assert tokens.shape == (recipe.samples, recipe.sequence_length)
    # English takes 4 to 5 characters a token: count on 6.
    assert len(read_text(BUILTIN, 0)) >= 6 * recipe.samples * recipe.sequence_length


def test_windows_are_whole_and_do_not_overlap(text_file: Path) -> None:
    tokenizer = small_tokenizer()
    text = text_file.read_text(encoding="utf-8")
    ids = tokenizer(text)["input_ids"]
    windows = [ids[i * 16 : i * 16 + 16] for i in range(len(ids) // 16)]
    drawn = calibration(str(text_file), tokenizer, replace(QUICK, samples=len(windows)))
    assert sorted(drawn.tokens.tolist()) == sorted(windows)
    assert drawn.tokens.tolist() != windows  # in random order
    few = [calibration(str(text_file), tokenizer, replace(QUICK, seed=seed)).tokens.tolist() for seed in (0, 0, 1)]
    assert few[0] == few[1] != few[2]
    assert drawn.to_dict() == {
        "text": "text.txt",
        "sha256": hashlib.sha256(text.encode()).hexdigest(),
        "samples": len(windows),
        "sequence_length": 16,
        "seed": 0,
    }


def test_refinement_may_see_more_than_calibration(text_file: Path) -> None:
    tokenizer = small_tokenizer()
    few = calibration(str(text_file), tokenizer, QUICK)
    more = calibration(str(text_file), tokenizer, replace(QUICK, refine_steps=1, refine_batch=2, refine_samples=9))
    assert (few.samples, more.samples) == (5, 9)
    assert more.tokens[:5].tolist() == few.tokens.tolist()  # these calibrate


def test_too_short(tmp_path: Path) -> None:
    path, tokenizer = tmp_path / "short.txt", small_tokenizer()
    path.write_text("The capital of France is Paris. " * 8)
    possible = len(tokenizer(path.read_text())["input_ids"]) // 16
    assert 0 < possible < 64
    with pytest.raises(SpecQuantError, match=f"64 samples of 16 need 1,024: give more text, or --samples {possible}$"):
        calibration(str(path), tokenizer, replace(QUICK, samples=64))
    assert len(calibration(str(path), tokenizer, replace(QUICK, samples=possible)).tokens) == possible
    path.write_text("Paris")
    with pytest.raises(SpecQuantError, match="use a shorter --sequence-length"):
        calibration(str(path), tokenizer, QUICK)


def test_not_a_text(tmp_path: Path) -> None:
    path = tmp_path / "text"
    path.write_bytes(b"Caf\xe9 au lait")
    with pytest.raises(SpecQuantError, match=r"not UTF-8 \(byte 3\)"):
        calibration(str(path), small_tokenizer(), QUICK)
    for missing in (tmp_path / "none", tmp_path):
        with pytest.raises(SpecQuantError, match="cannot be read"):
            calibration(str(missing), small_tokenizer(), QUICK)
