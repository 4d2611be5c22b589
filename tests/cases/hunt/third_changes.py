"""Changes of a program between two questions, by a third hunt.

As in `cases/changes.py`: a function that makes `(model, loss)`, and one that changes the model.
`TWICE` has two changes with a question between, `OF_DATA` changes of the data itself.
"""

import configparser
import contextlib
import dataclasses
import functools
import io
import os
import sys
import tempfile
import types
from argparse import Namespace
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import attrs
import numpy as np
import torch
import traitlets
from scipy.interpolate import CubicSpline
from torch import Tensor, nn
from torch import distributions as laws
from torch.ao.quantization import FakeQuantize
from torch.nn import functional as F
from torch.nn.utils import parametrize, prune
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import TensorDataset
from transformers import BatchEncoding, PretrainedConfig

from cases.changes import Change, D, N, Net, layers, net, put, squares
from cases.hunt import third_settings
from cases.hunt.changes import times

GAIN = 1.0
TABLE = {"scale": 1.0, "plain": 1.0, "plain-b": 3.0}
# What to do after a case: the changes of the process and of classes of others.
UNDO: list[Callable[[], Any]] = []


def gain(model: Any) -> None:
    globals()["GAIN"] = 3.0
    UNDO.append(lambda: globals().__setitem__("GAIN", 1.0))


def patched(owner: Any, name: str, value: Any) -> Any:
    """Exchange an attribute of something that is not the program's own."""

    def change(model: Any) -> None:
        before = vars(owner).get(name)
        missing = name not in vars(owner)
        setattr(owner, name, value)
        UNDO.append(lambda: delattr(owner, name) if missing else setattr(owner, name, before))

    return change


def entry(table: dict, name: Any, value: Any) -> Any:
    def change(model: Any) -> None:
        before = table[name]
        table[name] = value
        UNDO.append(lambda: table.__setitem__(name, before))

    return change


def scaled(x: Tensor, scale: float = 1.0) -> Tensor:
    return x * scale


# --- code that is hard to find --------------------------------------------------------------------


def imports(n: Any, x: Tensor) -> Tensor:
    from cases.hunt import third_settings as own

    return n.linear(x) * own.SCALE


def imports_a_name(n: Any, x: Tensor) -> Tensor:
    from cases.hunt.third_settings import SCALE

    return n.linear(x) * SCALE


@dataclasses.dataclass
class Gain:
    scale: float = 1.0


class Grown:
    def __init__(self) -> None:
        self.scale = 1.0


def matches(n: Any, x: Tensor) -> Tensor:
    match n.config:
        case Gain(scale=factor):
            return n.linear(x) * factor
    return n.linear(x)


class Plain:
    __match_args__ = ("warmth",)

    def __init__(self) -> None:
        self.warmth = 1.0


def matches_plain(n: Any, x: Tensor) -> Tensor:
    match n.config:
        case Plain(warmth=factor):
            return n.linear(x) * factor
    return n.linear(x)


def matches_by_place(n: Any, x: Tensor) -> Tensor:
    match n.config:
        case Plain(factor):
            return n.linear(x) * factor
    return n.linear(x)


class Options:
    """What can be unpacked into arguments."""

    def __init__(self) -> None:
        self.chosen = {"scale": 1.0}

    def keys(self) -> Any:
        return self.chosen.keys()

    def __getitem__(self, name: str) -> float:
        return self.chosen[name]


class Task:
    def __init__(self) -> None:
        self.suffix = ""

    def __str__(self) -> str:
        return "plain" + self.suffix


class ReadsGain:
    def __init__(self) -> None:
        self.factor = GAIN


class Inherits(ReadsGain):
    pass


@dataclasses.dataclass
class Prepared:
    factor: float = 1.0

    def __post_init__(self) -> None:
        self.factor = GAIN


KINDS = {"gain": ReadsGain}


class Family:
    def factor(self) -> float:
        return 1.0


class Child(Family):
    pass


class Bare:
    pass


class Hidden:
    __slots__ = ("__scale",)

    def __init__(self) -> None:
        self.__scale = 1.0

    def factor(self) -> float:
        return self.__scale

    def grow(self) -> None:
        self.__scale = 3.0


class SlottedDict(dict):
    __slots__ = ("scale",)

    def __init__(self) -> None:
        super().__init__(a=1)
        self.scale = 1.0


class LRU(OrderedDict):
    """The recipe of Python's own page on OrderedDict."""

    def __getitem__(self, key: Any) -> Any:
        value = super().__getitem__(key)
        self.move_to_end(key)
        return value


class Tuned:
    """Kept in the user's file `lightning_settings.py`."""

    __module__ = "lightning_settings"

    def __init__(self) -> None:
        self.scale = 1.0


