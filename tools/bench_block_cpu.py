"""One decoder block of Llama 3 8B on the CPU: as our exports have it, against ONNX Runtime's INT4 operators, in turns.

    python -m tools.bench_block_cpu                                  # issue 6: 256 tokens, and one after 256 and 1024
    python -m tools.bench_block_cpu --act-bits 4 --rank 0 --calls 1+256

Ours: SpecQuantMatMul with norms, SwiGLU and residuals inside and HalfKVAttention, from the exporter's own graph. The
peer: MatMulNBits (accuracy_level 4), GroupQueryAttention with a float32 cache, SimplifiedLayerNormalization and nodes
between them. Both have groups of 64 and the same random weights, each rounded for itself. A call is NEW+CACHED tokens;
past and present are one buffer. A graph has as many copies of the block in a row as 256 MB of weights hold, so that
one token reads memory as a model does; times are those of one block, medians and the middle half of runs in shuffled
turns. `ratio` above 1: we are faster. GOP/s counts 2 operations a weight and token, attention left out; GB/s weights,
scales, branch and cached tokens, read once. Both come with their share of what the cores reach
(specquant.custom_ops.library_limits). Run nothing beside it.
"""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

import numpy as np
import onnxruntime as ort

from specquant.custom_ops import library
from specquant.custom_ops.errors import SpecQuantError
from specquant.custom_ops.library_limits import measure_limits
from tools.block_graphs import Numbers, Shape, our_linear, our_model, peer_model, random_weights
from tools.ort_bench import Run, in_place, in_turns, open_session

OURS, PEER = "ours", "onnxruntime"
WEIGHT_BYTES = 256 << 20  # of all copies of the block


def runner(session: ort.InferenceSession, shape: Shape, new: int, cached: int, copies: int) -> Run:
    """A call that appends `new` tokens to `cached` ones in place and returns y [1, new, hidden]. All sessions get the
    same numbers, in the types they ask for."""
    rng, total = np.random.default_rng(0), cached + new
    feeds = {
        "x": rng.standard_normal((1, new, shape.hidden), dtype=np.float32),
        "attention_mask": np.ones((1, total), np.int64),
        "position_ids": np.arange(cached, total)[None],
        "seqlens_k": np.array([total - 1], np.int32),
        "total_sequence_length": np.array(total, np.int32),
    }
    rows = (1, shape.kv_heads, total, shape.head_dim)
    caches = {f"{i}.{part}": rng.standard_normal(rows, np.float32) for i in range(copies) for part in ("key", "value")}
    types = {item.name: item.type for item in session.get_inputs()}
    if types["past_key_values.0.key"] == "tensor(float16)":
        caches = {name: cache.astype(np.float16) for name, cache in caches.items()}
    inputs = feeds | {f"past_key_values.{name}": cache for name, cache in caches.items()}
    outputs = {"y": np.empty_like(feeds["x"])} | {f"present.{name}": cache for name, cache in caches.items()}
    return in_place(session, {name: array for name, array in inputs.items() if name in types}, outputs)


def bytes_read(shape: Shape, numbers: Numbers, cached: int) -> dict[str, float]:
    """Of one token in one block: 4-bit weights, scales, branch, and the cache."""
    weights, branch = sum(n * m for n, m in shape.linears.values()), sum(n + m for n, m in shape.linears.values())
    rows, outputs = 2 * shape.kv_heads * shape.head_dim * cached, sum(m for _, m in shape.linears.values())
    return {
        OURS: weights / 2 + weights / 2 / numbers.group + 2 * outputs + 2 * numbers.rank * branch + 2 * rows,
        PEER: weights / 2 + 4 * weights / numbers.group + 4 * rows,
    }


def sessions(options: argparse.Namespace, numbers: Numbers, copies: int) -> dict[str, ort.InferenceSession]:
    """Both graphs, loaded."""
    shape, rng = options.shape, np.random.default_rng(0)
    length = max(sum(call) for call in options.calls)
    weights = random_weights(shape, rng)
    linears = {name: our_linear(name, weight, numbers, rng) for name, weight in weights.items()}
    ours = open_session(our_model(shape, linears, copies, length), options.threads, library.register)
    del linears
    return {OURS: ours, PEER: open_session(peer_model(shape, weights, numbers, copies, length), options.threads, None)}


