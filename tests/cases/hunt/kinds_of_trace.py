"""More programs that change something while they run, two or more of each kind of place.

As in `cases/hunt/messy.py`. What is shared by cases is made afresh by `reset`.
"""

import array
import ctypes
import decimal
import enum
import functools
import gc
import io
import itertools
import logging
import mmap
import multiprocessing.sharedctypes
import operator
import os
import queue
import sys
import tempfile
import threading
import types
import weakref
from collections import defaultdict, deque
from contextvars import ContextVar
from types import MappingProxyType, SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch

from cases.messy import Case, net, part

TABLE = {"calls": 0}
SEEN: ContextVar[list[int]] = ContextVar("seen")
UNSET: ContextVar[int] = ContextVar("unset", default=0)
LIBRARY = types.ModuleType("library")
LIBRARY.seen = []  # type: ignore[attr-defined]
KEPT: list[Any] = []


def reset() -> None:
    """Make all that cases share as it was."""
    for value in KEPT:
        if hasattr(value, "close"):
            value.close()
    KEPT.clear()
    TABLE["calls"] = 0
    SEEN.set([])
    LIBRARY.seen.clear()
    vars(LIBRARY).pop("late", None)
    vars(Word.ONE).pop("calls", None)
    globals().pop("LATE", None)
    for name in ("UNBATCH_NEW", "UNBATCH_OLD"):
        os.environ.pop(name, None)
    os.environ["UNBATCH_OLD"] = "a"
    kept_results.cache_clear()
    kept_results(1)
    few_results.cache_clear()
    logging.disable(logging.NOTSET)
    gc.set_threshold(700, 10, 10)
    decimal.getcontext().clear_flags()


class Word(enum.StrEnum):
    ONE = "one"


class Number(int):
    calls = 0


class Span(NamedTuple):
    seen: list[int]

    def note(self) -> None:
        TABLE["calls"] += 1


class Owner:
    def __init__(self) -> None:
        self.calls = 0
        self.seen: list[int] = []

    def note(self) -> None:
        self.calls += 1


class Pair(ctypes.Structure):
    _fields_ = [("number", ctypes.c_int), ("inner", ctypes.c_double * 2)]


class Local(threading.local):
    calls = 0


@functools.lru_cache
def kept_results(size: int) -> list[int]:
    return [size]


@functools.cache
def few_results(size: int) -> list[int]:
    return [size]


def kept(value: Any) -> Any:
    KEPT.append(value)
    return value


def counts(n: Any) -> None:
    TABLE["calls"] += 1


def add_to(space: Any, name: Any) -> None:
    space[name] = space[name] + 1


def filled() -> Any:
    made: queue.SimpleQueue[int] = queue.SimpleQueue()
    made.put(1)
    made.put(2)
    return made


def items_of(made: Any) -> list[int]:
    return [made.get_nowait() for _ in range(made.qsize())]


def peeked(made: Any) -> list[int]:
    items = items_of(made)
    for item in items:
        made.put(item)
    return items


def mapped() -> Any:
    return mmap.mmap(-1, 8)


def note_late(n: Any) -> None:
    global LATE
    LATE = 1


def environment(n: Any) -> None:
    os.environ["UNBATCH_NEW"] = "b"
    os.environ["UNBATCH_OLD"] = "c"


def put_in_environment(n: Any) -> None:
    os.environ.update(UNBATCH_OLD="d")
    os.environ.pop("HOME", None)


def note_in_file(n: Any) -> None:
    n.file.write("a line\n")


def on_disk() -> Any:
    file = kept(tempfile.NamedTemporaryFile("w+", prefix="unbatch"))  # noqa: SIM115
    file.write("first\n")
    file.flush()
    return file


def text_of(file: Any) -> Any:
    file.flush()
    with open(file.name) as again:
        return again.read(), file.tell()


def raw_on_disk() -> Any:
    return kept(tempfile.TemporaryFile("ab", buffering=0))


def with_state(n: Any, items: Any = (itertools.count(), {"calls": 0})) -> None:  # noqa: B008
    next(items[0])
    items[1]["calls"] += 1


