"""Programs that change something while they run, by a third hunt.

As in `cases/messy.py`: a function that makes a model, and one that returns what must stay.
`OF_DATA` are programs that change the data that they are given: what makes the model and the
data, and what must stay of the data. A program that is refused before it runs is right, too.
"""

import concurrent.futures
import csv
import dataclasses
import functools
import io
import logging
import os
import random
import threading
import warnings
from collections import Counter, OrderedDict, UserDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import torch
from scipy.stats import qmc
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize, prune
from torch.utils.data import Subset, TensorDataset
from transformers import DynamicCache

from cases.changes import D, N, Net
from cases.hunt import third_settings
from cases.hunt.third_changes import (
    LRU,
    UNDO,
    Hidden,
    SlottedDict,
    Stretched,
    in_file,
    made_in_inference,
)
from cases.messy import Case, net, own, part

COUNTS = {"calls": 0, "made": 0}
MADE: list[Any] = []


def counts(model: Any) -> Any:
    return dict(COUNTS), len(MADE)


def count(x: Any = None) -> Any:
    COUNTS["calls"] += 1
    return x


# --- objects and classes --------------------------------------------------------------------------


class Cached:
    """Makes a table for all objects of the class when it is first needed."""

    @classmethod
    def table(cls) -> Tensor:
        if not hasattr(cls, "made"):
            cls.made = torch.ones(D)  # type: ignore[attr-defined]
            UNDO.append(lambda: delattr(cls, "made"))
        return cls.made  # type: ignore[attr-defined]


class Noted:
    """Keeps a list of all its objects."""

    def __init__(self) -> None:
        MADE.append(1)


class NotedToo(Noted):
    pass


@dataclasses.dataclass
class Prepared:
    size: int = D

    def __post_init__(self) -> None:
        COUNTS["made"] += 1


KINDS = {"noted": Noted}


class Log:
    """Where lines are printed to, as a tee is."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def write(self, text: str) -> None:
        self.lines.append(text)


class Handler(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.records: list[Any] = []

    def emit(self, record: Any) -> None:
        self.records.append(record)


def logger() -> Any:
    log = logging.Logger("third")
    log.addHandler(Handler())
    return log


class Task:
    def __str__(self) -> str:
        COUNTS["calls"] += 1
        return "task"


class Kept(list):
    """A list that only grows."""

    def clear(self) -> None:
        raise TypeError("what has been noted is kept")


class Noting(dict):
    """A dict that notes what it is updated with."""

    def __init__(self) -> None:
        super().__init__(a=1)
        self.notes = 0

    def update(self, *args: Any, **kwargs: Any) -> None:
        COUNTS["calls"] += 1
        super().update(*args, **kwargs)


class Tree(dict):
    """A dict whose entries are made when they are looked at."""

    __slots__ = ()

    def __getattr__(self, name: str) -> Any:
        return self.setdefault(name, Tree())


class Counting(random.Random):
    calls = 0

    def random(self) -> float:
        self.calls += 1
        return super().random()


class Timed(threading.Thread):
    """A worker that keeps what it has done."""

    def __init__(self) -> None:
        super().__init__()
        self.done: list[int] = []

    def work(self) -> None:
        self.done.append(1)


class Stats(UserDict):
    __module__ = "threading_tools"


class Steps:
    """Kept in the user's file `wandb_tools.py`."""

    __module__ = "wandb_tools"

    def __init__(self) -> None:
        self.calls = 0


def adds_line(n: Any) -> None:
    with open(n.path, "a") as file:
        file.write("step")


def made_file(path: str) -> None:
    UNDO.append(lambda: Path(path + ".done").unlink(missing_ok=True))


def matched(n: Any) -> None:
    match n.meter:
        case SimpleNamespace(seen=seen):
            seen.append(1)


def imports(n: Any) -> None:
    from cases.hunt import third_settings as settings

    settings.CALLS += 1


def makes_a_setting(n: Any) -> None:
    third_settings.LATE = 1  # type: ignore[attr-defined]


def late_setting(model: Any) -> Any:
    present = "LATE" in vars(third_settings)
    if present:
        UNDO.append(lambda: vars(third_settings).pop("LATE", None))
    return present


def warns(n: Any) -> None:
    warnings.warn("this layer is old", stacklevel=1)


def registry(model: Any) -> Any:
    return sorted(map(str, globals().get("__warningregistry__", {}).keys() - {"version"}))


@torch.library.custom_op("third::counted", mutates_args=())
def counted(x: Tensor) -> Tensor:
    COUNTS["calls"] += 1
    return x.clone()


counted.register_autograd(lambda ctx, g: g)


