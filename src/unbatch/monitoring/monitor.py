"""The monitor: measures a loss now and then while a model trains, and writes one line each time.

When it is time is decided in ``account.py``, numbers come from ``metrics.py``, lines go through
``log.py``. Nothing is computed here, and nothing in training changes because of it.
"""

from __future__ import annotations

import inspect
import math
import operator
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import nn

from unbatch import errors
from unbatch.capture.isolation import random_state, set_random_state
from unbatch.capture.program import name_of
from unbatch.errors import InputError, MonitorWarning
from unbatch.gradients.quantities import Quantity
from unbatch.monitoring.account import SHARE, Account, clock_of, interval
from unbatch.monitoring.log import Journal, board_at, write_to_board
from unbatch.monitoring.messages import SeenMessages, error_text, failures, warning_text
from unbatch.monitoring.metrics import (
    BATCH_METRICS,
    DEFAULT_METRICS,
    Entry,
    Measurement,
    metrics_by_name,
    needs_predictions,
)
from unbatch.problem.parameters import Selection, select
from unbatch.problem.problem import Problem
from unbatch.problem.validation import check_by, check_callable
from unbatch.running.interrupts import Held
from unbatch.running.tasks import Muted

# What is written for one measurement. JSON all the way down: the file, the board and the caller of
# ``step`` get the same one.
Line = dict[str, Any]


# --- what is measured -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Settings:
    """What is measured on every batch; checked when a monitor is made, fixed from then on.

    ``metrics`` by name: a quantity of the rows, or None for what is measured on its own.
    """

    metrics: Mapping[str, Quantity | None]
    by: str
    samples: int | None
    parameters: Selection
    in_dims: Any
    sample_dims: Sequence[int] | None

    # Here and not at the first batch: a long job should not start with a typo in it.
    def __post_init__(self) -> None:
        """Raise ``InputError`` for values that no batch can go with."""
        if self.samples is not None and (not isinstance(self.samples, int) or self.samples < 1):
            raise InputError(errors.MSG_DRAWS.format(what="samples", least=1, value=self.samples))
        check_by(self.by)
        if self.by == "copy":
            check_exists_by_copy(self.metrics)

    @property
    def row_metrics(self) -> dict[str, Quantity]:
        """Quantities of the rows, which are computed together."""
        return {name: q for name, q in self.metrics.items() if q is not None}

    def at(self, problem: Problem) -> Measurement:
        """Return how a batch is measured."""
        return Measurement(problem, self.by, self.samples, self.parameters)


def check_exists_by_copy(metrics: Mapping[str, Quantity | None]) -> None:
    """Raise ``InputError`` where something is built from derivatives of predictions."""
    refused = [name for name, quantity in metrics.items() if needs_predictions(name, quantity)]
    if refused:
        rest = [name for name in metrics if name not in refused]
        raise InputError(errors.MSG_MONITOR_COPY.format(names=", ".join(refused), rest=rest))


# --- whether a call is right ----------------------------------------------------------------------


def check_call(loss: Callable[..., Any] | None, inputs: Any, targets: Any) -> None:
    """Raise ``InputError`` unless there are targets exactly where the loss takes some."""
    if loss is None:
        if targets is not None:
            raise InputError(errors.MSG_MONITOR_OWN_LOSS.format(given=in_short(targets)))
        return
    if targets is None:
        if not _takes(loss, 1):
            text = errors.MSG_MONITOR_TARGETS.format(loss=name_of(loss), given=in_short(inputs))
            raise InputError(text)
        return
    if not _takes(loss, 2):
        text = errors.MSG_MONITOR_NO_TARGETS.format(loss=name_of(loss), given=in_short(targets))
        raise InputError(text)


def _takes(function: Callable[..., Any], count: int) -> bool:
    """Return whether a function takes so many arguments, as far as its signature shows."""
    # The signature of a module is that of Module.__call__, which takes anything.
    if isinstance(function, nn.Module):
        function = function.forward
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # not written in Python: it may
        return True
    try:
        signature.bind(*range(count))
    except TypeError:
        return False
    return True


def in_short(value: Any) -> str:
    """Return what a batch is, in a few words."""
    if isinstance(value, torch.Tensor):
        return f"a tensor of shape {list(value.shape)}"
    if isinstance(value, Mapping):
        return f"a {type(value).__name__} of {', '.join(map(repr, value))}"
    if isinstance(value, tuple | list):
        return f"a {type(value).__name__} of {len(value)}"
    return f"a {type(value).__name__}"


# --- the monitor ----------------------------------------------------------------------------------


