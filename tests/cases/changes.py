"""Changes of a program between two questions: each makes a model and a loss, and says what then
changes about them.

A change is a pair: a function that makes ``(model, loss)`` and one that changes the model.
"""

import dataclasses
import enum
import functools
import types
from collections import OrderedDict, deque, namedtuple
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

N, D = 6, 4

Change = tuple[Callable[[], Any], Callable[[Any], Any]]


class Net(nn.Module):
    """A linear layer, and what the case does with it."""

    def __init__(self, run: Callable, **parts: Any):
        super().__init__()
        self.linear, self.run = nn.Linear(D, D), run
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


def squares(output: Tensor, target: Tensor) -> Tensor:
    return (output - target).square().mean()


def net(run: Callable, **parts: Callable[[], Any]) -> Callable[[], Any]:
    """Make a net with fresh parts."""
    return lambda: (Net(run, **{name: make() for name, make in parts.items()}), squares)


def layers(*make: Callable[[], nn.Module]) -> Callable[[], Any]:
    return lambda: (nn.Sequential(*[m() for m in make]), squares)


# --- what the programs are made of ----------------------------------------------------------------


@dataclasses.dataclass
class Config:
    scale: float = 1.0
    inner: Any = None


@dataclasses.dataclass(frozen=True)
class Frozen:
    scale: float = 1.0


class Slotted:
    __slots__ = ("scale",)

    def __init__(self):
        self.scale = 1.0


class Mode(enum.Enum):
    PLAIN = 1
    DOUBLE = 2


class Scales:
    scale = 1.0

    @staticmethod
    def of_samples() -> float:
        return 1.0


class Schedule:
    """An object with methods, one of which the program calls."""

    def __init__(self):
        self.step = 1

    def factor(self) -> float:
        return 1.0 / self.step

    def __call__(self, x: Tensor) -> Tensor:
        return x * self.factor()