@contextmanager
def noted() -> Iterator[None]:
    COUNTS["calls"] += 1
    yield


def in_context(n: Any) -> None:
    with noted():
        pass


def patched_tensor(n: Any, x: Tensor) -> Tensor:
    return n.linear(x).third_counted()


def with_patch() -> nn.Module:
    Tensor.third_counted = count  # type: ignore[attr-defined]
    UNDO.append(lambda: delattr(Tensor, "third_counted"))
    return Net(patched_tensor)


class Tracked(torch.autograd.Function):
    calls = 0

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        Tracked.calls += 1
        return x.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        COUNTS["calls"] += 1
        return g


def in_backward(n: Any, x: Tensor) -> Tensor:
    h = n.linear(x)
    if h.requires_grad:
        h.register_hook(lambda g: n.norms.append(float(g.norm())))
    return h


# --- training inside forward ----------------------------------------------------------------------


def adapts() -> nn.Module:
    """Adapts a scale to each batch, as test-time training does."""
    model = Net(adapt, scale=nn.Parameter(torch.ones(D)))
    model.optimizer = torch.optim.Adam([model.scale], lr=0.1)
    return model


def adapt(n: Any, x: Tensor) -> Tensor:
    entropy = (x.detach() * n.scale).square().mean()
    n.optimizer.zero_grad()
    entropy.backward()
    n.optimizer.step()
    return n.linear(x * n.scale.detach())


def schedules() -> nn.Module:
    model = Net(scheduled, scale=nn.Parameter(torch.ones(1)))
    model.optimizer = torch.optim.SGD([model.scale], lr=1.0)
    model.scheduler = torch.optim.lr_scheduler.ExponentialLR(model.optimizer, 0.9)
    return model


def scheduled(n: Any, x: Tensor) -> Tensor:
    n.optimizer.step()
    n.scheduler.step()
    return n.linear(x)


def adds_gradient(n: Any) -> None:
    n.linear.weight.square().sum().backward()


def with_gradient() -> nn.Module:
    model = net(adds_gradient)()
    model.linear.weight.grad = torch.ones(D, D)
    return model


def hooks_after(n: Any) -> None:
    n.linear.weight.register_post_accumulate_grad_hook(lambda p: None)


def with_history() -> nn.Module:
    """A state that is connected to what made it, as between steps of truncated backpropagation."""
    model = Net(recurrent)
    model.hidden = model.linear(torch.ones(N, D)).tanh()
    return model


def recurrent(n: Any, x: Tensor) -> Tensor:
    n.hidden.detach_()
    return n.linear(x + n.hidden)


def decaying() -> nn.Module:
    model = Net(decay)
    model.memory = model.linear(torch.ones(N, D)).tanh()
    return model


def decay(n: Any, x: Tensor) -> Tensor:
    n.memory.mul_(0.5)
    return n.linear(x) + n.memory


def with_states() -> nn.Module:
    def run(n: Any, x: Tensor) -> Tensor:
        n.states[0].mul_(0.5)
        n.states.append(n.linear(x).tanh())
        return n.states[-1] + n.states[0]

    model = Net(run)
    model.states = [model.linear(torch.ones(N, D)).tanh()]
    return model


def carrying() -> nn.Module:
    def run(n: Any, x: Tensor) -> Tensor:
        n.hidden = n.linear(x + n.hidden.detach_()).tanh()
        return n.hidden

    model = Net(run)
    model.hidden = model.linear(torch.ones(N, D)).tanh()
    return model


def prepared() -> nn.Module:
    """A weight that is made once for many runs."""
    model = Net(lambda n, x: n.linear(x) @ n.made)
    model.weight = nn.Parameter(torch.eye(D))
    model.made = model.weight.tanh()
    return model


def can_be_differentiated(model: Any) -> bool:
    try:
        torch.autograd.grad(model.made.sum(), model.weight, retain_graph=True)
    except RuntimeError:
        return False
    return True


def parametrized() -> nn.Module:
    """A model whose weights PyTorch makes once, as long as a context is open."""
    layers = nn.Sequential(nn.Linear(D, D), nn.Tanh())
    parametrizations.weight_norm(layers[0])
    context = parametrize.cached()
    context.__enter__()
    UNDO.append(lambda: context.__exit__(None, None, None))
    return layers


def can_be_trained(layers: Any) -> bool:
    try:
        loss = layers(torch.ones(N, D)).sum()
        torch.autograd.grad(loss, list(layers.parameters()), retain_graph=True)
    except RuntimeError:
        return False
    return True


def cached_weights(layers: Any) -> Any:
    return len(parametrize._cache)


def history(name: str) -> Any:
    return part(name, lambda t: (t.requires_grad, type(t.grad_fn).__name__, t.tolist()))


