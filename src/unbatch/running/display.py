"""Bars of what takes long: on standard error where that is a terminal, and in notebooks.

A thread of their own looks at the tasks of the main thread now and then, so that loops have nothing
to do but to count. It is there while something runs, imports what draws only when something has to
be drawn, and reads clocks and counts; it computes nothing.
"""

from __future__ import annotations

import contextvars
import os
import sys
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

from unbatch.running.records import Progress

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress

DELAY = 2.0  # seconds that anything may take without a bar
PERIOD = 0.1  # seconds between two looks
LINGER = 50  # looks without anything to see, after which nobody looks any more

BAR = 16  # characters


class Counted(Protocol):
    """What is looked at. ``began``: when, by ``time.monotonic``; 0 for what is not to be shown."""

    began: float
    done: int
    total: int | None

    @property
    def is_single(self) -> bool: ...

    def record(self) -> Progress: ...


def is_possible() -> bool:
    """Tell whether there is somebody to show bars to: not in pipes, nor for other threads."""
    if _watcher.gave_up or threading.current_thread() is not threading.main_thread():
        return False
    if _is_notebook():
        return True
    try:
        return sys.stderr is not None and sys.stderr.isatty()
    except ValueError:  # it was closed
        return False


def _is_notebook() -> bool:
    # Looked up and not imported: where nobody has imported it, this is no notebook.
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return hasattr(shell, "kernel")


def watch(tasks: Sequence[Counted]) -> None:
    """Look at these tasks from now on."""
    _watcher.watch(tasks)


def close() -> None:
    """Take away the bars: nothing runs any more."""
    _watcher.close()


# --- who looks ------------------------------------------------------------------------------------


class _Watcher:
    """Looks at the tasks of the main thread, and draws those that take long."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.tasks: Sequence[Counted] = ()
        self.thread: threading.Thread | None = None
        self.bars: Bars | None = None
        self.gave_up = False

    def watch(self, tasks: Sequence[Counted]) -> None:
        with self.lock:
            self.tasks = tasks
            if self.thread is not None:
                return
            # A notebook knows by the context to which cell an output belongs.
            run = contextvars.copy_context().run
            self.thread = threading.Thread(
                target=run, args=(self._keep_looking,), name="unbatch progress", daemon=True
            )
        self.thread.start()

    def close(self) -> None:
        with self.lock:
            try:
                self._clear()
            except Exception:
                self._give_up()

    def _give_up(self) -> None:
        """Show nothing more: what cannot be drawn must not stop what is computed."""
        self.bars, self.gave_up = None, True

    def look(self) -> bool:
        """Draw what there is to be seen, and return whether something runs."""
        with self.lock:
            tasks = list(self.tasks)
            try:
                self._draw(tasks)
            except Exception:
                self._give_up()
            return bool(tasks)

    def _keep_looking(self) -> None:
        idle = 0
        while True:
            time.sleep(PERIOD)
            idle = 0 if self.look() else idle + 1
            with self.lock:
                # Looked at once more: a task that begins now starts no thread beside this one.
                if idle >= LINGER and not self.tasks:
                    self.thread = None
                    return

    def _draw(self, tasks: Sequence[Counted]) -> None:
        """Draw the outermost task and the innermost, as far as they have been there for long."""
        now = time.monotonic()
        shown = [task for task in tasks if task.began and now - task.began >= DELAY]
        # A single pass is shown where nothing else is to be seen.
        shown = [task for task in shown if not task.is_single] or shown
        if not shown:
            self._clear()
            return
        # What is between them changes too fast to be read, or too slowly to be missed.
        outer = shown[0]
        if self.bars is None and outer.done == outer.total:
            return  # nothing more is to come
        if self.bars is None:
            self.bars = bars_of_notebook() if _is_notebook() else BarsOfTerminal()
        self.bars.draw([task.record() for task in dict.fromkeys((outer, shown[-1]))])

    def _clear(self) -> None:
        bars, self.bars = self.bars, None
        if bars is not None:
            bars.close()


_watcher = _Watcher()


def _forget() -> None:
    """Begin anew in a process that was forked, where nobody looks."""
    global _watcher
    _watcher = _Watcher()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)


# --- what is seen ---------------------------------------------------------------------------------


class Bars(ABC):
    """Bars by ``rich``, wherever they are shown."""

    def __init__(self) -> None:
        self.progress = _rich()

    def draw(self, records: Sequence[Progress]) -> None:
        """Show these, and nothing else."""
        # Lines are used again, so that they do not jump where tasks come and go.
        for number in list(self.progress.task_ids)[len(records) :]:
            self.progress.remove_task(number)
        while len(self.progress.task_ids) < len(records):
            self.progress.add_task("", count="", times="")
        for number, record in zip(self.progress.task_ids, records, strict=True):
            self.progress.update(
                number,
                description=record.what,
                total=record.total,
                completed=record.done,
                count=record.count,
                times=record.times,
            )
        self.show()

    @abstractmethod
    def show(self) -> None:
        """Bring what was drawn before somebody's eyes."""

    @abstractmethod
    def close(self) -> None:
        """Take it away."""


class BarsOfTerminal(Bars):
    """Lines at the end of a terminal, which are gone at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.progress.start()

    def show(self) -> None:
        self.progress.refresh()

    def close(self) -> None:
        self.progress.stop()


class BarsOfNotebook(Bars):
    """An output of a cell, which is empty at the end. ``display``: that of IPython."""

    def __init__(self, display: Any, empty: Any) -> None:
        super().__init__()
        self.display, self.empty = display, empty
        self.handle: Any = None

    def show(self) -> None:
        table = self.progress.make_tasks_table(self.progress.tasks)
        if self.handle is None:
            self.handle = self.display(table, display_id=True)
        else:
            self.handle.update(table)

    def close(self) -> None:
        if self.handle is not None:
            self.handle.update(self.empty)


def bars_of_notebook() -> Bars:
    """Return bars by what the notebook itself offers, without widgets."""
    from IPython import display

    return BarsOfNotebook(display.display, display.HTML(""))


def _rich() -> RichProgress:
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn
    from rich.progress import Progress as RichProgress

    # Nothing of the process is redirected: a program may print, and look at what it prints to.
    return RichProgress(
        TextColumn("{task.description}"),
        BarColumn(BAR),
        TextColumn("{task.fields[count]}"),
        TextColumn("{task.fields[times]}"),
        console=Console(stderr=True),
        auto_refresh=False,
        transient=True,
        redirect_stdout=False,
        redirect_stderr=False,
    )
