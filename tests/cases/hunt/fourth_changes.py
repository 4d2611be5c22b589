"""Changes of a program between two questions, by a fourth hunt.

As in `cases/changes.py`: a function that makes `(model, loss)`, and one that changes the model.
`OF_DATA` are changes of the data itself, as in `third_changes.py`.
"""

import copy
import ctypes
import dataclasses
import enum
import functools
import importlib
import inspect
import io
import pickle
from abc import ABC
from collections import Counter, deque
from collections.abc import Callable
from decimal import Decimal
from typing import Any, NamedTuple, Protocol, runtime_checkable

import joblib
import networkx as nx
import numpy as np
import scipy.sparse
import scipy.stats
import torch
from pydantic import BaseModel
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn
from torch import distributions as laws
from torch.distributions.kl import register_kl
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize, prune, vector_to_parameters
from torchmetrics import MeanMetric
from transformers.activations import ACT2FN

from cases.changes import Change, D, N, Net, layers, net, put, squares
from cases.hunt import fourth_settings
from cases.hunt.changes import counting, plain, times
from cases.hunt.third_changes import (
    UNDO,
    Data,
    entry,
    made_in_inference,
    patched,
    rows,
    step,
)

GAIN = 1.0
TABLE = {"scale": 1.0}


def gain(model: Any) -> None:
    globals()["GAIN"] = 3.0
    UNDO.append(lambda: globals().__setitem__("GAIN", 1.0))


def scale_setting(model: Any) -> None:
    fourth_settings.SCALE = 3.0
    UNDO.append(lambda: setattr(fourth_settings, "SCALE", 1.0))


# --- attributes that are not there yet ------------------------------------------------------------


class Config:
    """Has what it is given."""


