"""`specquant export`, alias `specquant-export`: argument parsing and progress only."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from specquant.custom_ops.errors import SpecQuantError
from specquant.runtime.cli_common import Parser, Progress, add_verbosity, note, run_cli

EPILOG = """examples:
  specquant export sample -o build/smollm2
  specquant export HuggingFaceTB/SmolLM2-1.7B-Instruct -o smollm2-1.7b
  specquant export ./my-llama -o my-llama-444 --a-bits 4 --kv-bits 4
  specquant export ./my-llama -o my-llama-444 --preset refined --a-bits 4 --kv-bits 4 --calibration my.txt --device cuda
  specquant export model.gguf -o paper --preset paper --calibration my-text.txt
  specquant export sample -o float --w-bits 16 --a-bits 16        (not quantised)
  specquant export sample -o x --print-recipe > recipe.yaml       (then edit it, and: --recipe recipe.yaml)

presets:
  klt      4-bit weights in groups of 64 and 8-bit activations, rotated by Hadamard transforms; a 16-bit branch along
           the 32 directions of the activations that carry most energy, which are taken out before the activations are
           quantised. The default: the most accurate.
  refined  klt, then taught the float model's predictions: closest to it, for --device cuda and a --calibration file
           of 2 MB or more. Costs nothing at run time.
  fast     klt without the branch: some 2 % more perplexity, and a small model is a third faster on a CPU.
  paper    SpecQuant as published: 4-bit activations too, Fourier basis with 16 frequencies, one scale per output
           channel and per token.

W-A bits say how weights and activations are stored: 4-8 (default), 4-4 (--a-bits 4), 4-16. --kv-bits 4 stores keys
and values in 4 bits as well.
"""
# option -> (recipe field, type, help)
_FIELDS: dict[str, tuple[str, Any, str]] = {
    "--w-bits": ("w_bits", int, "bits of a weight: 4, or 16 for none quantised"),
    "--a-bits": ("a_bits", int, "bits of an activation: 2…8, or 16 for none quantised"),
    "--kv-bits": ("kv_bits", int, "bits of the KV cache: 4 or 16"),
    "--head-bits": ("head_bits", int, "bits of the head: 8 or 4, or 16 for none quantised"),
    "--basis": ("basis", str, "low-frequency basis: klt, dft or none"),
    "--k": ("k", int, "frequencies (dft, rank 2k - 1) or directions (klt, rank k) of the branch"),
    "--ranks": ("ranks", str, "uniform, or fisher: more directions where they are worth more, at the same size in all"),
    "--group-size": ("group_size", int, "input features that share a weight scale; 0: per channel"),
    "--act-group": (
        "act_group",
        int,
        "input features that share an activation scale; 0: per token; -1: 64 below 8 bits",
    ),
    "--hadamard": ("hadamard", int, "largest block of the Hadamard transform of activations; 0: none"),
    "--budget": (
        "budget",
        str,
        "how frequencies are spread over channels: act, entropy, abs_mean, abs_max, l2, uniform",
    ),
    "--rounding": ("rounding", str, "gptq or rtn"),
    "--damping": ("damping", float, "of GPTQ's Hessian, as a share of its mean diagonal"),
    "--descents": ("descents", int, "passes over the integers after GPTQ"),
    "--asymmetry": ("asymmetry", float, "how far weights follow the float model's inputs (GPTAQ): 0, not, to 1"),
    "--samples": ("samples", int, "calibration samples"),
    "--sequence-length": ("sequence_length", int, "tokens of a calibration sample"),
    "--refine-steps": ("refine_steps", int, "steps of teaching it the float model's predictions (best on a GPU)"),
    "--refine-lr": ("refine_lr", float, "learning rate of these steps, as a relative change"),
    "--refine-batch": ("refine_batch", int, "samples of one such step"),
    "--refine-samples": ("refine_samples", int, "samples these steps see (default: those of the calibration)"),
    "--seed": ("seed", int, "draws the samples; the same seed gives the same model"),
    "--float-type": ("float_type", str, "floats of the graph: float32 or float16"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "Quantise a language model and write it as a folder that ONNX Runtime and `specquant` run."
    parser.epilog = EPILOG
    parser.add_argument("source", metavar="MODEL", help="a folder, a hub id, a .gguf file, or `sample` (SmolLM2-135M)")
    parser.add_argument("-o", "--output", metavar="DIR", required=True, type=Path, help="the folder to make")
    parser.add_argument("--revision", metavar="REV", help="of a hub model: branch, tag or commit")
    parser.add_argument("--force", action="store_true", help="replace DIR if it is an exported model")
    parser.add_argument("--context-length", type=int, metavar="N", help="tokens, to shorten the model's")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="where to quantise (default: cpu)")
    parser.add_argument("--threads", type=int, metavar="N", help="default: all cores")
    parser.add_argument(
        "--calibration",
        default="builtin",
        metavar="TEXT",
        help="a UTF-8 file, hub:NAME[/CONFIG][#SPLIT], or builtin (default): text that comes with specquant",
    )
    recipe = parser.add_argument_group("recipe", "A preset, or a YAML file, and what differs from it.")
    recipe.add_argument("--preset", metavar="NAME", help="klt (default), refined, fast or paper")
    recipe.add_argument("--recipe", metavar="FILE", type=Path, help="YAML, as --print-recipe writes it")
    for option, (field, kind, text) in _FIELDS.items():
        recipe.add_argument(option, dest=field, type=kind, metavar="X", help=text)
    for field, text in (
        ("subtract", "take the branch's part out of the activation first"),
        ("smooth", "smooth outliers"),
    ):
        recipe.add_argument(f"--{field}", action=argparse.BooleanOptionalAction, help=text)
    recipe.add_argument("--print-recipe", action="store_true", help="print the recipe as YAML and stop")
    parser.add_argument("--json", action="store_true", help="print the manifest (specquant.json) at the end")
    add_verbosity(parser)


def recipe_of(args: argparse.Namespace) -> Any:
    """The recipe that the arguments describe. Raises SpecQuantError if they contradict each other."""
    from specquant.exporter.recipe import Recipe, float_recipe, preset

    if args.preset and args.recipe:
        raise SpecQuantError("--preset and --recipe exclude each other; put `preset: NAME` into the file")
    names = [field for field, _, _ in _FIELDS.values()] + ["subtract", "smooth"]
    changes = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    if args.recipe:
        base = Recipe.from_yaml(args.recipe)
    elif changes.get("w_bits") == 16 and changes.get("a_bits") == 16 and not args.preset:
        base = float_recipe()
    else:
        base = preset(args.preset or "klt")
    if changes.get("basis") == "none":
        changes.setdefault("subtract", False)
    return replace(base, **changes)


class Steps:
    """Shows export's report: one line a step, a bar where a step counts."""

    def __init__(self, quiet: bool) -> None:
        self.quiet, self.step, self.since = quiet, "", time.perf_counter()
        self.bar: Progress | None = None
        self.shown = 0

    def __call__(self, what: str, done: int, total: int) -> None:
        if what != self.step:
            self.close()
            self.step, self.shown = what, 0
            if not self.quiet:
                print(f"{what} …", file=sys.stderr, flush=True)
            if total > 1:
                self.bar = Progress(what, total, "blocks" if what == "quantising" else "steps", self.quiet)
        if self.bar:
            self.bar.update(done - self.shown)
            self.shown = done

    def close(self) -> None:
        if self.bar:
            self.bar.__exit__(None, None, None)
            self.bar = None


