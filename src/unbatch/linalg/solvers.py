"""Iterative solvers that say how well they did."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from unbatch.errors import MSG_NOT_CONVERGED, ConvergenceError
from unbatch.running.interrupts import left_behind
from unbatch.running.tasks import Task, task

INTERRUPTED = " It was interrupted."


@dataclass(frozen=True)
class Solved:
    """How a linear system was solved: ``residual`` is ``‖b − A x‖ / ‖b‖``."""

    method: str
    iterations: int
    residual: float
    rtol: float
    remark: str = ""  # why it did not converge, if it did not

    @property
    def converged(self) -> bool:
        """Return whether the residual is within ``rtol``."""
        return self.residual <= self.rtol

    def check(self) -> None:
        """Raise ``ConvergenceError`` where it did not converge."""
        if self.converged:
            return
        text = MSG_NOT_CONVERGED.format(
            method=self.method,
            iterations=self.iterations,
            residual=self.residual,
            rtol=self.rtol,
        )
        raise ConvergenceError(text + self.remark)


def conjugate_gradients(
    times: Callable[[Tensor], Tensor], b: Tensor, rtol: float, limit: int
) -> tuple[Tensor, Solved]:
    """Return ``x`` with ``A x = b``, ``[n]``, for symmetric positive definite A, and how well it
    was solved.

    Conjugate gradients (Hestenes and Stiefel 1952), with at most ``limit`` products ``times``.
    """
    with task("Conjugate gradients", limit, "products", at_most=True) as products:
        return _conjugate_gradients(times, b, rtol, products)


def _conjugate_gradients(
    times: Callable[[Tensor], Tensor], b: Tensor, rtol: float, products: Task
) -> tuple[Tensor, Solved]:
    """Iterate, with no more products than the task has in all, but for one at the end."""
    x, r = torch.zeros_like(b), b.clone()
    direction, size = r.clone(), b.norm()
    squared, iterations = r @ r, 0
    # The recursion's residual drifts from the true one: it is brought to half of what is allowed.
    while products.done != products.total and squared.sqrt() > 0.5 * rtol * size:
        relative = float(squared.sqrt() / size)
        products.say(f"residual {relative:.1g}, wanted {0.5 * rtol:.1g}")
        with left_behind(x, Solved("cg", iterations, relative, rtol, INTERRUPTED)):
            forward = times(direction)
            products.advance()
        curvature = direction @ forward
        if not curvature > 0:  # rounding, or A is not positive definite
            break
        step = squared / curvature
        x, r = x + step * direction, r - step * forward
        squared, before = r @ r, squared
        direction = r + (squared / before) * direction
        iterations += 1
    # What is reported is computed anew, not taken from the recursion.
    residual = float((b - times(x)).norm() / size.clamp_min(torch.finfo(b.dtype).tiny))
    return x, Solved("cg", iterations, residual, rtol)
