"""The structure of a loss as a figure; the palette of all figures, and how they are saved.

This and ``plot.py`` are the only files that know matplotlib, which is imported when something is
drawn. Figures are made without pyplot: nothing is left open, and no backend is chosen. Colours are
those of Okabe and Ito (2008), which the colour-blind can tell apart, on a white card; whatever a
colour says, a shape or a hatching says as well.
"""

from __future__ import annotations

import html
import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unbatch.diagram.stage import Stage, shown

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.legend import Legend
    from matplotlib.text import Text
    from matplotlib.transforms import Bbox


MSG_NO_MATPLOTLIB = (
    "Figures need matplotlib, which is not installed. "
    "Install it with `pip install 'unbatch[plot]'`."
)


# Okabe and Ito, "Color universal design" (2008).
BLACK, ORANGE, SKY, GREEN = "#000000", "#E69F00", "#56B4E9", "#009E73"


YELLOW, BLUE, VERMILLION, PURPLE = "#F0E442", "#0072B2", "#D55E00", "#CC79A7"


INK, PALE, GREY = "#222222", "#DCEBF5", "#6E6E6E"


INCH = 0.62  # of one unit of the picture


# Of stages by kind; others have 0.8.
HEIGHTS = {"statistics": 1.55, "moved": 1.05, "mixed": 1.05, "unknown": 1.05}


BOX = (0.7, 0.44)  # of a sample


GAP = 0.14  # between a band and the next stage


SMALLEST = 2.0  # points of letters that are drawn


SLACK = 1.05  # letters are a little wider in pixels than in outline


# --- figures and files ----------------------------------------------------------------------------


def blank(ax: Axes | None, width: float = 5.0, height: float = 3.6) -> Axes:
    """Return the given axes, or those of a new figure of so many inches.

    Raises ``ImportError`` without matplotlib.
    """
    if ax is not None:
        return ax
    _needed()
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained", facecolor="white").add_subplot()


def _needed() -> None:
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ImportError(MSG_NO_MATPLOTLIB) from error


def save(ax: Axes, path: str | Path, description: str = "") -> None:
    """Write the figure of ``ax`` to an SVG, PNG or PDF file: the same bytes for the same picture.

    ``description``: the picture in words, for who cannot see it; it becomes the label of an SVG. By
    default that of a structure, or what is drawn against what.
    """
    figure, suffix = whole(ax), Path(path).suffix
    if not description:
        description = str(ax.get_label()) or f"{ax.get_ylabel()} against {ax.get_xlabel()}"
    if suffix == ".svg":
        Path(path).write_text(as_svg(figure, description), encoding="utf-8")
        return
    # What would differ from run to run, or with the version of matplotlib, is left out.
    metadata: dict[str, Any] | None = None
    if suffix == ".png":
        metadata = {"Software": None}
    elif suffix == ".pdf":
        metadata = {"CreationDate": None}
    figure.savefig(path, dpi=200, metadata=metadata)


def whole(ax: Axes) -> Figure:
    """Return the figure that axes are in, at the root of all subfigures."""
    figure = ax.get_figure(root=True)
    assert figure is not None
    return figure


@dataclass
class Adjusted:
    """A locator of axes that calls ``adjust`` when matplotlib asks where they lie.

    Before axes are drawn, nobody knows how large they are. Done once for each size (``seen``: the
    last), because every change asks a window to draw again.
    """

    adjust: Callable[[Axes, Bbox, Any], None]
    before: Callable[[Any, Any], Bbox] | None
    seen: tuple[Any, ...] = ()

    @classmethod
    def whenever(cls, ax: Axes, adjust: Callable[[Axes, Bbox, Any], None]) -> None:
        """Call ``adjust`` with the place of ``ax`` in pixels before it is drawn or measured."""
        locator: Any = cls(adjust, ax.get_axes_locator())
        ax.set_axes_locator(locator)

    def __call__(self, ax: Axes, renderer: Any) -> Bbox:
        place = ax.get_position(original=True)
        if self.before is not None:
            place = self.before(ax, renderer)
        holder = ax.get_figure()
        assert holder is not None
        pixels = place.transformed(holder.transSubfigure)
        now = (*pixels.bounds, *ax.get_xlim(), *ax.get_ylim())
        if now != self.seen:
            self.seen = now
            self.adjust(ax, pixels, renderer)
        return place


