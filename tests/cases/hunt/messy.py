"""Programs that change something while they run, where it is hard to see and to put back.

As in `cases/messy.py`: a function that makes a model, and one that returns what must stay.
"""

import contextlib
import ctypes
import decimal
import enum
import functools
import gc
import io
import itertools
import logging
import multiprocessing
import operator
import os
import queue
import sys
import threading
import types
import weakref
from collections import ChainMap, OrderedDict, UserDict, UserList, defaultdict
from contextvars import ContextVar
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cases.hunt.changes import Point, nested
from cases.messy import Case, net, part

COUNT: ContextVar[int] = ContextVar("count", default=0)
KEEP: list[Any] = []
TABLE: dict[str, int] = {"calls": 0}
MODULE = types.ModuleType("counts")
MODULE.calls = 0  # type: ignore[attr-defined]


class Marked(enum.Enum):
    PLAIN = 1


class Owner:
    def __init__(self) -> None:
        self.calls, self.seen = 0, []


class Meta(type):
    calls = 0


class WithMeta(metaclass=Meta):
    pass


class Counted(enum.Enum):
    PLAIN = 1

    def count(self) -> None:
        TABLE["calls"] += 1


class Pair(tuple):
    def count(self) -> None:
        TABLE["calls"] += 1


class Number(float):
    def count(self) -> None:
        TABLE["calls"] += 1


def kept(value: Any) -> Any:
    KEEP.append(value)
    return value


def last(see: Any) -> Any:
    return lambda model: see(KEEP[-1])


def weak() -> Any:
    return weakref.ref(kept(Owner()))


def proxy() -> Any:
    return MappingProxyType(kept({"calls": 0}))


def through_proxy(n: Any) -> None:
    KEEP[-1]["calls"] += 1


def local() -> Any:
    space = threading.local()
    space.calls = 0
    return space


@functools.lru_cache
def cached(size: int) -> Tensor:
    return torch.zeros(size)


class OwnCache:
    def __init__(self) -> None:
        self.get = functools.lru_cache(maxsize=None)(lambda k: k)


def deep(space: Any) -> Any:
    while hasattr(space, "inner"):
        space = space.inner
    return space


def env(n: Any) -> None:
    os.environ["UNBATCH_CALLS"] = str(int(os.environ.get("UNBATCH_CALLS", "0")) + 1)


def extends_path(n: Any) -> None:
    sys.path.append("nowhere")


def backward(n: Any) -> None:
    n.linear.weight.square().sum().backward()


def grows(n: Any) -> None:
    n.file.seek(0, 2)
    n.file.write("x")


def increment(name: str) -> Any:
    def run(n: Any) -> None:
        value = getattr(n, name)
        value.value += 1

    return run


def counted(n: Any, items: Any = itertools.count()) -> None:  # noqa: B008
    next(items)


def own_counts(n: Any) -> None:
    n.kind.count()


def table_calls(model: Any) -> Any:
    return dict(TABLE)


def anomalies(n: Any) -> None:
    torch.autograd.set_detect_anomaly(True, check_nan=False)


def cached_seven() -> Any:
    made = functools.cached_property(lambda self: 7)
    made.__set_name__(Owner, "made")
    return made


def renames(n: Any) -> None:
    n.run.__name__ = n.run.__name__ + "x"


