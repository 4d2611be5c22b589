"""Iterative solvers that say how well they did."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from unbatch.errors import MSG_NOT_CONVERGED, ConvergenceError


@dataclass(frozen=True)
class Solved:
    """How a linear system was solved: ``residual`` is ``‖b − A x‖ / ‖b‖``."""

    method: str
    iterations: int
    residual: float
    rtol: float
    remark: str = ""  # on why it did not converge, if it did not

    @property
    def converged(self) -> bool:
        return self.residual <= self.rtol

    def check(self) -> None:
        """Raise ``ConvergenceError`` where it did not converge."""
        if not self.converged:
            text = {
                "method": self.method,
                "iterations": self.iterations,
                "residual": self.residual,
                "rtol": self.rtol,
            }
            raise ConvergenceError(MSG_NOT_CONVERGED.format(**text) + self.remark)


def conjugate_gradients(
    times: Callable[[Tensor], Tensor], b: Tensor, rtol: float, most: int
) -> tuple[Tensor, Solved]:
    """Conjugate gradients (Hestenes and Stiefel 1952) for ``A x = b`` with A symmetric positive definite, ``[n]``.

    The residual is computed anew at the end, not taken from the recursion.
    """
    x, r = torch.zeros_like(b), b.clone()
    direction, size = r.clone(), b.norm()
    squared, iterations = r @ r, 0
    while iterations < most and squared.sqrt() > 0.5 * rtol * size:
        forward = times(direction)
        curvature = direction @ forward
        if not curvature > 0:
            break
        step = squared / curvature
        x, r = x + step * direction, r - step * forward
        squared, before = r @ r, squared
        direction = r + (squared / before) * direction
        iterations += 1
    residual = float((b - times(x)).norm() / size.clamp_min(torch.finfo(b.dtype).tiny))
    return x, Solved("cg", iterations, residual, rtol)
