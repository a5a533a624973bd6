"""Decoding with a whole Llama-shaped model on a GPU: torch in float16, and our ops, both one CUDA graph a token.

Random weights of every layer of --model, a head over --vocabulary words, one token after --past cached ones. Ours is
the graph that an export holds, 5 calls a layer: norms, gates and residuals inside the products, INT4 weights with a
branch of --rank columns, a packed KV cache; the head has 8-bit weights (two planes of 4) and activations. Torch's has
float16 weights, its scaled_dot_product_attention, and its kernels for all else. Both read every weight once, so that
nothing stays in the GPU's cache; times are medians of replays in turn. `bytes` is what ours reads, of --peak.

    python -m tools.bench_decode_cuda --model llama-3-8b --past 1024 8192
"""

from __future__ import annotations

import argparse
import json
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from specquant.custom_ops import library_cuda
from tools.bench_block import EPSILON, HEAD, MODELS, Shape, half_linears, sizes, turn
from tools.bench_cuda_attention import Ours as Attention
from tools.bench_cuda_kernels import Linear, graph_of, kernel_times, medians

LAYERS = {"llama-2-7b": 32, "llama-3-8b": 32, "llama-2-13b": 40, "llama-30b": 60}
NORMED = {"prologue": 1, "epsilon": EPSILON}  # rms_norm (docs/ops.md)
FUSED = [NORMED, {}, NORMED | {"gate": 1}, {}]  # of q/k/v, output, gate/up with silu, and down


