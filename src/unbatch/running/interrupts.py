"""Ctrl-C while something runs: it waits for the next pass.

Python raises ``KeyboardInterrupt`` between any two instructions: in the middle of an import, which
leaves half of a module behind, or at the end of an ``__enter__``, whose ``__exit__`` is never
called then, and gradients, say, stay switched off. No ``try`` is proof against that. So a signal is
only noted while something holds it, and is handled at places where an exception may pass: after a
pass, at an op of the program, and at the end. A second one that comes later than ``PATIENCE`` is
handled at once, but neither in an import nor where something is put back.
"""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from unbatch.errors import HERE

NUMBER = int(signal.SIGINT)

PATIENCE = 1.0  # seconds after which a second signal does not wait

UNCHANGED = (
    "Nothing was changed: parameters, buffers, gradients and random states are as they were."
)

REACHED = "What was computed so far is in `reached` of this exception (`sys.last_value.reached`)."

IMPORTS = "<frozen importlib"  # the code of Python that runs an import, as files are named


class _Signals:
    """What is known of Ctrl-C. Signals reach the main thread alone, and so does this.

    ``depth``: how many hold them; ``sealed``: how many of those by all means. ``before``: what
    handled them. ``asked``: when the first came that waits; None without one.
    """

    def __init__(self) -> None:
        self.depth = 0
        self.sealed = 0
        self.before: Any = None
        self.asked: float | None = None

    def begin(self) -> None:
        """Note signals from here on, if they are handled in Python."""
        # Python's own functions make enums of all that they return, which takes ten times as long.
        before = _signal.getsignal(NUMBER)
        self.asked, self.before = None, None
        # One that is ignored, or handled in C, is none of ours.
        if callable(before):
            # Kept first: once ours is set, a signal may come at any instruction.
            self.before = before
            _signal.signal(NUMBER, self.note)

    def end(self) -> None:
        """Leave signals to what handled them before."""
        before, self.before = self.before, None
        # The program may have set a handler of its own, which is none of ours.
        if before is not None and _signal.getsignal(NUMBER) == self.note:
            _signal.signal(NUMBER, before)

    def note(self, number: int, frame: FrameType | None) -> None:
        """Handle a signal: let it wait, unless one has waited long."""
        now = time.monotonic()
        if self.asked is None:
            self.asked = now
            return
        # The keys are often pressed twice: the second counts where the first had its time.
        if now - self.asked < PATIENCE or self.sealed or _is_importing(frame):
            return
        before = self.before
        self.let_go()
        before(number, frame)

    def let_go(self) -> None:
        """Hold nothing any more, whoever does; they are left in any order from here on."""
        self.depth, self.sealed, self.asked = 0, 0, None
        self.end()

    def stop(self) -> None:
        """Handle the signal that waits."""
        if self.before is None or not _is_main():
            return
        # Before it is called, as it raises; one that only notes (of asyncio, say) lets us go on.
        self.asked = None
        self.before(NUMBER, sys._getframe())


_signals = _Signals()

if hasattr(os, "register_at_fork"):
    # A process that is forked inside is one of the program's, and stops when it is told to.
    os.register_at_fork(after_in_child=_signals.let_go)


class Held:
    """Ctrl-C waits inside for the next pass, or the end; nests.

    ``sealed``: nothing that follows it is handled before the end, either.
    """

    __slots__ = ("entered", "sealed")

    def __init__(self, sealed: bool = False) -> None:
        self.sealed = sealed
        self.entered = False

    def __enter__(self) -> None:
        self.entered = _is_main()
        if not self.entered:
            return
        if not _signals.depth:
            _signals.begin()
        _signals.depth += 1
        _signals.sealed += self.sealed

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if not self.entered:
            return
        if not _signals.depth:  # a second signal has ended it all
            return
        _signals.sealed -= self.sealed
        _signals.depth -= 1
        if _signals.depth:
            return
        # The handler of before is set first: what comes meanwhile is noted, what comes then raises.
        before, asked = _signals.before, _signals.asked
        _signals.asked = None
        _signals.end()
        if isinstance(error, KeyboardInterrupt):
            if not self.sealed:
                error.add_note(UNCHANGED)
        elif asked is not None and before is not None:
            before(NUMBER, sys._getframe())


def is_held() -> bool:
    """Tell whether somebody holds Ctrl-C back."""
    return bool(_signals.depth)


def stop_if_asked() -> None:
    """Raise ``KeyboardInterrupt`` where Ctrl-C was pressed since; what calls it is whole then."""
    if _signals.asked is not None and not _signals.sealed:
        _signals.stop()


def leave_behind(error: KeyboardInterrupt, *reached: Any) -> None:
    """Leave with an interrupt what was reached, as ``reached``, where it is looked for."""
    # A subclass with an attribute would end a process with another exit status.
    vars(error)["reached"] = reached
    error.add_note(REACHED)


@contextmanager
def left_behind(*reached: Any) -> Iterator[None]:
    """Leave this with an interrupt inside."""
    try:
        yield
    except KeyboardInterrupt as error:
        leave_behind(error, *reached)
        raise


def _is_main() -> bool:
    return threading.current_thread() is threading.main_thread()


def _is_importing(frame: FrameType | None) -> bool:
    """Tell whether a frame belongs to an import that something below us does."""
    # Up to our own frames: all of it may be run by the import of a user's script.
    while frame is not None and not frame.f_code.co_filename.startswith(HERE):
        if frame.f_code.co_filename.startswith(IMPORTS):
            return True
        frame = frame.f_back
    return False
