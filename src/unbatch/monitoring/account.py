"""When a monitor measures, and what that costs.

The clock is passed in; what is measured, and where it is written, is not known here.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from unbatch.errors import MSG_MONITOR_EVERY, InputError

# The bound of every="auto", as a part of training time. Caches that a measurement evicts cost some
# more, which no clock here sees; this leaves the total below a tenth.
SHARE = 0.08


Clock = Callable[[], float]


def interval(every: int | str) -> int | None:
    """Return the calls from one measurement to the next, None for "auto". Raises ``InputError``."""
    if every == "auto":
        return None
    if not isinstance(every, int) or isinstance(every, bool) or every < 1:
        raise InputError(MSG_MONITOR_EVERY.format(value=every))
    return every


def clock_of(model: Any) -> Clock:
    """Return the CPU time of the process, or the time of day for a model on an accelerator.

    An accelerator works while the process waits for it, so there the time of day is what counts.
    """
    if not isinstance(model, nn.Module):
        return time.process_time
    first = next(model.parameters(), None)
    if first is None or first.device.type == "cpu":
        return time.process_time
    return time.perf_counter


@dataclass
class Account:
    """Seconds spent on measuring, and on everything else from the first call on.

    ``every``: calls from one measurement to the next. None: at the first call, and then as soon as
    another measurement, at the cost of the last one, would keep measuring within ``share`` of the
    time spent on training. What the first one costs is known only afterwards, so that short runs
    may be above.
    """

    every: int | None
    share: float
    clock: Clock
    measuring: float = 0.0
    training: float = 0.0
    calls: int = 0
    last_cost: float = 0.0
    last_end: float | None = None

    def start_call(self) -> float:
        """Return the time; what has passed since the last call was training."""
        now = self.clock()
        if self.last_end is not None:
            self.training += now - self.last_end
        return now

    def is_due(self) -> bool:
        """Return whether this call measures."""
        if self.every is not None:
            return self.calls % self.every == 0
        if self.calls == 0:
            return True
        # last_cost stands for the cost of the next one, which is not known before it is paid.
        return self.measuring + self.last_cost <= self.share * self.training

    def report(self, start: float) -> dict[str, float | None]:
        """Return what a line says of the cost, in the middle of a call that began at ``start``."""
        seconds = self.clock() - start
        return {"seconds": seconds, "overhead": self._share_of(self.measuring + seconds)}

    def end_call(self, start: float, measured: bool) -> None:
        """Book what a call has cost; only one that ``measured`` says what the next will cost."""
        self.last_end = self.clock()
        self.calls += 1
        cost = self.last_end - start
        self.measuring += cost
        if measured:
            self.last_cost = cost

    @property
    def overhead(self) -> float | None:
        """Time spent on measuring by time spent on training; None before there is any of that."""
        return self._share_of(self.measuring)

    def _share_of(self, measuring: float) -> float | None:
        if not self.training:
            return None
        return measuring / self.training