class Shared:
    """One state for all, as `accelerate` has it."""

    _state: ClassVar[dict[str, Any]] = {"scale": 1.0}

    def __init__(self) -> None:
        self.__dict__ = self._state


class Registry:
    _made = None

    def __init__(self) -> None:
        self.scale = 1.0

    @classmethod
    def get(cls) -> Any:
        if cls._made is None:
            cls._made = cls()
        return cls._made


Registry.get()


@attrs.define
class Defined:
    scale: float = 1.0


class Traits(traitlets.HasTraits):
    scale = traitlets.Float(1.0)


def parsed() -> Any:
    parser = configparser.ConfigParser()
    parser.read_string("[net]\nscale = 1.0")
    return parser


def own_convolution(self: Any, x: Tensor, weight: Tensor, bias: Any) -> Tensor:
    return F.conv1d(x, weight - weight.mean(), bias)


def patched_tensors() -> Any:
    patched(Tensor, "third_scaled", lambda x: x * 1.0)(None)
    return Net(lambda n, x: n.linear(x).third_scaled()), squares


def patched_layers() -> Any:
    patched(nn.Linear, "third_scaled", lambda self, x: self(x) * GAIN)(None)
    return Net(lambda n, x: n.linear.third_scaled(x)), squares


@torch.library.custom_op("third::grown", mutates_args=())
def grown(x: Tensor) -> Tensor:
    return x * GAIN


@grown.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


grown.register_autograd(lambda ctx, g: g * GAIN)


@contextlib.contextmanager
def warmed() -> Iterator[float]:
    yield GAIN


def in_context(n: Any, x: Tensor) -> Tensor:
    with warmed() as factor:
        return n.linear(x) * factor


def plain_code(n: Any, x: Tensor) -> Tensor:
    return n.linear(x)


def other_code(n: Any, x: Tensor) -> Tensor:
    return n.linear(x) * TABLE["scale"] * 2


def edited() -> Any:
    return Net(types.FunctionType(plain_code.__code__, globals())), squares


def by_name(n: Any, x: Tensor, *, scale: float = 1.0) -> Tensor:
    return n.linear(x) * scale


def own_by_name() -> Any:
    run = types.FunctionType(by_name.__code__, globals())
    run.__kwdefaults__ = {"scale": 1.0}
    return Net(run), squares


def partial_loss() -> Any:
    return nn.Linear(D, D), functools.partial(F.smooth_l1_loss, beta=1.0)


def padded() -> nn.Module:
    return nn.ConstantPad1d((0, 1), 0.0)


class Relative:
    """A loss relative to the first one."""

    def __init__(self) -> None:
        self.first: Any = None

    def __call__(self, output: Tensor, target: Tensor) -> Tensor:
        value = squares(output, target)
        if self.first is None:
            self.first = value.detach()
        return value / self.first


class Tabled:
    def __init__(self) -> None:
        self.table: dict[str, float] = {}

    def __call__(self, output: Tensor, target: Tensor) -> Tensor:
        return squares(output, target) * self.table.setdefault("scale", 1.0)


class Spike(torch.autograd.Function):
    """A step with a surrogate gradient."""

    slope = 1.0

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return (x > 0).to(x.dtype) * x

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return g * Spike.slope / (1 + x.square())


# --- files, and what libraries keep ---------------------------------------------------------------


def in_file() -> str:
    with tempfile.NamedTemporaryFile("w", suffix=".txt", delete=False) as file:
        file.write("1.0")
    UNDO.append(lambda: os.path.exists(file.name) and os.remove(file.name))
    return file.name


def rewrite(model: Any) -> None:
    model.file.seek(0)
    model.file.truncate()
    model.file.write("3.0")


def read_again(n: Any) -> float:
    n.file.seek(0)
    return float(n.file.read())


def optimizer() -> Any:
    return torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)


def prior() -> Any:
    """A mixture of flows."""
    base = laws.Normal(torch.zeros(3, D), torch.ones(3, D))
    flow = laws.TransformedDistribution(base, laws.AffineTransform(0.0, 2.0))
    return laws.MixtureSameFamily(
        laws.Categorical(torch.ones(3)), laws.Independent(flow, 1), validate_args=False
    )


def by_prior(n: Any, x: Tensor) -> Tensor:
    return n.linear(x) * n.prior.log_prob(n.linear(x))[:, None]


def traced() -> Any:
    class Doubled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(D, D)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x) * 2.0

    return torch.fx.symbolic_trace(Doubled()), squares


def retrace(model: Any) -> None:
    for node in model.graph.nodes:
        if node.op == "call_function":
            node.args = (node.args[0], 5.0)
    model.recompile()


# --- tensors of kinds of their own ----------------------------------------------------------------


def adjacency() -> Any:
    return nn.Buffer(torch.eye(D).to_sparse())


def propagated(n: Any, x: Tensor) -> Tensor:
    return torch.sparse.mm(n.adjacency, n.linear(x).T).T