class Product:
    """y = product(x) of one token by our kernels, with what its node has fused in."""

    def __init__(
        self, n: int, m: int, args: argparse.Namespace, fused: dict[str, Any], residual: Tensor | None
    ) -> None:
        self.linear = Linear(n, m, args)
        operands = self.linear.operands
        operands["scales"] *= n**-0.5 / 0.07  # outputs of about the inputs' size
        operands |= fused
        if "prologue" in fused:
            operands["norm"] = torch.ones(n, device="cuda")
        if residual is not None:
            operands["residual"] = residual
        self.y = torch.empty(1, m // 2 if "gate" in fused else m, device="cuda", dtype=torch.float16)
        self.space: Tensor | None = None

    @property
    def bytes(self) -> int:
        return self.linear.bytes + sum(
            self.linear.operands[k].nbytes for k in ("basis", "coef") if k in self.linear.operands
        )

    def __call__(self, x: Tensor) -> Tensor:
        if self.space is None:
            self.space = torch.empty(
                library_cuda.layout(x, **self.linear.operands).bytes, device="cuda", dtype=torch.int8
            )
        self.linear.call((x, self.y, self.space), None)
        return self.y


class Ours:
    """One step by our ops; `run` is the whole of it."""

    def __init__(self, shape: Shape, layers: int, past: int, args: argparse.Namespace) -> None:
        self.x = torch.randn(1, shape.hidden, device="cuda", dtype=torch.float16)
        options = argparse.Namespace(**vars(args))
        options.batch, options.heads, options.kv_heads, options.head_dim = 1, shape.heads, shape.kv_heads, HEAD
        self.layers: list[tuple[list[Product], Attention]] = []
        stream = self.x
        for _ in range(layers):
            products: list[Product] = []
            for i, (n, m) in enumerate(sizes(shape)):
                products.append(Product(n, m, args, FUSED[i], stream if i % 2 else None))
                if i % 2:
                    stream = products[-1].y
            self.layers.append((products, Attention(past, 1, args.cache_bits, options)))
        # 8-bit weights are two planes of 4 bits, on the same activations twice.
        head = argparse.Namespace(**vars(args) | {"act_bits": 8, "rank": 0, "hadamard": 0})
        self.head = Product(2 * shape.hidden, args.vocabulary, head, NORMED, None)
        self.bytes = self.head.bytes
        for products, attention in self.layers:
            attention.problem.qkv = products[0].y.data_ptr()  # where the product before it writes
            self.bytes += attention.bytes + sum(product.bytes for product in products)

    def run(self) -> Tensor:
        x = self.x
        for (qkv, output, gate_up, down), attention in self.layers:
            qkv(x)
            attention()
            x = down(gate_up(output(attention.y.view(1, -1))))
        return self.head(torch.cat((x, x), 1))


class Theirs:
    """One step by torch in float16."""

    def __init__(self, shape: Shape, layers: int, past: int, args: argparse.Namespace) -> None:
        options: dict[str, Any] = {"device": "cuda", "dtype": torch.float16}
        self.shape, self.past = shape, past
        self.x = torch.randn(1, shape.hidden, **options)
        self.layers = [half_linears(shape) for _ in range(layers)]
        cache = (layers, 2, 1, shape.kv_heads, past + 1, HEAD)
        self.cache = torch.randn(cache, **options)
        self.norm = torch.ones(shape.hidden, **options)
        self.cos, self.sin = (torch.rand(1, 1, HEAD // 2, **options) for _ in range(2))
        self.head = torch.randn(args.vocabulary, shape.hidden, **options) * shape.hidden**-0.5

    def run(self) -> Tensor:
        x, shape = self.x, self.shape
        heads = [shape.heads, shape.kv_heads, shape.kv_heads]
        grouped = shape.heads != shape.kv_heads
        for (qkv, output, gate_up, down), (keys, values) in zip(self.layers, self.cache, strict=True):
            rows = functional.rms_norm(x, (shape.hidden,), self.norm, EPSILON)
            turned = qkv(rows).view(1, 1, sum(heads), HEAD)
            turn(turned[:, :, : -shape.kv_heads], self.cos, self.sin)
            q, k, v = turned.transpose(1, 2).split(heads, 1)
            keys[:, :, self.past :] = k
            values[:, :, self.past :] = v
            mixed = functional.scaled_dot_product_attention(q, keys, values, enable_gqa=grouped)
            x = x + output(mixed.transpose(1, 2).reshape(1, -1))
            rows = functional.rms_norm(x, (shape.hidden,), self.norm, EPSILON)
            gate, up = gate_up(rows).chunk(2, -1)
            x = x + down(functional.silu(gate) * up)
        return functional.linear(functional.rms_norm(x, (shape.hidden,), self.norm, EPSILON), self.head)


def measure(past: int, args: argparse.Namespace) -> dict[str, Any]:
    """One line of the table."""
    shape, layers = MODELS[args.model], args.layers or LAYERS[args.model]
    ours, theirs = Ours(shape, layers, past, args), Theirs(shape, layers, past, args)
    if not torch.isfinite(ours.run()).all():
        raise SystemExit("our output is not finite")
    graphs = {"ours": (graph_of([ours.run]), 1), "fp16": (graph_of([theirs.run]), 1)}
    seconds = medians(graphs, args.turns)
    line: dict[str, Any] = {"model": args.model, "past": past, "ms": {k: 1e3 * v for k, v in seconds.items()}}
    line |= {"tokens_per_s": {k: 1 / v for k, v in seconds.items()}, "ratio": seconds["fp16"] / seconds["ours"]}
    line |= {"bytes": ours.bytes, "bandwidth": ours.bytes / seconds["ours"] / args.peak}
    if args.kernels:
        line["kernels"] = {name: us / layers for name, us in kernel_times(ours.run).items()}
    return line


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=list(MODELS), default="llama-3-8b")
    parser.add_argument("--layers", type=int, help="default: all of the model")
    parser.add_argument("--past", nargs="+", type=int, default=[1024, 8192], help="tokens that are cached")
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--act-bits", type=int, default=4, help="2 to 8, or 16")
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--act-group", type=int, default=64)
    parser.add_argument("--hadamard", type=int, default=0)
    parser.add_argument("--cache-bits", type=int, choices=[4, 16], default=4)
    parser.add_argument("--vocabulary", type=int, default=128256)
    parser.add_argument("--turns", type=int, default=15)
    parser.add_argument("--kernels", action="store_true", help="microseconds a layer of every kernel of ours")
    parser.add_argument("--peak", type=float, default=3.35e12, help="bytes per second; default: H100 SXM")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    args = parser.parse_args()
    library_cuda.check_device()
    for past in args.past:
        line = measure(past, args)
        if args.json:
            print(json.dumps(line), flush=True)
            continue
        tokens = line["tokens_per_s"]
        print(
            f"{args.model}, {past} cached: fp16 {tokens['fp16']:.1f} tokens/s, ours {tokens['ours']:.1f}, "
            f"{line['ratio']:.2f} times; {line['bytes'] / 1e9:.2f} GB a token, {line['bandwidth']:.1%} of the bandwidth"
        )
        for name, value in sorted(line.get("kernels", {}).items()):
            print(f"    {name:40} {value:8.1f} us a layer")


if __name__ == "__main__":
    main()
