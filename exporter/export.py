"""From a source to an artifact folder: the whole of `specquant export` as one function."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from specquant.custom_ops.errors import SpecQuantError
from specquant.exporter.artifact import check_target, write_artifact
from specquant.exporter.families import family_of
from specquant.exporter.head import group_of
from specquant.exporter.quantize import decoder_config, quantize, stage_inputs
from specquant.exporter.recipe import Recipe, preset
from specquant.exporter.refine import refine
from specquant.exporter.sources import load_model, resolve
from specquant.exporter.text import BUILTIN, calibration

Report = Callable[[str, int, int], None]  # what, done, total


def export(
    source: str,
    output: str | Path,
    recipe: Recipe | None = None,
    *,
    revision: str | None = None,
    calibration_text: str = BUILTIN,
    context_length: int | None = None,
    device: str = "cpu",
    force: bool = False,
    report: Report = lambda what, done, total: None,
) -> dict[str, Any]:
    """Quantise `source` (folder, hub id, .gguf or `sample`) and write it to `output`; returns the manifest.

    recipe: default preset("klt"). calibration_text: see `text.calibration`. context_length: tokens, to shorten the
    model's. device: where to quantise, as torch names it; the result is for any. report is told of progress.
    Raises SpecQuantError for everything a user can mend, and then leaves no folder and an old one as it was.
    """
    recipe = preset("klt") if recipe is None else recipe
    target = Path(output)
    check_target(target, force)
    _check_device(device)
    report("finding the model", 0, 1)
    found = resolve(source, revision)
    report("loading the model", 0, 1)
    model, tokenizer = load_model(found)
    # A recipe that does not fit is worth saying before a calibration text is read.
    recipe.check_shapes(stage_inputs(decoder_config(model.config, family_of(model.config), context_length)))
    if recipe.head_bits != 16:
        group_of(model.config.get_text_config().hidden_size)
    used = None
    if recipe.needs_calibration:
        report("reading the calibration text", 0, 1)
        used = calibration(calibration_text, tokenizer, recipe)
        longest = context_length or model.config.get_text_config().max_position_embeddings
        if recipe.sequence_length > longest:
            raise SpecQuantError(f"--sequence-length {recipe.sequence_length} exceeds the context: at most {longest}")
    tokens = None if used is None else used.tokens.to(device)
    teacher = copy.deepcopy(model).to(device) if recipe.refine_steps and tokens is not None else None
    decoder = quantize(
        model.to(device),
        recipe,
        None if tokens is None else tokens[: recipe.samples],
        context_length,
        lambda done, total, what: report("quantising", done, total),
    )
    if teacher is not None and tokens is not None:

        def refining(done: int, total: int, what: str) -> None:
            report("refining" if done < total else what, done, total)  # its last word is what it brought

        decoder = refine(teacher, decoder, recipe, tokens[: recipe.refine_samples or recipe.samples], refining)
    report("writing the artifact", 0, 1)
    about = None if used is None else used.to_dict()
    return write_artifact(target, decoder, found, model, tokenizer, about, force)


def _check_device(device: str) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        raise SpecQuantError("--device cuda: torch finds no GPU here; use --device cpu")
