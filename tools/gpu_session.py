"""All that a short session on a machine with a GPU should do, in one command: builds the kernels there, tests them,
looks for wrong accesses and races, times them, and runs an artifact by ONNX Runtime on the GPU beside the CPU.

    python3 tools/gpu_session.py --out $OUT                 # everything, in order
    python3 tools/gpu_session.py --out $OUT --budget 560    # as much as 560 s allow; the next call goes on from there
    python3 tools/gpu_session.py --out $OUT --model smollm2.gguf --calibration wiki.utf8 --text wiki.test.raw

Needs nvcc, CMake, pytest and torch. Nothing is installed but with --onnxruntime: a folder of the wheel of
onnxruntime-gpu, or of its parts, part.00, part.01, … (joined, they are a tar archive of it); it takes the place of an
installed onnxruntime. The artifact is of --model, without one of random weights.
Steps have time limits, and one that fails does not stop those after it. --out gets session.json
(steps, seconds, exit codes, the JSON lines that they printed) and session.log (all output).
"""

from __future__ import annotations

import argparse
import glob
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
WORK = ROOT / "build" / "gpu"
TAIL = 4000  # characters of a step's output that session.json keeps
PYTHON = sys.executable
LEAST = 20  # seconds that a step is started with
SANITIZED = "rotary or (reference and (window or step)) or extreme or levels_are_exact or refused or seed or finite"


@dataclass(frozen=True)
class Step:
    """A shell command, and the seconds that it may take."""

    name: str
    command: str
    limit: int


def steps(architecture: str, source: str = "", text: str = "") -> list[Step]:
    """In the order in which they are worth most. source: options that name a model; text: one to measure it on."""
    files = ("kernels", "first_stage", "attention", "prompt_attention", "branch", "sample")
    kernels = " ".join(f"tests/custom_ops/test_cuda_{file}.py" for file in files)
    pytest = f"{PYTHON} -m pytest -q -p no:cacheprovider"
    sanitizer = "compute-sanitizer --error-exitcode 9 --target-processes all --tool"
    cmake = f"cmake -S . -B {WORK}/cmake -DCMAKE_BUILD_TYPE=Release -DSPECQUANT_CUDA=ON"
    artifact, command = WORK / "artifact", f"{PYTHON} -m specquant.runtime.cli"
    return [
        Step(
            "machine",
            f"nvidia-smi; nvcc --version | tail -2; {PYTHON} -c 'import torch; print(torch.version.cuda)'",
            60,
        ),
        Step(
            "build",
            f"{cmake} -DSPECQUANT_CUDA_ARCHITECTURES={architecture} && cmake --build {WORK}/cmake -j "
            f"--target specquant_cuda specquant_cpu",
            420,
        ),
        Step("kernel tests", f"{pytest} {kernels}", 240),
        Step("attention times", f"{PYTHON} -m tools.bench_cuda_attention --json --kernels", 120),
        Step("sampling times", f"{PYTHON} -m tools.bench_sample_cuda --json --rows 1 8", 60),
        Step("decoding times, 8B", f"{PYTHON} -m tools.bench_decode_cuda --json --kernels", 120),
        Step("matmul times, groups of 64", f"{PYTHON} -m tools.bench_cuda_kernels --json --tokens 1 16 256 4096", 120),
        Step(
            "matmul times, no groups",
            f"{PYTHON} -m tools.bench_cuda_kernels --json --group-size 0 --act-group 0 --tokens 1 16 256 4096 8192",
            120,
        ),
        Step("artifact", f"{PYTHON} tools/gpu_session.py --write-artifact {artifact} {source}", 240),
        Step("runtime tests", f"{pytest} tests/runtime/test_onnx_cuda.py tests/custom_ops/test_cuda_ort.py", 180),
        Step("agreement", f"{PYTHON} tools/gpu_session.py --compare {artifact} {text}", 180),
        Step("decoding times, GPU", f"{command} bench {artifact} --device cuda --json -q", 120),
        Step("decoding times, CPU", f"{command} bench {artifact} --json -q -r 2", 120),
        Step("memcheck", f"{sanitizer} memcheck {pytest} {kernels} -k '{SANITIZED}'", 240),
        Step("racecheck", f"{sanitizer} racecheck {pytest} {kernels} -k '{SANITIZED}'", 300),
        Step(
            "block times",
            f"{PYTHON} -m tools.bench_block --json --models llama-2-7b llama-3-8b --sequences 256 2048 --rank 32",
            200,
        ),
        Step(
            "kernel by kernel",
            f"{PYTHON} -m tools.bench_cuda_kernels --kernels --shapes 4096x14336 --tokens 1 4096",
            90,
        ),
    ]


