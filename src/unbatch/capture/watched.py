"""Stand-ins that tell whether a program looks at what it keeps, or only writes it.

An ``Unreadable`` stands for one value: whoever asks anything of it is seen, and gets an error. A
watched container does what a list, a deque, a set or a dict does, and notes each call that depends
on what is in it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

# Methods that put something in, whatever is there.
WRITES: dict[type, frozenset[str]] = {
    list: frozenset(["append", "extend", "clear", "__iadd__"]),
    deque: frozenset(["append", "appendleft", "extend", "extendleft", "clear", "__iadd__"]),
    set: frozenset(["add", "update", "discard", "clear", "__ior__"]),
    dict: frozenset(["update", "clear", "__setitem__", "__ior__"]),
}

# Methods that are about one item, by its key or its number.
OF_ITEMS: dict[type, frozenset[str]] = {
    list: frozenset(["__getitem__", "__setitem__"]),
    deque: frozenset(["__getitem__", "__setitem__"]),
    set: frozenset(),
    dict: frozenset(["__getitem__", "__contains__", "get", "setdefault"]),
}

# What Python calls to make an object, and to find its methods.
MADE = frozenset(["__new__", "__init__", "__class_getitem__", "__sizeof__"])
MAKING = MADE | {"__getattribute__"}

Note = Callable[[], None]


def watched(space: Any, note: Note, fixed: bool) -> Any:
    """Return a container with the same in it that calls ``note`` before it is read.

    ``fixed``: whether it is known to have the same keys, or the same number of items, each time;
    items that are there may then be read. None for a container of another class.
    """
    kind = type(space)
    if kind not in WRITES:
        return None
    members = {}
    for name, member in vars(kind).items():
        if not callable(member) or name in WRITES[kind] or name in MAKING:
            continue
        if name in OF_ITEMS[kind] and (fixed or kind is dict):
            members[name] = _reading_item(kind, name, note)
        else:
            members[name] = _reading(kind, name, note)
    made: Any = type(kind.__name__, (kind,), members)
    if kind is deque:
        return made(space, space.maxlen)
    return made(space)


def _reading(kind: type, name: str, note: Note) -> Callable[..., Any]:
    method = getattr(kind, name)

    def read(*args: Any, **kwargs: Any) -> Any:
        note()
        return method(*args, **kwargs)

    return read


def _reading_item(kind: type, name: str, note: Note) -> Callable[..., Any]:
    """Return a method that is noted where there is no such item."""
    method = getattr(kind, name)

    def read(space: Any, key: Any, *args: Any) -> Any:
        if not _has_item(kind, space, key):
            note()
        return method(space, key, *args)

    return read


def _has_item(kind: Any, space: Any, key: Any) -> bool:
    if kind is dict:
        return bool(kind.__contains__(space, key))
    size = kind.__len__(space)
    return type(key) is int and bool(-size <= key < size)


class WasReadError(Exception):
    """Somebody has asked for something that is only written."""


class Unreadable:
    """Stands for any value. ``note`` is called when something is asked of it."""

    __slots__ = ("_note",)

    def __init__(self, note: Note) -> None:
        self._note = note


def _refusing(name: str) -> Callable[..., Any]:
    def refuse(self: Any, *args: Any) -> Any:
        object.__getattribute__(self, "_note")()
        raise WasReadError(name)

    return refuse


# All that Python asks of its own kinds of values by their class.
for _kind in (int, float, str, list, dict, set):
    for _name in vars(_kind):
        if _name.startswith("__") and _name not in (*MADE, "__doc__"):
            setattr(Unreadable, _name, _refusing(_name))
