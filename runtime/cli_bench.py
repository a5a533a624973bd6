"""`specquant bench`: how fast an exported model is on this machine."""

from __future__ import annotations

import argparse
import json
import time
from statistics import median
from typing import Any

from specquant.custom_ops.library_limits import Limits, measure_limits
from specquant.runtime.bench import Bench, Timing, Work, as_dict, bench, limits_dict, work
from specquant.runtime.cli_common import Progress, add_verbosity
from specquant.runtime.cli_inspect import aligned
from specquant.runtime.cli_options import add_load_options, load_model
from specquant.runtime.stats import machine_info, peak_memory, physical_cores

EPILOG = """examples:
  specquant bench build/smollm2
  specquant bench build/smollm2 -p 256 -n 32 -r 10 --threads 1 --json

pp512 is a prompt of 512 tokens, evaluated for its last token's logits; tg128 is 128 tokens, one by one from an empty
context, each the likeliest. Medians of -r runs, with the slowest and the fastest. TOPS counts the products of the
quantised linears, GB/s the weights (and KV cache) that a token has to read; the shares are of what this machine did in
a short test just afterwards: bytes multiplied in registers, and memory read by all threads.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "Time prefill, decode and the first token of an exported model, in the style of llama-bench."
    parser.epilog = EPILOG
    parser.add_argument("model", metavar="DIR", help="the folder that `specquant export` made")
    parser.add_argument("-p", "--n-prompt", type=int, default=512, metavar="N", help="default: %(default)s; 0: none")
    parser.add_argument("-n", "--n-gen", type=int, default=128, metavar="N", help="default: %(default)s; 0: none")
    parser.add_argument("-r", "--repetitions", type=int, default=5, metavar="N", help="default: %(default)s")
    add_load_options(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    add_verbosity(parser)


def run(args: argparse.Namespace) -> int:
    import onnxruntime  # noqa: F401 - its own import is no part of loading

    since = time.perf_counter()
    model = load_model(args)
    load_s = time.perf_counter() - since
    with Progress("bench", args.repetitions + 1, "rounds", args.quiet) as progress:
        result = bench(model, args.n_prompt, args.n_gen, args.repetitions, progress.update)
    memory = peak_memory()  # before the limits, whose buffer is larger than many a model
    threads = args.threads or physical_cores()
    needed = work(model.manifest, args.n_gen)
    limits = None if args.device == "cuda" else measure_limits(threads)  # they are the CPU's
    if args.json:
        size = sum(info.size for info in model.manifest.files.values())
        about = {"model": model.manifest.name, "model_bytes": size, "threads": threads, "load_s": load_s}
        measured = as_dict(result) | {"peak_memory_bytes": memory}
        if limits:
            measured |= {"limits": limits_dict(limits, result, needed)}
        print(json.dumps(about | measured | {"machine": machine_info()}, ensure_ascii=False))
        return 0
    print(f"{model.manifest.name}, " + (f"{threads} threads, {limits.isa}" if limits else args.device))
    print("\n".join(aligned(_rows(result, needed, limits))))
    print(f"first token of a prompt of {result.first_token.tokens}: {1e3 * median(result.first_token.seconds):.1f} ms")
    print(f"loaded in {load_s:.2f} s" + (f", peak memory {memory / 2**20:,.0f} MiB" if memory else ""))
    return 0


def _rows(result: Bench, needed: Work, limits: Limits | None) -> list[tuple[str, ...]]:
    header = ("test", "tokens/s", "slowest … fastest")
    if not limits:
        timings = [("pp", result.prefill), ("tg", result.decode)]
        return [header, *((f"{kind}{timing.tokens}", *_rates(timing)) for kind, timing in timings if timing)]
    found = limits_dict(limits, result, needed)
    rows: list[tuple[str, ...]] = [(*header, "reached", "of the machine's")]
    if result.prefill:
        reached = f"{found['prefill_tops']:.3f} TOPS", f"{limits.gops / 1e3:.2f} ({found['prefill_of_limit']:.0%})"
        rows.append((f"pp{result.prefill.tokens}", *_rates(result.prefill), *reached))
    if result.decode:
        reached = f"{found['decode_gbps']:.1f} GB/s", f"{limits.gbps:.1f} ({found['decode_of_limit']:.0%})"
        rows.append((f"tg{result.decode.tokens}", *_rates(result.decode), *reached))
    return rows


def _rates(timing: Timing) -> tuple[str, str]:
    found: dict[str, Any] = timing.as_dict()
    return f"{found['tokens_per_s']:,.1f}", f"{found['slowest']:,.1f} … {found['fastest']:,.1f}"
