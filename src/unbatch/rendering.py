"""Tables of the terminal, and text and HTML of what rich can render.

What stands in a table is decided by the wing that shows it; how all of them look, here.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

WIDTH = 110  # characters, where there is no terminal whose width could be asked for


def table(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> Table:
    """Return a table without lines; ``columns`` are its headings, none for a table without a head.

    Cells are text, with the markup of rich, or what rich can render. Long ones are folded, because
    the end of a place or a name is the part that tells it from others.
    """
    shown = Table(box=None, pad_edge=False, show_header=bool(columns))
    for column in columns:
        shown.add_column(column, overflow="fold")
    for row in rows:
        shown.add_row(*row)
    return shown


def in_bytes(count: float) -> str:
    """Return a number of bytes in the largest unit of which there is one, up to GiB."""
    if count < 1024:
        return f"{count:.0f} B"
    size = float(count)
    for unit in ("KiB", "MiB"):
        size /= 1024
        if size < 1024:
            return f"{size:.1f} {unit}"
    return f"{size / 1024:,.1f} GiB"


UNITS_OF_TIME = ((86400.0, "days"), (3600.0, "hours"), (60.0, "minutes"), (1.0, "s"), (1e-3, "ms"))


def in_time(seconds: float) -> str:
    """Return a time in the largest unit of which there are two, or in milliseconds."""
    if seconds == float("inf"):
        return "any time"
    for size, unit in UNITS_OF_TIME:
        if seconds >= 2 * size or size == 1e-3:
            return f"{seconds / size:,.3g} {unit}"
    return ""


def as_text(renderable: Any, width: int = WIDTH) -> str:
    """Return plain text, without colours and without spaces at the ends of lines."""
    console = Console(width=width, color_system=None, force_terminal=False, highlight=False)
    with console.capture() as captured:
        console.print(renderable)
    lines = captured.get().rstrip("\n").split("\n")
    return "\n".join(line.rstrip() for line in lines)


def as_html(renderable: Any, label: str, width: int = WIDTH) -> str:
    """Return coloured text as HTML; ``label`` is what a screen reader reads in its place."""
    # A console that records also prints; what it prints goes nowhere.
    console = Console(width=width, record=True, file=io.StringIO(), highlight=False)
    console.print(renderable)
    opening = f'<pre role="img" aria-label="{label}" style="line-height: 1.25; overflow-x: auto">'
    code = console.export_html(inline_styles=True, code_format="{code}")
    return f"{opening}{code}</pre>"
