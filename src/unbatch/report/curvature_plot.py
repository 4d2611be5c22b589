"""Pictures of curvature: a spectrum, a spectral density, and the samples along eigenvectors.

``plot.py`` has the other pictures and says what holds for all of them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from unbatch.curvature.block_ggn import BlockGGN
from unbatch.curvature.ggn import GGN
from unbatch.curvature.spectrum import Directions
from unbatch.diagram.figure import BLUE, GREY, INK, SKY, blank
from unbatch.errors import InputError
from unbatch.linalg.spectra import Density, Eigenpairs
from unbatch.problem.problem import Problem
from unbatch.problem.validation import check_shown
from unbatch.report.style import colour, count_along, finish, line, marker
from unbatch.report.tables import nonzero

if TYPE_CHECKING:
    from matplotlib.axes import Axes


MSG_DENSITY = (
    "plot.density takes a Density, as `unbatch.spectra.density(G, probes=8, steps=32)` returns it; "
    "got {value}."
)


# --- spectrum -------------------------------------------------------------------------------------


class Spectrum(NamedTuple):
    """Eigenvalues in any order, and the bound on the rank where one is known."""

    name: str
    values: Tensor
    rank_bound: int | None = None


def spectrum(given: Problem | GGN | BlockGGN | Eigenpairs | Tensor, ax: Axes | None = None) -> Axes:
    """Draw eigenvalues of the Gauss-Newton matrix on a log scale, largest first, without zeros.

    A curve for each block of a block diagonal. Vertical lines: ``min(D, Σ_n rank H_n)``, beyond
    which every eigenvalue is zero. Negative ones are shown by their magnitude, as hollow markers.
    ``given`` may also be eigenvalues ``[k]`` or eigenpairs of any symmetric matrix, without a
    vertical line then. Of a problem or a matrix the whole spectrum is computed (``eigvalsh``).
    """
    ax = blank(ax)
    spectra = _spectra(given)
    for i, curve in enumerate(spectra):
        _draw_spectrum(ax, curve, i)
        if curve.rank_bound is not None:
            # With several curves the bounds stand in their names; matplotlib leaves "_" out.
            label = f"rank ≤ {curve.rank_bound}" if len(spectra) == 1 else "_bound"
            ax.axvline(curve.rank_bound, color=colour(i), ls=line(i), lw=1.0, label=label)
    count_along(ax.xaxis)
    ax.set_yscale("log")
    ax.set(xlabel="eigenvalue, largest first", ylabel="value")
    return finish(ax)


def _draw_spectrum(ax: Axes, curve: Spectrum, i: int) -> None:
    """Draw one curve, with hollow markers for negative eigenvalues."""
    values = nonzero(curve.values)
    ranks = torch.arange(1, len(values) + 1).numpy()
    sizes = values.abs().numpy()
    look: dict[str, Any] = {"color": colour(i), "marker": marker(i), "lw": 1.2, "ms": 4}
    ax.plot(ranks, sizes, line(i), label=curve.name, **look)
    if not (values < 0).any():
        return
    # Hollow markers are drawn over the others: one curve has one filling.
    fills = ["white" if value < 0 else colour(i) for value in values.tolist()]
    look = {"marker": marker(i), "edgecolors": colour(i), "s": 18, "zorder": 3}
    ax.scatter(ranks, sizes, c=fills, **look)


def _spectra(given: Any) -> list[Spectrum]:
    """Return the curves of what was passed; raises ``InputError`` for what has no spectrum."""
    source = given
    if isinstance(source, Problem):
        source = source.ggn()
    if isinstance(source, BlockGGN):
        return [_spectrum_of_block(block) for block in source.blocks]
    if isinstance(source, GGN):
        return [Spectrum("eigenvalues", source.eigvalsh(), source.rank_bound)]
    if isinstance(source, Eigenpairs):
        return [Spectrum("eigenvalues", source.values)]
    takes = "a Problem, what problem.ggn() returns, eigenpairs, or a 1-d tensor of real eigenvalues"
    fits = isinstance(source, Tensor) and source.ndim == 1 and source.is_floating_point()
    check_shown(fits, given, "plot.spectrum", takes)
    return [Spectrum("eigenvalues", source)]


def _spectrum_of_block(block: GGN) -> Spectrum:
    """Return the curve of a block, with its bound in its name."""
    name = f"{_block_name(block)} (rank ≤ {block.rank_bound})"
    return Spectrum(name, block.eigvalsh(), block.rank_bound)


def _block_name(block: GGN) -> str:
    """Return the module whose parameters make up a block, or its first parameter."""
    names = list(block.space.shapes)
    modules = {name.rpartition(".")[0] for name in names}
    if len(names) > 1 and len(modules) == 1:
        return modules.pop() or "all"
    if len(names) > 1:
        return f"{names[0]}, {len(names) - 1} more"
    return names[0]


# --- samples along eigenvectors -------------------------------------------------------------------


def directions(given: Problem | GGN | Directions, k: int = 4, ax: Axes | None = None) -> Axes:
    """Draw slope against curvature of every component along the top ``k`` eigenvectors of the GGN.

    Both times N, so that small markers are spread around their mean, slope and curvature of the
    whole loss, which is the large marker; bars hold 80 % of the components. Curvatures on a log
    scale where none is negative. Needs a loss that is a sum over samples, as ``GGN.directions``
    does, which raises ``StructureError`` otherwise and which is what a problem or a matrix is
    asked for.
    """
    source = given
    if isinstance(source, Problem):
        source = source.ggn()
    takes = "a Problem, what problem.ggn() returns, or its directions(k)"
    check_shown(isinstance(source, GGN | Directions), source, "plot.directions", takes)
    if isinstance(source, GGN):
        source = source.directions(k)
    ax = blank(ax)
    n = len(source.slopes)
    slopes = n * source.slopes.detach().double().cpu()
    curvatures = n * source.curvatures.detach().double().cpu()
    count = min(k, slopes.shape[1])
    for i in range(count):
        # Eigenvalues ascend: the i-th largest is the i-th from the end.
        eigenvalue = float(source.values[-1 - i])
        label = f"direction {i + 1}, eigenvalue {eigenvalue:.3g}"
        _draw_direction(ax, slopes[:, -1 - i], curvatures[:, -1 - i], i, label)
    _scale_curvatures(ax, curvatures[:, -count:])
    ax.axvline(0, color=GREY, lw=0.6)
    ax.set(xlabel=r"slope $N\gamma_n$", ylabel=r"curvature $N\lambda_n$")
    return finish(ax)


def _draw_direction(ax: Axes, x: Tensor, y: Tensor, i: int, label: str) -> None:
    """Draw the samples along one eigenvector, with their mean and its bars."""
    ax.scatter(x.numpy(), y.numpy(), s=16, marker=marker(i), c=colour(i), alpha=0.45, linewidths=0)
    look: dict[str, Any] = {"fmt": marker(i), "color": colour(i), "ms": 9, "mec": INK}
    look |= {"ecolor": INK, "elinewidth": 0.9, "zorder": 3}
    mean_x, mean_y = float(x.mean()), float(y.mean())
    look |= {"yerr": _middle_range(y), "xerr": _middle_range(x)}
    ax.errorbar(mean_x, mean_y, label=label, **look)


def _scale_curvatures(ax: Axes, curvatures: Tensor) -> None:
    """Use a log scale unless some curvature is negative beyond rounding; a line at zero then."""
    largest = curvatures.max()
    negative = (curvatures < -1e-6 * largest).any()
    if not (curvatures > 0).any() or negative:
        ax.axhline(0, color=GREY, lw=0.6)
        return
    # Single samples that curve a million times less would squeeze all others into a line.
    lowest = max(float(curvatures.quantile(0.02)), 1e-5 * float(largest))
    ax.set(yscale="log", ylim=(lowest, 3 * float(largest)))


def _middle_range(values: Tensor) -> list[list[float]]:
    """Return how far the middle 80 % reach below and above the mean, as matplotlib takes it."""
    mean = values.mean()
    below = float(mean - values.quantile(0.1))
    above = float(values.quantile(0.9) - mean)
    return [[max(below, 0.0)], [max(above, 0.0)]]  # a mean may lie outside


# --- density --------------------------------------------------------------------------------------


def density(found: Density, ax: Axes | None = None, points: int = 400) -> Axes:
    """Draw a spectral density as ``unbatch.spectra.density`` estimates it, with a standard error.

    Smoothed by a Gaussian of the width ``found.width``, on a log scale of six decades.
    """
    if not isinstance(found, Density):
        raise InputError(MSG_DENSITY.format(value=type(found).__name__))
    ax = blank(ax)
    margin = 4 * found.width
    low, high = float(found.nodes.min()) - margin, float(found.nodes.max()) + margin
    grid = torch.linspace(low, high, points, dtype=torch.float64)
    smoothed = found.on(grid)
    value, error = smoothed.values.cpu(), smoothed.standard_errors.cpu()
    # The Gaussian falls without end, and nothing at all has no place on a log scale.
    highest = float(value.max())
    floor = highest * 1e-6
    below = (value - error).clamp_min(floor).numpy()
    above = (value + error).clamp_min(floor).numpy()
    label = f"± standard error, {len(found.nodes)} probes"
    ax.fill_between(grid.numpy(), below, above, color=SKY, alpha=0.5, lw=0, label=label)
    label = f"density of {found.size} eigenvalues"
    ax.plot(grid.numpy(), value.numpy(), color=BLUE, lw=1.4, label=label)
    ax.set_yscale("log")
    ax.set(xlabel="eigenvalue", ylabel="density", ylim=(floor, 3 * highest))
    return finish(ax)
