"""The paper's ablations and our recipe beside the paper's, each run exported and measured.

    python -m tools.ablation sample --text wiki.test.raw --calibration wiki.utf8 --results docs/results.md
    python -m tools.ablation sample --text wiki.test.raw --only table4 --windows 20 --samples 32 --latency

A run exports one recipe and measures perplexity from the artifact, through our runtime; on a GPU (--device cuda) it
quantises and measures the simulation in PyTorch instead. Its numbers go to a JSON file in --work and the artifact is
deleted; a run whose file is there is not repeated, so several processes can share the work (--share 0/3, 1/3, 2/3).
Tables are written from whatever runs are there.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import shlex
import sys
import tempfile
import time
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from specquant.custom_ops.errors import SpecQuantError
from specquant.exporter.artifact import manifest_of
from specquant.exporter.export import export
from specquant.exporter.families import family_of
from specquant.exporter.quantize import quantize
from specquant.exporter.recipe import Recipe, float_recipe, preset
from specquant.exporter.recipe_checks import METRICS
from specquant.exporter.simulate import simulate
from specquant.exporter.sources import Source, load_model, resolve, sha256
from specquant.exporter.text import calibration
from specquant.runtime import load
from specquant.runtime.cli_common import Progress, run_cli
from specquant.runtime.cli_options import read_text
from specquant.runtime.perplexity import PerplexityResult, perplexity
from specquant.runtime.stats import machine_info
from tools.latency import measure as measure_latency
from tools.report import table, write_section

Runs = dict[str, Recipe]
OFTEN = ("4-8-16", "4-4-16")
BRANCHES = (4, 8, 16, 24, 32)
BITS = {"4-16-16": 16, "4-8-16": 8, "4-4-16": 4}  # W-A-KV -> a_bits
TITLES = {
    "table3": "Smoothing and truncation (the paper's Table 3)",
    "table4": "K frequencies (the paper's Table 4)",
    "table5": "Importance metrics (the paper's Table 5)",
    "recipes": "From the paper's recipe to ours",
    "branch": "How large a branch 8-bit activations need",
    "choices": "What our recipe could do besides, on text to choose by",
}
# Branches of other sizes at the same bytes in all: SmolLM2's stages cost 1536, 1152, 3648 and 2112 numbers a column.
RANKS = {"qkv_proj": (64, 32), "o_proj": (48, 32), "gate_up_proj": (16, 24), "down_proj": (28, 44)}


def grouped(recipe: Recipe, size: int) -> Recipe:
    """With a weight scale for each `size` input features, and activations in groups as recipes have them by themselves;
    0: per channel, per token."""
    return replace(recipe, group_size=size, act_group=-1 if size else 0)


def no_branch(recipe: Recipe) -> Recipe:
    return replace(recipe, basis="none", subtract=False)


def tables(ks: list[int], group: int) -> dict[str, dict[str, Runs]]:
    """table -> row -> column -> recipe."""
    paper, klt = preset("paper"), preset("klt")

    def wide(recipe: Recipe, names: tuple[str, ...] = ("4-16-16", "4-4-16")) -> Runs:
        return {f"{bits} per channel": replace(grouped(recipe, 0), a_bits=BITS[bits]) for bits in names}

    def both(recipe: Recipe, names: tuple[str, ...] = ("4-16-16", "4-4-16")) -> Runs:
        return wide(recipe, names) | {
            f"{bits} groups of {group}": replace(grouped(recipe, group), a_bits=BITS[bits]) for bits in names
        }

    def ours(recipe: Recipe) -> Runs:
        runs = both(recipe)
        return {column: runs[column] for column in runs if column != "4-16-16 per channel"}

    def chosen(**changes: Any) -> Runs:
        recipe = replace(klt, **changes)
        return {f"{bits} groups of {group}": replace(grouped(recipe, group), a_bits=BITS[bits]) for bits in OFTEN}

    def ranks(index: int) -> Runs:
        sizes = {stage: {"k": both[index]} for stage, both in RANKS.items()}
        return chosen(descents=0, asymmetry=0.0, smooth=True, overrides=sizes)

    def branch(recipe: Recipe) -> Runs:
        return {f"4-8-16 groups of {group}": grouped(recipe, group)}

    plain = replace(klt, descents=0, asymmetry=0.0)
    bare = replace(plain, hadamard=0, clip_grid=(1.0,))
    return {
        "branch": {"none: preset fast": branch(no_branch(klt))}
        | {f"K = {k}": branch(replace(klt, k=k)) for k in BRANCHES}
        | {f"K = {k}, `--ranks fisher`": branch(replace(klt, k=k, ranks="fisher")) for k in (8, 16)},
        "choices": {
            "no descents, no asymmetry, smoothed": chosen(descents=0, asymmetry=0.0, smooth=True),
            "… two descents": chosen(descents=2, asymmetry=0.0, smooth=True),
            "… asymmetry 0.5": chosen(descents=0, smooth=True),
            "… both": chosen(descents=2, smooth=True),
            "… asymmetry 1": chosen(descents=0, asymmetry=1.0, smooth=True),
            "… asymmetry 0.5, not smoothed": chosen(descents=0),
            "preset klt: one descent, asymmetry 0.5": chosen(),
            "… two descents, asymmetry 0.5": chosen(descents=2),
            "klt, ranks by worth (`--ranks fisher`)": chosen(ranks="fisher"),
            "no descents, no asymmetry, smoothed, larger branches at qkv and o": ranks(0),
            "… a larger branch at down": ranks(1),
        },
        "table3": {
            "neither": both(replace(no_branch(paper), smooth=False)),
            "smoothing": both(no_branch(paper)),
            "truncation": both(replace(paper, smooth=False)),
            "both": both(paper),
        },
        "table4": {"no branch": wide(no_branch(paper))} | {f"K = {k}": wide(replace(paper, k=k)) for k in ks},
        "table5": {metric: wide(replace(paper, budget=metric)) for metric in METRICS},
        "recipes": {
            "paper": ours(paper),
            "no branch, nothing else": ours(no_branch(bare)),
            f"klt branch, r = {klt.k}, s = 1": ours(bare),
            "… and smoothing": ours(replace(bare, smooth=True)),
            "… and Hadamard, not smoothing": ours(replace(plain, clip_grid=(1.0,))),
            "… and clips": ours(plain),
            "… and a descent, asymmetry 0.5: preset klt": ours(klt),
            "klt and smoothing": ours(replace(klt, smooth=True)),
            "klt without the branch": ours(no_branch(klt)),
            "klt, s = 0": ours(replace(klt, subtract=False)),
            "klt, r = 64": ours(replace(klt, k=64)),
        },
    }


class Ablation:
    """The runs of one model, text and calibration."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.text = read_text(args.text)
        source = resolve(args.source)
        self.name = source.name
        self.about = {
            "source_sha256": sha256(*source.weight_files()),
            "text_sha256": hashlib.sha256(self.text.encode()).hexdigest(),
            "calibration": args.calibration if args.calibration == "builtin" else sha256(Path(args.calibration)),
            "windows": args.windows,
            "window": args.window,
        }

    def recipe(self, recipe: Recipe) -> Recipe:
        """With the calibration that was asked for."""
        changes = {k: v for k in ("samples", "sequence_length") if (v := getattr(self.args, k)) is not None}
        return replace(recipe, **changes)

    def file(self, recipe: Recipe, what: str = "run") -> Path:
        """Where a run's numbers are: a name to read, and the digest of everything that decides them."""
        recipe = self.recipe(recipe)
        fields = {k: v for k, v in recipe.to_dict().items() if k != "name"}
        digest = hashlib.sha256(json.dumps([fields, self.about], sort_keys=True).encode()).hexdigest()[:10]
        branch = "none" if recipe.basis == "none" else f"{recipe.basis}{recipe.k}-{recipe.budget}"
        smooth = "smooth" if recipe.smooth else "plain"
        bits = f"w{recipe.w_bits}a{recipe.a_bits}-g{recipe.group_size}"
        return Path(self.args.work) / f"{what}-{branch}-{smooth}-{bits}-{digest}.json"

    def found(self, recipe: Recipe, what: str = "run") -> dict[str, Any] | None:
        file = self.file(recipe, what)
        return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None

    def run(self, recipe: Recipe) -> None:
        """Export, measure, write the numbers. Nothing if they are there."""
        if self.found(recipe):
            return
        since, at = time.perf_counter(), self.recipe(recipe)
        print(f"{self.file(recipe).stem} …", file=sys.stderr, flush=True)
        manifest, result = self._exported(at) if self.args.device == "cpu" else self._simulated(at)
        self._write(
            self.file(recipe),
            {"recipe": at.to_dict(), "bits": manifest["bits"], "versions": manifest["versions"]}
            | {"seconds": time.perf_counter() - since, "device": self.args.device, "machine": machine_info()}
            | self.about
            | result,
        )

    def _exported(self, recipe: Recipe) -> tuple[dict[str, Any], dict[str, Any]]:
        """Manifest and perplexity of an artifact."""
        with tempfile.TemporaryDirectory(dir=self.args.work, prefix=".run-") as work:
            folder = Path(work) / "model"
            manifest = export(self.args.source, folder, recipe, calibration_text=self.args.calibration)
            model = load(folder, threads=self.args.threads, exact_logits=True)
            ids = model.encode(self.text, add_special_tokens=False)
            window = min(self.args.window, model.context)
            with Progress("perplexity", self.args.windows or len(ids) // window, "windows", quiet=False) as progress:
                result = perplexity(model.logit_blocks, ids, window, self.args.windows, progress.update)
        return manifest, result.as_dict()

    def _simulated(self, recipe: Recipe) -> tuple[dict[str, Any], dict[str, Any]]:
        """The same of the simulation, in memory."""
        device, (source, model, tokenizer) = self.args.device, self.loaded
        tokens = None
        if recipe.needs_calibration:
            tokens = calibration(self.args.calibration, tokenizer, recipe).tokens.to(device)
        decoder = quantize(copy.deepcopy(model), recipe, tokens)
        twin = simulate(copy.deepcopy(model), family_of(model.config), decoder).to(device)
        ids = tokenizer(self.text, add_special_tokens=False, verbose=False)["input_ids"]
        window = min(self.args.window, decoder.config.context_length)
        result = device_perplexity(twin, torch.tensor(ids, device=device), window, self.args.windows)
        return manifest_of(decoder, source, model, None), result.as_dict()

    @cached_property
    def loaded(self) -> tuple[Source, Any, Any]:
        source = resolve(self.args.source)
        model, tokenizer = load_model(source, "float32")
        return source, model.to(self.args.device), tokenizer

    def latency(self, runs: dict[str, Recipe]) -> None:
        """Time all of them in turn, on this CPU. How fast a model runs does not depend on its numbers, so these are
        rounded to nearest on two samples."""
        if all(self.found(recipe, "latency") for recipe in runs.values()):
            return
        with tempfile.TemporaryDirectory(dir=self.args.work, prefix=".latency-") as work:
            folders = {}
            for name, recipe in runs.items():
                folders[name] = Path(work) / str(len(folders))
                quick = replace(self.recipe(recipe), rounding="rtn", smooth_grid=(0.5,), samples=2)
                export(self.args.source, folders[name], quick, calibration_text=self.args.calibration)
            times = measure_latency(folders, self.args.threads)
        for name, recipe in runs.items():
            self._write(self.file(recipe, "latency"), times[name] | {"machine": machine_info()})

    def _write(self, file: Path, numbers: dict[str, Any]) -> None:
        part = file.with_suffix(".part")
        part.write_text(json.dumps(numbers, indent=1, ensure_ascii=False), encoding="utf-8")
        part.replace(file)


@torch.inference_mode()
def device_perplexity(model: Any, ids: torch.Tensor, window: int, windows: int | None) -> PerplexityResult:
    """`runtime.perplexity` of a transformers model, without its logits leaving the device. ids int64 [T]."""
    count = min(len(ids) // window, windows or len(ids))
    means = []
    for part in ids[: count * window].view(count, window):
        logits = model(part[None], use_cache=False).logits[0, :-1].float()
        means.append(torch.nn.functional.cross_entropy(logits, part[1:]).double())
    return PerplexityResult.of(torch.stack(means).cpu().numpy(), window)


def section(ablation: Ablation, name: str, rows: dict[str, Runs], command: str) -> str | None:
    """A table of docs/results.md; None without a single run."""
    columns = list(dict.fromkeys(column for runs in rows.values() for column in runs))
    cells, latency = [], False
    for row, runs in rows.items():
        results = [ablation.found(runs[column]) if column in runs else None for column in columns]
        line = [row, *("–" if r is None else f"{r['perplexity']:.2f}" for r in results)]
        if name == "table4":
            any_result = next((r for r in results if r), None)
            line.append("–" if any_result is None else f"{any_result['bits']['linear_bits_per_weight']:.2f}")
            times = ablation.found(runs["4-4-16 per channel"], "latency")
            latency = latency or times is not None
            line += [f"{times['prefill_ms']:.3g}", f"{times['decode_ms']:.3g}"] if times else ["–", "–"]
        cells.append(line)
    if all(cell == "–" for line in cells for cell in line[1:]):
        return None
    header = ["", *columns]
    text = [f"## {TITLES[name]}, {ablation.name}", f"    {command}"]
    reference = ablation.found(float_recipe())
    windows = "whole text" if ablation.args.windows is None else f"first {ablation.args.windows} windows"
    against = "" if reference is None else f"; full precision {reference['perplexity']:.2f}"
    text.append(f"Perplexity on {Path(ablation.args.text).name}, {windows}{against}. “–”: not run.")
    if name == "table4":
        header += ["bits per weight", "prefill ms", "decode ms"]
        if latency:
            text.append("Prefill of 512 tokens and decode of one, 4-4-16, medians of interleaved runs on this CPU.")
    return "\n\n".join([*text, table(header, cells)])


def plot(ablation: Ablation, rows: dict[str, Runs], ks: list[int], path: Path) -> None:
    """Perplexity over K, for the columns whose runs are all there."""
    from tools import plots

    curves = {}
    for column in rows["no branch"]:
        results = [ablation.found(rows[f"K = {k}"][column]) for k in ks]
        if all(results):
            curves[column] = [r["perplexity"] for r in results if r]
    if curves:
        plots.lines(path, ks, curves, "K", "perplexity", log=True)


def run(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="as for `specquant export`")
    parser.add_argument("--text", required=True, help="what perplexity is measured on")
    parser.add_argument("--calibration", default="builtin", help="a file, or builtin")
    parser.add_argument("--only", nargs="+", choices=TITLES, default=list(TITLES), help="some of the tables")
    parser.add_argument("--ks", type=int, nargs="+", default=[16, 32, 64], metavar="K")
    parser.add_argument("--group", type=int, default=64, metavar="N", help="input features that share a scale")
    parser.add_argument("--samples", type=int, help="calibration samples (default: the recipe's)")
    parser.add_argument("--sequence-length", type=int, help="tokens of each")
    parser.add_argument("--windows", type=int, help="only the first N windows of the text")
    parser.add_argument("--window", type=int, default=2048, help="tokens (default: %(default)s)")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--share", default="0/1", metavar="I/N", help="of N processes, this is number I, from 0")
    parser.add_argument("--report", action="store_true", help="run nothing more: only show what --work holds")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--latency", action="store_true", help="time the rows of table4 on this CPU")
    parser.add_argument("--work", type=Path, default=Path("build/ablation"), help="a JSON file a run")
    parser.add_argument(
        "--results", type=Path, help="Markdown file whose sections are written; the plot goes beside it"
    )
    args = parser.parse_args(arguments)
    args.work.mkdir(parents=True, exist_ok=True)
    ablation, all_tables = Ablation(args), tables(args.ks, args.group)
    shown = [Path(a).name if Path(a).is_absolute() else a for a in arguments]  # no path of this machine
    share, shares = (int(part) for part in args.share.split("/"))
    recipes = [recipe for name in args.only for runs in all_tables[name].values() for recipe in runs.values()]
    distinct = {ablation.file(recipe): recipe for recipe in [float_recipe(), *recipes]}
    for recipe in [] if args.report else list(distinct.values())[share::shares]:
        try:
            ablation.run(recipe)
        except SpecQuantError as error:  # a recipe that does not fit this model: the other runs go on
            print(error, file=sys.stderr)
    if shares > 1:
        return 0
    for name in args.only:
        rows = all_tables[name]
        if name == "table4" and args.latency and not args.report:
            ablation.latency({row: runs["4-4-16 per channel"] for row, runs in rows.items()})
        text = section(ablation, name, rows, f"python -m tools.ablation {shlex.join(shown)}")
        if text is None:
            continue
        print(text, end="\n\n")
        if args.results:
            if name == "table4":
                plot(ablation, rows, args.ks, args.results.parent / "perplexity_over_k.png")
                text += "\n\n![perplexity over K](perplexity_over_k.png)"
            write_section(args.results, name, text)
    return 0


if __name__ == "__main__":
    sys.exit(run_cli(lambda: run(sys.argv[1:]), prog="ablation"))
