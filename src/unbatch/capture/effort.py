"""How much experiments with a program may cost: counted in ops, given in plain steps.

An experiment runs a program on numbers that its author never meant, and a loop that Python ends
(``while error > 1e-6``) may go on for ever there. So the ops that experiments run are counted. One
run may take many times the ops of the recorded one, and all experiments of a question together so
many plain steps, or so many seconds where steps are short. Beyond that ``OutOfEffort`` is raised:
the program does not take such numbers, and what was to be found out is unknown.

A plain step is a forward and a backward pass, counted as three times the ops of the forward pass.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

PLAIN_STEPS = 50.0  # for all experiments of one question, where the user does not say
SECONDS = 5.0  # and no fewer than this, of the processor
PASSES = 3  # of ops in a plain step, for one of a forward pass

# One run may take so many times the ops of the recorded one, and so many besides.
LONGER, BESIDES = 20, 2000

MSG_RUN = (
    "an experiment was stopped: on other numbers the program ran {ops} ops, where on the batch it "
    "ran {plain}; a loop that Python ends may not end there"
)
MSG_SPENT = (
    "experiments were stopped after {most:g} plain steps (and {seconds:g} seconds): what they were "
    "to find out is unknown; give `effort=` to the problem for more"
)


class OutOfEffort(Exception):
    """Raised where an experiment takes more than it may."""


@dataclass
class Meter:
    """The ops that experiments have run. ``plain``: of one forward pass; ``most``: plain steps."""

    plain: int
    most: float
    spent: int = 0
    began: float = field(default_factory=time.process_time)
    stopped: str = ""  # why the last experiment was stopped, in words

    def spend(self, ops: int, in_this_run: int = 0) -> None:
        """Count ops; raise ``OutOfEffort`` where there are too many, in a run or in all."""
        self.spent += ops
        if in_this_run > LONGER * self.plain + BESIDES:
            self._stop(MSG_RUN.format(ops=in_this_run, plain=self.plain))
        if self.is_spent():
            self._stop(MSG_SPENT.format(most=self.most, seconds=SECONDS))

    def is_spent(self) -> bool:
        """Tell whether all experiments together have taken what they may."""
        if self.spent <= self.most * PASSES * self.plain:
            return False
        return time.process_time() - self.began > SECONDS

    def _stop(self, why: str) -> None:
        self.stopped = why
        raise OutOfEffort(why)


# Of the question that is being answered; questions take turns.
_current: list[Meter] = []


@contextmanager
def metered(plain: int, most: float) -> Iterator[Meter]:
    """Count the ops of the experiments inside."""
    meter = Meter(max(plain, 1), most)
    _current.append(meter)
    try:
        yield meter
    finally:
        _current.pop()


def spend(ops: int, in_this_run: int = 0) -> None:
    """Count ops for the experiments that are going on, if there are any."""
    if _current:
        _current[-1].spend(ops, in_this_run)


def is_spent() -> bool:
    """Tell whether the experiments that are going on may take no more."""
    return bool(_current) and _current[-1].is_spent()
