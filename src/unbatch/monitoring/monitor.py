"""Questions asked now and then while a model trains, and the answers on file.

A monitor decides when to ask, keeps account of what that costs, and writes one JSON object for each time it asked.
What it says is what ``Problem`` says; nothing is computed here, and nothing in training changes because of it.
"""

from __future__ import annotations

import inspect
import math
import operator
import re
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import torch
from torch import nn

from unbatch import errors
from unbatch.analysis.structure import TITLES
from unbatch.capture.isolation import random_state, set_random_state
from unbatch.capture.program import name_of
from unbatch.errors import InputError, MonitorWarning
from unbatch.gradients.quantities import Quantity
from unbatch.monitoring.log import Journal
from unbatch.monitoring.metrics import ALONE, USUAL, Answer, Asked, chosen, of_columns, scalars
from unbatch.problem.parameters import Selection, select
from unbatch.problem.problem import Problem
from unbatch.problem.validation import check_by, check_callable

SHARE = 0.08  # of the time that training takes, for every="auto"; what caches lose on top leaves it below a tenth


NUMBER = re.compile(r"\d+(\.\d+)?")


# --- when, and what it costs ----------------------------------------------------------------------


def every_of(value: Any) -> int | None:
    """None for "auto"."""
    if value == "auto":
        return None
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise InputError(errors.MSG_MONITOR_EVERY.format(value=value))
    return value


