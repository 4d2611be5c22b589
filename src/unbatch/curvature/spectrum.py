"""What follows from a small matrix that has the spectrum of G: eigenpairs, determinants, solves.

The small matrix is the Gram matrix ``VᵀV`` of the columns of V where these are fewer than the
parameters (Dangel, Tatzel, Hennig 2021, "ViViT"), or G itself where the parameters are fewer. No
networks here: V is an operator that is known by its products. Spectra of operators without a small
matrix: ``linalg/spectra.py``. Which is taken is decided in ``ways.py``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from unbatch.errors import (
    MSG_DAMPING,
    MSG_MATRIX_NOT_FINITE,
    MSG_NO_DAMPING,
    MSG_NOT_DEFINITE,
    MSG_SINGULAR,
    InputError,
    StructureError,
)
from unbatch.linalg import spectra
from unbatch.linalg.operators import Operator
from unbatch.linalg.rows import sum_of
from unbatch.linalg.solvers import Solved, conjugate_gradients
from unbatch.linalg.space import Space
from unbatch.linalg.spectra import Eigenpairs
from unbatch.running.tasks import task

# Of the residuals of a few eigenpairs of a formed matrix, found by products with it: what a
# decomposition of the whole matrix would leave, about.
FORMED_RTOL = 1e-12

# One call, of which nobody knows how far it is.
DECOMPOSED = "Decomposing a matrix of {rows:,} rows"

# A few: as many times fewer than the matrix has rows; which are so many at least, as smaller ones
# are decomposed in no time.
FEW, LEAST_ROWS = 20, 800


@dataclass(frozen=True)
class Directions:
    """Eigenvectors of G, and the slope and curvature of each component along them.

    ``values`` ``[k]``, ascending; ``vectors`` ``[D, k]``. ``slopes`` ``γ``, ``[N, k]``, sum over n
    to the slope of the loss along each direction; ``curvatures`` ``λ``, ``[N, k]``, sum to
    ``values``. All in the scale of the loss, where those of ViViT are N times as large and average
    to slope and curvature.
    """

    values: Tensor
    vectors: Tensor
    slopes: Tensor
    curvatures: Tensor
    space: Space

    def named(self) -> dict[str, Tensor]:
        """Return the eigenvectors by parameter, ``[*param, k]``."""
        return self.space.named(self.vectors)


# --- eigenvalues and eigenvectors -----------------------------------------------------------------


def checked(gram: Tensor, what: str) -> Tensor:
    """Return a Gram matrix whose entries are finite.

    ``what``: is asked for, in words. Raises ``StructureError`` where they are not: decompositions
    fail then, or return anything.
    """
    if not gram.isfinite().all():
        raise StructureError(MSG_MATRIX_NOT_FINITE.format(what=what))
    return gram


def above_rounding(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Return which eigenvalues of a Gram matrix, ascending, are more than rounding in ``dtype``."""
    return values > len(values) * torch.finfo(dtype).eps * values[-1:]


class Decomposition(ABC):
    """A small matrix with the eigenvalues of G, in float64, and what is made of it.

    Kept between questions: each part is computed when it is first asked for.
    """

    @property
    def is_decomposed(self) -> bool:
        """Return whether eigenvalues and eigenvectors are there from an earlier question."""
        return "_spectrum" in vars(self)

    @abstractmethod
    def eigenvalues(self, working: torch.dtype) -> Tensor:
        """Return those that are not zero, ascending, computed in ``working``."""

    @abstractmethod
    def largest(self, k: int | None) -> tuple[Tensor, Tensor]:
        """Return the ``k`` largest eigenvalues that are not zero, ascending; all of them for None.

        And their eigenvectors in the coordinates of the small matrix, as columns, in float64.
        """

    @abstractmethod
    def vectors(self, coordinates: Tensor) -> Tensor:
        """Return vectors ``[D, K]`` of their coordinates."""

    @abstractmethod
    def coordinates(self, v: Tensor) -> Tensor:
        """Return the inner products of ``v`` ``[D]`` with what the coordinates belong to."""

    @abstractmethod
    def solve(self, b: Tensor, damping: float) -> Tensor:
        """Return ``(G + δI)⁻¹ b`` up to rounding."""

    def pairs(self, k: int | None) -> Eigenpairs:
        """Return the ``k`` eigenpairs with the largest eigenvalues, values ascending."""
        values, coefficients = self.largest(k)
        # Of unit length up to rounding, which is large for small eigenvalues.
        vectors = torch.nn.functional.normalize(self.vectors(coefficients), dim=0)
        return Eigenpairs(values.to(vectors.dtype), vectors)

    def newton_step(self, gradient: Tensor, damping: float | Tensor, k: int | None) -> Tensor:
        """Return ``−Σ_i γ_i / (λ_i + δ_i) e_i`` with ``γ_i = e_iᵀ g``, ``[D]``."""
        values, coefficients = self.largest(k)
        shifts = checked_damping(damping, values)
        slopes = coefficients.T @ self.coordinates(gradient).double()
        along = coefficients @ (slopes / (values + shifts))
        return -self.vectors(along[:, None])[:, 0]


