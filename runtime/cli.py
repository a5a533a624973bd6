"""The command `specquant`: finds the sub-command's module, imports that one only, and runs it."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Any

from specquant.custom_ops.compiled import compiled
from specquant.custom_ops.errors import SpecQuantError
from specquant.runtime.cli_common import Parser, run_cli
from specquant.runtime.stats import version

# name -> (module, one line of help). The module has add_arguments(parser) and run(args) -> exit code, or COMMANDS of
# its own and their EPILOG.
COMMANDS = {
    "export": ("specquant.exporter.cli", "quantise a model and write its folder (needs the extra `export`)"),
    "build": ("specquant.exporter.cli_build", "build a TensorRT engine of an exported model"),
    "generate": ("specquant.runtime.cli_generate", "continue a prompt, or answer one message"),
    "chat": ("specquant.runtime.cli_chat", "talk to a model"),
    "eval": ("specquant.runtime.cli_eval", "measure a model: perplexity, zero-shot tasks, or against another"),
    "bench": ("specquant.runtime.cli_bench", "time prefill and decode, beside the limits of this machine"),
    "inspect": ("specquant.runtime.cli_inspect", "print what an exported model is"),
}
EPILOG = """examples:
  specquant export sample -o build/smollm2
  specquant generate build/smollm2 --chat "What is the capital of France?"
  specquant eval ppl build/smollm2 --text wiki.test.raw
  specquant bench build/smollm2
  specquant inspect build/smollm2

exit codes: 0 done, 1 it failed on its own, 2 a mistake in what was asked, 130 interrupted
`specquant COMMAND --help` has examples of each.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run `specquant` on `argv` (default: the process's own arguments) and return the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    return run_cli(lambda: _run(arguments), verbose="-v" in arguments or "--verbose" in arguments)


def _run(
    arguments: list[str], commands: dict[str, tuple[str, str]] = COMMANDS, prog: str = "specquant", epilog: str = EPILOG
) -> int:
    if not arguments or arguments[0] not in commands:
        parser = _overview(commands, prog, epilog)
        parser.parse_args(arguments)  # --help, --version, or an error that names the commands
        parser.print_help()
        return 0
    name, rest = arguments[0], arguments[1:]
    path, _ = commands[name]
    try:
        command: Any = import_module(path)
        if hasattr(command, "COMMANDS"):
            return _run(rest, command.COMMANDS, f"{prog} {name}", command.EPILOG)
        parser = Parser(prog=f"{prog} {name}")
        command.add_arguments(parser)
        # Intermixed: before Python 3.12.7, argparse loses an optional PROMPT that follows an option.
        code: int = command.run(parser.parse_intermixed_args(rest))
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("specquant"):
            raise
        extra = "cpu" if path.startswith("specquant.runtime") else "export"
        raise SpecQuantError(f"{error.name} is not installed: pip install 'specquant[{extra}]'") from None
    return code


def _overview(commands: dict[str, tuple[str, str]], prog: str, epilog: str) -> Parser:
    parser = Parser(prog=prog, description="Language models at 4 bits, from the hub to a device.", epilog=epilog)
    parser.add_argument("--version", action="version", version=f"specquant {version()}, {compiled()}")
    names = parser.add_subparsers(metavar="COMMAND", parser_class=Parser)
    for name, (_, text) in commands.items():
        names.add_parser(name, help=text)
    return parser


if __name__ == "__main__":
    sys.exit(main())
