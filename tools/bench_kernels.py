"""One INT4 matmul: our op against ONNX Runtime's MatMulNBits (accuracy_level 4), in one process, in turns.

    python tools/bench_kernels.py                                    # the shapes of issue 6
    python tools/bench_kernels.py --shapes 128x4096x4096 --act-bits 8 --threads 1
    python tools/bench_kernels.py --baseline old.so                  # the same op from an earlier build, too
    python tools/bench_kernels.py --isa avx512vnni                   # the same op with another instruction set, too
    python tools/bench_kernels.py --ggml ENV/lib/python3.11/site-packages/llama_cpp/lib    # ggml's repacked Q4_0, too

A shape is TOKENSxINxOUT. A model has as many nodes as 64 MB of weights hold (fewer with many tokens), each with
weights of its own, so that decode reads memory as a model does; times are those of one node. Medians, and the best
of all, of runs that take turns. `ratio` above 1: we are faster. GOP/s counts 2 operations a weight and token; GB/s
the weights and scales that are read once. Both come with the share of what the machine reaches at that moment,
as tools/machine_limits.cc measures it (needs c++; --no-limits leaves it out). Where other jobs run, wall-clock times
say little: `--threads 1 --cpu-time` counts only the time that the thread had a core.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from statistics import median
from time import perf_counter, thread_time
from typing import Any, NamedTuple

import numpy as np
import onnx
import onnxruntime as ort
from ggml_bench import BLOCK, BLOCK_BYTES, GGML, Product, load
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from ort_bench import PEER, Register, Run, in_turns, open_session, peer_node

from specquant.custom_ops import library
from specquant.custom_ops.errors import SpecQuantError
from specquant.custom_ops.packing import pack_group_scales, pack_int4
from specquant.custom_ops.schema import DOMAIN, VERSION

SHAPES = (
    "1x4096x14336,128x4096x14336,"
    "1x576x960,1x576x576,1x576x3072,1x1536x576,32x576x960,32x576x576,32x576x3072,32x1536x576,"
    "512x576x960,512x576x576,512x576x3072,512x1536x576,2048x576x960,2048x576x3072,2048x1536x576"
)
WEIGHT_BYTES = 64 << 20  # of all nodes of a model
TOKENS_OF_ALL_NODES = 512


class Weights(NamedTuple):
    """q int8 [n, m]; scales float16 [m] and, whole numbers of them, group_scales int8 [n / group, m]."""

    q: NDArray[np.int8]
    group_scales: NDArray[np.int8]
    scales: NDArray[np.float16]

    @property
    def of_peers(self) -> tuple[NDArray[np.int8], NDArray[np.float16]]:
        """q, and the scales of groups as others store them, float16 [n / group, m]."""
        return self.q, self.scales * self.group_scales.astype(np.float16)


def node_weights(rng: np.random.Generator, n: int, m: int, group: int) -> Weights:
    """Of about the size that weights have. Scales have seven bits: float16 holds the products of both levels, too."""
    q = np.clip(np.rint(rng.standard_normal((n, m), dtype=np.float32) * 3), -8, 7).astype(np.int8)
    group_scales = rng.integers(8, 17, (n // group, m), dtype=np.int8) if n > group else np.ones((1, m), np.int8)
    scales = rng.integers(64, 128, m) * 2.0 ** np.rint(np.log2(1 / (3 * 12 * 96 * n**0.5)))
    return Weights(q, group_scales, scales.astype(np.float16))


def our_node(
    index: int, weights: Weights, options: argparse.Namespace
) -> tuple[onnx.NodeProto, dict[str, NDArray[Any]]]:
    """An Int4ResidualMatMul, or with a rank a SpecQuantMatMul, and its initialisers."""
    (n, m), group, rank = weights.q.shape, options.group_size, options.rank
    rng = np.random.default_rng(index)
    branch = {
        "basis": (rng.standard_normal((n, rank)) / n**0.5).astype(np.float16),
        "coef": rng.standard_normal((rank, m)).astype(np.float16),
        "rank": np.array([rank], np.int64),
    }
    rest = {
        "qweight": pack_int4(weights.q),
        "group_scales": pack_group_scales(weights.group_scales),
        "scales": weights.scales,
        "bias": np.zeros(m, np.float32),
        "norm": np.ones(1, np.float32),  # neither a norm nor a residual
        "residual": np.zeros(1, np.float32),
    }
    arrays = {f"{name}{index}": array for name, array in ((branch if rank else {}) | rest).items()}
    attributes = {"group_size": group, "act_bits": options.act_bits, "act_group": options.act_group}
    attributes["hadamard"] = options.hadamard
    if rank:
        attributes["subtract"] = int(options.subtract)
    kind = "SpecQuantMatMul" if rank else "Int4ResidualMatMul"
    node = helper.make_node(kind, ["x", *arrays], [f"y{index}"], domain=DOMAIN, **attributes)
    return node, arrays


def session(
    nodes: Sequence[tuple[onnx.NodeProto, dict[str, NDArray[Any]]]],
    n: int,
    m: int,
    threads: int,
    register: Register | None,
) -> ort.InferenceSession:
    """Nodes that share x [T, n]; each has its own output [T, m]."""
    graph = helper.make_graph(
        [node for node, _ in nodes],
        "kernels",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["t", n])],
        [helper.make_tensor_value_info(node.output[0], TensorProto.FLOAT, ["t", m]) for node, _ in nodes],
        [numpy_helper.from_array(array, name) for _, arrays in nodes for name, array in arrays.items()],
    )
    domains = [
        helper.make_opsetid("", 21),
        helper.make_opsetid("com.microsoft", 1),
        helper.make_opsetid(DOMAIN, VERSION),
    ]
    model = helper.make_model(graph, opset_imports=domains, ir_version=10)
    return open_session(model.SerializeToString(), threads, register)


def register_isa(isa: str, options: ort.SessionOptions) -> None:
    """Our ops of one instruction set: kernels read the variable when a session makes them, right after this."""
    os.environ["SPECQUANT_ISA"] = isa
    library.register(options)


def runner(bound: ort.InferenceSession, x: NDArray[np.float32], nodes: int, m: int) -> Run:
    """A call that runs the session into buffers of its own; it returns the first node's y."""
    binding = bound.io_binding()
    binding.bind_cpu_input("x", x)
    outputs = [ort.OrtValue.ortvalue_from_shape_and_type((len(x), m), np.float32) for _ in range(nodes)]
    for index, value in enumerate(outputs):
        binding.bind_ortvalue_output(f"y{index}", value)

    def run() -> NDArray[np.float32]:
        bound.run_with_iobinding(binding)
        return np.asarray(outputs[0].numpy())

    return run


