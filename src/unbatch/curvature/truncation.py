"""How many directions of the batch statistics a tolerance needs, and the error of that many.

What is estimated here, and how directions are used, is derived in ``low_rank.py``; the legend is
the same.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor

from unbatch.curvature.low_rank import Basis, CoefficientSVD
from unbatch.linalg.probes import random_signs, seeded
from unbatch.running.tasks import task

START = 8  # directions that are tried first

SAFETY = 0.7  # of the tolerance, which the next rank aims at

WHAT_IS_MISSING = "What is missing with {rank} directions"

TINY = torch.finfo(torch.float64).tiny


class ResidualEstimator(ABC):
    """Estimates what is missing at a rank, relative to what was asked for.

    ``pullbacks``, ``pushes``: backward and forward passes spent on that so far. ``remainder``: the
    last estimate of what is missing from the diagonal, where it is that which is estimated.
    """

    pullbacks, pushes = 0, 0
    remainder: Tensor | None = None

    @abstractmethod
    def relative_error(self, r: int) -> float:
        """Return the estimate at rank ``r``, in the Frobenius norm."""


def truncated_basis(
    svd: CoefficientSVD, estimator: ResidualEstimator, rtol: float, seed: int, most_rows: int
) -> Basis | None:
    """Return as few directions as meet ``rtol`` by the estimate, or all.

    None where they would be more than ``most_rows``. The next rank to try is read off the singular
    values: the error is taken to fall as what is left of ``Σ σ²``.
    """
    r, full = min(START, len(svd.values)), len(svd.values)
    left = svd.values.square().flip(0).cumsum(0).flip(0)  # what is left from rank r on
    error = 0.0
    # Rows of an earlier rank are kept, so every direction is pulled back once.
    while r < full and r <= most_rows:
        error = estimator.relative_error(r)
        if error <= rtol:
            break
        goal = left[r] * (SAFETY * rtol / error)
        r = min(full, max(r + START // 2, int((left > goal).sum())))
        error = 0.0  # of all directions, if that is what r is now
    if r > most_rows:
        return None
    return _basis(svd, r, error, estimator, seed)


def _basis(
    svd: CoefficientSVD, r: int, error: float, estimator: ResidualEstimator, seed: int
) -> Basis:
    """Return the first r directions, with what was spent on finding that many."""
    exact = r == len(svd.values)
    return Basis(
        directions=svd.u[:, :r].to(svd.root.like),
        rows=svd.leading_rows(r),
        exact=exact,
        estimate=error,
        pullbacks=svd.root.layout[1] + r + estimator.pullbacks,
        pushes=estimator.pushes,
        seed=seed,
        remainder=None if exact else estimator.remainder,
    )


class DiagonalResidual(ResidualEstimator):
    """What is missing from the diagonal of G.

    From ``draws`` vectors of random signs, fresh ones for every rank that is tried.
    """

    def __init__(self, svd: CoefficientSVD, draws: int, seed: int) -> None:
        self.svd, self.draws = svd, draws
        self.generator = seeded(seed)
        self.size = self._size_of_diagonal()
        self.pullbacks += draws

    def _size_of_diagonal(self) -> float:
        """Return an estimate of the norm of the diagonal, whose draws are ``(V z)²``.

        Products of different draws, which are independent, give its square without bias; that may
        come out as negative or too small, so it is bounded by the square of the mean.
        """
        draws = []
        with task("Size of the diagonal, by random signs", self.draws) as passes:
            for _ in passes.over(range(self.draws)):
                z = self._signs(len(self.svd.w))
                draws.append(self.svd.times(z).square())
        diagonals = torch.stack(draws)
        products = diagonals.sum(0).square().sum() - diagonals.square().sum()
        unbiased = products / (self.draws * (self.draws - 1))
        least = diagonals.mean(0).square().sum() / self.draws
        return float(unbiased.clamp_min(least).sqrt())

    def _signs(self, count: int) -> Tensor:
        return random_signs(count, self.generator).double().to(self.svd.w.device)

    def relative_error(self, r: int) -> float:
        tail = len(self.svd.values) - r
        residuals = []
        with task(WHAT_IS_MISSING.format(rank=r), self.draws, "draws") as draws:
            for _ in draws.over(range(self.draws)):
                z = self._signs(tail)
                residuals.append(self.svd.diagonal_residual(r, z))
        self.remainder = torch.stack(residuals).mean(0)
        self.pullbacks += 2 * self.draws  # through the statistics, and beside them
        return float(self.remainder.norm()) / max(self.size, TINY)


class GramResidual(ResidualEstimator):
    """What is missing from ``VᵀV``: products with random signs, exact and at rank r.

    The same ``draws`` vectors for every rank, so that the exact products are taken once.
    """

    def __init__(self, svd: CoefficientSVD, draws: int, seed: int) -> None:
        self.svd = svd
        generator = seeded(seed)
        self.signs: list[Tensor] = []
        self.exact: list[Tensor] = []  # ``VᵀV z``
        self.frozen: list[Tensor] = []  # ``P z``
        with task("Products of random signs", draws, "draws") as drawn:
            for _ in drawn.over(range(draws)):
                z = random_signs(len(svd.w), generator).double()
                self.signs.append(z)
                self.exact.append(svd.transposed_times(svd.times(z)))
                self.frozen.append(svd.frozen_times(z))
        self.pullbacks, self.pushes = 2 * draws, draws

    def relative_error(self, r: int) -> float:
        svd = self.svd
        rows = svd.leading_rows(r).double()
        w = svd.w[:, :r] * svd.values[:r]
        self.pushes += len(self.signs)
        error, size = 0.0, 0.0
        products = zip(self.signs, self.exact, self.frozen, strict=True)
        with task(WHAT_IS_MISSING.format(rank=r), len(self.signs), "draws") as draws:
            for z, exact, frozen in draws.over(products):
                # V_r z = P z + rowsᵀ (σ wᵀ z), and V_rᵀ v = Pᵀ v + w σ (rows v)
                v = frozen + rows.T @ (w.T @ z.to(w))
                residual = exact - svd.frozen_transposed_times(v) - w @ (rows @ v)
                error += float(residual.square().sum())
                size += float(exact.square().sum())
        return math.sqrt(error / max(size, TINY))
