"""Where the time of an exported model goes, operator by operator, as ONNX Runtime's profiler sees it.

    python tools/profile_ops.py build/smollm2                             # decode, after 0 to 127 tokens
    python tools/profile_ops.py build/smollm2 --prompt 512 --block 128    # a prompt, in blocks of 128 tokens
    python tools/profile_ops.py build/smollm2 --threads 1                 # its second line is fit for busy machines

The times of operators are by the clock, and so say little where other jobs run. The time on the cores, of all threads
together, is the process's own; with one thread nothing waits in it.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from statistics import median
from time import process_time
from typing import Any

import numpy as np
import onnxruntime as ort

from specquant.custom_ops.library import register
from specquant.runtime.artifact import open_artifact


class Profiled:
    """A session that profiles, its cache of `capacity` tokens bound in place."""

    def __init__(self, folder: Path, threads: int, capacity: int, work: Path) -> None:
        options = ort.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = threads, 3
        options.enable_profiling, options.profile_file_prefix = True, str(work / "profile")
        register(options)
        model = open_artifact(folder).model
        self.vocabulary = model.vocab_size
        self.session = ort.InferenceSession(str(folder / "model.onnx"), options, providers=["CPUExecutionProvider"])
        self._binding, self._arrays = self.session.io_binding(), {}
        width, dtype = model.cache_row
        for item in self.session.get_inputs():
            if item.name.startswith("past"):
                cache = np.zeros((1, model.num_kv_heads, capacity, width), dtype)
                self._bind(item.name, cache)
                self._bind(item.name.replace("past_key_values", "present"), cache, output=True)
        self._bind("logits", np.zeros((1, 1, self.vocabulary), model.float_dtype), output=True)
        self._bind("logits_to_keep", np.array([1]))

    def step(self, ids: np.ndarray, past: int) -> None:
        """`ids` [T] after `past` tokens."""
        end = past + len(ids)
        self._bind("input_ids", ids[None])
        self._bind("position_ids", np.arange(past, end)[None])
        self._bind("attention_mask", np.ones((1, end), np.int64))
        self.session.run_with_iobinding(self._binding)

    def _bind(self, name: str, array: np.ndarray, output: bool = False) -> None:
        self._arrays[name] = array  # alive while it is bound
        bind = self._binding.bind_output if output else self._binding.bind_input
        bind(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)


def by_operator(events: list[dict[str, Any]]) -> dict[str, tuple[float, int]]:
    """Operator (of matrix products also the last part of the node's name) -> microseconds and calls in all."""
    found: dict[str, tuple[float, int]] = defaultdict(lambda: (0.0, 0))
    for event in events:
        if event.get("cat") != "Node" or not event["name"].endswith("_kernel_time"):
            continue
        name = event["args"]["op_name"]
        if "MatMul" in name:
            name += " " + event["name"].removesuffix("_kernel_time").rsplit(".", 1)[-1]
        time, calls = found[name]
        found[name] = time + event["dur"], calls + 1
    return dict(sorted(found.items(), key=lambda item: -item[1][0]))


def profile(folder: Path, prompt: int, block: int, runs: int, threads: int) -> dict[str, Any]:
    """prompt 0: `runs` tokens one by one. Times in milliseconds a run, of which there is one more, not counted."""
    with tempfile.TemporaryDirectory() as work:
        model = Profiled(folder, threads, max(prompt, runs + 1), Path(work))
        ids = np.random.default_rng(0).integers(0, model.vocabulary, max(prompt, runs + 1))
        times = []
        for run in range(runs + 1):
            since = process_time()
            if prompt:
                for start in range(0, prompt, block):
                    model.step(ids[start : min(start + block, prompt)], start)
            else:
                model.step(ids[run : run + 1], run)
            times.append(process_time() - since)
        events = json.loads(Path(model.session.end_profiling()).read_text())
    operators = {
        name: {"ms": time / 1e3 / (runs + 1), "calls": calls / (runs + 1)}
        for name, (time, calls) in by_operator(events).items()
    }
    return {"core_ms": {"median": 1e3 * median(times[1:]), "least": 1e3 * min(times[1:])}, "operators": operators}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="DIR", type=Path, help="the folder that `specquant export` wrote")
    parser.add_argument("--prompt", type=int, default=0, help="tokens; 0, the default: tokens one by one")
    parser.add_argument("--block", type=int, default=512, help="tokens of the prompt at a time (default: %(default)s)")
    parser.add_argument("--runs", type=int, help="default: 128 tokens, or 5 prompts")
    parser.add_argument("--threads", type=int, default=2, help="default: %(default)s")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    runs = options.runs or (5 if options.prompt else 128)
    found = profile(options.model, options.prompt, options.block, runs, options.threads)
    if options.json:
        print(json.dumps(found))
        return 0
    total = sum(row["ms"] for row in found["operators"].values())
    print(f"{total:.2f} ms in operators, by the clock")
    print(f"{found['core_ms']['median']:.2f} ms on the cores, {found['core_ms']['least']:.2f} at least")
    for name, row in found["operators"].items():
        print(f"{name:40s} {row['ms']:9.3f} ms {row['ms'] / total:6.1%} {row['calls']:6.1f} calls")
    return 0


if __name__ == "__main__":
    sys.exit(main())
