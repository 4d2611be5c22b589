"""The structure of a loss as a figure; the palette of all figures, and how they are saved.

This and ``plot.py`` are the only files that know matplotlib, which is imported when something is
drawn. Figures are made without pyplot: nothing is left open, and no backend is chosen. Colours are
those of Okabe and Ito (2008), which the colour-blind can tell apart, on a white card; whatever a
colour says, a shape or a hatching says as well.
"""

from __future__ import annotations

import html
import io
import itertools
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


# matplotlib is an extra: whoever only reads verdicts does not install it.
MSG_NO_MATPLOTLIB = (
    "Figures need matplotlib, which is not installed. "
    "Install it with `pip install 'unbatch[plot]'`."
)


# Okabe and Ito, "Color universal design" (2008).
BLACK, ORANGE, SKY, GREEN = "#000000", "#E69F00", "#56B4E9", "#009E73"


YELLOW, BLUE, VERMILLION, PURPLE = "#F0E442", "#0072B2", "#D55E00", "#CC79A7"


INK, PALE, GREY = "#222222", "#DCEBF5", "#6E6E6E"


INCH = 0.62  # of one unit of the picture, which is the distance of two columns


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
    # Not by pyplot, which would keep the figure until someone closes it.
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained", facecolor="white").add_subplot()


def _needed() -> None:
    """Raise ``ImportError`` with the remedy where matplotlib is missing."""
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
        # Through the text, because matplotlib has no option for the label of an SVG.
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
        # Limits count as well: who zooms in changes how large a unit is, and not where axes lie.
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
    """Set the upper limit so that the data fill what the legend leaves of the height.

    ``limits``: those that the data alone would have.
    """
    if not ax.get_autoscaley_on():  # the user has set limits
        return
    # From the limits of the data each time, not the present ones: else each drawing adds to them.
    low, high = limits
    space = _points(legend.get_texts()[0]) * whole(ax).dpi / 72
    # The data keep a tenth of the height, however many curves the legend names.
    share = min((legend.get_window_extent(renderer).height + space) / place.height, 0.9)
    ax.set_ylim(low, low + (high - low) / (1 - share), auto=True)


def as_svg(figure: Figure, description: str) -> str:
    """Return a figure as SVG, without a date, and with names that do not change from run to run."""
    import matplotlib as mpl

    with mpl.rc_context({"svg.hashsalt": "unbatch"}), io.StringIO() as out:
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
        text = out.getvalue()
    # Without the XML declaration, which has no place inside an HTML page.
    text = text[text.index("<svg") :]
    if description:
        label = html.escape(description, quote=True)
        text = text.replace("<svg ", f'<svg role="img" aria-label="{label}" ', 1)
    # Spaces at line ends would be stripped from a committed drawing by hooks and editors.
    lines = map(str.rstrip, text.splitlines())
    return "\n".join(lines) + "\n"


# --- the structure --------------------------------------------------------------------------------


def draw(stages: Sequence[Stage], samples: int, ax: Axes | None = None) -> Axes:
    """Draw samples from left to right and stages from top to bottom.

    One unit is the distance of two columns; the column of the first sample is at x = 0, and the
    first stage begins at y = 0. What the drawing means: ``unbatch.plot.structure``.
    """
    _needed()
    labels = shown(samples)
    last = len(labels) - 1
    # A single column has more room beside it: the number in a neck may be wider than a column.
    margin = max(0.65, 1.0 - last / 2)
    names, remarks = _widths_of_words(stages)
    left = -margin - 0.1 - names
    right = last + margin + 0.1 + remarks
    height = sum(map(_height, stages)) + 0.3
    ax = blank(ax, (right - left) * INCH, height * INCH)
    ax.set(xlim=(left, right), ylim=(-height + 0.15, 0.15), aspect="equal")
    ax.set_axis_off()
    # Axes of the user may hold texts already, which keep the size that the user gave them.
    others = len(ax.texts)
    top = 0.0
    before: Stage | None = None
    for stage in stages:
        middle = top - _height(stage) / 2
        if stage.role == "loss":
            # Lower, so that lines from all samples have room to come together.
            middle -= 0.22
        _stage(ax, stage, before, labels, top, middle)
        _words(ax, stage, -margin, last + margin, middle)
        top -= _height(stage)
        before = stage
    sizes = [(text, _points(text)) for text in ax.texts[others:]]
    Adjusted.whenever(ax, partial(_scale, sizes))
    return ax


