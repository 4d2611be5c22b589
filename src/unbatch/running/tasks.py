"""Tasks: loops that say what they do and how far they are, and who is told.

A loop that may take long is a task: it counts its passes, which is all that it costs. Who looks at
the count is another matter: a bar (``display.py``), a callback, or nobody. Between passes a task
lets Ctrl-C through (``interrupts.py``), and says then what was reached.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Self, TypeVar

from unbatch.errors import MSG_PROGRESS, InputError
from unbatch.running import display
from unbatch.running.interrupts import Held, is_held, stop_if_asked
from unbatch.running.records import Progress

T = TypeVar("T")

# Set to one of these, the variable of the environment switches progress off.
VARIABLE, OFF = "UNBATCH_PROGRESS", ("0", "false", "no", "off")

Callback = Callable[[Progress], None]


# --- the switch -----------------------------------------------------------------------------------


class _Settings:
    """``shown``: whether bars are; ``callback``: who is told in place of them."""

    def __init__(self) -> None:
        self.shown = os.environ.get(VARIABLE, "").strip().lower() not in OFF
        self.callback: Callback | None = None


_settings = _Settings()


class Setting:
    """A setting that was made; left as a context manager, the one before is made again."""

    def __init__(self, shown: bool, callback: Callback | None) -> None:
        self.before = _settings.shown, _settings.callback
        _settings.shown, _settings.callback = shown, callback

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        _settings.shown, _settings.callback = self.before


def progress(to: bool | Callback) -> Setting:
    """Switch progress on or off, or have a function called with it, from now on.

    ``to``: True for bars, which are shown on standard error where that is a terminal, and in
    notebooks, of what takes longer than two seconds (the default); False for none, as the variable
    ``UNBATCH_PROGRESS=0`` of the environment; or a function, which is called with a ``Progress``
    when something begins, after each pass and at its end, in place of bars. What it raises stops
    the question. As a context manager: inside only. Raises ``InputError`` for anything else.
    """
    if isinstance(to, bool):
        return Setting(to, None)
    if not callable(to):
        raise InputError(MSG_PROGRESS.format(value=repr(to)))
    return Setting(True, to)


# --- tasks ----------------------------------------------------------------------------------------


class _Running(threading.local):
    """The tasks of a thread, each inside the one before. ``muted``: nobody is told of them."""

    def __init__(self) -> None:
        self.tasks: list[Task] = []
        self.muted = 0


_running = _Running()


class Task:
    """A loop that counts what it has done; see ``task``."""

    def __init__(self, what: str, total: int | None, unit: str, at_most: bool) -> None:
        self.what, self.total, self.unit, self.at_most = what, total, unit, at_most
        self.done, self.remark, self.level = 0, "", 0
        self.began = 0.0
        self.callback: Callback | None = None
        self.is_watched = False
        self.tasks: list[Task] = []  # of the thread, this one among them
        self.held = Held()

    def __enter__(self) -> Self:
        is_first = not is_held()
        # Held first: from here on nothing comes between what follows.
        self.held.__enter__()
        tasks = self.tasks = _running.tasks
        if is_first and tasks and threading.current_thread() is threading.main_thread():
            tasks.clear()  # left there where an interrupt did not wait
        self.level = len(tasks)
        tasks.append(self)
        if _running.muted:
            return self
        if _settings.callback is not None:
            self._begin_to_tell(_settings.callback)
        elif _settings.shown and display.is_possible():
            self.began, self.is_watched = time.monotonic(), True
            display.watch(tasks)
        return self

    def _begin_to_tell(self, callback: Callback) -> None:
        if self.is_single:
            return
        self.callback, self.began = callback, time.monotonic()
        try:
            self._tell()
        except BaseException as error:
            self.__exit__(type(error), error, None)  # nobody else calls it then
            raise

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        tasks = self.tasks
        # With any that were left inside without their exit.
        del tasks[self.level :]
        if self.is_watched and not any(other.is_watched for other in tasks):
            display.close()
        if isinstance(error, KeyboardInterrupt) and not self.is_single:
            error.add_note(self.record().interrupted)
        # The callback may raise, and interrupts are let go all the same.
        try:
            if self.callback is not None:
                self._tell(ended=True)
        finally:
            self.held.__exit__(kind, error, trace)

    @property
    def is_single(self) -> bool:
        """Return whether it is a single pass, which is nowhere before it is done."""
        return self.total is not None and self.total <= 1

    def advance(self, count: int = 1) -> None:
        """Count so many more as done. Raises ``KeyboardInterrupt`` where Ctrl-C was pressed."""
        self.done += count
        # Nothing but this where nobody is told: what draws looks at the count by itself.
        if self.callback is not None:
            self._tell()
        stop_if_asked()

    def over(self, things: Iterable[T]) -> Iterator[T]:
        """Yield things, and count each as done when the next is asked for."""
        for thing in things:
            yield thing
            self.advance()

    def say(self, remark: str) -> None:
        """Say what has been reached, as "residual 3e-4, wanted 1e-6"."""
        self.remark = remark

    def record(self, ended: bool = False) -> Progress:
        """Return how far it is."""
        seconds = time.monotonic() - self.began if self.began else 0.0
        left = None
        done = self.done + self._share_of_next()
        if self.total is not None and done:
            left = max(0.0, seconds * (self.total - done) / done)
        return Progress(
            self.what,
            self.done,
            self.total,
            self.unit,
            seconds,
            left,
            self.remark,
            self.at_most,
            self.level,
            ended,
        )

    def _share_of_next(self) -> float:
        """Return how much of the next pass is done, by the task inside that it consists of."""
        # A copy: the thread that draws looks while tasks come and go.
        inner = self.tasks[self.level + 1 : self.level + 2]
        if self.total == self.done or not inner or not inner[0].total or inner[0].at_most:
            return 0.0
        return (inner[0].done + inner[0]._share_of_next()) / inner[0].total

    def _tell(self, ended: bool = False) -> None:
        callback = self.callback
        assert callback is not None
        try:
            callback(self.record(ended))
        except BaseException:
            self.callback = None  # it has said that it wants no more
            raise


def task(
    what: str, total: int | None = None, unit: str = "passes", *, at_most: bool = False
) -> Task:
    """Return a task, inside of which ``advance`` counts.

    ``what`` is done, in words; ``total``: how much there is in all, or ``at_most``; None where
    nobody knows.
    """
    return Task(what, total, unit, at_most)


class Muted:
    """Nobody is told of tasks inside, in this thread."""

    def __enter__(self) -> None:
        _running.muted += 1

    def __exit__(self, *exception: object) -> None:
        _running.muted -= 1