def loads(n: Any, x: Tensor) -> Tensor:
    """Count how often each expert is used, without leaving autograd."""
    gates = n.linear(x).softmax(-1)
    n.usage += gates.sum(0)
    return gates


# --- tensors --------------------------------------------------------------------------------------


def adjacency() -> Any:
    return nn.Buffer(torch.eye(D).to_sparse())


def jagged() -> Any:
    parts = [torch.ones(2), torch.ones(3)]
    return nn.Buffer(torch.nested.nested_tensor(parts, layout=torch.jagged))


class Late:
    """Says so where it is asked for anything before it has been loaded."""

    __slots__ = ("_loaded",)
    asked = 0

    def __getattr__(self, name: str) -> Any:
        raise RuntimeError(f"load it first, then ask for {name}")


def in_thread(n: Any) -> None:
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        pool.submit(lambda: n.kept.add_(1)).result()


def in_own_thread(n: Any) -> None:
    worker = threading.Thread(target=lambda: n.kept.mul_(2.0))
    worker.start()
    worker.join()


def frees(n: Any) -> None:
    """Move a buffer to other memory, and back, as what saves memory does."""
    saved = n.kept.clone()
    n.kept.untyped_storage().resize_(0)
    n.kept.untyped_storage().resize_(saved.nbytes)
    n.kept.copy_(saved + 1)


def prunes(n: Any) -> None:
    prune.random_unstructured(n.linear, "weight", 0.1)


def parametrizes(n: Any) -> None:
    parametrize.register_parametrization(n.linear, "weight", Stretched())


def normalizes(n: Any) -> None:
    parametrizations.weight_norm(n.linear)


def kinds(model: Any) -> Any:
    layer = model.linear
    return type(layer), list(layer._parameters), list(layer._buffers), list(layer._modules)


def swaps(n: Any) -> None:
    torch.utils.swap_tensors(n.first, n.second)


def casts(n: Any) -> None:
    n.head.double()


def of_head(model: Any) -> Any:
    weight = model.head.weight
    return weight.dtype, id(weight), weight.tolist()


def steps_of_rounds(n: Any, x: Tensor) -> Tensor:
    noise = n.seeds.spawn(1)[0].generate_state(1)[0]
    return n.linear(x) * (1.0 + float(noise % 2))


def children(n: Any, x: Tensor) -> Tensor:
    (child,) = n.generator.spawn(1)
    return n.linear(x) * float(child.random())


def by_bits(n: Any, x: Tensor) -> Tensor:
    return n.linear(x) * float(np.random.Generator(n.bits).random())


def by_system(n: Any, x: Tensor) -> Tensor:
    return n.linear(x) * n.random.random()


def locked() -> Any:
    array = np.zeros(3)
    array.setflags(write=False)
    return array


def writes_locked(n: Any) -> None:
    n.sums.setflags(write=True)
    n.sums += 1
    n.sums.setflags(write=False)


def through_float(n: Any) -> None:
    n.sums.dtype = np.int64


def caches(n: Any, x: Tensor) -> Tensor:
    h = n.linear(x)
    n.cache.update(h[:, None, None].detach(), h[:, None, None].detach(), 0)
    return h


def keyed() -> nn.Module:
    model = Net(counts_by_weight)
    model.uses = dict.fromkeys(model.parameters(), 0)
    return model


def counts_by_weight(n: Any, x: Tensor) -> Tensor:
    n.uses[n.linear.weight] += 1
    return n.linear(x)


def by_weight(model: Any) -> Any:
    return list(model.uses.values())