def measure(
    loaded: dict[str, ort.InferenceSession],
    numbers: Numbers,
    copies: int,
    call: tuple[int, int],
    args: argparse.Namespace,
) -> dict[str, Any]:
    """Milliseconds of one block, GOP/s, GB/s and the ratio of the medians. Raises SpecQuantError if they disagree."""
    shape, (new, cached) = args.shape, call
    runs = {name: runner(session, shape, new, cached, copies) for name, session in loaded.items()}
    ours, peer = (run().copy() for run in runs.values())
    x = np.random.default_rng(0).standard_normal(peer.shape, dtype=np.float32)  # as runner has it
    away = float(np.linalg.norm(ours - peer) / np.linalg.norm(peer - x))
    if not away < 0.5 + 2.0 ** (2 - args.act_bits):  # 1.4 if nothing is shared; the weights are rounded twice
        raise SpecQuantError(f"the blocks are {away:.3f} apart after {new} + {cached} tokens: they differ")
    read, weights = bytes_read(shape, numbers, cached), sum(n * m for n, m in shape.linears.values())
    found: dict[str, Any] = {}
    for name, times in in_turns(runs, args.seconds).items():
        low, middle, high = 1e3 / copies * np.quantile(times, [0.25, 0.5, 0.75])
        found[name] = {"median_ms": middle, "quartiles_ms": [low, high], "best_ms": 1e3 / copies * min(times)}
        found[name] |= {"gops": 2e-6 * new * weights / middle, "gbps": 1e-6 * read[name] / middle}
    ratio = {f"ratio_{kind}": found[PEER][f"{kind}_ms"] / found[OURS][f"{kind}_ms"] for kind in ("median", "best")}
    return {"new": new, "cached": cached, "runs": len(times), "apart": away, **ratio, **found}


def lines(result: dict[str, Any], limits: dict[str, float]) -> list[str]:
    """Two rows of the table; the unit is what bounds the call: GB/s for one token, GOP/s for a prompt."""
    unit, label = ("gbps", "GB/s") if result["new"] == 1 else ("gops", "GOP/s")
    rows = []
    for name in (OURS, PEER):
        r = result[name]
        share = f"{r[unit] / limits[unit]:.0%}" if unit in limits else "–"
        quartiles = "–".join(f"{ms:.2f}" for ms in r["quartiles_ms"])
        ratio = f"{result['ratio_median']:.2f} | {result['ratio_best']:.2f}" if name == OURS else " | "
        call = f"{result['new']} + {result['cached']}" if name == OURS else ""
        text = f"| {call} | {name} | {r['median_ms']:.2f} | {quartiles} | {r['best_ms']:.2f} "
        rows.append(f"{text}| {r[unit]:.1f} {label} | {share} | {ratio} |")
    return rows


def numbers_of(separator: str, count: int) -> Any:
    """A parser of `count` whole numbers."""

    def parse(text: str) -> tuple[int, ...]:
        found = text.split(separator)
        if len(found) != count or not all(number.isdigit() for number in found):
            raise argparse.ArgumentTypeError(f"{text}: write {count} numbers with {separator} between them")
        return tuple(map(int, found))

    return parse


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = "HIDDENxINNERxHEADSxKVHEADSxHEADDIM"
    parser.add_argument("--shape", type=numbers_of("x", 5), default="4096x14336x32x8x128", metavar=sizes)
    calls = [(256, 0), (1, 256), (1, 1024)]
    parser.add_argument("--calls", nargs="+", type=numbers_of("+", 2), default=calls, metavar="NEW+CACHED")
    parser.add_argument("--act-bits", type=int, default=8, help="of our activations; the peer has 8 (default 8)")
    parser.add_argument("--group-size", type=int, default=64, help="features per weight scale, of both (default 64)")
    parser.add_argument("--act-group", type=int, default=64, help="features per activation scale (default 64)")
    parser.add_argument("--rank", type=int, default=32, help="columns of our branch; 0: none (default 32)")
    parser.add_argument("--hadamard", type=int, default=64, help="block of our transform; 0: none (default 64)")
    parser.add_argument("--copies", type=int, help="of the block in a graph (default: what 256 MB hold)")
    parser.add_argument("--threads", type=int, default=2, help="of both (default 2)")
    parser.add_argument("--seconds", type=float, default=10.0, help="of measuring per call (default 10)")
    parser.add_argument("--no-limits", action="store_true", help="do not measure what the machine can do")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    args = parser.parse_args()
    args.shape = Shape(*args.shape)
    numbers = Numbers(args.group_size, args.act_bits, args.act_group, args.rank, args.hadamard)
    copies = args.copies or max(1, int(WEIGHT_BYTES // bytes_read(args.shape, numbers, 0)[OURS]))
    try:
        loaded = sessions(args, numbers, copies)
        limits = {} if args.no_limits else vars(measure_limits(args.threads))
        if not args.json:
            if limits:
                print(f"limits: {limits['gops']:.0f} GOP/s ({limits['isa']}), {limits['gbps']:.1f} GB/s\n")
            print("| new + cached | | ms | quartiles | best | rate | share | ratio of medians | of the best |")
            print("|---|---|---:|---:|---:|---:|---:|---:|---:|")
        results = []
        for call in args.calls:
            results.append(measure(loaded, numbers, copies, call, args))
            if not args.json:
                print("\n".join(lines(results[-1], limits)), flush=True)
    except SpecQuantError as error:
        print(f"bench_block_cpu: {error}", file=sys.stderr)
        return 1
    if args.json:
        settings = {"shape": list(args.shape), "copies": copies, "threads": args.threads, **numbers._asdict()}
        print(json.dumps({"settings": settings, "limits": limits, "results": results}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
