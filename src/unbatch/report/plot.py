"""Pictures of results, one function each: they take a result (or what it comes from) and return matplotlib axes.

``ax=None`` makes a figure of its own, without pyplot: ``ax.figure`` shows it in a notebook, ``plot.save(ax, path)``
writes it. Every curve has a line style, marker or hatching of its own beside its colour, so that pictures can be read
in black and white. Nothing is computed here but what a picture needs of the quantity it is asked for.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from unbatch.curvature.block_ggn import BlockGGN
from unbatch.curvature.ggn import GGN
from unbatch.curvature.spectrum import Directions
from unbatch.diagram import figure
from unbatch.diagram.diagram import Diagram
from unbatch.diagram.figure import (
    BLUE,
    GREEN,
    GREY,
    INK,
    ORANGE,
    PURPLE,
    SKY,
    VERMILLION,
    blank,
    save,
)
from unbatch.errors import InputError, StructureError
from unbatch.gradients.plan import Plan
from unbatch.gradients.quantities import SquaredNorms
from unbatch.gradients.results import Rows, SquaredNormsByParameter
from unbatch.linalg.spectra import Density, Eigenpairs
from unbatch.problem.problem import Problem
from unbatch.problem.validation import check_given
from unbatch.verification.crosstalk import Crosstalk

if TYPE_CHECKING:
    from matplotlib.axes import Axes


__all__ = [
    "structure", "crosstalk", "gradient_norms", "spectrum", "directions", "density", "plan", "save"
]  # fmt: skip


COLOURS = (BLUE, ORANGE, GREEN, VERMILLION, PURPLE, SKY)


LINES = ("-", "--", ":", "-.")


MARKERS = "os^Dv*PX"


HATCHES = {"component": "", "copy": "////", "frozen": "\\\\\\\\"}


MORE_HATCHES = ("", "////", "\\\\\\\\", "xxxx", "....", "++++")  # of what else is set side by side


MSG_DENSITY = "plot.density takes a Density, as `unbatch.spectra.density(G, probes=8, steps=32)` returns it; got {value}."


MSG_NO_PLANS = (
    "plot.plan takes a Plan, or a mapping from names to plans with at least one in it; got {value}."
)


def structure(given: Problem | Diagram, ax: Axes | None = None) -> Axes:
    """How samples pass from inputs to loss: a column for each sample, a band wherever they meet.

    An hourglass with R in its neck: samples meet in R numbers only. A filled band: they mix. A hatched band with "?":
    not established. Letters shrink with the axes. Raises ``ImportError`` without matplotlib and ``InputError`` for what
    cannot be drawn, as all functions here do.
    """
    fits = isinstance(given, Problem | Diagram)
    check_given(fits, given, "plot.structure", "a Problem, or what problem.diagram() returns")
    diagram = given.diagram() if isinstance(given, Problem) else given
    ax = figure.draw(diagram.stages, diagram.samples, ax)
    ax.set_label(diagram.description)
    return ax


def crosstalk(given: Problem | Crosstalk, ax: Axes | None = None) -> Axes:
    """``‖∂F_n/∂x_m‖`` as a matrix of shades, on a log scale; zeros are left white and crossed out."""
    fits = isinstance(given, Problem | Crosstalk)
    check_given(fits, given, "plot.crosstalk", "a Problem, or what problem.crosstalk() returns")
    found = given.crosstalk() if isinstance(given, Problem) else given
    ax = blank(ax, 4.6, 3.8)
    from matplotlib.colors import LogNorm

    _counted(ax.xaxis, ax.yaxis)
    matrix = found.matrix.numpy()
    some = matrix[matrix > 0]
    low, high = (float(some.min()), float(some.max())) if some.size else (1.0, 1.0)
    norm = LogNorm(max(low, high * 1e-6), high if high > low else high * 10)
    # what is zero, or too small for the scale, shows the hatched ground
    ax.patch.set(facecolor="white", edgecolor="#BBBBBB", hatch="xxxx", linewidth=0)
    masked = torch.where(found.matrix > 0, found.matrix, torch.nan).numpy()
    image = ax.imshow(masked, norm=norm, cmap="cividis", interpolation="nearest")
    size = (
        r"$\Vert\partial F_n/\partial x_m\Vert$" if found.by == "derivative" else "change of $F_n$"
    )
    figure.whole(ax).colorbar(image, ax=ax, label=size + ("" if found.exact else ", estimated"))
    ax.set(
        xlabel="sample $m$",
        ylabel="prediction $n$",
        title=f"{found.strength:.1%} of the squares off the diagonal",
    )
    ax.title.set_fontsize(10)
    return ax


def gradient_norms(
    given: Problem | Rows | SquaredNormsByParameter | Mapping[str, Rows | SquaredNormsByParameter],
    ax: Axes | None = None,
    bins: int = 12,
) -> Axes:
    """Histograms of the norms of the rows of the gradient, by component, copy and frozen; one where all are the same.

    In the scale in which each row enters the loss. A decomposition that does not exist here is named as such.
    ``given`` may also be rows, or their squared norms (``problem.compute(SquaredNorms())``), or several of these by name.
    """
    norms, missing = _norms(given) if isinstance(given, Problem) else (_norms_of(given), [])
    ax = blank(ax)
    edges = _edges(torch.cat(list(norms.values())), bins)
    labels = {name: f"{name}{_zeros(found, edges[0])}" for name, found in norms.items()}
    side_by_side = [n.numpy() for n in norms.values()]
    colours = [COLOURS[i % len(COLOURS)] for i in range(len(norms))]
    _, _, drawn = ax.hist(
        side_by_side, edges, color=colours, label=list(labels.values()), edgecolor=INK, lw=0.7
    )
    groups: list[Any] = [drawn] if len(norms) == 1 else list(drawn)  # type: ignore[arg-type]
    for i, (name, bars) in enumerate(zip(norms, groups, strict=True)):
        for bar in bars:
            bar.set_hatch(
                HATCHES.get(name.removeprefix("per-"), MORE_HATCHES[i % len(MORE_HATCHES)])
            )
    for by in missing:
        ax.plot([], [], " ", label=f"{by}: does not exist here")
    if len(edges) > 2 and edges[-1] / max(edges[0], 1e-300) > 20:
        ax.set_xscale("log")
    _counted(ax.yaxis)
    ax.set(xlabel="norm of a row of the gradient", ylabel="samples")
    return _finished(ax, above=True)


def _norms(problem: Problem) -> tuple[dict[str, Tensor], list[str]]:
    """Norms by the kind of their rows, and what does not exist."""
    norms, missing = dict[str, Tensor](), list[str]()
    for by in HATCHES:
        try:
            found = problem.compute(SquaredNorms(), by=by)
        except StructureError:
            if by == "component":  # then there are no rows at all
                raise
            missing.append(by)
            continue
        norms[found.kind] = found.total.sqrt().double().cpu()
        if found.kind == "per-sample":
            break
    return norms, missing


def _norms_of(given: Any) -> dict[str, Tensor]:
    """Norms of results, by their names or by what they are called."""
    one = isinstance(given, Rows | SquaredNormsByParameter)
    named = (
        {given.kind or given.by: given}
        if one
        else given
        if isinstance(given, Mapping)
        else {"": given}
    )
    takes = "a Problem, Rows, what problem.compute(SquaredNorms()) returns, or a mapping from names to the last two"
    for found in named.values() or [given]:
        check_given(
            isinstance(found, Rows | SquaredNormsByParameter), found, "plot.gradient_norms", takes
        )
    squared = {
        n: found.total if isinstance(found, SquaredNormsByParameter) else _squared(found)
        for n, found in named.items()
    }
    return {n: found.detach().sqrt().double().cpu() for n, found in squared.items()}


def _squared(rows: Rows) -> Tensor:
    return rows.flat().abs().square().sum(1)


def _edges(values: Tensor, bins: int) -> list[float]:
    """Of bins that are equally wide, in logarithms where norms differ by more than a factor of 20."""
    low, high = float(values[values > 0].min()) if (values > 0).any() else 0.0, float(values.max())
    if low > 0 and high / low > 20:
        inner = torch.logspace(
            math.log10(low), math.log10(high), bins + 1, dtype=torch.float64
        ).tolist()
        return [min(low, inner[0]), *inner[1:-1], max(high, inner[-1])]
    low = min(low, float(values.min()))
    return torch.linspace(
        low, high if high > low else low + 1, bins + 1, dtype=torch.float64
    ).tolist()


def _zeros(norms: Tensor, lowest: float) -> str:
    """Norms of zero have no place on a log scale."""
    zeros = int((norms < lowest).sum())
    return f", and {zeros} of zero" if zeros else ""


def spectrum(given: Problem | GGN | BlockGGN | Eigenpairs | Tensor, ax: Axes | None = None) -> Axes:
    """Eigenvalues of the Gauss-Newton matrix, largest first, on a log scale; those that are zero are left out.

    A curve for each block where it is a block diagonal. Vertical lines: ``min(D, Σ_n rank H_n)``, beyond which every
    eigenvalue is zero. Negative ones are shown by their magnitude, as hollow markers. ``given`` may also be eigenvalues
    ``[k]`` or eigenpairs of any symmetric matrix, without a vertical line then.
    """
    ax = blank(ax)
    for i, (name, values, bound) in enumerate(curves := _spectra(given)):
        values = told(values)
        colour, line, marker = (
            COLOURS[i % len(COLOURS)],
            LINES[i % len(LINES)],
            MARKERS[i % len(MARKERS)],
        )
        at = torch.arange(1, len(values) + 1).numpy()
        ax.plot(
            at, values.abs().numpy(), line, color=colour, lw=1.2, marker=marker, ms=4, label=name
        )
        if (values < 0).any():
            filled = [colour if v > 0 else "white" for v in values.tolist()]
            ax.scatter(
                at, values.abs().numpy(), s=18, marker=marker, c=filled, edgecolors=colour, zorder=3
            )
        if bound is not None:
            label = f"rank ≤ {bound}" if len(curves) == 1 else "_bound"
            ax.axvline(bound, color=colour, ls=line, lw=1.0, label=label)
    _counted(ax.xaxis)
    ax.set_yscale("log")
    ax.set(xlabel="eigenvalue, largest first", ylabel="value")
    return _finished(ax)


def _spectra(given: Any) -> list[tuple[str, Tensor, int | None]]:
    """Names, eigenvalues, and the bounds on the rank where one is known."""
    matrix = (
        given.ggn()
        if isinstance(given, Problem)
        else given.values
        if isinstance(given, Eigenpairs)
        else given
    )
    if isinstance(matrix, BlockGGN):
        return [
            (f"{_block_name(b)} (rank ≤ {b.rank_bound})", b.eigvalsh(), b.rank_bound)
            for b in matrix.blocks
        ]
    fits = isinstance(matrix, GGN) or (
        isinstance(matrix, Tensor) and matrix.ndim == 1 and matrix.is_floating_point()
    )
    takes = "a Problem, what problem.ggn() returns, eigenpairs, or a 1-d tensor of real eigenvalues"
    check_given(fits, given, "plot.spectrum", takes)
    if isinstance(matrix, GGN):
        return [("eigenvalues", matrix.eigvalsh(), matrix.rank_bound)]
    return [("eigenvalues", matrix, None)]


def told(values: Tensor) -> Tensor:
    """Eigenvalues from the largest to the smallest, in float64, without those that are zero but for rounding."""
    rounding = (
        len(values) * torch.finfo(values.dtype).eps * values.abs().max() if len(values) else 0.0
    )
    return values[values.abs() > rounding].detach().double().cpu().sort(descending=True).values


def _block_name(block: GGN) -> str:
    first, *others = block.space.shapes
    module = first.rpartition(".")[0]
    if others and all(n.rpartition(".")[0] == module for n in others):
        return module or "all"
    return first + (f", {len(others)} more" if others else "")


def directions(given: Problem | GGN | Directions, k: int = 4, ax: Axes | None = None) -> Axes:
    """Slope against curvature of every component along the top ``k`` eigenvectors of the Gauss-Newton matrix.

    Both times N, so that small markers are spread around their mean, slope and curvature of the whole loss, which is
    the large marker; bars hold 80 % of the components. Curvatures on a log scale where none is negative. Needs a loss
    that is a sum over samples, as ``GGN.directions`` does, which raises ``StructureError`` otherwise.
    """
    given = given.ggn() if isinstance(given, Problem) else given
    fits = isinstance(given, GGN | Directions)
    check_given(
        fits,
        given,
        "plot.directions",
        "a Problem, what problem.ggn() returns, or its directions(k)",
    )
    found = given if isinstance(given, Directions) else given.directions(k)
    ax = blank(ax)
    n = len(found.slopes)
    slopes, curvatures = (
        n * found.slopes.detach().double().cpu(),
        n * found.curvatures.detach().double().cpu(),
    )
    count = min(k, slopes.shape[1])
    for i in range(count):
        x, y = slopes[:, -1 - i], curvatures[:, -1 - i]
        colour, marker = COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)]
        ax.scatter(x.numpy(), y.numpy(), s=16, marker=marker, c=colour, alpha=0.45, linewidths=0)
        ax.errorbar(
            float(x.mean()), float(y.mean()), _reach(y), _reach(x), fmt=marker, ms=9, color=colour, mec=INK,
            ecolor=INK, elinewidth=0.9, zorder=3,
            label=f"direction {i + 1}, eigenvalue {float(found.values[-1 - i]):.3g}",
        )  # fmt: skip
    shown = curvatures[:, -count:]
    if (shown > 0).any() and not (shown < -1e-6 * shown.max()).any():
        ax.set(
            yscale="log",
            ylim=(
                max(float(shown.quantile(0.02)), 1e-5 * float(shown.max())),
                3 * float(shown.max()),
            ),
        )
    else:
        ax.axhline(0, color=GREY, lw=0.6)
    ax.axvline(0, color=GREY, lw=0.6)
    ax.set(xlabel=r"slope $N\gamma_n$", ylabel=r"curvature $N\lambda_n$")
    return _finished(ax)


def _reach(values: Tensor) -> list[list[float]]:
    """How far the middle 80 % lie below and above the mean."""
    mean = values.mean()
    low, high = values.quantile(0.1), values.quantile(0.9)
    return [[max(float(mean - low), 0.0)], [max(float(high - mean), 0.0)]]


def density(found: Density, ax: Axes | None = None, points: int = 400) -> Axes:
    """The spectral density of an operator as ``unbatch.spectra.density`` estimates it, with one standard error shaded.

    Smoothed by a Gaussian of the width ``found.width``, on a log scale of six decades.
    """
    if not isinstance(found, Density):
        raise InputError(MSG_DENSITY.format(value=type(found).__name__))
    ax = blank(ax)
    low, high = (
        float(found.nodes.min()) - 4 * found.width,
        float(found.nodes.max()) + 4 * found.width,
    )
    grid = torch.linspace(low, high, points, dtype=torch.float64)
    told = found.on(grid)
    value, error = told.values.cpu(), told.standard_errors.cpu()
    floor = float(value.max()) * 1e-6
    ax.fill_between(
        grid.numpy(), (value - error).clamp_min(floor).numpy(), (value + error).clamp_min(floor).numpy(),
        color=SKY, alpha=0.5, lw=0, label=f"± standard error, {len(found.nodes)} probes",
    )  # fmt: skip
    ax.plot(
        grid.numpy(),
        value.numpy(),
        color=BLUE,
        lw=1.4,
        label=f"density of {found.size} eigenvalues",
    )
    ax.set_yscale("log")
    ax.set(xlabel="eigenvalue", ylabel="density", ylim=(floor, 3 * float(value.max())))
    return _finished(ax)


def plan(given: Plan | Mapping[str, Plan], ax: Axes | None = None) -> Axes:
    """The counted costs of plans, a bar each: memory of results and of temporaries, the budget, and the pullbacks.

    ``given``: a plan of ``problem.plan``, or several with their names. The budget, a thick upright stroke, is drawn
    where it is no more than twice what is used.
    """
    plans = {f"{given.what} by {given.by}": given} if isinstance(given, Plan) else given
    if not plans or not all(isinstance(p, Plan) for p in plans.values()):
        raise InputError(MSG_NO_PLANS.format(value=repr(given)))
    ax = blank(ax, 5.4, 1.2 + 0.5 * len(plans))
    rows, mib = range(len(plans)), 2.0**20
    results, temporary = (
        [getattr(p, part) / mib for p in plans.values()] for part in ("results", "temporary")
    )
    look: dict[str, Any] = {"height": 0.55, "edgecolor": INK, "linewidth": 0.8}
    ax.barh(rows, results, label="results", color=SKY, **look)
    ax.barh(rows, temporary, left=results, label="temporary", color="white", hatch="////", **look)
    most = max(map(sum, zip(results, temporary, strict=True)))
    for row, p in zip(rows, plans.values(), strict=True):
        text = f"  {p.pullbacks} pullback{'s' * (p.pullbacks != 1)}"
        ax.text(p.memory / mib, row, text, va="center", fontsize=8, color=INK)
        if p.budget / mib <= 2 * most:
            ax.plot(
                [p.budget / mib] * 2,
                [row - 0.4, row + 0.4],
                color=VERMILLION,
                lw=2,
                label="_budget",
            )
    ax.set_yticks(list(rows), list(plans))
    ax.invert_yaxis()
    ax.set(xlabel="MiB", xlim=(0, 1.45 * most or 1.0))
    return _finished(ax, above=True)


def _counted(*axes: Any) -> None:
    """Samples and eigenvalues come in whole numbers."""
    from matplotlib.ticker import MaxNLocator

    for axis in axes:
        axis.set_major_locator(MaxNLocator("auto", integer=True))


def _finished(ax: Axes, above: bool = False) -> Axes:
    """With a legend where curves have names, ``above`` what is drawn, and without the lines that say nothing."""
    ax.spines[["top", "right"]].set_visible(False)
    if ax.get_legend_handles_labels()[1]:
        legend = ax.legend(frameon=False, fontsize=8, loc="upper right" if above else "best")
        if above:
            figure.clear_of(ax, legend)
    return ax
