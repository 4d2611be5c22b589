"""Whether a recorded program would take the same way on other numbers.

What decides the way are values: those that Python has read, and those that an op has taken a size
from. As long as each of them is what it was, Python goes on as it did, read by read, and the
recording is that of the new numbers, too. Only what leads to these values is computed for that.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from unbatch.capture.graph import Graph, HostRead
from unbatch.capture.python_values import ESCAPES
from unbatch.capture.steps import Step, indices
from unbatch.capture.uses import kinds_behind, steps_behind

# Kinds of values that are other ones with each batch, or after each step of a training.
MOVING = frozenset(["inputs", "targets", "parameters"])

# Each read of a memory that is written to takes a replay of its own.
MOST_REPLAYS = 8


@dataclass(frozen=True)
class Decision:
    """Some reads, and the steps that compute what was read."""

    reads: Sequence[HostRead]
    steps: Sequence[Step]

    def is_same(self, graph: Graph) -> bool:
        """Return whether the values are what they were, on the numbers of ``graph``."""
        values = graph.run({}, indices(read.ref for read in self.reads), steps=self.steps)
        return all(_same(value, read.seen) for value, read in zip(values, self.reads, strict=True))


@dataclass(frozen=True)
class Decisions:
    """All of a recording with these ``steps``. ``parts``: None where other numbers may decide."""

    steps: Sequence[Step]
    parts: Sequence[Decision] | None

    @staticmethod
    def of(graph: Graph) -> Decisions:
        if graph.dynamic or not all(_is_known(graph, read) for read in _reads(graph)):
            return Decisions(graph.steps, None)
        parts = _parts(graph)
        if len(parts) > MOST_REPLAYS or not all(_is_repeatable(graph, part) for part in parts):
            return Decisions(graph.steps, None)
        return Decisions(graph.steps, parts)

    def are_same(self, graph: Graph) -> bool:
        """Return whether the program goes the way of the recording on the numbers of ``graph``."""
        if self.parts is None:
            return False
        try:
            with torch.no_grad():
                return all(part.is_same(graph) for part in self.parts)
        except Exception:
            return False  # recorded again, the program itself raises


def _reads(graph: Graph) -> list[HostRead]:
    return [*graph.host_reads, *graph.sizings]


def _is_known(graph: Graph, read: HostRead) -> bool:
    """Return whether it is known what was read, all of it."""
    if read.blind or read.seen is None:
        return False
    # Who has the memory may read it again after the next write.
    exported = read.how.strip(".()") in ESCAPES
    return not (exported and graph.written(read.ref.index))


def _parts(graph: Graph) -> list[Decision]:
    """Return the reads with the steps behind them: together, unless what was read is overwritten.

    Such a value is there only until the next write.
    """
    lasting: list[HostRead] = []
    parts: list[Decision] = []
    for read in _reads(graph):
        if not graph.written(read.ref.index):
            lasting.append(read)
            continue
        before = graph.steps[: read.step]
        parts.append(Decision([read], steps_behind(graph.values, before, [read.ref])))
    if lasting:
        refs = [read.ref for read in lasting]
        parts.append(Decision(lasting, steps_behind(graph.values, graph.steps, refs)))
    return parts


def _is_repeatable(graph: Graph, part: Decision) -> bool:
    """Return whether the values may be the same on another batch: no noise, no other fractions."""
    if any(step.noise for step in part.steps):
        return False
    for read in part.reads:
        dtype = graph.values[read.ref.index].dtype
        if dtype.is_floating_point or dtype.is_complex:
            before = graph.steps[: read.step]
            if kinds_behind(graph.values, before, [read.ref]) & MOVING:
                return False
    return True


def _same(value: Tensor, seen: Tensor | None) -> bool:
    if seen is None or value.shape != seen.shape or value.dtype != seen.dtype:
        return False
    # Zeros have signs, which Python sees.
    zeros = value == 0
    if value.is_floating_point() and not torch.equal(value[zeros].signbit(), seen[zeros].signbit()):
        return False
    return torch.equal(value, seen)
