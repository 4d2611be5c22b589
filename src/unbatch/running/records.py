"""How far something is, as numbers and in words."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Progress:
    """How far something is, as a callback is told.

    ``what`` is done, in words; ``done`` of ``total`` in ``unit``: None where that is not known,
    and the most that there may be where ``at_most``. ``seconds`` since it began, and ``left``: as
    long as the rest takes at the same speed. ``remark``: what an iteration has reached. ``level``:
    in how many other tasks it is. ``ended``: nothing follows, even if not all was done.
    """

    what: str
    done: int
    total: int | None
    unit: str
    seconds: float
    left: float | None
    remark: str = ""
    at_most: bool = False
    level: int = 0
    ended: bool = False

    @property
    def count(self) -> str:
        """Return how much is done in words, as "132 of 6,435 passes"."""
        if self.total is None or self.total <= 1:
            return f"{self.done:,} {self.unit}" if self.done > 1 else ""
        of = "of at most" if self.at_most else "of"
        return f"{self.done:,} {of} {self.total:,} {self.unit}"

    @property
    def times(self) -> str:
        """Return how long it takes, as "0:12, 9:48 left", and what it has reached."""
        words = _minutes(self.seconds)
        if self.left is not None:
            most = "at most " if self.at_most else ""
            words += f", {most}{_minutes(self.left)} left"
        if self.remark:
            words += f"; {self.remark}"
        return words

    @property
    def interrupted(self) -> str:
        """Return what was reached by then, in words."""
        what = f"{self.what[:1].lower()}{self.what[1:]}"
        text = f"Interrupted in {what}"
        if self.count:
            text += f", after {self.count}"
        if self.remark:
            text += f" ({self.remark})"
        return text + "."


def _minutes(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}:{minutes:02}:{rest:02}"
    return f"{minutes}:{rest:02}"
