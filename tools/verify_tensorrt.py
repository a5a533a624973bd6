"""An engine beside ONNX Runtime on the CPU: logits, greedy texts, times. tools/verify_tensorrt.sh runs it for each one.

    python -m tools.verify_tensorrt ARTIFACT ENGINE [--allow-host-code] [--cached]

Exit code 1 if the logits are too far apart, or the kernels that RTX compiled at the last run were not found again
(--cached: a second run, which should start faster).
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

PROMPTS = ["The capital of France is", "Once upon a time", "Water boils at"]
CONTEXT, BLOCK, STEPS = 1024, 512, 128


def largest_error(manifest: Any) -> float:
    """Of the logits: portable engines do not round activations, and custom ones round a few of them to the other side;
    in portable engines a 4-bit cache is of floats."""
    if manifest.model.kv_bits == 4:
        return 0.15
    return {16: 0.02, 8: 0.03}.get(min(layer.act_bits for layer in manifest.layers), 0.15)


def agreement(cpu: Any, gpu: Any, tokens: int) -> tuple[float, float]:
    """Relative difference of the logits of random tokens, and the share of positions whose likeliest token is the same.

    More tokens than a block, so that the cache is appended to.
    """
    ids = np.random.default_rng().integers(3, cpu.manifest.model.vocab_size, tokens)
    expected, actual = cpu.logits(ids), gpu.logits(ids)
    error = np.linalg.norm(actual - expected) / np.linalg.norm(expected)
    same = (actual.argmax(-1) == expected.argmax(-1)).mean()
    return float(error) if np.isfinite(actual).all() else float("inf"), float(same)


def times(model: Any, prompt: int, steps: int) -> tuple[float, float]:
    """Tokens a second of a prompt, and of decoding one row after it; the first of each compiles kernels, untimed."""
    ids = np.random.default_rng().integers(3, model.manifest.model.vocab_size, prompt)
    sequences = model._backend.sequences(1)
    sequences.prefill_last(0, ids)
    sequences.rewind(0, 0)
    since = perf_counter()
    sequences.prefill_last(0, ids)
    prefill = perf_counter() - since
    for _ in range(8):
        sequences.decode(ids[:1])
    since = perf_counter()
    for _ in range(steps):
        sequences.decode(ids[:1])
    return prompt / prefill, steps / (perf_counter() - since)


def main() -> int:
    from specquant.runtime.session import load

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact", type=Path)
    parser.add_argument("engine", type=Path)
    parser.add_argument("--allow-host-code", action="store_true", help="its plugins come with the engine")
    parser.add_argument("--cached", action="store_true", help="only whether a second run finds the compiled kernels")
    args = parser.parse_args()
    kept = args.engine / "runtime.cache"
    before = kept.stat().st_size if kept.is_file() else 0
    since = perf_counter()
    gpu = load(
        args.artifact, backend="tensorrt", engine=args.engine, context=CONTEXT, allow_host_code=args.allow_host_code
    )
    text = "".join(gpu.generate(PROMPTS[0], max_new_tokens=8))
    print(f"first text after {perf_counter() - since:.1f} s, {before / 1e6:.1f} MB of compiled kernels found: {text!r}")
    if args.cached:
        return 0 if before else 1
    cpu = load(args.artifact, context=CONTEXT, exact_logits=True)
    error, same = agreement(cpu, gpu, 700)
    bound = largest_error(cpu.manifest)
    print(f"relative difference of the logits {error:.4f} (at most {bound}), same likeliest token {same:.1%}")
    texts = [model.generate_batch(PROMPTS, max_new_tokens=32) for model in (cpu, gpu)]
    for prompt, one, other in zip(PROMPTS, *texts, strict=True):
        print(f"  {prompt!r}\n    ORT      {one!r}\n    TensorRT {other!r}")
    prefill, decode = times(gpu, BLOCK, STEPS)
    print(f"prefill of {BLOCK} tokens: {prefill:,.0f} tokens/s; decode at batch 1: {decode:,.0f} tokens/s")
    return 0 if error <= bound else 1


if __name__ == "__main__":
    from specquant.runtime.cli_common import run_cli

    sys.exit(run_cli(main))
