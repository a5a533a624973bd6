"""`specquant inspect`: the card of an exported model."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from specquant.runtime.artifact import Manifest
from specquant.runtime.cli_common import add_verbosity
from specquant.runtime.cli_options import checked_manifest

EPILOG = """examples:
  specquant inspect build/smollm2
  specquant inspect build/smollm2 --verify        (also: is every file as it was exported?)
  specquant inspect build/smollm2 --json | jq .bits

In the table, a rank of 0 is no branch, a group of 0 is one scale per output, clip is the share of the range that the
levels of activations span, rotated the block of the Hadamard transform, alpha is the smoothing exponent, bits/w counts
scales and branch, and error is |y - y'|^2 / |y|^2 on the calibration text.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "Print what an exported model is: its source, recipe, bits per weight, layers and evaluation."
    parser.epilog = EPILOG
    parser.add_argument("model", metavar="DIR", help="the folder that `specquant export` made")
    parser.add_argument("--verify", action="store_true", help="check the sha256 of every file")
    parser.add_argument("--json", action="store_true", help="print the manifest as JSON")
    add_verbosity(parser)


def run(args: argparse.Namespace) -> int:
    manifest = checked_manifest(args.model, args.verify, args.quiet)
    if args.json:
        verified = {"verified": True} if args.verify else {}
        print(json.dumps(asdict(manifest) | verified, indent=2, ensure_ascii=False))
    else:
        print("\n".join(card(manifest, args.verify)))
    return 0


def card(manifest: Manifest, verified: bool) -> list[str]:
    """The lines of the model card."""
    model = manifest.model
    heads = f"{model.num_heads} heads ({model.num_kv_heads} for keys and values) of {model.head_dim}"
    size = sum(info.size for info in manifest.files.values())
    rows = [
        ("name", manifest.name),
        ("source", _pairs(manifest.source)),
        ("created", manifest.created),
        ("made with", _pairs(manifest.versions)),
        ("model", f"{model.family}, {model.num_layers} layers, hidden {model.hidden_size}, {heads}"),
        ("", f"vocabulary {model.vocab_size:,}, context {model.context_length:,}, floats {model.float_type}"),
        ("head", f"{model.head_bits} bits" + (", tied to the embedding" if model.tied_embeddings else "")),
        ("KV cache", f"{model.kv_bits} bits, {model.cache_bytes_per_token:,} bytes a token"),
        ("recipe", _pairs(manifest.recipe)),
        ("calibration", _pairs(manifest.calibration or {})),
        ("bits per weight", _bits(manifest)),
        ("size", f"{_mib(size)} in {len(manifest.files)} files{', all verified' if verified else ''}"),
        ("tensors", ", ".join(f"{kind} {_mib(count)}" for kind, count in manifest.bits.tensor_bytes.items())),
    ]
    lines = [f"{label:<16} {text}" for label, text in rows if text]
    lines += [_evaluation(name, values) for name, values in manifest.evaluation.items()]
    if manifest.layers:
        lines += ["", *_layer_table(manifest)]
    return lines


def _layer_table(manifest: Manifest) -> list[str]:
    header = ("layer", "in", "out", "rank", "group", "act bits", "clip", "rotated", "alpha", "bits/w", "error")
    rows = [
        (
            layer.name,
            str(layer.in_features),
            str(layer.out_features),
            str(layer.rank),
            str(layer.group_size),
            str(layer.act_bits),
            _number(layer.act_clip, 2),
            str(layer.hadamard),
            _number(layer.alpha, 2),
            _number(layer.bits_per_weight, 3),
            "-" if layer.error is None else f"{layer.error:.2e}",
        )
        for layer in manifest.layers
    ]
    return aligned([header, *rows])


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns of equal width, the first to the left and the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]


def _bits(manifest: Manifest) -> str:
    bits = manifest.bits
    parts = [
        f"{_number(value, 3)} {of}"
        for value, of in ((bits.linear_bits_per_weight, "in the linears"), (bits.model_bits_per_weight, "in all"))
        if value is not None
    ]
    return ", ".join(parts)


def _evaluation(name: str, values: dict[str, Any]) -> str:
    """A row that `specquant eval ppl` or `zeroshot` has recorded."""
    counts = ("tokens", "windows", "window", "limit")
    about = ", ".join(f"{key} {values[key]:,}" for key in counts if isinstance(values.get(key), int))
    tasks = values.get("tasks")
    if isinstance(tasks, dict):
        average = values.get("average")
        percent = _number(100 * average if isinstance(average, float) else None, 2)
        return f"{'zero-shot':<16} {percent} % on average of {len(tasks)} tasks{about and f' ({about})'}"
    return f"{'perplexity':<16} {_number(values.get('perplexity'), 4)} on {name} ({about})"


def _pairs(values: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in values.items() if value is not None)


def _number(value: Any, digits: int) -> str:
    return f"{value:.{digits}f}" if isinstance(value, int | float) else "-"


def _mib(size: int) -> str:
    return f"{size / 2**20:,.1f} MiB"
