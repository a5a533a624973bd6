"""Exported models beside llama.cpp and onnxruntime-genai on the same weights and cores.

    bash ../shared/peers/setup.sh ENV               # once: the peers and SmolLM2, in an environment of their own
    python tools/bench_peers.py build/smollm2 --env ENV
    python tools/bench_peers.py build/smollm2 build/fast --env ENV --runs 9 --json

Every run is a process of its own, and the contenders take turns, so that a slow moment of the machine hits all alike.
A process loads the model (imports are not counted), warms up, and then measures the prefill of 512 tokens (only the
last one's logits are asked for, where a peer can be asked so), 128 tokens one by one, greedily, and the time from a
prompt of 32 to its first token; of several rounds the median. Memory is the process's peak, Python included. Ratios
are of medians, to the best peer of each column; above 1, we are ahead.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

PROMPT, NEW_TOKENS, FIRST_PROMPT, CONTEXT = 512, 128, 32, 1024
ROUNDS = 3  # in a process
Q4_0 = 2  # llama.cpp's number of the file type
GENAI = {"genai int4 block 32": "32", "genai int4 block 128": "128"}
COLUMNS = {  # key -> title, is more better?
    "prefill": ("prefill tokens/s", True),
    "decode": ("decode tokens/s", True),
    "first_token": ("first token ms", False),
    "load": ("load s", False),
    "memory": ("peak MiB", False),
}


class Ours:
    """A folder that `specquant export` wrote."""

    def __init__(self, path: str, threads: int) -> None:
        import onnxruntime  # noqa: F401 - imports are not counted

        from specquant.runtime import session

        self._load = lambda: session.load(path, threads=threads)

    def load(self) -> None:
        self.model = self._load()

    def start(self, ids: Sequence[int]) -> None:
        import numpy as np

        self._sequences = self.model.sequences()
        self._logits = self._sequences.prefill_last(0, np.array(ids))

    def next(self) -> int:
        return int(self._logits.argmax())

    def step(self, token: int) -> None:
        import numpy as np

        self._logits = self._sequences.decode(np.array([token]))[0]


class Llama:
    """llama.cpp through the C functions of llama-cpp-python."""

    def __init__(self, path: str, threads: int) -> None:
        import llama_cpp
        import numpy as np

        self._llama, self._numpy, self._path, self._threads = llama_cpp, np, path, threads
        self._quiet = llama_cpp.llama_log_callback(lambda *_: None)
        llama_cpp.llama_log_set(self._quiet, ctypes.c_void_p(0))

    def load(self) -> None:
        llama = self._llama
        llama.llama_backend_init()
        self._model = llama.llama_model_load_from_file(self._path.encode(), llama.llama_model_default_params())
        options = llama.llama_context_default_params()
        options.n_ctx, options.n_batch, options.n_ubatch = CONTEXT, PROMPT, PROMPT
        options.n_threads = options.n_threads_batch = self._threads
        self._context = llama.llama_init_from_model(self._model, options)
        self._vocabulary = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(self._model))
        self._batch = llama.llama_batch_init(PROMPT, 0, 1)

    def start(self, ids: Sequence[int]) -> None:
        self._llama.llama_memory_clear(self._llama.llama_get_memory(self._context), True)
        self._position = 0
        self._append(ids)

    def next(self) -> int:
        logits = self._llama.llama_get_logits_ith(self._context, -1)
        return int(self._numpy.ctypeslib.as_array(logits, (self._vocabulary,)).argmax())

    def step(self, token: int) -> None:
        self._append([token])

    def _append(self, ids: Sequence[int]) -> None:
        batch = self._batch
        batch.n_tokens = len(ids)
        for i, token in enumerate(ids):
            batch.token[i], batch.pos[i], batch.n_seq_id[i] = token, self._position + i, 1
            batch.seq_id[i][0], batch.logits[i] = 0, i == len(ids) - 1
        if self._llama.llama_decode(self._context, batch):
            raise RuntimeError("llama_decode failed")
        self._llama.llama_synchronize(self._context)
        self._position += len(ids)


class Genai:
    """onnxruntime-genai. Its generator is kept from prompt to prompt: a new one costs it some 15 ms."""

    def __init__(self, path: str, threads: int) -> None:
        import numpy as np
        import onnxruntime_genai as genai

        self._genai, self._numpy, self._path, self._threads = genai, np, path, threads

    def load(self) -> None:
        genai = self._genai
        config = genai.Config(self._path)
        options = {"session_options": {"intra_op_num_threads": self._threads}}
        config.overlay(json.dumps({"model": {"decoder": options}}))
        self._model = genai.Model(config)
        parameters = genai.GeneratorParams(self._model)
        # min_length: an end of text would stop it.
        parameters.set_search_options(max_length=CONTEXT, min_length=CONTEXT, do_sample=False)
        self._generator = genai.Generator(self._model, parameters)

    def start(self, ids: Sequence[int]) -> None:
        self._generator.rewind_to(0)
        self._generator.append_tokens(self._numpy.array(ids, self._numpy.int32))

    def next(self) -> int:
        self._generator.generate_next_token()
        return int(self._generator.get_next_tokens()[0])

    def step(self, token: int) -> None:
        """The next token is computed when it is asked for."""


CONTENDERS: dict[str, Callable[[str, int], Any]] = {"ours": Ours, "llama": Llama, "genai": Genai}


def run_one(kind: str, path: str, threads: int) -> dict[str, float]:
    """One process's measurements, by the keys of COLUMNS."""
    engine = CONTENDERS[kind](path, threads)
    since = perf_counter()
    engine.load()
    load = perf_counter() - since
    ids = [(7919 * i + 104729) % 40000 + 1000 for i in range(PROMPT)]  # any tokens: none of them special
    found: dict[str, list[float]] = {"prefill": [], "decode": [], "first_token": []}
    for _ in range(ROUNDS + 1):  # the first warms up
        since = perf_counter()
        engine.start(ids)
        found["prefill"].append(PROMPT / (perf_counter() - since))
        engine.next()
        since = perf_counter()
        engine.start(ids[:FIRST_PROMPT])
        token = engine.next()
        found["first_token"].append(1e3 * (perf_counter() - since))
        since = perf_counter()
        for _ in range(NEW_TOKENS):
            engine.step(token)
            token = engine.next()
        found["decode"].append(NEW_TOKENS / (perf_counter() - since))
    status = Path("/proc/self/status").read_text()
    peak = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM:"))
    return {key: median(values[1:]) for key, values in found.items()} | {"load": load, "memory": peak / 1024}


