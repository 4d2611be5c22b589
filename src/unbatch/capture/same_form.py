"""The form of a recording: what is left of it without numbers, to compare it with another one.

Two recordings of a program on batches of other sizes have one form where they are the same steps,
from the same lines, on the same values, and sizes differ in a way that is asked for (``Sizes``).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from unbatch.capture.graph import Graph
from unbatch.capture.holders import alike
from unbatch.capture.steps import Ref, Step, Value

# Numbers that mean something by themselves: none, one, the last.
SPECIAL = (-1, 0, 1)


# Arguments of these names say along which axis, or how a loss is reduced.
PLACES = ("dim", "axis", "start_dim", "end_dim", "reduction")


class Sizes:
    """How sizes and numbers of one recording may differ from those of another: not at all."""

    def takes(self, one: int, other: int) -> bool:
        """Return whether a size of the one may be that of the other."""
        return one == other

    def takes_number(self, one: float, other: float) -> bool:
        """Return whether an argument of a step may be that of the other; they are of one type."""
        return alike(one, other)

    def takes_layout(self, one: Value, other: Value) -> bool:
        """Return whether a value may lie in memory as the other one does."""
        return one.stride == other.stride and one.offset == other.offset


EXACT = Sizes()


@dataclass
class Renamed(Sizes):
    """Equal sizes are equal in the other recording, and unequal ones unequal; 0 and 1 stay.

    So no two sizes coincide in one recording and not in the other, and nothing that is inferred
    from sizes in the one is inferred by chance.
    """

    forth: dict[int, int] = field(default_factory=lambda: {0: 0, 1: 1})
    back: dict[int, int] = field(default_factory=lambda: {0: 0, 1: 1})

    def takes(self, one: int, other: int) -> bool:
        return self.forth.setdefault(one, other) == other and (
            self.back.setdefault(other, one) == one
        )

    def takes_number(self, one: float, other: float) -> bool:
        if alike(one, other):
            return True
        # A number that is made of sizes; a rule may know these.
        if one in SPECIAL or other in SPECIAL:
            return False
        return math.isfinite(one) and math.isfinite(other) and (one < 0) == (other < 0)

    def takes_layout(self, one: Value, other: Value) -> bool:
        return True  # follows from the steps


@dataclass
class Counted(Sizes):
    """Sizes are equal, or have another number of samples as a factor: ``old`` and ``new``."""

    old: int
    new: int

    def takes(self, one: int, other: int) -> bool:
        return one == other or (one % self.old == 0 and one // self.old * self.new == other)

    def takes_number(self, one: float, other: float) -> bool:
        if alike(one, other):
            return True
        if isinstance(one, int) and isinstance(other, int):
            return self.takes(one, other)
        return math.isfinite(one) and math.isfinite(other)

    def takes_layout(self, one: Value, other: Value) -> bool:
        return True


@dataclass(frozen=True)
class Form:
    """A recording without its numbers. ``ends``: what begins and ends it, and what Python reads."""

    values: Sequence[Value]
    steps: Sequence[Step]
    ends: tuple[Any, ...]

    @staticmethod
    def of(graph: Graph) -> Form:
        values = [replace(value, concrete=None) for value in graph.values]
        ends = (
            graph.inputs,
            graph.targets,
            graph.predictions,
            graph.loss,
            graph.own_loss,
            graph.model_steps,
            graph.dynamic,
            graph.foreign,
            graph.keeps,
            graph.host_reads,
        )
        return Form(values, list(graph.steps), ends)

    def is_like(self, other: Form, sizes: Sizes) -> bool:
        """Return whether it is the form of another recording, but for ``sizes``."""
        if len(self.values) != len(other.values) or len(self.steps) != len(other.steps):
            return False
        if self.ends != other.ends:
            return False
        for one, two in zip(self.steps, other.steps, strict=True):
            if not _steps_alike(one, two, sizes):
                return False
        for value, its in zip(self.values, other.values, strict=True):
            if not _values_alike(value, its, sizes):
                return False
        return True


def _values_alike(one: Value, other: Value, sizes: Sizes) -> bool:
    if one.kind != other.kind or one.name != other.name or one.dtype != other.dtype:
        return False
    if one.storage != other.storage or one.requires_grad != other.requires_grad:
        return False
    if len(one.shape) != len(other.shape) or not sizes.takes_layout(one, other):
        return False
    return all(map(sizes.takes, one.shape, other.shape))


def _steps_alike(one: Step, other: Step, sizes: Sizes) -> bool:
    if one.op is not other.op or one.outs != other.outs or one.writes != other.writes:
        return False
    # Another line is another branch of the program.
    if one.where != other.where or one.module != other.module or one.function != other.function:
        return False
    if one.grad != other.grad or one.noise != other.noise:
        return False
    if one.named.keys() != other.named.keys():
        return False
    for name, argument in one.named.items():
        # A number that is no size, whatever its value.
        exact = name.startswith(PLACES)
        if not _arguments_alike(argument, other.named[name], EXACT if exact else sizes):
            return False
    return True


def _arguments_alike(one: Any, other: Any, sizes: Sizes) -> bool:
    """Return whether arguments are the same, leaf by leaf."""
    if type(one) is not type(other):
        return False
    if isinstance(one, Ref):
        return bool(one == other)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(
            _arguments_alike(a, b, sizes) for a, b in zip(one, other, strict=True)
        )
    if isinstance(one, Mapping):
        return list(one) == list(other) and all(
            _arguments_alike(one[name], other[name], sizes) for name in one
        )
    if type(one) in (int, float):
        return sizes.takes_number(one, other)
    return alike(one, other)