def clear_of(ax: Axes, legend: Legend) -> None:
    """Raise the upper limit of ``ax`` so that a legend at its top lies above the data.

    The axis has to be linear.
    """
    Adjusted.whenever(ax, partial(_raise, legend, ax.get_ylim()))


def _raise(
    legend: Legend, limits: tuple[float, float], ax: Axes, place: Bbox, renderer: Any
) -> None:
    if not ax.get_autoscaley_on():  # the user has set limits
        return
    low, high = limits
    space = _points(legend.get_texts()[0]) * whole(ax).dpi / 72
    share = min((legend.get_window_extent(renderer).height + space) / place.height, 0.9)
    ax.set_ylim(low, low + (high - low) / (1 - share), auto=True)


def as_svg(figure: Figure, description: str) -> str:
    """Return a figure as SVG, without a date, and with names that do not change from run to run."""
    import matplotlib as mpl

    with mpl.rc_context({"svg.hashsalt": "unbatch"}), io.StringIO() as out:
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
        text = out.getvalue()
    text = text[text.index("<svg") :]
    if description:
        label = html.escape(description, quote=True)
        text = text.replace("<svg ", f'<svg role="img" aria-label="{label}" ', 1)
    lines = [line.rstrip() for line in text.splitlines()]
    return "\n".join(lines) + "\n"


# --- the structure --------------------------------------------------------------------------------


def draw(stages: Sequence[Stage], samples: int, ax: Axes | None = None) -> Axes:
    """Samples from left to right, stages from top to bottom; see ``unbatch.plot.structure``."""
    _needed()
    last = len(shown(samples)) - 1
    margin = max(0.65, 1.0 - last / 2)
    left = -margin - 0.1 - max(_width(s.name, 8) for s in stages)
    right = (
        last + margin + 0.1 + max(max(_width(s.summary, 8), _width(s.places, 7)) for s in stages)
    )
    height = sum(map(_height, stages)) + 0.3
    ax = blank(ax, (right - left) * INCH, height * INCH)
    ax.set(xlim=(left, right), ylim=(-height + 0.15, 0.15), aspect="equal")
    ax.set_axis_off()
    others, top = len(ax.texts), 0.0
    for before, stage in zip((None, *stages), stages, strict=False):
        middle = top - _height(stage) / 2 - (0.22 if stage.role == "loss" else 0)
        _stage(ax, stage, before, shown(samples), top, middle)
        _words(ax, stage, -margin, last + margin, middle)
        top -= _height(stage)
    Adjusted.whenever(ax, partial(_scale, [(text, _points(text)) for text in ax.texts[others:]]))
    return ax


def _scale(words: Sequence[tuple[Text, float]], ax: Axes, place: Bbox, renderer: Any) -> None:
    """Make letters smaller where the picture is, so that they fit the rest of it.

    Small letters are drawn wider than they should be, so they shrink until they have room, or
    cannot be read.
    """
    (left, right), (low, high) = ax.get_xlim(), ax.get_ylim()
    unit = min(place.width / (right - left), place.height / (high - low))  # in pixels
    for text, size in words:
        x, side = text.get_position()[0], text.get_horizontalalignment()
        room = unit * {"right": x - left, "left": right - x}.get(side, math.inf)
        points = size * min(unit / whole(ax).dpi / INCH, 1.0)
        text.set(fontsize=max(points, SMALLEST), visible=points >= SMALLEST)
        while text.get_visible() and text.get_window_extent(renderer).width > room:
            text.set(fontsize=0.9 * _points(text), visible=0.9 * _points(text) >= SMALLEST)


def _points(text: Text) -> float:
    return float(text.get_fontsize())