def made_in_inference(make: Any) -> Any:
    def made() -> Any:
        with torch.inference_mode():
            return make()

    return made


def plus_kept(n: Any, x: Tensor) -> Tensor:
    return n.linear(x) + n.kept


def waves() -> Any:
    return nn.Buffer(torch.exp(1j * torch.arange(D * D).reshape(D, D)).mH)


def shadows() -> Any:
    model = Net(lambda n, x: n.linear(x) * n.shadow[n.linear.weight])
    model.shadow = {model.linear.weight: 1.0}
    return model, squares


def masks() -> Any:
    """A mask by parameter, as for pruning."""
    model = Net(lambda n, x: x @ (n.linear.weight * n.masks[n.linear.weight]).T)
    model.masks = {p: torch.ones_like(p) for p in model.parameters()}
    return model, squares


def hooked_weight() -> Any:
    model, loss = nn.Sequential(nn.Linear(D, D), nn.Tanh()), squares
    state = {"scale": 1.0}
    model[0].weight.register_hook(lambda g: g * state["scale"])
    object.__setattr__(model, "state", state)
    return model, loss


def hooked_layer() -> Any:
    model, loss = nn.Sequential(nn.Linear(D, D), nn.Tanh()), squares
    state = {"scale": 1.0}
    model[1].register_full_backward_hook(lambda m, i, o: (i[0] * state["scale"],))
    object.__setattr__(model, "state", state)
    return model, loss


def pruned() -> Any:
    model = nn.Sequential(nn.Linear(D, D), nn.Tanh())
    prune.random_unstructured(model[0], "weight", 0.3)
    return model, squares