MESSY: dict[str, Case] = {
    # Objects, classes and files of Python.
    "a table that a class makes once": (
        net(lambda n: Cached.table()),
        lambda model: hasattr(Cached, "made"),
    ),
    "a list of all objects of a class in a table": (net(lambda n: KINDS["noted"]()), counts),
    "a list of all objects of a class with a base": (net(lambda n: NotedToo()), counts),
    "a count of the objects of a dataclass": (net(lambda n: Prepared()), counts),
    "a list of all objects of a class of an attribute": (
        net(lambda n: n.kind(), kind=lambda: Noted),
        counts,
    ),
    "lines printed to an object": (
        net(lambda n: print("step", file=n.log), log=Log),
        part("log", lambda log: list(log.lines)),
    ),
    "records of a handler": (
        net(lambda n: n.log.warning("step"), log=logger),
        part("log", lambda log: len(log.handlers[0].records)),
    ),
    "calls of a mock": (
        net(lambda n: n.mock.log(1), mock=MagicMock),
        part("mock", lambda mock: (mock.log.call_count, len(mock.mock_calls))),
    ),
    "a line added to a file": (
        net(adds_line, path=in_file),
        part("path", lambda path: Path(path).read_text()),
    ),
    "a file that is made": (
        net(lambda n: Path(n.path + ".done").touch() or made_file(n.path), path=in_file),
        part("path", lambda path: os.path.exists(path + ".done")),
    ),
    "a count of names": (net(lambda n: f"{n.task}", task=Task), counts),
    "a row of a table that is read": (
        net(lambda n: n.reader.fieldnames, reader=lambda: csv.DictReader(io.StringIO("a,b\n1,2"))),
        part("reader", lambda reader: reader.line_num),
    ),
    "a list that refuses to forget": (
        net(lambda n: n.seen.append(1), seen=Kept),
        part("seen", list),
    ),
    "a dict that counts its updates": (
        net(lambda n: n.table.update(b=2), table=Noting),
        lambda model: (dict(model.table), dict(COUNTS)),
    ),
    "a dict that makes what is looked at": (
        net(lambda n: n.tree.setdefault("a", 1), tree=Tree),
        part("tree", dict),
    ),
    "a cache that forgets": (
        net(lambda n: n.cache["a"], cache=lambda: LRU(a=1, b=2)),
        part("cache", lambda cache: list(OrderedDict.keys(cache))),
    ),
    "a dict in a pattern": (
        net(matched, meter=lambda: SimpleNamespace(seen=[])),
        part("meter", lambda meter: list(meter.seen)),
    ),
    "an object of a class in a file with a library's name": (
        net(lambda n: setattr(n.steps, "calls", n.steps.calls + 1), steps=Steps),
        part("steps", lambda steps: steps.calls),
    ),
    "a dict of a class in a file with a library's name": (
        net(lambda n: n.stats.update(a=1), stats=Stats),
        part("stats", dict),
    ),
    "a list of a thread of one's own": (
        net(lambda n: n.worker.work(), worker=Timed),
        part("worker", lambda worker: list(worker.done)),
    ),
    "a slot with a name of its class": (
        net(lambda n: n.hidden.grow(), hidden=Hidden),
        part("hidden", lambda hidden: hidden.factor()),
    ),
    "a slot of a kind of dict": (
        net(lambda n: setattr(n.table, "scale", 2.0), table=SlottedDict),
        part("table", lambda table: table.scale),
    ),
    "a setting of a file imported where it is used": (
        net(imports),
        lambda model: third_settings.CALLS,
    ),
    "a setting that was not there": (net(makes_a_setting), late_setting),
    "a warning that is given once": (net(warns), registry),
    "a keyword of a partial": (
        net(
            lambda n: n.made.keywords.update(scale=2.0),
            made=lambda: functools.partial(count, scale=1.0),
        ),
        part("made", lambda made: dict(made.keywords)),
    ),
    "a count in the body of an op": (
        own(lambda n, x: torch.ops.third.counted(n.linear(x))),
        counts,
    ),
    "a count in a context": (net(in_context), counts),
    "a count in a method patched onto tensors": (with_patch, counts),
    "a count in an own function": (
        own(lambda n, x: Tracked.apply(n.linear(x))),
        lambda model: (Tracked.calls, dict(COUNTS)),
    ),
    "norms noted in a backward pass": (own(in_backward, norms=list), part("norms", list)),
    "a list in a default by name": (
        lambda: Net(lambda n, x, *, seen=[]: n.linear(x) * (1 + 0 * len(seen.append(1) or seen))),
        lambda model: list(model.run.__kwdefaults__["seen"]),
    ),
    "a count by a letter": (
        net(lambda n: n.seen.update(["a"]), seen=lambda: Counter(a=1)),
        part("seen", dict),
    ),
    # Training inside forward.
    "an optimizer of one's own": (
        adapts,
        lambda model: (len(model.optimizer.state), model.scale.tolist()),
    ),
    "a schedule of one's own": (
        schedules,
        lambda model: (model.scheduler.last_epoch, model.optimizer.param_groups[0]["lr"]),
    ),
    "a gradient added to one that is there": (
        with_gradient,
        part("linear.weight", lambda w: (id(w.grad), w.grad.tolist())),
    ),
    "a list of states with their history": (
        lambda: with_states(),
        lambda model: [
            (t.requires_grad, type(t.grad_fn).__name__, t.tolist()) for t in model.states
        ],
    ),
    "a state rebound, with its history": (
        lambda: carrying(),
        lambda model: (
            id(model.hidden),
            type(model.hidden.grad_fn).__name__,
            model.hidden.tolist(),
        ),
    ),
    "a hook after the gradient of a weight": (
        net(hooks_after),
        part("linear.weight", lambda w: len(w._post_accumulate_grad_hooks or ())),
    ),
    "a state cut from its history": (with_history, history("hidden")),
    "a state decayed in place": (decaying, history("memory")),
    "the history of a weight that is made once": (prepared, can_be_differentiated),
    "weights that are cached for a while": (parametrized, can_be_trained),
    "the cache of weights": (parametrized, cached_weights),
    "a buffer added to with its history": (
        own(loads, usage=lambda: nn.Buffer(torch.zeros(D))),
        history("usage"),
    ),
    "a cache of keys and values": (
        own(caches, cache=DynamicCache),
        part("cache", lambda cache: cache.get_seq_length()),
    ),
    # Tensors.
    "a count by parameter": (keyed, by_weight),
    "a buffer turned": (
        net(
            lambda n: n.kept.transpose_(0, 1).transpose_(1, 2),
            kept=lambda: nn.Buffer(torch.arange(8.0).reshape(2, 2, 2)),
        ),
        part("kept", Tensor.tolist),
    ),
    "a buffer given an axis": (
        net(lambda n: n.kept.unsqueeze_(0), kept=lambda: nn.Buffer(torch.ones(D))),
        part("kept", lambda t: t.shape),
    ),
    "the values of a sparse buffer": (
        net(lambda n: n.kept._values().mul_(2), kept=adjacency),
        part("kept", lambda t: t.to_dense().tolist()),
    ),
    "a sparse buffer multiplied": (
        net(lambda n: n.kept.mul_(2), kept=adjacency),
        part("kept", lambda t: t.to_dense().tolist()),
    ),
    "a buffer written to in a pool of threads": (
        net(in_thread, kept=lambda: nn.Buffer(torch.ones(D))),
        part("kept", Tensor.tolist),
    ),
    "a buffer written to in a thread": (
        net(in_own_thread, kept=lambda: nn.Buffer(torch.ones(D))),
        part("kept", Tensor.tolist),
    ),
    "a buffer filled through its memory": (
        net(lambda n: n.kept.untyped_storage().fill_(0), kept=lambda: nn.Buffer(torch.ones(D))),
        part("kept", Tensor.tolist),
    ),
    "a buffer freed for a while": (
        net(frees, kept=lambda: nn.Buffer(torch.ones(D))),
        part("kept", Tensor.tolist),
    ),
    "a weight pruned": (net(prunes), kinds),
    "a weight parametrised": (net(parametrizes), kinds),
    "a weight normalised": (net(normalizes), kinds),
    "a sparse buffer that is not used": (
        net(lambda n: None, kept=adjacency),
        part("kept", lambda t: t.to_dense().tolist()),
    ),
    "a buffer of sparse rows": (
        net(lambda n: None, kept=lambda: nn.Buffer(torch.eye(D).to_sparse_csr())),
        part("kept", lambda t: t.to_dense().tolist()),
    ),
    "a jagged buffer": (
        net(lambda n: None, kept=jagged),
        part("kept", lambda t: t.values().tolist()),
    ),
    "a buffer made in inference mode that is not used": (
        net(lambda n: None, kept=made_in_inference(lambda: nn.Buffer(torch.ones(D)))),
        part("kept", Tensor.tolist),
    ),
    "an object that is not ready": (
        net(lambda n: n.late, late=Late),
        part("late", lambda late: Late.asked),
    ),
    "two tensors swapped": (
        net(swaps, first=lambda: torch.zeros(1), second=lambda: torch.ones(1)),
        lambda model: (model.first.tolist(), model.second.tolist()),
    ),
    "a layer cast to other numbers": (net(casts, head=lambda: nn.Linear(D, D)), of_head),
    "a layer made anew": (
        net(lambda n: n.head.reset_parameters(), head=lambda: nn.Linear(D, D)),
        of_head,
    ),
    "a module made of others": (
        net(lambda n: n.add_module("late", nn.Tanh())),
        lambda model: list(model._modules),
    ),
    "the list of a subset": (
        net(
            lambda n: n.part.indices.append(1),
            part=lambda: Subset(TensorDataset(torch.ones(3)), [0]),
        ),
        part("part", lambda subset: list(subset.indices)),
    ),
    # Random numbers and arrays.
    "seeds that have children": (
        own(steps_of_rounds, seeds=lambda: np.random.SeedSequence(1)),
        part("seeds", lambda seeds: seeds.n_children_spawned),
    ),
    "a generator that has children": (
        own(children, generator=lambda: np.random.default_rng(1)),
        part("generator", lambda g: g.bit_generator.seed_seq.n_children_spawned),
    ),
    "bits of a generator": (
        own(by_bits, bits=lambda: np.random.PCG64(1)),
        part("bits", lambda bits: bits.state),
    ),
    "random numbers of the system": (own(by_system, random=random.SystemRandom), counts),
    "a generator that counts": (
        own(lambda n, x: n.linear(x) * n.random.random(), random=lambda: Counting(1)),
        part("random", lambda g: (g.calls, g.getstate())),
    ),
    "an engine of scipy": (
        own(
            lambda n, x: n.linear(x) * float(n.engine.random(1)[0, 0]),
            engine=lambda: qmc.Sobol(1, rng=1),
        ),
        part("engine", lambda engine: engine.num_generated),
    ),
    "a large array": (
        net(lambda n: n.replay.__setitem__(0, 1), replay=lambda: np.zeros(2**26 + 8, np.uint8)),
        part("replay", lambda array: int(array[0])),
    ),
    "a locked array": (
        net(writes_locked, sums=locked),
        part("sums", lambda array: (array.tolist(), array.flags.writeable)),
    ),
    "the type of an array": (
        net(through_float, sums=lambda: np.ones(3)),
        part("sums", lambda array: (array.dtype, array.tolist())),
    ),
    "a masked array": (
        net(lambda n: n.kept.__setitem__(1, np.ma.masked), kept=lambda: np.ma.array([1.0, 2.0])),
        part("kept", lambda array: array.mask.tolist()),
    ),
    "a file in memory cut off": (
        net(lambda n: n.file.truncate(0), file=lambda: io.StringIO("1.0")),
        part("file", lambda file: file.getvalue()),
    ),
}