class GramDecomposition(Decomposition):
    """By ``gram = VᵀV``, in float64, for ``G = V Σ Vᵀ``; ``signs``: the diagonal of Σ.

    ``factor`` returns V, which eigenvalues do not need; ``rounded``: the type that has rounded
    most where that was computed.
    Where all signs are positive, ``VᵀV`` and ``VVᵀ`` have the same eigenvalues, and an eigenvector
    ``a`` of the first gives ``V a / √λ`` of the second. With other signs, those of G are those of
    ``(VᵀV)^½ Σ (VᵀV)^½``, which is symmetric.
    """

    def __init__(
        self, factor: Callable[[], Operator], gram: Tensor, signs: Tensor, rounded: torch.dtype
    ) -> None:
        self.factor, self.rounded = factor, rounded
        self.gram, self.signs = gram, signs.double()
        self._eigenvalues: dict[torch.dtype, Tensor] = {}
        self._largest: dict[int, tuple[Tensor, Tensor]] = {}

    @cached_property
    def _is_positive(self) -> bool:
        return bool((self.signs > 0).all())

    @cached_property
    def _spectrum(self) -> tuple[Tensor, Tensor]:
        """Eigenvalues that are not zero, ascending, and ``A`` of eigenvectors ``V A``."""
        # VᵀV = Q Λ Qᵀ
        gram = checked(self.gram, "Eigenvalues and eigenvectors")
        with task(DECOMPOSED.format(rows=len(gram))):
            values, vectors = torch.linalg.eigh(gram)
        nonzero = above_rounding(values, self.rounded)
        values, vectors = values[nonzero], vectors[:, nonzero]
        if self._is_positive:
            return values, vectors / values.sqrt()
        # With Λ^½ Qᵀ Σ Q Λ^½ = P Θ Pᵀ, the columns of V Q Λ^-½ P are eigenvectors of G: as
        # V = V Q Qᵀ, V Σ Vᵀ (V Q Λ^-½ P) = V Q Qᵀ Σ Q Λ^½ P = V Q Λ^-½ P Θ.
        half = vectors * values.sqrt()
        signed, rotation = torch.linalg.eigh(half.T @ (self.signs[:, None] * half))
        return signed, (vectors / values.sqrt()) @ rotation

    def eigenvalues(self, working: torch.dtype) -> Tensor:
        gram = checked(self.gram, "Eigenvalues")
        if not self._is_positive:
            return self._spectrum[0]  # always in float64
        if working not in self._eigenvalues:
            # No eigenvectors are needed for them.
            with task(DECOMPOSED.format(rows=len(gram))):
                values = torch.linalg.eigvalsh(gram.to(working))
            self._eigenvalues[working] = values[above_rounding(values, self.rounded)]
        return self._eigenvalues[working]

    def largest(self, k: int | None) -> tuple[Tensor, Tensor]:
        if k is not None and self._is_positive and not self.is_decomposed:
            few = self._few(k)
            if few is not None:
                return few
        return last(*self._spectrum, k)

    def _few(self, k: int) -> tuple[Tensor, Tensor] | None:
        """Return the same by products with the small matrix; None where that is no cheaper."""
        if k not in self._largest:
            found = few_eigenpairs(checked(self.gram, "Eigenvalues and eigenvectors"), k)
            if found is None:
                return None
            values, vectors = found
            rounding = len(self.gram) * torch.finfo(self.rounded).eps
            nonzero = values > rounding * values[-1:]
            values = values[nonzero]
            self._largest[k] = values, vectors[:, nonzero] / values.sqrt()
        return self._largest[k]

    def vectors(self, coordinates: Tensor) -> Tensor:
        vectors: Tensor = self.factor() @ coordinates
        return vectors

    def coordinates(self, v: Tensor) -> Tensor:
        products: Tensor = self.factor().T @ v
        return products

    def solve(self, b: Tensor, damping: float) -> Tensor:
        """Return ``(b − V (δΣ + VᵀV)⁻¹ Vᵀ b) / δ`` (Woodbury)."""
        if damping == 0:
            raise InputError(MSG_NO_DAMPING)
        # As many equations as there are columns.
        inner = checked(self.gram, "Solutions") + damping * torch.diag(self.signs)
        a = torch.linalg.solve(inner, self.coordinates(b).double())
        return (b - self.vectors(a[:, None])[:, 0]) / damping


