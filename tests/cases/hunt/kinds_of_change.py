"""More changes of a program, two or more of each kind of place that the hunt found.

As in `cases/hunt/changes.py`. What is shared by cases is made afresh by `reset`.
"""

import array
import ctypes
import dataclasses
import enum
import functools
import importlib
import io
import itertools
import mmap
import multiprocessing
import operator
import os
import queue
import threading
import types
import weakref
from collections import defaultdict, deque
from contextvars import ContextVar
from types import MappingProxyType, SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch

from cases.changes import Change, D, net, put
from cases.hunt.changes import counting, plain, times

KEPT: list[Any] = []

TABLE = {"scale": 1.0}
SCALE = 1.0
TOKEN: ContextVar[dict[str, float]] = ContextVar("token")
LEVEL: ContextVar[float] = ContextVar("level", default=1.0)
LIBRARY = types.ModuleType("library")
LIBRARY.table = {"scale": 1.0}  # type: ignore[attr-defined]
LIBRARY.inner = types.ModuleType("inner")  # type: ignore[attr-defined]
LIBRARY.inner.SCALE = 1.0  # type: ignore[attr-defined]


def reset() -> None:
    """Make all that cases share as it was."""
    globals()["SCALE"] = 1.0
    TABLE["scale"] = LIBRARY.table["scale"] = LIBRARY.inner.SCALE = 1.0
    LEVEL.set(1.0)
    TOKEN.set({"scale": 1.0})
    Colour.RED.marks["scale"] = 1.0
    vars(cached).pop("scale", None)
    cached.cache_clear()
    os.environ.pop("UNBATCH_FACTOR", None)


class Colour(enum.Enum):
    RED = "red"

    @property
    def marks(self) -> dict[str, float]:
        return self.__dict__.setdefault("table", {"scale": 1.0})


class Level(enum.IntEnum):
    LOW = 1

    def factor(self) -> float:
        return TABLE["scale"]


class Word(str):
    def factor(self) -> float:
        return TABLE["scale"]


class Items(list):
    def factor(self) -> float:
        return TABLE["scale"]


class Size(int):
    """A number with an attribute."""


class Span(NamedTuple):
    table: dict[str, float]


class Registered(type):
    def __call__(cls, *args: Any) -> Any:
        made = super().__call__(*args)
        made.scale = TABLE["scale"]
        return made


class Made(metaclass=Registered):
    scale = 1.0


class Tagged(torch.Tensor):
    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        plain_args = [a.as_subclass(torch.Tensor) if isinstance(a, Tagged) else a for a in args]
        result = func(*plain_args, **(kwargs or {}))
        if func is torch.Tensor.mul:
            return result * TABLE["scale"]
        return result


class Pair(ctypes.Structure):
    _fields_ = [("number", ctypes.c_int), ("pointer", ctypes.POINTER(ctypes.c_double))]


@dataclasses.dataclass
class State:
    step: int = 0


@functools.lru_cache
def cached(size: int) -> float:
    return SCALE


class SimpleKey:
    def __init__(self, scale: float) -> None:
        self.scale = scale


class Owner:
    scale = 1.0

    def get(self) -> float:
        return self.scale


def kept_alive(value: Any) -> Any:
    KEPT.append(value)
    return value


def local() -> Any:
    space = threading.local()
    space.table = {"scale": 1.0}
    return space


def table_to(value: float) -> Any:
    return lambda model: TABLE.__setitem__("scale", value)


def forget(model: Any) -> None:
    """Let a function that keeps its results compute them again, with another global."""
    globals()["SCALE"] = 3.0
    cached.cache_clear()


def imports(n: Any, x: Any) -> Any:
    from cases.hunt import kinds_of_change

    return n.linear(x) * kinds_of_change.SCALE


def imports_a_name(n: Any, x: Any) -> Any:
    from cases.hunt.kinds_of_change import SCALE as scale

    return n.linear(x) * scale