# --- the data -------------------------------------------------------------------------------------

Data = tuple[Any, Any]
OfData = tuple[Callable[[], nn.Module], Any, Callable[[], Data], Callable[[Any, Any], Any]]


def squares(output: Tensor, target: Any) -> Tensor:
    if isinstance(target, dict):
        target = target["y"]
    return (output - target).square().mean()


def rows() -> Data:
    return torch.randn(N, D), torch.randn(N, D)


def beside(make: Callable[[], Any]) -> Callable[[], Data]:
    return lambda: ((torch.randn(N, D), make()), torch.randn(N, D))


def in_dict() -> Data:
    return ({"x": torch.randn(N, D), "mask": torch.ones(N, D)},), torch.randn(N, D)


def state(t: Tensor) -> Any:
    return t.tolist(), t.requires_grad, t.grad, t.shape, t.stride(), len(t._backward_hooks or ())


def of_inputs(x: Any, y: Any) -> Any:
    return state(x)


def of_targets(x: Any, y: Any) -> Any:
    return state(y)


class Beside(nn.Module):
    """A linear layer, and what else it is given."""

    def __init__(self, run: Any) -> None:
        super().__init__()
        self.linear, self.run = nn.Linear(D, D), run

    def forward(self, *args: Any) -> Tensor:
        return self.run(self, *args)


