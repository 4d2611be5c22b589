"""What a program writes itself and does not depend on: counters, histories, the last activations.

Such things change with every step of a training loop, and a recording stays valid all the same.
That is tried out, and only for programs that are seen to write. The program runs again where it
left off, with stand-ins that see whether it looks at what it keeps, or only writes it
(``watched.py``). Numbers that it looks at are followed (``counters.py``); tensors, arrays and flags
are exchanged, which must change no bit of its results. Anything else that it looks at matters.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
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
from unbatch.capture.isolation import contents_untouched, set_random_state, untouched
from unbatch.capture.iterators import Position
from unbatch.capture.program import Program
from unbatch.capture.reachable import Reachable
from unbatch.capture.trees import copied
from unbatch.capture.watched import Unreadable, watched

# How far numbers are moved.
FAR = (1, 2, 3, 97, 10**7)

# So many places are tried one by one, if not all of them can be at once.
MOST_TRIED = 8

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
class Attribute(Place):
    """A number in an object that the program exchanges as a whole: it is given copies."""

    attribute: str

    def value(self) -> Any:
        return (attributes_of(super().value()) or {}).get(self.attribute, MISSING)

    def put(self, value: Any) -> None:
        other = copy.copy(super().value())
        vars(other)[self.attribute] = value
        super().put(other)


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
        with trial.aside():
            if not (trial.begins() and trial.agrees()):
                return Idle()
            places = list(_places(holders, written))  # some are there only once it has run
        written = _but_read(written, holders, trial)
        places = [place for place in places if place.key in written[place.index]]
        numbers = [place for place in places if _is_number(place.value())]
        others = [place for place in places if place not in numbers]
        numbers += counts
        read = _read(others, trial)
        exchanged = list(filter(_has_another, read))
        written = _without(written, [place for place in read if place not in exchanged])
        inner = _numbers_inside(exchanged)
        if not _may_be_exchanged(exchanged, trial):
            written, inner = _without(written, exchanged), []
        numbers += inner
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
        self.reached = program.reachable
        self.first: list[Any] | None = None
        self.asked: list[bool] = []

    def begins(self) -> bool:
        """Run where nothing has been exchanged; return whether that works."""
        self.first = self.results()
        return self.first is not None

    def agrees(self) -> bool:
        """Return whether another run has the same results, and asks nothing unreadable."""
        self.asked.clear()
        results = self.results()
        if self.asked:
            return False
        return results is not None and self.first is not None and _equal(self.first, results)

    def results(self) -> list[Any] | None:
        """Return what the program returns; None where it raises."""
        set_random_state(self.rng)
        try:
            return _run(self.program, self.inputs, self.targets)
        except Exception:
            return None  # it depends on what it keeps so much that it does not run

    def unreadable(self) -> Unreadable:
        """Return what stands for a value that is only written."""
        return Unreadable(partial(self.asked.append, True))

    @contextmanager
    def aside(self, places: Sequence[Place] = ()) -> Iterator[None]:
        """Put back whatever is run inside, and what is exchanged in some places."""
        with untouched(self.reached, self.rng):
            values = [place.value() for place in places]
            try:
                yield
            finally:
                # At once: nobody else may look at what is unreadable.
                for place, value in zip(places, values, strict=True):
                    if value is not MISSING:
                        place.put(value)


# --- what is only written -------------------------------------------------------------------------


def _but_read(written: Written, holders: Sequence[Holder], trial: _Trial) -> Written:
    """Return what is written, but for containers whose length, keys or order the program reads."""
    containers = list(_containers(written, holders))
    read: set[int] = set()
    stand_ins: dict[int, Any] = {}
    for n, (_, space, fixed) in enumerate(containers):
        stand_in = watched(space, partial(read.add, n), fixed)
        if stand_in is not None:
            stand_ins[id(space)] = stand_in
    with trial.aside():
        replaced = _put_everywhere(holders, stand_ins)
        if replaced and not trial.agrees():
            read.update(range(len(containers)))
    matter = []
    for n, (place, space, _) in enumerate(containers):
        is_unseen = id(space) not in replaced and not _is_namespace(holders, space)
        if n in read or is_unseen:
            matter.append(place)
    return _without_containers(written, holders, matter)


def _containers(
    written: Written, holders: Sequence[Holder]
) -> Iterator[tuple[tuple[int, Hashable], Any, bool]]:
    """Yield containers that are written to: where each is, and whether it keeps its length."""
    for i, names in written.items():
        holder = holders[i]
        if isinstance(holder, Empty):
            for key in names:
                assert isinstance(key, int)
                yield (i, key), holder.spaces[key], False
        elif isinstance(holder, Items | Elements) or type(holder) is Entries:
            yield (i, WHOLE), holder.space, WHOLE not in names


def _put_everywhere(holders: Sequence[Holder], stand_ins: Mapping[int, Any]) -> set[int]:
    """Put others in place of containers, by their ids; return those of which there is a place."""
    replaced = set()
    for holder in holders:
        if type(holder).put is Holder.put:
            continue
        for name, value in holder.values():
            if id(value) in stand_ins:
                holder.put(name, stand_ins[id(value)])
                replaced.add(id(value))
    return replaced


def _is_namespace(holders: Sequence[Holder], space: Any) -> bool:
    """Return whether a dict has the attributes of an object, and is no container of its own."""
    if not isinstance(space, dict):
        return False
    for holder in holders:
        if any(value is space for _, value in holder.values()):
            return False
    return True


def _without_containers(
    written: Written, holders: Sequence[Holder], matter: Sequence[tuple[int, Hashable]]
) -> Written:
    rest: dict[int, set[Hashable]] = {i: set(names) for i, names in written.items()}
    for i, key in matter:
        if isinstance(holders[i], Empty):
            rest[i].discard(key)
        else:
            rest[i].clear()
    return rest


def _read(places: Sequence[Place], trial: _Trial) -> list[Place]:
    """Return the places at which the program looks before it writes to them."""
    if _runs_without(places, trial):
        return []
    if len(places) > MOST_TRIED:
        return list(places)
    return [place for place in places if not _runs_without([place], trial)]


def _runs_without(places: Sequence[Place], trial: _Trial) -> bool:
    """Return whether the program does the same where nothing in some places can be read."""
    if not places:
        return True
    if any(isinstance(place.holder, Array) for place in places):
        return False  # it is written to where it lies
    with trial.aside(places):
        for place in places:
            place.put(trial.unreadable())
        return trial.agrees()


def _may_be_exchanged(places: Sequence[Place], trial: _Trial) -> bool:
    """Return whether other values in places lead to the same results."""
    for exchange in (_raised, _lowered, _nudged, _emptied):
        with trial.aside(places):
            for place in places:
                _exchange(place, exchange, trial)
            if places and not trial.agrees():
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
            if name in there or isinstance(holder, Array):
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


def _numbers_inside(places: Sequence[Place]) -> list[Place]:
    """Return the numbers among the attributes of objects in some places."""
    numbers: list[Place] = []
    for place in places:
        value = place.value()
        if not _can_be_copied(value):
            continue
        for attribute, part in vars(value).items():
            if _is_number(part):
                numbers.append(
                    Attribute(place.index, place.key, place.holder, place.name, attribute)
                )
    return numbers


# --- other values ---------------------------------------------------------------------------------


def _has_another(place: Place) -> bool:
    """Return whether there is another value of the same kind."""
    value = place.value()
    if value is MISSING:
        return isinstance(place.holder, Array)
    return _flipped(value) is not value or _can_be_copied(value)


def _exchange(place: Place, exchange: Callable[[Any], Any], trial: _Trial) -> None:
    """Put another value in a place."""
    holder = place.holder
    value = place.value()
    if value is MISSING:
        # An array has no name for all that is in it.
        holder.restore(exchange(holder.content()))
    elif _flipped(value) is value:
        place.put(_with_other_attributes(value, exchange, trial))
    else:
        place.put(exchange(value))


def _raised(value: Any) -> Any:
    """Return larger numbers."""
    return _moved(value, 1)


def _lowered(value: Any) -> Any:
    """Return smaller numbers."""
    return _moved(value, -1)


def _nudged(value: Any) -> Any:
    """Return numbers that are about as large."""
    return value + FAR[2] if _is_changeable(value) else _flipped(value)


def _emptied(value: Any) -> Any:
    """Return zeros."""
    return _flipped(value)


def _moved(value: Any, sign: int) -> Any:
    if not _is_changeable(value):
        return _flipped(value)
    # Small numbers that are whole have no room for more.
    return value + sign * (FAR[3] if _is_whole(value) else FAR[-1])


def _is_whole(value: Any) -> bool:
    if isinstance(value, Tensor):
        return not (value.is_floating_point() or value.is_complex())
    return bool(value.dtype.kind in "iu")


def _flipped(value: Any) -> Any:
    """Return the opposite of what is true or false, zeros of numbers; anything else as it is."""
    if type(value) is bool:
        return not value
    if _is_changeable(value):
        return value * 0
    if type(value) in (np.ndarray, Tensor):
        return ~value
    return value


def _is_changeable(value: Any) -> bool:
    """Return whether there can be other numbers in an array or a tensor that belongs to nobody."""
    if type(value) is np.ndarray:
        return value.dtype.kind in "iuf"
    return type(value) is Tensor and value.dtype != torch.bool


def _can_be_copied(value: Any) -> bool:
    """Return whether there can be another object with other attributes."""
    if isinstance(value, type | FunctionType | nn.Module | Tensor):
        return False
    space = attributes_of(value)
    if type(space) is not dict or not space:
        return False
    # Some have a say in that, as loggers: there is one of each name.
    other = copy.copy(value)
    return type(other) is type(value) and attributes_of(other) is not space


def _with_other_attributes(value: Any, exchange: Callable[[Any], Any], trial: _Trial) -> Any:
    """Return a copy of an object: tensors are others in it, and numbers the same.

    All else there cannot be read.
    """
    other = copy.copy(value)
    for name, part in vars(value).items():
        if _is_number(part):
            continue
        if _flipped(part) is part:
            vars(other)[name] = trial.unreadable()
        else:
            vars(other)[name] = exchange(part)
    return other


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
        if type(a) is not type(b):
            return False
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
