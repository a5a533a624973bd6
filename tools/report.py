"""Sections of docs/results.md that a tool writes: each between two marks, so that running it again replaces its own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path


def write_section(path: Path, name: str, text: str) -> None:
    """Replace the section `name` of the file, or add it at the end; all other text stays."""
    begin, end = f"<!-- {name}: written by tools -->", f"<!-- end of {name} -->"
    old = path.read_text(encoding="utf-8") if path.is_file() else "# Results\n"
    section = f"{begin}\n{text.strip()}\n{end}"
    if begin in old and end in old:
        before, rest = old.split(begin, 1)
        new = before + section + rest.split(end, 1)[1]
    else:
        new = f"{old.rstrip()}\n\n{section}\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(new, encoding="utf-8")


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table; numbers stand to the right."""
    lines = ["| " + " | ".join(header) + " |", "|---|" + "---:|" * (len(header) - 1)]
    return "\n".join([*lines, *("| " + " | ".join(str(cell) for cell in row) + " |" for row in rows)])