def _widths_of_words(stages: Sequence[Stage]) -> tuple[float, float]:
    """Return the width of the widest name, and that of the widest remark, in units."""
    names, remarks = 0.0, 0.0
    for stage in stages:
        names = max(names, _width(stage.name, 8))
        remarks = max(remarks, _width(stage.summary, 8), _width(stage.places, 7))
    return names, remarks


def _scale(words: Sequence[tuple[Text, float]], ax: Axes, place: Bbox, renderer: Any) -> None:
    """Make letters smaller where the picture is, so that they fit the rest of it.

    Small letters are drawn wider than they should be, so they shrink until they have room, or
    cannot be read.
    """
    (left, right), (low, high) = ax.get_xlim(), ax.get_ylim()
    # The smaller one, because units are square and axes need not have the shape of the picture.
    unit = min(place.width / (right - left), place.height / (high - low))  # in pixels
    for text, size in words:
        x, side = text.get_position()[0], text.get_horizontalalignment()
        room = unit * {"right": x - left, "left": right - x}.get(side, math.inf)
        # Never larger than in a figure of its own, however large the axes are.
        points = size * min(unit / whole(ax).dpi / INCH, 1.0)
        text.set(fontsize=max(points, SMALLEST), visible=points >= SMALLEST)
        while text.get_visible() and text.get_window_extent(renderer).width > room:
            text.set(fontsize=0.9 * _points(text), visible=0.9 * _points(text) >= SMALLEST)


def _points(text: Text) -> float:
    """Return the size of the letters of a text."""
    return float(text.get_fontsize())


def _width(text: str, points: float, weight: str = "normal") -> float:
    """Return the width of a text in letters of so many points, in units of the picture."""
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import TextPath

    # An outline of nothing has no extents.
    if not text:
        return 0.0
    # By the outline: to measure in pixels, a figure would have to exist, whose size this decides.
    outline = TextPath((0, 0), text, size=points, prop=FontProperties(weight=weight))
    return SLACK * float(outline.get_extents().width) / 72 / INCH


def _words(ax: Axes, stage: Stage, left: float, right: float, y: float) -> None:
    """Write the name of a stage at the left, and its remarks at the right, at height ``y``."""
    up, down = 0.0, 0.0
    if stage.summary and stage.places:
        # Two lines, one above and one below the middle.
        up, down = 0.15, 0.17
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
    """Return the height of a row, in units."""
    if stage.role == "loss":
        return 1.25
    return HEIGHTS.get(stage.kind, 0.8)


def _stage(
    ax: Axes, stage: Stage, before: Stage | None, labels: Sequence[str], top: float, middle: float
) -> None:
    """Draw one row from ``top`` on, with its boxes at height ``middle``.

    ``before``: the stage above it, which decides what flows in. ``labels``: of the columns, of
    which that of an ellipsis has no line.
    """
    bottom = top - _height(stage)
    last = len(labels) - 1
    columns = [x for x, label in enumerate(labels) if label != "⋯"]
    if stage.role == "loss":
        _reduce(ax, stage, before, columns, top, middle, last / 2)
        return
    # The lines of the samples: they begin at the inputs, and end at losses that are mixed.
    start, end = top, bottom
    if stage.role == "inputs":
        start = middle
    if stage.role == "losses" and not stage.apart:
        end = middle
    for x in columns:
        ax.plot([x, x], [start, end], color=INK, lw=1.1, zorder=1)
    if stage.apart:
        for x in range(last + 1):
            _sample(ax, stage, x, middle, labels[x])
    elif stage.kind == "statistics":
        _neck(ax, stage, top, bottom, last)
    else:
        _block(ax, stage, columns, top - GAP, bottom + GAP, last)


def _sample(ax: Axes, stage: Stage, x: float, y: float, label: str) -> None:
    """Draw the box of one sample, or an ellipsis in its place.

    Of a stage that stands for several, which look alike, a pile of boxes.
    """
    from matplotlib.patches import FancyBboxPatch

    if label == "⋯":
        ax.text(x, y, "⋯", ha="center", va="center", fontsize=11, color=GREY)
        return
    width, height = BOX
    style: dict[str, Any] = {"boxstyle": "round,pad=0,rounding_size=0.09", "lw": 1.0}
    face = "white"
    if stage.role == "module":
        face = PALE
    # The uppermost box last, because it hides the others.
    shifts: tuple[float, ...] = (0.0,)
    if stage.repeats * stage.runs > 1:
        shifts = (0.07, 0.035, 0.0)
    for shift in shifts:
        corner = (x - width / 2 + shift, y - height / 2 + shift)
        ax.add_patch(
            FancyBboxPatch(corner, width, height, facecolor=face, edgecolor=BLUE, zorder=2, **style)
        )
    letter = {"inputs": "x", "predictions": "F", "losses": r"\ell"}.get(stage.role)
    if stage.kind == "uneven":
        # Each sample has a function of its own.
        letter = "f"
    if letter:
        # In mathtext a hyphen is the minus sign.
        written = rf"${letter}_{{{label.replace('−', '-')}}}$"
        ax.text(x, y, written, ha="center", va="center", fontsize=9.5, color=INK, zorder=3)