def model(run: Any) -> Callable[[], nn.Module]:
    return lambda: Beside(run)


def saliency(n: Any, x: Tensor) -> Tensor:
    x.requires_grad_(True)
    (slope,) = torch.autograd.grad(n.linear(x).square().sum(), x, create_graph=True)
    return slope


def saliency_of_backward(n: Any, x: Tensor) -> Tensor:
    x.requires_grad_(True)
    n.linear(x).sum().backward()
    return n.linear(x)


def with_hook_on_data(n: Any, x: Tensor) -> Tensor:
    x.requires_grad_(True)
    x.register_hook(lambda g: g)
    return n.linear(x)


def gives_axis(n: Any, x: Tensor) -> Tensor:
    return n.linear(x.unsqueeze_(1)).squeeze(1)


def turns(n: Any, x: Tensor) -> Tensor:
    return n.linear(x.t_().t())


def pops(n: Any, batch: Any) -> Tensor:
    mask = batch.pop("mask", 1.0)
    return n.linear(batch["x"] * mask)


def adds_entry(n: Any, batch: Any) -> Tensor:
    batch["hidden"] = n.linear(batch["x"])
    return batch["hidden"]


def pops_part(n: Any, parts: Any) -> Tensor:
    x = parts.pop()
    return n.linear(x)


def writes_object(n: Any, x: Tensor, other: Any) -> Tensor:
    other.calls += 1
    return n.linear(x)


def writes_array(n: Any, x: Tensor, other: Any) -> Tensor:
    other += 1
    return n.linear(x)


def draws(n: Any, x: Tensor, generator: Any) -> Tensor:
    return n.linear(x) * generator.random()


def advances(n: Any, x: Tensor, items: Any) -> Tensor:
    return n.linear(x) * next(items)