def contenders(shape: tuple[int, int, int], options: argparse.Namespace) -> tuple[dict[str, Run], int]:
    """name -> run, all on the same x and weights, and the number of nodes. Raises SpecQuantError if one computes
    something else than the peer."""
    tokens, n, m = shape
    count = max(1, min(WEIGHT_BYTES // (n * m // 2), TOKENS_OF_ALL_NODES // tokens, 48))
    rng = np.random.default_rng(0)
    x = rng.standard_normal((tokens, n)).astype(np.float32)
    weights = [node_weights(rng, n, m, options.group_size) for _ in range(count)]
    ours = [our_node(i, one, options) for i, one in enumerate(weights)]
    peers = [peer_node("x", f"y{i}", *one.of_peers) for i, one in enumerate(weights)]
    baseline = options.baseline and (lambda to: to.register_custom_ops_library(str(options.baseline)))
    sessions = {
        "ours": session(ours, n, m, options.threads, library.register),
        **{isa: session(ours, n, m, options.threads, partial(register_isa, isa)) for isa in options.isa},
        **({"baseline": session(ours, n, m, options.threads, baseline)} if baseline else {}),
        PEER: session(peers, n, m, options.threads, None),
    }
    runs = {name: runner(bound, x, count, m) for name, bound in sessions.items()}
    if options.ggml:
        runs[GGML] = Product(load(options.ggml), x, [one.of_peers for one in weights], options.threads)
    first = {name: run().copy() for name, run in runs.items()}
    for name, y in first.items():
        error = float(np.linalg.norm(y - first[PEER]) / np.linalg.norm(first[PEER]))
        bits = 8 if name == GGML else options.act_bits  # ggml's weights are the same to the bit, its activations int8
        same = name == GGML or (not options.rank and not options.hadamard)
        if same and not error < 0.3 * 2.0 ** (4 - bits) + 0.02:
            raise SpecQuantError(f"{name} is {error:.3f} away from {PEER} at {shape}: they compute different things")
    return runs, count


def measure(shape: tuple[int, int, int], options: argparse.Namespace) -> dict[str, Any]:
    """Times in ms of one node, GOP/s, GB/s and ratios of the medians for one shape."""
    tokens, n, m = shape
    runs, count = contenders(shape, options)
    clock = thread_time if options.cpu_time else perf_counter
    seconds = in_turns(runs, options.seconds, clock)
    times = {name: [second * 1e3 / count for second in list_] for name, list_ in seconds.items()}
    groups = n // options.group_size * m
    read = {name: n * m / 2 + (groups * 4 if name == PEER else groups / 2 + 2 * m) for name in runs}
    if GGML in runs:
        read[GGML] = n * m / BLOCK * BLOCK_BYTES
    found: dict[str, Any] = {
        name: {
            "median_ms": median(list_),
            "best_ms": min(list_),
            "gops": 2e-6 * tokens * n * m / median(list_),
            "gbps": 1e-6 * read[name] / median(list_),
        }
        for name, list_ in times.items()
    }
    if isinstance(product := runs.get(GGML), Product):
        found[GGML] |= {"repacked": product.repacked, "buffer": product.buffer, "version": product.version}
    others = [name for name in found if name != "ours"]
    found["ratio"] = {name: found[name]["median_ms"] / found["ours"]["median_ms"] for name in others}
    found["ratio_best"] = {name: found[name]["best_ms"] / found["ours"]["best_ms"] for name in others}
    return {"shape": list(shape), "nodes": count, "runs": len(times[PEER]), **found}


def machine_limits(threads: int) -> dict[str, float | None]:
    """gops and gbps of tools/machine_limits.cc. Raises SpecQuantError if it does not build."""
    with tempfile.TemporaryDirectory() as folder:
        program, source = Path(folder) / "limits", Path(__file__).with_name("machine_limits.cc")
        built = ["c++", "-O3", "-std=c++17", "-march=native", "-pthread", str(source), "-o", str(program)]
        try:
            subprocess.run(built, check=True, capture_output=True, text=True)
            output = subprocess.run([str(program), str(threads)], check=True, capture_output=True, text=True).stdout
        except (OSError, subprocess.CalledProcessError) as error:
            raise SpecQuantError(f"the machine's limits cannot be measured ({error}); use --no-limits") from None
    limits: dict[str, float | None] = json.loads(output)
    return limits


def line(result: dict[str, Any], limits: dict[str, float | None]) -> str:
    """One line for people."""

    def share(value: float, unit: str) -> str:
        limit = limits.get(unit)
        return f" {value / limit:4.0%}" if limit else ""

    text = f"{'x'.join(map(str, result['shape'])):>16}"
    for name, r in ((name, r) for name, r in result.items() if isinstance(r, dict) and "gops" in r):
        where = f" ({'repacked' if r['repacked'] else 'not repacked'}: {r['buffer']})" if "buffer" in r else ""
        text += f" | {name}{where} {r['median_ms']:.4f} (best {r['best_ms']:.4f}) ms"
        text += f" {r['gops']:.0f} GOP/s{share(r['gops'], 'gops')} {r['gbps']:.1f} GB/s{share(r['gbps'], 'gbps')}"
    for name, ratio in result["ratio"].items():
        text += f" | {ratio:.2f}x {name} (best {result['ratio_best'][name]:.2f})"
    return text


def shapes(text: str) -> list[tuple[int, int, int]]:
    """TOKENSxINxOUT, comma-separated. Raises argparse.ArgumentTypeError on anything else."""
    found = []
    for item in text.split(","):
        sizes = item.split("x")
        if len(sizes) != 3 or not all(size.isdigit() and int(size) for size in sizes):
            raise argparse.ArgumentTypeError(f"{item} is no shape; write TOKENSxINxOUT, as in 128x4096x14336")
        found.append((int(sizes[0]), int(sizes[1]), int(sizes[2])))
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", type=shapes, default=shapes(SHAPES), help="TOKENSxINxOUT,… (default: issue 6's)")
    parser.add_argument("--act-bits", type=int, default=4, help="of our activations; the peer has 8 (default 4)")
    parser.add_argument("--group-size", type=int, default=64, help="features per weight scale, of both (default 64)")
    parser.add_argument("--act-group", type=int, default=64, help="features per activation scale (default 64)")
    parser.add_argument("--rank", type=int, default=0, help="columns of our branch; 0: none, as the peer (default)")
    parser.add_argument("--subtract", action="store_true", help="take the branch's part out of x first, as exports do")
    parser.add_argument("--hadamard", type=int, default=0, help="features that x is rotated by (exports: 64)")
    parser.add_argument("--threads", type=int, default=2, help="of both (default 2)")
    parser.add_argument("--seconds", type=float, default=2.0, help="of measuring per shape (default 2)")
    parser.add_argument("--cpu-time", action="store_true", help="time on the core, not on the wall; one thread only")
    parser.add_argument("--baseline", type=Path, help="another build of our library, timed beside this one")
    parser.add_argument("--isa", action="append", default=[], help="time this instruction set beside the fastest, too")
    parser.add_argument("--ggml", type=Path, help="folder or library of ggml: time its product with Q4_0 weights, too")
    parser.add_argument("--no-limits", action="store_true", help="do not measure what the machine can do")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of lines")
    options = parser.parse_args()
    if options.cpu_time and options.threads != 1:
        parser.error("--cpu-time sees the calling thread only; add --threads 1")
    try:
        limits = {} if options.no_limits else machine_limits(options.threads)
        if not options.json and limits:
            tiles = f" ({limits['amx_gops']} with AMX)" if limits["amx_gops"] else ""
            print(f"limits on {options.threads} threads: {limits['gops']} GOP/s{tiles}, {limits['gbps']} GB/s")
        results = []
        for shape in options.shapes:
            results.append(measure(shape, options))
            if not options.json:
                print(line(results[-1], limits), flush=True)
    except SpecQuantError as error:
        print(f"bench_kernels: {error}", file=sys.stderr)
        return 1
    if options.json:
        settings = {
            k: v for k, v in vars(options).items() if isinstance(v, int | float) and k not in ("json", "no_limits")
        }
        print(json.dumps({"settings": settings, "limits": limits, "results": results}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
