"""What every command shares: one line for an error, exit codes, verbosity, progress."""

from __future__ import annotations

import argparse
import os
import sys
import time
import traceback
from collections.abc import Callable
from types import TracebackType
from typing import Any, NoReturn

from specquant.custom_ops.errors import SpecQuantError

EXIT_FAILED, EXIT_USER, EXIT_INTERRUPTED, EXIT_PIPE = 1, 2, 130, 141
_PLAIN_INTERVAL_S = 10.0  # between lines of progress when stderr is no terminal


class Parser(argparse.ArgumentParser):
    """argparse with examples printed as written, no abbreviations, and errors that `run_cli` prints as one line."""

    def __init__(self, **options: Any) -> None:
        options.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        options.setdefault("allow_abbrev", False)
        super().__init__(**options)

    def error(self, message: str) -> NoReturn:
        raise SpecQuantError(f"{message}; see `{self.prog} --help`")


def add_verbosity(parser: argparse.ArgumentParser) -> None:
    """-q (no progress, no notes) and -v (notes on what is done, and a traceback if the program fails)."""
    group = parser.add_mutually_exclusive_group()
    group.add_argument("-q", "--quiet", action="store_true", help="no progress and no notes")
    group.add_argument("-v", "--verbose", action="store_true", help="say more, and show where a failure comes from")


def run_cli(run: Callable[[], int], prog: str = "specquant", verbose: bool = False) -> int:
    """Run a command and return its exit code: 0 done, 1 it failed on its own, 2 the user's mistake, 130 Ctrl-C.

    Every failure is one line on stderr; with `verbose` a traceback comes before that of code 1. A closed pipe
    (`… | head`) is quiet.
    """
    try:
        code = run()
        sys.stdout.flush()
        return code
    except SpecQuantError as error:
        return _say(prog, str(error), EXIT_USER)
    except KeyboardInterrupt:
        print(file=sys.stderr)  # after the ^C that the terminal shows
        return _say(prog, "interrupted", EXIT_INTERRUPTED)
    except BrokenPipeError:
        # Python would complain again when it flushes stdout at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_PIPE
    except Exception as error:
        if verbose:
            traceback.print_exc()
        if isinstance(error, MemoryError):
            text = "not enough memory: try a smaller model, a shorter context or fewer prompts"
        elif isinstance(error, OSError):  # a full disk, a folder that may not be written
            text = str(error)
        else:
            text = f"{type(error).__name__}: {error} (a bug of ours; -v shows where)"
        return _say(prog, text, EXIT_FAILED)


def _say(prog: str, text: str, code: int) -> int:
    print(f"{prog}: error: {' '.join(text.split())}", file=sys.stderr)
    return code


def note(args: argparse.Namespace, text: str) -> None:
    """A line on stderr unless -q."""
    if not args.quiet:
        print(text, file=sys.stderr)


class Progress:
    """Progress on stderr: a bar in a terminal, a line now and then elsewhere, nothing when quiet.

    unit_scale counts in k, M, G (bytes).
    """

    def __init__(self, label: str, total: int, unit: str, quiet: bool, unit_scale: bool = False) -> None:
        self._label, self._total, self._unit = label, total, unit
        self._done = 0
        self._next = time.monotonic() + _PLAIN_INTERVAL_S
        self._plain = not quiet and not sys.stderr.isatty()
        self._bar: Any = None
        if not quiet and not self._plain:
            from tqdm import tqdm

            # delay: a step that takes no two seconds shows no bar. disable: TQDM_DISABLE is for the bars of libraries.
            self._bar = tqdm(
                desc=label, total=total, unit=unit, unit_scale=unit_scale, delay=1, leave=False, disable=False
            )

    def update(self, amount: int) -> None:
        self._done += amount
        if self._bar is not None:
            self._bar.update(amount)
        elif self._plain and time.monotonic() >= self._next:
            self._next = time.monotonic() + _PLAIN_INTERVAL_S
            percent = 100 * self._done // max(1, self._total)
            print(f"{self._label}: {percent}% of {self._total:,} {self._unit}", file=sys.stderr, flush=True)

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, where: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()
