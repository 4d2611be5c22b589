"""The diagonal of the Gauss-Newton matrix from random signs: one pullback a draw, any architecture, and how far off.

``E[(V z)²] = diag(V Vᵀ)`` for independent signs z (Hutchinson 1989; Bekas, Kokiopoulou, Saad 2007, with V in place of a
matrix that is symmetric). Draws of another matrix with the same signs, whose diagonal is known, take away what both
have in common (a control variate); with what coefficient is fitted on draws that are used for nothing else.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from unbatch.linalg.probes import random_signs, seeded
from unbatch.linalg.rows import Moments

PILOTS = 8  # draws on which coefficients are fitted


@dataclass(frozen=True)
class DiagonalEstimate:
    """``values`` ``[D]``, unbiased, and their ``standard_errors``, in the scale of the loss.

    ``gain``: by how much the control variate has lowered the variance (1 without one), measured on the draws that
    count; ``coefficients``: with what it entered, for each parameter. ``pullbacks``: backward passes, pilots included.
    """

    values: Tensor
    standard_errors: Tensor
    draws: int
    gain: float
    coefficients: dict[str, float]
    pullbacks: int
    seed: int


@dataclass(frozen=True)
class Control:
    """Draws of another matrix: ``pull`` as for the first; ``exact``: its diagonal, which took so many ``pullbacks``."""

    pull: Callable[[Tensor], Tensor]
    exact: Tensor
    pullbacks: int


def from_signs(
    pull: Callable[[Tensor], Tensor],
    size: int,
    draws: int,
    seed: int,
    slices: dict[str, slice],
    control: Control | None,
) -> DiagonalEstimate:
    """``pull(z)`` is ``V z`` for ``z`` ``[size]``; ``slices``: where each parameter lies in it."""
    generator = seeded(seed)

    def draw() -> tuple[Tensor, Tensor | None]:
        z = random_signs(size, generator).to(torch.get_default_dtype())
        return pull(z).double().square(), None if control is None else control.pull(
            z
        ).double().square()

    fitted = {} if control is None else _fitted([draw() for _ in range(PILOTS)], slices)
    plain, controlled = Moments(), Moments()
    for _ in range(draws):
        square, other = draw()
        plain.add(square[None])
        if control is not None and other is not None:
            apart = other - control.exact.double()
            for name, where in slices.items():
                square[where] -= fitted[name] * apart[where]
        controlled.add(square[None])
    gain = float(plain.variance.sum() / controlled.variance.sum()) if control is not None else 1.0
    error = (controlled.variance / draws).sqrt()
    cost = draws if control is None else 2 * (draws + PILOTS) + control.pullbacks
    return DiagonalEstimate(controlled.mean, error, draws, gain, fitted, cost, seed)


def _fitted(
    pilots: list[tuple[Tensor, Tensor | None]], slices: dict[str, slice]
) -> dict[str, float]:
    """The coefficient of least variance, summed over the entries of a parameter: covariance over variance."""
    first = torch.stack([a for a, _ in pilots])
    second = torch.stack([b for _, b in pilots if b is not None])
    first, second = first - first.mean(0), second - second.mean(0)
    together, alone, tiny = (
        (first * second).sum(0),
        second.square().sum(0),
        torch.finfo(torch.float64).tiny,
    )
    return {n: float(together[s].sum() / alone[s].sum().clamp_min(tiny)) for n, s in slices.items()}
