"""Pictures of results, one function each: a result in, matplotlib axes out.

Each takes a result, or the problem or matrix that it comes from. Of these it computes the result,
by the same call a user would write (``problem.crosstalk()`` and so on); nothing else is computed
here. ``ax=None`` makes a figure of its own, without pyplot: ``ax.figure`` shows it in a notebook,
``plot.save(ax, path)`` writes it. Pictures of curvature are in ``curvature_plot.py``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from unbatch.diagram import figure
from unbatch.diagram.diagram import Diagram
from unbatch.diagram.figure import INK, SKY, VERMILLION, blank, save
from unbatch.errors import InputError, StructureError
from unbatch.gradients.plan import Plan
from unbatch.gradients.quantities import SquaredNorms
from unbatch.gradients.results import Rows, SquaredNormsByParameter
from unbatch.problem.problem import Problem
from unbatch.problem.validation import check_shown
from unbatch.report.curvature_plot import density, directions, spectrum
from unbatch.report.style import HATCHES, colour, count_along, finish, hatch
from unbatch.verification.crosstalk import Crosstalk

if TYPE_CHECKING:
    from matplotlib.axes import Axes


__all__ = [
    "structure",
    "crosstalk",
    "gradient_norms",
    "spectrum",
    "directions",
    "density",
    "plan",
    "save",
]


MSG_NO_PLANS = (
    "plot.plan takes a Plan, or a mapping from names to plans with at least one in it; got {value}."
)


WIDE = 20  # largest by smallest norm from which on bins are equally wide on a log scale


# --- structure ------------------------------------------------------------------------------------


def structure(given: Problem | Diagram, ax: Axes | None = None) -> Axes:
    """Draw how samples pass from inputs to loss: a column for each, a band wherever they mix.

    An hourglass with R in its neck: samples interact through R numbers only. A filled band: they
    mix. A hatched band with "?": not established. Letters shrink with the axes. Of a problem,
    ``problem.diagram()`` is drawn. Raises ``ImportError`` without matplotlib and ``InputError`` for
    what cannot be drawn, as all functions here do.
    """
    fits = isinstance(given, Problem | Diagram)
    check_shown(fits, given, "plot.structure", "a Problem, or what problem.diagram() returns")
    diagram = given.diagram() if isinstance(given, Problem) else given
    ax = figure.draw(diagram.stages, diagram.samples, ax)
    ax.set_label(diagram.description)
    return ax


# --- crosstalk ------------------------------------------------------------------------------------


def crosstalk(given: Problem | Crosstalk, ax: Axes | None = None) -> Axes:
    """Draw ``‖∂F_n/∂x_m‖`` as a matrix of shades on a log scale; zeros are white and crossed out.

    Of a problem, ``problem.crosstalk()`` is computed: for every prediction and every sample.
    """
    fits = isinstance(given, Problem | Crosstalk)
    check_shown(fits, given, "plot.crosstalk", "a Problem, or what problem.crosstalk() returns")
    result = given.crosstalk() if isinstance(given, Problem) else given
    ax = blank(ax, 4.6, 3.8)
    count_along(ax.xaxis, ax.yaxis)
    # What is zero, or too small for the scale, is masked and shows the hatched ground.
    ax.patch.set(facecolor="white", edgecolor="#BBBBBB", hatch="xxxx", linewidth=0)
    masked = torch.where(result.matrix > 0, result.matrix, torch.nan).numpy()
    norm = _shades(result.matrix)
    image = ax.imshow(masked, norm=norm, cmap="cividis", interpolation="nearest")
    figure.whole(ax).colorbar(image, ax=ax, label=_size_label(result))
    ax.set(
        xlabel="sample $m$",
        ylabel="prediction $n$",
        title=f"{result.strength:.1%} of the squares off the diagonal",
    )
    ax.title.set_fontsize(10)
    return ax


def _shades(matrix: Tensor) -> Any:
    """Return the log scale of the shades, over six decades at most."""
    from matplotlib.colors import LogNorm

    positive = matrix[matrix > 0]
    low, high = 1.0, 1.0
    if len(positive):
        low, high = float(positive.min()), float(positive.max())
    # A scale needs two ends, also where all entries are the same.
    end = high if high > low else high * 10
    return LogNorm(max(low, high * 1e-6), end)


def _size_label(result: Crosstalk) -> str:
    """Return what a shade stands for."""
    label = "change of $F_n$"
    if result.by == "derivative":
        label = r"$\Vert\partial F_n/\partial x_m\Vert$"
    if not result.exact:
        label += ", estimated"
    return label


# --- norms of rows --------------------------------------------------------------------------------


def gradient_norms(
    given: Problem | Rows | SquaredNormsByParameter | Mapping[str, Rows | SquaredNormsByParameter],
    ax: Axes | None = None,
    bins: int = 12,
) -> Axes:
    """Draw histograms of the norms of the rows of the gradient, in the scale of the loss.

    Of a problem, ``problem.compute(SquaredNorms(), by=..)`` is computed by component, copy and
    frozen; once where all are the same. A decomposition that does not exist here is named as such.
    ``given`` may also be rows, or their squared norms (``problem.compute(SquaredNorms())``), or
    several of these by name.
    """
    missing: list[str] = []
    if isinstance(given, Problem):
        norms, missing = _norms_of_problem(given)
    else:
        norms = _norms_of_results(given)
    ax = blank(ax)
    edges = _edges(torch.cat(list(norms.values())), bins)
    _draw_histograms(ax, norms, edges)
    for by in missing:
        # An empty curve, whose name stands in the legend.
        ax.plot([], [], " ", label=f"{by}: does not exist here")
    if len(edges) > 2 and edges[-1] / max(edges[0], 1e-300) > WIDE:
        ax.set_xscale("log")
    count_along(ax.yaxis)
    ax.set(xlabel="norm of a row of the gradient", ylabel="samples")
    return finish(ax, above=True)


def _draw_histograms(ax: Axes, norms: Mapping[str, Tensor], edges: list[float]) -> None:
    """Draw bars side by side, each group with a colour and a hatching of its own."""
    labels = [f"{name}{_zeros(values, edges[0])}" for name, values in norms.items()]
    side_by_side = [values.numpy() for values in norms.values()]
    look: dict[str, Any] = {"edgecolor": INK, "lw": 0.7}
    look["color"] = [colour(i) for i in range(len(norms))]
    _, _, drawn = ax.hist(side_by_side, edges, label=labels, **look)
    # matplotlib returns a list of groups of bars, but a single group on its own.
    groups: Any = drawn
    if len(norms) == 1:
        groups = [drawn]
    for i, (name, bars) in enumerate(zip(norms, groups, strict=True)):
        for bar in bars:
            bar.set_hatch(hatch(i, name))


def _norms_of_problem(problem: Problem) -> tuple[dict[str, Tensor], list[str]]:
    """Return norms by the kind of their rows, and the decompositions that do not exist."""
    norms: dict[str, Tensor] = {}
    missing: list[str] = []
    # Squared norms, because they do not need the rows themselves in memory.
    for by in HATCHES:
        try:
            squared = problem.compute(SquaredNorms(), by=by)
        except StructureError:
            if by == "component":  # which exists wherever rows exist at all
                raise
            missing.append(by)
            continue
        norms[squared.kind] = squared.total.sqrt().double().cpu()
        if squared.kind == "per-sample":  # samples do not mix: the others are the same
            break
    return norms, missing


def _norms_of_results(given: Any) -> dict[str, Tensor]:
    """Return norms of results, by their names or by what they are called."""
    takes = (
        "a Problem, Rows, what problem.compute(SquaredNorms()) returns, or a mapping from names to "
        "the last two"
    )
    # What is none of these is checked below, and refused there.
    results = {"": given}
    if isinstance(given, Rows | SquaredNormsByParameter):
        results = {given.kind or given.by: given}
    elif isinstance(given, Mapping) and given:
        results = dict(given)
    # All are checked before the first is computed with.
    for result in results.values():
        fits = isinstance(result, Rows | SquaredNormsByParameter)
        check_shown(fits, result, "plot.gradient_norms", takes)
    norms = {}
    for name, result in results.items():
        norms[name] = _squared_norms(result).detach().sqrt().double().cpu()
    return norms


def _squared_norms(result: Rows | SquaredNormsByParameter) -> Tensor:
    """Return the squared norm of each row."""
    if isinstance(result, SquaredNormsByParameter):
        return result.total
    return result.flat().abs().square().sum(1)


def _edges(values: Tensor, bins: int) -> list[float]:
    """Return edges of bins that are equally wide, on a log scale where norms differ by much."""
    high = float(values.max())
    low = 0.0
    if (values > 0).any():
        low = float(values[values > 0].min())
    if low > 0 and high / low > WIDE:
        start, end = math.log10(low), math.log10(high)
        edges = torch.logspace(start, end, bins + 1, dtype=torch.float64).tolist()
        # Rounded logarithms must not leave out the smallest and the largest norm.
        return [min(low, edges[0]), *edges[1:-1], max(high, edges[-1])]
    # On a linear scale zeros have a place as well.
    low = min(low, float(values.min()))
    if high <= low:
        high = low + 1
    return torch.linspace(low, high, bins + 1, dtype=torch.float64).tolist()


def _zeros(norms: Tensor, lowest: float) -> str:
    """Return how many norms are zero and have no place on a log scale, in words."""
    zeros = int((norms < lowest).sum())
    if not zeros:
        return ""
    return f", and {zeros} of zero"


# --- plans ----------------------------------------------------------------------------------------


MIB = 2.0**20  # bytes


def plan(given: Plan | Mapping[str, Plan], ax: Axes | None = None) -> Axes:
    """Draw the counted costs of plans, a bar each: results, temporaries, budget and pullbacks.

    ``given``: a plan of ``problem.plan``, or several with their names. Memory is in MiB. The
    budget, a thick upright stroke, is drawn where it is no more than twice what is used.
    """
    plans = given
    if isinstance(plans, Plan):
        plans = {f"{plans.what} by {plans.by}": plans}
    if not plans or not all(isinstance(p, Plan) for p in plans.values()):
        raise InputError(MSG_NO_PLANS.format(value=repr(given)))
    ax = blank(ax, 5.4, 1.2 + 0.5 * len(plans))
    rows = range(len(plans))
    results = [p.results / MIB for p in plans.values()]
    temporary = [p.temporary / MIB for p in plans.values()]
    look: dict[str, Any] = {"height": 0.55, "edgecolor": INK, "linewidth": 0.8}
    ax.barh(rows, results, label="results", color=SKY, **look)
    ax.barh(rows, temporary, left=results, label="temporary", color="white", hatch="////", **look)
    most = 0.0
    for used in zip(results, temporary, strict=True):
        most = max(most, sum(used))
    for row, p in zip(rows, plans.values(), strict=True):
        _annotate(ax, row, p, most)
    ax.set_yticks(list(rows), list(plans))
    # The first plan on top, as in a table.
    ax.invert_yaxis()
    # Room at the right for the pullbacks; any width where no plan takes memory.
    ax.set(xlabel="MiB", xlim=(0, 1.45 * most or 1.0))
    return finish(ax, above=True)


def _annotate(ax: Axes, row: int, p: Plan, most: float) -> None:
    """Write the pullbacks beside a bar, and draw its budget where it is near."""
    text = f"  {p.pullbacks} pullback"
    if p.pullbacks != 1:
        text += "s"
    ax.text(p.memory / MIB, row, text, va="center", fontsize=8, color=INK)
    budget = p.budget / MIB
    if budget <= 2 * most:
        heights = [row - 0.4, row + 0.4]
        ax.plot([budget, budget], heights, color=VERMILLION, lw=2, label="_budget")
