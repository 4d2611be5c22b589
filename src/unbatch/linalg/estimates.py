"""The diagonal of ``V Vᵀ`` from random signs: one product with V a draw, and a standard error.

``E[(V z)²] = diag(V Vᵀ)`` for independent signs z (Hutchinson 1989; Bekas, Kokiopoulou, Saad 2007,
with V in place of a matrix that is symmetric). A *control variate* lowers the variance: draws of
another matrix with the same signs, whose diagonal is known, take away what both have in common. How
much of them is subtracted is fitted on pilot draws that are used for nothing else, so that the
estimate stays unbiased.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from unbatch.linalg.probes import random_signs, seeded
from unbatch.linalg.rows import Moments
from unbatch.running.tasks import task

PILOTS = 8  # draws on which coefficients are fitted

# Takes ``z`` ``[size]`` to ``V z`` ``[D]``.
Pull = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class DiagonalEstimate:
    """``values`` ``[D]``, unbiased, and their ``standard_errors``, in the scale of the loss.

    ``gain``: by how much the control variate has lowered the variance (1 without one), measured on
    the draws that count; ``coefficients``: with what it entered, for each parameter. ``pullbacks``:
    backward passes, pilots included.
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
    """Another matrix: ``pull`` as for the first, ``exact`` its diagonal from ``pullbacks``."""

    pull: Pull
    exact: Tensor
    pullbacks: int


def estimate_diagonal(
    pull: Pull,
    size: int,
    draws: int,
    seed: int,
    slices: dict[str, slice],
    control: Control | None,
) -> DiagonalEstimate:
    """Return the diagonal of ``V Vᵀ``; ``pull(z)`` is ``V z`` for ``z`` ``[size]``.

    ``slices``: where each parameter lies in it.
    """
    generator = seeded(seed)
    if control is None:
        moments = Moments()
        with task("Diagonal by random signs", draws, "draws") as drawn:
            for _ in drawn.over(range(draws)):
                moments.add(_squared(pull, _signs(size, generator))[None])
        return _estimate(moments, draws, seed, 1.0, {}, draws)
    coefficients = _fitted(*_pilots(pull, control.pull, size, generator), slices)
    plain, controlled = Moments(), Moments()
    expected = control.exact.double()
    with task("Diagonal by random signs, with a control", draws, "draws") as drawn:
        for _ in drawn.over(range(draws)):
            z = _signs(size, generator)
            square = _squared(pull, z)
            plain.add(square[None])
            deviation = _squared(control.pull, z) - expected
            for name, where in slices.items():
                square[where] -= coefficients[name] * deviation[where]
            controlled.add(square[None])
    # Both were fed with the same draws, so that the ratio is that of the control alone.
    gain = float(plain.variance.sum() / controlled.variance.sum())
    pullbacks = 2 * (draws + PILOTS) + control.pullbacks
    return _estimate(controlled, draws, seed, gain, coefficients, pullbacks)


def _signs(size: int, generator: torch.Generator) -> Tensor:
    return random_signs(size, generator).to(torch.get_default_dtype())


def _squared(pull: Pull, z: Tensor) -> Tensor:
    """Return ``(V z)²``, ``[D]``, in float64."""
    return pull(z).double().square()


def _estimate(
    moments: Moments,
    draws: int,
    seed: int,
    gain: float,
    coefficients: dict[str, float],
    pullbacks: int,
) -> DiagonalEstimate:
    errors = (moments.variance / draws).sqrt()
    return DiagonalEstimate(moments.mean, errors, draws, gain, coefficients, pullbacks, seed)


def _pilots(
    pull: Pull, control: Pull, size: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Return ``[PILOTS, D]`` of both matrices, for the same signs."""
    first, second = [], []
    with task("Pilot draws for the control", PILOTS, "draws") as drawn:
        for _ in drawn.over(range(PILOTS)):
            z = _signs(size, generator)
            first.append(_squared(pull, z))
            second.append(_squared(control, z))
    return torch.stack(first), torch.stack(second)


def _fitted(first: Tensor, second: Tensor, slices: dict[str, slice]) -> dict[str, float]:
    """Return the coefficient of least variance for each parameter: covariance over variance.

    Both are summed over the entries of a parameter.
    """
    first, second = first - first.mean(0), second - second.mean(0)
    covariance, variance = (first * second).sum(0), second.square().sum(0)
    tiny = torch.finfo(torch.float64).tiny
    coefficients = {}
    for name, where in slices.items():
        coefficients[name] = float(covariance[where].sum() / variance[where].sum().clamp_min(tiny))
    return coefficients