def prepare(env: Path) -> dict[str, tuple[str, Path]]:
    """name -> (kind, model) of every peer, made from the environment's SmolLM2 where they are not there yet."""
    python, models = env / "venv/bin/python", env / "models"
    models.mkdir(exist_ok=True)
    q4_0 = models / "q4_0.gguf"
    if not q4_0.is_file():
        source = next((env / "gguf").glob("*.gguf"))
        code = (
            "import ctypes, sys, llama_cpp as l; l.llama_backend_init(); p = l.llama_model_quantize_default_params(); "
            f"p.ftype, p.allow_requantize = {Q4_0}, True; "
            "sys.exit(l.llama_model_quantize(sys.argv[1].encode(), sys.argv[2].encode(), ctypes.byref(p)))"
        )
        _run([str(python), "-c", code, str(source), str(q4_0)])
    peers = {"llama.cpp Q4_0": ("llama", q4_0)}
    for name, block in GENAI.items():
        folder = models / f"genai-{block}"
        if not (folder / "genai_config.json").is_file():
            builder = [str(python), "-m", "onnxruntime_genai.models.builder", "-i", str(env / "smol_hf"), "-p", "int4"]
            options = ["accuracy_level=4", f"block_size={block}", "prune_lm_head=1"]
            places = ["-o", str(folder), "-c", str(env / "cache")]
            _run([*builder, *places, "-e", "cpu", "--extra_options", *options])
        peers[name] = ("genai", folder)
    return peers


