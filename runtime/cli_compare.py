"""`specquant eval compare`: two models on a text, side by side."""

from __future__ import annotations

import argparse
import hashlib
import json
import time
from pathlib import Path

import numpy as np

from specquant.custom_ops.errors import SpecQuantError
from specquant.runtime.cli_common import Progress, add_verbosity
from specquant.runtime.cli_inspect import aligned
from specquant.runtime.cli_options import read_text
from specquant.runtime.compare import Comparison, compare
from specquant.runtime.stats import machine_info
from specquant.runtime.subject import MODEL_HELP, Subject, add_text_options, open_subject, window_of

EPILOG = """examples:
  specquant eval compare HuggingFaceTB/SmolLM2-135M-Instruct build/smollm2 --text wiki.test.raw --windows 20
  specquant eval compare build/w4a8 build/w4a4 --text wiki.test.raw --json

A is the reference: KL(A‖B) is how many nats a token B's prediction loses against A's. Windows are cut and scored as
by `specquant eval ppl`. Options of loading (--rank, --context, …) hold for both where they are exported folders.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "Perplexity, KL divergence, agreement and bits per weight of two models with one tokenizer."
    parser.epilog = EPILOG
    parser.add_argument("a", metavar="A", help=f"the reference: {MODEL_HELP}")
    parser.add_argument("b", metavar="B", help="the same")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    add_text_options(parser)
    add_verbosity(parser)


def run(args: argparse.Namespace) -> int:
    text = read_text(args.text)
    a, b = open_subject(args, args.a), open_subject(args, args.b)
    window = window_of(args, min((s.context for s in (a, b) if s.context is not None), default=None))
    ids = np.asarray(a.encode(text), np.int64)
    if not np.array_equal(ids, b.encode(text)):
        raise SpecQuantError(
            f"{args.a} and {args.b} cut this text into different tokens: compare needs models of one tokenizer"
        )
    total = min(len(ids) // max(1, window), args.windows or len(ids))
    since = time.perf_counter()
    with Progress("comparing", total, "windows", args.quiet) as progress:
        result = compare(a.logits, b.logits, ids, window, args.windows, progress.update)
    seconds = time.perf_counter() - since
    if args.json:
        about = {
            "models": {side: _about(s) for side, s in (("a", a), ("b", b))},
            "text": Path(args.text).name,
            "text_sha256": hashlib.sha256(text.encode()).hexdigest(),
            "seconds": seconds,
            "machine": machine_info(),
        }
        print(json.dumps(result.as_dict() | about, ensure_ascii=False))
    else:
        print("\n".join(_table(args, a, b, result)))
    return 0


def _about(subject: Subject) -> dict[str, object]:
    return {
        "name": subject.name,
        "linear_bits_per_weight": subject.linear_bits,
        "model_bits_per_weight": subject.model_bits,
    }


def _table(args: argparse.Namespace, a: Subject, b: Subject, result: Comparison) -> list[str]:
    rows = [
        ("", f"A: {args.a}", f"B: {args.b}"),
        ("model", a.name, b.name),
        ("perplexity", f"{result.a.perplexity:.4f}", f"{result.b.perplexity:.4f}"),
        ("bits per weight, linears", _bits(a.linear_bits), _bits(b.linear_bits)),
        ("bits per weight, all", _bits(a.model_bits), _bits(b.model_bits)),
    ]
    return [
        *aligned(rows),
        f"KL(A‖B) {result.kl_mean:.4f} nats a token, 99th percentile {result.kl_p99:.4f}",
        f"same most likely token: {100 * result.same_top1:.2f} %",
        f"({result.a.tokens:,} tokens in {result.a.windows} windows of {result.a.window})",
    ]


def _bits(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
