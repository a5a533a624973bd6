"""Attention over a KV cache: our HalfKVAttention against ONNX Runtime's GroupQueryAttention, in one process, in turns.

    python tools/bench_attention.py                                   # SmolLM2's sizes and Llama 3 8B's
    python tools/bench_attention.py --heads 9x3x64 --calls 512+0 --threads 1

A call is NEW+PAST tokens; heads are QUERYxKEYVALUExDIM. Each has its cache where a runtime has it, past and present in
one buffer: of float16 for us, of float32 for the peer. Medians, and the best, of runs that take turns. GFLOP/s counts
4 · head_dim operations for every pair of a query and a token that it sees, and comes with its share of what the cores
reach when they do nothing but multiply and add (tools/machine_limits.cc). `ratio` above 1: we are faster. Where other
jobs run, `--threads 1 --cpu-time` counts only the time that the thread had a core.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from statistics import median
from time import perf_counter, thread_time
from typing import Any

import numpy as np
import onnx
from bench_kernels import machine_limits
from onnx import TensorProto, helper
from ort_bench import Run, in_place, in_turns, open_session

from specquant.custom_ops import library
from specquant.custom_ops.errors import SpecQuantError
from specquant.custom_ops.schema import DOMAIN, VERSION

OURS, PEER = "HalfKVAttention", "GroupQueryAttention"
HEADS, CALLS = "9x3x64,32x8x128", "512+0,128+384,1+512,1+4096"
Sizes = tuple[int, int, int]


def model(op: str, heads: Sizes) -> onnx.ModelProto:
    """One node; batch 1, other lengths dynamic."""
    query, kv, d = heads
    cache = TensorProto.FLOAT16 if op == OURS else TensorProto.FLOAT
    past, present = ["past_key", "past_value"], ["present_key", "present_value"]
    lengths, tables = ["seqlens_k", "total_sequence_length"], ["cos", "sin"]
    attributes: dict[str, Any] = {"num_heads": query, "kv_num_heads": kv, "scale": d**-0.5}
    if op == OURS:
        inputs = ["qkv", *past, *lengths, "position_ids", *tables]
        node = helper.make_node(op, inputs, ["y", *present], domain=DOMAIN, **attributes)
    else:
        inputs = ["qkv", "", "", *past, *lengths, *tables, "position_ids"]
        node = helper.make_node(op, inputs, ["y", *present], domain="com.microsoft", do_rotary=1, **attributes)
    value = helper.make_tensor_value_info
    return helper.make_model(
        helper.make_graph(
            [node],
            "attention",
            [
                value("qkv", TensorProto.FLOAT, [1, "s", (query + 2 * kv) * d]),
                *(value(name, cache, [1, kv, "p", d]) for name in past),
                value("seqlens_k", TensorProto.INT32, [1]),
                value("total_sequence_length", TensorProto.INT32, []),
                value("position_ids", TensorProto.INT64, [1, "s"]),
                *(value(name, TensorProto.FLOAT, ["c", d // 2]) for name in tables),
            ],
            [value("y", TensorProto.FLOAT, [1, "s", query * d]), *(value(name, cache, None) for name in present)],
        ),
        opset_imports=[helper.make_opsetid(*pair) for pair in (("", 21), ("com.microsoft", 1), (DOMAIN, VERSION))],
        ir_version=10,
    )


def runner(op: str, heads: Sizes, new: int, past: int, threads: int) -> Run:
    """A call that runs `op` in place and returns y. All ops get the same numbers."""
    query, kv, d = heads
    register = library.register if op == OURS else None
    session = open_session(model(op, heads).SerializeToString(), threads, register)
    rng, total = np.random.default_rng(0), past + new
    angles = rng.uniform(0, 6.3, (total, d // 2))
    feeds = {
        "qkv": rng.standard_normal((1, new, (query + 2 * kv) * d)).astype(np.float32),
        "seqlens_k": np.array([total - 1], np.int32),
        "total_sequence_length": np.array(total, np.int32),
        "position_ids": np.arange(past, total)[None],
        "cos": np.cos(angles).astype(np.float32),
        "sin": np.sin(angles).astype(np.float32),
    }
    caches = [rng.standard_normal((1, kv, total, d)).astype(np.float16) for _ in range(2)]
    if op != OURS:
        caches = [cache.astype(np.float32) for cache in caches]
    y = np.empty((1, new, query * d), np.float32)
    present = {"present_key": caches[0], "present_value": caches[1]}
    return in_place(session, feeds | {"past_key": caches[0], "past_value": caches[1]}, {"y": y} | present)


def measure(heads: Sizes, new: int, past: int, options: argparse.Namespace) -> dict[str, Any]:
    """Milliseconds and GFLOP/s of both, and the ratio of the medians. Raises SpecQuantError if they disagree."""
    runs = {op: runner(op, heads, new, past, options.threads) for op in (OURS, PEER)}
    first = [run().copy() for run in runs.values()]
    error = float(np.abs(first[0] - first[1]).max() / np.abs(first[1]).max())
    if not error < 2e-2:
        raise SpecQuantError(f"{OURS} is {error:.3f} away from {PEER}: they compute different things")
    times = in_turns(runs, options.seconds, thread_time if options.cpu_time else perf_counter)
    flops = 4 * heads[2] * heads[0] * sum(range(past + 1, past + new + 1))
    found: dict[str, Any] = {
        op: {"median_ms": 1e3 * median(list_), "best_ms": 1e3 * min(list_), "gflops": 1e-9 * flops / median(list_)}
        for op, list_ in times.items()
    }
    ratio = found[PEER]["median_ms"] / found[OURS]["median_ms"]
    return {"heads": list(heads), "new": new, "past": past, "runs": len(times[PEER]), "ratio": ratio, **found}


def numbers(separator: str, count: int) -> Callable[[str], list[tuple[int, ...]]]:
    def parse(text: str) -> list[tuple[int, ...]]:
        items = [tuple(int(n) for n in item.split(separator)) for item in text.split(",")]
        if any(len(item) != count for item in items):
            raise argparse.ArgumentTypeError(f"write {count} numbers with {separator} between them")
        return items

    return parse


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--heads", type=numbers("x", 3), default=HEADS, metavar="HxKxD", help="default: %(default)s")
    parser.add_argument("--calls", type=numbers("+", 2), default=CALLS, metavar="NEW+PAST", help="default: %(default)s")
    parser.add_argument("--threads", type=int, default=1, help="default: %(default)s")
    parser.add_argument("--seconds", type=float, default=2.0, help="for a line (default: %(default)s)")
    parser.add_argument("--cpu-time", action="store_true", help="time on the core, not by the clock")
    parser.add_argument("--no-limits", action="store_true", help="leave out what the cores can do (needs c++)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    try:
        limit = None if options.no_limits else machine_limits(options.threads).get("gflops")
        results = []
        for heads in options.heads:
            for new, past in options.calls:
                r = measure(heads, new, past, options)
                results.append(r)
                if options.json:
                    continue
                text = f"{'x'.join(map(str, heads)):>9} {new:4} new after {past:4}"
                for op in (OURS, PEER):
                    share = f" {r[op]['gflops'] / limit:4.0%}" if limit else ""
                    text += f" | {op} {r[op]['median_ms']:.3f} (best {r[op]['best_ms']:.3f}) ms"
                    text += f" {r[op]['gflops']:.1f} GFLOP/s{share}"
                print(f"{text} | {r['ratio']:.2f}x", flush=True)
    except SpecQuantError as error:
        print(f"bench_attention: {error}", file=sys.stderr)
        return 1
    if options.json:
        print(json.dumps({"threads": options.threads, "gflops": limit, "results": results}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
