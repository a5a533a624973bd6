"""Sections of a results file."""

from __future__ import annotations

from pathlib import Path

from tools.report import table, write_section


def test_sections_replace_their_own_text_only(tmp_path: Path) -> None:
    path = tmp_path / "docs" / "results.md"
    write_section(path, "one", "first\n")
    path.write_text(path.read_text() + "\nby hand\n")
    write_section(path, "two", "second")
    write_section(path, "one", "changed\n\nand longer")
    text = path.read_text()
    assert "first" not in text
    assert text.index("changed\n\nand longer") < text.index("by hand") < text.index("second")
    before = text
    write_section(path, "two", "second")
    assert path.read_text() == before


def test_table() -> None:
    assert table(("a", "b"), [("x", 1), ("y", 2.5)]) == "| a | b |\n|---|---:|\n| x | 1 |\n| y | 2.5 |"