class Doubling(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


class Attributed(nn.Linear):
    gain = 1.0

    def forward(self, x: Tensor) -> Tensor:
        return self.shaped(super().forward(x)) * self.gain

    def shaped(self, x: Tensor) -> Tensor:
        return x


SETTINGS = types.ModuleType("settings")
SETTINGS.SCALE = 1.0  # type: ignore[attr-defined]
SETTINGS.scaled = lambda x: x  # type: ignore[attr-defined]
TABLE = {"scale": 1.0}
GAIN = 1.0
Pair = namedtuple("Pair", ["tensor", "scales"])


def read_global(net: Net, x: Tensor) -> Tensor:
    return net.linear(x) * GAIN


def set_global(name: str, value: Any) -> None:
    globals()[name] = value


def in_closure() -> Any:
    scale = 1.0

    def run(net, x):
        return net.linear(x) * scale

    def change() -> None:
        nonlocal scale
        scale = 3.0

    model = Net(run)
    object.__setattr__(model, "change", change)
    return model, squares


def with_default(net: Net, x: Tensor, scale: float = 1.0, *, shift: float = 0.0) -> Tensor:
    return net.linear(x) * scale + shift


def looked_up(net: Net, x: Tensor) -> Tensor:
    return net.linear(x) * getattr(net, "sca" + "le")


def own_default() -> Any:
    def run(net, x, scale=1.0, *, shift=0.0):
        return net.linear(x) * scale + shift

    return Net(run), squares


def weighted_loss() -> Any:
    weights = [1.0]

    def loss(output, target):
        return squares(output, target) * weights[0]

    loss.weights = weights
    return nn.Linear(D, D), loss


class Loss:
    def __init__(self):
        self.config = Config()

    def __call__(self, output, target):
        return squares(output, target) * self.config.scale


def lambdas(value: float) -> Callable:
    return lambda x: x * value


@functools.cache
def cached(x: int) -> int:
    return x * TABLE_OF_CACHED[0]


TABLE_OF_CACHED = [1]


def put(name: str, value: Any) -> Callable[[Any], None]:
    """Set an attribute, ``a.b.c``, of the model."""
    path, _, last = name.rpartition(".")

    def change(model):
        owner = model
        for part in path.split(".") if path else ():
            owner = owner[int(part)] if part.isdigit() else getattr(owner, part)
        setattr(owner, last, value)

    return change


def on_layer(**kind: Any) -> Callable[[], Any]:
    return layers(lambda: nn.Unflatten(1, (1, D)), lambda: nn.Conv1d(1, 1, 2, **kind), nn.Flatten)


def conv(net: Net, x: Tensor) -> Tensor:
    return net.linear(F.pad(net.conv(x[:, None])[:, 0], (0, D))[:, :D])


def conv1d() -> nn.Module:
    return nn.Conv1d(1, 1, 2, padding=2)


def hooked() -> Any:
    model = nn.Sequential(nn.Linear(D, D), nn.Tanh())
    model.handle = model[0].register_forward_hook(lambda m, i, o: o * 2)
    return model, squares


def exchange_hook(model: nn.Module) -> None:
    model.handle.remove()
    model[0].register_forward_hook(lambda m, i, o: o * 3)


def double_weight(model: nn.Module) -> None:
    class Double(nn.Module):
        def forward(self, w):
            return 2 * w

    parametrize.register_parametrization(model[0], "weight", Double())


def assign(model: nn.Module) -> None:
    other = {name: 2 * t for name, t in model.state_dict().items()}
    model.load_state_dict(other, assign=True)


def times(read: Callable[[Net], Any]) -> Callable:
    """A program that multiplies by what it reads."""
    return lambda net, x: net.linear(x) * read(net)


CHANGES: dict[str, Change] = {
    # Objects of the user.
    "an attribute of a dataclass": (
        net(times(lambda n: n.config.scale), config=Config),
        put("config.scale", 3.0),
    ),
    "an attribute of an object inside an object": (
        net(times(lambda n: n.config.inner.scale), config=lambda: Config(1.0, Config())),
        put("config.inner.scale", 3.0),
    ),
    "an attribute of a namespace": (
        net(times(lambda n: n.config.scale), config=lambda: SimpleNamespace(scale=1.0)),
        put("config.scale", 3.0),
    ),
    "a slot": (net(times(lambda n: n.config.scale), config=Slotted), put("config.scale", 3.0)),
    "a frozen dataclass, replaced": (
        net(times(lambda n: n.config.scale), config=Frozen),
        put("config", Frozen(3.0)),
    ),
    "a frozen dataclass, forced": (
        net(times(lambda n: n.config.scale), config=Frozen),
        lambda model: object.__setattr__(model.config, "scale", 3.0),
    ),
    "an attribute that a method of an object reads": (
        net(lambda n, x: n.linear(x) * n.schedule.factor(), schedule=Schedule),
        put("schedule.step", 4),
    ),
    "an attribute of a callable": (
        net(lambda n, x: n.schedule(n.linear(x)), schedule=Schedule),
        put("schedule.step", 4),
    ),
    "an attribute that is looked up by name": (
        net(looked_up, scale=lambda: 1.0),
        put("scale", 3.0),
    ),
    "an attribute behind a property": (
        lambda: (Behind(), squares),
        put("_scale", 3.0),
    ),
    "an attribute that was not there": (
        net(times(lambda n: getattr(n, "extra", 1.0))),
        put("extra", 3.0),
    ),
    "an attribute taken away": (
        net(times(lambda n: getattr(n, "extra", 1.0)), extra=lambda: 3.0),
        lambda model: delattr(model, "extra"),
    ),
    # Classes.
    "an attribute of a class": (
        lambda: (Attributed(D, D), squares),
        lambda model: setattr(type(model), "gain", 3.0),
    ),
    "an attribute that hides that of the class": (
        lambda: (Attributed(D, D), squares),
        put("gain", 3.0),
    ),
    "a method of a class": (
        lambda: (Attributed(D, D), squares),
        lambda model: setattr(type(model), "shaped", lambda self, x: x * 3),
    ),
    "a method of an object": (
        lambda: (Attributed(D, D), squares),
        put("shaped", lambda x: x * 3),
    ),
    "forward of one module": (
        layers(lambda: nn.Linear(D, D), Doubling),
        put("1.forward", lambda x: x * 3),
    ),
    "forward of a class": (
        layers(lambda: nn.Linear(D, D), Doubling),
        lambda model: setattr(Doubling, "forward", lambda self, x: x * 3),
    ),
    "a static method": (
        net(times(lambda n: Scales.of_samples())),
        lambda model: setattr(Scales, "of_samples", staticmethod(lambda: 3.0)),
    ),
    "an attribute of a class that a global names": (
        net(times(lambda n: Scales.scale)),
        lambda model: setattr(Scales, "scale", 3.0),
    ),
    "the class of a module": (
        layers(lambda: nn.Linear(D, D), nn.Tanh),
        lambda model: setattr(model[1], "__class__", nn.Sigmoid),
    ),
    # Numbers, enums and types.
    "an enum": (
        net(times(lambda n: 1.0 if n.mode is Mode.PLAIN else 2.0), mode=lambda: Mode.PLAIN),
        put("mode", Mode.DOUBLE),
    ),
    "a type of numbers": (
        net(lambda n, x: n.linear(x).to(n.type).to(x.dtype), type=lambda: torch.float64),
        put("type", torch.float16),
    ),
    "a tuple": (
        net(times(lambda n: n.scales[1]), scales=lambda: (1.0, 1.0)),
        put("scales", (1, 3.0)),
    ),
    "a complex number": (
        net(times(lambda n: abs(n.z)), z=lambda: 1 + 0j),
        put("z", 3 + 4j),
    ),
    "a number of numpy": (
        net(times(lambda n: float(n.scale)), scale=lambda: np.float64(1)),
        put("scale", np.float64(3)),
    ),
    "a slice": (
        net(lambda n, x: F.pad(n.linear(x)[:, n.part], (0, 2))[:, :D], part=lambda: slice(0, 2)),
        put("part", slice(1, 3)),
    ),
    # Containers.
    "an entry of a dict": (
        net(times(lambda n: n.table["scale"]), table=lambda: {"scale": 1.0}),
        lambda model: model.table.update(scale=3.0),
    ),
    "entry nine of a dict": (
        net(times(lambda n: n.table[9]), table=lambda: dict.fromkeys(range(12), 1.0)),
        lambda model: model.table.update({9: 3.0}),
    ),
    "entry nine hundred of a list": (
        net(times(lambda n: n.scales[900]), scales=lambda: [1.0] * 1000),
        lambda model: model.scales.__setitem__(900, 3.0),
    ),
    "a list appended to": (
        net(times(lambda n: float(len(n.scales))), scales=lambda: [1.0] * 20),
        lambda model: model.scales.append(3.0),
    ),
    "a list replaced": (
        net(times(lambda n: n.scales[0]), scales=lambda: [1.0]),
        put("scales", [3.0]),
    ),
    "an item of a deque": (
        net(times(lambda n: n.queue[0]), queue=lambda: deque([1.0], 3)),
        lambda model: model.queue.appendleft(3.0),
    ),
    "an element of a set": (
        net(times(lambda n: 3.0 if "more" in n.flags else 1.0), flags=lambda: {"less"}),
        lambda model: model.flags.add("more"),
    ),
    "a list in a tuple": (
        net(times(lambda n: n.pair[1][0]), pair=lambda: (0, [1.0])),
        lambda model: model.pair[1].__setitem__(0, 3.0),
    ),
    "a list in a named tuple in a dict": (
        net(times(lambda n: n.table["x"].scales[0]), table=lambda: {"x": Pair(None, [1.0])}),
        lambda model: model.table["x"].scales.__setitem__(0, 3.0),
    ),
    "the order of a dict": (
        net(times(lambda n: next(iter(n.table.values()))), table=lambda: OrderedDict(a=1.0, b=3.0)),
        lambda model: model.table.move_to_end("a"),
    ),
    "bytes": (
        net(times(lambda n: float(n.data[0])), data=lambda: bytearray(b"\1")),
        lambda model: model.data.__setitem__(0, 3),
    ),
    # Arrays and tensors.
    "an array of numpy": (
        net(times(lambda n: float(n.scales[0])), scales=lambda: np.ones(3)),
        lambda model: model.scales.__setitem__(0, 3.0),
    ),
    "an array of objects": (
        net(times(lambda n: n.scales[0]), scales=lambda: np.array([1.0, None], dtype=object)),
        lambda model: model.scales.__setitem__(0, 3.0),
    ),
    "an array made a tensor": (
        net(times(lambda n: torch.from_numpy(n.scales)), scales=lambda: np.ones(D, np.float32)),
        lambda model: model.scales.__setitem__(0, 3.0),
    ),
    "a tensor in a list": (
        net(times(lambda n: n.tensors[0]), tensors=lambda: [torch.ones(1)]),
        lambda model: model.tensors[0].mul_(3),
    ),
    "a tensor in a list, replaced": (
        net(times(lambda n: n.tensors[0]), tensors=lambda: [torch.ones(1)]),
        lambda model: model.tensors.__setitem__(0, torch.full((1,), 3.0)),
    ),
    "a tensor in a dict, through numpy": (
        net(times(lambda n: n.tensors["x"]), tensors=lambda: {"x": torch.ones(D)}),
        lambda model: model.tensors["x"].numpy().fill(3.0),
    ),
    "one entry of a tensor, through numpy": (
        net(times(lambda n: n.config.inner), config=lambda: Config(1.0, torch.ones(D))),
        lambda model: model.config.inner.numpy().__setitem__(2, 3.0),
    ),
    "the data of a tensor": (
        net(times(lambda n: n.tensor), tensor=lambda: torch.ones(D)),
        lambda model: setattr(model.tensor, "data", torch.full((D,), 3.0)),
    ),
    "one entry of a weight, through numpy": (
        layers(lambda: nn.Linear(D, D)),
        lambda model: model[0].weight.detach().numpy().__setitem__((2, 1), 9.0),
    ),
    "a weight, through data": (
        layers(lambda: nn.Linear(D, D)),
        lambda model: model[0].weight.data[1].mul_(3),
    ),
    # Code.
    "a closure": (in_closure, lambda model: model.change()),
    "a default": (own_default, lambda model: setattr(model.run, "__defaults__", (3.0,))),
    "a default by name": (
        own_default,
        lambda model: model.run.__kwdefaults__.update(shift=3.0),
    ),
    "the code of a function": (
        lambda: (Net(types.FunctionType(read_global.__code__, globals())), squares),
        lambda model: (
            setattr(model.run, "__code__", with_default.__code__)
            or setattr(model.run, "__defaults__", (3.0,))
            or setattr(model.run, "__kwdefaults__", {"shift": 0.0})
        ),
    ),
    "a global": (net(read_global), lambda model: set_global("GAIN", 3.0)),
    "an entry of a global dict": (
        net(times(lambda n: TABLE["scale"])),
        lambda model: TABLE.update(scale=3.0),
    ),
    "an attribute of a Python module": (
        net(times(lambda n: SETTINGS.SCALE)),
        lambda model: setattr(SETTINGS, "SCALE", 3.0),
    ),
    "a function of a Python module": (
        net(lambda n, x: SETTINGS.scaled(n.linear(x))),
        lambda model: setattr(SETTINGS, "scaled", lambda x: 3 * x),
    ),
    "an argument of a partial": (
        net(lambda n, x: n.act(n.linear(x)), act=lambda: functools.partial(torch.mul, other=1.0)),
        put("act", functools.partial(torch.mul, other=3.0)),
    ),
    "a list in a partial": (
        net(lambda n, x: n.act(n.linear(x)), act=lambda: functools.partial(scaled_by, [1.0])),
        lambda model: model.act.args[0].__setitem__(0, 3.0),
    ),
    "an activation": (
        net(lambda n, x: n.act(n.linear(x)), act=lambda: lambdas(1.0)),
        put("act", lambdas(3.0)),
    ),
    # Layers.
    "the padding of a layer": (net(conv, conv=conv1d), put("conv.padding", (1,))),
    "the dilation of a layer": (net(conv, conv=conv1d), put("conv.dilation", (2,))),
    "the stride of a layer": (net(conv, conv=conv1d), put("conv.stride", (2,))),
    "the way of padding of a layer": (
        net(conv, conv=conv1d),
        lambda model: (
            setattr(model.conv, "padding_mode", "circular")
            or setattr(model.conv, "_reversed_padding_repeated_twice", [2, 2])
        ),
    ),
    "the slope of an activation": (
        layers(lambda: nn.Linear(D, D), nn.LeakyReLU),
        put("1.negative_slope", 0.5),
    ),
    "a layer replaced": (
        layers(lambda: nn.Linear(D, D), nn.Tanh),
        lambda model: model.__setitem__(0, nn.Linear(D, D)),
    ),
    "a layer appended": (
        layers(lambda: nn.Linear(D, D)),
        lambda model: model.append(nn.Tanh()),
    ),
    "layers in another order": (
        layers(lambda: nn.Linear(D, D), nn.Tanh, Doubling),
        lambda model: model._modules.update({"1": model[2], "2": model[1]}),
    ),
    "a checkpoint assigned": (layers(lambda: nn.Linear(D, D), nn.Tanh), assign),
    "a parameter replaced": (
        layers(lambda: nn.Linear(D, D), nn.Tanh),
        put("0.weight", nn.Parameter(torch.eye(D))),
    ),
    "a parametrisation": (layers(lambda: nn.Linear(D, D), nn.Tanh), double_weight),
    "a parameter frozen": (
        layers(lambda: nn.Linear(D, D), nn.Tanh),
        lambda model: model[0].bias.requires_grad_(False),
    ),
    # Hooks.
    "a hook": (
        layers(lambda: nn.Linear(D, D)),
        lambda model: model[0].register_forward_hook(lambda m, i, o: o * 2),
    ),
    "a hook exchanged": (hooked, exchange_hook),
    "a hook on gradients": (
        layers(lambda: nn.Linear(D, D), nn.Tanh),
        lambda model: model[1].register_full_backward_hook(lambda m, i, o: (3 * i[0],)),
    ),
    "a hook on a parameter": (
        layers(lambda: nn.Linear(D, D), nn.Tanh),
        lambda model: model[0].weight.register_hook(lambda g: 2 * g),
    ),
    # The loss.
    "a weight of the loss": (weighted_loss, lambda model: None),
    "an attribute of the loss": (lambda: (nn.Linear(D, D), Loss()), lambda model: None),
    "a setting of a loss module": (
        lambda: (nn.Linear(D, D), nn.SmoothL1Loss()),
        lambda model: None,
    ),
}


class Behind(nn.Linear):
    def __init__(self):
        super().__init__(D, D)
        self._scale = 1.0

    @property
    def scale(self):
        return self._scale

    def forward(self, x):
        return super().forward(x) * self.scale


def scaled_by(scales: list[float], x: Tensor) -> Tensor:
    return x * scales[0]


# Where the loss changes, and not the model.
LOSSES: dict[str, Callable[[Any], Any]] = {
    "a weight of the loss": lambda loss: loss.weights.__setitem__(0, 3.0),
    "an attribute of the loss": lambda loss: setattr(loss.config, "scale", 3.0),
    "a setting of a loss module": lambda loss: setattr(loss, "beta", 0.1),
}


# --- settings of the process ----------------------------------------------------------------------


def by_type(net: Net, x: Tensor) -> Tensor:
    return net.linear(x) * torch.tensor(1.0 / 3).to(x.dtype) * (1 + torch.zeros(()).itemsize)


def by_flag(net: Net, x: Tensor) -> Tensor:
    return net.linear(x) * (3.0 if torch.are_deterministic_algorithms_enabled() else 1.0)


def by_backend(net: Net, x: Tensor) -> Tensor:
    return net.linear(x) * (1.0 if torch.backends.mkldnn.enabled else 3.0)


def by_attention(net: Net, x: Tensor) -> Tensor:
    return net.linear(x) * (1.0 if torch.backends.cuda.math_sdp_enabled() else 3.0)


Setting = tuple[Callable[[], Any], Callable[[], Any], Callable[[], Any]]


def global_hook(m: nn.Module, i: Any, o: Any) -> Any:
    return o * 3 if isinstance(m, nn.Linear) else None


HANDLES: list[Any] = []

SETTINGS_OF_PROCESS: dict[str, Setting] = {
    "default type": (
        net(by_type),
        lambda: torch.set_default_dtype(torch.float64),
        lambda: torch.set_default_dtype(torch.float32),
    ),
    "determinism": (
        net(by_flag),
        lambda: torch.use_deterministic_algorithms(True),
        lambda: torch.use_deterministic_algorithms(False),
    ),
    "a backend": (
        net(by_backend),
        lambda: torch._C._set_mkldnn_enabled(False),
        lambda: torch._C._set_mkldnn_enabled(True),
    ),
    "an attention kernel": (
        net(by_attention),
        lambda: torch.backends.cuda.enable_math_sdp(False),
        lambda: torch.backends.cuda.enable_math_sdp(True),
    ),
    "a hook on all modules": (
        layers(lambda: nn.Linear(D, D), nn.Tanh),
        lambda: HANDLES.append(nn.modules.module.register_module_forward_hook(global_hook)),
        lambda: HANDLES.pop().remove(),
    ),
    "autocast": (
        layers(lambda: nn.Linear(D, D), nn.Tanh),
        lambda: torch.set_autocast_enabled("cpu", True),
        lambda: torch.set_autocast_enabled("cpu", False),
    ),
}