class DenseDecomposition(Decomposition):
    """By G itself, ``matrix`` ``[D, D]`` in float64.

    ``dtype``: of its vectors; ``rounded``: the type that has rounded most.
    """

    def __init__(self, matrix: Tensor, dtype: torch.dtype, rounded: torch.dtype) -> None:
        self.matrix, self.dtype, self.rounded = (matrix + matrix.T) / 2, dtype, rounded

    @cached_property
    def _spectrum(self) -> tuple[Tensor, Tensor]:
        """Eigenvalues that are not zero, ascending, and eigenvectors."""
        matrix = checked(self.matrix, "Eigenvalues and eigenvectors")
        with task(DECOMPOSED.format(rows=len(matrix))):
            values, vectors = torch.linalg.eigh(matrix)
        rounding = len(values) * torch.finfo(self.rounded).eps
        nonzero = values.abs() > rounding * values.abs().max()
        return values[nonzero], vectors[:, nonzero]

    def eigenvalues(self, working: torch.dtype) -> Tensor:
        return self._spectrum[0]

    def largest(self, k: int | None) -> tuple[Tensor, Tensor]:
        return last(*self._spectrum, k)

    def vectors(self, coordinates: Tensor) -> Tensor:
        return coordinates.to(self.dtype)

    def coordinates(self, v: Tensor) -> Tensor:
        return v

    def solve(self, b: Tensor, damping: float) -> Tensor:
        if damping == 0:  # along what is not zero; the residual tells whether that is all of b
            values, vectors = self._spectrum
            return (vectors @ ((vectors.T @ b.double()) / values)).to(b.dtype)
        shifted = checked(self.matrix, "Solutions").clone()
        shifted.diagonal().add_(damping)
        return torch.linalg.solve(shifted, b.double()).to(b.dtype)


def last(values: Tensor, vectors: Tensor, k: int | None) -> tuple[Tensor, Tensor]:
    """Return the ``k`` that come last, or all."""
    if k is None or k >= len(values):
        return values, vectors
    return values[-k:], vectors[:, -k:]


def is_few(k: int, rows: int) -> bool:
    """Return whether products find k eigenpairs of a formed matrix sooner than a decomposition."""
    return rows >= max(k * FEW, LEAST_ROWS)


def few_eigenpairs(matrix: Tensor, k: int) -> tuple[Tensor, Tensor] | None:
    """Return the ``k`` largest eigenpairs of a formed matrix, ascending, by products with it.

    None where a decomposition of the whole takes no more, or the residuals did not come down.
    """
    if not is_few(k, len(matrix)):
        return None
    # Eigenvalues close to each other may take more products than a decomposition is worth.
    found, search = spectra.eigh(matrix, k, rtol=FORMED_RTOL, info=True)
    if not search.converged:
        return None
    return found.values, found.vectors


