"""Prefill of one Transformer block on a GPU: torch in float16, and our ops as exports have them (the paper's Table 2).

The four linears (q, k and v in one, output, gate and up in one, down) are float16 matrices or INT4 weights with a
branch of --rank columns. RMSNorm, SiLU, residuals, rotary embedding and attention (scaled_dot_product_attention, the
fastest torch has) are torch's in the first. In the second norms, the gate and residuals are within the products, and
attention is Int4KVAttention, which turns queries and keys and writes the 4-bit cache besides; with --attention torch it
is that of the first. Random weights and activations. Times are medians of replayed CUDA graphs, the two in turn. Memory
is what torch has allocated at most during one pass, weights, input, cache and workspaces included, each variant alone:
ours has one workspace, and takes MLP and attention in --parts, which cost less memory and more time.

    python -m tools.bench_block --models llama-2-7b --sequences 256 1024 --rank 16 32
"""

from __future__ import annotations

import argparse
import gc
import json
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from specquant.custom_ops import library_cuda, library_cuda_attention
from specquant.custom_ops.kv_rows import row_bytes
from specquant.custom_ops.schema import GATES, PROLOGUES
from tools.bench_cuda_kernels import Linear, graph_of, kernel_times, medians


class Shape(NamedTuple):
    """Sizes of a block: features, query heads, key and value heads, features of the MLP. Heads have 128 features."""

    hidden: int
    heads: int
    kv_heads: int
    inner: int


MODELS = {
    "llama-2-7b": Shape(4096, 32, 32, 11008),
    "llama-3-8b": Shape(4096, 32, 8, 14336),
    "llama-2-13b": Shape(5120, 40, 40, 13824),
    "llama-30b": Shape(6656, 52, 52, 17920),
}
HEAD = 128
EPSILON = 1e-5  # of RMSNorm
Multiply = Callable[[Tensor], Tensor]  # [T, N] -> [T, M]


def sizes(shape: Shape) -> list[tuple[int, int]]:
    """In- and out-features of q/k/v, output, gate/up and down."""
    width = shape.heads * HEAD
    return [
        (shape.hidden, width + 2 * shape.kv_heads * HEAD),
        (width, shape.hidden),
        (shape.hidden, 2 * shape.inner),
        (shape.inner, shape.hidden),
    ]


def half_linears(shape: Shape) -> list[Multiply]:
    """The four linears in float16."""

    def linear(n: int, m: int) -> Multiply:
        weight = torch.randn(m, n, device="cuda", dtype=torch.float16) * n**-0.5
        return lambda x: functional.linear(x, weight)

    return [linear(n, m) for n, m in sizes(shape)]