def squeezing(output: Tensor, target: Tensor) -> Tensor:
    return F.mse_loss(output, target.squeeze_(2))


def popping(output: Tensor, target: Any) -> Tensor:
    return (output - target.pop("y")).square().mean()


def noting(output: Tensor, target: Any) -> Tensor:
    target["loss"] = 1.0
    return squares(output, target)


def plain(n: Any, x: Tensor) -> Tensor:
    return n.linear(x)


class Image(Tensor):
    """A tensor of a class of its own, as transforms of images return it."""


def in_kind(change: Callable[[Tensor], Any]) -> Callable[[], Data]:
    return lambda: (change(torch.randn(N, D)), torch.randn(N, D))


def by_teacher() -> Data:
    x = torch.randn(N, D)
    with torch.inference_mode():
        return x, nn.Linear(D, D)(x)


def bag_of_words(n: Any, x: Tensor) -> Tensor:
    return torch.sparse.mm(x, n.linear.weight.T) + n.linear.bias


def padded(n: Any, x: Tensor) -> Tensor:
    return n.linear(x.to_padded_tensor(0.0).sum(1))


def in_jagged(x: Tensor) -> Tensor:
    return torch.nested.nested_tensor([row[None].repeat(2, 1) for row in x], layout=torch.jagged)


def shape(x: Any, y: Any) -> Any:
    return type(x), type(y), x.shape, y.shape


OF_DATA: dict[str, OfData] = {
    "inputs of a class of their own": (
        model(plain),
        squares,
        in_kind(lambda x: x.as_subclass(Image)),
        shape,
    ),
    "targets of a teacher in inference mode": (model(plain), squares, by_teacher, shape),
    "sparse inputs": (model(bag_of_words), squares, in_kind(Tensor.to_sparse), shape),
    "inputs in sparse rows": (model(bag_of_words), squares, in_kind(Tensor.to_sparse_csr), shape),
    "jagged inputs": (model(padded), squares, in_kind(in_jagged), shape),
    "inputs of eight bits": (
        model(lambda n, x: n.linear(x.float())),
        squares,
        in_kind(lambda x: x.to(torch.float8_e4m3fn)),
        shape,
    ),
    "inputs that require gradients from now on": (model(saliency), squares, rows, of_inputs),
    "inputs that get a gradient": (model(saliency_of_backward), squares, rows, of_inputs),
    "inputs that get a hook": (model(with_hook_on_data), squares, rows, of_inputs),
    "inputs written to": (
        model(lambda n, x: n.linear(x.mul_(2))),
        squares,
        rows,
        of_inputs,
    ),
    "inputs given an axis": (model(gives_axis), squares, rows, of_inputs),
    "inputs turned": (model(turns), squares, rows, of_inputs),
    "targets that lose an axis": (
        model(plain),
        squeezing,
        lambda: (torch.randn(N, D), torch.randn(N, D, 1)),
        of_targets,
    ),
    "a dict of inputs that loses an entry": (
        model(pops),
        squares,
        in_dict,
        lambda x, y: sorted(x[0]),
    ),
    "a dict of inputs that gains an entry": (
        model(adds_entry),
        squares,
        in_dict,
        lambda x, y: sorted(x[0]),
    ),
    "a list of inputs that loses an entry": (
        model(pops_part),
        squares,
        lambda: (([torch.randn(N, D), torch.randn(N, D)],), torch.randn(N, D)),
        lambda x, y: len(x[0]),
    ),
    "a dict of targets that loses an entry": (
        model(plain),
        popping,
        lambda: (torch.randn(N, D), {"y": torch.randn(N, D)}),
        lambda x, y: sorted(y),
    ),
    "a dict of targets that gains an entry": (
        model(plain),
        noting,
        lambda: (torch.randn(N, D), {"y": torch.randn(N, D)}),
        lambda x, y: sorted(y),
    ),
    "an object among the inputs": (
        model(writes_object),
        squares,
        beside(lambda: SimpleNamespace(calls=0)),
        lambda x, y: x[1].calls,
    ),
    "an array among the inputs": (
        model(writes_array),
        squares,
        beside(lambda: np.zeros(2)),
        lambda x, y: x[1].tolist(),
    ),
    "a generator among the inputs": (
        model(draws),
        squares,
        beside(lambda: random.Random(1)),
        lambda x, y: x[1].getstate(),
    ),
    "an entry of a dict of an object among the inputs": (
        model(lambda n, x, other: n.linear(x) + other.kept.pop("offset")),
        squares,
        beside(lambda: SimpleNamespace(kept={"offset": 1.0})),
        lambda x, y: dict(x[1].kept),
    ),
    "a generator of numpy among the inputs": (
        model(draws),
        squares,
        beside(lambda: np.random.default_rng(1)),
        lambda x, y: x[1].bit_generator.state,
    ),
    "targets that are clamped and kept": (
        model(plain),
        lambda output, target: F.mse_loss(output, target.clamp_(-1, 1)),
        rows,
        of_targets,
    ),
    "an iterator among the inputs": (
        model(advances),
        squares,
        beside(lambda: iter([1.0] * 99)),
        lambda x, y: x[1].__length_hint__(),
    ),
}


