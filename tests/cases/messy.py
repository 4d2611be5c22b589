"""Programs that change this and that while they run: each makes a model and a loss, and names what
a question must leave as it was.

``keeps`` returns plain data: everything a case can change, all the way down.
"""

import array
import dataclasses
import io
import itertools
import random
import warnings
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cases.changes import SETTINGS, D, Net, Slotted
from unbatch.capture import switches

Case = tuple[Callable[[], nn.Module], Callable[[Any], Any]]


@dataclasses.dataclass
class Meter:
    """Counts what it is shown."""

    total: float = 0.0
    seen: list = dataclasses.field(default_factory=list)

    def update(self, value: float) -> None:
        self.total += value
        self.seen.append(value)


class Counted(nn.Linear):
    calls = 0

    def forward(self, x):
        type(self).calls += 1
        return super().forward(x)


class Adopting(nn.Linear):
    """Gives itself a layer, a buffer and a parameter while it runs."""

    def forward(self, x):
        if not hasattr(self, "extra"):
            self.extra = nn.Linear(D, D)
            self.register_buffer("late", torch.zeros(1))
            self.new = nn.Parameter(torch.zeros(1))
        return super().forward(x)


COUNT = 0
SEEN: list[int] = []


def counts_in_a_global(net: Net, x: Tensor) -> Tensor:
    global COUNT
    COUNT += 1
    SEEN.append(COUNT)
    return net.linear(x)


def makes_a_global(net: Net, x: Tensor) -> Tensor:
    global MADE
    MADE = x
    return net.linear(x)


def counter() -> tuple[Callable, Callable]:
    calls = 0

    def run(net, x):
        nonlocal calls
        calls += 1
        return net.linear(x)

    return run, lambda: calls


def after(act: Callable[[Net], Any]) -> Callable:
    """A program that does something beside its work."""

    def run(net, x):
        act(net)
        return net.linear(x)

    return run


def net(act: Callable[[Net], Any], **parts: Callable[[], Any]) -> Callable[[], nn.Module]:
    return lambda: Net(after(act), **{name: make() for name, make in parts.items()})


def part(name: str, see: Callable[[Any], Any] = lambda value: value) -> Callable[[Any], Any]:
    """What an attribute of the model holds, by the path to it."""

    def keeps(model):
        value = model
        for step in name.split("."):
            value = getattr(value, step)
        return id(value), see(value)

    return keeps


def first_line(file: Any) -> float:
    return float(file.readline())


def noise(read: Callable[[Net, Tensor], Any]) -> Callable:
    return lambda net, x: net.linear(x) * read(net, x)


def own(run: Callable, **parts: Callable[[], Any]) -> Callable[[], nn.Module]:
    return lambda: Net(run, **{name: make() for name, make in parts.items()})


def settings(_: Any) -> Any:
    return switches.all_settings()


def several(net: Net) -> None:
    torch.set_default_dtype(torch.float64)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.backends.cuda.enable_math_sdp(False)


def view_of_buffer() -> nn.Module:
    model = Net(after(lambda n: n.view.fill(3.0)), kept=nn.Buffer(torch.zeros(D)))
    model.view = model.kept.numpy()
    return model


RUN, CALLS = counter()