MESSY: dict[str, Case] = {
    "a dict behind a proxy": (net(through_proxy, table=proxy), last(dict)),
    "an attribute behind a weak reference": (
        net(lambda n: setattr(n.owner(), "calls", n.owner().calls + 1), owner=weak),
        last(lambda owner: owner.calls),
    ),
    "a list behind a weak reference": (
        net(lambda n: n.owner().seen.append(1), owner=weak),
        last(lambda owner: list(owner.seen)),
    ),
    "a list of a bound method": (
        net(lambda n: n.note(1), note=lambda: [].append),
        part("note", lambda note: list(note.__self__)),
    ),
    "a dict of a bound method": (
        net(lambda n: n.note({"a": 1}), note=lambda: {}.update),
        part("note", lambda note: dict(note.__self__)),
    ),
    "a deque of a bound method in a partial": (
        net(lambda n: n.note(), note=lambda: functools.partial([].append, 1)),
        part("note", lambda note: list(note.func.__self__)),
    ),
    "a variable of a thread": (
        net(lambda n: setattr(n.local, "calls", n.local.calls + 1), local=local),
        part("local", lambda space: space.calls),
    ),
    "a variable of a context": (
        net(lambda n: COUNT.set(COUNT.get() + 1)),
        lambda model: COUNT.get(),
    ),
    "a variable of the environment": (net(env), lambda model: os.environ.get("UNBATCH_CALLS")),
    "the path of imports": (net(extends_path), lambda model: len(sys.path)),
    "a number of C": (
        net(increment("number"), number=lambda: ctypes.c_int(0)),
        part("number", lambda number: number.value),
    ),
    "a structure of C": (
        net(lambda n: setattr(n.point, "scale", n.point.scale + 1), point=lambda: Point(1.0)),
        part("point", lambda point: point.scale),
    ),
    "an array of C": (
        net(
            lambda n: operator.setitem(n.numbers, 0, n.numbers[0] + 1),
            numbers=lambda: (ctypes.c_int * 2)(),
        ),
        part("numbers", list),
    ),
    "bytes behind a memoryview": (
        net(
            lambda n: operator.setitem(n.view, 0, n.view[0] + 1),
            view=lambda: memoryview(bytearray(2)),
        ),
        part("view", bytes),
    ),
    "a number shared by processes": (
        net(increment("number"), number=lambda: multiprocessing.Value("i", 0)),
        part("number", lambda number: number.value),
    ),
    "a flag of an event": (
        net(lambda n: n.event.set(), event=threading.Event),
        part("event", lambda event: event.is_set()),
    ),
    "a queue": (
        net(lambda n: n.queue.put(1), queue=queue.Queue),
        part("queue", lambda q: q.qsize()),
    ),
    "a simple queue": (
        net(lambda n: n.queue.put(1), queue=queue.SimpleQueue),
        part("queue", lambda q: q.qsize()),
    ),
    "a cache of results": (
        net(lambda n: cached(7)),
        lambda model: cached.cache_info().hits + cached.cache_info().misses,
    ),
    "a cache of an object's own": (
        net(lambda n: n.cache.get(3), cache=OwnCache),
        part("cache", lambda cache: cache.get.cache_info().currsize),
    ),
    "a cached property": (
        net(lambda n: n.thing.made, thing=lambda: type("Thing", (), {"made": cached_seven()})()),
        part("thing", lambda thing: "made" in vars(thing)),
    ),
    "a namespace nested twice": (
        net(lambda n: setattr(n.config.inner.inner, "scale", 2.0), config=lambda: nested(2)),
        part("config.inner.inner", lambda space: space.scale),
    ),
    "a namespace nested five times": (
        net(lambda n: setattr(deep(n.config), "scale", 2.0), config=lambda: nested(5)),
        part("config", lambda space: deep(space).scale),
    ),
    "an attribute of an enum": (
        net(
            lambda n: setattr(n.kind, "calls", getattr(n.kind, "calls", 0) + 1),
            kind=lambda: Marked.PLAIN,
        ),
        lambda model: getattr(Marked.PLAIN, "calls", 0),
    ),
    "an attribute of a metaclass": (
        net(lambda n: setattr(Meta, "calls", Meta.calls + 1), kind=lambda: WithMeta),
        lambda model: Meta.calls,
    ),
    "a global written by an enum": (net(own_counts, kind=lambda: Counted.PLAIN), table_calls),
    "a global written by a tuple": (net(own_counts, kind=lambda: Pair([1])), table_calls),
    "a global written by a float": (net(own_counts, kind=lambda: Number(1.0)), table_calls),
    "an attribute of a parameter": (
        net(lambda n: setattr(n.linear.weight, "calls", getattr(n.linear.weight, "calls", 0) + 1)),
        part("linear.weight", lambda w: getattr(w, "calls", 0)),
    ),
    "an attribute of a buffer in a list": (
        net(lambda n: setattr(n.kept[0], "calls", 1), kept=lambda: [torch.zeros(2)]),
        part("kept", lambda k: hasattr(k[0], "calls")),
    ),
    "an attribute of a Python module": (
        net(lambda n: setattr(MODULE, "calls", MODULE.calls + 1)),
        lambda model: MODULE.calls,
    ),
    "an attribute of a Python module, by a name that is data": (
        net(lambda n: setattr(MODULE, n.key, n.key), key=lambda: "la" + "st"),
        lambda model: hasattr(MODULE, "last"),
    ),
    "a global by a name that is data": (
        net(lambda n: globals().__setitem__(n.key, 1), key=lambda: "MA" + "DE"),
        lambda model: "MADE" in globals(),
    ),
    "a list of a class of the library": (
        net(lambda n: n.items.append(1), items=UserList),
        part("items", lambda items: list(items)),
    ),
    "a dict of a class of the library": (
        net(lambda n: n.items.update(a=1), items=UserDict),
        part("items", lambda items: dict(items)),
    ),
    "a layered dict": (
        net(lambda n: n.items.update(a=1), items=ChainMap),
        part("items", lambda items: dict(items)),
    ),
    "a dict that makes its entries": (
        net(lambda n: n.items["a"].append(1), items=lambda: defaultdict(list)),
        part("items", lambda items: {k: list(v) for k, v in items.items()}),
    ),
    "a file written to": (
        net(grows, file=lambda: io.StringIO("abc")),
        part("file", lambda file: file.getvalue()),
    ),
    "a file of bytes written to": (
        net(lambda n: n.file.write(b"x"), file=lambda: io.BytesIO()),
        part("file", lambda file: file.getvalue()),
    ),
    "an iterator in a tuple": (
        net(lambda n: next(n.items[0]), items=lambda: (iter([1.0] * 99),)),
        part("items", lambda items: items[0].__length_hint__()),
    ),
    "an iterator in a partial": (
        net(lambda n: n.draw(), draw=lambda: functools.partial(next, iter([1.0] * 99))),
        part("draw", lambda draw: draw.args[0].__length_hint__()),
    ),
    "an iterator of a bound method": (
        net(lambda n: n.draw(), draw=lambda: iter([1.0] * 99).__next__),
        part("draw", lambda draw: draw.__self__.__length_hint__()),
    ),
    "a count in a default": (net(counted), lambda model: repr(counted.__defaults__[0])),
    "the gradient of a parameter": (
        net(backward),
        part("linear.weight", lambda w: None if w.grad is None else w.grad.tolist()),
    ),
    "the precision of decimals": (
        net(lambda n: setattr(decimal.getcontext(), "prec", 11)),
        lambda model: decimal.getcontext().prec,
    ),
    "the way tensors are printed": (
        net(lambda n: torch.set_printoptions(precision=7)),
        lambda model: torch._tensor_str.PRINT_OPTS.precision,
    ),
    "the way arrays are printed": (
        net(lambda n: np.set_printoptions(precision=5)),
        lambda model: np.get_printoptions()["precision"],
    ),
    "checks of laws": (
        net(lambda n: torch.distributions.Distribution.set_default_validate_args(False)),
        lambda model: torch.distributions.Distribution._validate_args,
    ),
    "checks of sparse tensors": (
        net(lambda n: torch.sparse.check_sparse_tensor_invariants.enable()),
        lambda model: torch.sparse.check_sparse_tensor_invariants.is_enabled(),
    ),
    "the level of a logger": (
        net(lambda n: n.log.setLevel(logging.ERROR), log=lambda: logging.getLogger("hunt")),
        part("log", lambda log: log.level),
    ),
    "the collector of garbage": (net(lambda n: gc.disable()), lambda model: gc.isenabled()),
    "the limit of recursion": (
        net(lambda n: sys.setrecursionlimit(sys.getrecursionlimit() + 1)),
        lambda model: sys.getrecursionlimit(),
    ),
    "anomalies, with another check": (
        net(anomalies),
        lambda model: torch.is_anomaly_check_nan_enabled(),
    ),
    "the name of a function": (
        net(renames),
        part("run", lambda run: run.__name__),
    ),
    "an engine of quasi-random numbers": (
        net(lambda n: n.engine.draw(1), engine=lambda: torch.quasirandom.SobolEngine(2)),
        part("engine", lambda engine: engine.num_generated),
    ),
    "a parameter list": (
        net(
            lambda n: n.parts.append(nn.Parameter(torch.zeros(1))),
            parts=lambda: nn.ParameterList([nn.Parameter(torch.zeros(1))]),
        ),
        part("parts", len),
    ),
    "the mode of the model": (net(lambda n: n.eval()), lambda model: model.training),
    "the order of layers": (
        net(lambda n: n.parts.move_to_end("a"), parts=lambda: OrderedDict(a=1, b=2)),
        part("parts", list),
    ),
    "a stack of contexts": (
        net(lambda n: n.stack.callback(print), stack=contextlib.ExitStack),
        part("stack", lambda stack: len(stack._exit_callbacks)),
    ),
}
