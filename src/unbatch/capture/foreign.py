"""Places that are no attributes, items or cells: files, memory of C, variables of threads, caches.

They are holders like those of ``holders.py``: each knows what is there, and how to put that back.
"""

from __future__ import annotations

import _abc  # type: ignore[import-not-found]
import contextlib
import contextvars
import ctypes
import gc
import io
import itertools
import logging
import operator
import os
import queue
import threading
import weakref
from collections.abc import Callable, Hashable, Iterable, Iterator
from operator import is_
from typing import Any

import torch
from torch import Tensor

from unbatch.capture.holders import (
    LARGEST_ARRAY,
    MISSING,
    Entries,
    Holder,
    Items,
    Names,
    alike,
    contents,
    restore,
)

# What all numbers, structures, arrays and pointers of ``ctypes`` are.
CDATA: type = ctypes.c_int.__mro__[2]


# --- files ----------------------------------------------------------------------------------------


class File(Names):
    """Where in a file the next read or write begins, and where it ends.

    What a program appends is cut off again; what it writes over an older part of a file stays.
    """

    def __init__(self, file: Any) -> None:
        super().__init__(file, ("position", "end"))

    def content(self) -> list[Any]:
        with contextlib.suppress(OSError, ValueError):
            if self.space.seekable():
                return [int(self.space.tell()), self._end()]
        return [None, None]

    def same(self, mark: list[Any]) -> bool:
        return self.content() == mark

    def restore(self, content: list[Any]) -> None:
        position, end = content
        if position is None or self.same(content):
            return
        now = self._end()
        if end is not None and now is not None and now > end:
            self.space.truncate(end)
        self.space.seek(position)

    def values(self) -> Iterable[tuple[Hashable, Any]]:
        return ()

    def _end(self) -> int | None:
        """Return how long the file is, where it may be written to."""
        with contextlib.suppress(OSError, ValueError):
            if self.space.writable():
                self.space.flush()
                return os.fstat(self.space.fileno()).st_size
        return None


class InMemory(File):
    """A file in memory: all that it holds is put back."""

    def content(self) -> list[Any]:
        if self.space.closed:
            return [None, None]
        return [self.space.tell(), self.space.getvalue()]

    def restore(self, content: list[Any]) -> None:
        position, value = content
        if position is None or self.same(content):
            return
        self.space.seek(0)
        self.space.truncate()
        self.space.write(value)
        self.space.seek(position)


# --- memory ---------------------------------------------------------------------------------------


class Memory(Holder):
    """Bytes that Python writes to without any name: of ``ctypes``, or of a file in memory."""

    def __init__(self, owner: Any) -> None:
        self.owner = owner

    def content(self) -> bytes | None:
        with contextlib.suppress(TypeError, ValueError), memoryview(self.owner) as view:
            if not view.readonly and view.nbytes <= LARGEST_ARRAY:
                return view.tobytes()
        return None  # closed, or nothing that anybody writes to

    def same(self, mark: bytes | None) -> bool:
        return self.content() == mark

    def restore(self, content: bytes | None) -> None:
        if content is not None and self.content() != content:
            (ctypes.c_char * len(content)).from_buffer(self.owner).raw = content


# --- one value ------------------------------------------------------------------------------------


class Variable(Names):
    """A variable of a context. One that had no value can only be put back to its default."""

    def __init__(self, space: contextvars.ContextVar[Any]) -> None:
        super().__init__(space, ("value",))

    def look_up(self) -> Callable[[str, Any], Any]:
        def look_up(name: str, default: Any) -> Any:
            return self.space.get(default)

        return look_up

    def put(self, name: Any, value: Any) -> None:
        self.space.set(value)

    def remove(self, name: str) -> None:
        with contextlib.suppress(LookupError):
            self.space.set(contextvars.Context().run(self.space.get))


class Level(Names):
    """The level of a logger, which programs ask for; all else that it has is put back as well.

    ``logged``: whether there was anything else to put back.
    """

    logged = False

    def __init__(self, space: logging.Logger) -> None:
        super().__init__(space, ("level",))

    def look_up(self) -> Callable[[str, Any], Any]:
        look_up: Callable[[str, Any], Any] = vars(self.space).get
        return look_up

    def content(self) -> Any:
        return super().content(), _LoggerStates([self.space])

    def mark(self) -> list[Any]:
        return super().content()

    def mark_of(self, content: Any) -> Any:
        return content[0]

    def changed(self, mark: list[Any]) -> Iterator[Hashable]:
        if not self.same(mark):
            yield "level"

    def restore(self, content: Any) -> None:
        self.logged |= content[1].restore()

    def values(self) -> Iterable[tuple[Hashable, Any]]:
        return ()

    def put(self, name: Any, value: Any) -> None:
        self.space.setLevel(value)