MESSY: dict[str, Case] = {
    # Arrays and containers.
    "an array": (
        net(lambda n: n.sums.__iadd__(1), sums=lambda: np.zeros(3)),
        part("sums", np.ndarray.tolist),
    ),
    "an array in a dict": (
        net(lambda n: n.table["x"].fill(2), table=lambda: {"x": np.zeros(3)}),
        part("table", lambda t: t["x"].tolist()),
    ),
    "an array of objects": (
        net(lambda n: n.sums.__setitem__(0, n), sums=lambda: np.array([None, 1], dtype=object)),
        part("sums", np.ndarray.tolist),
    ),
    "an array that is no whole": (
        net(lambda n: n.sums.__iadd__(1), sums=lambda: np.zeros((4, 4)).T[::2]),
        part("sums", np.ndarray.tolist),
    ),
    "a deque": (
        net(lambda n: n.queue.append(1), queue=lambda: deque([1, 2], 2)),
        part("queue", list),
    ),
    "a rotated deque": (
        net(lambda n: n.queue.rotate(), queue=lambda: deque([1, 2, 3])),
        part("queue", list),
    ),
    "a list in a tuple": (
        net(lambda n: n.pair[1].append(1), pair=lambda: (0, [])),
        part("pair", lambda p: list(p[1])),
    ),
    "a list in a tuple in a dict": (
        net(lambda n: n.table["x"][0].append(1), table=lambda: {"x": ([],)}),
        part("table", lambda t: list(t["x"][0])),
    ),
    "a set": (net(lambda n: n.seen.add(len(n.seen)), seen=set), part("seen", set)),
    "a counter": (net(lambda n: n.seen.update("ab"), seen=Counter), part("seen", dict)),
    "a dict with defaults": (
        net(lambda n: n.seen["new"].append(1), seen=lambda: defaultdict(list)),
        part("seen", dict),
    ),
    "the order of a dict": (
        net(lambda n: n.table.move_to_end("a"), table=lambda: OrderedDict(a=1, b=2)),
        part("table", list),
    ),
    "bytes": (
        net(lambda n: n.data.append(1), data=lambda: bytearray(b"x")),
        part("data", bytes),
    ),
    "an array of Python": (
        net(lambda n: n.data.append(1.0), data=lambda: array.array("d", [1.0])),
        part("data", list),
    ),
    "a list of lists": (
        net(lambda n: n.rows[0][0].append(1), rows=lambda: [[[]]]),
        part("rows", lambda r: list(r[0][0])),
    ),
    # Objects and classes.
    "a plain object": (
        net(lambda n: n.meter.update(1.0), meter=Meter),
        part("meter", lambda m: (m.total, list(m.seen))),
    ),
    "a namespace": (
        net(lambda n: setattr(n.config, "calls", 1), config=SimpleNamespace),
        part("config", lambda c: dict(vars(c))),
    ),
    "a slot": (
        net(lambda n: setattr(n.config, "scale", n.config.scale + 1), config=Slotted),
        part("config.scale"),
    ),
    "an object in a list": (
        net(lambda n: n.meters[0].update(1.0), meters=lambda: [Meter()]),
        part("meters", lambda m: (m[0].total, list(m[0].seen))),
    ),
    "a class": (lambda: Counted(D, D), lambda model: Counted.calls),
    "a module that gains parts": (
        lambda: Adopting(D, D),
        lambda model: (list(model._modules), list(model._buffers), list(model._parameters)),
    ),
    "an attribute taken away": (
        net(lambda n: n.__dict__.pop("once", None), once=lambda: 1),
        lambda model: dict(model.__dict__).keys(),
    ),
    "the class of an object": (
        net(lambda n: setattr(n.layer, "__class__", nn.Tanh), layer=nn.ReLU),
        lambda model: type(model.layer),
    ),
    "a module of Python": (
        net(lambda n: setattr(SETTINGS, "SCALE", 9.0)),
        lambda model: SETTINGS.SCALE,
    ),
    # Functions.
    "a global": (lambda: Net(counts_in_a_global), lambda model: (COUNT, list(SEEN))),
    "a global that was not there": (
        lambda: Net(makes_a_global),
        lambda model: "MADE" in globals(),
    ),
    "a variable of a closure": (lambda: Net(RUN), lambda model: CALLS()),
    "an attribute of a function": (
        net(lambda n: setattr(RUN, "calls", 1)),
        lambda model: dict(vars(RUN)),
    ),
    "a default": (
        lambda: Net(lambda n, x, seen=[]: n.linear(x) * (1 + 0 * len(seen.append(1) or seen))),
        lambda model: list(model.run.__defaults__[0]),
    ),
    # Settings.
    "default type": (net(lambda n: torch.set_default_dtype(torch.float64)), settings),
    "determinism": (net(lambda n: torch.use_deterministic_algorithms(True)), settings),
    "several settings": (net(several), settings),
    "autocast": (net(lambda n: torch.set_autocast_dtype("cpu", torch.float16)), settings),
    "filters of warnings": (net(lambda n: warnings.simplefilter("ignore")), settings),
    "errors of numpy": (net(lambda n: np.seterr(all="ignore")), settings),
    "a hook on all modules": (
        net(lambda n: nn.modules.module.register_module_forward_hook(print_nothing)),
        lambda model: list(nn.modules.module._global_forward_hooks),
    ),
    # Random numbers.
    "a generator": (
        own(
            noise(lambda n, x: torch.rand(x.shape, generator=n.generator)),
            generator=lambda: torch.Generator().manual_seed(1),
        ),
        part("generator", lambda g: g.get_state().tolist()),
    ),
    "a generator in a list": (
        own(
            noise(lambda n, x: torch.rand(x.shape, generator=n.all[0])),
            all=lambda: [torch.Generator().manual_seed(1)],
        ),
        part("all", lambda a: a[0].get_state().tolist()),
    ),
    "a generator of Python": (
        own(noise(lambda n, x: n.random.random()), random=lambda: random.Random(1)),
        part("random", random.Random.getstate),
    ),
    "a generator of numpy": (
        own(noise(lambda n, x: n.random.random()), random=lambda: np.random.default_rng(1)),
        part("random", lambda g: g.bit_generator.state),
    ),
    "an old generator of numpy": (
        own(noise(lambda n, x: n.random.rand()), random=lambda: np.random.RandomState(1)),
        part("random", lambda g: [*g.get_state()[1].tolist(), g.get_state()[2]]),
    ),
    # Memory that others write to.
    "a buffer, through numpy": (
        net(lambda n: n.kept.numpy().fill(3.0), kept=lambda: nn.Buffer(torch.zeros(D))),
        part("kept", Tensor.tolist),
    ),
    "a weight, through numpy": (
        net(lambda n: n.linear.weight.detach().numpy().__imul__(2)),
        part("linear.weight", Tensor.tolist),
    ),
    "a buffer, through a view kept": (view_of_buffer, part("kept", Tensor.tolist)),
    "a tensor in a list": (
        net(lambda n: n.kept[0].add_(1), kept=lambda: [torch.zeros(D)]),
        part("kept", lambda k: k[0].tolist()),
    ),
    "a flag of a tensor in a list": (
        net(lambda n: n.kept[0].requires_grad_(), kept=lambda: [torch.zeros(D)]),
        part("kept", lambda k: k[0].requires_grad),
    ),
    # What is used up.
    "an iterator over a list": (
        own(noise(lambda n, x: next(n.items)), items=lambda: iter([1.0] * 99)),
        part("items", lambda i: i.__length_hint__()),
    ),
    "a count": (
        own(noise(lambda n, x: 1 + 0 * next(n.items)), items=itertools.count),
        part("items", repr),
    ),
    "a cycle": (
        own(noise(lambda n, x: next(n.items)), items=lambda: itertools.cycle([1.0, 1.0])),
        part("items", lambda i: None),
    ),
    "a file": (
        own(noise(lambda n, x: first_line(n.file)), file=lambda: io.StringIO("1\n" * 99)),
        part("file", lambda f: f.tell()),
    ),
}


def print_nothing(m: nn.Module, i: Any, o: Any) -> None:
    return None


def endless() -> Any:
    while True:
        yield 1.0


# What a question refuses in words, before it runs further than to there.
REFUSED: dict[str, Case] = {
    "a generator function": (
        own(noise(lambda n, x: next(n.items)), items=endless),
        part("items", lambda i: i.gi_frame.f_lasti),
    ),
    "a map": (
        own(noise(lambda n, x: next(n.items)), items=lambda: map(float, [1, 2, 3])),
        part("items", lambda i: list(i)),
    ),
    "a generator in a list": (
        own(noise(lambda n, x: next(n.items[0])), items=lambda: [endless()]),
        part("items", lambda i: i[0].gi_frame.f_lasti),
    ),
}
