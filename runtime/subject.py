"""What `specquant eval` measures: an exported folder, or a model as it was before quantisation."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from specquant.custom_ops.errors import SpecQuantError
from specquant.runtime.artifact import MANIFEST
from specquant.runtime.cli_common import note
from specquant.runtime.cli_options import add_load_options, load_model
from specquant.runtime.perplexity import LogitsFn

WINDOW = 2048  # tokens: the convention for WikiText-2
MODEL_HELP = "an exported folder; else a hub id, folder, .gguf or sample, which needs the extra `export`"


@dataclass(frozen=True)
class Subject:
    """encode: text -> ids int64 [T], without special tokens. context: tokens, None when it does not say.

    linear_bits: bits per weight of the linears, None when they are not quantised; model_bits: of all that is stored.
    """

    name: str
    encode: Callable[[str], NDArray[np.int64]]
    logits: LogitsFn
    context: int | None
    linear_bits: float | None
    model_bits: float | None


def is_exported(model: str) -> bool:
    return (Path(model) / MANIFEST).is_file()


def open_subject(args: argparse.Namespace, model: str) -> Subject:
    """`model` as the load options in `args` say. Raises SpecQuantError if it cannot be loaded."""
    if is_exported(model):
        loaded = load_model(argparse.Namespace(**vars(args) | {"model": model, "exact_logits": True}))
        bits = loaded.manifest.bits
        return Subject(
            loaded.manifest.name,
            lambda text: loaded.encode(text, add_special_tokens=False),
            loaded.logit_blocks,
            loaded.context,
            bits.linear_bits_per_weight,
            bits.model_bits_per_weight,
        )
    note(args, f"{model} has no {MANIFEST}: measuring the model itself, not quantised")
    try:
        from specquant.exporter.evaluate import float_model

        found = float_model(model, args.revision)
    except ModuleNotFoundError as error:
        raise needs_export(model, error) from None
    return Subject(found.name, found.encode, found.logits, None, None, found.bits_per_weight)


def needs_export(model: str, error: ModuleNotFoundError) -> SpecQuantError:
    return SpecQuantError(
        f"{model} is not an exported folder, and to run the original model {error.name} is missing: "
        "pip install 'specquant[export]'"
    )


def add_text_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--text", metavar="FILE", required=True, help="the text, UTF-8")
    parser.add_argument("--window", type=int, metavar="N", help=f"tokens (default: {WINDOW}, or a shorter context)")
    parser.add_argument("--windows", type=int, metavar="N", help="only the first N windows (default: all)")
    parser.add_argument("--revision", metavar="REV", help="of a hub model: branch, tag or commit")
    add_load_options(parser)


def window_of(args: argparse.Namespace, context: int | None) -> int:
    """Tokens of a window. Raises SpecQuantError when --window is longer than the context."""
    if args.window is None and context is not None and context < WINDOW:
        note(args, f"the context holds {context} tokens: windows are that long, not {WINDOW}")
        return context
    window: int = WINDOW if args.window is None else args.window
    if context is not None and window > context:
        raise SpecQuantError(f"--window {window} is longer than the context of {context} tokens: choose less")
    return window
