"""The structure of a loss as a picture: frozen data, and what it looks like in a terminal and in a notebook.

Columns are samples, rows are the stages from inputs to loss (``stages.py``). Drawing proper is in ``figure.py``.
"""

from __future__ import annotations

import html
from dataclasses import dataclass

from rich.console import Group
from rich.table import Table
from rich.text import Text

from unbatch.analysis.structure import MARKS, STYLES, TITLES, Structure
from unbatch.diagram import figure
from unbatch.diagram.stage import Stage, shown
from unbatch.rendering import as_text

STEP = 5  # characters from one column to the next


WIDTH, GAP = 110, 2  # characters of a line, and between its columns


LOOKS = {"statistics": "cyan", "moved": "red", "mixed": "red", "unknown": "yellow", "whole": "red"}


LOOKS |= {"uneven": "magenta"}


ENDS = {
    "sum": "The loss is a weighted sum of those of the samples.",
    "whole": "The loss is no sum over samples.",
    "unknown": "Whether the loss is a sum over samples is not established.",
}


@dataclass(frozen=True)
class Diagram:
    """Columns are ``samples``, rows are ``stages``; ``verdicts``: title and status of each structure.

    Print it for a terminal; a notebook shows a drawing; ``unbatch.plot.structure`` draws on axes of your own.
    """

    samples: int
    stages: tuple[Stage, ...]
    verdicts: tuple[tuple[str, str], ...]

    @classmethod
    def of(cls, structure: Structure, stages: tuple[Stage, ...]) -> Diagram:
        return cls(
            structure.samples, stages, tuple((TITLES[v.name], v.status) for v in structure.verdicts)
        )

    @property
    def bands(self) -> tuple[Stage, ...]:
        """The stages in which samples are not separate, or not known to be."""
        return tuple(s for s in self.stages if s.role != "loss" and not s.apart)

    @property
    def description(self) -> str:
        """The picture in words, for who cannot see it."""
        met = [f"{s.name}: {s.remark}." for s in self.bands]
        ends = [ENDS[s.kind] for s in self.stages if s.role == "loss"]
        apart = [] if met else ["The samples stay separate up to their losses."]
        samples = f"{self.samples} sample{'s' * (self.samples != 1)}"
        return " ".join([f"The way of {samples} from inputs to loss.", *apart, *met, *ends])

    def __rich__(self) -> Group:
        table = Table(box=None, pad_edge=False, show_header=False)
        table.add_column(justify="right", no_wrap=True)
        table.add_column(no_wrap=True)
        table.add_column(overflow="fold")
        table.add_row("sample", columns(shown(self.samples)), "")
        room = (
            WIDTH
            - max(len(s.name) for s in self.stages)
            - STEP * len(shown(self.samples))
            - 2 * GAP
        )
        for stage in self.stages:
            style = LOOKS.get(stage.kind, "")
            remark = (
                stage.remark
                if len(stage.remark) <= room
                else f"{stage.said}\n{stage.blamed}".strip()
            )
            table.add_row(
                stage.name, Text(picture(stage, self.samples), style), Text(remark, style)
            )
        words = [
            Text(f"{MARKS[status]} {title}", STYLES[status]) for title, status in self.verdicts
        ]
        return Group(table, Text("  ").join(words))

    def __str__(self) -> str:
        return as_text(self.__rich__(), WIDTH)

    def _repr_html_(self) -> str:
        """The drawing, where matplotlib is there, or else the text."""
        said = html.escape(self.description, quote=True)
        drawn = figure.svg(self.stages, self.samples, self.description)
        return drawn or f'<pre role="img" aria-label="{said}">{html.escape(str(self))}</pre>'


def columns(marks: list[str]) -> str:
    return "".join(mark.center(STEP) for mark in marks)


def picture(stage: Stage, samples: int) -> str:
    """One row: a mark in each column, or a band across all of them."""
    marks = shown(samples)
    width, reach = STEP * len(marks), STEP * len(marks) - STEP + 1
    if stage.role == "loss":
        sign = {"sum": " L = Σ wₙ ℓₙ ", "whole": " L ", "unknown": " L ? "}[stage.kind]
        sign = sign if samples > 1 else sign.partition("=")[0]  # of one there is no sum
        return (f"└{sign.center(reach - 2, '─')}┘" if samples > 1 else sign).center(width)
    if stage.apart:
        mark = {"inputs": "x", "predictions": "F", "losses": "ℓ"}.get(stage.role, "│")
        return columns([m if m == "⋯" else mark for m in marks])
    if stage.kind == "statistics":
        return f"├{f'>{stage.numbers}<'.center(reach - 2, '─')}┤".center(width)
    fill, sign = {"unknown": ("░", " ? "), "moved": ("╳", "")}.get(stage.kind, ("█", ""))
    return sign.center(reach, fill).center(width)
