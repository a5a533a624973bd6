"""`specquant eval ppl`: perplexity of an exported model, or of the model it came from."""

from __future__ import annotations

import argparse
import hashlib
import json
import time
from pathlib import Path

import numpy as np

from specquant.custom_ops.errors import SpecQuantError
from specquant.runtime.artifact import MANIFEST, record_evaluation
from specquant.runtime.cli_common import Progress, add_verbosity
from specquant.runtime.cli_options import read_text
from specquant.runtime.perplexity import perplexity
from specquant.runtime.stats import machine_info
from specquant.runtime.subject import MODEL_HELP, add_text_options, is_exported, open_subject, window_of

EPILOG = """examples:
  specquant eval ppl build/smollm2 --text wiki.test.raw
  specquant eval ppl build/smollm2 --text wiki.test.raw --windows 20 --json
  specquant eval ppl build/smollm2 --text wiki.test.raw --record      (inspect shows it from then on)
  specquant eval ppl HuggingFaceTB/SmolLM2-135M-Instruct --text wiki.test.raw    (not quantised; needs [export])

The whole file is tokenised as one string, without special tokens, and cut into windows that do not overlap; the
tail is dropped and every token of a window but its first is scored. The result is exp(mean negative log-likelihood).
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "Perplexity of a model on a text."
    parser.epilog = EPILOG
    parser.add_argument("model", metavar="DIR|MODEL", help=MODEL_HELP)
    parser.add_argument("--record", action="store_true", help=f"keep the result in DIR/{MANIFEST}")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    add_text_options(parser)
    add_verbosity(parser)


def run(args: argparse.Namespace) -> int:
    text = read_text(args.text)
    if args.record and not is_exported(args.model):
        raise SpecQuantError(f"--record needs an exported folder, and {args.model} has no {MANIFEST}")
    subject = open_subject(args, args.model)
    window = window_of(args, subject.context)
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
