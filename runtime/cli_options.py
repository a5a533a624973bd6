"""Options that the commands which run a model have in common: how it is loaded and how tokens are drawn."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

from specquant.custom_ops.errors import SpecQuantError
from specquant.runtime.artifact import Manifest, open_artifact
from specquant.runtime.cli_common import Progress, note
from specquant.runtime.generate import Model
from specquant.runtime.sampling import Sampling
from specquant.runtime.session import BACKENDS, DEVICES, load


def add_load_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("model")
    group.add_argument("--threads", type=int, metavar="N", help="default: the physical cores it may use")
    group.add_argument("--device", default="cpu", help=f"{', '.join(DEVICES)} (default: %(default)s)")
    group.add_argument("--backend", default="onnxruntime", help=f"{', '.join(BACKENDS)} (default: %(default)s)")
    group.add_argument("--engine", metavar="DIR", help="of `specquant build` (default: the one for this GPU)")
    group.add_argument("--allow-host-code", action="store_true", help="run the plugin library that an engine carries")
    group.add_argument("--context", type=int, metavar="N", help="tokens of context (default: the model's)")
    group.add_argument("--rank", type=int, metavar="N", help="columns of each spectral branch to use (default: all)")
    group.add_argument(
        "--no-custom-ops",
        dest="custom_ops",
        action="store_false",
        help="use the standard operators that travel in the file, not our kernels: slower",
    )
    group.add_argument(
        "--exact-logits",
        action="store_true",
        help="read an 8-bit head as a whole for every token, also for logits of 10 and more below the largest",
    )
    group.add_argument("--verify", action="store_true", help="check the sha256 of every file first")


def add_sampling_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("sampling", "Greedy unless --temperature is over 0; off at the default.")
    group.add_argument("-n", "--max-new-tokens", type=int, default=256, metavar="N", help="default: %(default)s")
    group.add_argument("--temperature", type=float, default=0.0, metavar="T", help="default: %(default)s")
    group.add_argument("--top-k", type=int, default=0, metavar="K", help="keep the K likeliest tokens")
    group.add_argument("--top-p", type=float, default=1.0, metavar="P", help="keep the likeliest tokens up to P")
    group.add_argument("--repetition-penalty", type=float, default=1.0, metavar="R", help="over 1: repeat less")
    group.add_argument("--seed", type=int, metavar="S", help="the same seed gives the same text")
    group.add_argument("--stop", action="append", metavar="TEXT", help="end before this text; may be given again")


def sampling_options(args: argparse.Namespace) -> dict[str, Any]:
    """The keyword arguments of Model.generate. Raises SpecQuantError when one is out of range."""
    sampling = {name: getattr(args, name) for name in ("temperature", "top_k", "top_p", "repetition_penalty", "seed")}
    Sampling(**sampling)  # checks them now, not once the model is loaded
    return sampling | {"max_new_tokens": args.max_new_tokens, "stop": args.stop}


def checked_manifest(folder: str, verify: bool, quiet: bool) -> Manifest:
    """open_artifact, with a bar while it hashes."""
    manifest = open_artifact(folder)
    if verify:
        total = sum(info.size for info in manifest.files.values())
        with Progress("verifying", total, "B", quiet, unit_scale=True) as progress:
            open_artifact(folder, verify=True, progress=progress.update)
    return manifest


def load_model(args: argparse.Namespace) -> Model:
    checked_manifest(args.model, args.verify, args.quiet)
    since = time.perf_counter()
    model = load(
        args.model,
        device=args.device,
        threads=args.threads,
        rank=args.rank,
        custom_ops=args.custom_ops,
        context=args.context,
        backend=args.backend,
        engine=args.engine,
        allow_host_code=args.allow_host_code,
        exact_logits=args.exact_logits,
    )
    if args.verbose:
        note(args, f"loaded {model.manifest.name} in {time.perf_counter() - since:.1f} s, context {model.context}")
    return model


def read_text(path: str) -> str:
    """A UTF-8 text file as one string, newlines as they are. Raises SpecQuantError when it cannot be read."""
    try:
        return Path(path).read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise SpecQuantError(f"{path} is not UTF-8 text (byte {error.start}): convert it first") from None
    except OSError as error:
        raise SpecQuantError(f"{path} cannot be read: {error.strerror}") from None
