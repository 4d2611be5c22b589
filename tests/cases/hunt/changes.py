"""Changes of a program between two questions, at places that are hard to watch.

As in `cases/changes.py`: a function that makes `(model, loss)`, and one that changes the model.
"""

import ctypes
import enum
import functools
import itertools
import operator
import os
import sys
import threading
import types
import weakref
from collections import ChainMap, UserDict, UserList, defaultdict
from contextvars import ContextVar
from types import MappingProxyType, SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from cases.changes import Change, D, layers, net, put

GAIN = 1.0
FACTORS = {"plain": 1.0}
LEVEL: ContextVar[float] = ContextVar("level", default=1.0)
MODULE = types.ModuleType("gains")
MODULE.GAIN = 1.0  # type: ignore[attr-defined]
MODULE.inner = SimpleNamespace(GAIN=1.0)  # type: ignore[attr-defined]


def times(read: Any) -> Any:
    return lambda n, x: n.linear(x) * read(n)


def gain(value: float) -> None:
    globals()["GAIN"] = value


def double() -> float:
    return 1.0


class Kind(enum.Enum):
    PLAIN = 1

    def factor(self) -> float:
        return FACTORS["plain"]


class Marked(enum.Enum):
    PLAIN = 1


class Pair(NamedTuple):
    scale: float = 1.0

    def factor(self) -> float:
        return self.scale * FACTORS["plain"]


class Scale(float):
    def factor(self) -> float:
        return FACTORS["plain"]


class Meta(type):
    @property
    def scale(cls) -> float:
        return FACTORS["plain"]


class WithMeta(metaclass=Meta):
    pass


class Descriptor:
    def __init__(self) -> None:
        self.scale = 1.0

    def __get__(self, instance: Any, owner: Any) -> float:
        return self.scale


class Described:
    factor = Descriptor()


class Delegating:
    def __init__(self) -> None:
        self.table = {"scale": 1.0}

    def __getattr__(self, name: str) -> Any:
        return self.__dict__["table"][name]


