"""The accuracy table of docs/results.md in one command: every row exported on a GPU, then measured from its artifact.

    python3 tools/accuracy_rows.py sample --calibration wiki.utf8 --text wiki.test.raw --out results --budget 560
    python3 tools/accuracy_rows.py model.gguf … --rows 4-8-16,4-4-4 --steps 100     # rows by name; more steps, or fewer
    python3 tools/accuracy_rows.py model.gguf … -- --samples 16                     # options for every export

A row is `specquant export` with the preset `refined`, then `specquant eval ppl` over the whole text by ONNX Runtime on
the CPU; it is measured while the next one is exported, since the one needs a GPU and the other does not. --out gets
NAME.json of each (options, perplexity, bits a weight, seconds of both), and a row whose file is there is left out, so
that a second call goes on. With --budget no export is started that is not expected to end in time, by what the longest
one so far took. Artifacts are not kept, but with --keep.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

GROUPS = "--group-size 64 --act-group 64"
CHANNEL = "--group-size 0 --act-group 0 --hadamard 512"
ROWS = {  # name, W-A-KV -> options of the export; in the order in which they are worth most
    "4-8-16": f"--a-bits 8 {GROUPS}",
    "4-16-16": f"--a-bits 16 {GROUPS}",
    "4-4-4": f"--a-bits 4 --kv-bits 4 {GROUPS}",
    "4-4-16": f"--a-bits 4 {GROUPS}",
    "4-4-4 per channel": f"--a-bits 4 --kv-bits 4 {CHANNEL}",
    "4-4-16 per channel": f"--a-bits 4 {CHANNEL}",
    "4-16-16 per channel": f"--a-bits 16 {CHANNEL}",
}


def cli(*words: str) -> dict[str, Any]:
    """The JSON that `specquant …` prints. Raises CalledProcessError, with what it said, if it fails."""
    command = [sys.executable, "-m", "specquant.runtime.cli", *words, "--json", "-q"]
    answer: dict[str, Any] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return answer


def export(name: str, args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Write the artifact of a row; its options, bits and seconds."""
    options = ["--preset", "refined", *ROWS[name].split(), "--refine-steps", str(args.steps), *args.options]
    start = time.perf_counter()
    manifest = cli("export", args.model, "-o", str(folder), "--calibration", str(args.calibration),
                   "--device", args.device, "--force", *options)  # fmt: skip
    bits = manifest["bits"]["linear_bits_per_weight"]
    return {"row": name, "options": options, "bits_per_weight": bits, "export_s": round(time.perf_counter() - start, 1)}


def measure(row: dict[str, Any], args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Add the perplexity of an artifact to its row, and write that."""
    start = time.perf_counter()
    windows = ["--windows", str(args.windows)] if args.windows else []
    result = cli("eval", "ppl", str(folder), "--text", str(args.text), "--threads", str(args.threads), *windows)
    row |= {key: result[key] for key in ("perplexity", "windows", "window", "tokens")}
    row["eval_s"] = round(time.perf_counter() - start, 1)
    if not args.keep:
        shutil.rmtree(folder)
    path = args.out / f"{row['row'].replace(' ', '_')}.json"
    path.with_suffix(".part").write_text(json.dumps(row, indent=1))
    path.with_suffix(".part").replace(path)
    print(f"{row['row']}: {row['perplexity']:.3f} ({row['export_s']} s, {row['eval_s']} s)", flush=True)
    return row


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="what `specquant export` takes")
    parser.add_argument("--calibration", type=Path, required=True, metavar="FILE")
    parser.add_argument("--text", type=Path, required=True, metavar="FILE", help="to measure on; never the one above")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--rows", default=",".join(ROWS), help="default: all of them")
    parser.add_argument("--steps", type=int, default=100, help="of refinement (default: %(default)s)")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"), help="default: %(default)s")
    parser.add_argument("--threads", type=int, default=8, help="of the evaluation (default: %(default)s)")
    parser.add_argument("--windows", type=int, help="default: the whole text")
    parser.add_argument("--budget", type=float, default=float("inf"), metavar="S", help="seconds for all of it")
    parser.add_argument("--keep", action="store_true", help="leave the artifacts in DIR")
    words = sys.argv[1:] if argv is None else argv
    own = words.index("--") if "--" in words else len(words)  # what follows is for every export
    args = parser.parse_args(words[:own])
    args.options = words[own + 1 :]
    args.rows = [name.strip() for name in args.rows.split(",") if name.strip()]
    if unknown := [name for name in args.rows if name not in ROWS]:
        parser.error(f"no row is called {unknown[0]!r}: there are {', '.join(ROWS)}")
    for path in (args.calibration, args.text):
        if not path.is_file():
            parser.error(f"{path} is not a file")
    return args


def run(argv: list[str] | None = None) -> int:
    args = parse(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    start, longest = time.perf_counter(), 0.0
    measured: list[Future[dict[str, Any]]] = []
    with ThreadPoolExecutor(1) as other:  # one evaluation at a time, beside the exports
        for name in args.rows:
            file = name.replace(" ", "_")
            if (args.out / f"{file}.json").is_file():
                continue
            if time.perf_counter() - start + longest > args.budget:
                print(f"{name}: left for another call", flush=True)
                continue
            began, folder = time.perf_counter(), args.out / file
            try:
                row = export(name, args, folder)
            except subprocess.CalledProcessError as error:
                print(f"{name}: {error.stderr.strip()[-300:]}", file=sys.stderr, flush=True)
                return 1
            longest = max(longest, time.perf_counter() - began)
            measured.append(other.submit(measure, row, args, folder))
        for future in measured:
            future.result()
    return 0


if __name__ == "__main__":
    sys.exit(run())