def with_keyword(n: Any, *, items: Any = iter([0] * 99)) -> None:  # noqa: B008
    next(items)


def closure() -> Any:
    items = iter(range(99))
    return lambda: next(items)


def grows(n: Any) -> None:
    n.table["b"].append(1)
    n.table.default_factory = dict


def numbers(n: Any) -> None:
    decimal.getcontext().traps[decimal.Inexact] = not decimal.getcontext().traps[decimal.Inexact]


def divides(n: Any) -> None:
    decimal.Decimal(1) / decimal.Decimal(3)


MESSY: dict[str, Case] = {
    # References.
    "a list in a dict of weak references": (
        net(
            lambda n: n.table["owner"].seen.append(1),
            table=lambda: weakref.WeakValueDictionary(owner=kept(Owner())),
        ),
        part("table", lambda table: list(table["owner"].seen)),
    ),
    "an entry of a dict with weak keys": (
        net(
            lambda n: operator.setitem(n.table, n.owner, 1),
            owner=Owner,
            table=weakref.WeakKeyDictionary,
        ),
        lambda model: list(model.table.values()),
    ),
    "an object of a weak method": (
        net(lambda n: n.note()(), note=lambda: weakref.WeakMethod(kept(Owner()).note)),
        lambda model: KEPT[-1].calls,
    ),
    "an attribute behind a weak proxy": (
        net(
            lambda n: setattr(n.owner, "calls", n.owner.calls + 1),
            owner=lambda: weakref.proxy(kept(Owner())),
        ),
        lambda model: KEPT[-1].calls,
    ),
    "a set of a bound method": (
        net(lambda n: n.note(len(n.note.__self__)), note=lambda: set().add),
        part("note", lambda note: set(note.__self__)),
    ),
    "a list of a bound method in a dict": (
        net(lambda n: n.table["note"](1), table=lambda: {"note": [].append}),
        part("table", lambda table: list(table["note"].__self__)),
    ),
    "a keyword of a partial": (
        net(
            lambda n: n.call.keywords.update(a=n.call.keywords["a"] + 1),
            call=lambda: functools.partial(dict, a=0),
        ),
        part("call", lambda call: dict(call.keywords)),
    ),
    "a list in a dict behind a proxy": (
        net(
            lambda n: n.table["seen"].append(1),
            table=lambda: MappingProxyType({"seen": []}),
        ),
        part("table", lambda table: list(table["seen"])),
    ),
    "a list in a key of a dict": (
        net(
            lambda n: next(iter(n.table)).seen.append(1),
            table=lambda: {Owner(): None},
        ),
        part("table", lambda table: list(next(iter(table)).seen)),
    ),
    # Memory of C.
    "an array in a structure of C": (
        net(lambda n: add_to(n.pair.inner, 1), pair=Pair),
        part("pair", lambda pair: list(pair.inner)),
    ),
    "a number behind a pointer of C": (
        net(
            lambda n: add_to(n.pointer, 0),
            pointer=lambda: ctypes.pointer(ctypes.c_int(0)),
        ),
        part("pointer", lambda pointer: pointer[0]),
    ),
    "a memoryview of an array of numpy": (
        net(lambda n: add_to(n.view, 0), view=lambda: memoryview(np.zeros(3))),
        part("view", lambda view: view[0]),
    ),
    "a memoryview of a part of an array": (
        net(lambda n: add_to(n.view, 0), view=lambda: memoryview(array.array("d", [0, 0]))[1:]),
        part("view", lambda view: view.obj.tolist()),
    ),
    "memory mapped": (
        net(lambda n: add_to(n.memory, 3), memory=mapped),
        part("memory", lambda memory: memory[3]),
    ),
    "an array shared by processes": (
        net(lambda n: add_to(n.numbers, 0), numbers=lambda: multiprocessing.Array("i", 2)),
        part("numbers", list),
    ),
    "a raw number shared by processes": (
        net(
            lambda n: setattr(n.number, "value", n.number.value + 1),
            number=lambda: multiprocessing.sharedctypes.RawValue("i", 0),
        ),
        part("number", lambda number: number.value),
    ),
    # Threads and contexts.
    "a variable of a class of threads' variables": (
        net(lambda n: setattr(n.local, "calls", n.local.calls + 1), local=Local),
        part("local", lambda space: space.calls),
    ),
    "a list in a variable of a context": (
        net(lambda n: SEEN.get().append(1)),
        lambda model: list(SEEN.get()),
    ),
    "a variable of a context that had no value": (
        net(lambda n: UNSET.set(UNSET.get() + 1)),
        lambda model: UNSET.get(),
    ),
    "a semaphore": (
        net(lambda n: n.free.release(), free=lambda: threading.Semaphore(1)),
        part("free", lambda free: free._value),
    ),
    "an event that is cleared": (
        net(lambda n: n.events[0].clear(), events=lambda: [event_set()]),
        part("events", lambda events: events[0].is_set()),
    ),
    "a simple queue that is emptied": (
        net(lambda n: items_of(n.queue), queue=filled),
        part("queue", peeked),
    ),
    # Classes of leaves.
    "an attribute of an enum of words": (
        net(
            lambda n: setattr(n.kind, "calls", getattr(n.kind, "calls", 0) + 1),
            kind=lambda: Word.ONE,
        ),
        lambda model: getattr(Word.ONE, "calls", 0),
    ),
    "an attribute of a number": (
        net(lambda n: setattr(n.number, "calls", n.number.calls + 1), number=lambda: Number(1)),
        part("number", lambda number: number.calls),
    ),
    "a list in a named tuple": (
        net(lambda n: n.span.seen.append(1), span=lambda: Span([])),
        part("span", lambda span: list(span.seen)),
    ),
    "a global written by a named tuple": (
        net(lambda n: n.span.note(), span=lambda: Span([])),
        lambda model: dict(TABLE),
    ),
    "an attribute of a tensor in a dict": (
        net(
            lambda n: setattr(n.table["a"], "calls", getattr(n.table["a"], "calls", 0) + 1),
            table=lambda: {"a": torch.zeros(2)},
        ),
        part("table", lambda table: getattr(table["a"], "calls", 0)),
    ),
    "a list in an attribute of a parameter": (
        net(lambda n: vars(n.linear.bias).setdefault("seen", []).append(1)),
        part("linear.bias", lambda b: list(vars(b).get("seen", []))),
    ),
    # Names that are data.
    "a variable of the environment, new and old": (
        net(environment),
        lambda model: (os.environ.get("UNBATCH_NEW"), os.environ["UNBATCH_OLD"]),
    ),
    "variables of the environment that are removed": (
        net(put_in_environment),
        lambda model: dict(os.environ),
    ),
    "a list in a Python module, by a name that is data": (
        net(lambda n: getattr(LIBRARY, n.key).append(1), key=lambda: "se" + "en"),
        lambda model: list(LIBRARY.seen),
    ),
    "a new global": (net(note_late), lambda model: "LATE" in globals()),
    "a global by the table of modules": (
        net(lambda n: setattr(sys.modules[__name__], n.key, 1), key=lambda: "LA" + "TE"),
        lambda model: "LATE" in globals(),
    ),
    "a global by a text that is run": (
        net(lambda n: exec(n.text, globals()), text=lambda: "LA" + "TE = 1"),
        lambda model: "LATE" in globals(),
    ),
    # Deep or long.
    "a list in a namespace in a dict in a list": (
        net(
            lambda n: n.items[0]["a"].b["c"].d.append(1),
            items=lambda: [{"a": SimpleNamespace(b={"c": SimpleNamespace(d=[])})}],
        ),
        part("items", lambda items: list(items[0]["a"].b["c"].d)),
    ),
    "an entry of a long list": (
        net(lambda n: add_to(n.items, 4999), items=lambda: [0] * 5000),
        part("items", lambda items: items[4999]),
    ),
    "a default of a dict": (
        net(grows, table=lambda: defaultdict(list)),
        part("table", lambda table: (dict(table), table.default_factory)),
    ),
    # Iterators.
    "iterators in tuples in a list": (
        net(lambda n: next(n.items[0][1][0]), items=lambda: [(0, (iter([0] * 99), 1))]),
        part("items", lambda items: items[0][1][0].__length_hint__()),
    ),
    "an iterator in a set": (
        net(lambda n: next(min(n.items)), items=lambda: {iter([0] * 99)}),
        part("items", lambda items: min(items).__length_hint__()),
    ),
    "an iterator in a keyword of a partial": (
        net(
            lambda n: next(n.call.keywords["items"]),
            call=lambda: functools.partial(dict, items=iter([0] * 99)),
        ),
        part("call", lambda call: call.keywords["items"].__length_hint__()),
    ),
    "one iterator in two places": (
        net(lambda n: (next(n.items[0]), next(n.items[1])), items=lambda: [iter([0] * 99)] * 2),
        part("items", lambda items: items[0].__length_hint__()),
    ),
    "a cycle in its first round": (
        net(lambda n: next(n.items), items=lambda: itertools.cycle([1, 2, 3, 4])),
        part("items", lambda items: repr(items.__reduce__()[1][0].__reduce__())),
    ),
    "iterators and dicts in defaults": (
        net(with_state),
        lambda model: repr(with_state.__defaults__),
    ),
    "an iterator in a default by keyword": (
        net(with_keyword),
        lambda model: with_keyword.__kwdefaults__["items"].__length_hint__(),
    ),
    "an iterator in a closure": (
        net(lambda n: n.draw(), draw=closure),
        part("draw", lambda draw: draw.__closure__[0].cell_contents.__length_hint__()),
    ),
    "the name of an iterator bound to a method in a dict": (
        net(lambda n: n.table["next"](), table=lambda: {"next": iter([0] * 99).__next__}),
        part("table", lambda table: table["next"].__self__.__length_hint__()),
    ),
    # Caches and files.
    "a cache of results that has some": (
        net(lambda n: kept_results(7)),
        lambda model: kept_results.cache_info().currsize,
    ),
    "a cache without bounds": (
        net(lambda n: few_results(len(KEPT))),
        lambda model: few_results.cache_info(),
    ),
    "a list in a cache": (
        net(lambda n: kept_results(1).append(1)),
        lambda model: kept_results.cache_info().currsize and list(kept_results(1)),
    ),
    "a file on a disk": (net(note_in_file, file=on_disk), part("file", text_of)),
    "a raw file on a disk": (
        net(lambda n: n.file.write(b"ab"), file=raw_on_disk),
        part("file", lambda file: os.fstat(file.fileno()).st_size),
    ),
    "a file in memory that is cut": (
        net(lambda n: n.file.truncate(1), file=lambda: io.StringIO("abc")),
        part("file", lambda file: file.getvalue()),
    ),
    # Settings.
    "what raises in decimals": (
        net(numbers),
        lambda model: decimal.getcontext().traps[decimal.Inexact],
    ),
    "what has happened in decimals": (
        net(divides),
        lambda model: decimal.getcontext().flags[decimal.Inexact],
    ),
    "loggers that are silent": (
        net(lambda n: logging.disable(logging.ERROR)),
        lambda model: logging.root.manager.disable,
    ),
    "the thresholds of the collector": (
        net(lambda n: gc.set_threshold(1000, 5, 5)),
        lambda model: gc.get_threshold(),
    ),
    "the printing of tensors, in all": (
        net(lambda n: torch.set_printoptions(profile="short", sci_mode=True)),
        lambda model: dict(vars(torch._tensor_str.PRINT_OPTS)),
    ),
    "the code and the text of a function": (
        net(lambda n: setattr(n.run, "__qualname__", "other")),
        part("run", lambda run: run.__qualname__),
    ),
    "a deque of a method with a length": (
        net(lambda n: n.note(1), note=lambda: deque([0, 0], maxlen=2).append),
        part("note", lambda note: list(note.__self__)),
    ),
    "a list by an attrgetter": (
        net(
            lambda n: operator.attrgetter(n.key)(n).append(1),
            key=lambda: "se" + "en",
            seen=list,
        ),
        part("seen", list),
    ),
}


def event_set() -> threading.Event:
    event = threading.Event()
    event.set()
    return event
