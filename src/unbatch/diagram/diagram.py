"""The structure of a loss as a picture: frozen data, and what it looks like in a terminal.

Columns are samples, rows are the stages from inputs to loss (``stages.py``). Drawing proper, which
a notebook shows, is in ``figure.py``.
"""

from __future__ import annotations

import html
from dataclasses import dataclass

from rich.console import Group
from rich.table import Table
from rich.text import Text

from unbatch.analysis.structure import Structure
from unbatch.analysis.structure_tables import MARKS, STYLES
from unbatch.analysis.verdict import TITLES
from unbatch.diagram import figure
from unbatch.diagram.stage import Stage, shown
from unbatch.rendering import as_text

STEP = 5  # characters from one column to the next


WIDTH, GAP = 110, 2  # characters of a line, and between its columns


# Colour of a row by its kind; rows of separate samples have none, so that the others catch the eye.
LOOKS = {
    "uneven": "magenta",
    "statistics": "cyan",
    "moved": "red",
    "mixed": "red",
    "unknown": "yellow",
    "whole": "red",
}


# The last sentence of a description, by the kind of the loss.
ENDS = {
    "sum": "The loss is a weighted sum of those of the samples.",
    "whole": "The loss is no sum over samples.",
    "unknown": "Whether the loss is a sum over samples is not established.",
}


@dataclass(frozen=True)
class Diagram:
    """The picture: columns are ``samples``, rows are ``stages``.

    ``verdicts``: title and status of each structure. Print it for a terminal; a notebook shows a
    drawing; ``unbatch.plot.structure`` draws on axes of your own. It holds neither model nor
    tensors, so it can be kept and compared with that of another day.
    """

    samples: int
    stages: tuple[Stage, ...]
    verdicts: tuple[tuple[str, str], ...]

    @classmethod
    def of(cls, structure: Structure, stages: tuple[Stage, ...]) -> Diagram:
        """Return the picture of a structure with these stages.

        They have to come from the same structure: ``stages`` keeps them within its verdicts.
        """
        verdicts = tuple((TITLES[v.name], v.status) for v in structure.verdicts)
        return cls(structure.samples, stages, verdicts)

    @property
    def bands(self) -> tuple[Stage, ...]:
        """The stages in which samples are not separate, or not known to be."""
        # The loss has kinds of its own, and is one number in any case.
        return tuple(s for s in self.stages if s.role != "loss" and not s.apart)

    @property
    def description(self) -> str:
        """The picture in words, for who cannot see it.

        It names the stages in which samples are not separate, and how the loss is made.
        """
        samples = f"{self.samples} samples"
        if self.samples == 1:
            samples = "1 sample"
        sentences = [f"The way of {samples} from inputs to loss."]
        if not self.bands:
            sentences.append("The samples stay separate up to their losses.")
        for stage in self.stages:
            if stage.role == "loss":
                sentences.append(ENDS[stage.kind])
            elif not stage.apart:
                sentences.append(f"{stage.name}: {stage.remark}.")
        return " ".join(sentences)

    def __rich__(self) -> Group:
        """Return the picture for a terminal: a row for each stage, and the verdicts below."""
        table = Table(box=None, pad_edge=False, show_header=False)
        table.add_column(justify="right", no_wrap=True)
        table.add_column(no_wrap=True)
        table.add_column(overflow="fold")
        # The labels of the columns stand above the first stage.
        table.add_row("sample", columns(shown(self.samples)), "")
        room = self._room_for_remarks()
        for stage in self.stages:
            style, remark = LOOKS.get(stage.kind, ""), stage.remark
            if len(remark) > room:
                # Broken between what is done and where, not wherever the line ends.
                remark = f"{stage.summary}\n{stage.places}".strip()
            row = Text(picture(stage, self.samples), style)
            table.add_row(stage.name, row, Text(remark, style))
        # A sign beside each title, because colours are lost in a file.
        verdicts = []
        for title, status in self.verdicts:
            verdicts.append(Text(f"{MARKS[status]} {title}", STYLES[status]))
        return Group(table, Text("  ").join(verdicts))

    def _room_for_remarks(self) -> int:
        """Return how many characters of a line are left beside the names and the picture."""
        names = max(len(stage.name) for stage in self.stages)
        picture_width = STEP * len(shown(self.samples))
        return WIDTH - names - picture_width - 2 * GAP

    def __str__(self) -> str:
        # A width of its own: what a log or a doctest holds is the same on every terminal.
        return as_text(self.__rich__(), WIDTH)

    def _repr_html_(self) -> str:
        """The drawing, where matplotlib is there, or else the text."""
        drawing = figure.svg(self.stages, self.samples, self.description)
        if drawing:
            return drawing
        label = html.escape(self.description, quote=True)
        return f'<pre role="img" aria-label="{label}">{html.escape(str(self))}</pre>'


def columns(marks: list[str]) -> str:
    """Return the marks, each in the middle of its column."""
    return "".join(mark.center(STEP) for mark in marks)


def picture(stage: Stage, samples: int) -> str:
    """Return one row: a mark in each column, or a band across all of them.

    A row is as wide as all columns, so that rows stand below each other.
    """
    marks = shown(samples)
    width = STEP * len(marks)
    reach = width - STEP + 1  # from the first to the last mark
    if stage.role == "loss":
        sign = {"sum": " L = Σ wₙ ℓₙ ", "whole": " L ", "unknown": " L ? "}[stage.kind]
        if samples == 1:
            return sign.partition("=")[0].center(width)  # of one there is no sum
        return f"└{sign.center(reach - 2, '─')}┘".center(width)
    if stage.apart:
        return columns(_own_marks(stage, marks))
    if stage.kind == "statistics":
        return f"├{f'>{stage.numbers}<'.center(reach - 2, '─')}┤".center(width)
    fill, sign = {"unknown": ("░", " ? "), "moved": ("╳", "")}.get(stage.kind, ("█", ""))
    return sign.center(reach, fill).center(width)


def _own_marks(stage: Stage, labels: list[str]) -> list[str]:
    """Return the letter of a stage, or a line, for each sample that has a column."""
    letter = {"inputs": "x", "predictions": "F", "losses": "ℓ"}.get(stage.role, "│")
    marks = []
    for label in labels:
        # The ellipsis stands for samples without a column, and stays.
        mark = letter
        if label == "⋯":
            mark = label
        marks.append(mark)
    return marks
