"""Holding a recording that is used again against the model itself, on its own batch.

What decides whether a recording is valid is watched (``capture/guards.py``); this is a net under
it, for changes that nobody watches. A recording is checked the first few times that it is used
again, and then whenever all checks together have taken less than a small share of the time since it
was made: in a training loop now and then, and at each question that comes after a pause. Where
derivatives are taken by the recording, they are compared as well, unless time does not allow it.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor

from unbatch.capture.program import own_loss
from unbatch.capture.trees import dense, tensors_in
from unbatch.linalg.precision import FORWARD, tolerance
from unbatch.problem.session import Session
from unbatch.verification.fidelity import NOT_FINITE, replay_difference

# Of the time since the recording was made.
SHARE = 0.01

# So often values are checked whatever that takes: a script asks, changes something, asks again.
FIRST = 4

# A program that differs from its recording each time it is checked does not repeat itself.
MOST_FAILURES = 3


class SpotChecks:
    """When to check, and what came of it; one for all problems that share a recording.

    ``share``: of the time, by ``clock``, in seconds.
    """

    def __init__(self, share: float | None = None, clock: Callable[[], float] | None = None):
        self.share = share
        self.clock = clock or time.perf_counter
        self.recorded = 0.0  # when
        self.spent = 0.0
        self.count = 0
        self.failures = 0

    def begin(self) -> None:
        """Note that there is a new recording."""
        self.recorded, self.spent, self.count = self.clock(), 0.0, 0

    def are_due(self, session: Session | None = None) -> bool:
        """Return whether there is time for a check, or a recording has not been checked often."""
        if not self._share or self.failures >= MOST_FAILURES:
            return False
        count = self.count if session is None else session.checks
        return count < FIRST or self._has_time()

    @property
    def _share(self) -> float:
        return SHARE if self.share is None else self.share

    def _has_time(self) -> bool:
        """Return whether checks have taken no more than their share."""
        return self.spent <= self._share * (self.clock() - self.recorded)

    def agrees(self, session: Session) -> bool:
        """Return whether the model does what its recording says; note what that took."""
        begin, first, thorough = self.clock(), not session.checks, self._has_time()
        agreed = _agree(session)
        if agreed and thorough:  # it takes several times as long
            agreed = derivatives_agree(session)
        self.spent += self.clock() - begin
        self.count += 1
        session.checks += 1
        if agreed:
            self.failures = 0
        elif first:
            self.failures += 1  # nothing can have changed much since it was recorded
        return agreed


def _agree(session: Session) -> bool:
    """Return whether a plain run of the program has the values that its recording has."""
    recording = session.recording
    program, batch = recording.program, recording.batch
    try:
        expected = session.outcome()
        if expected is None:
            return True  # the recording does not stand for the model, which each question runs
        with program.untouched(session.graph.rng), torch.enable_grad():
            output = program.predict(batch.inputs)
            if program.loss is None:
                values = tensors_in(own_loss(output))
            else:
                # Before the loss runs, which may write to what the model returned.
                values = [t.detach().clone() for t in tensors_in(output)]
                values += tensors_in(program.evaluate(output, batch.targets))
    except Exception:
        return False  # recording it again says what is wrong
    if len(values) != len(expected):
        return False
    # The loss comes last.
    if values and values[-1].requires_grad != recording.connected:
        return False
    return all(map(close, values, expected))


def derivatives_agree(session: Session) -> bool:
    """Return whether the program has the derivatives of its recording, where these are used."""
    if not session.is_judged or session.analysis.replay_difference or not session.batch.samples:
        return True
    values, gradients = replay_difference(session.experiment, on_recorded_batch=True)
    return not values and gradients in ("", NOT_FINITE)


def may_be_moved(session: Session) -> bool:
    """Return whether code of backward passes does on other numbers what it did before.

    A hook that has only looked may decide by what it reads to change a gradient.
    """
    return not session.recording.own_backward or derivatives_agree(session)


def close(value: Tensor, expected: Tensor) -> bool:
    """Return whether two tensors differ by no more than rounding."""
    if value.shape != expected.shape or value.dtype != expected.dtype:
        return False
    value, expected = dense(value), dense(expected)
    if not value.numel() or not (value.is_floating_point() or value.is_complex()):
        return torch.equal(value, expected)
    value = value.detach()
    if torch.equal(value, expected):
        return True
    size = float(expected.abs().nan_to_num(0, 0, 0).max())
    error = float((value - expected).abs().nan_to_num(0, 0, 0).max())
    same_nan = torch.equal(value.isnan(), expected.isnan())
    return same_nan and error <= tolerance([value.dtype], FORWARD) * size
