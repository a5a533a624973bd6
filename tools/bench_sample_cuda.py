"""Times of sampling on the GPU (custom_ops/kernels/cuda/sample.cu), beside torch's own operations, in one process.

A line is one call: a token id for each of --rows rows of random logits, and what the next step is given. Ours and
torch's are replayed in turn from CUDA graphs, and times are medians. torch's greedy is argmax; else it takes softmax,
of all or of topk, and draws by exponential noise, in float32.

    python -m tools.bench_sample_cuda --vocab 49152 128256 --rows 1 8
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from specquant.custom_ops import library_cuda
from specquant.custom_ops.library_cuda_sample import sample, sample_problem, sample_workspace
from tools.bench_cuda_kernels import graph_of, kernel_times, medians

CALLS = 20  # in a graph
SAMPLINGS = ((0.0, 0), (0.8, 0), (0.8, 40))  # temperature, top_k


class Ours:
    """One call on given logits [rows, vocab], with all that a step of decoding hands it."""

    def __init__(self, logits: torch.Tensor, temperature: float, top_k: int) -> None:
        rows = logits.shape[0]
        whole = {"dtype": torch.int64, "device": "cuda"}
        self.arrays = logits, torch.zeros(rows, **whole), torch.zeros(rows, **whole)
        self.step = {
            "uniforms": torch.rand(rows, dtype=torch.float64, device="cuda"),
            "position_ids": torch.zeros(rows, **whole),
            "attention_mask": torch.zeros(rows, 4096, **whole),
        }
        self.problem = sample_problem(*self.arrays, **self.step, temperature=temperature, top_k=top_k)
        self.space = torch.zeros(sample_workspace(self.problem), dtype=torch.int8, device="cuda")

    def __call__(self) -> None:
        sample(self.problem, self.space, stream=torch.cuda.current_stream().cuda_stream)


def theirs(logits: torch.Tensor, temperature: float, top_k: int) -> torch.Tensor:
    """A token of each row."""
    if temperature == 0:
        return logits.argmax(-1)
    scaled = logits.float() / temperature
    if top_k == 0:
        weights = scaled.softmax(-1)
        return (weights / torch.empty_like(weights).exponential_()).argmax(-1)  # multinomial, as it can be captured
    values, words = scaled.topk(top_k)
    weights = values.softmax(-1)
    return words.gather(-1, (weights / torch.empty_like(weights).exponential_()).argmax(-1, keepdim=True))


def measure(vocab: int, rows: int, dtype: torch.dtype, args: argparse.Namespace) -> list[dict[str, Any]]:
    """A line for each way of sampling."""
    logits = (torch.randn(rows, vocab, device="cuda") * 3).to(dtype)
    lines = []
    for temperature, top_k in SAMPLINGS:
        calls: dict[str, Callable[[], Any]] = {
            "ours": Ours(logits, temperature, top_k),
            "torch": partial(theirs, logits, temperature, top_k),
        }
        seconds = medians({name: (graph_of([call] * CALLS), CALLS) for name, call in calls.items()}, args.turns)
        line: dict[str, Any] = {"vocab": vocab, "rows": rows, "type": str(dtype).removeprefix("torch.")}
        line |= {"temperature": temperature, "top_k": top_k, "us": {k: v * 1e6 for k, v in seconds.items()}}
        if args.kernels:
            line["kernels"] = kernel_times(calls["ours"])
        lines.append(line)
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocab", nargs="+", type=int, default=[49152, 128256])
    parser.add_argument("--rows", nargs="+", type=int, default=[1])
    parser.add_argument("--types", nargs="+", default=["float16", "float32"], choices=["float16", "float32"])
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--kernels", action="store_true", help="the time of every kernel, from torch's profiler")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    args = parser.parse_args()
    library_cuda.check_device()
    if not args.json:
        print(torch.cuda.get_device_name())
        print(f"{'vocab':>7} {'rows':>4} {'type':8} {'temp':>4} {'top_k':>5} {'ours us':>8} {'torch us':>8}")
    for vocab in args.vocab:
        for rows in args.rows:
            for name in args.types:
                for line in measure(vocab, rows, getattr(torch, name), args):
                    if args.json:
                        print(json.dumps(line), flush=True)
                        continue
                    ours, other = line["us"]["ours"], line["us"]["torch"]
                    text = f"{vocab:>7} {rows:>4} {name:8} {line['temperature']:>4} {line['top_k']:>5}"
                    print(f"{text} {ours:8.1f} {other:8.1f}", flush=True)
                    for kernel, value in sorted(line.get("kernels", {}).items()):
                        print(f"    {kernel:34} {value:8.1f} us")


if __name__ == "__main__":
    main()
