"""What pictures of results share: colours, line styles, hatchings, legends, whole numbers on axes.

Every curve has a line style, marker or hatching of its own beside its colour, so that pictures can
be read in black and white. How figures are made and written is in ``diagram/figure.py``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from unbatch.diagram import figure
from unbatch.diagram.figure import BLUE, GREEN, ORANGE, PURPLE, SKY, VERMILLION

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis


# Colours, lines and markers are of different numbers, so that the looks of many curves differ even
# after one of the three has begun anew.
COLOURS = (BLUE, ORANGE, GREEN, VERMILLION, PURPLE, SKY)


LINES = ("-", "--", ":", "-.")


MARKERS = "os^Dv*PX"


# Of the three decompositions, and of whatever else is set side by side.
HATCHES = {"component": "", "copy": "////", "frozen": "\\\\\\\\"}


MORE_HATCHES = ("", "////", "\\\\\\\\", "xxxx", "....", "++++")


def colour(i: int) -> str:
    """Return the colour of the i-th curve."""
    return COLOURS[i % len(COLOURS)]


def line(i: int) -> str:
    """Return the line style of the i-th curve."""
    return LINES[i % len(LINES)]


def marker(i: int) -> str:
    """Return the marker of the i-th curve."""
    return MARKERS[i % len(MARKERS)]


def hatch(i: int, name: str) -> str:
    """Return the hatching of the i-th group of bars; that of a decomposition goes by its name."""
    decomposition = name.removeprefix("per-")
    if decomposition in HATCHES:
        return HATCHES[decomposition]
    return MORE_HATCHES[i % len(MORE_HATCHES)]


def count_along(*axes: Axis) -> None:
    """Put ticks at whole numbers only: samples and eigenvalues are counted."""
    from matplotlib.ticker import MaxNLocator

    for axis in axes:
        axis.set_major_locator(MaxNLocator("auto", integer=True))


def finish(ax: Axes, above: bool = False) -> Axes:
    """Add a legend where curves have names, and take away the lines that say nothing.

    ``above``: the legend goes above what is drawn, which makes room for it.
    """
    ax.spines[["top", "right"]].set_visible(False)
    if not ax.get_legend_handles_labels()[1]:
        return ax
    legend = ax.legend(frameon=False, fontsize=8, loc="upper right" if above else "best")
    if above:
        figure.clear_of(ax, legend)
    return ax
