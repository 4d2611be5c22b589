"""More programs of the kinds that the third hunt found, by the place that is changed.

`CHANGES` and `MESSY` are as in `third_changes.py` and `third_messy.py`.
"""

import concurrent.futures
import contextlib
import csv
import random
import threading
from collections import Counter, OrderedDict, deque
from multiprocessing.pool import ThreadPool
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cases.changes import Change, D, Net, layers, net, put, squares
from cases.hunt import third_settings
from cases.hunt.changes import times
from cases.hunt.third_changes import patched
from cases.messy import Case, own, part
from cases.messy import net as messy_net

MADE: list[int] = []


def sparse(layout: torch.layout) -> Any:
    sizes = {"blocksize": (2, 2)} if layout in (torch.sparse_bsr, torch.sparse_bsc) else {}
    return lambda: nn.Buffer(torch.eye(D).to_sparse(layout=layout, **sizes))


def dense(t: Tensor) -> Any:
    return t.to_dense().tolist()


def propagated(n: Any, x: Tensor) -> Tensor:
    return (n.kept @ n.linear(x).T).T


def listed(n: Any, x: Tensor) -> Tensor:
    return torch.sparse.mm(n.kept[0], n.linear(x).T).T


def in_inference() -> Any:
    with torch.inference_mode():
        return [torch.ones(D)]


def write_in_inference(model: Any) -> None:
    with torch.inference_mode():
        model.kept[0].fill_(3.0)


# --- objects --------------------------------------------------------------------------------------


class Grandparent:
    def factor(self) -> float:
        return 1.0


class Parent(Grandparent):
    pass


class Child(Parent):
    pass


class Bare:
    """Has what it is given."""


class Rows(list):
    """A list that may be given attributes."""


