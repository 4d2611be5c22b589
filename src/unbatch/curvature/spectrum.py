"""What follows from ``G = V Σ Vᵀ`` of low rank: eigenpairs, determinants, Newton steps and solves.

All of it from the Gram matrix ``VᵀV`` of the columns of V, which is small where there are fewer
columns than parameters (Dangel, Tatzel, Hennig 2021, "ViViT"). No networks here: V is an operator
that is known by its products. Spectra of operators without such a factor: ``linalg/spectra.py``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

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
from unbatch.linalg.operators import Operator
from unbatch.linalg.rows import sum_of
from unbatch.linalg.solvers import Solved, conjugate_gradients
from unbatch.linalg.space import Space
from unbatch.linalg.spectra import Eigenpairs


@dataclass(frozen=True)
class Factored:
    """``G = V Σ Vᵀ``: ``factor`` is V, ``gram`` ``VᵀV`` in float64, ``signs`` the diagonal of Σ."""

    factor: Operator
    gram: Tensor
    signs: Tensor


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


def spectrum(gram: Tensor, signs: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return eigenvalues that are not zero, ascending, and ``A`` of the eigenvectors ``V A``.

    In float64. Where all signs are positive, ``VᵀV`` and ``VVᵀ`` have the same eigenvalues, and an
    eigenvector ``a`` of the first gives ``V a / √λ`` of the second. With other signs, those of G
    are those of ``(VᵀV)^½ Σ (VᵀV)^½``, which is symmetric.
    """
    # VᵀV = Q Λ Qᵀ
    values, vectors = torch.linalg.eigh(gram)
    nonzero = above_rounding(values, dtype)
    values, vectors = values[nonzero], vectors[:, nonzero]
    if (signs > 0).all():
        return values, vectors / values.sqrt()
    # With Λ^½ Qᵀ Σ Q Λ^½ = P Θ Pᵀ, the columns of V Q Λ^-½ P are eigenvectors of G: as V = V Q Qᵀ,
    # V Σ Vᵀ (V Q Λ^-½ P) = V Q Qᵀ Σ Q Λ^½ P = V Q Λ^-½ P Θ.
    half = vectors * values.sqrt()
    signed, rotation = torch.linalg.eigh(half.T @ (signs[:, None] * half))
    return signed, (vectors / values.sqrt()) @ rotation


def positive_eigenvalues(gram: Tensor, dtype: torch.dtype) -> Tensor:
    """Return those of G that are not zero, ascending, where all signs are positive.

    In the type of ``gram``; ``dtype`` says what is rounding. No eigenvectors are needed for them.
    """
    values = torch.linalg.eigvalsh(gram)
    return values[above_rounding(values, dtype)]


def padded(values: Tensor, count: int) -> Tensor:
    """Return the ``count`` largest in size, ascending, with zeros where there are fewer."""
    # Sorted by size first: with negative ones the largest are at both ends.
    largest = values[values.abs().argsort(descending=True)][:count]
    zeros = values.new_zeros(count - len(largest))
    return torch.cat([largest, zeros]).sort().values


def eigenpairs(factor: Operator, values: Tensor, coefficients: Tensor, k: int | None) -> Eigenpairs:
    """Return the ``k`` largest as vectors ``V a``, by one product for each."""
    start = 0  # the largest come last
    if k is not None:
        start = max(0, len(values) - k)
    vectors = factor @ coefficients[:, start:]
    # Of unit length up to rounding, which is large for small eigenvalues.
    normalised = torch.nn.functional.normalize(vectors, dim=0)
    return Eigenpairs(values[start:].to(factor.dtype), normalised)


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


def newton_step(pairs: Eigenpairs, gradient: Tensor, damping: float | Tensor) -> Tensor:
    """Return ``−Σ_i γ_i / (λ_i + δ_i) e_i`` with ``γ_i = e_iᵀ g``, ``[D]``."""
    values, vectors = pairs
    try:
        damping = torch.as_tensor(damping, dtype=values.dtype, device=values.device)
    except (TypeError, ValueError):
        raise InputError(
            MSG_DAMPING.format(value=repr(damping), count=len(values), lowest=0.0)
        ) from None
    fits = not damping.ndim or damping.shape == values.shape
    if not fits or not (values + damping > 0).all():
        lowest = float(values.min())
        raise InputError(
            MSG_DAMPING.format(value=damping.tolist(), count=len(values), lowest=lowest)
        )
    return -vectors @ ((vectors.T @ gradient) / (values + damping))


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


def woodbury(
    G: Operator, factored: Factored, b: Tensor, damping: float, rtol: float
) -> tuple[Tensor, Solved]:
    """Return ``(G + δI)⁻¹ b = (b − V (δΣ + VᵀV)⁻¹ Vᵀ b) / δ``.

    And the same once more for the residual, which takes the rounding away.
    """
    if damping == 0:
        raise InputError(MSG_NO_DAMPING)
    V = factored.factor
    inner = factored.gram + damping * torch.diag(factored.signs.double())
    x, residual = torch.zeros_like(b), b
    for _ in range(2):
        a = torch.linalg.solve(inner, (V.T @ residual).double())
        x = x + (residual - V @ a) / damping
        residual = b - (G @ x + damping * x)
    size = b.norm().clamp_min(torch.finfo(b.dtype).tiny)
    return x, Solved("woodbury", 2, float(residual.norm() / size), rtol)


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