def environment(onnxruntime: Path | None) -> dict[str, str]:
    """The packages from where they lie, the libraries from where they are built, CUDA's from torch's wheels."""
    source = WORK / "src"
    for package in ("exporter", "runtime", "custom_ops"):
        link = source / "specquant" / package
        link.parent.mkdir(parents=True, exist_ok=True)
        if not link.is_symlink():
            link.symlink_to(ROOT / package)
    about = source / "specquant-0.1.0.dist-info"
    about.mkdir(exist_ok=True)
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: specquant\nVersion: 0.1.0\n", encoding="utf-8")
    paths = [source, ROOT, *([WORK / "site"] if onnxruntime else [])]
    libraries = [path for root in sys.path for path in glob.glob(f"{root}/nvidia/*/lib")]
    built = WORK / "cmake" / "custom_ops"
    return os.environ | {
        "PYTHONPATH": os.pathsep.join(map(str, paths)),
        "PYTHONUNBUFFERED": "1",
        "LD_LIBRARY_PATH": os.pathsep.join([*libraries, os.environ.get("LD_LIBRARY_PATH", "")]),
        "SPECQUANT_LIBRARY": str(built / "libspecquant_cpu.so"),
        "SPECQUANT_CUDA_LIBRARY": str(built / "kernels" / "cuda" / "libspecquant_cuda.so"),
    }


def install(folder: Path) -> None:
    """onnxruntime-gpu from its wheel, or the parts of an archive of it, beside everything else."""
    wheels = WORK / "wheels"
    wheels.mkdir(parents=True, exist_ok=True)
    parts = sorted(folder.glob("**/part.*"))
    if parts:
        join = f"cat {' '.join(map(str, parts))} | tar -C {wheels} -xf -"
        subprocess.run(join, shell=True, check=True)
    found = [str(path) for path in [*wheels.glob("*.whl"), *folder.glob("*.whl")]]
    pip = [sys.executable, "-m", "pip"]
    options = ["install", "-q", "--no-index", "--no-deps", "--upgrade", "--target", str(WORK / "site")]
    subprocess.run([*pip, *options, *found], check=True)
    subprocess.run([*pip, "uninstall", "-q", "-y", "onnxruntime"], check=False)  # the two overwrite each other


def run_step(step: Step, limit: float, log: Path, variables: dict[str, str]) -> dict[str, Any]:
    """What came of it: exit code (124: out of time), seconds, the end of its output and the JSON objects in it."""
    since = time.monotonic()
    command = ["timeout", "-k", "5", str(int(limit)), "bash", "-c", step.command]
    done = subprocess.run(
        command, cwd=ROOT, env=variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    )
    with log.open("a", encoding="utf-8") as file:
        file.write(f"== {step.name}: {step.command}\n{done.stdout}\n== exit code {done.returncode}\n\n")
    lines = []
    for line in done.stdout.splitlines():
        if line.startswith("{"):
            try:
                lines.append(json.loads(line))
            except ValueError:
                continue
    seconds = round(time.monotonic() - since, 1)
    tail = done.stdout[-TAIL:]
    return {"command": step.command, "rc": done.returncode, "seconds": seconds, "tail": tail, "lines": lines}


def write_artifact(folder: Path, args: argparse.Namespace) -> None:
    """The model of --model by the default recipe; else random weights of SmolLM2-135M's sizes with a 4-bit cache, whose
    activations stay whole, since rounding of random layers multiplies every difference. float16 between the ops."""
    import torch

    from specquant.exporter.export import export
    from specquant.exporter.recipe import Recipe
    from specquant.exporter.text import BUILTIN
    from tests.model_folder import CORPUS, fresh_seed, random_llama, save_model_folder

    device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.model:
        text = str(args.calibration or BUILTIN)
        export(args.model, folder, Recipe(float_type="float16"), calibration_text=text, device=device, force=True)
        return
    sizes = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": args.layers, "num_attention_heads": 9}
    sizes |= {"num_key_value_heads": 3, "max_position_embeddings": 2048, "vocab_size": 49152}
    source = save_model_folder(folder.with_name("source"), random_llama(fresh_seed(), init=0.04, **sizes))
    text = folder.with_name("calibration.txt")
    text.write_text(CORPUS[0] * 400, encoding="utf-8")
    recipe = Recipe(samples=8, sequence_length=64, a_bits=16, kv_bits=4, float_type="float16")
    export(str(source), folder, recipe, calibration_text=str(text), device=device, force=True)