class Defaulting(nn.Linear):
    """A layer with a default for settings that it has not got."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith(("_", "weight", "bias")):
            return super().__getattr__(name)
        return 1.0


def forgiving(read: Any) -> Any:
    """Read what may not be there, without any text that names it."""

    def factor(n: Any) -> Any:
        try:
            return read(n)
        except AttributeError:
            return 1.0

    return times(factor)


def suppressing(n: Any, x: Tensor) -> Tensor:
    h = n.linear(x)
    with contextlib.suppress(AttributeError):
        h = h * n.config.scale
    return h


class Late:
    """Says so where it is asked for what it has not got."""

    __slots__ = ("scale",)

    def __getattr__(self, name: str) -> Any:
        raise LookupError(name)


class Noisy(list):
    """A list that notes whoever looks at it."""

    looks = 0

    def __iter__(self) -> Any:
        type(self).looks += 1
        return super().__iter__()

    def __len__(self) -> int:
        type(self).looks += 1
        return super().__len__()

    def extend(self, items: Any) -> None:
        raise TypeError("one by one")


class Ordered(OrderedDict):
    def __setitem__(self, name: Any, value: Any) -> None:
        super().__setitem__(name, value)
        self.move_to_end(name, last=False)


class Locked(set):
    def clear(self) -> None:
        raise TypeError("what is in it stays")


class Ring(deque):
    def clear(self) -> None:
        raise TypeError("what is in it stays")


class Spied(dict):
    def items(self) -> Any:
        raise TypeError("ask for one at a time")

    values = keys = items


class Dice(random.Random):
    """Has a state of its own that nobody may see."""

    def getstate(self) -> Any:
        raise NotImplementedError

    def setstate(self, state: Any) -> None:
        raise NotImplementedError


class Made:
    def __init__(self) -> None:
        MADE.append(1)


class Factory:
    kind = Made


class Named:
    def __init__(self) -> None:
        self.suffix = ""

    def __repr__(self) -> str:
        return "plain" + self.suffix


FACTORS = {"plain": 1.0, "plain-b": 3.0}


class Placed:
    __match_args__ = ("near", "far")

    def __init__(self) -> None:
        self.near = self.far = 1.0


def second(n: Any, x: Tensor) -> Tensor:
    match n.place:
        case Placed(_, far):
            return n.linear(x) * far
    return n.linear(x)


def nested(n: Any, x: Tensor) -> Tensor:
    match [n.place]:
        case [Placed(near=factor)]:
            return n.linear(x) * factor
    return n.linear(x)


def caches_result(n: Any) -> None:
    kind = type(n.place)
    try:
        kind.cached  # noqa: B018
    except AttributeError:
        kind.cached = 1.0


def forgets(model: Any) -> Any:
    present = "cached" in vars(Placed)
    if present:
        del Placed.cached  # type: ignore[attr-defined]
    return present


def shadows() -> Any:
    model = Net(lambda n, x: n.linear(x) * n.scales[n.kept], kept=nn.Buffer(torch.ones(D)))
    model.scales = {model.kept: 1.0, model.linear.bias: 2.0}
    return model, squares


def forgets_key(n: Any) -> None:
    value = n.uses.pop(n.linear.weight)
    n.uses[n.linear.weight] = value


def by_order() -> nn.Module:
    model = messy_net(forgets_key)()
    model.uses = dict.fromkeys(model.parameters(), 0)
    return model


def order(model: Any) -> Any:
    return list(map(id, model.uses))


# --- threads --------------------------------------------------------------------------------------


def by_timer(n: Any) -> None:
    timer = threading.Timer(0.0, lambda: n.kept.add_(1))
    timer.start()
    timer.join()


def by_pool(n: Any) -> None:
    with ThreadPool(1) as pool:
        pool.map(n.kept.add_, [torch.ones(D)])


class Worker(threading.Thread):
    def __init__(self, tensor: Tensor) -> None:
        super().__init__()
        self.tensor = tensor

    def run(self) -> None:
        self.tensor.mul_(2.0)


def by_worker(n: Any) -> None:
    worker = Worker(n.kept)
    worker.start()
    worker.join()


def by_own_pool(n: Any) -> None:
    n.pool.submit(n.kept.add_, 1).result()


# --- memory ---------------------------------------------------------------------------------------


def frees_at_last(n: Any) -> None:
    n.kept.untyped_storage().resize_(0)


def shown(t: Tensor) -> Any:
    return (
        t.stride(),
        t.untyped_storage().nbytes(),
        t.tolist() if t.untyped_storage().nbytes() else 0,
    )


def rows() -> Any:
    return nn.Buffer(torch.arange(16.0).reshape(D, D))


def gelu(x: Tensor, approximate: str = "none") -> Tensor:
    return x * 3


CHANGES: dict[str, Change] = {
    "the values of sparse rows": (
        net(propagated, kept=sparse(torch.sparse_csr)),
        lambda model: model.kept.values().mul_(3),
    ),
    "the values of sparse columns": (
        net(propagated, kept=sparse(torch.sparse_csc)),
        lambda model: model.kept.values().mul_(3),
    ),
    "a sparse tensor in a list": (
        net(listed, kept=lambda: [torch.eye(D).to_sparse()]),
        lambda model: model.kept[0]._values().mul_(3),
    ),
    "places of a sparse buffer": (
        net(propagated, kept=sparse(torch.sparse_coo)),
        lambda model: model.kept._indices()[1].copy_(torch.arange(D).flip(0)),
    ),
    "a tensor made in inference mode, written to": (
        net(lambda n, x: n.linear(x) + n.kept[0], kept=in_inference),
        write_in_inference,
    ),
    "a buffer marked as negative": (
        net(
            lambda n, x: n.linear(x) * n.kept,
            kept=lambda: nn.Buffer(torch.exp(1j * torch.arange(D)).conj().imag),
        ),
        lambda model: model.kept.mul_(3),
    ),
    "a number by buffer": (shadows, lambda model: model.scales.update({model.kept: 3.0})),
    "a method given to a class between": (
        net(times(lambda n: n.child.factor()), child=Child),
        patched(Parent, "factor", lambda self: 3.0),
    ),
    "a number given to a base": (
        net(times(lambda n: getattr(n.child, "extra", 1.0)), child=Child),
        patched(Grandparent, "extra", 3.0),
    ),
    "a flag given to a file": (
        net(times(lambda n: 3.0 if hasattr(third_settings, "FAST") else 1.0)),
        patched(third_settings, "FAST", True),
    ),
    "an attribute of an item, asked forgiveness for": (
        net(forgiving(lambda n: n.kept[0].scale), kept=lambda: [Bare()]),
        lambda model: setattr(model.kept[0], "scale", 3.0),
    ),
    "an attribute asked for where errors are suppressed": (
        net(suppressing, config=Bare),
        put("config.scale", 3.0),
    ),
    "an attribute that a layer has a default for": (
        net(times(lambda n: n.layer.warmth), layer=lambda: Defaulting(D, D)),
        put("layer.warmth", 3.0),
    ),
    "an attribute of a list of one's own": (
        net(forgiving(lambda n: n.kept.scale), kept=Rows),
        put("kept.scale", 3.0),
    ),
    "a method that an object is given": (
        net(forgiving(lambda n: n.config.factor()), config=Bare),
        put("config.factor", lambda: 3.0),
    ),
    "an attribute of a namespace, asked forgiveness for": (
        net(forgiving(lambda n: n.config.scale), config=SimpleNamespace),
        put("config.scale", 3.0),
    ),
    "an attribute of a layer, asked forgiveness for": (
        net(forgiving(lambda n: n.linear.gain)),
        put("linear.gain", 3.0),
    ),
    "an attribute of a parameter, asked forgiveness for": (
        net(forgiving(lambda n: n.linear.weight.gain)),
        put("linear.weight.gain", 3.0),
    ),
    "an attribute of a function, asked forgiveness for": (
        net(forgiving(lambda n: n.call.scale), call=lambda: lambda: None),
        put("call.scale", 3.0),
    ),
    "a slot that is filled later": (
        net(times(lambda n: 3.0 if n.filled() else 1.0), late=Late, filled=lambda: lambda: False),
        put("filled", lambda: True),
    ),
    "an item of a list that notes looks": (
        net(times(lambda n: n.kept[0]), kept=lambda: Noisy([1.0])),
        lambda model: model.kept.__setitem__(0, 3.0),
    ),
    "an entry of a dict with an order of its own": (
        net(times(lambda n: n.kept["a"]), kept=lambda: Ordered(a=1.0, b=1.0)),
        lambda model: model.kept.update(a=3.0),
    ),
    "an entry of a dict that lists nothing": (
        net(times(lambda n: n.kept["a"]), kept=lambda: Spied(a=1.0)),
        lambda model: model.kept.__setitem__("a", 3.0),
    ),
    "an attribute in a pattern, at the second place": (
        net(second, place=Placed),
        put("place.far", 3.0),
    ),
    "an attribute in a pattern inside another": (net(nested, place=Placed), put("place.near", 3.0)),
    "what an object is printed as": (
        net(times(lambda n: FACTORS[repr(n.named)]), named=Named),
        put("named.suffix", "-b"),
    ),
    "what an object is converted to": (
        net(times(lambda n: FACTORS[f"{n.named!r}"]), named=Named),
        put("named.suffix", "-b"),
    ),
    "a function of PyTorch that the model calls": (
        net(lambda n, x: F.gelu(n.linear(x))),
        patched(F, "gelu", gelu),
    ),
    "a function of Python that a layer calls": (
        layers(lambda: nn.Linear(D, D), lambda: nn.Softmax(-1)),
        patched(F, "softmax", lambda x, *args, **kwargs: x * 3),
    ),
    "a method of all tensors, taken over": (
        net(lambda n, x: n.linear(x).mul(2.0)),
        patched(Tensor, "mul", lambda self, other: self * 6.0),
    ),
    "the call of all layers": (
        net(lambda n, x: n.linear(x)),
        patched(nn.Linear, "__call__", lambda self, x: self.forward(x) * 3),
    ),
}

MESSY: dict[str, Case] = {
    "a buffer of sparse columns": (
        messy_net(lambda n: n.kept.values().mul_(2), kept=sparse(torch.sparse_csc)),
        part("kept", dense),
    ),
    "a buffer of sparse blocks": (
        messy_net(lambda n: n.kept.values().mul_(2), kept=sparse(torch.sparse_bsr)),
        part("kept", dense),
    ),
    "sparse rows, multiplied": (
        messy_net(lambda n: n.kept.mul_(2), kept=sparse(torch.sparse_csr)),
        part("kept", dense),
    ),
    "a sparse buffer with more entries": (
        messy_net(
            lambda n: n.kept.add_(torch.ones(D, D).to_sparse()), kept=sparse(torch.sparse_coo)
        ),
        part("kept", dense),
    ),
    "a sparse buffer emptied": (
        messy_net(lambda n: n.kept.zero_(), kept=sparse(torch.sparse_coo)),
        part("kept", lambda t: (dense(t), t._nnz())),
    ),
    "a buffer of another library": (
        messy_net(lambda n: None, kept=lambda: nn.Buffer(torch.ones(D, D).to_mkldnn())),
        part("kept", dense),
    ),
    "a buffer transposed": (messy_net(lambda n: n.kept.t_(), kept=rows), part("kept", shown)),
    "a buffer with other strides": (
        messy_net(lambda n: n.kept.as_strided_((D, D), (0, 1)), kept=rows),
        part("kept", shown),
    ),
    "a buffer freed": (messy_net(frees_at_last, kept=rows), part("kept", shown)),
    "a buffer written to by a timer": (messy_net(by_timer, kept=rows), part("kept", shown)),
    "a buffer written to in another pool": (messy_net(by_pool, kept=rows), part("kept", shown)),
    "a buffer written to by a worker": (messy_net(by_worker, kept=rows), part("kept", shown)),
    "a buffer written to in a pool of one's own": (
        messy_net(by_own_pool, kept=rows, pool=lambda: concurrent.futures.ThreadPoolExecutor(1)),
        part("kept", shown),
    ),
    "the order of a dict by parameter": (by_order, order),
    "a list that notes looks": (
        messy_net(lambda n: n.kept.append(1), kept=lambda: Noisy([0])),
        part("kept", lambda kept: (Noisy.looks, list.copy(kept))),
    ),
    "a set that keeps what is in it": (
        messy_net(lambda n: n.kept.add(1), kept=lambda: Locked([0])),
        part("kept", set),
    ),
    "a deque that keeps what is in it": (
        messy_net(lambda n: n.kept.append(1), kept=lambda: Ring([0])),
        part("kept", list),
    ),
    "a dict with an order of its own": (
        messy_net(lambda n: n.kept.update(c=1), kept=lambda: Ordered(a=1, b=2)),
        part("kept", lambda kept: list(OrderedDict.items(kept))),
    ),
    "a count of a letter": (
        messy_net(lambda n: n.kept.update(["b"]), kept=lambda: Counter("a")),
        part("kept", lambda kept: list(kept.items())),
    ),
    "a slot that is filled": (
        messy_net(lambda n: setattr(n.kept, "scale", 1.0), kept=Late),
        part("kept", lambda kept: vars(Late)["scale"].__get__(kept) if filled(kept) else None),
    ),
    "a number that a class is given": (messy_net(caches_result, place=Placed), forgets),
    "a mock that is called": (
        messy_net(lambda n: n.kept(1), kept=Mock),
        part("kept", lambda kept: kept.call_count),
    ),
    "rows of a table": (
        messy_net(lambda n: next(n.kept), kept=lambda: csv.reader(["a,b", "1,2"])),
        part("kept", lambda kept: kept.line_num),
    ),
    "dice without a state": (
        own(lambda n, x: n.linear(x) * n.kept.random(), kept=lambda: Dice(1)),
        part("kept", random.Random.getstate),
    ),
    "bits of another generator": (
        own(
            lambda n, x: n.linear(x) * float(np.random.Generator(n.kept).random()),
            kept=lambda: np.random.Philox(1),
        ),
        part("kept", lambda bits: str(bits.state)),
    ),
    "seeds in a list": (
        messy_net(lambda n: n.kept[0].spawn(2), kept=lambda: [np.random.SeedSequence(1)]),
        part("kept", lambda kept: kept[0].n_children_spawned),
    ),
    "an array that gets locked": (
        messy_net(lambda n: n.kept.setflags(write=False), kept=lambda: np.zeros(3)),
        part("kept", lambda array: array.flags.writeable),
    ),
    "the shape of an array": (
        messy_net(lambda n: n.kept.resize((1, 4), refcheck=False), kept=lambda: np.arange(4.0)),
        part("kept", lambda array: (array.shape, array.tolist())),
    ),
    "a list of all objects of a class of a class": (
        messy_net(lambda n: n.kept.kind(), kept=Factory),
        lambda model: len(MADE),
    ),
}


def filled(late: Late) -> bool:
    try:
        vars(Late)["scale"].__get__(late)
    except AttributeError:
        return False
    return True