class Stretched(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.factor = 1.0

    def forward(self, w: Tensor) -> Tensor:
        return w * self.factor


def stretched() -> Any:
    model = nn.Sequential(nn.Linear(D, D), nn.Tanh())
    parametrize.register_parametrization(model[0], "weight", Stretched())
    return model, squares


def swap(model: Any) -> None:
    torch.utils.swap_tensors(model.linear.weight, nn.Parameter(torch.eye(D)))


def exchange_memory(model: Any) -> None:
    with torch.no_grad():
        model.linear.weight.set_(torch.eye(D))


# --- what a program keeps from its first batch ----------------------------------------------------


def fitted(n: Any, x: Tensor) -> Tensor:
    if n.mean is None:
        n.mean = x.mean(0)
    return n.linear(x - n.mean)


def fitted_scale(n: Any, x: Tensor) -> Tensor:
    if not n.kept:
        n.kept["largest"] = x.abs().max()
    return n.linear(x / n.kept["largest"])


def with_default_gain(n: Any, x: Tensor) -> Tensor:
    if not hasattr(n, "gain"):
        n.gain = 1.0
    return n.linear(x) * n.gain


def drift(n: Any, x: Tensor) -> Tensor:
    h = n.linear(x)
    n.seen.append(h.detach())
    return h - 0.5 * n.seen[0]


def annealed(n: Any, x: Tensor) -> Tensor:
    n.beta = min(1.0, n.beta + 0.1)
    return n.linear(x) * n.beta


def other_data(model: Any) -> None:
    model(torch.randn(N, D) + 3)


# --- noise that a program seeds itself ------------------------------------------------------------


def forked(n: Any, x: Tensor) -> Tensor:
    with torch.random.fork_rng():
        torch.manual_seed(7)
        noise = torch.randn_like(x)
    return n.linear(x) * noise


def by_generator(n: Any, x: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(7)
    return n.linear(x) * torch.randn(x.shape, generator=generator)


def by_numpy(n: Any, x: Tensor) -> Tensor:
    noise = np.random.default_rng(7).normal(size=x.shape).astype(np.float32)
    return n.linear(x) * torch.from_numpy(noise)


def by_own_seed(n: Any, x: Tensor) -> Tensor:
    n.generator.manual_seed(7)
    return n.linear(x) * torch.randn(x.shape, generator=n.generator)


def dropped(n: Any, x: Tensor) -> Tensor:
    torch.manual_seed(7)
    return F.dropout(n.linear(x), 0.5)


def step(model: Any) -> None:
    """Take a step, as an optimizer does."""
    torch.manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.5)


# --- modes around a question ----------------------------------------------------------------------


class Tripled(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        return out * 3 if func is F.linear else out


class Rounded(TorchDispatchMode):
    """Emulates arithmetic of few bits."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        return torch.round(out) if func is torch.ops.aten.addmm.default else out


def entered(make: Any) -> Any:
    def change(model: Any) -> None:
        mode = make()
        mode.__enter__()
        UNDO.append(lambda: mode.__exit__(None, None, None))

    return change


def flushed(model: Any) -> None:
    torch.set_flush_denormal(True)
    UNDO.append(lambda: torch.set_flush_denormal(False))


def tiny(n: Any, x: Tensor) -> Tensor:
    return n.linear(x) + n.linear(x) * 1e-40 * 1e38


CHANGES: dict[str, Change] = {
    # Code and names.
    "a setting of a file imported where it is used": (
        net(imports),
        patched(third_settings, "SCALE", 3.0),
    ),
    "a number imported where it is used": (
        net(imports_a_name),
        patched(third_settings, "SCALE", 3.0),
    ),
    "a setting that a file is given later": (
        net(times(lambda n: getattr(third_settings, "EXTRA", 1.0))),
        patched(third_settings, "EXTRA", 3.0),
    ),
    "a setting that a file looks up for itself": (
        net(times(lambda n: third_settings.DEFERRED)),
        entry(third_settings.LAZY, "DEFERRED", 3.0),
    ),
    "an attribute of a dataclass in a pattern": (
        net(matches, config=Gain),
        put("config.scale", 3.0),
    ),
    "an attribute in a pattern": (net(matches_plain, config=Plain), put("config.warmth", 3.0)),
    "an attribute in a pattern, by its place": (
        net(matches_by_place, config=Plain),
        put("config.warmth", 3.0),
    ),
    "an attribute in a format": (
        net(times(lambda n: float("{.scale}".format(n.config))), config=Grown),  # noqa: UP032
        put("config.scale", 3.0),
    ),
    "an option of an object that is unpacked": (
        net(lambda n, x: scaled(n.linear(x), **n.options), options=Options),
        lambda model: model.options.chosen.update(scale=3.0),
    ),
    "what the name of an object is made of": (
        net(times(lambda n: TABLE[f"{n.task}"]), task=Task),
        put("task.suffix", "-b"),
    ),
    "a global that is read where a class of a table is made": (
        net(times(lambda n: KINDS["gain"]().factor)),
        gain,
    ),
    "a global that is read where a class of a base is made": (
        net(times(lambda n: Inherits().factor)),
        gain,
    ),
    "a global that is read after a dataclass is made": (
        net(times(lambda n: Prepared().factor)),
        gain,
    ),
    "a global that is read where a class of an attribute is made": (
        net(times(lambda n: n.kind().factor), kind=lambda: ReadsGain),
        gain,
    ),
    "a method patched onto tensors": (
        patched_tensors,
        patched(Tensor, "third_scaled", lambda x: x * 3.0),
    ),
    "a global that a method patched onto a layer reads": (patched_layers, gain),
    "a number that a class is given later": (
        net(times(lambda n: getattr(n.bare, "scale", 1.0)), bare=Bare),
        patched(Bare, "scale", 3.0),
    ),
    "a method that a class is given over its base's": (
        net(times(lambda n: n.child.factor()), child=Child),
        patched(Child, "factor", lambda self: 3.0),
    ),
    "a keyword of a partial": (
        net(lambda n, x: n.act(n.linear(x)), act=lambda: functools.partial(scaled, scale=1.0)),
        lambda model: model.act.keywords.update(scale=3.0),
    ),
    "a keyword of a loss": (partial_loss, lambda model: None),
    "a loss relative to its first value": (
        lambda: (nn.Linear(D, D), Relative()),
        lambda model: None,
    ),
    "a table of a loss that is made when it is called": (
        lambda: (nn.Linear(D, D), Tabled()),
        lambda model: None,
    ),
    "defaults by name, replaced": (
        own_by_name,
        lambda model: setattr(model.run, "__kwdefaults__", {"scale": 3.0}),
    ),
    "a function of PyTorch that a layer calls": (
        layers(lambda: nn.Linear(D, D), nn.GELU),
        patched(F, "gelu", lambda x, approximate="none": x * 3),
    ),
    "a private method of a class of layers": (
        layers(lambda: nn.Unflatten(1, (1, D)), lambda: nn.Conv1d(1, 1, 2), nn.Flatten, padded),
        patched(nn.Conv1d, "_conv_forward", own_convolution),
    ),
    "a global that the body of an op reads": (
        net(lambda n, x: torch.ops.third.grown(n.linear(x))),
        gain,
    ),
    "a global that the body of an op of this file reads": (
        net(lambda n, x: grown(n.linear(x))),
        gain,
    ),
    "a global that a context reads": (net(in_context), gain),
    "a global that a function mapped over samples reads": (
        net(lambda n, x: torch.vmap(lambda r: r * GAIN)(n.linear(x))),
        gain,
    ),
    "the slope of a surrogate gradient": (
        net(lambda n, x: Spike.apply(n.linear(x))),
        patched(Spike, "slope", 3.0),
    ),
    "the backward of an own function": (
        net(lambda n, x: Spike.apply(n.linear(x))),
        patched(Spike, "backward", staticmethod(lambda ctx, g: g * 5)),
    ),
    "a slot with a name of its class": (
        net(times(lambda n: n.hidden.factor()), hidden=Hidden),
        lambda model: model.hidden.grow(),
    ),
    "a slot of a kind of dict": (
        net(times(lambda n: n.table.scale), table=SlottedDict),
        put("table.scale", 3.0),
    ),
    "an entry of a cache that forgets": (
        net(times(lambda n: n.cache["a"]), cache=lambda: LRU(a=1.0, b=2.0)),
        lambda model: model.cache.update(a=3.0),
    ),
    "an attribute of a class in a file with a library's name": (
        net(times(lambda n: n.tuned.scale), tuned=Tuned),
        put("tuned.scale", 3.0),
    ),
    "a state that all objects of a class share": (
        net(times(lambda n: Shared().scale)),
        entry(Shared._state, "scale", 3.0),
    ),
    "the only object of a class": (
        net(times(lambda n: Registry.get().scale)),
        patched(Registry._made, "scale", 3.0),
    ),
    "a flag of the command line": (
        net(times(lambda n: 3.0 if "--third" in sys.argv else 1.0)),
        lambda model: sys.argv.append("--third") or UNDO.append(lambda: sys.argv.pop()),
    ),
    "a class of settings that is defined by attrs": (
        net(times(lambda n: n.config.scale), config=Defined),
        put("config.scale", 3.0),
    ),
    "a trait": (net(times(lambda n: n.config.scale), config=Traits), put("config.scale", 3.0)),
    "a section of settings": (
        net(times(lambda n: n.config.getfloat("net", "scale")), config=parsed),
        lambda model: model.config.set("net", "scale", "3.0"),
    ),
    "a configuration of transformers": (
        net(times(lambda n: n.config.gain), config=lambda: PretrainedConfig(gain=1.0)),
        put("config.gain", 3.0),
    ),
    "a parsed argument": (
        net(times(lambda n: n.args.scale), args=lambda: Namespace(scale=1.0)),
        put("args.scale", 3.0),
    ),
    # Files, and what libraries keep.
    "a file that is read": (
        net(times(lambda n: float(Path(n.path).read_text())), path=in_file),
        lambda model: Path(model.path).write_text("3.0") and None,
    ),
    "a file that is there": (
        net(times(lambda n: 1.0 if os.path.exists(n.path) else 3.0), path=in_file),
        lambda model: os.remove(model.path),
    ),
    "the content of a file in memory": (
        net(times(read_again), file=lambda: io.StringIO("1.0")),
        rewrite,
    ),
    "the rate of an optimizer": (
        net(times(lambda n: n.optimizer.param_groups[0]["lr"]), optimizer=optimizer),
        lambda model: model.optimizer.param_groups[0].update(lr=3.0),
    ),
    "a tensor of a data set": (
        net(
            times(lambda n: n.bank[0][0]),
            bank=lambda: TensorDataset(torch.ones(2, D)),
        ),
        lambda model: model.bank.tensors[0].mul_(3),
    ),
    "the tensors of a data set": (
        net(times(lambda n: n.bank[0][0]), bank=lambda: TensorDataset(torch.ones(2, D))),
        put("bank.tensors", (torch.full((2, D), 3.0),)),
    ),
    "the centres of a prior": (
        net(by_prior, prior=prior),
        lambda model: model.prior.component_distribution.base_dist.base_dist.loc.add_(3),
    ),
    "a traced model, edited": (traced, retrace),
    "coefficients of a spline": (
        net(
            times(lambda n: float(n.spline(0.5))),
            spline=lambda: CubicSpline([0.0, 1.0, 2.0], [1.0, 1.0, 1.0]),
        ),
        lambda model: np.multiply(model.spline.c, 3, out=model.spline.c),
    ),
    "the mask of an array": (
        net(times(lambda n: float(n.kept.sum())), kept=lambda: np.ma.array([1.0, 2.0])),
        lambda model: model.kept.__setitem__(1, np.ma.masked),
    ),
    "a function of numpy made of one": (
        net(times(lambda n: float(n.scale(1.0))), scale=lambda: np.vectorize(lambda v: v * GAIN)),
        gain,
    ),
    "a quantiser that is switched off": (
        net(lambda n, x: n.quantiser(n.linear(x)), quantiser=FakeQuantize),
        lambda model: model.quantiser.disable_fake_quant(),
    ),
    # Tensors of kinds of their own.
    "the values of a sparse buffer": (
        net(propagated, adjacency=adjacency),
        lambda model: model.adjacency._values().mul_(3),
    ),
    "a sparse buffer, multiplied": (
        net(propagated, adjacency=adjacency),
        lambda model: model.adjacency.mul_(3),
    ),
    "the values of a sparse tensor": (
        net(propagated, adjacency=lambda: torch.eye(D).to_sparse()),
        lambda model: model.adjacency._values().mul_(3),
    ),
    "a buffer made in inference mode": (
        net(plus_kept, kept=made_in_inference(lambda: nn.Buffer(torch.ones(D)))),
        put("kept", nn.Buffer(torch.full((D,), 3.0))),
    ),
    "a tensor made in inference mode": (
        net(plus_kept, kept=made_in_inference(lambda: torch.ones(D))),
        put("kept", torch.full((D,), 3.0)),
    ),
    "a conjugated buffer": (
        net(lambda n, x: (n.linear(x).to(torch.complex64) @ n.waves).abs(), waves=waves),
        lambda model: model.waves.mul_(3),
    ),
    "a buffer of eight bits": (
        net(
            times(lambda n: n.small.float()),
            small=lambda: nn.Buffer(torch.ones(D).to(torch.float8_e4m3fn)),
        ),
        put("small", nn.Buffer(torch.full((D,), 3.0).to(torch.float8_e4m3fn))),
    ),
    "a buffer of whole numbers of sixteen bits": (
        net(
            times(lambda n: n.small.float()),
            small=lambda: nn.Buffer(torch.ones(D).to(torch.uint16)),
        ),
        lambda model: model.small.fill_(3),
    ),
    "a number by parameter": (
        shadows,
        lambda model: model.shadow.__setitem__(model.linear.weight, 3.0),
    ),
    "a mask by parameter": (masks, lambda model: model.masks[model.linear.weight][1].zero_()),
    "what a hook on a weight reads": (hooked_weight, lambda model: model.state.update(scale=3.0)),
    "what a hook on a layer reads": (hooked_layer, lambda model: model.state.update(scale=3.0)),
    "the mask of a pruned weight": (pruned, lambda model: model[0].weight_mask.zero_()),
    "a number of a parametrisation": (
        stretched,
        lambda model: setattr(model[0].parametrizations.weight[0], "factor", 3.0),
    ),
    "a parameter swapped": (net(lambda n, x: n.linear(x)), swap),
    "the memory of a parameter": (
        net(lambda n, x: n.linear(x)),
        exchange_memory,
    ),
    # What a program keeps from its first batch.
    "a mean of the first batch": (net(fitted, mean=lambda: None), other_data),
    "a scale of the first batch": (net(fitted_scale, kept=dict), other_data),
    "features of the first batch": (net(drift, seen=list), other_data),
    "a default that is set where it is missing": (
        net(times(lambda n: n.table.setdefault("scale", 1.0)), table=dict),
        lambda model: model.table.update(scale=3.0),
    ),
    "an attribute that is made where it is missing": (
        net(with_default_gain),
        put("gain", 3.0),
    ),
    "an annealed weight, started again": (net(annealed, beta=lambda: 0.95), put("beta", 0.0)),
    # Noise that a program seeds itself, after a step.
    "a step, with a fork of the noise": (net(forked), step),
    "a step, with a generator of each run": (net(by_generator), step),
    "a step, with a generator of numpy of each run": (net(by_numpy), step),
    "a step, with a generator set back": (net(by_own_seed, generator=torch.Generator), step),
    "a step, with a seed": (net(dropped), step),
    # Around a question.
    "a mode of functions": (net(lambda n, x: n.linear(x)), entered(Tripled)),
    "a mode of ops": (net(lambda n, x: n.linear(x)), entered(Rounded)),
    "small numbers flushed": (net(tiny), flushed),
}

# Where the loss changes, and not the model.
LOSSES: dict[str, Any] = {
    "a loss relative to its first value": lambda loss: setattr(loss, "first", 2.0),
    "a table of a loss that is made when it is called": lambda loss: loss.table.update(scale=3.0),
    "a keyword of a loss": lambda loss: loss.keywords.update(beta=0.1),
}

# Two changes, with a question between.
TWICE: dict[str, tuple[Any, Any, Any]] = {
    "code, and then what it reads": (
        edited,
        lambda model: setattr(model.run, "__code__", other_code.__code__),
        entry(TABLE, "scale", 5.0),
    ),
    "a number, and then another": (
        net(times(lambda n: n.config.scale), config=Gain),
        put("config.scale", 3.0),
        put("config.scale", 5.0),
    ),
    "a function, and then what it reads": (
        net(lambda n, x: n.act(n.linear(x)), act=lambda: scaled),
        put("act", lambda x: x * TABLE["scale"] * 2),
        entry(TABLE, "scale", 5.0),
    ),
}


# --- the data itself ------------------------------------------------------------------------------

Data = tuple[Any, Any]


def from_numpy() -> Data:
    rows = np.random.default_rng(0).normal(size=(N, D)).astype(np.float32)
    return torch.from_numpy(rows), torch.randn(N, D)


def beside(value: Any) -> Callable[[], Data]:
    return lambda: ((torch.randn(N, D), value()), torch.randn(N, D))


def in_dims(data):
    """Of an array, or an object, beside the inputs, which is no sample's."""
    x, _ = data
    if isinstance(x, tuple) and len(x) == 2 and isinstance(x[1], np.ndarray | SimpleNamespace):
        return (0, None), 0
    return 0


def with_scale(n: Any, x: Tensor, other: Any) -> Tensor:
    return n.linear(x) * other.scale


class Pair(nn.Module):
    """A linear layer on the first of two inputs."""

    def __init__(self, run: Any) -> None:
        super().__init__()
        self.linear, self.run = nn.Linear(D, D), run

    def forward(self, x: Tensor, other: Any) -> Tensor:
        return self.run(self, x, other)


def pair(run: Any) -> Callable[[], Any]:
    return lambda: (Pair(run), squares)


def weighted(output: Tensor, target: Any) -> Tensor:
    y, other = target
    return (output - y).square().mean() * other.scale


class Named(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


def named_input() -> Any:
    return Named(), squares


OF_DATA: dict[str, tuple[Callable[[], Any], Callable[[], Data], Callable[[Any, Any], Any]]] = {
    "an array that the inputs lie in, filled again": (
        net(lambda n, x: n.linear(x)),
        from_numpy,
        lambda x, y: x.numpy().fill(2.0),
    ),
    "the data of the inputs": (
        net(lambda n, x: n.linear(x)),
        lambda: (torch.randn(N, D), torch.randn(N, D)),
        lambda x, y: x.data.mul_(3),
    ),
    "the data of the targets": (
        net(lambda n, x: n.linear(x)),
        lambda: (torch.randn(N, D), torch.randn(N, D)),
        lambda x, y: y.data.mul_(3),
    ),
    "an array among the inputs": (
        pair(lambda n, x, a: n.linear(x) * float(a[0])),
        beside(lambda: np.ones(2)),
        lambda x, y: x[1].fill(3.0),
    ),
    "an object among the inputs": (
        pair(with_scale),
        beside(Grown),
        lambda x, y: setattr(x[1], "scale", 3.0),
    ),
    "a namespace among the inputs": (
        pair(with_scale),
        beside(lambda: SimpleNamespace(scale=1.0)),
        lambda x, y: setattr(x[1], "scale", 3.0),
    ),
    "a dataclass among the inputs": (
        pair(with_scale),
        beside(Gain),
        lambda x, y: setattr(x[1], "scale", 3.0),
    ),
    "a set among the inputs": (
        pair(lambda n, x, flags: n.linear(x) * (3.0 if "more" in flags else 1.0)),
        beside(lambda: {"less"}),
        lambda x, y: x[1].add("more"),
    ),
    "an object among the targets": (
        lambda: (nn.Linear(D, D), weighted),
        lambda: (torch.randn(N, D), (torch.randn(N, D), Grown())),
        lambda x, y: setattr(y[1], "scale", 3.0),
    ),
    "an entry of a dict of inputs": (
        net(lambda n, batch: n.linear(batch["x"])),
        lambda: (({"x": torch.randn(N, D)},), torch.randn(N, D)),
        lambda x, y: x[0].update(x=torch.ones(N, D)),
    ),
    "an entry of an encoding": (
        named_input,
        lambda: (BatchEncoding({"x": torch.randn(N, D)}), torch.randn(N, D)),
        lambda x, y: x.update(x=torch.ones(N, D)),
    ),
    "an array that the targets lie in, filled again": (
        net(lambda n, x: n.linear(x)),
        lambda: from_numpy()[::-1],
        lambda x, y: y.numpy().fill(2.0),
    ),
    "an entry of a list of inputs": (
        net(lambda n, batch: n.linear(batch[0])),
        lambda: (([torch.randn(N, D)],), torch.randn(N, D)),
        lambda x, y: x[0].__setitem__(0, torch.ones(N, D)),
    ),
    "an entry more of a dict of inputs": (
        net(lambda n, batch: n.linear(batch["x"]) + batch.get("more", 0.0)),
        lambda: (({"x": torch.randn(N, D)},), torch.randn(N, D)),
        lambda x, y: x[0].update(more=torch.ones(N, D)),
    ),
    "another name in a dict of inputs": (
        net(lambda n, batch: n.linear(batch.get("x", 0.0) + 2 * batch.get("z", 0.0))),
        lambda: (({"x": torch.randn(N, D)},), torch.randn(N, D)),
        lambda x, y: x[0].update(z=x[0].pop("x")),
    ),
    "a tensor of an object among the inputs": (
        pair(lambda n, x, other: n.linear(x) * other.scale),
        beside(lambda: SimpleNamespace(scale=torch.ones(D))),
        lambda x, y: x[1].scale.mul_(3),
    ),
    "an entry of a dict of an object among the inputs": (
        pair(lambda n, x, other: n.linear(x) * other.kept["scale"]),
        beside(lambda: SimpleNamespace(kept={"scale": 1.0})),
        lambda x, y: x[1].kept.update(scale=3.0),
    ),
    "an entry of the inputs, in place": (
        net(lambda n, x: n.linear(x)),
        lambda: (torch.randn(N, D), torch.randn(N, D)),
        lambda x, y: x[2, 1].fill_(9.0),
    ),
}


# --- with spot checks -----------------------------------------------------------------------------


def with_hook(n: Any, x: Tensor) -> Tensor:
    h = n.linear(x)
    if h.requires_grad:
        h.register_hook(lambda g: g.clamp(-1e-3, 1e-3))
    return h * getattr(third_settings, "EXTRA", 1.0)


def cut_off(n: Any, x: Tensor) -> Tensor:
    h = n.linear(x)
    if getattr(third_settings, "FROZEN", False):
        h = h.detach()
    return n.last(h)


def cut_off_by_file(n: Any, x: Tensor) -> Tensor:
    h = n.linear(x)
    if float(Path(n.path).read_text()) > 1:
        h = h.detach()
    return n.last(h)


def all_cut_off_by_file(n: Any, x: Tensor) -> Tensor:
    h = n.linear(x)
    return h.detach() if float(Path(n.path).read_text()) > 1 else h


def scaled_by_file(n: Any, x: Tensor) -> Tensor:
    h = n.linear(x)
    if h.requires_grad:
        factor = float(Path(n.path).read_text())
        h.register_hook(lambda g: g * factor)
    return n.last(h)


def rewritten(model: Any, x: Tensor, y: Tensor) -> None:
    Path(model.path).write_text("3.0")


def scales_gradients(n: Any, x: Tensor) -> Tensor:
    h = n.linear(x)
    h.register_hook(lambda g: g * getattr(third_settings, "EXTRA", 1.0))
    return n.last(h)


def last() -> nn.Module:
    return nn.Linear(D, D)


def rows() -> Data:
    return torch.randn(N, D), torch.randn(N, D)


# Of some the recording does not stand for the model, as gradients are changed on their way; of
# others, no value changes where a gradient does.
CHECKED: dict[str, tuple[Callable[[], Any], Callable[[], Data], Callable[..., Any]]] = {
    "a setting given later, under clipped gradients": (
        net(with_hook),
        rows,
        lambda model, x, y: patched(third_settings, "EXTRA", 3.0)(model),
    ),
    "an array filled again, under clipped gradients": (
        net(with_hook),
        from_numpy,
        lambda model, x, y: x.numpy().fill(2.0),
    ),
    "an array filled again": (
        net(lambda n, x: n.linear(x)),
        from_numpy,
        lambda model, x, y: x.numpy().fill(2.0),
    ),
    "a layer cut off from gradients, by a setting given later": (
        net(cut_off, last=last),
        rows,
        lambda model, x, y: patched(third_settings, "FROZEN", True)(model),
    ),
    "gradients scaled by a setting given later": (
        net(scales_gradients, last=last),
        rows,
        lambda model, x, y: patched(third_settings, "EXTRA", 3.0)(model),
    ),
    "a layer cut off from gradients, by a file": (
        net(cut_off_by_file, last=last, path=in_file),
        rows,
        rewritten,
    ),
    "a model cut off from gradients, by a file": (
        net(all_cut_off_by_file, path=in_file),
        rows,
        rewritten,
    ),
    "gradients scaled by a file": (
        net(scaled_by_file, last=last, path=in_file),
        rows,
        rewritten,
    ),
    "a number imported where it is used, with checks": (
        net(imports_a_name),
        rows,
        lambda model, x, y: patched(third_settings, "SCALE", 3.0)(model),
    ),
}


# --- functions of parameters ----------------------------------------------------------------------


def functional(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
    return torch.tanh(x @ parameters["w"]) * TABLE["scale"]


def function_of_all(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
    for w in parameters.values():
        x = torch.tanh(x @ w)
    return x


def matrix() -> Tensor:
    return torch.randn(D, D).requires_grad_()


def descend(parameters: dict[str, Tensor]) -> None:
    """Take a step as functional code does: by other tensors under the same names."""
    for name, w in parameters.items():
        parameters[name] = (w * 1.5).detach().requires_grad_()


def descend_in_place(parameters: dict[str, Tensor]) -> None:
    with torch.no_grad():
        for w in parameters.values():
            w.mul_(1.5)


FUNCTIONS: dict[str, tuple[Any, Callable[[Any], Any]]] = {
    "parameters of a function, by other tensors": (functional, descend),
    "parameters of a function, in place": (functional, descend_in_place),
    "a parameter more of a function": (function_of_all, lambda p: p.update(v=matrix())),
    "what a function reads": (functional, entry(TABLE, "scale", 3.0)),
}
