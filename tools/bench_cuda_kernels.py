"""Times of the CUDA matmul kernels against torch's float16 matmul, in one process, on random weights and activations.

Each line is one linear of N in-features and M out-features at T tokens. The two are replayed in turn from CUDA graphs
that walk through enough copies of the weights to miss the cache; a time is the median of the turns. Fractions are of
--peak int8 operations and --bandwidth bytes per second: the first counts 2·T·N·M operations, the second the packed
weights, x and y. `branch` is how much longer a call takes with the branch than without.
--kernels adds the time of every kernel, from torch's profiler.

    python tools/bench_cuda_kernels.py --tokens 1 4096 --shapes 4096x14336 --rank 32
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from specquant.custom_ops import library_cuda

SHAPES = ["4096x4096", "4096x14336", "14336x4096"]
TOKENS = [1, 8, 16, 32, 64, 256, 1024, 4096, 8192]
CACHE = 100e6  # bytes of weights that one graph walks through at least: twice the cache of an H100. Of few tokens it
# has 16 calls, since starting a graph takes some microseconds


class Linear:
    """Random INT4 weights with a branch, in torch tensors on the GPU, and what a call needs."""

    def __init__(self, n: int, m: int, args: argparse.Namespace) -> None:
        groups = n // (args.group_size or n)
        options: dict[str, Any] = {"device": "cuda"}
        packed = torch.randint(-128, 128, (m // 16, n // 8, 64), dtype=torch.int8, **options)
        self.operands: dict[str, Any] = {
            "qweight": packed,
            "group_scales": torch.randint(
                -128 if groups > 1 else 0, 128 if groups > 1 else 1, (m // 16, groups, 8), dtype=torch.int8, **options
            ),
            "scales": ((0.01 + 0.01 * torch.rand(m, **options)) / (8 if groups > 1 else 1)).half(),
            "bias": torch.randn(m, **options),
            "group_size": args.group_size,
            "act_group": args.act_group,
            "act_bits": args.act_bits,
            "hadamard": args.hadamard,
        }
        if args.rank:
            self.operands["basis"] = (torch.randn(n, args.rank, **options) / n**0.5).half()
            self.operands["coef"] = torch.randn(args.rank, m, **options).half()
            self.operands["subtract"] = 1
        self.bytes = packed.numel() + self.operands["group_scales"].numel() + 2 * m

    def call(self, arrays: tuple[torch.Tensor, ...], path: str | None, branch: bool = True) -> None:
        """Starts one matmul; arrays: x, y and the workspace."""
        operands = self.operands
        if not branch:
            operands = {k: v for k, v in operands.items() if k not in ("basis", "coef", "subtract")}
        stream = torch.cuda.current_stream().cuda_stream
        library_cuda.matmul(*arrays, stream=stream, path=path, **operands)


def graph_of(calls: list[Callable[[], Any]]) -> torch.cuda.CUDAGraph:
    """The calls, one after another, as one graph; they have run once before."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph


def medians(graphs: dict[str, tuple[torch.cuda.CUDAGraph, int]], turns: int) -> dict[str, float]:
    """Seconds of one call of each graph: (graph, calls in it), in turn, `turns` times after one that does not count."""
    times: dict[str, list[float]] = {name: [] for name in graphs}
    for turn in range(turns + 1):
        for name, (graph, calls) in graphs.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            if turn:
                times[name].append(start.elapsed_time(end) / 1e3 / calls)
    return {name: statistics.median(values) for name, values in times.items()}