class Duck:
    """Multiplies by what a global says, where a function of PyTorch is given it."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return args[0] * FACTORS["plain"]


class Own(torch.Tensor):
    def scaled(self) -> torch.Tensor:
        return self.as_subclass(torch.Tensor) * FACTORS["plain"]


class Owner:
    scale = 1.0

    def __init__(self) -> None:
        self.scale = 1.0


class Point(ctypes.Structure):
    _fields_ = [("scale", ctypes.c_double)]


def nested(depth: int) -> SimpleNamespace:
    space = SimpleNamespace(scale=1.0)
    for _ in range(depth):
        space = SimpleNamespace(inner=space)
    return space


def deepest(space: Any) -> Any:
    while hasattr(space, "inner"):
        space = space.inner
    return space


def factors(value: float = 3.0) -> Any:
    return lambda model: FACTORS.__setitem__("plain", value)


def counting(read: Any) -> Any:
    def run(n: Any, x: Any) -> Any:
        n.step += 1
        return n.linear(x) * read(n)

    return run


def with_history(n: Any, x: Any) -> Any:
    n.history.append(1)
    return n.linear(x) * (3.0 if len(n.history) > 5 else 1.0)


def counting_down(n: Any, x: Any) -> Any:
    n.left -= 1
    return n.linear(x) * (3.0 if n.left <= 0 else 1.0)


def cooling(n: Any, x: Any) -> Any:
    n.heat *= 0.9
    return n.linear(x) * (3.0 if n.heat < 0.1 else 1.0)


def remembering(n: Any, x: Any) -> Any:
    n.seen["last"] = n.seen.get("last", "") + "a"
    return n.linear(x) * (3.0 if len(n.seen["last"]) > 5 else 1.0)


def filling(n: Any, x: Any) -> Any:
    n.ring = (n.ring + 1) % 5
    return n.linear(x) * (3.0 if n.ring == 4 else 1.0)


def plain(times: int) -> Any:
    """Run the model, as a training loop does between two questions."""
    return lambda model: [model(torch.randn(6, D)) for _ in range(times)] and None


def bound() -> Any:
    return {"scale": 1.0}.get


def held(name: str) -> Any:
    """Keep what a bound method belongs to where the change finds it, and the walk does not."""
    return lambda model: getattr(model, name).__self__.__setitem__("scale", 3.0)


KEEP: list[Any] = []


def referred() -> Any:
    owner = Owner()
    KEEP.append(owner)
    return weakref.ref(owner)


def proxied() -> Any:
    table = {"scale": 1.0}
    KEEP.append(table)
    return MappingProxyType(table)


def proxy_to_module() -> Any:
    owner = Owner()
    KEEP.append(owner)
    return weakref.proxy(owner)


def local() -> Any:
    space = threading.local()
    space.scale = 1.0
    return space


def last_kept(change: Any) -> Any:
    return lambda model: change(KEEP[-1])


def tagged(model: Any) -> None:
    model.linear.weight.scale = 3.0


def scripted() -> Any:
    class Scaled(nn.Module):
        scale: float

        def __init__(self) -> None:
            super().__init__()
            self.scale = 1.0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * self.scale

    return torch.jit.script(Scaled())


def far_layers() -> Any:
    return nn.Linear(40, 40)


def wide(n: Any, x: Any) -> Any:
    return n.linear(x) + n.far(x.repeat(1, 10))[:, :D]


@functools.singledispatch
def dispatched(x: Any) -> Any:
    return x


def advance(model: Any) -> None:
    next(model.items)


CHANGES: dict[str, Change] = {
    "an entry behind a proxy of a dict": (
        net(times(lambda n: n.table["scale"]), table=proxied),
        last_kept(lambda table: table.__setitem__("scale", 3.0)),
    ),
    "an attribute behind a weak reference": (
        net(times(lambda n: n.owner().scale), owner=referred),
        last_kept(lambda owner: setattr(owner, "scale", 3.0)),
    ),
    "an attribute behind a weak proxy": (
        net(times(lambda n: n.owner.scale), owner=proxy_to_module),
        last_kept(lambda owner: setattr(owner, "scale", 3.0)),
    ),
    "the dict of a bound method": (net(times(lambda n: n.get("scale")), get=bound), held("get")),
    "the list of a bound method": (
        net(times(lambda n: n.at(0)), at=lambda: [1.0].__getitem__),
        lambda model: model.at.__self__.__setitem__(0, 3.0),
    ),
    "the array of a bound method": (
        net(times(lambda n: float(n.sum())), sum=lambda: np.ones(1).sum),
        lambda model: model.sum.__self__.fill(3.0),
    ),
    "an attribute by an attrgetter": (
        net(
            times(lambda n: n.get(n.config)),
            get=lambda: operator.attrgetter("warmth"),
            config=lambda: SimpleNamespace(warmth=1.0),
        ),
        put("config.warmth", 3.0),
    ),
    "an attribute of an own object by an attrgetter": (
        net(
            times(lambda n: n.get(n)), get=lambda: operator.attrgetter("warmth"), warmth=lambda: 1.0
        ),
        put("warmth", 3.0),
    ),
    "a method by a methodcaller": (
        net(
            times(lambda n: n.call(n.kind)),
            call=lambda: operator.methodcaller("factor"),
            kind=lambda: Scale(1.0),
        ),
        factors(),
    ),
    "a variable of a thread": (
        net(times(lambda n: n.local.scale), local=local),
        put("local.scale", 3.0),
    ),
    "a variable of a context": (
        net(times(lambda n: LEVEL.get())),
        lambda model: LEVEL.set(3.0) and None,
    ),
    "a variable of the environment": (
        net(times(lambda n: float(os.environ.get("UNBATCH_GAIN", "1")))),
        lambda model: os.environ.__setitem__("UNBATCH_GAIN", "3"),
    ),
    "a flag of a thread's event": (
        net(times(lambda n: 3.0 if n.event.is_set() else 1.0), event=threading.Event),
        lambda model: model.event.set(),
    ),
    "a number of C": (
        net(times(lambda n: n.number.value), number=lambda: ctypes.c_double(1.0)),
        put("number.value", 3.0),
    ),
    "a structure of C": (
        net(times(lambda n: n.point.scale), point=lambda: Point(1.0)),
        put("point.scale", 3.0),
    ),
    "an array of C": (
        net(times(lambda n: n.numbers[0]), numbers=lambda: (ctypes.c_double * 2)(1.0, 1.0)),
        lambda model: model.numbers.__setitem__(0, 3.0),
    ),
    "bytes behind a memoryview": (
        net(times(lambda n: n.view[0]), view=lambda: memoryview(bytearray(b"\x01"))),
        lambda model: model.view.__setitem__(0, 3),
    ),
    "a global that a method of an enum reads": (
        net(times(lambda n: n.kind.factor()), kind=lambda: Kind.PLAIN),
        factors(),
    ),
    "an attribute of an enum": (
        net(times(lambda n: getattr(n.kind, "scale", 1.0)), kind=lambda: Marked.PLAIN),
        lambda model: setattr(Marked.PLAIN, "scale", 3.0),
    ),
    "a global that a method of a named tuple reads": (
        net(times(lambda n: n.pair.factor()), pair=Pair),
        factors(),
    ),
    "a global that a method of a float reads": (
        net(times(lambda n: n.scale.factor()), scale=lambda: Scale(1.0)),
        factors(),
    ),
    "a global that a property of a metaclass reads": (
        net(times(lambda n: n.kind.scale), kind=lambda: WithMeta),
        factors(),
    ),
    "a global that an overriding object reads": (
        net(lambda n, x: torch.mul(n.linear(x), n.duck), duck=Duck),
        factors(),
    ),
    "a global that a method of a tensor reads": (
        net(lambda n, x: n.linear(x) * n.own.scaled(), own=lambda: torch.ones(D).as_subclass(Own)),
        factors(),
    ),
    "a descriptor's own attribute": (
        net(times(lambda n: n.thing.factor), thing=Described),
        lambda model: setattr(vars(Described)["factor"], "scale", 3.0),
    ),
    "what an object delegates to": (
        net(times(lambda n: n.thing.scale), thing=Delegating),
        lambda model: model.thing.table.__setitem__("scale", 3.0),
    ),
    "a namespace nested twice": (
        net(times(lambda n: n.config.inner.inner.scale), config=lambda: nested(2)),
        put("config.inner.inner.scale", 3.0),
    ),
    "a namespace nested five times": (
        net(times(lambda n: deepest(n.config).scale), config=lambda: nested(5)),
        lambda model: setattr(deepest(model.config), "scale", 3.0),
    ),
    "an attribute of a Python module, by a name that is data": (
        net(times(lambda n: getattr(MODULE, n.key)), key=lambda: "GA" + "IN"),
        lambda model: setattr(MODULE, "GAIN", 3.0),
    ),
    "an entry of a Python module's namespace": (
        net(times(lambda n: vars(MODULE)[n.key]), key=lambda: "GA" + "IN"),
        lambda model: setattr(MODULE, "GAIN", 3.0),
    ),
    "an object in a Python module": (
        net(times(lambda n: MODULE.inner.GAIN)),
        lambda model: setattr(MODULE.inner, "GAIN", 3.0),
    ),
    "a global by a name that is data": (
        net(times(lambda n: globals()[n.key]), key=lambda: "GA" + "IN"),
        lambda model: gain(3.0),
    ),
    "a global by the table of modules": (
        net(times(lambda n: sys.modules[__name__].GAIN)),
        lambda model: gain(3.0),
    ),
    "a global in an expression that is text": (
        net(times(lambda n: eval(n.text)), text=lambda: "GA" + "IN * 1"),
        lambda model: gain(3.0),
    ),
    "a layered dict": (
        net(times(lambda n: n.table["scale"]), table=lambda: ChainMap({}, {"scale": 1.0})),
        lambda model: model.table.maps[1].__setitem__("scale", 3.0),
    ),
    "a dict of a class of the library": (
        net(times(lambda n: n.table["scale"]), table=lambda: UserDict(scale=1.0)),
        lambda model: model.table.__setitem__("scale", 3.0),
    ),
    "a list of a class of the library": (
        net(times(lambda n: n.items[0]), items=lambda: UserList([1.0])),
        lambda model: model.items.__setitem__(0, 3.0),
    ),
    "the default of a dict": (
        net(times(lambda n: n.table.default_factory()), table=lambda: defaultdict(lambda: 1.0)),
        lambda model: setattr(model.table, "default_factory", lambda: 3.0),
    ),
    "entry fifteen hundred of a list": (
        net(times(lambda n: n.items[1501]), items=lambda: [1.0] * 3000),
        lambda model: model.items.__setitem__(1501, 3.0),
    ),
    "entry fifteen hundred of a dict": (
        net(times(lambda n: n.table[1501]), table=lambda: dict.fromkeys(range(3000), 1.0)),
        lambda model: model.table.__setitem__(1501, 3.0),
    ),
    "one entry of a large array": (
        net(times(lambda n: float(n.array[1501])), array=lambda: np.ones(3000)),
        lambda model: model.array.__setitem__(1501, 3.0),
    ),
    "one entry of a large weight, through data": (
        net(wide, far=far_layers),
        lambda model: model.far.weight.data[3].__setitem__(5, 30.0),
    ),
    "an attribute of a parameter": (
        net(times(lambda n: getattr(n.linear.weight, "scale", 1.0))),
        tagged,
    ),
    "an attribute of a scripted module": (
        net(lambda n, x: n.part(n.linear(x)), part=scripted),
        lambda model: setattr(model.part, "scale", 3.0),
    ),
    "an iterator advanced": (
        net(times(lambda n: next(n.items)), items=lambda: iter([1.0, 3.0, 5.0] * 9)),
        advance,
    ),
    "a cycle advanced": (
        net(times(lambda n: next(n.items)), items=lambda: itertools.cycle([1.0, 3.0, 5.0])),
        advance,
    ),
    "a class registered for a dispatch": (
        net(lambda n, x: dispatched(n.linear(x))),
        lambda model: dispatched.register(torch.Tensor, lambda x: 3 * x) and None,
    ),
    "every third step, two steps on": (
        net(counting(lambda n: 3.0 if n.step % 3 == 0 else 1.0), step=lambda: 0),
        put("step", 2),
    ),
    "every hundredth step": (
        net(counting(lambda n: 3.0 if n.step % 100 == 0 else 1.0), step=lambda: 0),
        put("step", 99),
    ),
    "a history longer than five": (net(with_history, history=list), plain(6)),
    "a countdown": (net(counting_down, left=lambda: 5), plain(6)),
    "a temperature": (net(cooling, heat=lambda: 1.0), plain(30)),
    "a word that grows": (net(remembering, seen=dict), plain(6)),
    "a place in a ring": (net(filling, ring=lambda: 0), put("ring", 3)),
    "the law of a functional": (
        net(lambda n, x: F.softplus(n.linear(x), *n.args), args=lambda: (1.0, 20.0)),
        put("args", (3.0, 20.0)),
    ),
    "the flow of a layer list": (
        layers(lambda: nn.Linear(D, D), nn.Tanh),
        lambda m: m.reverse() if hasattr(m, "reverse") else m.insert(0, nn.Tanh()),
    ),
}

# Everything here keeps its value across cases but what a test puts back.
STATE = (FACTORS, KEEP)
