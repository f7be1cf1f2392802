"""Colours, a progress bar and tables for the command line. Nothing is coloured or redrawn where no one watches."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator, Sequence, Sized
from typing import TypeVar

Item = TypeVar("Item")
CODES = {"red": "31", "green": "32", "yellow": "33", "dim": "2", "bold": "1"}
BAR = 30


def coloured() -> bool:
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR")


def paint(text: str, colour: str) -> str:
    return f"\033[{CODES[colour]}m{text}\033[0m" if coloured() else text


def progress(items: Iterable[Item], label: str, total: int | None = None) -> Iterator[Item]:
    """Yields the items and draws a bar on stderr, if that is a terminal. total: how many come of an iterator."""
    watched = sys.stderr.isatty()
    count = len(items) if isinstance(items, Sized) else total or 0

    def draw(done: int, end: str = "") -> None:
        filled = BAR * done // max(count, 1)
        print(f"\r{label} [{'#' * filled}{'.' * (BAR - filled)}] {done}/{count}", end=end, file=sys.stderr, flush=True)

    if watched:
        draw(0)
    for done, item in enumerate(items):
        yield item
        if watched:
            draw(done + 1)
    if watched:
        draw(count, end="\n")


def table(header: Sequence[str], rows: Iterable[Sequence[str]], colours: Sequence[str | None] = ()) -> str:
    """Columns as wide as their widest cell; those that hold numbers in every row to the right. colours: one a row."""
    rows = [[str(cell) for cell in row] for row in rows]
    columns = range(len(header))
    widths = [max(len(line[c]) for line in [list(header), *rows]) for c in columns]
    right = [bool(rows) and all(_is_number(row[c]) for row in rows) for c in columns]

    def line(cells: Sequence[str]) -> str:
        padded = (cells[c].rjust(widths[c]) if right[c] else cells[c].ljust(widths[c]) for c in columns)
        return "  ".join(padded).rstrip()

    lines = [paint(line(header), "bold")]
    for index, row in enumerate(rows):
        colour = colours[index] if index < len(colours) else None
        lines.append(paint(line(row), colour) if colour else line(row))
    return "\n".join(lines)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