def _width(text: str, points: float, weight: str = "normal") -> float:
    """Return the width of a text in letters of so many points, in units of the picture."""
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import TextPath

    if not text:
        return 0.0
    outline = TextPath((0, 0), text, size=points, prop=FontProperties(weight=weight))
    return SLACK * float(outline.get_extents().width) / 72 / INCH


def _words(ax: Axes, stage: Stage, left: float, right: float, y: float) -> None:
    up, down = (0.15, 0.17) if stage.summary and stage.places else (0, 0)
    ax.text(left, y, stage.name, ha="right", va="center", fontsize=8, color=INK)
    ax.text(right, y + up, stage.summary, ha="left", va="center", fontsize=8, color=INK)
    ax.text(right, y - down, stage.places, ha="left", va="center", fontsize=7, color=GREY)


def svg(stages: Sequence[Stage], samples: int, description: str) -> str:
    """Return the drawing as SVG; empty where matplotlib is missing."""
    try:
        return as_svg(whole(draw(stages, samples)), description)
    except ImportError:
        return ""


def _height(stage: Stage) -> float:
    return 1.25 if stage.role == "loss" else HEIGHTS.get(stage.kind, 0.8)


def _stage(
    ax: Axes, stage: Stage, before: Stage | None, labels: Sequence[str], top: float, middle: float
) -> None:
    """Draw one row from ``top`` on, with its boxes at height ``middle``."""
    bottom, columns = top - _height(stage), [x for x, label in enumerate(labels) if label != "⋯"]
    last = len(labels) - 1
    if stage.role == "loss":
        _reduce(ax, stage, before, columns, top, middle, last / 2)
        return
    # The lines of the samples: they begin at the inputs, and end at losses that are mixed.
    start = middle if stage.role == "inputs" else top
    end = bottom
    if stage.role == "losses" and not stage.apart:
        end = middle
    for x in columns:
        ax.plot([x, x], [start, end], color=INK, lw=1.1, zorder=1)
    if stage.apart:
        for x in range(last + 1):
            _sample(ax, stage, x, middle, labels[x], last)
    elif stage.kind == "statistics":
        _neck(ax, stage, top, bottom, last)
    else:
        _block(ax, stage, columns, top - GAP, bottom + GAP, last)


def _sample(ax: Axes, stage: Stage, x: float, y: float, label: str, last: int) -> None:
    from matplotlib.patches import FancyBboxPatch

    if label == "⋯":
        ax.text(x, y, "⋯", ha="center", va="center", fontsize=11, color=GREY)
        return
    width, height = BOX
    style: dict[str, Any] = {"boxstyle": "round,pad=0,rounding_size=0.09", "lw": 1.0}
    inner = stage.role == "module"
    face = PALE if inner else "white"
    for shift in (0.07, 0.035, 0.0)[0 if stage.repeats * stage.runs > 1 else 2 :]:
        corner = (x - width / 2 + shift, y - height / 2 + shift)
        ax.add_patch(
            FancyBboxPatch(corner, width, height, facecolor=face, edgecolor=BLUE, zorder=2, **style)
        )
    number = "1" if last == 0 else label
    letter = {"inputs": "x", "predictions": "F", "losses": r"\ell"}.get(stage.role)
    if stage.kind == "uneven":
        letter = "f"
    if letter:
        written = rf"${letter}_{{{number.replace('−', '-')}}}$"
        ax.text(x, y, written, ha="center", va="center", fontsize=9.5, color=INK, zorder=3)