@dataclass
class Account:
    """Seconds of the process that went into questions, and into everything between the calls of the monitor.

    ``every``: calls from one question to the next; None: at the first call, and then as soon as another question like
    the last would leave the ``share`` within its bound. What the first one costs is known only when it was asked.
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

    def so_far(self, arrived: float) -> dict[str, float | None]:
        seconds = self.clock() - arrived
        return {"seconds": seconds, "overhead": self._share_of(self.asking + seconds)}

    def leave(self, arrived: float, asked: bool) -> None:
        self.left, self.calls = self.clock(), self.calls + 1
        spent = self.left - arrived
        self.asking, self.cost = self.asking + spent, spent if asked else self.cost

    @property
    def overhead(self) -> float | None:
        return self._share_of(self.asking)

    def _share_of(self, asking: float) -> float | None:
        return asking / self.training if self.training else None


def clock_of(model: Any) -> Callable[[], float]:
    """CPU time of the process; on an accelerator the time of day, with its queue emptied before."""
    device = (
        next((p.device for p in model.parameters()), None) if isinstance(model, nn.Module) else None
    )
    return time.process_time if device is None or device.type == "cpu" else time.perf_counter


# --- whether a call is right ----------------------------------------------------------------------


def check_call(loss: Callable[..., Any] | None, inputs: Any, targets: Any) -> None:
    """Whether there are targets just where the loss takes some. Raises ``InputError`` where not."""
    if loss is None:
        if targets is not None:
            raise InputError(errors.MSG_MONITOR_OWN_LOSS.format(given=in_short(targets)))
    elif targets is None and not _takes(loss, 1):
        raise InputError(
            errors.MSG_MONITOR_TARGETS.format(loss=name_of(loss), given=in_short(inputs))
        )
    elif targets is not None and not _takes(loss, 2):
        raise InputError(
            errors.MSG_MONITOR_NO_TARGETS.format(loss=name_of(loss), given=in_short(targets))
        )


def _takes(function: Callable[..., Any], count: int) -> bool:
    """Whether it can be called with so many arguments, as far as can be seen without calling it."""
    try:
        signature = inspect.signature(
            function.forward if isinstance(function, nn.Module) else function
        )
    except (TypeError, ValueError):  # of what is not written in Python
        return True
    try:
        signature.bind(*range(count))
    except TypeError:
        return False
    return True


def in_short(value: Any) -> str:
    """What a batch is, in a few words."""
    if isinstance(value, torch.Tensor):
        return f"a tensor of shape {list(value.shape)}"
    if isinstance(value, Mapping):
        return f"a {type(value).__name__} of {', '.join(map(repr, value))}"
    if isinstance(value, tuple | list):
        return f"a {type(value).__name__} of {len(value)}"
    return f"a {type(value).__name__}"


# --- the monitor ----------------------------------------------------------------------------------


@dataclass
class SeenMessages:
    """What was said before, so that it is said once, whatever the numbers in it."""

    said: set[str] = field(default_factory=set)
    verdicts: dict[str, str] = field(default_factory=dict)

    def changes(self, verdicts: dict[str, str]) -> list[str]:
        """In words, which verdicts are not what they were."""
        before, self.verdicts = self.verdicts, verdicts
        differ = [name for name in verdicts if before.get(name, verdicts[name]) != verdicts[name]]
        return [f"{TITLES[name]}: {before[name]} → {verdicts[name]}" for name in differ]

    def is_new(self, text: str) -> bool:
        key = NUMBER.sub("0", text)
        new = key not in self.said
        self.said.add(key)
        return new


def failures(line: Mapping[str, Any]) -> dict[str, list[str]]:
    """Reasons why something in a line has no answer, and what."""
    found: dict[str, list[str]] = {line["error"]: ["anything"]} if "error" in line else {}
    for name, answer in line.get("quantities", {}).items():
        if "error" in answer:
            found.setdefault(answer["error"], []).append(name)
    return found


class Monitor:
    """Asks about the loss while a model trains, and writes down what it was told.

    ``monitor = Monitor(model, loss, path="run.jsonl")`` before the loop and ``monitor.step(X, y)`` in it, wherever the
    batch is at hand; a model that has its own loss goes without ``loss``, and its inputs without y.

    ``quantities``: names and quantities such as ``unbatch.SquaredNorms()``; the structure always is among them. ``every``:
    calls from one question to the next, or "auto": the first call, and then whenever one more question like the last
    leaves ``overhead`` within ``share``. ``by``, ``parameters``, ``in_dims``, ``sample_dims``: as for ``Problem``.
    ``samples``: curvature and crosstalk are those of so many components, the first, of the whole batch; by default of
    all, and of 8 for crosstalk. ``path``: of a file that is appended to; ``tensorboard``: a folder, or a
    ``SummaryWriter``.

    Training goes as it would without: parameters, buffers, gradients and random states are left as they were. What
    cannot be is refused at once with an ``InputError``: here, a file that cannot be written too, and at the first
    ``step``. From then on nothing stops training: what has no answer is written down with the reason, counted in
    ``failed``, and told once by a ``MonitorWarning``.
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
            raise InputError(errors.MSG_DRAWS.format(what="samples", least=1, value=samples))
        if not 0 < share < math.inf:
            raise InputError(errors.MSG_POSITIVE.format(what="share", value=share))
        self.model, self.loss, self.wanted = model, loss, chosen(quantities)
        check_rows(by, self.wanted)
        self.samples, self.by = samples, by
        self.parameters = list(parameters) if isinstance(parameters, Iterator) else parameters
        self.dims = {"in_dims": in_dims, "sample_dims": sample_dims}
        self.account = Account(every_of(every), share, clock or time.process_time)
        self.own_clock = clock is None
        self.journal = Journal(path) if path is not None else None
        before = self.journal.last if self.journal is not None else {}
        self.start = before.get("step", -1) + 1
        self.told = SeenMessages(verdicts=before.get("structure", {}))
        self.board, self.own_board = board(tensorboard), isinstance(tensorboard, str | Path)
        self.failed = 0
        self.last: dict[str, Any] = {}
        self._problem: Problem | None = None
        self._begun = False

    def __repr__(self) -> str:
        known = "not known" if self.overhead is None else f"{self.overhead:.1%}"
        failed = f", {self.failed} questions failed" if self.failed else ""
        return (
            f"Monitor({name_of(self.model)}, {self.account.calls} steps, overhead {known}{failed})"
        )

    @property
    def overhead(self) -> float | None:
        """Time spent here, by the time spent on everything else from the first call on; None before there is any."""
        return self.account.overhead

    def step(
        self, inputs: Any, targets: Any = None, *, step: int | None = None
    ) -> dict[str, Any] | None:
        """One step of training, on this batch; the line that was written, or None where nothing was asked.

        ``step``: its number, by default counted from 0, or from the last line of the file on.

        The first call raises ``InputError`` where it is wrong as such: targets missing or not wanted, and what
        ``Problem`` refuses. Later calls raise nothing of the kind, whatever the batch is like. Warnings that questions
        give rise to are given once.
        """
        number = self._number(step)
        if not self._begun:
            self._begin(inputs, targets)
        self._wait()
        arrived, asked = self.account.arrive(), self._due()
        try:
            if not asked:
                return None
            answers, caught = self._ask(inputs, targets)
            line = {"step": number} | self.account.so_far(arrived) | answers
            self._begun = True
            problems = self._write(line)
        finally:
            self.account.leave(arrived, asked)
        self._tell(line, caught, problems)
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
        try:
            return self.start + self.account.calls if step is None else operator.index(step)
        except TypeError:
            raise InputError(errors.MSG_MONITOR_STEP.format(value=step)) from None

    def _begin(self, inputs: Any, targets: Any) -> None:
        """What can be seen to be wrong without running anything. By now the model is where it is trained."""
        check_call(self.loss, inputs, targets)
        data = {"batch": inputs} if self.loss is None else {"data": (inputs, targets)}
        self._problem = Problem(self.model, self.loss, **data, **self.dims)
        if self.parameters is not None:
            select(self._problem.program.parameters, self.parameters)
        if self.own_clock:
            self.account.clock = clock_of(self.model)

    def _due(self) -> bool:
        return not self._begun or self.account.due()

    # -- asking --

    def _ask(
        self, inputs: Any, targets: Any
    ) -> tuple[dict[str, Any], list[warnings.WarningMessage]]:
        """All questions, whatever becomes of them: random states stay inside, and errors after the first call."""
        before = random_state()
        with warnings.catch_warnings(record=True) as caught, torch.inference_mode(False):
            warnings.simplefilter("always")
            try:
                line = self._answers(inputs, targets)
            except Exception as error:
                if isinstance(error, InputError) and not self._begun:
                    raise
                line = {"error": _words(error)}
            finally:
                set_random_state(before)
        self.failed += sum(map(len, failures(line).values()))
        new = [w for w in caught if self.told.is_new(_said(w))]
        return line | ({"warnings": list(map(_said, new))} if new else {}), new

    def _answers(self, inputs: Any, targets: Any) -> dict[str, Any]:
        asked = Asked(self._at(inputs, targets), self.by, self.samples, self.parameters)
        verdicts = {v.name: v.status for v in asked.structure.verdicts}
        changes = self.told.changes(verdicts)
        rows = {name: q for name, q in self.wanted.items() if q is not None}
        found = self._rows(asked, rows) | {
            name: self._one(asked, name) for name in self.wanted if name not in rows
        }
        ordered = {name: found[name] for name in self.wanted}
        return (
            {"structure": verdicts}
            | ({"changes": changes} if changes else {})
            | {"quantities": ordered}
        )

    def _at(self, inputs: Any, targets: Any) -> Problem:
        """The problem on this batch, with the recording of the last one."""
        assert self._problem is not None
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
                return {name: {"error": _words(error)} for name in wanted}
            return {
                n: a for name, q in wanted.items() for n, a in self._rows(asked, {name: q}).items()
            }

    def _one(self, asked: Asked, name: str) -> Answer:
        try:
            return ALONE[name](asked)
        except Exception as error:
            return {"error": _words(error)}

    # -- what is told, and where --

    def _write(self, line: dict[str, Any]) -> list[str]:
        """To file and board; what went wrong with that."""
        self.last, problems = line, []
        for way in (self._to_file, self._to_board):
            try:
                way(line)
            except Exception as error:
                problems.append(
                    errors.MSG_MONITOR_WRITE.format(step=line["step"], error=_words(error))
                )
        return problems

    def _to_file(self, line: dict[str, Any]) -> None:
        if self.journal is not None:
            self.journal.write(line)

    def _to_board(self, line: dict[str, Any]) -> None:
        if self.board is None:
            return
        for path, value in scalars(line):
            self.board.add_scalar(path, value, line["step"])
        for kind in ("changes", "warnings"):
            for text in line.get(kind, ()):
                self.board.add_text(f"unbatch/{kind}", text, line["step"])

    def _tell(
        self,
        line: dict[str, Any],
        caught: Sequence[warnings.WarningMessage],
        problems: Sequence[str],
    ) -> None:
        """In the session; last of all, because a user may have made errors of warnings."""
        failed = {error: ", ".join(names) for error, names in failures(line).items()}
        texts = [
            errors.MSG_MONITOR_FAILED.format(what=what, step=line["step"], error=error)
            for error, what in failed.items()
            if self.told.is_new(f"{what}: {error}")
        ]
        for text in [*texts, *filter(self.told.is_new, problems)]:
            errors.warn(text, MonitorWarning)
        for w in caught:
            warnings.warn_explicit(w.message, w.category, w.filename, w.lineno, source=w.source)

    def _wait(self) -> None:
        """Until what training has queued on an accelerator is done, so that its time is not taken for ours."""
        if (
            self.account.clock is time.perf_counter
            and self._due()
            and torch.accelerator.is_available()
        ):
            torch.accelerator.synchronize()


def check_rows(by: str, wanted: Mapping[str, Quantity | None]) -> None:
    check_by(by)
    none = [
        name for name, quantity in wanted.items() if by == "copy" and of_columns(name, quantity)
    ]
    if none:
        rest = [name for name in wanted if name not in none]
        raise InputError(errors.MSG_MONITOR_COPY.format(names=", ".join(none), rest=rest))


def _words(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def _said(warning: warnings.WarningMessage) -> str:
    return f"{warning.category.__name__}: {warning.message}"


def board(where: Any) -> Any:
    """A writer to a folder; what can write already is taken as it is."""
    if not isinstance(where, str | Path):
        return where
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        message = errors.MSG_EXTRA.format(
            what="Writing for TensorBoard", package="tensorboard", extra="tensorboard"
        )
        raise ImportError(message) from error
    return SummaryWriter(str(where))
