"""Times of the CUDA attention kernels against torch's scaled_dot_product_attention in float16, in one process.

A line is one call of --new tokens after --past cached ones in each of --batch rows. Ours is all of the op: rotary
positions, the Hadamard transform and packing of new rows, the cache written in place, attention; torch's is attention
alone, on keys and values in place, so `ratio` flatters torch. Both are replayed in turn from CUDA graphs that walk
through enough caches to miss the GPU's; times are medians. `bandwidth` is what ours reads of the cache, of --peak.

    python -m tools.bench_cuda_attention --past 1024 8192 --new 1
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.nn import functional

from specquant.custom_ops import library_cuda
from specquant.custom_ops.kv_rows import row_bytes
from specquant.custom_ops.library_cuda_attention import attention, attention_problem, attention_workspace
from tools.bench_cuda_kernels import CACHE, graph_of, kernel_times, medians


class Ours:
    """One call on random rows of a cache, packed (bits 4) or float16 (16)."""

    def __init__(self, past: int, new: int, bits: int, args: argparse.Namespace) -> None:
        d, options = args.head_dim, {"device": "cuda"}
        width, rows = (args.heads + 2 * args.kv_heads) * d, past + new
        shape = (args.batch, args.kv_heads, rows, d)
        self.qkv = torch.randn(args.batch, new, width, dtype=torch.float16, **options)
        if bits == 16:
            self.caches = [torch.randn(shape, dtype=torch.float16, **options) for _ in range(2)]
        else:
            packed = (*shape[:3], row_bytes(d))
            self.caches = [torch.randint(-128, 128, packed, dtype=torch.int8, **options) for _ in range(2)]
            for cache in self.caches:  # scale 1/16, low −1/2
                cache[..., -4:] = torch.tensor([0x00, 0x2C, 0x00, 0xB8 - 256], dtype=torch.int8, **options)
        self.lengths = torch.full((args.batch,), rows - 1, dtype=torch.int32, **options)
        self.positions = torch.arange(past, rows, **options).expand(args.batch, -1).contiguous()
        angles = torch.rand(rows, d // 2, **options)
        self.tables = angles.cos(), angles.sin()
        self.offset = None if bits == 16 else torch.randn(args.kv_heads, d, **options)
        self.y = torch.empty(args.batch, new, args.heads * d, dtype=torch.float16, **options)
        whole = {} if bits == 16 else {"hadamard": int(d & (d - 1) == 0)}
        self.problem = attention_problem(
            self.qkv, *self.caches, self.lengths, self.positions, *self.tables, self.offset, *self.caches, self.y,
            num_heads=args.heads, kv_num_heads=args.kv_heads, **whole,
        )  # fmt: skip
        size = attention_workspace(self.problem)
        self.space = torch.empty(max(1, size), dtype=torch.int8, **options)
        self.bytes = sum(cache.nbytes for cache in self.caches)

    def __call__(self) -> None:
        attention(self.problem, self.space, stream=torch.cuda.current_stream().cuda_stream)


def theirs(past: int, new: int, args: argparse.Namespace) -> Callable[[], Any]:
    """Attention of torch, on random queries, keys and values."""
    options: dict[str, Any] = {"device": "cuda", "dtype": torch.float16}
    q = torch.randn(args.batch, args.heads, new, args.head_dim, **options)
    k, v = (torch.randn(args.batch, args.kv_heads, past + new, args.head_dim, **options) for _ in range(2))
    grouped = args.heads != args.kv_heads
    if past == 0 or new == 1:
        return partial(functional.scaled_dot_product_attention, q, k, v, is_causal=new > 1, enable_gqa=grouped)
    mask = torch.ones(new, past + new, dtype=torch.bool, device="cuda").tril(past)
    return partial(functional.scaled_dot_product_attention, q, k, v, attn_mask=mask, enable_gqa=grouped)


def measure(past: int, new: int, args: argparse.Namespace) -> dict[str, Any]:
    """One line of the table."""
    calls: dict[str, list[Callable[[], Any]]] = {}
    moved = {}
    for bits in args.bits:
        first = Ours(past, new, bits, args)
        copies = min(int(CACHE // first.bytes) + 1, 16)
        calls[f"kv{bits}"] = [first, *(Ours(past, new, bits, args) for _ in range(copies - 1))]
        moved[f"kv{bits}"] = first.bytes
    size = 4 * args.batch * args.kv_heads * (past + new) * args.head_dim
    calls["torch"] = [theirs(past, new, args) for _ in range(min(int(CACHE // size) + 1, 16))]
    seconds = medians({name: (graph_of(list_), len(list_)) for name, list_ in calls.items()}, args.turns)
    line: dict[str, Any] = {"past": past, "new": new, "us": {name: value * 1e6 for name, value in seconds.items()}}
    line["ratio"] = {name: seconds["torch"] / seconds[name] for name in moved}
    line["bandwidth"] = {name: size / seconds[name] / args.peak for name, size in moved.items()}
    if args.kernels:
        line["kernels"] = {name: kernel_times(calls[name][0]) for name in moved}
    return line


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--past", nargs="+", type=int, default=[0, 1024, 4096, 16384])
    parser.add_argument("--new", nargs="+", type=int, default=[1, 2048])
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--bits", nargs="+", type=int, choices=[4, 16], default=[4, 16], help="of the cache")
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--peak", type=float, default=3.35e12, help="bytes per second; default: H100 SXM")
    parser.add_argument("--kernels", action="store_true", help="the time of every kernel, from torch's profiler")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    args = parser.parse_args()
    library_cuda.check_device()
    if not args.json:
        print(
            f"{torch.cuda.get_device_name()}, {args.batch} x {args.heads} heads on {args.kv_heads} of {args.head_dim}"
        )
        print(f"{'past':>6} {'new':>5} {'torch us':>9}" + "".join(f" {f'kv{b} us':>9}  ratio bytes" for b in args.bits))
    for past in args.past:
        for new in args.new:
            line = measure(past, new, args)
            if args.json:
                print(json.dumps(line), flush=True)
                continue
            text = f"{past:>6} {new:>5} {line['us']['torch']:>9.1f}"
            for name in (f"kv{bits}" for bits in args.bits):
                text += f" {line['us'][name]:>9.1f} {line['ratio'][name]:>6.2f} {line['bandwidth'][name]:>5.1%}"
            print(text, flush=True)
            for name, kernels in line.get("kernels", {}).items():
                for kernel, value in sorted(kernels.items()):
                    print(f"    {name:5} {kernel:34} {value:8.1f} us")


if __name__ == "__main__":
    main()