def _neck(ax: Axes, stage: Stage, top: float, bottom: float, last: int) -> None:
    """Draw how all samples flow into a few numbers, and these into all samples."""
    from matplotlib.patches import FancyBboxPatch, PathPatch
    from matplotlib.path import Path as Curve

    middle, center = (top + bottom) / 2, last / 2
    wide, high, word = last / 2 + 0.45, top - 0.08, f"R = {stage.numbers}"
    slim = max(0.4, 0.6 * _width(word, 9, "bold"))
    rim, bend, lip = 0.13, slim + 0.3 * (wide - slim), 0.5
    # one quarter, from the rim to the neck; the others are its mirror images
    quarter = [
        (wide, high),
        (wide, high - rim),
        (bend, high - rim),
        (slim, middle + lip),
        (slim, middle),
    ]
    right_side = [*quarter, *((x, 2 * middle - y) for x, y in quarter[-2::-1])]
    corners = [(center + x, y) for x, y in right_side] + [
        (center - x, y) for x, y in right_side[::-1]
    ]
    curve, line = Curve.CURVE4, Curve.LINETO
    side = [line, *[curve] * 6, line]
    path = Curve([*corners, corners[0]], [Curve.MOVETO, *side, line, *side, line])
    ax.add_patch(PathPatch(path, facecolor=ORANGE, alpha=0.38, lw=0, zorder=0.5))
    ax.add_patch(PathPatch(path, facecolor="none", edgecolor=ORANGE, lw=1.4, zorder=1.5))
    style: dict[str, Any] = {"boxstyle": "round,pad=0,rounding_size=0.1", "lw": 1.4}
    corner = (center - slim, middle - 0.2)
    ax.add_patch(
        FancyBboxPatch(
            corner, 2 * slim, 0.4, facecolor="white", edgecolor=ORANGE, zorder=3, **style
        )
    )
    ax.text(
        center,
        middle,
        word,
        ha="center",
        va="center",
        fontsize=9,
        weight="bold",
        color=INK,
        zorder=4,
    )


def _block(
    ax: Axes, stage: Stage, columns: Sequence[int], top: float, bottom: float, last: int
) -> None:
    """Draw a band in which every sample may reach every other, or another.

    It is hatched where that is not established.
    """
    from matplotlib.patches import Rectangle

    known = stage.kind != "unknown"
    face, edge = ("#F7DDCC", VERMILLION) if known else ("white", GREY)
    corner, width = (-0.45, bottom), last + 0.9
    look: dict[str, Any] = {
        "hatch": None if known else "////",
        "lw": 1.4,
        "ls": "-" if known else "--",
    }
    ax.add_patch(
        Rectangle(corner, width, top - bottom, facecolor=face, edgecolor=edge, zorder=2, **look)
    )
    if known:
        every = [(a, b) for a in columns for b in columns]
        another = list(zip(columns, [*columns[1:], *columns[:1]], strict=True))
        for a, b in another if stage.kind == "moved" else every:
            ax.plot([a, b], [top, bottom], color=VERMILLION, lw=0.9, zorder=2.5)
    else:
        card = {"boxstyle": "round,pad=0.2", "facecolor": "white", "edgecolor": "none"}
        middle = (top + bottom) / 2
        ax.text(
            last / 2,
            middle,
            "?",
            ha="center",
            va="center",
            fontsize=15,
            weight="bold",
            color=INK,
            zorder=3,
            bbox=card,
        )


def _reduce(
    ax: Axes,
    stage: Stage,
    before: Stage | None,
    columns: Sequence[int],
    top: float,
    middle: float,
    center: float,
) -> None:
    """Draw the lines from the losses of all samples, or from what mixed them, to one number."""
    joined = before is not None and not before.apart
    card = {"boxstyle": "round,pad=0.35", "lw": 1.3, "facecolor": "white"}
    dashed = "--" if stage.kind == "unknown" else "-"
    for x in [center] if joined else columns:
        start = top + GAP * (joined and x == center)
        ax.plot([x, center], [start, middle], color=INK, lw=1.1, ls=dashed, zorder=1)
    word = {"sum": r"$L=\sum_n\, w_n\, \ell_n$", "whole": "$L$", "unknown": "$L$  ?"}[stage.kind]
    if stage.kind == "whole" and not joined:
        word = r"$L=R(\ell_1, .., \ell_N)$"
    edge = {"sum": BLUE, "whole": VERMILLION, "unknown": GREY}[stage.kind]
    box = card | {"edgecolor": edge, "linestyle": dashed}
    style: dict[str, Any] = {"fontsize": 10, "color": INK, "zorder": 3}
    ax.text(center, middle, word, ha="center", va="center", bbox=box, **style)
