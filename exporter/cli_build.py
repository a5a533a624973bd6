"""`specquant build`: argument parsing and progress only."""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict
from pathlib import Path

from specquant.exporter.cli import Steps
from specquant.runtime.cli_common import add_verbosity, note

EPILOG = """examples:
  specquant build build/smollm2 --target tensorrt-rtx --gpu sm89
  specquant build build/smollm2 --target tensorrt-rtx --gpu sm120 --max-batch 8 --max-seq 4096
  specquant build build/smollm2 --target tensorrt-rtx --gpu sm89 --profile custom -o smollm2-sm89-custom

TensorRT-RTX builds for a GPU that need not be there. Activations of a portable engine, and its KV cache, are of the
model's float type: export with --float-type float16 for speed. A custom one has the cache of the artifact, of 4 bits
after --kv-bits 4. docs/tensorrt.md says what was run and what was not.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "Build a TensorRT engine of an exported model, ahead of time."
    parser.epilog = EPILOG
    parser.add_argument("model", metavar="DIR", type=Path, help="the folder that `specquant export` made")
    parser.add_argument("--target", default="tensorrt-rtx", metavar="NAME", help="tensorrt-rtx (default) or tensorrt")
    parser.add_argument("--gpu", metavar="SM", help="what it is for: sm86, sm89, sm120, …")
    parser.add_argument(
        "--profile",
        default="portable",
        metavar="NAME",
        help="portable (default): TensorRT's own operators; custom: our plugins, activations and cache as exported",
    )
    parser.add_argument("--max-batch", type=int, default=1, metavar="N", help="rows decoded together (default: 1)")
    parser.add_argument("--max-seq", type=int, metavar="N", help="tokens of a row (default: the context, at most 2048)")
    parser.add_argument("--block", type=int, default=512, metavar="N", help="tokens of a prompt a call (default: 512)")
    parser.add_argument("--rank", type=int, metavar="N", help="columns of each spectral branch to keep (default: all)")
    parser.add_argument("--python-plugins", action="store_true", help="build with plugins in Python (custom)")
    parser.add_argument("--copy-plugins", action="store_true", help="put the plugin library beside the engine (custom)")
    parser.add_argument("--embed-plugins", action="store_true", help="carry the plugin library in the engine (custom)")
    parser.add_argument("-o", "--output", metavar="DIR", type=Path, help="default: DIR/engine/TARGET-GPU")
    parser.add_argument("--force", action="store_true", help="replace an engine that is there")
    parser.add_argument("--json", action="store_true", help="print the engine's manifest (engine.json) at the end")
    add_verbosity(parser)


def run(args: argparse.Namespace) -> int:
    from specquant.exporter.engine import EngineOptions, build

    names = ("target", "gpu", "profile", "max_batch", "max_seq", "block", "rank")
    plugins = ("embed_plugins", "copy_plugins", "python_plugins")
    options = EngineOptions(**{name: getattr(args, name) for name in (*names, *plugins)})
    steps, since = Steps(args.quiet), time.perf_counter()
    try:
        info = build(args.model, options, args.output, args.force, steps, lambda text: note(args, text))
    finally:
        steps.close()
    if args.json:
        print(json.dumps(asdict(info), indent=2, ensure_ascii=False))
        return 0
    note(args, f"done in {time.perf_counter() - since:.0f} s")
    print(
        f"{args.model}: {info.target} {info.version} engine for {info.gpu}, {info.profile}, {info.size / 1e6:.0f} MB "
        f"(weights {info.weights_bytes / 1e6:.0f} MB), up to {info.max_batch} × {info.max_seq} tokens"
    )
    return 0
