"""The memory that `specquant build` takes, for models of any size: an artifact of random weights, and a build of it
that is watched. docs/tensorrt.md has what came of it.

    python -m tools.build_memory /tmp/1b --hidden 2048 --intermediate 8192 --layers 16 --heads 32 --kv-heads 8
    python -m tools.build_memory /tmp/1b --profile custom         # the artifact is there already

Prints the peaks of private memory (RssAnon) and of mapped files (RssFile), beside the artifact's tensors. Linux only.
"""

from __future__ import annotations

import argparse
import contextlib
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

CONTEXT, GROUP = 2048, 64


def watched(command: Sequence[str]) -> tuple[subprocess.CompletedProcess[str], dict[str, int]]:
    """A command's outcome, and its peaks of RssAnon and RssFile in bytes; 0 where /proc does not say."""
    peaks = {"RssAnon": 0, "RssFile": 0}
    # To files: nobody reads a pipe meanwhile, and a full one would stop the command.
    with tempfile.TemporaryFile("w+") as printed, tempfile.TemporaryFile("w+") as said:
        with subprocess.Popen(command, stdout=printed, stderr=said) as process:
            status = Path(f"/proc/{process.pid}/status")
            while process.poll() is None:
                with contextlib.suppress(OSError):  # no /proc here, or the command has just ended
                    for name, size in re.findall(r"(RssAnon|RssFile):\s+(\d+)", status.read_text()):
                        peaks[name] = max(peaks[name], int(size) * 1024)
                time.sleep(0.005)
        texts = [file.seek(0) or file.read() for file in (printed, said)]
    return subprocess.CompletedProcess(command, process.returncode, *texts), peaks


def random_artifact(folder: Path, args: argparse.Namespace) -> None:
    """4-bit weights in groups of 64, branches, a head of 8 bits, a 4-bit cache; no number in it means anything."""
    import numpy as np
    import transformers

    from specquant.exporter.artifact import write_artifact
    from specquant.exporter.decoder import Decoder, DecoderConfig, DecoderLayer, QuantLinear
    from specquant.exporter.recipe import Recipe
    from specquant.exporter.sources import load_model, resolve

    rng, hidden, inner = np.random.default_rng(), args.hidden, args.intermediate
    d = hidden // args.heads

    def linear(name: str, n: int, m: int) -> QuantLinear:
        basis = rng.standard_normal((n, args.rank), np.float32) / n**0.5
        coef = rng.standard_normal((args.rank, m), np.float32) / n**0.5
        group_scales = rng.integers(10, 17, (n // GROUP, m), np.int8)
        scales = (rng.uniform(0.8, 1.2, m) / (13 * 4.6 * n**0.5)).astype(np.float16)
        branch = basis.astype(np.float16), coef.astype(np.float16)
        q = rng.integers(-8, 8, (n, m), np.int8)
        return QuantLinear(
            name, {name: m}, q, group_scales, scales, GROUP, 8, GROUP, *branch, subtract=True, hadamard=GROUP
        )

    one = np.ones(hidden, np.float32)
    layers = [
        DecoderLayer(
            one,
            linear(f"model.layers.{i}.self_attn.qkv_proj", hidden, hidden + 2 * args.kv_heads * d),
            linear(f"model.layers.{i}.self_attn.o_proj", hidden, hidden),
            one,
            linear(f"model.layers.{i}.mlp.gate_up_proj", hidden, 2 * inner),
            linear(f"model.layers.{i}.mlp.down_proj", inner, hidden),
            key_offset=np.zeros((args.kv_heads, d), np.float32),
        )
        for i in range(args.layers)
    ]
    sizes = (hidden, inner, args.layers, args.heads, args.kv_heads, d, args.vocabulary, CONTEXT)
    config = DecoderConfig("llama", *sizes, 1e-5, 1, [2], d**-0.5, kv_bits=4, head_bits=8)
    angles = np.outer(np.arange(CONTEXT), 1e4 ** (-np.arange(0, d, 2) / d))[None]
    tables = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
    embedding = rng.standard_normal((args.vocabulary, hidden), np.float32)
    recipe: dict[str, Any] = asdict(Recipe(float_type="float16", kv_bits=4))
    decoder = Decoder(config, embedding, layers, one, None, *tables, recipe)
    source = resolve("sample", None)  # its tokenizer
    _, tokenizer = load_model(source)
    model = SimpleNamespace(config=transformers.LlamaConfig(), generation_config=None)
    write_artifact(folder, decoder, source, model, tokenizer, None)


def main() -> int:
    from specquant.runtime.artifact import open_artifact

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact", type=Path, help="made if it is not there")
    parser.add_argument("--profile", nargs="+", default=["portable", "custom"])
    parser.add_argument("--gpu", default="sm89")
    sizes = {"hidden": 2048, "intermediate": 8192, "layers": 16, "heads": 32, "kv-heads": 8}
    for name, size in (sizes | {"vocabulary": 32000, "rank": 32}).items():
        parser.add_argument(f"--{name}", type=int, default=size)
    args = parser.parse_args()
    if not args.artifact.is_dir():
        random_artifact(args.artifact, args)
    stored = sum(open_artifact(args.artifact).bits.tensor_bytes.values())
    for profile in args.profile:
        engine = args.artifact.with_name(f"{args.artifact.name}-{profile}")
        build = [sys.executable, "-m", "specquant.runtime.cli", "build", str(args.artifact), "--profile", profile]
        build += ["--gpu", args.gpu, "--max-batch", "4", "--max-seq", "1024", "-o", str(engine), "--force"]
        since = time.perf_counter()
        done, peaks = watched(build)
        if done.returncode:
            print(done.stderr.splitlines()[-1], file=sys.stderr)
            return 1
        private, mapped = peaks.values()
        print(f"{done.stdout.strip()}\n  {next(s for s in done.stderr.splitlines() if s.startswith('estimate'))}")
        print(
            f"  artifact {stored / 1e6:,.0f} MB; private {private / 1e6:,.0f} MB, {private / stored:.2f} times that; "
            f"mapped {mapped / 1e6:,.0f} MB; {time.perf_counter() - since:.0f} s"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