def imports_by_text(n: Any, x: Any) -> Any:
    return n.linear(x) * importlib.import_module(n.name).SCALE


def to_scale(value: float) -> Any:
    return lambda model: globals().__setitem__("SCALE", value)


def executed(n: Any, x: Any) -> Any:
    space: dict[str, Any] = {}
    exec(n.text, globals(), space)
    return n.linear(x) * space["made"]


def weak_values() -> Any:
    return weakref.WeakValueDictionary(owner=kept_alive(Owner()))


def shared_memory() -> Any:
    memory = mmap.mmap(-1, 8)
    memory[0] = 1
    return memory


def to_zero_of(space: Any, value: Any) -> None:
    space[0] = value


def first_to(name: str, value: Any) -> Any:
    return lambda model: to_zero_of(getattr(model, name), value)


def file_in_memory() -> Any:
    return io.StringIO("1.0")


def reads_file(n: Any) -> float:
    n.file.seek(0)
    return float(n.file.read())


def rewrites(model: Any) -> None:
    model.file.seek(0)
    model.file.write("3.0")


def long_text(n: Any, x: Any) -> Any:
    n.text = n.text + "ab"
    return n.linear(x) * (3.0 if n.text.count("a") > 4 else 1.0)


def rests(n: Any, x: Any) -> Any:
    n.step, rest = divmod(n.step * 7 + 3, 11)
    n.step = rest
    return n.linear(x) * (3.0 if rest in (5,) else 1.0)


def by_bits(n: Any, x: Any) -> Any:
    n.step += 1
    return n.linear(x) * (3.0 if n.step & 8 else 1.0)