def padded(values: Tensor, count: int) -> Tensor:
    """Return the ``count`` largest in size, ascending, with zeros where there are fewer."""
    # Sorted by size first: with negative ones the largest are at both ends.
    largest = values[values.abs().argsort(descending=True)][:count]
    zeros = values.new_zeros(count - len(largest))
    return torch.cat([largest, zeros]).sort().values


def inner_products(
    a: Mapping[int, Tensor], b: Mapping[int, Tensor], dims: Mapping[int, int]
) -> Tensor:
    """Return the inner product of what belongs to each sample, ``[N]``, over all predictions."""
    of_predictions = []
    for i, left in a.items():
        if i not in b:
            continue  # it does not depend on the parameters
        entries = left * b[i]
        if entries.ndim > 1:  # one number a sample is its own sum
            entries = entries.movedim(dims[i], 0).flatten(1).sum(1)
        of_predictions.append(entries)
    return sum_of(of_predictions)


# --- Newton steps, determinants and solves --------------------------------------------------------


def checked_damping(damping: float | Tensor, values: Tensor) -> Tensor:
    """Return a number, or ``[k]``, as a tensor; raise ``InputError`` for what is neither.

    And where ``λ + δ`` is not positive for one of the eigenvalues.
    """
    try:
        shifts = torch.as_tensor(damping, dtype=values.dtype, device=values.device)
    except (TypeError, ValueError):
        raise InputError(
            MSG_DAMPING.format(value=repr(damping), count=len(values), lowest=0.0)
        ) from None
    fits = not shifts.ndim or shifts.shape == values.shape
    if not fits or not (values + shifts > 0).all():
        lowest = float(values.min()) if len(values) else 0.0
        raise InputError(
            MSG_DAMPING.format(value=shifts.tolist(), count=len(values), lowest=lowest)
        )
    return shifts


def slogdet(values: Tensor, size: int, damping: float) -> tuple[Tensor, Tensor]:
    """Return sign and logarithm of ``|det(G + δI)|``, from eigenvalues that are not zero."""
    # All eigenvalues that are not among ``values`` are zero, and δ in G + δI.
    shifted, zeros = values + damping, size - len(values)
    if not zeros:
        return shifted.sign().prod(), shifted.abs().log().sum()
    if damping == 0:
        return shifted.new_zeros(()), shifted.new_full((), -torch.inf)
    shift = torch.as_tensor(damping, dtype=torch.float64)
    sign = shifted.sign().prod() * shift.sign() ** zeros
    return sign, shifted.abs().log().sum() + zeros * shift.abs().log()


def refined(
    G: Operator, solve: Callable[[Tensor], Tensor], b: Tensor, damping: float
) -> tuple[Tensor, float]:
    """Return ``(G + δI)⁻¹ b`` and the relative residual, ``solve`` being right up to rounding.

    Solved once more for the residual, which takes the rounding away.
    """
    x, residual = torch.zeros_like(b), b
    for _ in range(2):
        x = x + solve(residual)
        residual = b - (G @ x + damping * x)
    size = b.norm().clamp_min(torch.finfo(b.dtype).tiny)
    return x, float(residual.norm() / size)


def by_products(
    G: Operator, b: Tensor, damping: float, rtol: float, max_iterations: int
) -> tuple[Tensor, Solved]:
    """Return ``(G + δI)⁻¹ b`` by conjugate gradients."""
    if damping < 0:
        raise InputError(MSG_NOT_DEFINITE.format(value=damping))
    return conjugate_gradients(lambda v: G @ v + damping * v, b, rtol, max_iterations)


def worst(reports: Sequence[Solved], rtol: float) -> Solved:
    """Return the report with the largest residual; of no right-hand sides, an empty one."""
    nothing = Solved("nothing to solve", 0, 0.0, rtol)
    return max(reports, key=lambda report: report.residual, default=nothing)


def explained(report: Solved, rank: int, size: int) -> Solved:
    """Return the report of a solve without damping that says where a matrix is singular."""
    if report.converged or rank >= size:
        return report
    return replace(report, remark=MSG_SINGULAR.format(rank=rank, size=size))
