"""`specquant eval zeroshot`: the paper's nine tasks, by lm-eval."""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from specquant.custom_ops.errors import SpecQuantError
from specquant.runtime.artifact import MANIFEST, record_evaluation
from specquant.runtime.cli_common import Progress, add_verbosity, note
from specquant.runtime.cli_inspect import aligned
from specquant.runtime.cli_options import add_load_options, load_model
from specquant.runtime.stats import machine_info
from specquant.runtime.subject import MODEL_HELP, is_exported, needs_export

Builder = Callable[[Callable[[int], None]], Any]  # what is told the progress -> a model as lm-eval sees one
EPILOG = """examples:
  specquant eval zeroshot build/smollm2 --limit 100
  specquant eval zeroshot build/smollm2 --tasks arc_easy,piqa --json
  specquant eval zeroshot build/smollm2 --data-dir zeroshot --record        (files instead of the hub)
  specquant eval zeroshot HuggingFaceTB/SmolLM2-135M-Instruct --device cuda --batch-tokens 32768   (not quantised)

The average is over acc_norm for hellaswag, piqa, arc_easy, arc_challenge and openbookqa, and acc for lambada_openai,
winogrande, boolq and social_iqa. --data-dir holds a document a line, in the schema of the original data sets, in
lambada_openai_test.jsonl, hellaswag_validation.jsonl, piqa_validation.jsonl, winogrande_xl_validation.jsonl,
boolq_validation.jsonl, social_iqa_validation.jsonl, arc_easy_test.jsonl, arc_challenge_test.jsonl and
openbookqa_test.jsonl. Prompts and metrics are lm-eval's either way; SuperGLUE's BoolQ, which lm-eval takes from the
hub, has the article's title before the passage, and a file without titles has not.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "Zero-shot accuracy on the paper's nine multiple-choice tasks, by lm-eval."
    parser.epilog = EPILOG
    parser.add_argument("model", metavar="DIR|MODEL", help=MODEL_HELP)
    parser.add_argument("--tasks", metavar="A,B", help="some of the nine (default: all)")
    parser.add_argument(
        "--data-dir", metavar="DIR", type=Path, help="local files (default: lm-eval's data from the hub)"
    )
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N documents of each task")
    parser.add_argument(
        "--batch-tokens", type=int, metavar="N", default=4096, help="at a time, of a model that is not exported: 4096"
    )
    parser.add_argument("--revision", metavar="REV", help="of a hub model: branch, tag or commit")
    parser.add_argument("--record", action="store_true", help=f"keep the result in DIR/{MANIFEST}")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    add_load_options(parser)
    add_verbosity(parser)


def run(args: argparse.Namespace) -> int:
    for name in ("limit", "batch_tokens"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise SpecQuantError(f"--{name.replace('_', '-')} must be 1 or more")
    if args.record and not is_exported(args.model):
        raise SpecQuantError(f"--record needs an exported folder, and {args.model} has no {MANIFEST}")
    os.environ.setdefault("TQDM_DISABLE", "1")  # lm-eval's own bars
    try:
        from specquant.runtime import zeroshot
    except ModuleNotFoundError as error:
        raise SpecQuantError(f"zeroshot needs {error.name}: pip install 'specquant[eval]'") from None

    zeroshot.quieten()
    names = zeroshot.task_names(args.tasks)
    note(args, "reading the tasks …")
    tasks = zeroshot.local_tasks(names, args.data_dir) if args.data_dir else zeroshot.hub_tasks(names)
    since = time.perf_counter()
    name, backend, build = _artifact_lm(args) if is_exported(args.model) else _float_lm(args)
    with Progress("zeroshot", zeroshot.requests_of(tasks, args.limit), "requests", args.quiet) as progress:
        results = zeroshot.run_tasks(build(progress.update), tasks, args.limit)
    average, seconds = zeroshot.average(results), time.perf_counter() - since
    packages = {package: version(package) for package in ("lm_eval", "datasets", backend)}
    if args.record:
        kept = {"average": average, "tasks": {task: result.value for task, result in results.items()}}
        record_evaluation(args.model, "zeroshot", kept | {"limit": args.limit, "lm_eval": packages["lm_eval"]})
    if args.json:
        found = {
            "model": name,
            "average": average,
            "tasks": {task: vars(result) for task, result in results.items()},
            "limit": args.limit,
            "data": "hub" if args.data_dir is None else "files",
            "versions": packages,
            "seconds": seconds,
            "machine": machine_info(),
        }
        print(json.dumps(found, ensure_ascii=False))
        return 0
    rows = [("task", "metric", "%", "±", "documents")]
    for task, result in results.items():
        spread = result.stderr.get(result.metric)
        margin = "-" if spread is None else f"{100 * spread:.2f}"
        rows.append((task, result.metric, f"{100 * result.value:.2f}", margin, f"{result.documents:,}"))
    rows.append((f"average of {len(results)}", "", f"{100 * average:.2f}", "", ""))
    print("\n".join(line.rstrip() for line in aligned(rows)))
    note(args, f"{name}, lm-eval {packages['lm_eval']}, {seconds:.0f} s")
    return 0


def _artifact_lm(args: argparse.Namespace) -> tuple[str, str, Builder]:
    from specquant.runtime.lm_eval_model import ArtifactLM

    model = load_model(argparse.Namespace(**vars(args) | {"exact_logits": True}))
    return model.manifest.name, "onnxruntime", lambda progress: ArtifactLM(model, progress)


def _float_lm(args: argparse.Namespace) -> tuple[str, str, Builder]:
    """The model before quantisation."""
    note(args, f"{args.model} has no {MANIFEST}: measuring the model itself, not quantised")
    try:
        from specquant.exporter.sources import load_model as load_source
        from specquant.exporter.sources import resolve
    except ModuleNotFoundError as error:
        raise needs_export(args.model, error) from None
    from specquant.runtime.lm_eval_model import TorchLM

    source = resolve(args.model, args.revision)
    model, tokenizer = load_source(source, "float32")
    try:
        model.to(args.device)
    except (RuntimeError, AssertionError) as error:  # a build without CUDA asserts
        raise SpecQuantError(f"--device {args.device}: torch cannot use it ({str(error).splitlines()[0]})") from None
    return source.name, "torch", lambda progress: TorchLM(model, tokenizer, args.batch_tokens, progress)