def _run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise SystemExit(f"bench_peers: {Path(command[0]).name} {' '.join(command[1:4])}: {last}")
    return done.stdout


def measure(contenders: dict[str, tuple[str, str, Path]], runs: int, threads: int) -> dict[str, list[dict[str, float]]]:
    """name -> a dict of COLUMNS for every run; contenders: name -> (interpreter, kind, model)."""
    found: dict[str, list[dict[str, float]]] = {name: [] for name in contenders}
    for index in range(runs):
        for name, (python, kind, path) in contenders.items():
            command = [python, str(Path(__file__).resolve()), str(path), "--threads", str(threads), "--worker", kind]
            found[name].append(json.loads(_run(command).splitlines()[-1]))
        print(f"run {index + 1} of {runs}", file=sys.stderr)
    return found


def report(found: dict[str, list[dict[str, float]]], ours: Sequence[str]) -> dict[str, Any]:
    """Medians of every contender; by column the best of those that are not `ours`, and the `ratio` of ours[0] to it;
    `ratios`: of each of `ours`."""
    medians = {name: {key: median(run[key] for run in runs) for key in COLUMNS} for name, runs in found.items()}
    best = {}
    for key, (_, more_is_better) in COLUMNS.items():
        pick = max if more_is_better else min
        best[key] = pick((name for name in medians if name not in ours), key=lambda name: medians[name][key])

    def ratio(name: str, key: str) -> float:
        us, peer = medians[name][key], medians[best[key]][key]
        return us / peer if COLUMNS[key][1] else peer / us

    ratios = {name: {key: ratio(name, key) for key in COLUMNS} for name in ours}
    return {"ratio": ratios[ours[0]], "ratios": ratios, "best_peer": best, "median": medians, "runs": found}


def table(result: dict[str, Any]) -> str:
    """Markdown: median (least-most) of every column, and the ratios below."""
    lines = ["| | " + " | ".join(title for title, _ in COLUMNS.values()) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
    for name, runs in result["runs"].items():
        cells = []
        for key in COLUMNS:
            values = [run[key] for run in runs]
            digits = 2 if key == "load" else 1 if median(values) < 100 else 0
            cells.append(f"{median(values):.{digits}f} ({min(values):.{digits}f}-{max(values):.{digits}f})")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    for name, ratio in result["ratios"].items():
        cells = [f"{ratio[key]:.2f}× {result['best_peer'][key]}" for key in COLUMNS]
        lines.append(f"| {name} to the best peer | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", metavar="DIR", nargs="+", help="folders that `specquant export` wrote")
    parser.add_argument("--env", type=Path, help="the folder that ../shared/peers/setup.sh filled")
    parser.add_argument("--runs", type=int, default=5, help="processes of each contender (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="default: %(default)s")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--worker", choices=CONTENDERS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        print(json.dumps(run_one(options.worker, options.models[0], options.threads)))
        return 0
    if options.env is None or not (options.env / "venv/bin/python").is_file():
        print("bench_peers: --env must name the folder that ../shared/peers/setup.sh filled", file=sys.stderr)
        return 2
    env = options.env.resolve()
    ours = {f"ours, {Path(model).name}" if len(options.models) > 1 else "ours": Path(model) for model in options.models}
    contenders = {name: (sys.executable, "ours", path) for name, path in ours.items()}
    contenders |= {name: (str(env / "venv/bin/python"), kind, path) for name, (kind, path) in prepare(env).items()}
    result = report(measure(contenders, options.runs, options.threads), list(ours))
    print(json.dumps(result) if options.json else table(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