def compare(folder: Path, text: Path | None) -> int:
    """The GPU beside the CPU, as a JSON line; 1 if they are too far apart. Compared are logits of a prompt and steps,
    or, with a text, its perplexity (10 windows) and what 10 of its paragraphs are continued with (32 greedy tokens).
    """
    import numpy as np

    from specquant.runtime import load
    from specquant.runtime.perplexity import perplexity

    models = {device: load(folder, device=device, context=2048, exact_logits=True) for device in ("cpu", "cuda")}
    captured = models["cuda"]._backend.graph.capture  # type: ignore[attr-defined]
    if text:
        content = text.read_text(encoding="utf-8")
        ids = models["cpu"].encode(content[:400_000], add_special_tokens=False)
        found = {k: perplexity(m.logit_blocks, ids, 2048, 10).perplexity for k, m in models.items()}
        starts = [line.strip()[:300] for line in content.splitlines() if len(line) > 600][:10]
        texts = {k: ["".join(m.generate(start, max_new_tokens=32)) for start in starts] for k, m in models.items()}
        same = sum(a == b for a, b in zip(texts["cpu"], texts["cuda"], strict=True))
        apart = abs(found["cuda"] / found["cpu"] - 1)
        print(
            json.dumps(
                {"perplexity": found, "apart": apart, "same_texts": same, "of": len(starts), "captured": captured}
            )
        )
        return 0 if apart < 0.002 else 1
    rng = np.random.default_rng()
    ids = rng.integers(3, models["cpu"].manifest.model.vocab_size, 700)
    logits = {device: model.logits(ids) for device, model in models.items()}
    rows = {device: model.sequences(1) for device, model in models.items()}
    errors = [float(np.linalg.norm(logits["cuda"] - logits["cpu"]) / np.linalg.norm(logits["cpu"]))]
    for row in rows.values():
        row.prefill_last(0, ids[:300])
    for token in ids[300:340]:
        step = {device: row.decode(token[None]) for device, row in rows.items()}
        errors.append(float(np.linalg.norm(step["cuda"] - step["cpu"]) / np.linalg.norm(step["cpu"])))
    same = float((logits["cuda"].argmax(-1) == logits["cpu"].argmax(-1)).mean())
    print(
        json.dumps({"prompt_error": errors[0], "step_error": max(errors[1:]), "same_token": same, "captured": captured})
    )
    return 0 if max(errors) < 0.05 and np.isfinite(logits["cuda"]).all() else 1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=WORK / "out", help="folder for session.json and session.log")
    parser.add_argument("--architectures", default="90-real", help="for nvcc; default: %(default)s, an H100 or H200")
    parser.add_argument("--budget", type=float, default=1e9, help="seconds for this call; default: no limit")
    parser.add_argument("--onnxruntime", type=Path, help="folder of the wheel of onnxruntime-gpu, or of its parts")
    parser.add_argument("--model", help="what `specquant export` takes, for the artifact")
    parser.add_argument("--calibration", type=Path, metavar="FILE", help="text for it")
    parser.add_argument("--text", type=Path, metavar="FILE", help="what the artifact is measured on")
    parser.add_argument("--only", nargs="+", metavar="STEP", help="these steps alone, done before or not")
    parser.add_argument("--again", action="store_true", help="steps that passed before, too")
    parser.add_argument("--list", action="store_true", help="print the steps and end")
    parser.add_argument("--write-artifact", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--layers", type=int, default=30, help=argparse.SUPPRESS)
    parser.add_argument("--compare", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.write_artifact:
        write_artifact(args.write_artifact, args)
        return 0
    if args.compare:
        return compare(args.compare, args.text if args.model else None)
    source = f"--model {shlex.quote(args.model)}" if args.model else ""
    text = f"{source} --text {args.text}" if args.model and args.text else ""
    if args.model and args.calibration:
        source += f" --calibration {args.calibration}"
    plan = steps(args.architectures, source, text)
    if args.list:
        print("\n".join(f"{step.name} (at most {step.limit} s): {step.command}" for step in plan))
        return 0
    if unknown := set(args.only or ()) - {step.name for step in plan}:
        parser.error(f"no step is called {', '.join(sorted(unknown))}")
    end = time.monotonic() + args.budget
    args.out.mkdir(parents=True, exist_ok=True)
    WORK.mkdir(parents=True, exist_ok=True)
    kept = WORK / "session.json"
    results: dict[str, Any] = {} if args.again or not kept.is_file() else json.loads(kept.read_text(encoding="utf-8"))
    variables = environment(args.onnxruntime)
    if args.onnxruntime and not (WORK / "site" / "onnxruntime").is_dir():
        install(args.onnxruntime)
    if args.only:
        plan = [step for step in plan if step.name in args.only]
    else:  # the build, then what has not been run yet, then what failed
        plan = [step for step in plan if results.get(step.name, {}).get("rc") != 0]
        plan.sort(key=lambda step: (step.name != "build", step.name in results))
    for step in plan:
        left = end - time.monotonic() - 5
        if left < LEAST:
            print(f"{step.name}: no time left")
            continue
        results[step.name] = result = run_step(step, min(step.limit, left), args.out / "session.log", variables)
        print(f"{step.name}: exit code {result['rc']} after {result['seconds']} s", flush=True)
        if result["rc"]:
            print("    " + result["tail"][-600:].replace("\n", "\n    "), flush=True)
        kept.write_text(json.dumps(results, indent=1), encoding="utf-8")
        shutil.copy(kept, args.out / "session.json")
    return 0 if results and all(result["rc"] == 0 for result in results.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
