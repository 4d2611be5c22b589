"""Places where a program keeps something: attributes, items, cells, arrays, classes.

A holder can say what is in its place (``content``), put that back (``restore``), and tell whether
the place is as it was (``mark``, ``same``). Which places a program reaches is found out in
``reachable.py``; what they are needed for, in ``guards.py`` and ``isolation.py``.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Sequence
from itertools import islice, repeat
from operator import eq, is_
from types import CellType, MethodType
from typing import Any

import numpy as np
import torch

PLAIN = (int, float, bool, complex, str, bytes, type(None), np.generic)

# The same as exact types: an object of a class derived from them may have attributes.
PLAIN_TYPES = frozenset([*PLAIN[:-1], *np.sctypeDict.values()])

# Equal ones are interchangeable, as numbers are; there may be several objects of one value.
VALUE_TYPES = frozenset(
    [torch.dtype, torch.device, torch.layout, torch.memory_format, torch.Size, slice, range]
)

# A name under which there is nothing, and the name for the order of a dict or for all of a holder.
MISSING: Any = type("Missing", (), {"__repr__": lambda self: "nothing"})()
ORDER: Any = "(order)"
WHOLE: Any = "(content)"

# Items of a container of which all are looked at; of more, so many.
MANY = 2**14

# Bytes of an array of which all are looked at; of more, some entries.
SMALL_ARRAY = 2**22

# Arrays up to so many bytes are put back.
LARGEST_ARRAY = 2**26


class Holder:
    """One place; ``content`` is what ``restore`` takes, ``mark`` is what ``same`` is asked about.

    A mark is no more than the content, and may be less.
    """

    def content(self) -> Any:
        """Return what is there now."""
        raise NotImplementedError

    def mark(self) -> Any:
        """Return what to recognise the content by."""
        return self.content()

    def mark_of(self, content: Any) -> Any:
        """Return the mark that belongs to a content."""
        return content

    def same(self, mark: Any) -> bool:
        """Return whether the content is what it was, object by object; cheap."""
        raise NotImplementedError

    def changed(self, mark: Any) -> Iterator[Hashable]:
        """Yield the names of what has another value than it had."""
        if not self.same(mark):
            yield WHOLE

    def restore(self, content: Any) -> None:
        """Put the content back; only where it differs is anything written."""
        raise NotImplementedError

    def values(self) -> Iterable[tuple[Hashable, Any]]:
        """Return names and objects, as far as others can be reached from there."""
        return ()

    def put(self, name: Any, value: Any) -> None:
        """Put an object in place of the one under a name of ``values``."""
        raise NotImplementedError


# --- names and what they stand for ----------------------------------------------------------------


class Entries(Holder):
    """A dict with all its entries, in their order."""

    def __init__(self, space: dict[Any, Any]) -> None:
        self.space = space

    def content(self) -> dict[Any, Any]:
        return dict(self.space)

    def same(self, mark: dict[Any, Any]) -> bool:
        space = self.space
        if len(space) != len(mark):
            return False
        if len(space) > MANY:
            return all(space.get(key, MISSING) is mark[key] for key in spread(mark))
        return all(map(is_, space.values(), mark.values())) and all(map(eq, space, mark))

    def changed(self, mark: dict[Any, Any]) -> Iterator[Hashable]:
        space = self.space
        if self.same(mark):
            return
        for key in {**mark, **space}:
            if not alike(mark.get(key, MISSING), space.get(key, MISSING)):
                yield key
        common = [key for key in space if key in mark]
        if common != [key for key in mark if key in space]:
            yield ORDER

    def restore(self, content: dict[Any, Any]) -> None:
        space = self.space
        unchanged = len(space) == len(content) and all(map(is_, space.values(), content.values()))
        if unchanged and all(map(eq, space, content)):
            return  # a container of a class of its own may notice that it is written to
        space.clear()
        space.update(content)

    def values(self) -> Iterable[tuple[Hashable, Any]]:
        return list(islice(self.space.items(), MANY))

    def put(self, name: Any, value: Any) -> None:
        self.space[name] = value


class Empty(Holder):
    """Dicts that are empty, as most of those that a module has are: one look for all."""

    def __init__(self, spaces: list[dict[Any, Any]]) -> None:
        self.spaces = spaces

    def content(self) -> None:
        return None

    def same(self, mark: None) -> bool:
        return not any(self.spaces)

    def changed(self, mark: None) -> Iterator[Hashable]:
        for i, space in enumerate(self.spaces):
            if space:
                yield i

    def restore(self, content: None) -> None:
        for space in filter(None, self.spaces):
            space.clear()


class OfTensors(Holder):
    """The attributes of tensors, of which most have none: those that code names are looked at.

    Libraries leave their own results there. ``names``: None for all.
    """

    def __init__(self, spaces: list[dict[str, Any]], names: Collection[str] | None) -> None:
        self.spaces = spaces
        self.names = names

    def content(self) -> dict[int, dict[str, Any]]:
        if not any(self.spaces):
            return {}
        return {i: dict(space) for i, space in enumerate(self.spaces) if space}

    def mark(self) -> dict[Any, Any]:
        return self.mark_of(self.content())

    def mark_of(self, content: dict[int, dict[str, Any]]) -> dict[Any, Any]:
        mark = {}
        for i, space in content.items():
            for name, value in space.items():
                if self.names is None or name in self.names:
                    mark[i, name] = value
        return mark

    def same(self, mark: dict[Any, Any]) -> bool:
        if not any(self.spaces):
            return not mark
        return Entries(self.mark()).same(mark)

    def changed(self, mark: dict[Any, Any]) -> Iterator[Hashable]:
        return Entries(self.mark()).changed(mark)

    def restore(self, content: dict[int, dict[str, Any]]) -> None:
        if not content and not any(self.spaces):
            return
        for i, space in enumerate(self.spaces):
            Entries(space).restore(content.get(i, {}))

    def values(self) -> Iterable[tuple[Hashable, Any]]:
        return list(self.mark().items())

    def put(self, name: Any, value: Any) -> None:
        i, name = name
        self.spaces[i][name] = value


class Names(Holder):
    """Some names of a namespace, which need not be there."""

    def __init__(self, space: Any, names: Iterable[str]) -> None:
        self.space = space
        self.names = tuple(names)

    def content(self) -> list[Any]:
        return list(map(self.look_up(), self.names, repeat(MISSING)))

    def same(self, mark: list[Any]) -> bool:
        return all(map(is_, map(self.look_up(), self.names, repeat(MISSING)), mark))

    def changed(self, mark: list[Any]) -> Iterator[Hashable]:
        for name, before, now in zip(self.names, mark, self.content(), strict=True):
            if not alike(before, now):
                yield name

    def restore(self, content: list[Any]) -> None:
        for name, before, now in zip(self.names, content, self.content(), strict=True):
            if before is now:
                continue
            if before is MISSING:
                self.remove(name)
            else:
                self.put(name, before)

    def values(self) -> Iterable[tuple[Hashable, Any]]:
        pairs = zip(self.names, self.content(), strict=True)
        return [(name, value) for name, value in pairs if value is not MISSING]

    def look_up(self) -> Callable[[str, Any], Any]:
        """Return a function of a name and a default."""
        look_up: Callable[[str, Any], Any] = self.space.get
        return look_up

    def put(self, name: Any, value: Any) -> None:
        self.space[name] = value

    def remove(self, name: str) -> None:
        del self.space[name]


class Attributes(Names):
    """The attributes of an object: some are looked at, and all are put back."""

    def content(self) -> Any:
        return dict(self.space)

    def mark(self) -> list[Any]:
        return list(map(self.space.get, self.names, repeat(MISSING)))

    def mark_of(self, content: Any) -> list[Any]:
        return list(map(content.get, self.names, repeat(MISSING)))

    def changed(self, mark: list[Any]) -> Iterator[Hashable]:
        for name, before, now in zip(self.names, mark, self.mark(), strict=True):
            if not alike(before, now):
                yield name

    def restore(self, content: Any) -> None:
        Entries(self.space).restore(content)

    def values(self) -> Iterable[tuple[Hashable, Any]]:
        return [(name, self.space[name]) for name in self.names if name in self.space]


class Members(Names):
    """Some names of a class."""

    def look_up(self) -> Callable[[str, Any], Any]:
        return vars(self.space).get

    def put(self, name: Any, value: Any) -> None:
        setattr(self.space, name, value)

    def remove(self, name: str) -> None:
        delattr(self.space, name)


class Slots(Names):
    """The slots of an object."""

    def look_up(self) -> Callable[[str, Any], Any]:
        def look_up(name: str, default: Any) -> Any:
            return getattr(self.space, name, default)

        return look_up

    def put(self, name: Any, value: Any) -> None:
        object.__setattr__(self.space, name, value)  # frozen ones, too

    def remove(self, name: str) -> None:
        object.__delattr__(self.space, name)


class Cell(Names):
    """A variable of a function that another function defined inside it has to itself."""

    def __init__(self, space: CellType) -> None:
        super().__init__(space, ("cell_contents",))

    def look_up(self) -> Callable[[str, Any], Any]:
        def look_up(name: str, default: Any) -> Any:
            try:
                return self.space.cell_contents
            except ValueError:  # nothing has been assigned yet
                return default

        return look_up

    def put(self, name: Any, value: Any) -> None:
        self.space.cell_contents = value

    def remove(self, name: str) -> None:
        del self.space.cell_contents


class Classes(Holder):
    """The classes of objects."""

    def __init__(self, objects: list[Any]) -> None:
        self.objects = objects

    def content(self) -> list[type]:
        return list(map(type, self.objects))

    def same(self, mark: list[type]) -> bool:
        return all(map(is_, map(type, self.objects), mark))

    def restore(self, content: list[type]) -> None:
        for value, kind in zip(self.objects, content, strict=True):
            if type(value) is not kind:
                value.__class__ = kind


# --- containers without names ---------------------------------------------------------------------


class Items(Holder):
    """A list or a deque."""

    def __init__(self, space: list[Any] | deque[Any]) -> None:
        self.space = space

    def content(self) -> list[Any]:
        return list(self.space)

    def same(self, mark: list[Any]) -> bool:
        space = self.space
        if len(space) != len(mark):
            return False
        if len(mark) > MANY:
            return all(space[i] is mark[i] for i in spread(range(len(mark))))
        return all(map(is_, space, mark))

    def changed(self, mark: list[Any]) -> Iterator[Hashable]:
        if self.same(mark):
            return
        if len(self.space) != len(mark):
            yield WHOLE
            return
        for i, (before, now) in enumerate(zip(mark, self.space, strict=True)):
            if not alike(before, now):
                yield i

    def restore(self, content: list[Any]) -> None:
        if len(self.space) == len(content) and all(map(is_, self.space, content)):
            return
        self.space.clear()
        self.space.extend(content)

    def values(self) -> Iterable[tuple[Hashable, Any]]:
        return list(enumerate(islice(self.space, MANY)))

    def put(self, name: Any, value: Any) -> None:
        self.space[name] = value


class Elements(Holder):
    """A set."""

    def __init__(self, space: set[Any]) -> None:
        self.space = space

    def content(self) -> set[Any]:
        return set(self.space)

    def same(self, mark: set[Any]) -> bool:
        return len(self.space) == len(mark) and self.space == mark

    def restore(self, content: set[Any]) -> None:
        if self.space != content:
            self.space.clear()
            self.space.update(content)

    def values(self) -> Iterable[tuple[Hashable, Any]]:
        elements = list(islice(self.space, MANY))
        return list(zip(elements, elements, strict=True))

    def put(self, name: Any, value: Any) -> None:
        self.space.discard(name)
        self.space.add(value)


class Bytes(Holder):
    """Numbers in a ``bytearray`` or an ``array.array``."""

    def __init__(self, space: Any) -> None:
        self.space = space

    def content(self) -> Any:
        return self.space[:]

    def same(self, mark: Any) -> bool:
        return bool(self.space == mark)

    def restore(self, content: Any) -> None:
        if self.space != content:
            self.space[:] = content


class Array(Holder):
    """An array of numpy; of a large one, some entries are looked at."""

    def __init__(self, array: np.ndarray[Any, Any]) -> None:
        self.array = array

    def content(self) -> np.ndarray[Any, Any] | None:
        if self.array.nbytes > LARGEST_ARRAY:
            return None
        return self.array.copy()

    def mark(self) -> tuple[Any, ...]:
        return self.mark_of(self.array)

    def mark_of(self, content: np.ndarray[Any, Any] | None) -> tuple[Any, ...]:
        # One that is too large to be put back counts as what it is.
        array = self.array if content is None else content
        entries: Any = array
        if array.nbytes > SMALL_ARRAY:
            entries = array.flat[:: max(1, array.size // MANY)]
        # The bytes, as not-a-numbers are not equal to themselves.
        values: Any = entries.tobytes()
        if array.dtype.hasobject:
            values = tuple(map(id, entries.flat))
        return array.shape, array.dtype, values

    def same(self, mark: tuple[Any, ...]) -> bool:
        return self.mark() == mark

    def restore(self, content: np.ndarray[Any, Any] | None) -> None:
        array = self.array
        if content is None or not array.flags.writeable:
            return
        if array.shape != content.shape or array.dtype != content.dtype:
            # Resized or viewed in place: only that can be undone which leaves the memory alone.
            with contextlib.suppress(ValueError):
                array.resize(content.shape, refcheck=False)
        if array.tobytes() != content.tobytes():
            array[...] = content

    def values(self) -> Iterable[tuple[Hashable, Any]]:
        if not self.array.dtype.hasobject:
            return ()
        return list(enumerate(islice(self.array.flat, MANY)))


# --- comparing ------------------------------------------------------------------------------------


def spread(items: Any) -> Iterator[Any]:
    """Yield some of many items, evenly spread."""
    return islice(items, 0, None, max(1, len(items) // MANY))


def alike(a: Any, b: Any) -> bool:
    """Return whether two objects are one, or values that nothing can tell apart."""
    if a is b:
        return True
    kind = type(a)
    if kind is not type(b):
        return False
    if kind in PLAIN_TYPES:
        return repr(a) == repr(b)  # tells zeros of either sign apart, and nan is nan
    if kind in VALUE_TYPES:
        return bool(a == b)
    if isinstance(a, tuple) and not hasattr(a, "__dict__"):
        return len(a) == len(b) and all(map(alike, a, b))
    if isinstance(a, MethodType):
        return a.__func__ is b.__func__ and a.__self__ is b.__self__
    return False


def contents(holders: Sequence[Holder]) -> list[Any]:
    """Return the content of each holder."""
    return [holder.content() for holder in holders]


def restore(holders: Sequence[Holder], before: Sequence[Any]) -> dict[int, set[Hashable]]:
    """Put contents back, and return the names of what was changed, by the number of the holder."""
    written: dict[int, set[Hashable]] = {}
    for i, (holder, content) in enumerate(zip(holders, before, strict=True)):
        names = set(holder.changed(holder.mark_of(content)))
        if names:
            written[i] = names
        holder.restore(content)
    return written