# --- the loss -------------------------------------------------------------------------------------


class Centred:
    """A loss with a running centre of the targets, as distillation without labels has."""

    def __init__(self) -> None:
        self.centre = torch.zeros(D)

    def __call__(self, output: Tensor, target: Tensor) -> Tensor:
        with torch.no_grad():
            self.centre.mul_(0.9).add_(target.mean(0), alpha=0.1)
        return (output - target + self.centre).square().mean()


class Rebound(Centred):
    def __call__(self, output: Tensor, target: Tensor) -> Tensor:
        self.centre = 0.9 * self.centre + 0.1 * target.mean(0)
        return (output - target + self.centre).square().mean()


class Normalised:
    """A loss relative to the first one."""

    def __init__(self) -> None:
        self.first: float | None = None

    def __call__(self, output: Tensor, target: Tensor) -> Tensor:
        value = squares(output, target)
        if self.first is None:
            self.first = value.item()
        return value / self.first


class Best:
    """A loss that keeps the best value."""

    def __init__(self) -> None:
        self.best, self.seen = float("inf"), []

    def __call__(self, output: Tensor, target: Tensor) -> Tensor:
        value = squares(output, target)
        if float(value) < self.best:
            self.best = float(value)
            self.seen.append(self.best)
        return value


class Summed(nn.Module):
    """A loss that adds its values up, without leaving autograd."""

    def __init__(self) -> None:
        super().__init__()
        self.total = nn.Buffer(torch.zeros(()))

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        value = squares(output, target)
        self.total += value
        return value


class Negatives:
    """A loss with samples of its own."""

    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(3)

    def __call__(self, output: Tensor, target: Tensor) -> Tensor:
        drawn = torch.randn(D, generator=self.generator)
        return squares(output, target) + (output @ drawn).sigmoid().mean()


class Averaged:
    """A loss that keeps running means in numpy."""

    def __init__(self) -> None:
        self.means = np.zeros(2)

    def __call__(self, output: Tensor, target: Tensor) -> Tensor:
        value = squares(output, target)
        self.means[0] = 0.9 * self.means[0] + 0.1 * value.item()
        return value


class Cleaned:
    """A loss that cleans its labels where they lie."""

    seen = 0

    def __call__(self, output: Tensor, target: Tensor) -> Tensor:
        return squares(output, target.clamp_(-1, 1))


class Penalised:
    """A loss with a penalty on gradients that it takes itself, and notes."""

    def __init__(self) -> None:
        self.norms: list[float] = []

    def __call__(self, output: Tensor, target: Tensor) -> Tensor:
        output.register_hook(lambda g: self.norms.append(float(g.norm())))
        return squares(output, target)


class Balanced:
    """Weighs two losses by the rate at which they fall."""

    def __init__(self) -> None:
        self.history: dict[str, list[float]] = {}

    def __call__(self, output: Tensor, target: Tensor) -> Tensor:
        parts = {"square": squares(output, target), "absolute": (output - target).abs().mean()}
        total = output.new_zeros(())
        for name, value in parts.items():
            past = self.history.setdefault(name, [])
            past.append(value.item())
            total = total + value * past[-1] / past[0]
        return total


OF_LOSS: dict[str, tuple[Callable[[], Any], Callable[[Any], Any]]] = {
    "a centre of a loss, in place": (Centred, lambda loss: loss.centre.tolist()),
    "a centre of a loss, bound anew": (Rebound, lambda loss: loss.centre.tolist()),
    "a first value of a loss": (Normalised, lambda loss: loss.first),
    "the best value of a loss": (Best, lambda loss: (loss.best, list(loss.seen))),
    "a sum of losses, with its history": (
        Summed,
        lambda loss: (loss.total.tolist(), loss.total.requires_grad),
    ),
    "a generator of a loss": (Negatives, lambda loss: loss.generator.get_state().tolist()),
    "running means of a loss": (Averaged, lambda loss: loss.means.tolist()),
    "labels that a loss cleans": (Cleaned, lambda loss: 0),
    "norms that a loss notes": (Penalised, lambda loss: list(loss.norms)),
    "rates of two losses": (Balanced, lambda loss: {k: list(v) for k, v in loss.history.items()}),
}