def kernel_times(call: Callable[[], None], repeats: int = 5) -> dict[str, float]:
    """Microseconds of each kernel of one call, by name."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(repeats):
            call()
        torch.cuda.synchronize()
    times: dict[str, float] = {}
    for event in profile.key_averages():
        name = event.key.replace("(anonymous namespace)::", "").replace("void ", "").replace("specquant_cuda::", "")
        if event.device_time_total:
            name = name.split("(")[0].split("<")[0]
            times[name] = times.get(name, 0.0) + event.device_time_total / repeats
    return times


def measure(n: int, m: int, tokens: int, args: argparse.Namespace) -> dict[str, Any]:
    """One line of the table."""
    one = Linear(n, m, args)
    copies = 16 if tokens <= 64 else min(int(CACHE // one.bytes) + 1, 2)
    linears = [one, *(Linear(n, m, args) for _ in range(copies - 1))]
    copies = 16 if tokens <= 64 else int(CACHE // (2 * n * m)) + 1
    halves = [torch.randn(m, n, device="cuda", dtype=torch.float16) for _ in range(copies)]
    x = torch.randn(tokens, n, device="cuda", dtype=torch.float16)
    x[:, :: n // 16] *= 20  # a few large features, as models have
    y = torch.empty(tokens, m, device="cuda", dtype=torch.float16)
    space = torch.empty(library_cuda.layout(x, **one.operands).bytes, device="cuda", dtype=torch.int8)
    arrays, path = (x, y, space), args.path
    calls: dict[str, list[Callable[[], Any]]] = {
        "ours": [partial(linear.call, arrays, path) for linear in linears],
        "fp16": [partial(torch.nn.functional.linear, x, half) for half in halves],
    }
    if args.rank:
        calls["plain"] = [partial(linear.call, arrays, path, False) for linear in linears]
    graphs = {name: (graph_of(list_), len(list_)) for name, list_ in calls.items()}
    seconds = medians(graphs, args.turns)
    line: dict[str, Any] = {"n": n, "m": m, "tokens": tokens, "us": {k: v * 1e6 for k, v in seconds.items()}}
    line["ratio"] = seconds["fp16"] / seconds["ours"]
    line["peak"] = 2 * tokens * n * m / seconds["ours"] / args.peak
    line["bandwidth"] = (one.bytes + 2 * tokens * (n + m)) / seconds["ours"] / args.bandwidth
    if args.rank:
        line["branch"] = seconds["ours"] / seconds["plain"] - 1
    if args.kernels:
        line["kernels"] = kernel_times(calls["ours"][0])
    return line


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=SHAPES, metavar="NxM", help="in-features x out-features")
    parser.add_argument("--tokens", nargs="+", type=int, default=TOKENS)
    parser.add_argument("--rank", type=int, default=32, help="columns of the branch; 0: none")
    parser.add_argument("--act-bits", type=int, default=4, help="2 to 8, or 16")
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--act-group", type=int, default=64)
    parser.add_argument("--hadamard", type=int, default=0)
    parser.add_argument("--path", choices=library_cuda.PATHS, help="second stage; default: the library's choice")
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--peak", type=float, default=1979e12, help="int8 operations per second; default: H100 SXM")
    parser.add_argument("--bandwidth", type=float, default=3.35e12, help="bytes per second; default: H100 SXM")
    parser.add_argument("--kernels", action="store_true", help="the time of every kernel")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    args = parser.parse_args()
    library_cuda.check_device()
    torch.manual_seed(torch.seed())
    if not args.json:
        groups = f"groups of {args.group_size} and {args.act_group}"
        print(f"{torch.cuda.get_device_name()}, W4A{args.act_bits}, {groups} (0: all), rank {args.rank}")
        print(f"{'N x M':>12} {'T':>5} {'ours us':>9} {'fp16 us':>9} {'ratio':>6} {'peak':>6} {'bytes':>6}  branch")
    for shape in args.shapes:
        n, m = (int(part) for part in shape.split("x"))
        for tokens in args.tokens:
            line = measure(n, m, tokens, args)
            if args.json:
                print(json.dumps(line), flush=True)
                continue
            us = line["us"]
            text = f"{shape:>12} {tokens:>5} {us['ours']:>9.1f} {us['fp16']:>9.1f} {line['ratio']:>6.2f}"
            branch = f"{line['branch']:>7.1%}" if args.rank else ""
            print(f"{text} {line['peak']:>6.1%} {line['bandwidth']:>6.1%} {branch}", flush=True)
            for name, value in sorted(line.get("kernels", {}).items()):
                print(f"{'':>18} {value:>9.1f}  {name}")


if __name__ == "__main__":
    main()