class Monitor:
    """Measures the loss of a model while it trains, and writes the results down.

    ``monitor = Monitor(model, loss, path="run.jsonl")`` before the loop and ``monitor.step(X, y)``
    in it, wherever the batch is at hand; for a model that computes its own loss leave out ``loss``
    and y.

    ``quantities``: names and quantities such as ``unbatch.SquaredNorms()``; the structure is always
    among them. ``every``: calls from one measurement to the next, or "auto": the first call, and
    then whenever one more measurement, at the cost of the last, keeps ``overhead`` within
    ``share``. ``by``, ``parameters``, ``in_dims``, ``sample_dims``: as for ``Problem``.
    ``samples``: how many components of the batch, the first ones, enter curvature and crosstalk; by
    default all, and 8 for crosstalk. ``path``: a file that is appended to; ``tensorboard``: a
    folder, or a ``SummaryWriter``.

    Training goes as it would without: parameters, buffers, gradients and random states are left as
    they were. Invalid arguments and unwritable files raise ``InputError`` here, and an invalid call
    of ``step`` at the first one. From then on nothing stops training: what cannot be measured is
    written down with the reason, counted in ``failed``, and reported once by a ``MonitorWarning``.
    ``last`` is the last line.
    """

    def __init__(  # noqa: PLR0913
        self,
        model: Callable[..., Any],
        loss: Callable[..., Any] | None = None,
        *,
        quantities: Sequence[str | Quantity] = DEFAULT_METRICS,
        every: int | str = "auto",
        share: float = SHARE,
        samples: int | None = None,
        by: str = "component",
        parameters: Selection = None,
        path: str | Path | None = None,
        tensorboard: Any = None,
        in_dims: Any = 0,
        sample_dims: Sequence[int] | None = None,
        clock: Callable[[], float] | None = None,
    ) -> None:
        check_callable("model", model)
        if loss is not None:
            check_callable("loss", loss)
        if not 0 < share < math.inf:
            raise InputError(errors.MSG_POSITIVE.format(what="share", value=share))
        if isinstance(parameters, Iterator):
            parameters = list(parameters)  # it is read again for every batch
        metrics = metrics_by_name(quantities)
        self.model, self.loss = model, loss
        self.settings = Settings(metrics, by, samples, parameters, in_dims, sample_dims)
        self.account = Account(interval(every), share, clock or time.process_time)
        self.own_clock = clock is None
        # Files come last: what is refused above leaves none behind.
        self.journal: Journal | None = None
        last_line: Line = {}
        if path is not None:
            self.journal = Journal(path)
            last_line = self.journal.last
        self.start = last_line.get("step", -1) + 1
        self.messages = SeenMessages(verdicts=last_line.get("structure", {}))
        self.board = board_at(tensorboard)
        self.own_board = isinstance(tensorboard, str | Path)
        self.failed = 0
        self.last: Line = {}
        self._problem: Problem | None = None
        self._begun = False

    def __repr__(self) -> str:
        overhead = "not known"
        if self.overhead is not None:
            overhead = f"{self.overhead:.1%}"
        text = f"{name_of(self.model)}, {self.account.calls} steps, overhead {overhead}"
        if self.failed:
            text += f", {self.failed} questions failed"
        return f"Monitor({text})"

    @property
    def overhead(self) -> float | None:
        """Time spent here, by the time spent on everything else since the first call.

        None before there is any.
        """
        return self.account.overhead

    def step(
        self, inputs: Any, targets: Any = None, *, step: int | None = None
    ) -> dict[str, Any] | None:
        """Take note of one training step on this batch; return the line that was written, if any.

        ``step``: its number, by default counted from 0, or from the last line of the file on.

        The first call raises ``InputError`` where it is invalid: targets missing or not wanted, and
        what ``Problem`` refuses. Later calls raise nothing of the kind, whatever the batch is like.
        Warnings that measuring gives rise to are given once.
        """
        number = self._number(step)
        problem = self._problem
        if problem is None or not self._begun:
            problem = self._first_problem(inputs, targets)
            self._problem = problem
        self._wait()
        start = self.account.start_call()
        due = self._is_due()
        try:
            if not due:
                return None
            results, caught = self._measure(problem, inputs, targets)
            line = {"step": number} | self.account.report(start) | results
            self._begun = True
            problems = self._write(line)
        finally:
            self.account.end_call(start, due)
        # Outside the account, and last: a user may have turned warnings into errors.
        self._warn(line, caught, problems)
        return line

    __call__ = step

    def close(self) -> None:
        """Close what the monitor has opened; another step opens it again."""
        if self.own_board:
            self.board.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    # -- the call --

    def _number(self, step: Any) -> int:
        """Return the number of a step; raises ``InputError`` for what is no whole number."""
        if step is None:
            return self.start + self.account.calls
        try:
            return operator.index(step)
        except TypeError:
            raise InputError(errors.MSG_MONITOR_STEP.format(value=step)) from None

    def _first_problem(self, inputs: Any, targets: Any) -> Problem:
        """Return the problem of the first batch; raises ``InputError`` without running anything."""
        check_call(self.loss, inputs, targets)
        data: dict[str, Any] = {"data": (inputs, targets)}
        if self.loss is None:
            data = {"batch": inputs}
        dims = {"in_dims": self.settings.in_dims, "sample_dims": self.settings.sample_dims}
        problem = Problem(self.model, self.loss, **data, **dims)
        if self.settings.parameters is not None:
            select(problem.program.parameters, self.settings.parameters)
        # Not earlier: by now the model is on the device where it is trained.
        if self.own_clock:
            self.account.clock = clock_of(self.model)
        return problem

    def _is_due(self) -> bool:
        return not self._begun or self.account.is_due()

    def _wait(self) -> None:
        """Wait for what training has queued on an accelerator, or its time would count as ours."""
        # Only before a measurement: to wait at every step would slow the training down.
        if self.account.clock is not time.perf_counter or not self._is_due():
            return
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()

    # -- measuring --

    def _measure(
        self, problem: Problem, inputs: Any, targets: Any
    ) -> tuple[Line, list[warnings.WarningMessage]]:
        """Return what was measured, with the warnings that are new.

        Random states are set back. Errors end up in the line, but for an ``InputError`` of the
        first call, which is the user's.
        """
        # Replays and probes draw random numbers, which training must not miss. Inference mode is
        # switched off because a loop in it may still measure, which takes derivatives.
        before = random_state()
        with (
            Held(),
            Muted(),
            warnings.catch_warnings(record=True) as caught,
            torch.inference_mode(False),
        ):
            warnings.simplefilter("always")
            try:
                line = self._results(problem, inputs, targets)
            except Exception as error:
                if isinstance(error, InputError) and not self._begun:
                    raise
                line = {"error": error_text(error)}
            finally:
                set_random_state(before)
        for names in failures(line).values():
            self.failed += len(names)
        new = [w for w in caught if self.messages.is_new(warning_text(w))]
        if new:
            line["warnings"] = [warning_text(w) for w in new]
        return line, new

    def _results(self, problem: Problem, inputs: Any, targets: Any) -> Line:
        """Return verdicts, what has changed in them, and the metrics in the order asked for."""
        # The next batch starts from this one's problem, whose recording it may be able to use.
        self._problem = problem.with_batch(inputs, targets)
        measurement = self.settings.at(self._problem)
        verdicts = {v.name: v.status for v in measurement.structure.verdicts}
        line: Line = {"structure": verdicts}
        changes = self.messages.changes(verdicts)
        if changes:
            line["changes"] = changes
        rows = self._rows(measurement, self.settings.row_metrics)
        entries = {}
        for name, quantity in self.settings.metrics.items():
            if quantity is None:
                entries[name] = self._alone(measurement, name)
            else:
                entries[name] = rows[name]
        line["quantities"] = entries
        return line

    def _rows(self, measurement: Measurement, metrics: Mapping[str, Quantity]) -> dict[str, Entry]:
        """Return quantities of rows from one sweep, or one by one where that fails.

        One by one, each has its own result or its own reason.
        """
        if not metrics:
            return {}
        try:
            return measurement.rows(metrics)
        except Exception as error:
            if len(metrics) == 1:
                return {name: {"error": error_text(error)} for name in metrics}
        entries: dict[str, Entry] = {}
        for name, quantity in metrics.items():
            entries |= self._rows(measurement, {name: quantity})
        return entries

    def _alone(self, measurement: Measurement, name: str) -> Entry:
        # Any error: what one metric cannot do must not keep the others from the line.
        try:
            return BATCH_METRICS[name](measurement)
        except Exception as error:
            return {"error": error_text(error)}

    # -- writing and warning --

    def _write(self, line: Line) -> list[str]:
        """Write a line to file and board; return in words what failed of that."""
        self.last = line
        # One after the other, each with its own error: a full disk leaves the board alone.
        problems = []
        for write in (self._to_file, self._to_board):
            try:
                write(line)
            except Exception as error:
                text = errors.MSG_MONITOR_WRITE.format(step=line["step"], error=error_text(error))
                problems.append(text)
        return problems

    def _to_file(self, line: Line) -> None:
        if self.journal is not None:
            self.journal.write(line)

    def _to_board(self, line: Line) -> None:
        if self.board is not None:
            write_to_board(self.board, line)

    def _warn(
        self,
        line: Line,
        caught: Sequence[warnings.WarningMessage],
        problems: Sequence[str],
    ) -> None:
        """Warn of what failed, and give the warnings that measuring gave rise to."""
        texts = []
        for error, names in failures(line).items():
            what, step = ", ".join(names), line["step"]
            texts.append(errors.MSG_MONITOR_FAILED.format(what=what, step=step, error=error))
        # All are remembered before one is given: where warnings are errors, the first one raises.
        new = [text for text in [*texts, *problems] if self.messages.is_new(text)]
        for text in new:
            errors.warn(text, MonitorWarning)
        # Each at the line where it arose, as if it had not been caught.
        for w in caught:
            warnings.warn_explicit(w.message, w.category, w.filename, w.lineno, source=w.source)