class Loggers(Holder):
    """All loggers that have a name: what they have decides nothing, and is put back all the same.

    A logger that is made meanwhile stays, as others may have it by then. ``logged``: whether there
    was anything to put back.
    """

    logged = False

    def content(self) -> _LoggerStates:
        named = logging.root.manager.loggerDict.values()
        loggers = [logger for logger in list(named) if isinstance(logger, logging.Logger)]
        return _LoggerStates([logging.root, *loggers])

    def mark(self) -> None:
        return None

    def mark_of(self, content: _LoggerStates) -> None:
        return None

    def same(self, mark: None) -> bool:
        return True

    def restore(self, content: _LoggerStates) -> None:
        self.logged |= content.restore()


# What decides what a logger lets pass, and where to.
OF_LOGGERS = operator.attrgetter("level", "propagate", "disabled")


class _LoggerStates:
    """What loggers have, and what their handlers keep."""

    def __init__(self, loggers: list[logging.Logger]) -> None:
        self.loggers = loggers
        self.attributes, self.lists = self._looked_at()
        self.handlers = []
        for handlers, _ in filter(any, self.lists):
            self.handlers += list(map(_HandlerState, handlers))

    def _looked_at(self) -> tuple[list[Any], list[tuple[list[Any], list[Any]]]]:
        # There are hundreds of loggers, which most programs leave alone.
        lists = [(logger.handlers[:], logger.filters[:]) for logger in self.loggers]
        return list(map(OF_LOGGERS, self.loggers)), lists

    def restore(self) -> bool:
        """Put all back; return whether anything had changed."""
        changed = self._looked_at() != (self.attributes, self.lists)
        if changed:
            self._restore_loggers()
        for handler in self.handlers:
            changed |= handler.restore()
        return changed

    def _restore_loggers(self) -> None:
        parts = zip(self.loggers, self.attributes, self.lists, strict=True)
        for logger, (level, propagate, disabled), (handlers, filters) in parts:
            logger.handlers[:], logger.filters[:] = handlers, filters
            logger.propagate, logger.disabled = propagate, disabled
            # Loggers keep what they have decided by their levels.
            if logger.level != level:
                logger.setLevel(level)


class _HandlerState:
    """What a handler has, and what it has written to memory."""

    __slots__ = ("attributes", "contents", "handler", "holders")

    def __init__(self, handler: logging.Handler) -> None:
        self.handler = handler
        self.attributes = vars(handler).copy()
        self.holders: list[Holder] = []
        for value in self.attributes.values():
            if isinstance(value, io.StringIO | io.BytesIO):
                self.holders.append(InMemory(value))
            elif type(value) is list:
                self.holders.append(Items(value))
        self.contents = contents(self.holders)

    def restore(self) -> bool:
        """Put all back; return whether anything had changed."""
        now = vars(self.handler)
        changed = now != self.attributes
        if changed:
            now.clear()
            now.update(self.attributes)
        return bool(restore(self.holders, self.contents, [])) or changed


class Referent(Holder):
    """Whether what a weak reference is to is still there."""

    def __init__(self, reference: Any) -> None:
        self.reference = reference

    def content(self) -> bool:
        return referent(self.reference) is not None

    def same(self, mark: bool) -> bool:
        return self.content() == mark

    def restore(self, content: bool) -> None:
        """Leave it: nobody brings an object back."""


def referent(reference: Any) -> Any:
    """Return what a weak reference or a proxy stands for; None where that is gone."""
    if isinstance(reference, weakref.ReferenceType):
        return reference()
    with contextlib.suppress(ReferenceError, AttributeError):
        return reference.__repr__.__self__
    return None


# --- many values ----------------------------------------------------------------------------------


class Local(Entries):
    """What a thread has to itself in a ``threading.local``: another thread sees another dict."""

    def __init__(self, local: threading.local) -> None:
        self.local = local

    @property
    def space(self) -> dict[str, Any]:  # type: ignore[override]
        return self.local.__dict__


class Environment(Entries):
    """The variables of the environment; libraries of C read a copy, which is written to as well."""

    methods = type(os.environ)

    def __init__(self) -> None:
        self.space = os.environ  # type: ignore[assignment]

    def same(self, mark: dict[str, str]) -> bool:
        return dict(self.space) == mark

    def restore(self, content: dict[str, str]) -> None:
        for name in [name for name in self.space if name not in content]:
            del self.space[name]
        for name, value in content.items():
            if self.space.get(name) != value:
                self.space[name] = value

    def values(self) -> Iterable[tuple[Hashable, Any]]:
        return ()


