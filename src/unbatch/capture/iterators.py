"""Iterators that a program holds: it is given copies of them, or stand-ins that refuse.

An iterator has no place that could be put back. It may lie inside what nothing is written to, a
tuple or a method that is bound to it; that is then made again around the copy.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import io
import itertools
import random
import types
import warnings
import weakref
from collections.abc import Callable, Hashable, Iterable
from typing import Any

from unbatch.capture.code_names import is_installed_class
from unbatch.capture.holders import MANY, Holder, alike
from unbatch.errors import MSG_ITERATOR, MSG_SYSTEM_RANDOM, CaptureError

# Copies of these go on where the original is, and leave that where it is.
EMPTY: tuple[Iterable[Any], ...] = ([], (), range(0), "", b"", {}, set())
COPIED = (*map(type, map(iter, EMPTY)), itertools.count, itertools.cycle, itertools.repeat)

# Methods that are bound to an object of C.
BOUND = (types.BuiltinMethodType, types.MethodWrapperType)

# One in the place of another: the holder, the name there, and what stood there before.
Replaced = tuple[Holder, Any, Any]


class Exhaustible:
    """Stands for an iterator that cannot be copied: it refuses before that is advanced."""

    def __init__(self, iterator: Any, name: Hashable) -> None:
        self.iterator, self.name = iterator, name

    def __iter__(self) -> Exhaustible:
        return self

    def __next__(self, *args: Any) -> Any:
        kind = type(self.iterator).__name__
        raise CaptureError(MSG_ITERATOR.format(kind=kind, name=self.name))

    # Each of them would use it up.
    send = throw = close = __next__


class Unrepeatable:
    """Stands for what draws its numbers from the system: it refuses before it draws any."""

    def __init__(self, name: Hashable) -> None:
        self._name = name

    def __getattr__(self, attribute: str) -> Any:
        raise CaptureError(MSG_SYSTEM_RANDOM.format(name=self._name))


class Position(Holder):
    """How far an iterator is; the program is given a copy, so that nothing is to be put back."""

    def __init__(self, iterator: Any) -> None:
        self.iterator = iterator

    def content(self) -> Any:
        with warnings.catch_warnings(), contextlib.suppress(TypeError):
            warnings.simplefilter("ignore")  # newer Pythons will copy fewer kinds
            return _position(self.iterator)
        return None

    def same(self, mark: Any) -> bool:
        return alike(self.content(), mark)

    def restore(self, content: Any) -> None:
        """Leave it: the program has advanced a copy."""


def _position(value: Any) -> Any:
    """Return what an iterator would be copied from, down to plain values."""
    if isinstance(value, COPIED):
        return type(value), _position(value.__reduce__())
    if type(value) is tuple:
        return tuple(map(_position, value))
    if type(value) is list:
        return len(value), tuple(value[:MANY])  # some give a new one each time
    return value


def is_iterator(value: Any) -> bool:
    """Return whether a value is used up as it is read, and has no attributes that could be seen."""
    kind = type(value)
    if not hasattr(kind, "__next__"):
        return False
    # A weak proxy has every method in its type, whatever it stands for.
    if kind in weakref.ProxyTypes or issubclass(kind, io.IOBase):
        return False
    if issubclass(kind, types.GeneratorType):
        return True
    # One that has attributes is an object like others: what it goes through is among them. Loaders
    # of data have processes as well.
    has_attributes = kind.__dictoffset__ != 0 and not kind.__module__.startswith("torch.utils.data")
    return is_installed_class(kind) and not has_attributes


def is_used_up(value: Any) -> bool:
    """Return whether a value changes as it is read, in a way that nothing can undo."""
    return isinstance(value, random.SystemRandom) or is_iterator(value)


def holds_iterator(value: Any) -> bool:
    """Return whether a value is an iterator, or has one inside that cannot be exchanged there."""
    parts = [value]
    while parts:
        part = parts.pop()
        if is_used_up(part):
            return True
        parts.extend(_parts(part))
    return False


def _parts(value: Any) -> tuple[Any, ...]:
    """Return what lies in a value that is not written to."""
    if isinstance(value, tuple):
        return value
    if isinstance(value, functools.partial):
        return (value.func, *value.args, *value.keywords.values())
    if isinstance(value, types.MethodType):
        return (value.__self__,)
    if isinstance(value, BOUND) and not isinstance(value.__self__, types.ModuleType):
        return (value.__self__,)
    return ()


def replace_iterators(places: Iterable[Replaced], replaced: list[Replaced]) -> None:
    """Put copies in place of iterators; note the originals with their places."""
    copies: dict[int, Any] = {}
    for holder, name, value in places:
        holder.put(name, _copied(value, name, copies))
        replaced.append((holder, name, value))


def put_back_iterators(replaced: Iterable[Replaced]) -> None:
    """Put the originals back."""
    for holder, name, value in replaced:
        holder.put(name, value)


def with_copies(value: Any) -> Any:
    """Return a value with copies of the iterators in it."""
    return _copied(value, type(value).__name__, {})


def _copied(value: Any, name: Hashable, copies: dict[int, Any]) -> Any:
    """Return a value with copies of its iterators; one that is met twice has one copy."""
    if not holds_iterator(value):
        return value
    if id(value) not in copies:
        copies[id(value)] = _made_again(value, name, copies)
    return copies[id(value)]


def _made_again(value: Any, name: Hashable, copies: dict[int, Any]) -> Any:
    def copied(part: Any) -> Any:
        return _copied(part, name, copies)

    if isinstance(value, random.SystemRandom):
        return Unrepeatable(name)
    if is_iterator(value):
        # Newer Pythons copy fewer kinds: they warn of it, and then refuse.
        with warnings.catch_warnings(), contextlib.suppress(TypeError):
            warnings.simplefilter("ignore")
            if isinstance(value, itertools.cycle):
                return _copy_of_cycle(value, copied)
            if isinstance(value, COPIED):
                return copy.copy(value)
        return Exhaustible(value, name)
    if isinstance(value, tuple):
        make = getattr(type(value), "_make", type(value))  # of a named one
        return make(map(copied, value))
    if isinstance(value, functools.partial):
        keywords = dict(zip(value.keywords, map(copied, value.keywords.values()), strict=True))
        return type(value)(copied(value.func), *map(copied, value.args), **keywords)
    if isinstance(value, types.MethodType):
        return types.MethodType(value.__func__, copied(value.__self__))
    return getattr(copied(value.__self__), value.__name__)


def _copy_of_cycle(value: Any, copied: Callable[[Any], Any]) -> Any:
    """Return a copy that has an iterator of its own inside, which Python's copy shares."""
    _, (inner,), (saved, is_first_pass) = value.__reduce__()
    fresh = itertools.cycle(copied(inner))
    fresh.__setstate__((list(saved), is_first_pass))  # type: ignore[attr-defined]
    return fresh
