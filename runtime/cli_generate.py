"""`specquant generate`: continue a prompt, or answer one message."""

from __future__ import annotations

import argparse
import json
import sys

from specquant.custom_ops.errors import SpecQuantError
from specquant.runtime import cli_chat
from specquant.runtime.cli_common import add_verbosity, note
from specquant.runtime.cli_options import add_load_options, add_sampling_options, load_model, sampling_options
from specquant.runtime.stats import machine_info

EPILOG = """examples:
  specquant generate build/smollm2 "The capital of France is"
  specquant generate build/smollm2 --chat "What is the capital of France?"
  specquant generate build/smollm2 --system "Answer in one word." "What is the capital of France?"
  specquant generate build/smollm2 --temperature 0.8 --top-p 0.9 --seed 1 "Once upon a time"
  specquant generate build/smollm2 --json --stats "Hello" < /dev/null
  cat notes.txt | specquant generate build/smollm2
Without PROMPT it reads standard input; in a terminal it becomes `specquant chat`.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "Continue a prompt with an exported model; with --chat, answer it."
    parser.epilog = EPILOG
    parser.add_argument("model", metavar="DIR", help="the folder that `specquant export` made")
    parser.add_argument("prompt", metavar="PROMPT", nargs="?", help="the text to continue")
    parser.add_argument("--chat", action="store_true", help="PROMPT is a message: use the model's chat template")
    parser.add_argument("--system", metavar="TEXT", help="a system message before PROMPT (means --chat)")
    add_sampling_options(parser)
    add_load_options(parser)
    parser.add_argument("--stats", action="store_true", help="speed and memory, on stderr (with --json: and machine)")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of streaming")
    add_verbosity(parser)


def run(args: argparse.Namespace) -> int:
    prompt = args.prompt
    if prompt is None:
        if sys.stdin.isatty():
            return cli_chat.run(args)
        prompt = sys.stdin.read()
    if not prompt:
        raise SpecQuantError("the prompt is empty: give PROMPT or text on standard input")
    options = sampling_options(args)
    model = load_model(args)
    if args.chat or args.system:
        pieces = model.chat(cli_chat.opening(args.system, prompt), **options)
    else:
        pieces = model.generate(prompt, **options)
    if args.json:
        answer = {"text": "".join(pieces), "stats": model.stats and model.stats.as_dict()}
        print(json.dumps(answer | ({"machine": machine_info()} if args.stats else {}), ensure_ascii=False))
        return 0
    for piece in pieces:
        print(piece, end="", flush=True)
    print()
    if args.stats:
        note(args, str(model.stats))
    return 0