def by_index(n: Any, x: Any) -> Any:
    n.step += 1
    return n.linear(x) * n.table[min(n.step // 4, 1)]


def averaging(n: Any, x: Any) -> Any:
    n.mean = 0.9 * n.mean + 0.1
    return n.linear(x) * (3.0 if n.mean > 0.4 else 1.0)


def in_a_list(n: Any, x: Any) -> Any:
    n.counts[0] += 1
    return n.linear(x) * (3.0 if n.counts[0] == 4 else 1.0)


def in_a_tuple(n: Any, x: Any) -> Any:
    n.counts = (n.counts[0] + 1, 0)
    return n.linear(x) * (3.0 if n.counts[0] > 4 else 1.0)


def in_an_object(n: Any, x: Any) -> Any:
    n.state = State(n.state.step + 1)
    return n.linear(x) * (3.0 if n.state.step > 4 else 1.0)


def in_a_new_dict(n: Any, x: Any) -> Any:
    n.seen["calls"] = n.seen.get("calls", 0) + 1
    return n.linear(x) * (3.0 if n.seen["calls"] % 4 == 0 else 1.0)


def in_memory_of_c(n: Any, x: Any) -> Any:
    n.number.value += 1
    return n.linear(x) * (3.0 if n.number.value == 4 else 1.0)


def in_an_array(n: Any, x: Any) -> Any:
    n.array[0] += 1
    return n.linear(x) * (3.0 if n.array[0] > 4 else 1.0)


def sum_of_history(n: Any, x: Any) -> Any:
    n.history.append(1.0)
    return n.linear(x) * (3.0 if sum(n.history) > 5 else 1.0)


def by_text_of_step(n: Any, x: Any) -> Any:
    n.step += 1
    return n.linear(x) * n.table.get(f"step {n.step}", 1.0)


def once_divided(n: Any, x: Any) -> Any:
    n.step += 1
    try:
        return n.linear(x) * (1.0 if 1 / (n.step - 5) else 2.0)
    except ZeroDivisionError:
        return n.linear(x) * 3.0


def counts_up(n: Any, x: Any) -> Any:
    return n.linear(x) * (3.0 if next(n.items) == 4 else 1.0)


CHANGES: dict[str, Change] = {
    # References.
    "a value of a dict of weak references": (
        net(times(lambda n: n.table["owner"].scale), table=weak_values),
        lambda model: setattr(model.table["owner"], "scale", 3.0),
    ),
    "a list in an object behind a weak method": (
        net(times(lambda n: n.ask()()), ask=lambda: weakref.WeakMethod(kept_alive(Owner()).get)),
        lambda model: setattr(model.ask().__self__, "scale", 3.0),
    ),
    "an object behind a weak reference that is gone": (
        net(
            times(lambda n: 3.0 if n.owner() is None else n.owner().scale),
            owner=lambda: weakref.ref(kept_alive(Owner())),
        ),
        lambda model: KEPT.clear(),
    ),
    "a module behind a weak reference that is gone": (
        net(
            times(lambda n: 3.0 if n.owner() is None else 1.0),
            owner=lambda: weakref.ref(kept_alive(torch.nn.Linear(2, 2))),
        ),
        lambda model: KEPT.clear(),
    ),
    "a list behind a partial of a bound method": (
        net(times(lambda n: n.at()), at=lambda: functools.partial([1.0].__getitem__, 0)),
        lambda model: model.at.func.__self__.__setitem__(0, 3.0),
    ),
    "a keyword of a partial": (
        net(times(lambda n: n.make()["a"]), make=lambda: functools.partial(dict, a=1.0)),
        lambda model: model.make.keywords.__setitem__("a", 3.0),
    ),
    "a dict behind two proxies": (
        net(
            times(lambda n: n.table["inner"]["scale"]),
            table=lambda: MappingProxyType({"inner": MappingProxyType(TABLE)}),
        ),
        table_to(3.0),
    ),
    "a dict behind its values": (
        net(times(lambda n: max(n.view)), view=lambda: kept_alive({"scale": 1.0}).values()),
        lambda model: KEPT[-1].__setitem__("scale", 3.0),
    ),
    "an object that is the key of a dict": (
        net(
            times(lambda n: next(iter(n.table)).scale),
            table=lambda: {SimpleKey(1.0): None, (SimpleKey(1.0), 2): None},
        ),
        lambda model: setattr(next(iter(model.table)), "scale", 3.0),
    ),
    "an object in a tuple that is the key of a dict": (
        net(
            times(lambda n: next(iter(n.table))[0].scale),
            table=lambda: {(SimpleKey(1.0), 2): None},
        ),
        lambda model: setattr(next(iter(model.table))[0], "scale", 3.0),
    ),
    # Getters.
    "an inner attribute by an attrgetter": (
        net(
            times(lambda n: n.get(n.config)),
            get=lambda: operator.attrgetter("inner.warmth"),
            config=lambda: SimpleNamespace(inner=SimpleNamespace(warmth=1.0)),
        ),
        put("config.inner.warmth", 3.0),
    ),
    # Memory of C.
    "a number behind a pointer of C": (
        net(
            times(lambda n: n.pointer.contents.value),
            pointer=lambda: ctypes.pointer(ctypes.c_double(1.0)),
        ),
        lambda model: setattr(model.pointer.contents, "value", 3.0),
    ),
    "a number behind a pointer in a structure": (
        net(
            times(lambda n: n.pair.pointer[0]),
            pair=lambda: Pair(1, ctypes.pointer(ctypes.c_double(1.0))),
        ),
        lambda model: model.pair.pointer.__setitem__(0, 3.0),
    ),
    "a memoryview of an array": (
        net(times(lambda n: n.view[0]), view=lambda: memoryview(array.array("d", [1.0]))[:1]),
        first_to("view", 3.0),
    ),
    "memory mapped": (
        net(times(lambda n: float(n.memory[0])), memory=shared_memory),
        first_to("memory", 3),
    ),
    "an array shared by processes": (
        net(times(lambda n: n.numbers[0]), numbers=lambda: multiprocessing.Array("d", [1.0])),
        first_to("numbers", 3.0),
    ),
    "a semaphore": (
        net(
            times(lambda n: 1.0 if n.free.acquire(blocking=False) else 3.0),
            free=lambda: threading.Semaphore(1),
        ),
        lambda model: model.free.acquire() and None,
    ),
    "an item of a simple queue": (
        net(times(lambda n: 3.0 if n.queue.qsize() else 1.0), queue=queue.SimpleQueue),
        lambda model: model.queue.put(1),
    ),
    "a dict in a variable of a context": (
        net(times(lambda n: TOKEN.get()["scale"])),
        lambda model: TOKEN.get().__setitem__("scale", 3.0),
    ),
    "a dict in a variable of a thread": (
        net(times(lambda n: n.local.table["scale"]), local=local),
        lambda model: model.local.table.__setitem__("scale", 3.0),
    ),
    # Classes of leaves.
    "a dict of an enum": (
        net(times(lambda n: n.colour.marks["scale"]), colour=lambda: Colour.RED),
        lambda model: Colour.RED.marks.__setitem__("scale", 3.0),
    ),
    "a global that a method of a whole enum reads": (
        net(times(lambda n: n.level.factor()), level=lambda: Level.LOW),
        table_to(3.0),
    ),
    "a global that a method of a word reads": (
        net(times(lambda n: n.word.factor()), word=lambda: Word("a")),
        table_to(3.0),
    ),
    "a global that a method of a list reads": (
        net(times(lambda n: n.items.factor()), items=lambda: Items([1])),
        table_to(3.0),
    ),
    "an attribute of a number": (
        net(times(lambda n: getattr(n.size, "scale", 1.0)), size=lambda: Size(2)),
        lambda model: setattr(model.size, "scale", 3.0),
    ),
    "a number exchanged for an equal one": (
        net(times(lambda n: getattr(n.size, "scale", 1.0)), size=lambda: Size(2)),
        lambda model: setattr(model, "size", scaled_size()),
    ),
    "a dict in a named tuple": (
        net(times(lambda n: n.span.table["scale"]), span=lambda: Span({"scale": 1.0})),
        lambda model: model.span.table.__setitem__("scale", 3.0),
    ),
    "a global that the call of a class reads": (
        net(times(lambda n: n.make().scale), make=lambda: Made),
        table_to(3.0),
    ),
    "a global that a tensor's override reads": (
        net(
            lambda n, x: n.linear(x) * n.tag,
            tag=lambda: torch.ones(D).as_subclass(Tagged),
        ),
        table_to(3.0),
    ),
    "a dict of a parameter": (
        net(times(lambda n: vars(n.linear.weight).get("table", TABLE)["scale"])),
        lambda model: setattr(model.linear.weight, "table", {"scale": 3.0}),
    ),
    # Names that are data.
    "an entry of the environment by getenv": (
        net(times(lambda n: float(os.getenv("UNBATCH_FACTOR", "1")))),
        lambda model: os.environ.__setitem__("UNBATCH_FACTOR", "3"),
    ),
    "a dict in a Python module, by a name that is data": (
        net(times(lambda n: getattr(LIBRARY, n.key)["scale"]), key=lambda: "ta" + "ble"),
        lambda model: LIBRARY.table.__setitem__("scale", 3.0),
    ),
    "a name in a module in a module": (
        net(times(lambda n: LIBRARY.inner.SCALE)),
        lambda model: setattr(LIBRARY.inner, "SCALE", 3.0),
    ),
    "a global of a module imported inside": (net(imports), to_scale(3.0)),
    "a global imported by its name inside": (net(imports_a_name), to_scale(3.0)),
    "a global of a module imported by a text": (
        net(imports_by_text, name=lambda: __name__),
        to_scale(3.0),
    ),
    "a global that a text reads that is run": (
        net(executed, text=lambda: "made = SC" + "ALE"),
        to_scale(3.0),
    ),
    # Deep, long or large.
    "a dict nested eight times": (
        net(times(lambda n: deepest_item(n.table)), table=lambda: nested_dicts(8)),
        lambda model: set_deepest_item(model.table, 3.0),
    ),
    "the last entry of a long deque": (
        net(times(lambda n: n.items[4999]), items=lambda: deque([1.0] * 5000)),
        lambda model: model.items.__setitem__(4999, 3.0),
    ),
    "an object in a long list": (
        net(
            times(lambda n: n.items[4999].scale),
            items=lambda: [SimpleNamespace(scale=1.0) for _ in range(5000)],
        ),
        lambda model: setattr(model.items[4999], "scale", 3.0),
    ),
    "one entry of an array of a megabyte": (
        net(times(lambda n: float(n.array[77777])), array=lambda: np.ones(131072)),
        lambda model: model.array.__setitem__(77777, 3.0),
    ),
    "a default that is a partial": (
        net(
            times(lambda n: n.table["none"]),
            table=lambda: defaultdict(functools.partial(float, "1.0")),
        ),
        lambda model: setattr(model.table, "default_factory", functools.partial(float, "3.0")),
    ),
    # Iterators.
    "a count advanced": (
        net(times(lambda n: float(next(n.items))), items=lambda: itertools.count(1)),
        lambda model: next(model.items) and None,
    ),
    "an iterator in a tuple advanced": (
        net(times(lambda n: next(n.items[0])), items=lambda: (iter([1.0, 3.0] * 9),)),
        lambda model: next(model.items[0]) and None,
    ),
    "the list behind an iterator": (
        net(times(lambda n: next(n.items)), items=lambda: iter([1.0] * 99)),
        lambda model: model.items.__reduce__()[1][0].__setitem__(slice(None), [3.0] * 99),
    ),
    "a count that decides at four": (net(counts_up, items=itertools.count), plain(4)),
    # Caches and files.
    "a result that was kept": (net(times(lambda n: cached(1))), forget),
    "what a file in memory holds": (net(times(reads_file), file=file_in_memory), rewrites),
    # What a program writes and depends on later.
    "a text by what is in it": (net(long_text, text=str), plain(4)),
    "a rest of a division": (net(rests, step=lambda: 1), put("step", 5)),
    "a bit of a counter": (net(by_bits, step=lambda: 0), plain(7)),
    "a counter as an index": (net(by_index, step=lambda: 0, table=lambda: [1.0, 3.0]), plain(4)),
    "a mean that rises": (net(averaging, mean=lambda: 0.0), plain(6)),
    "a counter in a list": (net(in_a_list, counts=lambda: [0]), plain(3)),
    "a counter in a tuple": (net(in_a_tuple, counts=lambda: (0, 0)), plain(5)),
    "a counter in a new object": (net(in_an_object, state=State), plain(5)),
    "a counter in a dict that was empty": (net(in_a_new_dict, seen=dict), plain(3)),
    "a counter in memory of C": (net(in_memory_of_c, number=lambda: ctypes.c_int(0)), plain(3)),
    "a counter in an array": (net(in_an_array, array=lambda: np.zeros(1)), plain(5)),
    "the sum of a history": (net(sum_of_history, history=list), plain(6)),
    "a text of a counter": (
        net(by_text_of_step, step=lambda: 0, table=lambda: {"step 3": 3.0}),
        plain(2),
    ),
    "a division by a counter": (net(once_divided, step=lambda: 0), plain(4)),
    "a counter's own step": (
        net(counting(lambda n: 3.0 if abs(n.step - 7) < 2 else 1.0), step=lambda: 0),
        plain(6),
    ),
}


def scaled_size() -> Size:
    size = Size(2)
    size.scale = 3.0  # type: ignore[attr-defined]
    return size


def nested_dicts(depth: int) -> Any:
    table: Any = {"scale": 1.0}
    for _ in range(depth):
        table = {"inner": table}
    return table


def deepest_item(table: Any) -> float:
    while "inner" in table:
        table = table["inner"]
    return table["scale"]


def set_deepest_item(table: Any, value: float) -> None:
    while "inner" in table:
        table = table["inner"]
    table["scale"] = value
