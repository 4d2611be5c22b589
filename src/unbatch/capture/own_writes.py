"""What a program writes itself and does not depend on: counters, histories, the last activations.

Such things change with every step of a training loop, and a recording stays valid all the same.
That is tried out, and only for programs that are seen to write. The program runs again where it
left off, and what it keeps is exchanged in several ways (emptied, repeated), which must change no
bit of its results. Of numbers it is noted what the program asks (``counters.py``). What escapes
that, the spot checks are for.
"""

from __future__ import annotations

import copy
import itertools
from collections import deque
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import FunctionType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from unbatch.capture.counters import Uses
from unbatch.capture.foreign import Memory, Queue, Scripted
from unbatch.capture.holders import (
    MISSING,
    PLAIN_TYPES,
    WHOLE,
    Array,
    Bytes,
    Elements,
    Empty,
    Entries,
    Holder,
    Items,
    alike,
    attributes_of,
)
from unbatch.capture.isolation import contents_untouched, set_random_state
from unbatch.capture.iterators import Position
from unbatch.capture.program import Program
from unbatch.capture.reachable import Reachable
from unbatch.capture.trees import copied

# How often what a program keeps is repeated, and how far numbers are moved.
OFTEN = 8
FAR = (1, 2, 3, 97, 10**7)

# How deep in objects numbers are moved.
DEEPEST = 3

# Places where nothing else is tried, so that whatever is written there may matter.
UNTRIED = (Memory, Bytes, Queue, Scripted)

Written = Mapping[int, set[Hashable]]


@dataclass(frozen=True)
class Place:
    """Where a program keeps a value. ``index``: of the holder among those of the program."""

    index: int
    key: Hashable  # the name that is written there
    holder: Holder
    name: Hashable

    def value(self) -> Any:
        return dict(self.holder.values()).get(self.name, MISSING)

    def put(self, value: Any) -> None:
        self.holder.put(self.name, value)


@dataclass(frozen=True)
class Count(Place):
    """An ``itertools.count``: the program is given copies, which go on from another number."""

    iterator: Any

    def value(self) -> Any:
        return self.iterator.__reduce__()[1][0]

    def put(self, value: Any) -> None:
        _, (_, *step) = self.iterator.__reduce__()
        self.holder.put(self.name, itertools.count(value, *step))


@dataclass(frozen=True)
class Idle:
    """What a program changes without depending on it.

    ``names``: by the number of the holder. ``numbers``: places where it may do so as long as
    ``uses`` have the same outcome with what stands there.
    """

    names: Written = field(default_factory=dict)
    numbers: Sequence[Place] = ()
    uses: Uses = field(default_factory=Uses)

    def without(self, changes: Sequence[tuple[int, Hashable]]) -> list[tuple[int, Hashable]]:
        """Return those of some changes that may matter."""
        rest = [(i, name) for i, name in changes if name not in self.names.get(i, ())]
        counted = {(place.index, place.key) for place in self.numbers}
        if counted.isdisjoint(rest) or not self.agrees():
            return rest
        return [change for change in rest if change not in counted]

    def agrees(self) -> bool:
        """Return whether the numbers are such that the program does what it did."""
        numbers = [place.value() for place in self.numbers]
        return all(map(_is_number, numbers)) and self.uses.agree(numbers)


def idle(program: Program, inputs: Any, targets: Any, rng: tuple[Any, ...]) -> Idle:
    """Return what the program changes without depending on it."""
    reached = program.reachable
    written = {}
    for i, names in reached.written.items():
        if not isinstance(reached.holders[i], UNTRIED):
            written[i] = set(names)
    counts = list(_counts(reached))
    if not written and not counts:
        return Idle()
    try:
        return _idle(written, reached.holders, counts, _Trial(program, inputs, targets, rng))
    except Exception:
        return Idle()  # a class of its own lets nothing be put there, or copies itself its own way


def _idle(
    written: Written, holders: Sequence[Holder], counts: Sequence[Place], trial: _Trial
) -> Idle:
    with trial.program.untouched(trial.rng), torch.enable_grad():
        if not (trial.begins() and trial.agrees()):
            return Idle()
        places = list(_places(holders, written))
        numbers = [place for place in places if _is_number(place.value())]
        others = [place for place in places if place not in numbers]
        numbers += counts
        if not _may_be_exchanged(others, trial):
            written = _without(written, others)
        uses = _uses_of(numbers, trial)
    if uses is not None and uses.printed and not _may_be_moved(numbers, trial):
        uses = None
    names = _without(written, numbers)
    if uses is None:
        return Idle(names)
    return Idle(names, numbers, uses)


# --- trying ---------------------------------------------------------------------------------------


class _Trial:
    """Runs a program again, and compares."""

    def __init__(self, program: Program, inputs: Any, targets: Any, rng: tuple[Any, ...]) -> None:
        self.program, self.inputs, self.targets, self.rng = program, inputs, targets, rng
        self.first: list[Any] | None = None

    def begins(self) -> bool:
        """Run where nothing has been exchanged; return whether that works."""
        self.first = self.results()
        return self.first is not None

    def agrees(self) -> bool:
        """Return whether another run has the same results, bit by bit."""
        results = self.results()
        return results is not None and self.first is not None and _equal(self.first, results)

    def results(self) -> list[Any] | None:
        """Return what the program returns; None where it raises."""
        set_random_state(self.rng)
        try:
            return _run(self.program, self.inputs, self.targets)
        except Exception:
            return None  # it depends on what it keeps so much that it does not run


def _may_be_exchanged(places: Sequence[Place], trial: _Trial) -> bool:
    """Return whether other values in places lead to the same results."""
    for exchange in (_raised, _lowered, _emptied):
        exchanged = [_exchange(place, exchange) for place in places]
        if any(exchanged) and not trial.agrees():
            return False
    return True


