"""Printing: tables for people, JSON for programs."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping, Sequence

from rich.console import Console, RenderableType
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn
from rich.table import Table
from rich.text import Text

_WIDTH_UNWRAPPED = 1000


def console() -> Console:
    """Where tables go."""
    return Console(width=None if sys.stdout.isatty() else _WIDTH_UNWRAPPED, highlight=False)


def print_parts(*parts: RenderableType) -> None:
    """Tables and lines on stdout, without the blanks that pad them.

    Only columns of text are wrapped to the terminal; a table of names and numbers keeps its lines, however long.
    """
    terminal = console()
    for part in parts:
        keeps_lines = isinstance(part, str) or (
            isinstance(part, Table) and all(column.no_wrap for column in part.columns)
        )
        print(rendered(part, width=_WIDTH_UNWRAPPED if keeps_lines else terminal.width))


def rendered(part: RenderableType, *, width: int = _WIDTH_UNWRAPPED) -> str:
    """A table or line as text, with the terminal's styles if stdout is one, without the blanks that pad it."""
    target = Console(width=width, highlight=False, force_terminal=sys.stdout.isatty())
    with target.capture() as captured:
        target.print(part)
    return "\n".join(line.rstrip() for line in captured.get().splitlines())


def print_json(document: object) -> None:
    """One JSON document on stdout."""
    print(json.dumps(document, indent=1))


def print_json_line(document: object) -> None:
    """One JSON document on one line of stdout, at once."""
    print(json.dumps(document), flush=True)


def table(
    headings: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    right: Sequence[str] = (),
    text: Sequence[str] = (),
) -> Table:
    """A plain table without the columns that hold nothing.

    Args:
        right: headings of columns that are aligned to the right.
        text: headings of columns that may be wrapped.
    """
    shown = [i for i in range(len(headings)) if i == 0 or any(row[i] for row in rows)]
    result = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for i in shown:
        name = headings[i]
        result.add_column(
            name, justify="right" if name in right else "left", no_wrap=name not in text, overflow="fold"
        )
    for row in rows:
        result.add_row(*(Text(row[i]) for i in shown))
    return result


def facts(pairs: Mapping[str, str]) -> Table:
    """Names and values under each other; empty values are left out."""
    result = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), show_header=False)
    result.add_column(style="bold")
    result.add_column(overflow="fold")
    for name, value in pairs.items():
        if value:
            result.add_row(name, Text(value))
    return result


def progress_bar(*, is_wanted: bool) -> Progress:
    """A progress bar of bytes on stderr, shown only on a terminal."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        console=Console(stderr=True),
        transient=True,
        disable=not (is_wanted and sys.stderr.isatty()),
    )


def format_age(seconds: float) -> str:
    """How long ago: "0.4 s", "12 s", "5 min", "3 h", "2 d"."""
    if seconds < 0:
        return "in the future"
    for limit, unit, size in ((60.0, "s", 1.0), (3600.0, "min", 60.0), (172_800.0, "h", 3600.0)):
        if seconds < limit:
            value = seconds / size
            return f"{value:.1f} {unit}" if value < 10 and unit == "s" else f"{value:.0f} {unit}"
    return f"{seconds / 86_400:.0f} d"


def format_moment(wall_time_s: float, now_s: float) -> str:
    """A moment as local time of day and age; empty for 0 (unknown)."""
    if wall_time_s <= 0:
        return ""
    day = "%H:%M:%S" if abs(now_s - wall_time_s) < 43_200 else "%Y-%m-%d %H:%M"
    return f"{time.strftime(day, time.localtime(wall_time_s))} ({format_age(now_s - wall_time_s)} ago)"


def format_ranks(ranks: Sequence[int]) -> str:
    """Ranks with runs joined: "0-3,7"."""
    runs: list[list[int]] = []
    for rank in sorted(ranks):
        if runs and runs[-1][1] == rank - 1:
            runs[-1][1] = rank
        else:
            runs.append([rank, rank])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)
