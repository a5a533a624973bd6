"""Zero-shot tasks on a machine that has neither lm-eval nor the data: the questions go there, the scores come back.

    python tools/zeroshot_away.py ask DIR --data-dir zeroshot -o requests.json       # here: what lm-eval asks a model
    python3 tools/zeroshot_away.py score DIR requests.json -o scores.json            # there: an artifact
    python tools/zeroshot_away.py report requests.json scores.json --data-dir zeroshot --json

DIR: an exported folder; of `ask`, for its tokenizer. `score` spreads the questions over --processes of --threads each,
or runs on one GPU with --device cuda. Documents, prompts and metrics are those of `specquant eval zeroshot`, which does
the same at one place.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

Pair = tuple[list[int], list[int]]
Score = tuple[float, bool]


def lm_of(model: Any, answer: Any) -> Any:
    """An lm-eval model whose scores `answer` gives for (context, continuation) pairs of tokens."""
    from specquant.runtime.lm_eval_model import ArtifactLM

    class Away(ArtifactLM):
        def _loglikelihood_tokens(self, requests: Any, **options: Any) -> list[Score]:
            scores: list[Score] = answer([(context, choice) for _, context, choice in requests])
            return scores

    return Away(model)


def ask(args: argparse.Namespace) -> int:
    from specquant.runtime import load, zeroshot

    asked: list[Pair] = []

    def keep(pairs: list[Pair]) -> list[Score]:
        asked.extend(pairs)
        return [(0.0, False)] * len(pairs)

    zeroshot.quieten()
    tasks = zeroshot.local_tasks(zeroshot.task_names(args.tasks), args.data_dir)
    zeroshot.run_tasks(lm_of(load(args.model, exact_logits=True), keep), tasks, args.limit)
    contexts: dict[tuple[int, ...], int] = {}
    pairs = [[contexts.setdefault(tuple(context), len(contexts)), choice] for context, choice in asked]
    found = {"tokenizer": str(args.model), "tasks": args.tasks, "limit": args.limit, "pairs": pairs}
    args.output.write_text(json.dumps(found | {"contexts": list(contexts)}, separators=(",", ":")))
    print(f"{len(pairs)} continuations of {len(contexts)} contexts", file=sys.stderr)
    return 0


def read(path: Path) -> tuple[dict[str, Any], list[Pair]]:
    found = json.loads(path.read_text())
    return found, [(found["contexts"][context], choice) for context, choice in found["pairs"]]


def score_part(options: dict[str, Any], pairs: list[Pair]) -> list[Score]:
    from specquant.runtime import load
    from specquant.runtime.continuations import continuation_scores

    return continuation_scores(load(**options), pairs)


def score(args: argparse.Namespace) -> int:
    _, pairs = read(args.requests)
    options: dict[str, Any] = {"folder": args.model, "device": args.device}
    if args.device == "cpu":
        options["threads"] = args.threads
    order = sorted(range(len(pairs)), key=lambda i: pairs[i][0])  # what shares a context stays together
    count = 1 if args.device == "cuda" else args.processes
    pieces = 8 * count  # more than processes: some are quicker than others
    bounds = [len(order) * i // pieces for i in range(pieces + 1)]
    parts = [order[a:b] for a, b in itertools.pairwise(bounds)]
    start = time.perf_counter()
    scores: list[Any] = [None] * len(pairs)
    with ProcessPoolExecutor(count, multiprocessing.get_context("spawn")) as pool:
        jobs = [pool.submit(score_part, options, [pairs[i] for i in part]) for part in parts]
        for number, (part, job) in enumerate(zip(parts, jobs, strict=True), 1):
            for index, value in zip(part, job.result(), strict=True):
                scores[index] = value
            print(f"{number} of {pieces}: {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
    part_file = args.output.with_suffix(".part")
    part_file.write_text(json.dumps({"scores": scores, "seconds": round(time.perf_counter() - start, 1)}))
    part_file.replace(args.output)
    return 0


def report(args: argparse.Namespace) -> int:
    from specquant.runtime import load, zeroshot

    found, pairs = read(args.requests)
    scores = json.loads(args.scores.read_text())["scores"]
    known = {
        (tuple(c), tuple(a)): (float(nll), bool(greedy)) for (c, a), (nll, greedy) in zip(pairs, scores, strict=True)
    }
    zeroshot.quieten()
    tasks = zeroshot.local_tasks(zeroshot.task_names(found["tasks"]), args.data_dir)
    answer = lambda asked: [known[tuple(c), tuple(a)] for c, a in asked]  # noqa: E731
    results = zeroshot.run_tasks(lm_of(load(found["tokenizer"]), answer), tasks, found["limit"])
    average = zeroshot.average(results)
    if args.json:
        print(json.dumps({"average": average, "tasks": {name: result.value for name, result in results.items()}}))
    else:
        for name, result in results.items():
            print(f"{name:16} {result.metric:9} {100 * result.value:6.2f}  {result.documents} documents")
        print(f"{'average':26} {100 * average:6.2f}")
    return 0


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(required=True, metavar="ask|score|report")
    first = verbs.add_parser("ask", help="write what lm-eval asks a model")
    first.add_argument("model", type=Path)
    first.add_argument("--data-dir", type=Path, required=True)
    first.add_argument("--tasks", help="some of the nine (default: all)")
    first.add_argument("--limit", type=int, help="only the first documents of each task")
    first.add_argument("-o", "--output", type=Path, required=True)
    first.set_defaults(run=ask)
    second = verbs.add_parser("score", help="answer with an artifact")
    second.add_argument("model", type=Path)
    second.add_argument("requests", type=Path)
    second.add_argument("-o", "--output", type=Path, required=True)
    second.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    second.add_argument("--processes", type=int, default=1)
    second.add_argument("--threads", type=int, default=2)
    second.set_defaults(run=score)
    third = verbs.add_parser("report", help="the tasks' metrics from the answers")
    third.add_argument("requests", type=Path)
    third.add_argument("scores", type=Path)
    third.add_argument("--data-dir", type=Path, required=True)
    third.add_argument("--json", action="store_true")
    third.set_defaults(run=report)
    args = parser.parse_args(argv)
    code: int = args.run(args)
    return code


if __name__ == "__main__":
    sys.exit(main())
