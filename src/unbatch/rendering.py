"""Text and HTML of what rich can render."""

from __future__ import annotations

import io
from typing import Any

from rich.console import Console


def as_text(renderable: Any, width: int = 110) -> str:
    console = Console(width=width, color_system=None, force_terminal=False, highlight=False)
    with console.capture() as captured:
        console.print(renderable)
    return "\n".join(line.rstrip() for line in captured.get().rstrip("\n").split("\n"))


def as_html(renderable: Any, label: str, width: int = 110) -> str:
    """Coloured text; ``label`` is what a screen reader says in its place."""
    console = Console(width=width, record=True, file=io.StringIO(), highlight=False)
    console.print(renderable)
    opening = f'<pre role="img" aria-label="{label}" style="line-height: 1.25; overflow-x: auto">'
    code = console.export_html(inline_styles=True, code_format="{code}")
    return f"{opening}{code}</pre>"