def run(args: argparse.Namespace) -> int:
    if args.quiet:
        os.environ["TQDM_DISABLE"] = "1"  # the loaders' own bars; read when tqdm is imported
    recipe = recipe_of(args)
    if args.print_recipe:
        print(recipe.to_yaml(), end="")
        return 0
    import torch

    from specquant.exporter.export import export

    if args.threads is not None:
        if args.threads < 1:
            raise SpecQuantError("--threads must be 1 or more")
        torch.set_num_threads(args.threads)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # clean up as for Ctrl-C
    steps, since = Steps(args.quiet), time.perf_counter()
    try:
        manifest = export(
            args.source,
            args.output,
            recipe,
            revision=args.revision,
            calibration_text=args.calibration,
            context_length=args.context_length,
            device=args.device,
            force=args.force,
            report=steps,
        )
    finally:
        steps.close()
    if args.json:
        print(json.dumps(manifest, indent=2, ensure_ascii=False))
        return 0
    bits, size = manifest["bits"], sum(f["size"] for f in manifest["files"].values())
    note(args, f"done in {time.perf_counter() - since:.0f} s")
    linear_bits = bits["linear_bits_per_weight"]
    print(f"{args.output}: {manifest['name']}, {size / 1e6:.0f} MB, {linear_bits:.2f} bits a weight in its linears")
    note(args, f"try: specquant generate {args.output} --chat 'What is the capital of France?'")
    return 0


def main() -> int:
    """Entry point of `specquant-export`."""

    def go() -> int:
        parser = Parser(prog="specquant-export")
        add_arguments(parser)
        return run(parser.parse_args())

    return run_cli(go, prog="specquant-export", verbose="-v" in sys.argv or "--verbose" in sys.argv)


if __name__ == "__main__":
    sys.exit(main())
