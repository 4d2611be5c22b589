"""How long passes take, measured on this machine for this matrix.

Counts choose between ways (``ways.py``); seconds are for people, and for the budget of time.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from unbatch.autodiff.jvp import Linearised
from unbatch.errors import MSG_MANY_COLUMNS, BudgetError
from unbatch.linalg.probes import gaussians_like, seeded
from unbatch.rendering import in_time

ROUNDS = 2  # after one to warm up; the quicker of them counts

PATIENCE = 2.0  # seconds, after which it is foreseen how long all columns take

ENOUGH = 0.5  # seconds of a run that is not repeated

SIZE = 384  # of the matrices whose product is timed


@dataclass(frozen=True)
class Pace:
    """Seconds: ``pull`` of a backward pass, ``push`` of a tangent's forward pass.

    ``rate``: multiplications of a dense product in float64 in a second.
    """

    pull: float
    push: float
    rate: float

    def seconds(self, pulls: float, pushes: float, algebra: float) -> float:
        """Return how long so many passes and multiplications take."""
        return pulls * self.pull + pushes * self.push + algebra / self.rate

    @staticmethod
    def counted(multiplications: float, double: float) -> Pace:
        """Return what a pass takes by its multiplications; one in float64 takes ``double``."""
        rate = dense_rate()
        seconds = multiplications / (double * rate)
        return Pace(seconds, seconds, rate)

    @staticmethod
    def measured(linearised: Linearised, parameters: Mapping[str, Tensor]) -> Pace:
        """Return what one pass of each kind takes, for a kept forward pass."""
        # What is pushed and pulled does not matter to the time.
        generator = seeded(0)
        cotangents = gaussians_like(linearised.predictions, generator)
        tangent = gaussians_like(parameters, generator)
        pull = _seconds(lambda: linearised.pull(cotangents, parameters))
        push = _seconds(lambda: linearised.push(tangent))
        return Pace(pull, push, dense_rate())


class Deadline:
    """A budget of ``seconds`` for ``total`` columns, held against the time that those done took."""

    def __init__(self, total: int, seconds: float) -> None:
        self.total, self.seconds = total, seconds
        self.began = time.perf_counter()

    def check(self, done: int) -> None:
        """Raise ``BudgetError`` where all columns would take longer than they may."""
        passed = time.perf_counter() - self.began
        if not done or passed < PATIENCE:
            return
        # Columns of a sample take all the same.
        needed = passed / done * self.total
        if needed > self.seconds:
            raise BudgetError(
                MSG_MANY_COLUMNS.format(
                    columns=self.total,
                    time=in_time(needed),
                    one=in_time(passed / done),
                    budget=in_time(self.seconds),
                )
            )


@cache
def dense_rate() -> float:
    """Return how many multiplications of a dense product in float64 take a second."""
    a = torch.ones(SIZE, SIZE, dtype=torch.float64)
    return SIZE**3 / _seconds(lambda: a @ a)


def _seconds(run: Callable[[], Any]) -> float:
    """Return how long a run takes on the wall clock, which is what a user waits for."""
    best = _once(run)
    # The first may be slower, for it warms up; a long one tells enough.
    for _ in range(ROUNDS):
        if best < ENOUGH:
            best = min(best, _once(run))
    return best


def _once(run: Callable[[], Any]) -> float:
    began = _now()
    run()
    return _now() - began


def _now() -> float:
    # A device works on after the call that gave it work.
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()