def turn(x: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Rotary embedding of x [B, S, heads, HEAD] in place, by cos and sin [S, 1, HEAD / 2]."""
    first, second = x.chunk(2, -1)
    crossed = first * sin
    first.mul_(cos).addcmul_(second, sin, value=-1)
    torch.addcmul(crossed, second, cos, out=second)


def torch_attention(qkv: Tensor, shape: Shape, batch: int, tables: tuple[Tensor, Tensor]) -> Tensor:
    """Mixed values [T, heads · HEAD] of [T, (heads + 2 · kv_heads) · HEAD], whose queries and keys are turned."""
    heads = [shape.heads, shape.kv_heads, shape.kv_heads]
    rows = qkv.view(batch, -1, sum(heads), HEAD)
    turn(rows[:, :, : -shape.kv_heads], *tables)
    q, k, v = rows.transpose(1, 2).split(heads, 1)
    grouped = shape.heads != shape.kv_heads
    mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
    return mixed.transpose(1, 2).reshape(qkv.shape[0], -1)


def rotary_tables(sequence: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin [S, 1, HEAD / 2]."""
    turns = torch.arange(0, HEAD, 2, device=like.device) / HEAD
    angles = torch.outer(torch.arange(sequence, device=like.device), 10000.0**-turns)[:, None]
    return angles.cos().to(like.dtype), angles.sin().to(like.dtype)


class HalfBlock:
    """One block of Llama by torch: y = block(x), both [B, S, hidden]; `like` has the device and dtype of x."""

    def __init__(self, shape: Shape, linears: list[Multiply], sequence: int, like: Tensor) -> None:
        self.shape, (self.qkv, self.output, self.gate_up, self.down) = shape, linears
        self.norms = [like.new_ones(shape.hidden) for _ in range(2)]
        self.tables = rotary_tables(sequence, like)

    def __call__(self, x: Tensor) -> Tensor:
        hidden = x.shape[-1]
        rows = functional.rms_norm(x, (hidden,), self.norms[0], EPSILON).view(-1, hidden)
        mixed = torch_attention(self.qkv(rows), self.shape, x.shape[0], self.tables)
        x = x + self.output(mixed).view_as(x)
        rows = functional.rms_norm(x, (hidden,), self.norms[1], EPSILON).view(-1, hidden)
        gate, up = self.gate_up(rows).chunk(2, -1)
        return x + self.down(functional.silu(gate) * up).view_as(x)


class OurAttention:
    """Int4KVAttention of a prompt of `batch` rows from an empty cache, which it fills in place."""

    def __init__(self, shape: Shape, batch: int, sequence: int) -> None:
        options: dict[str, Any] = {"device": "cuda"}
        cache = (batch, shape.kv_heads, sequence, row_bytes(HEAD))
        self.caches = [torch.zeros(cache, dtype=torch.int8, **options) for _ in range(2)]
        self.lengths = torch.full((batch,), sequence - 1, dtype=torch.int32, **options)
        self.positions = torch.arange(sequence, **options).expand(batch, -1).contiguous()
        cos, sin = rotary_tables(sequence, torch.empty(0, **options))
        self.tables = cos[:, 0].contiguous(), sin[:, 0].contiguous()
        self.offset = torch.zeros(shape.kv_heads, HEAD, **options)
        self.heads = {"num_heads": shape.heads, "kv_num_heads": shape.kv_heads, "hadamard": 1}

    def problem(self, qkv: Tensor, y: Tensor) -> library_cuda.Attention:
        """The call for qkv [T, (heads + 2 · kv_heads) · HEAD] and y [T, heads · HEAD]."""
        qkv, y = (rows.view(*self.positions.shape, -1) for rows in (qkv, y))
        return library_cuda_attention.attention_problem(
            qkv, *self.caches, self.lengths, self.positions, *self.tables, self.offset, *self.caches, y, **self.heads
        )


class OurBlock:
    """The same in five ops: norms, gate and residuals are inputs of the linears. args: what Linear takes, batch, parts
    and attention."""

    def __init__(self, shape: Shape, args: argparse.Namespace, sequence: int, like: Tensor) -> None:
        self.shape, self.parts = shape, args.parts or (2 if sequence <= 512 else 1)
        self.qkv, self.output, self.gate_up, self.down = (Linear(n, m, args).operands for n, m in sizes(shape))
        for operands, (n, _) in zip((self.qkv, self.output, self.gate_up, self.down), sizes(shape), strict=True):
            operands["scales"] *= n**-0.5 / 0.07  # outputs of about the inputs' size
        norm = {"prologue": PROLOGUES.index("rms_norm"), "epsilon": EPSILON}
        for operands in (self.qkv, self.gate_up):
            operands |= norm | {"norm": torch.ones(shape.hidden, device="cuda")}
        self.gate_up["gate"] = GATES.index("silu")
        own, rows = args.attention == "ours", -(-args.batch // self.parts)
        counts = [min(rows, args.batch - first) for first in range(0, args.batch, rows)]
        self.attentions = [OurAttention(shape, count, sequence) for count in counts] if own else []
        self.tables = rotary_tables(sequence, like) if not own else None
        self.workspace: Tensor | None = None  # as large as the largest that was needed

    def space(self, size: int) -> Tensor:
        if self.workspace is None or len(self.workspace) < size:
            self.workspace = None
            self.workspace = torch.empty(size, device="cuda", dtype=torch.int8)
        return self.workspace

    def multiply(self, operands: dict[str, Any], x: Tensor, y: Tensor | None = None, **more: Tensor) -> Tensor:
        if y is None:
            y = x.new_empty(x.shape[0], operands["scales"].shape[0] // (2 if operands.get("gate") else 1))
        space = self.space(library_cuda.layout(x, **operands, **more).bytes)
        stream = torch.cuda.current_stream().cuda_stream
        library_cuda.matmul(x, y, space, stream=stream, **operands, **more)
        return y

    def attend(self, x: Tensor, batch: int) -> Tensor:
        """Attention of x [T, hidden], part by part where it is ours: each has its own queries, keys and values."""
        if self.tables is not None:
            return torch_attention(self.multiply(self.qkv, x), self.shape, batch, self.tables)
        y = x.new_empty(x.shape[0], self.shape.heads * HEAD)
        sizes = [attention.positions.numel() for attention in self.attentions]
        for attention, rows, to in zip(self.attentions, x.split(sizes), y.split(sizes), strict=True):
            qkv = self.multiply(self.qkv, rows)
            problem = attention.problem(qkv, to)
            space = self.space(library_cuda_attention.attention_workspace(problem))
            library_cuda_attention.attention(problem, space, stream=torch.cuda.current_stream().cuda_stream)
            del qkv  # before the next part's
        return y

    def __call__(self, x: Tensor) -> Tensor:
        rows = x.view(-1, x.shape[-1])
        mixed = self.attend(rows, x.shape[0])
        y = self.multiply(self.output, mixed, residual=rows)
        del mixed
        for part in y.chunk(self.parts):
            self.multiply(self.down, self.multiply(self.gate_up, part), part, residual=part)
        return y.view_as(x)


Block = HalfBlock | OurBlock


def peak_memory(make: Callable[[], Block], x: Tensor) -> int:
    """Bytes that torch has allocated at most, from making the block's weights to the end of one pass, x included."""
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated() - x.nbytes
    block = make()
    block(x)  # ours finds the size of its workspace
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    block(x)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def measure(model: str, sequence: int, ranks: list[int], args: argparse.Namespace) -> list[dict[str, Any]]:
    """A line for each rank: seconds and bytes of both."""
    shape, lines = MODELS[model], []
    x = torch.randn(args.batch, sequence, shape.hidden, device="cuda", dtype=torch.float16)
    x[..., :: shape.hidden // 16] *= 20  # a few large features, as models have
    for rank in ranks:
        options = argparse.Namespace(**vars(args) | {"rank": rank})
        makers: dict[str, Callable[[], Block]] = {
            "fp16": lambda: HalfBlock(shape, half_linears(shape), sequence, x),
            "ours": lambda options=options: OurBlock(shape, options, sequence, x),  # type: ignore[misc]
        }
        memory = {name: peak_memory(make, x) for name, make in makers.items()}
        blocks = {name: make() for name, make in makers.items()}
        for name, block in blocks.items():
            if not torch.isfinite(block(x)).all():
                raise SystemExit(f"{model}, {name}: the output is not finite")
        graphs = {name: (graph_of([lambda block=block: block(x)]), 1) for name, block in blocks.items()}  # type: ignore[misc]
        seconds = medians(graphs, args.turns)
        line: dict[str, Any] = {"model": model, "sequence": sequence, "rank": rank, "seconds": seconds, "bytes": memory}
        if args.kernels:
            line["kernels"] = {name: kernel_times(lambda block=block: block(x)) for name, block in blocks.items()}  # type: ignore[misc]
        lines.append(line)
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--sequences", nargs="+", type=int, default=[256, 1024, 4096, 8192])
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rank", nargs="+", type=int, default=[16, 32], help="columns of the branch")
    parser.add_argument("--act-bits", type=int, default=4, help="2 to 8, or 16")
    parser.add_argument("--group-size", type=int, default=0, help="features per weight scale; 0: per channel")
    parser.add_argument("--act-group", type=int, default=0, help="features per activation scale; 0: per token")
    parser.add_argument("--hadamard", type=int, default=0)
    parser.add_argument("--parts", type=int, help="in which ours takes the tokens (default: 2 up to 512, else 1)")
    parser.add_argument("--attention", choices=["ours", "torch"], default="ours", help="of our block")
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--kernels", action="store_true", help="the time of every kernel")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    args = parser.parse_args()
    library_cuda.check_device()
    if not args.json:
        groups = f"groups of {args.group_size} and {args.act_group}"
        print(f"{torch.cuda.get_device_name()}, batch {args.batch}, W4A{args.act_bits}, {groups} (0: all)")
        names = f"{'model':>12} {'seq':>5} {'rank':>4} {'fp16 ms':>8} {'ours ms':>8}"
        print(f"{names} {'ratio':>6} {'fp16 GiB':>8} {'ours GiB':>8} {'ratio':>6}")
    for model in args.models:
        for sequence in args.sequences:
            for line in measure(model, sequence, args.rank, args):
                if args.json:
                    print(json.dumps(line), flush=True)
                    continue
                half, ours = (line["seconds"][name] * 1e3 for name in ("fp16", "ours"))
                text = f"{model:>12} {sequence:>5} {line['rank']:>4} {half:>8.3f} {ours:>8.3f} {half / ours:>6.2f}"
                half, ours = (line["bytes"][name] / 2**30 for name in ("fp16", "ours"))
                print(f"{text} {half:>8.2f} {ours:>8.2f} {half / ours:>6.2f}", flush=True)
                for name, kernels in line.get("kernels", {}).items():
                    for kernel, value in sorted(kernels.items()):
                        print(f"{name:>18} {value:>9.1f}  {kernel}")


if __name__ == "__main__":
    main()