class Namespace(Holder):
    """All names of a module of Python."""

    # Python's own, which it fills as it goes.
    IGNORED = ("__builtins__", "__warningregistry__")

    def __init__(self, space: dict[str, Any]) -> None:
        self.space = space

    def content(self) -> dict[str, Any]:
        content = dict(self.space)
        for name in self.IGNORED:
            content.pop(name, None)
        return content

    def same(self, mark: dict[str, Any]) -> bool:
        now = self.content()
        return now.keys() == mark.keys() and all(now[name] is mark[name] for name in mark)

    def changed(self, mark: dict[str, Any]) -> Iterator[Hashable]:
        now = self.content()
        for name in {**mark, **now}:
            if not alike(mark.get(name, MISSING), now.get(name, MISSING)):
                yield name

    def restore(self, content: dict[str, Any]) -> None:
        for name in self.content().keys() - content.keys():
            del self.space[name]
        for name, value in content.items():
            if self.space.get(name, MISSING) is not value:
                self.space[name] = value

    def values(self) -> Iterable[tuple[Hashable, Any]]:
        return list(self.content().items())

    def put(self, name: Any, value: Any) -> None:
        self.space[name] = value


class Queue(Holder):
    """A queue of C: to look at what is in it, that is taken out and put in again."""

    def __init__(self, queue: queue.SimpleQueue[Any]) -> None:
        self.queue = queue

    def content(self) -> list[Any]:
        items = []
        for _ in range(self.queue.qsize()):
            with contextlib.suppress(queue.Empty):
                items.append(self.queue.get_nowait())
        for item in items:
            self.queue.put(item)
        return items

    def same(self, mark: list[Any]) -> bool:
        now = self.content()
        return len(now) == len(mark) and all(map(is_, now, mark))

    def restore(self, content: list[Any]) -> None:
        if self.same(content):
            return
        for _ in range(self.queue.qsize()):
            self.queue.get_nowait()
        for item in content:
            self.queue.put(item)

    def values(self) -> Iterable[tuple[Hashable, Any]]:
        return list(enumerate(self.content()))


class Scripted(Holder):
    """The attributes of a scripted module, which lie in C++ and come out as copies."""

    def __init__(self, module: torch.jit.ScriptModule) -> None:
        self.module: Any = module._c
        self.names: list[str] = []
        if not hasattr(module, "_concrete_type"):
            return  # loaded from a file, which does not name them
        for name in module._concrete_type.get_attributes():
            if self.module.hasattr(name) and not isinstance(self.module.getattr(name), Tensor):
                self.names.append(name)

    def content(self) -> list[Any]:
        return [self.module.getattr(name) for name in self.names]

    def mark_of(self, content: list[Any]) -> list[str]:
        return list(map(repr, content))

    def mark(self) -> list[str]:
        return self.mark_of(self.content())

    def same(self, mark: list[str]) -> bool:
        return self.mark() == mark

    def changed(self, mark: list[str]) -> Iterator[Hashable]:
        for name, before, now in zip(self.names, mark, self.mark(), strict=True):
            if before != now:
                yield name

    def restore(self, content: list[Any]) -> None:
        now = self.content()
        for name, before, value in zip(self.names, content, now, strict=True):
            if repr(before) != repr(value):
                self.module.setattr(name, before)


class Cache(Holder):
    """The results that ``functools.lru_cache`` keeps; how often it was asked stays as it is.

    A result that a full cache has dropped for another is not put back.
    """

    def __init__(self, function: Any) -> None:
        self.function = function
        # No method gives them. The collector of garbage does: the table is named before the
        # function is.
        self.parts = gc.get_referents(function)
        self.table: dict[Any, Any] = {}
        for table, part in itertools.pairwise(self.parts):
            if part is function.__wrapped__ and isinstance(table, dict):
                self.table = table

    def results(self) -> list[Any]:
        """Return what is kept, among others."""
        return [part for part in self.parts if part is not self.table]

    def content(self) -> tuple[bool, dict[Any, Any]]:
        info = self.function.cache_info()
        return info.hits + info.misses > 0, dict(self.table)

    def mark_of(self, content: tuple[bool, dict[Any, Any]]) -> dict[Any, Any]:
        return content[1]

    def mark(self) -> dict[Any, Any]:
        return dict(self.table)

    def same(self, mark: dict[Any, Any]) -> bool:
        return Entries(self.table).same(mark)

    def restore(self, content: tuple[bool, dict[Any, Any]]) -> None:
        used, table = content
        if not used:
            self.function.cache_clear()
            return
        for key in [key for key in self.table if key not in table]:
            del self.table[key]


class Registered(Holder):
    """The classes that are registered with an abstract one; none can be taken back."""

    def __init__(self, kind: type) -> None:
        self.kind = kind

    def content(self) -> set[Any]:
        registry: set[Any] = _abc._get_dump(self.kind)[0]
        return registry

    def same(self, mark: set[Any]) -> bool:
        return self.content() == mark

    def restore(self, content: set[Any]) -> None:
        pass


# --- which is whose -------------------------------------------------------------------------------

# Kinds of objects, and the holder of each.
FOREIGN: tuple[tuple[type, Callable[[Any], Holder]], ...] = (
    (io.StringIO, InMemory),
    (io.BytesIO, InMemory),
    (io.IOBase, File),
    (threading.local, Local),
    (contextvars.ContextVar, Variable),
    (queue.SimpleQueue, Queue),
    (logging.Logger, Level),
)
