"""Columns of the Gauss-Newton factor by way of batch statistics: all of them, or as many directions as are felt.

``V = P + Bᵀ A`` (``statistics.py``). A costs one pullback for every column of a *sample*, whatever N is, so it is
known before anything is spent on B; ``A = U diag(σ) Wᵀ``. With all of B, ``R`` pullbacks, V is exact. With ``r``
pullbacks ``Bᵀ u_j`` of the leading left singular vectors it is ``P + Bᵀ U_r U_rᵀ A``, and what is missing from the
diagonal of G is ``Σ_{j>r} 2 (Bᵀ u_j) ∘ (P Aᵀ u_j) + σ_j² (Bᵀ u_j)²``: since ``U_rᵀ A Aᵀ u_j = 0`` no other term
is left. Random signs over the tail estimate it without bias, for two pullbacks a draw.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from unbatch.autodiff.contractions.row_block import RowBlock
from unbatch.autodiff.jvp import Linearised
from unbatch.curvature.batch_statistics import Extent, Statistics
from unbatch.curvature.hessian_root import Factor
from unbatch.gradients.sources import Chunking, Source, Take
from unbatch.linalg.probes import random_signs, seeded
from unbatch.linalg.rows import wide
from unbatch.linalg.space import Space

START = 8  # directions that are tried first


@dataclass(frozen=True, eq=False)
class Basis:
    """``B̃ = turnᵀ B``: ``rows`` ``[r, D]``, and ``turn`` ``[R, r]``, so that ``V ≈ P + rowsᵀ (turnᵀ A)``.

    ``exact``: nothing is missing. ``estimate``: of the relative error (Frobenius norm) of what was asked for; ``cost``:
    pullbacks and push-forwards that were spent on it, of one backward or forward pass each, or less.
    """

    turn: Tensor
    rows: Tensor
    exact: bool
    estimate: float
    pullbacks: int
    pushes: int = 0
    seed: int = 0
    remainder: Tensor | None = (
        None  # ``[D]``: of the diagonal, an unbiased estimate of what is missing
    )

    @property
    def rank(self) -> int:
        return self.turn.shape[1]


@dataclass(frozen=True)
class Compression:
    """How much of what runs through batch statistics is in a result.

    ``rank`` directions of all ``statistics`` were followed (none where columns were pulled back one by one); ``exact``:
    nothing is missing. ``estimate``: of the relative error (Frobenius norm), from random signs drawn with ``seed``.
    ``pullbacks`` and ``pushes``: backward and forward passes spent on what runs through the statistics.
    """

    rank: int
    statistics: int
    exact: bool
    estimate: float
    pullbacks: int
    pushes: int
    seed: int


class CoefficientSVD:
    """``A``, taken apart: ``u`` ``[R, q]``, ``values`` descending, ``w`` ``[size, q]``; kept for further questions."""

    def __init__(self, statistics: Statistics, root: Factor, space: Space) -> None:
        self.statistics, self.root, self.space = statistics, root, space
        self.known, self.rows = (
            0,
            root.root.new_empty(0, space.size),
        )  # ``Bᵀ u_j`` of the first directions

    @cached_property
    def _parts(self) -> tuple[Tensor, Tensor, Tensor]:
        a = self.coefficients().double()
        u, values, wh = torch.linalg.svd(a, full_matrices=False)
        felt = values > max(a.shape) * torch.finfo(self.root.root.dtype).eps * values[:1]
        return u[:, felt], values[felt], wh[felt].T

    @property
    def u(self) -> Tensor:
        return self._parts[0]

    @property
    def values(self) -> Tensor:
        return self._parts[1]

    @property
    def w(self) -> Tensor:
        return self._parts[2]

    def coefficients(self) -> Tensor:
        """``A``, ``[R, size]``: columns in the order of the root."""
        samples, columns = self.root.table
        a = self.root.root.new_zeros(self.statistics.size, samples, columns)
        for j in range(columns):
            a[:, :, j] = self.statistics.coefficients(self.root.column(j)).T
        return a.flatten(1)

    def upto(self, r: int) -> Tensor:
        """``Bᵀ u_j`` for the first r: ``[r, D]``."""
        if r > len(self.rows):
            more = self.rows.new_empty(r, self.space.size)
            more[: self.known] = self.rows[: self.known]
            self.rows = more
        for j in range(self.known, r):
            self.rows[j] = self.pull(self.u[:, j])
        self.known = max(self.known, r)
        return self.rows[:r]

    def pull(self, u: Tensor) -> Tensor:
        """``Bᵀ u``."""
        return self.space.flat(self.statistics.pull(u.to(self.root.root)))

    def frozen(self, a: Tensor) -> Tensor:
        """``P a`` for ``a`` ``[size]``."""
        frozen = self.statistics.frozen
        return self.space.flat(frozen.pull(self.root.times(a.to(self.root.root)))).double()

    def column(self, a: Tensor) -> Tensor:
        """``V a``."""
        return self.space.flat(
            self.statistics.free.pull(self.root.times(a.to(self.root.root)))
        ).double()

    def transposed(self, v: Tensor) -> Tensor:
        """``Vᵀ v``, ``[size]``."""
        return self._pushed(self.statistics.free, v)

    def transposed_frozen(self, v: Tensor) -> Tensor:
        """``Pᵀ v``."""
        return self._pushed(self.statistics.frozen, v)

    def _pushed(self, linearised: Linearised, v: Tensor) -> Tensor:
        pushed = linearised.push(self.space.named(v.to(self.root.root)))
        return self.root.transposed_times(pushed).double()

    def tail(self, r: int, z: Tensor) -> Tensor:
        """One draw of what is missing from the diagonal, for signs ``z`` ``[q - r]``: ``[D]``."""
        through = self.pull(self.u[:, r:] @ (self.values[r:] * z)).double()
        return 2 * through * self.frozen(self.w[:, r:] @ z) + through.square()

    def basis(self, r: int, estimate: float, missing: ResidualEstimator, seed: int) -> Basis:
        turn, exact = self.u[:, :r].to(self.root.root), r == len(self.values)
        pullbacks = self.root.table[1] + r + missing.pullbacks
        remainder = None if exact else missing.remainder
        return Basis(
            turn, self.upto(r), exact, estimate, pullbacks, missing.pushes, seed, remainder
        )


def everything(statistics: Statistics, space: Space) -> Basis:
    """All statistics, each pulled back on its own, only from where it is taken."""
    like = statistics.norms[0].moments[0]
    turn = torch.eye(statistics.size, dtype=like.dtype, device=like.device)
    rows = turn.new_empty(statistics.size, space.size)
    for row, unit in zip(rows, turn, strict=True):
        row.copy_(space.flat(statistics.pull(unit)))
    return Basis(turn, rows, True, 0.0, statistics.size)


@dataclass(frozen=True)
class CostEstimate:
    """What both ways take, in multiplications; true where all statistics are to be pulled back, and not all columns."""

    columns: int
    statistics: int
    passes: float  # pullbacks of all statistics, as parts of a whole one: each ends below where its batch norm is
    by_columns: float
    by_statistics: float
    fits: bool

    def __bool__(self) -> bool:
        return self.fits and self.by_statistics < self.by_columns

    @property
    def reason(self) -> str:
        both = (
            f"Pulling back all {self.statistics} batch statistics ({self.passes:.0f} whole passes) and combining them "
            f"is counted at {self.by_statistics / self.by_columns:.2g} times what {self.columns} columns below the "
            "last mixing take."
        )
        return both if self.fits else f"{both} It would not fit into the memory budget."


def estimate_cost(extent: Extent, columns: int, entries: int, memory: int) -> CostEstimate:
    """Count what it takes to pull back all statistics, and ``columns``, each below the last mixing.

    A pullback takes two multiplications for each of the forward pass; combining takes one for every statistic, column
    and parameter entry. ``B`` has to fit into half of ``memory``.
    """
    by_columns = 2 * columns * extent.shares[-1] * extent.work
    by_statistics = 2 * extent.passes * extent.work + extent.size * columns * entries
    fits = 2 * extent.size * entries * extent.element_size <= memory
    return CostEstimate(columns, extent.size, extent.passes, by_columns, by_statistics, fits)


# --- as many directions as are felt ---------------------------------------------------------------


class ResidualEstimator(ABC):
    """Estimates what is missing at a rank, relative to what was asked for. ``pullbacks``, ``pushes``: spent on that."""

    pullbacks, pushes = 0, 0
    remainder: Tensor | None = None

    @abstractmethod
    def __call__(self, r: int) -> float: ...


def compressed(
    spread: CoefficientSVD, missing: ResidualEstimator, rtol: float, seed: int, most_rows: int
) -> Basis | None:
    """As few directions as meet ``rtol`` by the estimate, or all; None where they would be more than ``most_rows``.

    The next rank to try is read off the singular values: the error is taken to fall as what is left of ``Σ σ²``.
    """
    r, most = min(START, len(spread.values)), len(spread.values)
    left = spread.values.square().flip(0).cumsum(0).flip(0)  # what is left from rank r on
    estimate = 0.0
    while r < most and r <= most_rows:
        estimate = missing(r)
        if estimate <= rtol:
            break
        goal, estimate = left[r] * (0.7 * rtol / estimate), 0.0
        r = min(most, max(r + START // 2, int((left > goal).sum())))
    return spread.basis(r, estimate, missing, seed) if r <= most_rows else None


class OfDiagonal(ResidualEstimator):
    """What is missing from the diagonal of G, from ``draws`` vectors of random signs for every rank that is tried."""

    def __init__(self, spread: CoefficientSVD, draws: int, seed: int) -> None:
        self.spread, self.draws = spread, draws
        self.generator = seeded(seed)
        signs = [self._signs(len(spread.w)) for _ in range(draws)]
        whole = torch.stack([spread.column(z).square() for z in signs])
        together = (
            whole.sum(0).square().sum() - whole.square().sum()
        )  # of different draws, which are independent
        self.size = float(
            (together / (draws * (draws - 1)))
            .clamp_min(whole.mean(0).square().sum() / draws)
            .sqrt()
        )
        self.pullbacks += draws

    def _signs(self, count: int) -> Tensor:
        return random_signs(count, self.generator).double().to(self.spread.w.device)

    def __call__(self, r: int) -> float:
        drawn = [
            self.spread.tail(r, self._signs(len(self.spread.values) - r)) for _ in range(self.draws)
        ]
        self.remainder = torch.stack(drawn).mean(0)
        self.pullbacks += 2 * self.draws
        return float(self.remainder.norm()) / max(self.size, torch.finfo(torch.float64).tiny)


class OfGram(ResidualEstimator):
    """What is missing from ``VᵀV``: products with ``draws`` vectors of random signs, true and at rank r."""

    def __init__(self, spread: CoefficientSVD, draws: int, seed: int) -> None:
        self.spread = spread
        generator = seeded(seed)
        self.signs = [random_signs(len(spread.w), generator).double() for _ in range(draws)]
        self.true = [spread.transposed(spread.column(z)) for z in self.signs]
        self.held = [spread.frozen(z) for z in self.signs]
        self.pullbacks, self.pushes = 2 * draws, draws

    def __call__(self, r: int) -> float:
        spread, rows = self.spread, self.spread.upto(r)
        w, rows = spread.w[:, :r] * spread.values[:r], rows.double()
        self.pushes += len(self.signs)
        off = 0.0
        for z, true, held in zip(self.signs, self.true, self.held, strict=True):
            z = z.to(w)
            v = held + rows.T @ (w.T @ z)
            off += float((true - spread.transposed_frozen(v) - w @ (rows @ v)).square().sum())
        return math.sqrt(
            off
            / max(sum(float(t.square().sum()) for t in self.true), torch.finfo(torch.float64).tiny)
        )


# --- what feeds collectors ------------------------------------------------------------------------


class CorrectedSource:
    """Frozen columns, completed by what runs through the statistics."""

    def __init__(
        self,
        frozen: Source,
        statistics: Statistics,
        basis: Basis,
        space: Space,
        names: Sequence[str],
    ) -> None:
        self.inner, self.statistics, self.basis = frozen, statistics, basis
        self.shapes = {name: space.shapes[name] for name in names}
        self.rows = {name: basis.rows[:, space.slices[name]] for name in names}

    def feed(
        self, plan: Chunking, take: Take, outs: Mapping[str, Tensor], given: Mapping[int, Tensor] | None = None,
        last: bool = True,
    ) -> None:  # fmt: skip
        assert given is not None
        a = self.statistics.coefficients(given) @ self.basis.turn
        seen: set[str] = set()

        def completed(name: str, part: RowBlock) -> None:
            seen.add(name)
            rows = wide(part.rows())
            whole = torch.addmm(
                rows.flatten(1) if rows.ndim > 1 else rows[:, None], a[part.where], self.rows[name]
            )
            take(name, RowBlock(part.where, whole.view(len(rows), *self.shapes[name])))

        self.inner.feed(replace(plan, needs=frozenset({"rows"})), completed, {}, given, last)
        for name in [n for n in self.shapes if n not in seen]:
            take(
                name,
                RowBlock(slice(0, len(a)), (a @ self.rows[name]).view(len(a), *self.shapes[name])),
            )