def _uses_of(numbers: Sequence[Place], trial: _Trial) -> Uses | None:
    """Return what the program asks of its numbers; None where they cannot be followed."""
    uses = Uses()
    counters = uses.counters([place.value() for place in numbers])
    for place, counter in zip(numbers, counters, strict=True):
        place.put(counter)
    if not trial.agrees():
        return None
    return uses


def _may_be_moved(numbers: Sequence[Place], trial: _Trial) -> bool:
    """Return whether other numbers lead to the same results; for what makes texts of them."""
    with trial.program.untouched(trial.rng), torch.enable_grad():
        if trial.results() is None:
            return False
        starts = [place.value() for place in numbers]
        for distance in FAR:
            for place, start in zip(numbers, starts, strict=True):
                place.put(start + distance)
            if not trial.agrees():
                return False
    return True


# --- places ---------------------------------------------------------------------------------------


def _places(holders: Sequence[Holder], written: Written) -> Iterator[Place]:
    """Yield the places where the program has written, as they are now."""
    for i, names in written.items():
        holder = holders[i]
        if isinstance(holder, Empty):
            # Once something has been written, it is a dict like others.
            for key in names:
                assert isinstance(key, int)
                inside = Entries(holder.spaces[key])
                for name, _ in inside.values():
                    yield Place(i, key, inside, name)
            continue
        there = dict(holder.values())
        for name in names:
            if name in there or isinstance(holder, Items | Elements | Array):
                yield Place(i, name, holder, name)


def _counts(reached: Reachable) -> Iterator[Count]:
    """Yield the iterators that count."""
    for holder, name, value in reached.iterators:
        if type(value) is not itertools.count:
            continue
        for i, position in enumerate(reached.holders):
            if isinstance(position, Position) and position.iterator is value:
                yield Count(i, WHOLE, holder, name, value)


def _without(written: Written, places: Sequence[Place]) -> dict[int, set[Hashable]]:
    """Return what is written, but for some places."""
    keys = {(place.index, place.key) for place in places}
    rest: dict[int, set[Hashable]] = {}
    for i, names in written.items():
        rest[i] = {name for name in names if (i, name) not in keys}
    return rest


def _is_number(value: Any) -> bool:
    return type(value) in (int, float)


# --- other values ---------------------------------------------------------------------------------


def _exchange(place: Place, exchange: Callable[[Any], Any]) -> bool:
    """Put another value in a place; return whether there is one."""
    holder = place.holder
    value = place.value()
    is_whole = value is MISSING  # a list or an array has no name for all that is in it
    if is_whole:
        value = holder.content()
    other = exchange(value)
    if other is value:
        return False
    if is_whole:
        holder.restore(other)
    else:
        place.put(other)
    return True


def _raised(value: Any) -> Any:
    """Return more of the same kind, and larger numbers."""
    return _moved(value, 1)


def _lowered(value: Any) -> Any:
    """Return more of the same kind, and smaller numbers."""
    return _moved(value, -1)


def _moved(value: Any, sign: int, depth: int = 0) -> Any:
    kind = type(value)

    def moved(part: Any) -> Any:
        return _moved(part, sign, depth + 1)

    if depth > DEEPEST or isinstance(value, nn.Module):
        return value
    if kind is bool:
        return not value
    if _is_number(value):
        return value + sign * FAR[-1]
    if kind in (str, bytes):
        return value * OFTEN
    if kind in (list, tuple, deque):
        return kind(map(moved, value)) * OFTEN
    if kind is dict:
        return dict(zip(value, map(moved, value.values()), strict=True))
    if _is_changeable(value):
        return value + sign * FAR[2]
    if type(attributes_of(value)) is dict and not isinstance(value, Tensor):
        return _with_moved_attributes(value, moved)
    return value


def _with_moved_attributes(value: Any, moved: Callable[[Any], Any]) -> Any:
    """Return a copy of an object with other numbers in its attributes."""
    if isinstance(value, type | FunctionType) or not vars(value):
        return value
    other = copy.copy(value)
    vars(other).update(zip(vars(value), map(moved, vars(value).values()), strict=True))
    return other


def _emptied(value: Any) -> Any:
    """Return nothing of the same kind."""
    if type(value) is bool:
        return not value
    if type(value) in (str, bytes, list, tuple, deque, set, dict):
        return type(value)()
    if _is_changeable(value):
        return value * 0
    return value


def _is_changeable(value: Any) -> bool:
    """Return whether there can be other numbers in an array or a tensor that belongs to nobody."""
    if type(value) is np.ndarray:
        return value.dtype.kind in "iuf"
    return type(value) is Tensor and value.dtype != torch.bool


# --- running --------------------------------------------------------------------------------------


def _run(program: Program, inputs: Any, targets: Any) -> list[Any]:
    """Return what the program returns; what it writes to tensors is put back at once."""
    with contents_untouched():
        output = program.predict(inputs)
        results = tree_leaves(output)
        if program.loss is not None:
            results += tree_leaves(program.evaluate(output, targets))
        return [copied(result) for result in results]


def _equal(first: list[Any], second: list[Any]) -> bool:
    """Return whether results are the same in every bit."""
    if len(first) != len(second):
        return False
    for a, b in zip(first, second, strict=True):
        if not isinstance(a, Tensor) or not isinstance(b, Tensor):
            # Of objects nobody knows what is in them.
            if type(a) in PLAIN_TYPES and not alike(a, b):
                return False
            continue
        if a.shape != b.shape or not torch.equal(a.isnan(), b.isnan()):
            return False
        if not torch.equal(a.nan_to_num(), b.nan_to_num()):
            return False
    return True
