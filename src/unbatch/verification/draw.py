"""How much of a problem is tried: all, or of a large one a sample that is drawn with a seed.

Predictions of a vocabulary have so many entries that a test of each pair of samples, on all
entries, takes longer than anybody waits. What is drawn is counted, and the report says it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TypeVar

import torch

from unbatch.capture.effort import PLAIN_STEPS

T = TypeVar("T")

# Predictions with more entries than this, all samples together, are large.
LARGE = 2**18


@dataclass(frozen=True)
class Draw:
    """How much is tried. ``share``: times as much as a default effort has; None: all there is.

    ``tried``: what was drawn, in words -> how many, and of how many.
    """

    share: float | None = None
    tried: dict[str, tuple[int, int]] = field(default_factory=dict)

    @staticmethod
    def of(entries: int, effort: float) -> Draw:
        """Return how much is tried where the predictions have so many entries together."""
        if entries <= LARGE:
            return ALL
        return Draw(effort / PLAIN_STEPS)

    def some(self, things: Iterable[T], few: int, name: str) -> Sequence[T]:
        """Return ``few`` of some things, in their order; all if all are tried."""
        things = list(things)
        places = self._places(len(things), few, name)
        if places is None:
            return things
        return [things[i] for i in places.tolist()]

    def columns(self, count: int, samples: int) -> torch.Tensor | None:
        """Return which entries of each sample's prediction are compared; None for all."""
        return self._places(count, max(1, LARGE // samples), "entries of each prediction")

    def _places(self, count: int, few: int, name: str) -> torch.Tensor | None:
        if self.share is None:
            return None
        chosen = max(1, math.ceil(few * self.share))
        if chosen >= count:
            return None
        before = self.tried.get(name, (0, 0))
        self.tried[name] = max(before, (chosen, count))
        return _drawn(chosen, count)

    def __str__(self) -> str:
        parts = [f"{some} of {count} {name}" for name, (some, count) in self.tried.items()]
        return ", ".join(parts)


@lru_cache(maxsize=16)
def _drawn(some: int, count: int) -> torch.Tensor:
    """Return ``some`` places of ``count``, in order."""
    generator = torch.Generator().manual_seed(0)
    return torch.randperm(count, generator=generator)[:some].sort().values


ALL = Draw()