class WithDefaults:
    """Settings with a default for whatever is not set."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return 1.0


@runtime_checkable
class HasScale(Protocol):
    scale: float


def asks_forgiveness(n: Any, x: Tensor) -> Tensor:
    h = n.linear(x)
    try:
        return h * n.config.scale
    except AttributeError:
        return h


def asks_forgiveness_of_itself(n: Any, x: Tensor) -> Tensor:
    h = n.linear(x)
    try:
        return h * n.extra_scale
    except AttributeError:
        return h


def by_protocol(n: Any, x: Tensor) -> Tensor:
    h = n.linear(x)
    return h * n.config.scale if isinstance(n.config, HasScale) else h


class Memo:
    """Computes a factor when it is first needed."""

    def factor(self) -> float:
        try:
            return self._factor
        except AttributeError:
            return GAIN


@dataclasses.dataclass
class Weights:
    first: float = 1.0
    second: float = 1.0


def all_weights(n: Any, x: Tensor) -> Tensor:
    factor = 1.0
    for _, value in inspect.getmembers(n.weights, lambda v: isinstance(v, float)):
        factor *= value
    return n.linear(x) * factor


def by_dataclass_equality(n: Any, x: Tensor) -> Tensor:
    h = n.linear(x)
    return h if n.weights == Weights() else 2 * h


def by_replaced(n: Any, x: Tensor) -> Tensor:
    return n.linear(x) * dataclasses.replace(n.weights, first=2.0).second


def by_pickle(n: Any, x: Tensor) -> Tensor:
    return n.linear(x) * float(len(pickle.dumps(n.box)))


class Box:
    def __init__(self) -> None:
        self.content = "a"


class Marker(ABC):  # noqa: B024
    """What is registered with it is scaled."""


class Piece:
    pass


def by_marker(n: Any, x: Tensor) -> Tensor:
    h = n.linear(x)
    return 3 * h if isinstance(n.piece, Marker) else h


class Plain:
    def factor(self) -> float:
        return 1.0


class Strong:
    def factor(self) -> float:
        return 3.0


class Mixed(Plain):
    pass


class Slow:
    pass


def inject(model: Any) -> None:
    Mixed.__bases__ = (Strong,)
    UNDO.append(lambda: setattr(Mixed, "__bases__", (Plain,)))


class Settings(BaseModel):
    scale: float = 1.0


class Named:
    """Reads attributes by names that it makes."""

    def __init__(self) -> None:
        self.scale_0, self.scale_1 = 1.0, 1.0

    def scale(self, i: int) -> float:
        return self.__getattribute__(f"scale_{i}")


def by_flag(n: Any, x: Tensor) -> Tensor:
    h = n.linear(x)
    return 3 * h if hasattr(n.config, n.flag) else h


def by_hash(n: Any, x: Tensor) -> Tensor:
    """Look a factor up by the hash of the settings."""
    return n.linear(x) * n.factors.get(joblib.hash(n.box), 1.0)


class Registry:
    """Functions by their names."""

    def __init__(self) -> None:
        self.functions: dict[str, Any] = {}

    def register(self, function: Any) -> Any:
        self.functions[function.__name__] = function
        return function

    def __getattr__(self, name: str) -> Any:
        return self.functions[name]


REGISTRY = Registry()


@REGISTRY.register
def tripled(x: Tensor) -> Tensor:
    return x * GAIN


class Dispatching:
    @functools.singledispatchmethod
    def scaled(self, x: Any) -> Any:
        return x

    @scaled.register
    def _(self, x: Tensor) -> Tensor:
        return x * GAIN


CALLBACK = ctypes.CFUNCTYPE(ctypes.c_double, ctypes.c_double)


def own_callback() -> Any:
    return CALLBACK(lambda value: value * GAIN)


class Singleton:
    _made: Any = None

    def __new__(cls) -> Any:
        if cls._made is None:
            cls._made = super().__new__(cls)
            cls._made.scale = 1.0
        return cls._made


Singleton()


class Level(enum.IntEnum):
    LOW = 1
    HIGH = 3


class Aspect(enum.Flag):
    BASE = 1
    EXTRA = 2


# --- code that is found by name, or by a library --------------------------------------------------


def imports_by_name(n: Any, x: Tensor) -> Tensor:
    settings = importlib.import_module("cases.hunt." + n.name)
    return n.linear(x) * settings.SCALE


class Sharp(laws.Normal):
    pass


@register_kl(Sharp, Sharp)
def _between_sharp(p: Any, q: Any) -> Tensor:
    return (p.loc - q.loc).square() * GAIN


def divergence(n: Any, x: Tensor) -> Tensor:
    mean = n.linear(x)
    return laws.kl_divergence(Sharp(mean, 1.0), Sharp(torch.zeros_like(mean), 1.0))


LIBRARY = torch.library.Library("fourth", "DEF")
LIBRARY.define("grown(Tensor x) -> Tensor")
LIBRARY.impl("grown", lambda x: x * GAIN, "CompositeImplicitAutograd")


class Scaled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * GAIN


ACT2FN["fourth"] = Scaled


def by_scripted(x: Tensor, factor: float) -> Tensor:
    return x * factor


class Meter:
    """A decorator that is an object."""

    def __init__(self, function: Any) -> None:
        functools.update_wrapper(self, function)
        self.function = function

    def __call__(self, *args: Any) -> Any:
        return self.function(*args) * GAIN


@Meter
def metered(x: Tensor) -> Tensor:
    return x


def counted(function: Any) -> Any:
    @functools.wraps(function)
    def wrapper(*args: Any) -> Any:
        wrapper.factor = getattr(wrapper, "factor", 1.0)
        return function(*args) * wrapper.factor

    return wrapper


@counted
def decorated(x: Tensor) -> Tensor:
    return x


@torch.no_grad()
def without_gradient(x: Tensor) -> Tensor:
    return x.sigmoid() * GAIN


class Chosen:
    act = functools.partialmethod(by_scripted, factor=1.0)

    def __mul__(self, other: Any) -> Any:
        return other * GAIN

    def __rmul__(self, other: Any) -> Any:
        return other * GAIN


def comprehended(n: Any, x: Tensor) -> Tensor:
    return n.linear(x) * sum(GAIN * w for w in n.parts)


def nested_class(n: Any, x: Tensor) -> Tensor:
    class Local:
        factor = GAIN

    return n.linear(x) * Local.factor


def walrus(n: Any, x: Tensor) -> Tensor:
    if (factor := TABLE.get(n.key)) is not None:
        return n.linear(x) * factor
    return n.linear(x)


# --- what a program keeps, and goes on with -------------------------------------------------------


def every_fifth(n: Any, x: Tensor) -> Tensor:
    n.history.append(1.0)
    return n.linear(x) * (3.0 if len(n.history) % 5 == 0 else 1.0)


def when_full(n: Any, x: Tensor) -> Tensor:
    n.queue.append(1.0)
    return n.linear(x) * (3.0 if len(n.queue) == n.queue.maxlen else 1.0)


def on_a_plateau(n: Any, x: Tensor) -> Tensor:
    """Cool down where the last five norms do not differ any more."""
    n.norms.append(float(n.linear.weight.detach().norm()))
    last = n.norms[-5:]
    if len(last) == 5 and max(last) - min(last) < 1e-3:
        return n.linear(x) * 0.5
    return n.linear(x)


def masks_unseen(n: Any, x: Tensor) -> Tensor:
    """Leave out classes that no batch has had, as in class-incremental learning."""
    n.seen.update(x.argmax(1).tolist())
    mask = torch.tensor([float(c in n.seen) for c in range(D)])
    return n.linear(x) * mask


def counts_seen(n: Any, x: Tensor) -> Tensor:
    for c in x.argmax(1).tolist():
        n.counts[int(c)] = 1
    mask = torch.tensor([float(c in n.counts) for c in range(D)])
    return n.linear(x) * mask


def grows_by_one(n: Any, x: Tensor) -> Tensor:
    n.seen.add(len(n.seen))
    return n.linear(x) * (3.0 if len(n.seen) > 3 else 1.0)


def all_classes(model: Any) -> None:
    model(10 * torch.eye(D))


def one_class() -> Data:
    return torch.randn(N, D) + torch.tensor([20.0, 0, 0, 0]), torch.randn(N, D)


def guarded(n: Any, x: Tensor) -> Tensor:
    """Scale down where the running size of the features has exploded."""
    h = n.linear(x)
    n.size = 0.5 * n.size + 0.5 * x.abs().mean()
    return h * torch.where(n.size > 100.0, 0.1, 1.0)


def guarded_by_numpy(n: Any, x: Tensor) -> Tensor:
    n.size = np.float64(0.5 * n.size + 0.5)
    return n.linear(x) * (0.1 if n.size > 0.9 else 1.0)


def counted_by_numpy(n: Any, x: Tensor) -> Tensor:
    n.step = n.step + np.int64(1)
    return n.linear(x) * (3.0 if n.step > 4 else 1.0)


def by_name_of_step(n: Any, x: Tensor) -> Tensor:
    n.step += 1
    return n.linear(x) * n.schedule.get(f"step_{n.step}", 1.0)


def in_phases(n: Any, x: Tensor) -> Tensor:
    n.phase = Phase(min(n.phase.value + 1, 9))
    return n.linear(x) * (3.0 if n.phase.value > 5 else 1.0)


Phase = enum.Enum("Phase", {f"P{i}": i for i in range(10)})


def explode(model: Any) -> None:
    for _ in range(9):
        model(1e6 * torch.ones(N, D))


def by_metric(n: Any, x: Tensor) -> Tensor:
    n.metric.update(1.0)
    return n.linear(x) * (3.0 if n.metric.update_count > 4 else 1.0)


def warm_up(n: Any, x: Tensor) -> Tensor:
    n.step += 1
    return n.linear(x) * min(1.0, n.step / 4)


def frozen_after(n: Any, x: Tensor) -> Tensor:
    n.calls += 1
    h = n.linear(x)
    return h.detach() + n.last(x) if n.calls > 3 else h + n.last(x)


def updated_target(n: Any, x: Tensor) -> Tensor:
    """A target net that follows now and then, as in deep Q-learning."""
    n.calls += 1
    if n.calls % 3 == 0:
        n.target.load_state_dict(n.linear.state_dict())
    return n.linear(x) - n.target(x).detach()


def counts_in_buffer(n: Any, x: Tensor) -> Tensor:
    n.steps += 1
    return n.linear(x) * (3.0 if int(n.steps) > 4 else 1.0)


def best_so_far(n: Any, x: Tensor) -> Tensor:
    size = float(x.abs().mean())
    n.best = size if n.best is None else max(n.best, size)
    return n.linear(x) / n.best


def larger_batch(model: Any) -> None:
    model(10 * torch.randn(N, D))


class State(NamedTuple):
    step: int = 0
    scale: float = 1.0


@dataclasses.dataclass(frozen=True, slots=True)
class SlottedState:
    step: int = 0


@dataclasses.dataclass(frozen=True)
class FrozenState:
    step: int = 0


def in_tuple(n: Any, x: Tensor) -> Tensor:
    """Go on with another state, as functional code does."""
    n.state = n.state._replace(step=n.state.step + 1)
    return n.linear(x) * (3.0 if n.state.step > 4 else 1.0)


def in_replaced(n: Any, x: Tensor) -> Tensor:
    n.state = dataclasses.replace(n.state, step=n.state.step + 1)
    return n.linear(x) * (3.0 if n.state.step > 4 else 1.0)


def in_plain_tuple(n: Any, x: Tensor) -> Tensor:
    step, scale = n.state
    n.state = step + 1, scale
    return n.linear(x) * (3.0 if step + 1 == 5 else 1.0)


def in_frozen_set(n: Any, x: Tensor) -> Tensor:
    n.seen = n.seen | {len(n.seen)}
    return n.linear(x) * (3.0 if len(n.seen) > 4 else 1.0)


def in_counter(n: Any, x: Tensor) -> Tensor:
    n.counts = n.counts + Counter("a")
    return n.linear(x) * (3.0 if n.counts["a"] > 4 else 1.0)


def in_decimals(n: Any, x: Tensor) -> Tensor:
    n.rate = n.rate * Decimal("0.5")
    return n.linear(x) * (3.0 if n.rate < Decimal("0.05") else 1.0)


def in_namespace(n: Any, x: Tensor) -> Tensor:
    n.meter.steps += 1
    n.meter.history.append(n.meter.steps)
    return n.linear(x) * (3.0 if n.meter.history[-1] == 5 else 1.0)


class Averager:
    """Counts and averages, as in scripts for ImageNet."""

    def __init__(self) -> None:
        self.sum, self.count, self.history = 0.0, 0, []
        self.steps = 0

    def update(self, value: float) -> None:
        self.sum += value
        self.count += 1


def by_average(n: Any, x: Tensor) -> Tensor:
    n.meter.update(1.0 if n.meter.count < 4 else 9.0)
    return n.linear(x) * (3.0 if n.meter.sum / n.meter.count > 2.0 else 1.0)


def patience(n: Any, x: Tensor) -> Tensor:
    """Lower the scale where there has been no progress three times."""
    size = float(n.linear.weight.detach().norm())
    n.waited = 0 if size < n.lowest else n.waited + 1
    n.lowest = min(n.lowest, size)
    if n.waited >= 3:
        n.factor, n.waited = n.factor * 0.5, 0
    return n.linear(x) * n.factor


def alternates(n: Any, x: Tensor) -> Tensor:
    n.turn = next(n.turns)
    return n.linear(x) * (3.0 if n.turn == "discriminator" else 1.0)


# --- parameters that Python reads, and a step -----------------------------------------------------


def scalar() -> nn.Parameter:
    return nn.Parameter(torch.ones(()))


def reading(read: Any) -> Any:
    return net(lambda n, x: n.linear(x) * read(n.scale), scale=scalar)


def saved_and_loaded(t: Tensor) -> Tensor:
    file = io.BytesIO()
    torch.save(t.detach(), file)
    file.seek(0)
    return torch.load(file)


def in_memory(t: Tensor) -> float:
    return ctypes.c_float.from_address(t.data_ptr()).value


def in_bytes(t: Tensor) -> float:
    return float(np.frombuffer(t.detach().numpy().tobytes(), np.float32)[0])


def is_one(t: Tensor) -> float:
    return 1.0 if torch.equal(t, torch.ones(())) else 2.0


# --- weights --------------------------------------------------------------------------------------


def straight() -> Any:
    return nn.Sequential(nn.Linear(D, D), nn.Tanh(), nn.Linear(D, D)), squares


def transposed(model: Any) -> None:
    model.linear.weight.data = model.linear.weight.data.t()


def transposed_entries(model: Any) -> None:
    model[0].weight.data = model[0].weight.data.T


class LoRA(nn.Module):
    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base
        self.a, self.b = nn.Parameter(torch.ones(D, 1)), nn.Parameter(torch.ones(1, D))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + x @ self.a @ self.b


def with_lora(model: Any) -> None:
    model[0] = LoRA(model[0])


def tied(model: Any) -> None:
    model[2].weight = model[0].weight


def from_vector(model: Any) -> None:
    vector_to_parameters(torch.ones(2 * (D * D + D)), model.parameters())


def normalised() -> Any:
    model, loss = straight()
    parametrizations.weight_norm(model[0])
    return model, loss


def longer(model: Any) -> None:
    model[0].parametrizations.weight.original0.data.mul_(2)


def without_norm(model: Any) -> None:
    parametrize.remove_parametrizations(model[0], "weight")
    with torch.no_grad():
        model[0].weight.mul_(2)


def averaged_weights() -> Any:
    return torch.optim.swa_utils.AveragedModel(nn.Linear(D, D)), squares


def average(model: Any) -> None:
    model.update_parameters(nn.Linear(D, D))


def spectral() -> Any:
    model = nn.Sequential(nn.utils.spectral_norm(nn.Linear(D, D)), nn.Tanh())
    return model, squares


def ablated(model: Any) -> None:
    """Switch a hidden neuron off."""
    model.wide[1].weight.data[:, 301] = 0


def wide_net() -> nn.Module:
    return nn.Sequential(nn.Linear(D, 2048), nn.Linear(2048, D))


def table_of_words() -> nn.Module:
    return nn.Embedding(3000, D)


def by_words(n: Any, x: Tensor) -> Tensor:
    return n.linear(x) + n.words(torch.arange(7, 7 + N))


def with_hook_of_inputs() -> Any:
    model, loss = straight()
    model[2].register_forward_pre_hook(
        lambda m, args, kwargs: ((args[0] * GAIN,), kwargs), with_kwargs=True
    )
    return model, loss


def quantised(model: Any) -> None:
    for p in model.parameters():
        p.data = torch.round(p.data * 4) / 4


def pruned(model: Any) -> None:
    prune.l1_unstructured(model[0], "weight", 0.5)


def spliced(model: Any) -> None:
    model.insert(1, nn.Linear(D, D))


def dropped(model: Any) -> None:
    del model[1]


def compiled() -> Any:
    model = Net(lambda n, x: n.act(n.linear(x)))
    model.act = torch.compile(lambda x: x * GAIN, backend="eager")
    return model, squares


def ensemble() -> Any:
    """Two members stacked, and run as one."""
    members = [nn.Linear(D, D), nn.Linear(D, D)]
    stacked, _ = torch.func.stack_module_state(members)
    base = copy.deepcopy(members[0]).to("meta")

    def run(n: Any, x: Tensor) -> Tensor:
        one = lambda p: torch.func.functional_call(base, p, (x,))  # noqa: E731
        return torch.vmap(one)(dict(n.members)).mean(0)

    model = Net(run)
    model.members = nn.ParameterDict({k: v.detach().clone() for k, v in stacked.items()})
    return model, squares


# --- losses ---------------------------------------------------------------------------------------


class Focal(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.power, self.register = 1.0, nn.Buffer(torch.ones(D))

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        return ((output - target).abs() ** self.power * self.register).mean()


def with_labels() -> Any:
    labels = torch.randn(N, D)

    def loss(output: Tensor, target: Tensor) -> Tensor:
        return F.mse_loss(output, labels)

    loss.labels = labels  # type: ignore[attr-defined]
    return nn.Linear(D, D), loss


class Distilled:
    """Compares with a teacher that the loss keeps."""

    def __init__(self) -> None:
        self.teacher = nn.Linear(D, D)

    def __call__(self, output: Tensor, target: Tensor) -> Tensor:
        with torch.no_grad():
            soft = self.teacher(target)
        return F.mse_loss(output, soft)


def soft_labels(output: Tensor, target: Tensor, smoothing: float = 0.0) -> Tensor:
    return F.cross_entropy(output, target.softmax(1), label_smoothing=smoothing)


def smoothed() -> Any:
    return nn.Linear(D, D), functools.partial(soft_labels)


class Sum:
    """A loss made of others with weights."""

    def __init__(self) -> None:
        self.parts = [(1.0, F.mse_loss), (1.0, F.l1_loss)]

    def __call__(self, output: Tensor, target: Tensor) -> Tensor:
        return sum(w * part(output, target) for w, part in self.parts)


# --- objects of libraries -------------------------------------------------------------------------


def graph() -> Any:
    made = nx.path_graph(D)
    nx.set_edge_attributes(made, 1.0, "weight")
    return made


def by_graph(n: Any, x: Tensor) -> Tensor:
    matrix = nx.to_numpy_array(n.graph, weight="weight", dtype=np.float32)
    return n.linear(x) @ torch.from_numpy(matrix)


def scaler() -> Any:
    return StandardScaler().fit(np.random.default_rng(0).normal(size=(9, D)))


def by_scaler(n: Any, x: Tensor) -> Tensor:
    mean = torch.as_tensor(n.scaler.mean_, dtype=x.dtype)
    return n.linear(x - mean)


def pipeline() -> Any:
    return make_pipeline(StandardScaler()).fit(np.random.default_rng(0).normal(size=(9, D)))


def by_pipeline(n: Any, x: Tensor) -> Tensor:
    return n.linear(torch.from_numpy(n.pipeline.transform(x.numpy()).astype(np.float32)))


def by_csr(n: Any, x: Tensor) -> Tensor:
    return n.linear(x) @ torch.from_numpy(n.matrix.toarray())


CHANGES: dict[str, Change] = {
    # Attributes.
    "an attribute asked forgiveness for": (
        net(asks_forgiveness, config=Config),
        put("config.scale", 3.0),
    ),
    "an attribute of the model asked forgiveness for": (
        net(asks_forgiveness_of_itself),
        put("extra_scale", 3.0),
    ),
    "a setting that had a default": (
        net(times(lambda n: n.config.warmth), config=WithDefaults),
        put("config.warmth", 3.0),
    ),
    "an attribute that a protocol asks for": (
        net(by_protocol, config=Config),
        put("config.scale", 3.0),
    ),
    "a factor that is kept from now on": (
        net(times(lambda n: n.memo.factor()), memo=Memo),
        lambda model: setattr(model.memo, "_factor", 3.0),
    ),
    "an attribute among all members": (
        net(all_weights, weights=Weights),
        put("weights.second", 3.0),
    ),
    "an attribute of two that are compared": (
        net(by_dataclass_equality, weights=Weights),
        put("weights.second", 3.0),
    ),
    "an attribute of what is replaced": (
        net(by_replaced, weights=Weights),
        put("weights.second", 3.0),
    ),
    "an attribute that is pickled": (net(by_pickle, box=Box), put("box.content", "aaa")),
    "a class registered with another": (
        net(by_marker, piece=Piece),
        lambda model: Marker.register(Piece) and None,
    ),
    "the bases of a class": (net(times(lambda n: n.mixed.factor()), mixed=Mixed), inject),
    "an attribute by a name that is made": (
        net(times(lambda n: n.named.scale(1)), named=Named),
        put("named.scale_1", 3.0),
    ),
    "a flag whose name is data": (
        net(by_flag, config=Config, flag=lambda: "fl" + "ag"),
        put("config.flag", True),
    ),
    "settings by their hash": (
        net(by_hash, box=Box, factors=lambda: {joblib.hash(Box()): 2.0}),
        put("box.content", "aaa"),
    ),
    "a setting of pydantic": (
        net(times(lambda n: n.config.scale), config=Settings),
        put("config.scale", 3.0),
    ),
    "the only object, made by its class": (
        net(times(lambda n: Singleton().scale)),
        patched(Singleton(), "scale", 3.0),
    ),
    "a whole enum": (
        net(times(lambda n: int(n.level)), level=lambda: Level.LOW),
        put("level", Level.HIGH),
    ),
    "a flag more": (
        net(
            times(lambda n: 3.0 if Aspect.EXTRA in n.aspect else 1.0),
            aspect=lambda: Aspect.BASE,
        ),
        put("aspect", Aspect.BASE | Aspect.EXTRA),
    ),
    # Code.
    "a setting of a file imported by its name": (
        net(imports_by_name, name=lambda: "fourth_settings"),
        scale_setting,
    ),
    "a global that a divergence of one's own reads": (net(divergence), gain),
    "a global that an op of a library of one's own reads": (
        net(lambda n, x: torch.ops.fourth.grown(n.linear(x))),
        gain,
    ),
    "a global that an activation by its name reads": (
        net(lambda n, x: ACT2FN["fourth"](n.linear(x))),
        gain,
    ),
    "a global that a registered function reads": (
        net(lambda n, x: REGISTRY.tripled(n.linear(x))),
        gain,
    ),
    "a function registered anew": (
        net(lambda n, x: REGISTRY.tripled(n.linear(x))),
        entry(REGISTRY.functions, "tripled", lambda x: 5 * x),
    ),
    "a global of a method by dispatch": (
        net(lambda n, x: n.part.scaled(n.linear(x)), part=Dispatching),
        gain,
    ),
    "a global of a function made for arrays": (
        net(
            times(lambda n: float(n.scale(1.0))),
            scale=lambda: np.frompyfunc(lambda v: v * GAIN, 1, 1),
        ),
        gain,
    ),
    "a global that a callback of C reads": (
        net(times(lambda n: n.callback(1.0)), callback=own_callback),
        gain,
    ),
    "a class of layers that is made in forward": (
        net(lambda n, x: nn.LayerNorm(D)(n.linear(x))),
        patched(nn.LayerNorm, "forward", lambda self, x: 3 * x),
    ),
    "a global that a decorating object reads": (net(lambda n, x: metered(n.linear(x))), gain),
    "an attribute of a decorated function": (
        net(lambda n, x: decorated(n.linear(x))),
        patched(decorated, "factor", 3.0),
    ),
    "a global without gradients": (
        net(lambda n, x: n.linear(x) * without_gradient(x)),
        gain,
    ),
    "a global of an operator of one's own": (
        net(lambda n, x: n.linear(x) * 1.0 + n.chosen * torch.ones(D), chosen=Chosen),
        gain,
    ),
    "a global in a comprehension": (net(comprehended, parts=lambda: [0.5, 0.5]), gain),
    "a global in the body of a class": (net(nested_class), gain),
    "an entry by a walrus": (net(walrus, key=lambda: "scale"), entry(TABLE, "scale", 3.0)),
    "a global of a compiled function": (compiled, gain),
    "a global of a hook with keywords": (with_hook_of_inputs, gain),
    # What a program keeps.
    "every fifth of a history": (net(every_fifth, history=list), plain(4)),
    "a queue that is full": (net(when_full, queue=lambda: deque(maxlen=200)), plain(200)),
    "norms on a plateau": (net(on_a_plateau, norms=list), plain(5)),
    "more than three of a set": (net(grows_by_one, seen=set), plain(5)),
    "a running size that explodes": (net(guarded, size=lambda: torch.ones(())), explode),
    "a running mean of numpy": (net(guarded_by_numpy, size=lambda: np.float64(0.0)), plain(9)),
    "steps counted by numpy": (net(counted_by_numpy, step=lambda: np.int64(0)), plain(6)),
    "a step by its name": (
        net(by_name_of_step, step=lambda: 0, schedule=lambda: {"step_6": 3.0}),
        plain(5),
    ),
    "phases, one after the other": (net(in_phases, phase=lambda: Phase(0)), plain(7)),
    "steps in a named tuple": (net(in_tuple, state=State), plain(6)),
    "steps in a state with slots": (net(in_replaced, state=SlottedState), plain(6)),
    "steps in a frozen state": (net(in_replaced, state=FrozenState), plain(6)),
    "the fifth step, in a tuple": (net(in_plain_tuple, state=lambda: (0, 1.0)), plain(4)),
    "more than four of a frozen set": (net(in_frozen_set, seen=frozenset), plain(6)),
    "counts that are added": (net(in_counter, counts=Counter), plain(6)),
    "a rate in decimals": (net(in_decimals, rate=lambda: Decimal(1)), plain(6)),
    "the last of a history": (net(in_namespace, meter=Averager), plain(4)),
    "an average of a meter": (net(by_average, meter=Averager), plain(8)),
    "patience": (
        net(patience, waited=lambda: 0, lowest=lambda: float("inf"), factor=lambda: 1.0),
        plain(4),
    ),
    "turns of two players": (
        net(
            alternates,
            turn=lambda: "",
            turns=lambda: iter(["generator"] * 3 + ["discriminator"] * 99),
        ),
        lambda model: [next(model.turns) for _ in range(4)] and None,
    ),
    "a metric's count": (net(by_metric, metric=MeanMetric), plain(6)),
    "a warm-up": (net(warm_up, step=lambda: 0), plain(2)),
    "a layer frozen after some calls": (
        net(frozen_after, calls=lambda: 0, last=lambda: nn.Linear(D, D)),
        plain(5),
    ),
    "a target that follows": (
        net(updated_target, calls=lambda: 0, target=lambda: nn.Linear(D, D)),
        plain(3),
    ),
    "steps in a buffer": (
        net(counts_in_buffer, steps=lambda: nn.Buffer(torch.zeros((), dtype=torch.long))),
        plain(6),
    ),
    "the best so far": (net(best_so_far, best=lambda: None), larger_batch),
    "counted once in two": (
        net(counting(lambda n: 3.0 if n.step & 1 else 1.0), step=lambda: 0),
        plain(1),
    ),
    # Parameters that Python reads.
    "a parameter by float": (reading(float), step),
    "a parameter by tolist": (reading(lambda t: t.tolist()), step),
    "a parameter printed": (reading(lambda t: float(f"{t.item():.6f}")), step),
    "a parameter by numpy": (reading(lambda t: float(t.detach().numpy())), step),
    "a parameter in memory": (reading(in_memory), step),
    "a parameter in bytes": (reading(in_bytes), step),
    "a parameter pickled": (reading(lambda t: pickle.loads(pickle.dumps(t.detach()))), step),
    "a parameter saved and loaded": (reading(saved_and_loaded), step),
    "a parameter copied deep": (reading(lambda t: copy.deepcopy(t)), step),
    "a parameter in its storage": (reading(lambda t: t.untyped_storage().tolist()[3] / 64), step),
    "a parameter compared": (reading(is_one), step),
    "a parameter made anew": (reading(lambda t: torch.tensor([t.item(), 1.0])[0]), step),
    # Weights.
    "a square weight transposed": (net(lambda n, x: n.linear(x)), transposed),
    "a square weight of a layer transposed": (straight, transposed_entries),
    "a square buffer transposed": (
        net(
            lambda n, x: n.linear(x) @ n.kept, kept=lambda: nn.Buffer(torch.arange(16.0).view(D, D))
        ),
        lambda model: model.kept.t_(),
    ),
    "a square buffer of other strides": (
        net(
            lambda n, x: n.linear(x) @ n.kept, kept=lambda: nn.Buffer(torch.arange(16.0).view(D, D))
        ),
        lambda model: setattr(model.kept, "data", model.kept.data.T),
    ),
    "adapters of low rank": (straight, with_lora),
    "weights tied": (straight, tied),
    "parameters from a vector": (straight, from_vector),
    "the length of a normalised weight": (normalised, longer),
    "a norm removed": (normalised, without_norm),
    "weights averaged": (averaged_weights, average),
    "a weight with a spectral norm": (
        spectral,
        lambda model: model[0].weight_orig.data.add_(torch.eye(D)),
    ),
    "a neuron switched off": (net(lambda n, x: n.wide(n.linear(x)), wide=wide_net), ablated),
    "the vector of a word": (
        net(by_words, words=table_of_words),
        lambda model: model.words.weight.data[9].zero_(),
    ),
    "weights rounded": (straight, quantised),
    "weights pruned": (straight, pruned),
    "a layer more": (straight, spliced),
    "a layer less": (straight, dropped),
    "a member of an ensemble": (ensemble, lambda model: model.members["weight"].data[1].mul_(2)),
    "a layer on other data": (
        layers(lambda: nn.Linear(D, D), lambda: nn.BatchNorm1d(D)),
        lambda model: setattr(model[1], "momentum", 0.5) or model.eval(),
    ),
    "gradients clipped by a parameter's hook": (
        straight,
        lambda model: model[0].weight.register_hook(lambda g: g * 0.1) and None,
    ),
    "a layer that is frozen": (straight, lambda model: model[0].requires_grad_(False) and None),
    # Losses.
    "the power of a loss": (lambda: (nn.Linear(D, D), Focal()), lambda model: None),
    "a buffer of a loss": (lambda: (nn.Linear(D, D), Focal()), lambda model: None),
    "labels that a loss has": (with_labels, lambda model: None),
    "the teacher of a loss": (lambda: (nn.Linear(D, D), Distilled()), lambda model: None),
    "smoothing of a partial": (smoothed, lambda model: None),
    "the weights of parts": (lambda: (nn.Linear(D, D), Sum()), lambda model: None),
    # Objects of libraries.
    "the weight of an edge": (
        net(by_graph, graph=graph),
        lambda model: model.graph[0][1].update(weight=3.0),
    ),
    "the mean of a scaler": (
        net(by_scaler, scaler=scaler),
        lambda model: np.add(model.scaler.mean_, 3, out=model.scaler.mean_),
    ),
    "a scaler fitted further": (
        net(by_scaler, scaler=scaler),
        lambda model: model.scaler.partial_fit(3 + np.ones((9, D))) and None,
    ),
    "entries of a sparse matrix of scipy": (
        net(by_csr, matrix=lambda: scipy.sparse.csr_matrix(np.eye(D, dtype=np.float32))),
        lambda model: np.multiply(model.matrix.data, 3, out=model.matrix.data),
    ),
    "the scale of a law of scipy": (
        net(times(lambda n: float(n.law.std())), law=lambda: scipy.stats.norm(scale=1.0)),
        lambda model: model.law.kwds.update(scale=3.0),
    ),
    "the rate of a law": (
        net(times(lambda n: n.law.mean), law=lambda: laws.Exponential(torch.ones(()))),
        lambda model: setattr(model.law, "rate", torch.full((), 3.0)),
    ),
}

# Where the loss changes, and not the model.
LOSSES: dict[str, Any] = {
    "the power of a loss": lambda loss: setattr(loss, "power", 2.0),
    "a buffer of a loss": lambda loss: loss.register.mul_(3),
    "labels that a loss has": lambda loss: loss.labels.mul_(3),
    "the teacher of a loss": lambda loss: loss.teacher.weight.data.mul_(3),
    "smoothing of a partial": lambda loss: loss.keywords.update(smoothing=0.3),
    "the weights of parts": lambda loss: loss.parts.__setitem__(0, (3.0, F.mse_loss)),
}


# --- the data -------------------------------------------------------------------------------------


def images() -> Data:
    return torch.randn(N, 3, 40, 40), torch.randn(N, 3)


def by_pixels(n: Any, x: Tensor) -> Tensor:
    return n.scale * x.sum((2, 3))


OF_DATA: dict[str, tuple[Callable[[], Any], Callable[[], Data], Callable[[Any, Any], Any]]] = {
    "one pixel of the data of the inputs": (
        net(by_pixels, scale=lambda: nn.Parameter(torch.ones(3))),
        images,
        lambda x, y: x.data[2, 1, 7, 9].fill_(99.0),
    ),
    "one pixel of the inputs": (
        net(by_pixels, scale=lambda: nn.Parameter(torch.ones(3))),
        images,
        lambda x, y: x[2, 1, 7, 9].fill_(99.0),
    ),
    "square inputs transposed": (
        net(lambda n, x: n.linear(x[:, :D])),
        lambda: (torch.randn(N, N), torch.randn(N, D)),
        lambda x, y: x.t_(),
    ),
    "inputs put in other memory": (
        net(lambda n, x: n.linear(x)),
        rows,
        lambda x, y: setattr(x, "data", torch.ones(N, D)),
    ),
    "the sign of inputs that decides a path": (
        net(lambda n, x: n.linear(x) * (2.0 if x.numpy().sum() > 0 else 1.0)),
        lambda: (torch.ones(N, D), torch.randn(N, D)),
        lambda x, y: x.neg_(),
    ),
    "inputs of which a window is filled": (
        net(lambda n, x: n.linear(x)),
        lambda: (torch.randn(2 * N, D)[::2], torch.randn(N, D)),
        lambda x, y: x._base.fill_(1.0),
    ),
    "a number among inputs": (
        net(lambda n, batch: n.linear(batch["x"]) * batch["scale"]),
        lambda: (({"x": torch.randn(N, D), "scale": 1.0},), torch.randn(N, D)),
        lambda x, y: x[0].update(scale=3.0),
    ),
    "a flag among inputs": (
        net(lambda n, batch: n.linear(batch["x"]) * (3.0 if batch["double"] else 1.0)),
        lambda: (({"x": torch.randn(N, D), "double": False},), torch.randn(N, D)),
        lambda x, y: x[0].update(double=True),
    ),
    "nothing among inputs, and then a mask": (
        net(lambda n, batch: n.linear(batch["x"]) * (1.0 if batch["m"] is None else batch["m"])),
        lambda: (({"x": torch.randn(N, D), "m": None},), torch.randn(N, D)),
        lambda x, y: x[0].update(m=torch.full((N, D), 2.0)),
    ),
    "a list of words among inputs": (
        net(lambda n, batch: n.linear(batch["x"]) * float(len(batch["words"][0]))),
        lambda: (({"x": torch.randn(N, D), "words": ["a"] * N},), torch.randn(N, D)),
        lambda x, y: x[0]["words"].__setitem__(0, "aaa"),
    ),
    "the real part of a kind of numbers": (
        net(lambda n, batch: n.linear(batch["x"]) * abs(batch["z"])),
        lambda: (({"x": torch.randn(N, D), "z": 1 + 0j},), torch.randn(N, D)),
        lambda x, y: x[0].update(z=3 + 4j),
    ),
    "classes that one batch has seen": (
        net(masks_unseen, seen=set),
        one_class,
        lambda x, y: None,
    ),
    "classes that one batch has counted": (
        net(counts_seen, counts=dict),
        one_class,
        lambda x, y: None,
    ),
}

# What is done to the model beside.
BESIDE: dict[str, Any] = {
    "classes that one batch has seen": all_classes,
    "classes that one batch has counted": all_classes,
}


# --- another batch --------------------------------------------------------------------------------


def channels_last() -> Tensor:
    return torch.randn(N, 3, 4, 4).to(memory_format=torch.channels_last)


def image_net(run: Any) -> Callable[[], Any]:
    return lambda: (Net(run, head=nn.Linear(48, D), conv=nn.Conv2d(3, 3, 3, padding=1)), squares)


def transposed_rows() -> Tensor:
    return torch.randn(D, N).T


def windows(n: Any, x: Tensor) -> Tensor:
    """Sums of neighbours, by a view with overlaps."""
    pairs = x.as_strided((len(x), D - 1, 2), (x.stride(0), x.stride(1), x.stride(1)))
    return n.linear(torch.cat([pairs.sum(2), x[:, :1]], 1))


def by_layout(n: Any, x: Tensor) -> Tensor:
    h = n.linear(x)
    return h if x.is_contiguous() else 2 * h


def plain_rows() -> Tensor:
    return torch.randn(N, D)


def plain_images() -> Tensor:
    return torch.randn(N, 3, 4, 4)


def gains(n: Any, batch: dict[str, Any]) -> Tensor:
    return n.linear(batch["x"]) * batch["gain"]


def with_gain(gain: float) -> Callable[[], Any]:
    return lambda: ({"x": torch.randn(N, D), "gain": gain},)


# A model, and two batches: what is said of the second must be what is said of it alone.
BATCHES: dict[str, tuple[Callable[[], Any], Callable[[], Any], Callable[[], Any]]] = {
    "images by channel, flattened": (
        image_net(lambda n, x: n.head(x.flatten(1))),
        plain_images,
        channels_last,
    ),
    "images by channel, reshaped": (
        image_net(lambda n, x: n.head(x.reshape(len(x), -1))),
        plain_images,
        channels_last,
    ),
    "images by channel, unflattened": (
        image_net(lambda n, x: n.head(nn.Flatten()(x))),
        channels_last,
        plain_images,
    ),
    "images by channel, convolved": (
        image_net(lambda n, x: n.conv(x).mean((2, 3)).repeat(1, 2)[:, :D]),
        plain_images,
        channels_last,
    ),
    "images by channel, convolved and flattened": (
        image_net(lambda n, x: n.head(n.conv(x).relu().flatten(1))),
        plain_images,
        channels_last,
    ),
    "patches of images by channel": (
        image_net(lambda n, x: n.head(F.unfold(x, 4).flatten(1))),
        plain_images,
        channels_last,
    ),
    "transposed rows": (net(lambda n, x: n.linear(x)), plain_rows, transposed_rows),
    "transposed rows, one after the other": (
        net(lambda n, x: n.linear(x.reshape(-1).view(N, D))),
        plain_rows,
        transposed_rows,
    ),
    "transposed rows in windows": (net(windows), plain_rows, transposed_rows),
    "transposed rows that decide": (net(by_layout), plain_rows, transposed_rows),
    "rows of a larger batch": (
        net(lambda n, x: n.linear(x)),
        plain_rows,
        lambda: torch.randn(2 * N, D)[::2],
    ),
    "one row, expanded": (
        net(lambda n, x: n.linear(x.reshape(-1).view(N, D))),
        plain_rows,
        lambda: torch.randn(1, D).expand(N, D),
    ),
    "another number beside": (net(gains), with_gain(1.0), with_gain(3.0)),
    "a whole number beside": (net(gains), with_gain(1.0), with_gain(3)),
    "rows that require gradients": (
        net(lambda n, x: n.linear(x)),
        plain_rows,
        lambda: torch.randn(N, D, requires_grad=True),
    ),
    "rows in inference mode": (
        net(lambda n, x: n.linear(x)),
        plain_rows,
        made_in_inference(plain_rows),
    ),
    "sorted by what is first": (
        net(lambda n, x: n.linear(x)[:, sorted(range(D), key=lambda i: float(x[0, i]))]),
        plain_rows,
        plain_rows,
    ),
    "a path by the largest": (
        net(lambda n, x: n.linear(x) if x.max() < 5 else n.linear(x.clamp(max=5))),
        plain_rows,
        lambda: 10 * torch.randn(N, D),
    ),
}
