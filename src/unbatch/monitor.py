"""Questions asked now and then while a model trains, and the answers on file.

A monitor decides when to ask, keeps account of what that costs, and writes one JSON object for each time it asked.
What it says is what ``Problem`` says; nothing is computed here, and nothing in training changes because of it.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import torch
from torch import nn

from unbatch.answers import ALONE, USUAL, Answer, Asked, chosen, scalars
from unbatch.checks import check_callable
from unbatch.errors import MSG_BY, MSG_DRAWS, MSG_EXTRA, MSG_MONITOR_EVERY, MSG_POSITIVE, InputError
from unbatch.journal import Journal
from unbatch.problem import Problem
from unbatch.purity import random_state, set_random_state
from unbatch.quantities import Quantity
from unbatch.tree import Selection
from unbatch.verdicts import TITLES

SHARE = 0.08  # of the time that training takes, for every="auto"; what caches lose on top leaves it below a tenth


# --- when, and what it costs ----------------------------------------------------------------------


def every_of(value: Any) -> int | None:
    """None for "auto"."""
    if value == "auto":
        return None
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise InputError(MSG_MONITOR_EVERY.format(value=value))
    return value


@dataclass
class Account:
    """Seconds of the process that went into questions, and into everything between the calls of the monitor.

    ``every``: calls from one question to the next; None: as soon as another one like the last would leave the
    ``share`` within its bound.
    """

    every: int | None
    share: float
    clock: Callable[[], float]
    asking: float = 0.0
    training: float = 0.0
    calls: int = 0
    cost: float = 0.0  # of the last question
    left: float | None = None  # when the monitor last gave way to training

    def arrive(self) -> float:
        now = self.clock()
        self.training += now - self.left if self.left is not None else 0.0
        return now

    def due(self) -> bool:
        if self.every is not None:
            return self.calls % self.every == 0
        return self.calls == 0 or self.asking + self.cost <= self.share * self.training

    def so_far(self, arrived: float) -> dict[str, float]:
        seconds = self.clock() - arrived
        return {"seconds": seconds, "overhead": self._share_of(self.asking + seconds)}

    def leave(self, arrived: float, asked: bool) -> None:
        self.left, self.calls = self.clock(), self.calls + 1
        spent = self.left - arrived
        self.asking, self.cost = self.asking + spent, spent if asked else self.cost

    @property
    def overhead(self) -> float:
        return self._share_of(self.asking)

    def _share_of(self, asking: float) -> float:
        return asking / self.training if self.training else 0.0


def clock_of(model: Any) -> Callable[[], float]:
    """CPU time of the process; on an accelerator the time of day, with its queue emptied before."""
    device = next((p.device for p in model.parameters()), None) if isinstance(model, nn.Module) else None
    return time.process_time if device is None or device.type == "cpu" else time.perf_counter


# --- the monitor ----------------------------------------------------------------------------------


@dataclass
class Told:
    """What was said before, so that it is said once."""

    warnings: set[str] = field(default_factory=set)
    verdicts: dict[str, str] = field(default_factory=dict)

    def changes(self, verdicts: dict[str, str]) -> list[str]:
        """In words, which verdicts are not what they were."""
        before, self.verdicts = self.verdicts, verdicts
        differ = [name for name in verdicts if before.get(name, verdicts[name]) != verdicts[name]]
        return [f"{TITLES[name]}: {before[name]} → {verdicts[name]}" for name in differ]

    def fresh(self, caught: Sequence[Any]) -> list[str]:
        texts = dict.fromkeys(f"{w.category.__name__}: {w.message}" for w in caught)
        new = [text for text in texts if text not in self.warnings]
        self.warnings.update(new)
        return new


class Monitor:
    """Asks about the loss while a model trains, and writes down what it was told.

    ``monitor = Monitor(model, loss, path="run.jsonl")`` before the loop and ``monitor.step(X, y)`` in it, wherever the
    batch is at hand; a model that has its own loss goes without ``loss``, and its inputs without y.

    ``quantities``: names and quantities such as ``unbatch.Norms()``; the structure always is among them. ``every``:
    calls from one question to the next, or "auto": the first call, and then whenever one more question like the last
    leaves ``overhead`` within ``share``. ``by``, ``parameters``, ``in_dims``, ``sample_dims``: as for ``Problem``.
    ``samples``: curvature and crosstalk are those of so many components, the first, of the whole batch; by default of
    all, and of 8 for crosstalk. ``path``: of a file that is appended to; ``tensorboard``: a folder, or a
    ``SummaryWriter``.

    Training goes as it would without: parameters, buffers, gradients and random states are left as they were, and an
    error in a question is written down. Raises ``InputError`` for what cannot be, a file that cannot be written too.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        loss: Callable[..., Any] | None = None,
        *,
        quantities: Sequence[str | Quantity] = USUAL,
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
        if samples is not None and (not isinstance(samples, int) or samples < 1):
            raise InputError(MSG_DRAWS.format(what="samples", least=1, value=samples))
        if not 0 < share < math.inf:
            raise InputError(MSG_POSITIVE.format(what="share", value=share))
        if by not in ("component", "copy", "frozen"):
            raise InputError(MSG_BY.format(value=by))
        self.model, self.loss, self.wanted = model, loss, chosen(quantities)
        self.samples, self.by, self.parameters = samples, by, parameters
        self.dims = {"in_dims": in_dims, "sample_dims": sample_dims}
        self.account = Account(every_of(every), share, clock or time.process_time)
        self.own_clock = clock is None
        self.journal = Journal(path) if path is not None else None
        before = self.journal.last if self.journal is not None else {}
        self.start = before.get("step", -1) + 1
        self.told = Told(verdicts=before.get("structure", {}))
        self.board, self.own_board = board(tensorboard), isinstance(tensorboard, str | Path)
        self.failed = 0
        self.last: dict[str, Any] = {}
        self._problem: Problem | None = None

    def __repr__(self) -> str:
        name = getattr(self.model, "__name__", type(self.model).__name__)
        failed = f", {self.failed} questions failed" if self.failed else ""
        return f"Monitor({name}, {self.account.calls} steps, overhead {self.overhead:.1%}{failed})"

    @property
    def overhead(self) -> float:
        """Time spent here, by the time spent on everything else from the first call on."""
        return self.account.overhead

    def step(self, inputs: Any, targets: Any = None, *, step: int | None = None) -> dict[str, Any] | None:
        """One step of training, on this batch; the line that was written, or None where nothing was asked.

        ``step``: its number, by default counted from 0, or from the last line of the file on.
        """
        if self.own_clock and not self.account.calls:  # by now the model is where it is trained
            self.account.clock = clock_of(self.model)
        self._wait()
        arrived, asked = self.account.arrive(), self.account.due()
        line = None
        try:
            if asked:
                number = self.start + self.account.calls if step is None else step
                answers = self._ask(inputs, targets)
                line = {"step": number} | self.account.so_far(arrived) | answers
                self._write(line)
        finally:
            self.account.leave(arrived, asked)
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

    # -- asking --

    def _ask(self, inputs: Any, targets: Any) -> dict[str, Any]:
        """All questions, whatever becomes of them: random states, warnings and errors stay inside."""
        before = random_state()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                line = self._answers(inputs, targets)
            except Exception as error:
                self.failed += 1
                line = {"error": _words(error)}
            finally:
                set_random_state(before)
        new = self.told.fresh(caught)
        return line | ({"warnings": new} if new else {})

    def _answers(self, inputs: Any, targets: Any) -> dict[str, Any]:
        asked = Asked(self._at(inputs, targets), self.by, self.samples, self.parameters)
        verdicts = {v.name: v.status for v in asked.structure.verdicts}
        changes = self.told.changes(verdicts)
        rows = {name: q for name, q in self.wanted.items() if q is not None}
        found = self._rows(asked, rows) | {name: self._one(asked, name) for name in self.wanted if name not in rows}
        ordered = {name: found[name] for name in self.wanted}
        return {"structure": verdicts} | ({"changes": changes} if changes else {}) | {"quantities": ordered}

    def _at(self, inputs: Any, targets: Any) -> Problem:
        """The problem on this batch, with the recording of the last one."""
        if self._problem is None:
            data = {"batch": inputs} if self.loss is None else {"data": (inputs, targets)}
            self._problem = Problem(self.model, self.loss, **data, **self.dims)
        else:
            self._problem = self._problem.with_batch(inputs, targets)
        return self._problem

    def _rows(self, asked: Asked, wanted: Mapping[str, Quantity]) -> dict[str, Answer]:
        """Together; where that fails, one by one, so that each has its own reason."""
        if not wanted:
            return {}
        try:
            return asked.rows(wanted)
        except Exception as error:
            if len(wanted) == 1:
                return {name: self._failure(error) for name in wanted}
            return {n: a for name, q in wanted.items() for n, a in self._rows(asked, {name: q}).items()}

    def _one(self, asked: Asked, name: str) -> Answer:
        try:
            return ALONE[name](asked)
        except Exception as error:
            return self._failure(error)

    def _failure(self, error: Exception) -> Answer:
        self.failed += 1
        return {"error": _words(error)}

    # -- writing --

    def _write(self, line: dict[str, Any]) -> None:
        self.last = line
        try:
            if self.journal is not None:
                self.journal.write(line)
            if self.board is not None:
                self._show(line)
        except OSError as error:
            warnings.warn(f"The monitor could not write step {line['step']}: {error}. Training goes on.", stacklevel=3)

    def _show(self, line: dict[str, Any]) -> None:
        for path, value in scalars(line):
            self.board.add_scalar(path, value, line["step"])
        for kind in ("changes", "warnings"):
            for text in line.get(kind, ()):
                self.board.add_text(f"unbatch/{kind}", text, line["step"])

    def _wait(self) -> None:
        """Until what training has queued on an accelerator is done, so that its time is not taken for ours."""
        if self.account.clock is time.perf_counter and self.account.due() and torch.accelerator.is_available():
            torch.accelerator.synchronize()


def _words(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def board(where: Any) -> Any:
    """A writer to a folder; what can write already is taken as it is."""
    if not isinstance(where, str | Path):
        return where
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        message = MSG_EXTRA.format(what="Writing for TensorBoard", package="tensorboard", extra="tensorboard")
        raise ImportError(message) from error
    return SummaryWriter(str(where))