def _neck(ax: Axes, stage: Stage, top: float, bottom: float, last: int) -> None:
    """Draw how all samples flow into a few numbers, and these into all samples.

    An hourglass from ``top`` to ``bottom`` around the columns, with the count in its neck.
    """
    from matplotlib.patches import FancyBboxPatch, PathPatch
    from matplotlib.path import Path as Curve

    middle, center = (top + bottom) / 2, last / 2
    wide, high, word = last / 2 + 0.45, top - 0.08, f"R = {stage.numbers}"
    slim = max(0.4, 0.6 * _width(word, 9, "bold"))
    rim, bend, lip = 0.13, slim + 0.3 * (wide - slim), 0.5
    # One quarter, from the rim to the neck; the others are its mirror images.
    quarter = [
        (wide, high),
        (wide, high - rim),
        (bend, high - rim),
        (slim, middle + lip),
        (slim, middle),
    ]
    right_side = list(quarter)
    # From the last but one: both quarters share the point in the neck.
    for x, y in quarter[-2::-1]:
        right_side.append((x, 2 * middle - y))
    corners = [(center + x, y) for x, y in right_side]
    # Down the right side and up the left one, so that the outline is one closed line.
    for x, y in right_side[::-1]:
        corners.append((center - x, y))
    # A side is a straight rim, two Bézier curves of three points each, and the other rim.
    curve, line = Curve.CURVE4, Curve.LINETO
    side = [line, *[curve] * 6, line]
    path = Curve([*corners, corners[0]], [Curve.MOVETO, *side, line, *side, line])
    # The filling lies below the lines of the samples, the outline above them.
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

    It is hatched where that is not established. ``columns``: at which x samples have lines, which
    end at the band; ``last``: x of the last column.
    """
    from matplotlib.patches import Rectangle

    look: dict[str, Any] = {"facecolor": "#F7DDCC", "edgecolor": VERMILLION, "ls": "-"}
    if stage.kind == "unknown":
        look = {"facecolor": "white", "edgecolor": GREY, "ls": "--", "hatch": "////"}
    corner, width = (-0.45, bottom), last + 0.9
    ax.add_patch(Rectangle(corner, width, top - bottom, zorder=2, lw=1.4, **look))
    if stage.kind == "moved":
        # Any permutation without a fixed point shows it: here each goes to the next column.
        for a, b in zip(columns, [*columns[1:], *columns[:1]], strict=True):
            ax.plot([a, b], [top, bottom], color=VERMILLION, lw=0.9, zorder=2.5)
    elif stage.kind != "unknown":
        for a, b in itertools.product(columns, columns):
            ax.plot([a, b], [top, bottom], color=VERMILLION, lw=0.9, zorder=2.5)
    else:
        # A card below the sign, which would be hard to read on a hatching.
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
    """Draw the lines from the losses of all samples, or from what mixed them, to one number.

    ``before``: the stage above; where it mixes samples, one line leaves it. ``center``: x of the
    number, in the middle of the columns.
    """
    joined = before is not None and not before.apart
    card = {"boxstyle": "round,pad=0.35", "lw": 1.3, "facecolor": "white"}
    dashed = "-"
    if stage.kind == "unknown":
        dashed = "--"
    starts: Sequence[float] = columns
    start = top
    if joined:
        # A single line, from the lower edge of the band, which ends a gap above this row.
        starts = [center]
        start = top + GAP
    for x in starts:
        ax.plot([x, center], [start, middle], color=INK, lw=1.1, ls=dashed, zorder=1)
    word = {"sum": r"$L=\sum_n\, w_n\, \ell_n$", "whole": "$L$", "unknown": "$L$  ?"}[stage.kind]
    if stage.kind == "whole" and not joined:
        # There are losses of single samples, and they are not simply added.
        word = r"$L=R(\ell_1, .., \ell_N)$"
    edge = {"sum": BLUE, "whole": VERMILLION, "unknown": GREY}[stage.kind]
    box = card | {"edgecolor": edge, "linestyle": dashed}
    style: dict[str, Any] = {"fontsize": 10, "color": INK, "zorder": 3}
    ax.text(center, middle, word, ha="center", va="center", bbox=box, **style)
