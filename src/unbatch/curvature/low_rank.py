"""Columns of the Gauss-Newton factor by way of batch statistics: all of them, or few directions.

Legend: ``V`` the factor, ``P`` its columns with all statistics held constant, ``A`` ``[R, size]``
and ``B`` ``[R, D]`` as in ``batch_statistics.py``; ``A = U diag(σ) Wᵀ``.

    V = P + Bᵀ A

A costs one pullback for every column of a *sample*, whatever N is, so it is known before anything
is spent on B. With all of B, ``R`` pullbacks, V is exact. With ``r`` pullbacks ``Bᵀ u_j`` of the
leading left singular vectors it is ``P + Bᵀ U_r U_rᵀ A``, and what is missing from the diagonal of
G is

    Σ_{j>r} 2 (Bᵀ u_j) ∘ (P Aᵀ u_j) + σ_j² (Bᵀ u_j)²

since ``U_rᵀ A Aᵀ u_j = 0``: no other term is left. Random signs over the tail estimate it without
bias, for two pullbacks a draw. How many directions a tolerance needs is found in ``truncation.py``;
whether this way is taken at all, in ``strategy.py``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from unbatch.autodiff.contractions.row_block import RowBlock
from unbatch.autodiff.jvp import Linearised
from unbatch.curvature.batch_statistics import Statistics, StatisticsCost
from unbatch.curvature.hessian_root import HessianRoot, SampleRoot
from unbatch.gradients.sources import Chunking, Source, Take
from unbatch.linalg.rows import wide
from unbatch.linalg.space import Space
from unbatch.running.tasks import task

# --- directions of the statistics -----------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Basis:
    """Directions of the statistics, pulled back: ``V ≈ P + rowsᵀ (directionsᵀ A)``.

    ``directions`` ``[R, r]``, orthonormal; ``rows = directionsᵀ B`` ``[r, D]``. ``exact``: nothing
    is missing. ``estimate``: of the relative error (Frobenius norm) of what was asked for.
    ``pullbacks``, ``pushes``: backward and forward passes that were spent on it. ``remainder``
    ``[D]``: an unbiased estimate of what is missing from the diagonal; None where nothing is.
    """

    directions: Tensor
    rows: Tensor
    exact: bool
    estimate: float
    pullbacks: int
    pushes: int = 0
    seed: int = 0
    remainder: Tensor | None = None

    @property
    def rank(self) -> int:
        return self.directions.shape[1]


def full_basis(statistics: Statistics, space: Space) -> Basis:
    """Return all statistics, each pulled back on its own, only from where it is taken."""
    like = statistics.norms[0].moments[0]
    units = torch.eye(statistics.size, dtype=like.dtype, device=like.device)
    rows = units.new_empty(statistics.size, space.size)
    with task("Batch statistics pulled back", statistics.size) as passes:
        for row, unit in passes.over(zip(rows, units, strict=True)):
            # Copied into place: a list of rows and their stack would take twice the memory.
            row.copy_(space.flat(statistics.pull(unit)))
    return Basis(units, rows, True, 0.0, statistics.size)


@dataclass(frozen=True)
class Compression:
    """How much of what runs through batch statistics is in a result.

    ``rank`` directions of all ``statistics`` were followed (none where columns were pulled back one
    by one); ``exact``: nothing is missing. ``estimate``: of the relative error (Frobenius norm),
    from random signs drawn with ``seed``. ``pullbacks`` and ``pushes``: backward and forward passes
    spent on what runs through the statistics.
    """

    rank: int
    statistics: int
    exact: bool
    estimate: float
    pullbacks: int
    pushes: int
    seed: int

    @staticmethod
    def of(basis: Basis | None, root: HessianRoot, estimate: float | None = None) -> Compression:
        """Return the report of a basis; None for ``basis``: columns were pulled back one by one.

        ``estimate``: of the error of a result, where that is not the one of the basis.
        """
        if basis is None:
            # Separate columns are fed for all samples at once, the zero ones among them, too.
            columns = root.size if root.separate else root.rank
            return Compression(0, 0, True, 0.0, columns, 0, 0)
        return Compression(
            rank=basis.rank,
            statistics=len(basis.directions),
            exact=basis.exact,
            estimate=basis.estimate if estimate is None else estimate,
            pullbacks=basis.pullbacks,
            pushes=basis.pushes,
            seed=basis.seed,
        )


class CoefficientSVD:
    """``A = U diag(σ) Wᵀ``, and products with V, P and B; kept for further questions.

    Singular values that are rounding are left out: ``u`` ``[R, q]``, ``values`` descending, ``w``
    ``[size, q]``.
    """

    def __init__(self, statistics: Statistics, root: SampleRoot, space: Space) -> None:
        self.statistics, self.root, self.space = statistics, root, space
        self._rows = root.like.new_empty(0, space.size)  # ``Bᵀ u_j``, of which the first
        self._count = 0  # are computed

    @cached_property
    def _svd(self) -> tuple[Tensor, Tensor, Tensor]:
        a = self.coefficients().double()
        u, values, wh = torch.linalg.svd(a, full_matrices=False)
        # a was computed in the type of the root, whatever the decomposition is taken in.
        rounding = max(a.shape) * torch.finfo(self.root.like.dtype).eps
        above = values > rounding * values[:1]
        return u[:, above], values[above], wh[above].T

    @property
    def u(self) -> Tensor:
        return self._svd[0]

    @property
    def values(self) -> Tensor:
        return self._svd[1]

    @property
    def w(self) -> Tensor:
        return self._svd[2]

    def coefficients(self) -> Tensor:
        """Return ``A``, ``[R, size]``: columns in the order of the root."""
        samples, columns = self.root.layout
        a = self.root.like.new_zeros(self.statistics.size, samples, columns)
        with task("Columns pulled back to the batch statistics", columns) as passes:
            for j in passes.over(range(columns)):
                # One pullback gives the j-th column of all samples.
                a[:, :, j] = self.statistics.coefficients(self.root.column(j)).T
        return a.flatten(1)

    def leading_rows(self, r: int) -> Tensor:
        """Return ``Bᵀ u_j`` for the first r, ``[r, D]``; those of an earlier call are kept."""
        if r > len(self._rows):
            # Grown by the caller's steps: a row has as many entries as there are parameters.
            larger = self._rows.new_empty(r, self.space.size)
            larger[: self._count] = self._rows[: self._count]
            self._rows = larger
        more = range(self._count, r)
        with task("Directions of the batch statistics pulled back", len(more)) as passes:
            for j in passes.over(more):
                self._rows[j] = self.statistics_pull(self.u[:, j])
                self._count = j + 1
        return self._rows[:r]

    def statistics_pull(self, u: Tensor) -> Tensor:
        """Return ``Bᵀ u``, ``[D]``."""
        return self.space.flat(self.statistics.pull(u.to(self.root.like)))

    def times(self, a: Tensor) -> Tensor:
        """Return ``V a`` for ``a`` ``[size]``, in float64."""
        return self._pull(self.statistics.free, a)

    def frozen_times(self, a: Tensor) -> Tensor:
        """Return ``P a``."""
        return self._pull(self.statistics.frozen, a)

    def transposed_times(self, v: Tensor) -> Tensor:
        """Return ``Vᵀ v``, ``[size]``, in float64."""
        return self._push(self.statistics.free, v)

    def frozen_transposed_times(self, v: Tensor) -> Tensor:
        """Return ``Pᵀ v``."""
        return self._push(self.statistics.frozen, v)

    def _pull(self, linearised: Linearised, a: Tensor) -> Tensor:
        cotangents = self.root.times(a.to(self.root.like))
        return self.space.flat(linearised.pull(cotangents)).double()

    def _push(self, linearised: Linearised, v: Tensor) -> Tensor:
        tangents = linearised.push(self.space.named(v.to(self.root.like)))
        return self.root.transposed_times(tangents).double()

    def diagonal_residual(self, r: int, signs: Tensor) -> Tensor:
        """Return one draw of what is missing from the diagonal at rank r, ``[D]``.

        For random ``signs``, ``[q - r]``: the mean over signs of ``2 (Bᵀ U σ z) ∘ (P W z)`` and
        ``(Bᵀ U σ z)²``, summed over the tail, are the two terms above.
        """
        through = self.statistics_pull(self.u[:, r:] @ (self.values[r:] * signs)).double()
        return 2 * through * self.frozen_times(self.w[:, r:] @ signs) + through.square()


# --- what feeds collectors ------------------------------------------------------------------------


class CorrectedSource:
    """Columns with statistics held constant, plus the low-rank correction through these.

    ``frozen``: what feeds the former.
    """

    def __init__(
        self,
        frozen: Source,
        statistics: Statistics,
        basis: Basis,
        space: Space,
        names: Sequence[str],
    ) -> None:
        self.frozen, self.statistics, self.basis = frozen, statistics, basis
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.rows: dict[str, Tensor] = {}  # of the basis, [r, entries of the parameter]
        for name in names:
            self.shapes[name] = space.shapes[name]
            self.rows[name] = basis.rows[:, space.slices[name]]

    def feed(
        self,
        chunks: Chunking,
        take: Take,
        outs: Mapping[str, Tensor],
        cotangents: Mapping[int, Tensor],
        last: bool = True,
    ) -> None:
        """Feed one column of every sample, for ``cotangents`` of the predictions."""
        a = self.statistics.coefficients(cotangents) @ self.basis.directions  # [n, r]
        fed: set[str] = set()

        def corrected(name: str, block: RowBlock) -> None:
            fed.add(name)
            rows = wide(block.rows())
            flat = rows.flatten(1) if rows.ndim > 1 else rows[:, None]  # a single number
            complete = torch.addmm(flat, a[block.where], self.rows[name])
            take(name, RowBlock(block.where, complete.view(len(rows), *self.shapes[name])))

        # The correction is added to rows: what needs none of them cannot be had from the parts.
        self.frozen.feed(
            replace(chunks, needs=frozenset({"rows"})), corrected, {}, cotangents, last
        )
        for name, shape in self.shapes.items():
            # With statistics constant no prediction depends on these: the correction is all.
            if name not in fed:
                rows = (a @ self.rows[name]).view(len(a), *shape)
                take(name, RowBlock(slice(0, len(a)), rows))


# --- what it costs --------------------------------------------------------------------------------


@dataclass(frozen=True)
class CostEstimate:
    """What both ways take, in multiplications.

    ``passes``: pullbacks of all statistics, as parts of a whole one, as each ends below where its
    batch norm is. ``fits``: into the memory budget. True where all statistics are to be pulled
    back, and not all columns.
    """

    columns: int
    statistics: int
    passes: float
    by_columns: float
    by_statistics: float
    fits: bool

    def __bool__(self) -> bool:
        return self.fits and self.by_statistics < self.by_columns

    @property
    def least(self) -> float:
        """Return what the way that is taken takes."""
        return self.by_statistics if self else self.by_columns

    @property
    def reason(self) -> str:
        """Return the comparison in words."""
        ratio = self.by_statistics / self.by_columns
        text = (
            f"Pulling back all {self.statistics} batch statistics ({self.passes:.0f} whole passes) "
            f"and combining them is counted at {ratio:.2g} times what {self.columns} columns below "
            "the last mixing take."
        )
        if not self.fits:
            text += " It would not fit into the memory budget."
        return text


def estimate_cost(cost: StatisticsCost, columns: int, entries: int, memory: int) -> CostEstimate:
    """Count what it takes to pull back all statistics, and ``columns``, each below the last mixing.

    A pullback takes two multiplications for each of the forward pass; combining takes one for every
    statistic, column and parameter entry. ``B`` has to fit into half of ``memory``.
    """
    by_columns = 2 * columns * cost.shares[-1] * cost.work
    by_statistics = 2 * cost.passes * cost.work + cost.size * columns * entries
    fits = 2 * cost.size * entries * cost.element_size <= memory
    return CostEstimate(columns, cost.size, cost.passes, by_columns, by_statistics, fits)
