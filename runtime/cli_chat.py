"""`specquant chat`: a conversation in the terminal, or one message per line from a pipe."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

from specquant.custom_ops.errors import SpecQuantError
from specquant.runtime.chat import Message
from specquant.runtime.cli_common import add_verbosity, note
from specquant.runtime.cli_options import add_load_options, add_sampling_options, load_model, sampling_options
from specquant.runtime.generate import Model

EPILOG = """examples:
  specquant chat build/smollm2
  specquant chat build/smollm2 --system "You are a pirate." --temperature 0.7
  printf 'Hello\\nWho are you?\\n' | specquant chat build/smollm2 --json
While it answers, Ctrl-C ends the answer. /reset starts over, /exit or Ctrl-D leaves.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "Talk to an exported model that has a chat template."
    parser.epilog = EPILOG
    parser.add_argument("model", metavar="DIR", help="the folder that `specquant export` made")
    parser.add_argument("--system", metavar="TEXT", help="a system message at the start")
    add_sampling_options(parser)
    add_load_options(parser)
    parser.add_argument("--stats", action="store_true", help="speed and memory after every answer, on stderr")
    parser.add_argument("--json", action="store_true", help="print each answer as one line of JSON")
    add_verbosity(parser)


def run(args: argparse.Namespace) -> int:
    options = sampling_options(args)
    model = load_model(args)
    if model.chat_template is None:
        raise SpecQuantError(
            f"{model.manifest.name} has no chat template: use `specquant generate {args.model} PROMPT`"
        )
    history = opening(args.system)
    if sys.stdin.isatty():
        note(args, f"{model.manifest.name}: type a message; /reset starts over, /exit or Ctrl-D leaves")
    for line in _lines():
        if line == "/exit":
            break
        if line == "/reset":
            history = opening(args.system)
            continue
        messages = [*history, {"role": "user", "content": line}]
        try:
            answer = _answer(model, messages, options, args)
        except SpecQuantError as error:
            if not sys.stdin.isatty():
                raise
            note(args, f"specquant: {error} (/reset starts over)")
            continue
        history = [*messages, {"role": "assistant", "content": answer}]
    return 0


def opening(system: str | None, user: str | None = None) -> list[Message]:
    """The messages of a new conversation."""
    given = (("system", system), ("user", user))
    return [{"role": role, "content": content} for role, content in given if content is not None]


def _lines() -> Iterator[str]:
    terminal = sys.stdin.isatty()
    if terminal:
        with suppress(ImportError):  # Windows has none
            import readline  # noqa: F401  (importing it gives input() editing and history)
    while True:
        try:
            line = input("> " if terminal else "").strip()
        except EOFError:
            if terminal:
                print()  # the shell's prompt goes on a line of its own
            return
        if line:
            yield line


def _answer(model: Model, messages: list[Message], options: dict[str, Any], args: argparse.Namespace) -> str:
    pieces = model.chat(messages, **options)
    text = ""
    try:
        for piece in pieces:
            text += piece
            if not args.json:
                print(piece, end="", flush=True)
    except KeyboardInterrupt:
        if not sys.stdin.isatty():
            raise
        pieces.close()  # sets model.stats
    stats = model.stats
    if args.json:
        print(json.dumps({"text": text, "stats": stats and stats.as_dict()}, ensure_ascii=False), flush=True)
        return text
    print()
    if args.stats:
        note(args, str(stats))
    return text
