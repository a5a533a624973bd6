"""`specquant eval ppl`: perplexity of an exported model, or of the model it came from."""

from __future__ import annotations

import argparse
import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from specquant.custom_ops.errors import SpecQuantError
from specquant.runtime.artifact import MANIFEST, record_evaluation
from specquant.runtime.cli_common import Progress, add_verbosity, note
from specquant.runtime.cli_options import add_load_options, load_model, read_text
from specquant.runtime.perplexity import LogitsFn, perplexity
from specquant.runtime.stats import machine_info

EPILOG = """examples:
  specquant eval ppl build/smollm2 --text wiki.test.raw
  specquant eval ppl build/smollm2 --text wiki.test.raw --windows 20 --json
  specquant eval ppl build/smollm2 --text wiki.test.raw --record      (inspect shows it from then on)
  specquant eval ppl HuggingFaceTB/SmolLM2-135M-Instruct --text wiki.test.raw    (not quantised; needs [export])

The whole file is tokenised as one string, without special tokens, and cut into windows that do not overlap; the
tail is dropped and every token of a window but its first is scored. The result is exp(mean negative log-likelihood).
"""
_WINDOW = 2048


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "Measure a model on a text: ppl is perplexity."
    parser.epilog = EPILOG
    parser.add_argument("measure", metavar="ppl", choices=["ppl"], help="what to measure")
    parser.add_argument("model", metavar="DIR|MODEL", help="an exported folder; else a hub id, folder, .gguf or sample")
    parser.add_argument("--text", metavar="FILE", required=True, help="the text, UTF-8")
    parser.add_argument("--window", type=int, metavar="N", help=f"tokens (default: {_WINDOW}, or a shorter context)")
    parser.add_argument("--windows", type=int, metavar="N", help="only the first N windows (default: all)")
    parser.add_argument("--revision", metavar="REV", help="of a hub model: branch, tag or commit")
    parser.add_argument("--record", action="store_true", help=f"keep the result in DIR/{MANIFEST}")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    add_load_options(parser)
    add_verbosity(parser)


@dataclass(frozen=True)
class _Subject:
    """What is measured. context: tokens, None when it does not say."""

    name: str
    encode: Callable[[str], NDArray[np.int64]]
    logits: LogitsFn
    context: int | None


def run(args: argparse.Namespace) -> int:
    text = read_text(args.text)
    exported = (Path(args.model) / MANIFEST).is_file()
    if args.record and not exported:
        raise SpecQuantError(f"--record needs an exported folder, and {args.model} has no {MANIFEST}")
    subject = _exported(args) if exported else _original(args)
    window = _window(args, subject)
    ids = np.asarray(subject.encode(text), np.int64)
    total = min(len(ids) // max(1, window), args.windows or len(ids))
    since = time.perf_counter()
    with Progress("perplexity", total, "windows", args.quiet) as progress:
        result = perplexity(subject.logits, ids, window, args.windows, progress.update)
    seconds = time.perf_counter() - since
    digest = hashlib.sha256(text.encode()).hexdigest()
    if args.record:
        kept = {key: getattr(result, key) for key in ("perplexity", "tokens", "windows", "window")}
        record_evaluation(args.model, Path(args.text).name, kept | {"text_sha256": digest})
    if args.json:
        about = {"model": subject.name, "text": Path(args.text).name, "text_sha256": digest, "seconds": seconds}
        print(json.dumps(result.as_dict() | about | {"machine": machine_info()}, ensure_ascii=False))
        return 0
    spread = result.nll_standard_error
    margin = "" if spread is None else f" ± {result.perplexity * spread:.2f}"
    print(f"{subject.name}: perplexity {result.perplexity:.4f}{margin}", end=" ")
    print(f"({result.tokens:,} tokens in {result.windows} windows of {result.window}, {seconds:.0f} s)")
    return 0


def _exported(args: argparse.Namespace) -> _Subject:
    model = load_model(args)
    return _Subject(
        model.manifest.name,
        lambda text: model.encode(text, add_special_tokens=False),
        model.logit_blocks,
        model.context,
    )


def _original(args: argparse.Namespace) -> _Subject:
    note(args, f"{args.model} has no {MANIFEST}: measuring the model itself, not quantised")
    try:
        from specquant.exporter.evaluate import float_logits

        logits, encode, name = float_logits(args.model, args.revision)
    except ModuleNotFoundError as error:
        raise SpecQuantError(
            f"{args.model} is not an exported folder, and to run the original model {error.name} is missing: "
            "pip install 'specquant[export]'"
        ) from None
    return _Subject(name, encode, logits, None)


def _window(args: argparse.Namespace, subject: _Subject) -> int:
    if args.window is None and subject.context is not None and subject.context < _WINDOW:
        note(args, f"the context holds {subject.context} tokens: windows are that long, not {_WINDOW}")
        return subject.context
    window: int = _WINDOW if args.window is None else args.window
    if subject.context is not None and window > subject.context:
        raise SpecQuantError(f"--window {window} is longer than the context of {subject.context} tokens: choose less")
    return window
