"""Programs that change something while they run, by a fourth hunt.

As in `cases/messy.py`: a function that makes a model, and one that returns what must stay.
`OF_LOSS` are losses that do, as in `third_messy.py`. A program that is refused before it runs is
right, too.
"""

import asyncio
import cProfile
import ctypes
import enum
import functools
import io
import logging
import logging.handlers
import multiprocessing
import os
import pstats
import queue
import random
import shutil
import signal
import sqlite3
import tempfile
import tracemalloc
import weakref
from collections import ChainMap, OrderedDict, deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import matplotlib
import networkx as nx
import numpy as np
import opacus
import torch
import torchmetrics
import tqdm
import transformers
from sklearn.cluster import MiniBatchKMeans
from sklearn.linear_model import SGDRegressor
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn
from torch import distributions as laws
from torch.distributions.kl import register_kl
from torch.nn import functional as F
from torch.utils.data import RandomSampler
from transformers import DynamicCache, EncoderDecoderCache

from cases.changes import D, N, squares
from cases.hunt import fourth_settings
from cases.hunt.third_changes import UNDO
from cases.messy import Case, net, own, part
from cases.own_parameters import Step

COUNTS = {"calls": 0}
POOL = ThreadPoolExecutor(1)


def count() -> None:
    COUNTS["calls"] += 1


def counts(model: Any) -> Any:
    return dict(COUNTS)


# --- what is made when it is first needed ---------------------------------------------------------


class Phase(enum.Enum):
    WARM = 1
    MAIN = 2
    LAST = 3

    def next(self) -> Any:
        return Phase(min(self.value + 1, 3))


def to_next_phase(n: Any) -> None:
    n.phase = n.phase.next()


def phases(model: Any) -> Any:
    return model.phase, [(p.name, p.value, p._name_, p._value_) for p in Phase]


Colour = enum.Enum("Colour", ["RED", "GREEN", "BLUE"])


def next_colour(n: Any) -> None:
    members = list(Colour)
    n.colour = members[(members.index(n.colour) + 1) % 3]


def colours(model: Any) -> Any:
    return model.colour, [(c.name, c.value) for c in Colour]


def lazy_logger(n: Any) -> None:
    if n.log is None:
        n.log = logging.getLogger("fourth.model")
    n.log.debug("step")


def put_back(log: logging.Logger) -> None:
    state = dict(vars(log))
    UNDO.append(lambda: vars(log).update(state))


def loggers(model: Any) -> Any:
    log = logging.getLogger("fourth.model")
    root = logging.getLogger()
    put_back(log)
    put_back(root)
    return (
        (log.name, log.level, log.disabled, log.propagate, len(log.handlers)),
        (root.level, root.disabled, list(root.handlers)),
    )


def made_logger() -> nn.Module:
    logging.getLogger("fourth.model")
    return net(lazy_logger, log=lambda: None)()


class Tracker:
    """What a step knows of itself."""

    def __init__(self, step: int) -> None:
        self.step, self.log = step, logging.getLogger("fourth.model")


def tracks(n: Any) -> None:
    n.tracker = Tracker(n.tracker.step + 1)


def tracked() -> nn.Module:
    return net(tracks, tracker=lambda: Tracker(0))()


def adapted() -> nn.Module:
    return net(adapts_logger, log=lambda: None)()


def adapts_logger(n: Any) -> None:
    n.log = logging.LoggerAdapter(logging.getLogger("fourth.model"), {})


class Clock:
    """One object for the whole process."""

    made: Any = None

    def __new__(cls) -> Any:
        if cls.made is None:
            cls.made = super().__new__(cls)
            cls.made.ticks = 0
            cls.made.marks = ["start"]
        return cls.made


Clock()


def lazy_clock(n: Any) -> None:
    n.clock = Clock()
    n.clock.ticks += 1


class Lease:
    """Gives back what it holds when it goes."""

    def __init__(self) -> None:
        self.held = 1

    def __del__(self) -> None:
        COUNTS["calls"] += self.held


LEASES = [Lease(), Lease()]


def takes_next(n: Any) -> None:
    n.turn += 1
    n.lease = LEASES[n.turn % 2]


def own_table(n: Any) -> None:
    if not hasattr(n, "table"):
        n.table = torch.arange(D).float()
    n.table += 1


class Plan:
    @functools.cached_property
    def table(self) -> Any:
        count()
        return [1.0] * D


def lazy_head(n: Any, x: Tensor) -> Tensor:
    """Make a layer when its width is known, as before there were lazy ones."""
    if n.head is None:
        n.head = nn.Linear(x.shape[1], D)
    return n.head(n.linear(x))


class Folder:
    """A folder that goes with the object."""

    def __init__(self) -> None:
        self.path = tempfile.mkdtemp()

    def __del__(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)


def folders() -> Any:
    return [Folder(), Folder()]


def next_folder(n: Any) -> None:
    n.turn = (n.turn + 1) % 2
    n.folder = n.folders[n.turn]


def folders_left(model: Any) -> Any:
    return [os.path.exists(folder.path) for folder in model.folders]


class Node:
    """Has a number of its own, also as a copy."""

    made = 0

    def __init__(self) -> None:
        Node.made += 1
        self.number = Node.made

    def __deepcopy__(self, memo: Any) -> Any:
        return Node()


class Noted(list):
    """A list that counts how often it is copied."""

    def __deepcopy__(self, memo: Any) -> Any:
        count()
        return Noted(self)


def plain_net(**parts: Callable[[], Any]) -> Callable[[], nn.Module]:
    return own(lambda n, x: n.linear(x), **parts)


# --- logs -----------------------------------------------------------------------------------------


def logger(handler: logging.Handler) -> logging.Logger:
    log = logging.Logger("fourth")
    log.addHandler(handler)
    return log


def logs(n: Any) -> None:
    n.log.warning("step")


def written(log: Any) -> Any:
    return log.handlers[0].stream.getvalue()


@contextmanager
def bare_root() -> Any:
    root = logging.getLogger()
    handlers = root.handlers[:]
    root.handlers[:] = []
    yield
    root.handlers[:] = handlers


def without_handlers() -> nn.Module:
    """A process in which nobody has set logging up yet."""
    context = bare_root()
    context.__enter__()
    UNDO.append(lambda: context.__exit__(None, None, None))
    return net(lambda n: logging.info("step"))()


def adds_handler(n: Any) -> None:
    n.log.addHandler(logging.NullHandler())


def handlers_of(log: Any) -> Any:
    return len(log.handlers)


def adds_filter(n: Any) -> None:
    n.log.addFilter(lambda record: True)


def silences(n: Any) -> None:
    n.log.propagate = False
    n.log.disabled = True


def to_table(n: Any) -> None:
    n.base.execute("insert into losses values (1.0)")


def quiet(n: Any) -> None:
    """Silence a library that talks too much."""
    logging.getLogger("fourth.noisy").setLevel(logging.ERROR)


def level_of_noisy(model: Any) -> Any:
    log = logging.getLogger("fourth.noisy")
    UNDO.append(lambda: log.setLevel(logging.NOTSET))
    return log.level


def quiet_transformers(n: Any) -> None:
    transformers.logging.set_verbosity_error()


def verbosity(model: Any) -> Any:
    UNDO.append(transformers.logging.set_verbosity_warning)
    return transformers.logging.get_verbosity()


def captures_warnings(n: Any) -> None:
    logging.captureWarnings(True)


def captured(model: Any) -> Any:
    UNDO.append(lambda: logging.captureWarnings(False))
    return logging._warnings_showwarning is not None  # type: ignore[attr-defined]


def base() -> Any:
    made = sqlite3.connect(":memory:")
    made.execute("create table losses (value real)")
    return made


def rows_of(made: Any) -> Any:
    return made.execute("select count(*) from losses").fetchone()


def profiles(n: Any) -> None:
    n.profile.enable()
    sum(range(10))
    n.profile.disable()


def profiled(profile: Any) -> Any:
    try:
        return pstats.Stats(profile).total_calls
    except TypeError:
        return 0


def bar() -> Any:
    return tqdm.tqdm(total=99, file=io.StringIO(), mininterval=0)


@functools.lru_cache(maxsize=1)
def positions(size: int) -> Tensor:
    return torch.arange(size)


def other_size(n: Any) -> None:
    positions(D + 1)


def with_positions() -> nn.Module:
    positions(D)
    return net(other_size)()


def kept_positions(model: Any) -> Any:
    return positions.cache_info().currsize


def on_torch(n: Any) -> None:
    torch.fourth_calls = getattr(torch, "fourth_calls", 0) + 1  # type: ignore[attr-defined]


def calls_on_torch(model: Any) -> Any:
    UNDO.append(lambda: vars(torch).pop("fourth_calls", None))
    return getattr(torch, "fourth_calls", 0)


def on_function(n: Any) -> None:
    F.relu.calls = getattr(F.relu, "calls", 0) + 1


def calls_on_function(model: Any) -> Any:
    UNDO.append(lambda: vars(F.relu).pop("calls", None))
    return getattr(F.relu, "calls", 0)


def on_layers(n: Any) -> None:
    nn.GELU.calls = getattr(nn.GELU, "calls", 0) + 1


def calls_on_layers(model: Any) -> Any:
    UNDO.append(lambda: vars(nn.GELU).get("calls") and delattr(nn.GELU, "calls"))
    return getattr(nn.GELU, "calls", 0)


# --- threads and processes ------------------------------------------------------------------------


def notes_later(n: Any) -> None:
    """Hand a note to a pool, and do not wait for it."""
    POOL.submit(slowly, n.seen)


def slowly(seen: list[int]) -> None:
    WAIT.wait(0.2)
    seen.append(1)


WAIT = multiprocessing.get_context("fork").Event()


def waited_for(seen: Any) -> Any:
    POOL.submit(int).result()
    return list(seen)


def resolves(n: Any) -> None:
    if not n.result.done():
        n.result.set_result(1.0)


def guarded(n: Any) -> None:
    with n.lock:
        n.calls += 1


def lock() -> Any:
    return multiprocessing.get_context("fork").RLock()


# --- memory ---------------------------------------------------------------------------------------


def by_c(n: Any) -> None:
    """Call a library of C."""
    ctypes.memset(n.kept.data_ptr(), 0, n.kept.nbytes)


def by_address(n: Any) -> None:
    (ctypes.c_float * D).from_address(n.kept.data_ptr())[1] = 7.0


def through_dlpack(n: Any) -> None:
    np.from_dlpack(n.kept)
    torch.utils.dlpack.from_dlpack(torch.utils.dlpack.to_dlpack(n.kept)).fill_(7.0)


def through_typed_storage(n: Any) -> None:
    n.kept.untyped_storage()[3] = 7


def shares(n: Any) -> None:
    n.kept.share_memory_()


def of_bytes(n: Any) -> None:
    torch.frombuffer(n.bytes, dtype=torch.uint8).fill_(7)


def ones() -> Any:
    return nn.Buffer(torch.ones(D))


def mapped() -> Any:
    return torch.from_numpy(np.ones(D, np.float32))


def flips_halves(n: Any) -> None:
    first, second = n.kept.chunk(2)
    first.copy_(second.clone() + 1)


def by_out(n: Any) -> None:
    torch.add(n.kept, 1, out=n.kept)


def by_foreach(n: Any) -> None:
    with torch.no_grad():
        torch._foreach_mul_([n.kept, n.linear.weight], 0.5)


def ema(n: Any) -> None:
    with torch.no_grad():
        for p, q in zip(n.teacher.parameters(), n.linear.parameters(), strict=True):
            p.lerp_(q, 0.1)


def teacher() -> nn.Module:
    return nn.Linear(D, D).requires_grad_(False)


def of_layer(layer: Any) -> Any:
    return [(p.tolist(), p.requires_grad, p._version) for p in layer.parameters()]


def clips_weights(n: Any) -> None:
    for p in n.linear.parameters():
        p.data.clamp_(-0.01, 0.01)


def swaps_weights(n: Any, x: Tensor) -> Tensor:
    """Run with averaged weights, and go back."""
    kept = {k: v.clone() for k, v in n.linear.state_dict().items()}
    n.linear.load_state_dict(n.teacher.state_dict())
    out = n.linear(x)
    n.linear.load_state_dict(kept)
    return out.detach() + n.linear(x)


def perturbs(n: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        n.linear.weight.add_(0.1)
    out = n.linear(x)
    with torch.no_grad():
        n.linear.weight.sub_(0.1)
    return out


def momentum_queue(n: Any, x: Tensor) -> Tensor:
    """A queue of keys, as in momentum contrast."""
    keys = n.linear(x).detach()
    start = int(n.pointer)
    n.keys[:, start : start + N] = keys.T
    n.pointer[0] = (start + N) % 12
    return n.linear(x) @ n.keys[:, :D].clone()


def codebook(n: Any, x: Tensor) -> Tensor:
    """A codebook moved by averages, as in vector quantisation."""
    h = n.linear(x)
    code = torch.cdist(h, n.codes).argmin(1)
    one_hot = F.one_hot(code, 3).to(h.dtype)
    n.sizes.mul_(0.9).add_(one_hot.sum(0), alpha=0.1)
    n.sums.mul_(0.9).add_(one_hot.T @ h.detach(), alpha=0.1)
    n.codes.copy_(n.sums / n.sizes[:, None].clamp_min(1e-3))
    return h + (n.codes[code] - h).detach()


def codes() -> dict[str, Any]:
    return {
        "codes": lambda: nn.Buffer(torch.randn(3, D)),
        "sizes": lambda: nn.Buffer(torch.zeros(3)),
        "sums": lambda: nn.Buffer(torch.zeros(3, D)),
    }


# --- random numbers -------------------------------------------------------------------------------


def by_sampler(n: Any, x: Tensor) -> Tensor:
    return n.linear(x)[list(n.sampler)]


def sampler() -> Any:
    return RandomSampler(range(N), generator=torch.Generator().manual_seed(1))


def splits(n: Any, x: Tensor) -> Tensor:
    order = torch.randperm(N, generator=n.generators["order"])
    noise = torch.randn(x.shape, generator=n.generators["noise"])
    return n.linear(x)[order] + noise


def generators() -> Any:
    return {name: torch.Generator().manual_seed(i) for i, name in enumerate(("order", "noise"))}


def shuffles(n: Any, x: Tensor) -> Tensor:
    n.random.shuffle(n.order)
    return n.linear(x)[:, n.order]


def reseeds(n: Any) -> None:
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)


def random_states(model: Any) -> Any:
    return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()


# --- settings of the process ----------------------------------------------------------------------


def reproducible(n: Any) -> None:
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.allow_tf32 = False


def cudnn(model: Any) -> Any:
    flags = torch.backends.cudnn
    UNDO.append(lambda: setattr(flags, "allow_tf32", True))
    return flags.deterministic, flags.benchmark, flags.allow_tf32


def plain_paths(n: Any) -> None:
    torch.backends.opt_einsum.strategy = "optimal"


def paths(model: Any) -> Any:
    UNDO.append(lambda: setattr(torch.backends.opt_einsum, "strategy", "auto"))
    return torch.backends.opt_einsum.strategy


def no_cache(n: Any) -> None:
    torch.set_autocast_cache_enabled(False)


def autocast_cache(model: Any) -> Any:
    UNDO.append(lambda: torch.set_autocast_cache_enabled(True))
    return torch.is_autocast_cache_enabled()


def reduced(n: Any) -> None:
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False


def reduction(model: Any) -> Any:
    flags = torch.backends.cuda.matmul
    name = "allow_bf16_reduced_precision_reduction"
    UNDO.append(lambda: setattr(flags, name, True))
    return getattr(flags, name)


def tf32(n: Any) -> None:
    torch.backends.cuda.matmul.allow_tf32 = True


def of_tf32(model: Any) -> Any:
    return torch.backends.cuda.matmul.allow_tf32, torch.get_float32_matmul_precision()


def warns_always(n: Any) -> None:
    torch.set_warn_always(True)


def warn_always(model: Any) -> Any:
    UNDO.append(lambda: torch.set_warn_always(False))
    return torch.is_warn_always_enabled()


def compiler(n: Any) -> None:
    torch._dynamo.config.suppress_errors = True


def of_compiler(model: Any) -> Any:
    UNDO.append(lambda: setattr(torch._dynamo.config, "suppress_errors", False))
    return torch._dynamo.config.suppress_errors


def draws(n: Any) -> None:
    matplotlib.rcParams["font.size"] = 7.0


def of_plots(model: Any) -> Any:
    UNDO.append(lambda: matplotlib.rcParams.update({"font.size": 10.0}))
    return matplotlib.rcParams["font.size"]


def moves(n: Any) -> None:
    os.chdir("/")


def folder(model: Any) -> Any:
    here = os.getcwd()
    UNDO.append(lambda: os.chdir(here))
    return here


def traces(n: Any) -> None:
    tracemalloc.start()


def traced(model: Any) -> Any:
    UNDO.append(tracemalloc.stop)
    return tracemalloc.is_tracing()


def handles(n: Any) -> None:
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)


def handler(model: Any) -> Any:
    before = signal.getsignal(signal.SIGUSR1)
    UNDO.append(lambda: signal.signal(signal.SIGUSR1, signal.SIG_DFL))
    return before


def stops_gradients(n: Any) -> None:
    torch.set_grad_enabled(True)


# --- code that libraries call ---------------------------------------------------------------------


class Sharp(laws.Normal):
    pass


@register_kl(Sharp, Sharp)
def _between_sharp(p: Any, q: Any) -> Tensor:
    count()
    return (p.loc - q.loc).square()


def divergence(n: Any, x: Tensor) -> Tensor:
    mean = n.linear(x)
    return laws.kl_divergence(Sharp(mean, 1.0), Sharp(torch.zeros_like(mean), 1.0))


LIBRARY = torch.library.Library("fourth_messy", "DEF")
LIBRARY.define("counted(Tensor x) -> Tensor")


def _counted(x: Tensor) -> Tensor:
    count()
    return x * 1.0


LIBRARY.impl("counted", _counted, "CompositeImplicitAutograd")


def by_saved_tensors(n: Any, x: Tensor) -> Tensor:
    def packed(t: Tensor) -> Tensor:
        n.sizes.append(t.nbytes)
        return t

    with torch.autograd.graph.saved_tensors_hooks(packed, lambda t: t):
        return n.linear(x).tanh()


def hooked() -> nn.Module:
    model = nn.Sequential(nn.Linear(D, D), nn.Tanh())
    model.activations = {}
    model[0].register_forward_hook(lambda m, i, o: model.activations.update(first=o))
    model[1].register_forward_hook(
        lambda m, i, o: model.activations.setdefault("all", []).append(o)
    )
    return model


def hooks_itself(n: Any, x: Tensor) -> Tensor:
    n.linear.register_forward_hook(lambda m, i, o: None)
    return n.linear(x)


# --- parts that libraries make --------------------------------------------------------------------


def fits_scaler(n: Any, x: Tensor) -> Tensor:
    n.scaler.partial_fit(x.detach().numpy())
    return n.linear(x)


def of_scaler(scaler: Any) -> Any:
    return getattr(scaler, "n_samples_seen_", 0)


def fits_clusters(n: Any, x: Tensor) -> Tensor:
    n.clusters.partial_fit(x.detach().numpy().astype(np.float64))
    return n.linear(x)


def of_clusters(clusters: Any) -> Any:
    return getattr(clusters, "n_steps_", 0), hasattr(clusters, "cluster_centers_")


def fits_regressor(n: Any, x: Tensor) -> Tensor:
    rows = x.detach().numpy().astype(np.float64)
    n.probe.partial_fit(rows, rows[:, 0])
    return n.linear(x)


def of_regressor(probe: Any) -> Any:
    return getattr(probe, "t_", 0.0)


def metric(n: Any, x: Tensor) -> Tensor:
    n.error.update(x, torch.zeros_like(x))
    return n.linear(x)


def of_metric(error: Any) -> Any:
    return error.update_count, float(error.total), float(error.sum_squared_error)


def adds_edge(n: Any) -> None:
    n.graph.add_edge(0, n.graph.number_of_nodes(), weight=1.0)


def caches(n: Any, x: Tensor) -> Tensor:
    h = n.linear(x)
    n.cache.self_attention_cache.update(h[:, None, None].detach(), h[:, None, None].detach(), 0)
    return h


def lazy_law() -> Any:
    return laws.MultivariateNormal(torch.zeros(D), torch.eye(D))


def made_of(law: Any) -> Any:
    return sorted(vars(law))


def quantised_table() -> Any:
    return nn.Buffer(torch.quantize_per_tensor(torch.eye(D), 0.1, 0, torch.qint8))


def rounds(n: Any, x: Tensor) -> Tensor:
    return n.linear(x) @ n.kept.dequantize()


def chained() -> Any:
    """A history of pairs, each holding the one before."""
    pairs: tuple = ()
    for i in range(3000):
        pairs = (pairs, i)
    return pairs


def chains(n: Any) -> None:
    n.pairs = (n.pairs, 1)


def depth(pairs: Any) -> int:
    steps = 0
    while pairs:
        pairs, steps = pairs[0], steps + 1
    return steps


class LazyConfig:
    """Stands for a dict that is made when it is first needed, as in web frameworks."""

    def __init__(self, make: Callable[[], Any]) -> None:
        self.__dict__["_made"] = make()

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        return type(self._made)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._made, name)

    def __getitem__(self, name: str) -> Any:
        return self._made[name]


def by_lazy_config(n: Any, x: Tensor) -> Tensor:
    return n.linear(x) * n.config["scale"]


class Linked:
    """An item of a chain."""

    def __init__(self, value: int, after: Any) -> None:
        self.value, self.after = value, after


def chain() -> Any:
    head = None
    for i in range(2000):
        head = Linked(i, head)
    return head


def pushes(n: Any) -> None:
    n.chain = Linked(1, n.chain)
    n.chain.after.value += 1


def waits(n: Any) -> None:
    n.queue.put_nowait((1, 2))


def mapped_file() -> Any:
    handle, path = tempfile.mkstemp()
    os.close(handle)
    UNDO.append(lambda: os.remove(path))
    return np.memmap(path, dtype=np.float32, shape=(3,), mode="w+")


def spectral() -> nn.Module:
    return nn.Sequential(nn.utils.spectral_norm(nn.Linear(D, D)), nn.Tanh())


def of_spectral(model: Any) -> Any:
    return model[0].weight_u.tolist(), model[0].weight.tolist(), sorted(vars(model[0]))


def spikes(n: Any, x: Tensor) -> Tensor:
    """A potential that leaks, and fires."""
    n.potential = n.potential * 0.5 + n.linear(x)
    spike = (n.potential > 0).float() + n.potential - n.potential.detach()
    n.potential = n.potential - spike.detach()
    return spike


def exported() -> nn.Module:
    layers = nn.Sequential(nn.Linear(D, D), nn.BatchNorm1d(D))
    return torch.export.export(layers, (torch.randn(N, D),)).module()


def in_parallel() -> nn.Module:
    return nn.DataParallel(nn.Sequential(nn.Linear(D, D), nn.BatchNorm1d(D)))


def of_state(model: Any) -> Any:
    return {name: t.tolist() for name, t in model.state_dict().items()}


MESSY: dict[str, Case] = {
    # What is made when it is first needed, or exchanged for another.
    "phases of an enum": (net(to_next_phase, phase=lambda: Phase.WARM), phases),
    "colours in turn": (net(next_colour, colour=lambda: Colour.RED), colours),
    "a logger that is made late": (made_logger, loggers),
    "a logger of a state that is made anew": (tracked, loggers),
    "a logger in an adapter": (adapted, loggers),
    "one clock for all": (
        net(lazy_clock, clock=lambda: None),
        lambda model: (model.clock, Clock.made.ticks, list(Clock.made.marks)),
    ),
    "leases in turn": (
        net(takes_next, turn=lambda: 0, lease=lambda: None),
        lambda model: (COUNTS["calls"], [lease.held for lease in LEASES]),
    ),
    "folders in turn": (
        net(next_folder, folders=folders, turn=lambda: 0, folder=lambda: None),
        folders_left,
    ),
    "members of a weak set": (
        net(lambda n: n.seen.add(n.linear), seen=weakref.WeakSet),
        part("seen", len),
    ),
    "a cache of one result": (with_positions, kept_positions),
    "a count on a library": (net(on_torch), calls_on_torch),
    "a count on a function of a library": (net(on_function), calls_on_function),
    "a count on a class of layers": (net(on_layers), calls_on_layers),
    "a table that is made late": (net(own_table), lambda model: hasattr(model, "table")),
    "a cached property of a plan": (
        net(lambda n: n.plan.table, plan=Plan),
        lambda model: (list(vars(model.plan)), dict(COUNTS)),
    ),
    "a head that is made late": (own(lazy_head, head=lambda: None), part("head")),
    # Logs.
    "lines in the stream of a handler": (
        net(logs, log=lambda: logger(logging.StreamHandler(io.StringIO()))),
        part("log", written),
    ),
    "records in the buffer of a handler": (
        net(logs, log=lambda: logger(logging.handlers.MemoryHandler(99))),
        part("log", lambda log: len(log.handlers[0].buffer)),
    ),
    "a handler of the root": (without_handlers, lambda model: len(logging.getLogger().handlers)),
    "a handler more": (
        net(adds_handler, log=lambda: logging.Logger("a")),
        part("log", handlers_of),
    ),
    "a filter more": (
        net(adds_filter, log=lambda: logging.Logger("a")),
        part("log", lambda log: len(log.filters)),
    ),
    "a silent logger": (
        net(silences, log=lambda: logging.Logger("a")),
        part("log", lambda log: (log.propagate, log.disabled)),
    ),
    "the level of a logger by its name": (net(quiet), level_of_noisy),
    "how much a library says": (net(quiet_transformers), verbosity),
    "warnings that are logged": (net(captures_warnings), captured),
    "rows of a database in memory": (net(to_table, base=base), part("base", rows_of)),
    "calls in a profile": (net(profiles, profile=cProfile.Profile), part("profile", profiled)),
    "the progress of a bar": (
        net(lambda n: n.bar.update(1), bar=bar),
        part("bar", lambda b: (b.n, b.fp.getvalue() if hasattr(b.fp, "getvalue") else None)),
    ),
    # Threads and processes.
    "a note by a pool that nobody waits for": (
        net(notes_later, seen=list),
        part("seen", waited_for),
    ),
    "a queue of tasks": (net(waits, queue=asyncio.Queue), part("queue", asyncio.Queue.qsize)),
    "a queue by priority": (
        net(waits, queue=queue.PriorityQueue),
        part("queue", queue.PriorityQueue.qsize),
    ),
    "an array in a file": (
        net(lambda n: n.sums.__iadd__(1), sums=mapped_file),
        part("sums", np.ndarray.tolist),
    ),
    "a power iteration": (spectral, of_spectral),
    "a potential that leaks": (
        own(spikes, potential=lambda: 0.0),
        lambda model: type(model.potential),
    ),
    "an exported model": (exported, of_state),
    "a model in parallel": (in_parallel, of_state),
    "a result that is awaited": (net(resolves, result=Future), part("result", Future.done)),
    "a count under a lock of processes": (
        net(guarded, lock=lock, calls=lambda: 0),
        lambda model: model.calls,
    ),
    # Memory.
    "a buffer by a function of C": (net(by_c, kept=ones), part("kept", Tensor.tolist)),
    "a buffer by its address": (net(by_address, kept=ones), part("kept", Tensor.tolist)),
    "a buffer by a capsule": (net(through_dlpack, kept=ones), part("kept", Tensor.tolist)),
    "a byte of a buffer": (net(through_typed_storage, kept=ones), part("kept", Tensor.tolist)),
    "a buffer that processes share": (net(shares, kept=ones), part("kept", Tensor.is_shared)),
    "a tensor over bytes": (net(of_bytes, bytes=lambda: bytearray(4)), part("bytes", bytes)),
    "a tensor over an array": (
        net(lambda n: n.kept.mul_(2), kept=mapped),
        part("kept", Tensor.tolist),
    ),
    "half of a buffer": (net(flips_halves, kept=ones), part("kept", Tensor.tolist)),
    "a buffer as an out": (net(by_out, kept=ones), part("kept", Tensor.tolist)),
    "several tensors at once": (
        net(by_foreach, kept=ones),
        lambda model: (model.kept.tolist(), model.linear.weight.tolist()),
    ),
    "a teacher that follows": (net(ema, teacher=teacher), part("teacher", of_layer)),
    "weights clipped": (net(clips_weights), part("linear", of_layer)),
    "weights swapped for others": (own(swaps_weights, teacher=teacher), part("linear", of_layer)),
    "weights moved and moved back": (own(perturbs), part("linear", of_layer)),
    "a queue of keys": (
        own(
            momentum_queue,
            keys=lambda: nn.Buffer(torch.randn(D, 12)),
            pointer=lambda: nn.Buffer(torch.zeros(1, dtype=torch.long)),
        ),
        lambda model: (model.keys.tolist(), model.pointer.tolist()),
    ),
    "a codebook moved by averages": (
        own(codebook, **codes()),
        lambda model: (model.codes.tolist(), model.sizes.tolist(), model.sums.tolist()),
    ),
    # Random numbers.
    "a generator of a sampler": (
        own(by_sampler, sampler=sampler),
        part("sampler", lambda s: s.generator.get_state().tolist()),
    ),
    "two generators in a dict": (
        own(splits, generators=generators),
        part("generators", lambda g: [v.get_state().tolist() for v in g.values()]),
    ),
    "an order that is shuffled": (
        own(shuffles, random=lambda: random.Random(1), order=lambda: list(range(D))),
        lambda model: (list(model.order), model.random.getstate()),
    ),
    "seeds of all": (net(reseeds), random_states),
    # Settings.
    "flags of reproducible runs": (net(reproducible), cudnn),
    "paths of products": (net(plain_paths), paths),
    "the cache of autocast": (net(no_cache), autocast_cache),
    "sums in less precision": (net(reduced), reduction),
    "products in less precision": (net(tf32), of_tf32),
    "warnings each time": (net(warns_always), warn_always),
    "a setting of the compiler": (net(compiler), of_compiler),
    "a setting of plots": (net(draws), of_plots),
    "the folder of the process": (net(moves), folder),
    "traces of memory": (net(traces), traced),
    "a handler of signals": (net(handles), handler),
    "gradients switched on": (net(stops_gradients), lambda model: torch.is_grad_enabled()),
    # Code that libraries call.
    "a count in a divergence of one's own": (own(divergence), counts),
    "a count in an op of a library of one's own": (
        own(lambda n, x: torch.ops.fourth_messy.counted(n.linear(x))),
        counts,
    ),
    "sizes of what autograd keeps": (
        own(by_saved_tensors, sizes=list),
        part("sizes", list),
    ),
    "activations that hooks keep": (hooked, lambda model: sorted(model.activations)),
    "a hook that is added each time": (
        own(hooks_itself),
        part("linear", lambda layer: len(layer._forward_hooks)),
    ),
    # Parts that libraries make.
    "a scaler that is fitted": (own(fits_scaler, scaler=StandardScaler), part("scaler", of_scaler)),
    "clusters that are fitted": (
        own(fits_clusters, clusters=lambda: MiniBatchKMeans(2, random_state=0, n_init=1)),
        part("clusters", of_clusters),
    ),
    "a probe that is fitted": (
        own(fits_regressor, probe=lambda: SGDRegressor(random_state=0)),
        part("probe", of_regressor),
    ),
    "a metric of errors": (
        own(metric, error=torchmetrics.MeanSquaredError),
        part("error", of_metric),
    ),
    "an edge more": (
        net(adds_edge, graph=lambda: nx.path_graph(3)),
        part("graph", lambda g: g.number_of_edges()),
    ),
    "a cache of a decoder": (
        own(caches, cache=lambda: EncoderDecoderCache(DynamicCache(), DynamicCache())),
        part("cache", lambda c: c.self_attention_cache.get_seq_length()),
    ),
    "what a law works out": (
        net(lambda n: n.law.precision_matrix, law=lazy_law),
        part("law", made_of),
    ),
    # Kinds of tensors and of objects.
    "a table of few bits": (
        own(rounds, kept=quantised_table),
        part("kept", lambda t: t.int_repr().tolist()),
    ),
    "pairs of pairs": (net(chains, pairs=chained), part("pairs", depth)),
    "a chain of objects": (
        net(pushes, chain=chain),
        part("chain", lambda link: (link.value, link.after.value)),
    ),
    "a dict that is made when it is needed": (
        own(by_lazy_config, config=lambda: LazyConfig(lambda: {"scale": 2.0})),
        part("config", lambda config: config["scale"]),
    ),
    "counts in layers of dicts": (
        net(
            lambda n: n.maps.maps[1].update(a=n.maps["a"] + 1),
            maps=lambda: ChainMap({}, {"a": 0}),
        ),
        part("maps", lambda maps: maps["a"]),
    ),
    "the last of a ring": (
        net(lambda n: n.ring.append(1), ring=lambda: deque([0, 0, 0], 3)),
        part("ring", list),
    ),
    "an order of layers": (
        net(lambda n: n.table.move_to_end("a"), table=lambda: OrderedDict(a=[1], b=[2])),
        part("table", list),
    ),
    "a setting in a file": (
        net(lambda n: setattr(fourth_settings, "CALLS", fourth_settings.CALLS + 1)),
        lambda model: fourth_settings.CALLS,
    ),
    "a list of a namespace in a tuple": (
        net(lambda n: n.pair[0].seen.append(1), pair=lambda: (SimpleNamespace(seen=[]),)),
        part("pair", lambda pair: list(pair[0].seen)),
    ),
}


# --- losses ---------------------------------------------------------------------------------------


class Weighted:
    """Weighs samples by how hard they were so far."""

    def __init__(self) -> None:
        self.hardness = np.zeros(N)

    def __call__(self, output: Tensor, target: Tensor) -> Tensor:
        each = (output - target).square().mean(1)
        self.hardness = 0.9 * self.hardness + 0.1 * each.detach().numpy()
        return (each * torch.as_tensor(1 + self.hardness, dtype=each.dtype)).mean()


class Mined:
    """Keeps the hardest targets in a heap."""

    def __init__(self) -> None:
        self.heap: list[Any] = []

    def __call__(self, output: Tensor, target: Tensor) -> Tensor:
        self.heap.append((1.0, target[0].clone()))
        return squares(output, target)


class Curriculum:
    """Rises from phase to phase."""

    def __init__(self) -> None:
        self.phase = Phase.WARM

    def __call__(self, output: Tensor, target: Tensor) -> Tensor:
        self.phase = self.phase.next()
        return squares(output, target)


class Learned(nn.Module):
    """Learns the weights of its parts, and steps itself."""

    def __init__(self) -> None:
        super().__init__()
        self.logs = nn.Parameter(torch.zeros(2))
        self.calls = 0

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        self.calls += 1
        self.logs.data.sub_(0.1)
        parts = torch.stack([squares(output, target), (output - target).abs().mean()])
        return (parts * self.logs.exp()).sum()


class Logged:
    """Logs its value."""

    def __init__(self) -> None:
        self.log = logger(logging.handlers.BufferingHandler(9999))

    def __call__(self, output: Tensor, target: Tensor) -> Tensor:
        value = squares(output, target)
        self.log.warning("loss")
        return value


OF_LOSS: dict[str, tuple[Callable[[], Any], Callable[[Any], Any]]] = {
    "the hardness of samples": (Weighted, lambda loss: loss.hardness.tolist()),
    "the hardest targets": (Mined, lambda loss: len(loss.heap)),
    "phases of a loss": (
        Curriculum,
        lambda loss: (loss.phase, [(p.name, p.value) for p in Phase]),
    ),
    "a loss that learns": (Learned, lambda loss: (loss.calls, loss.logs.tolist())),
    "records of a loss": (Logged, lambda loss: len(loss.log.handlers[0].buffer)),
}


# --- what is tested -------------------------------------------------------------------------------

# Of models that are independent, and verified.
VERIFIED: dict[str, Case] = {
    "a folder that goes with an object": (
        plain_net(folders=lambda: [Folder()]),
        folders_left,
    ),
    "numbers of nodes": (plain_net(node=Node), lambda model: Node.made),
    "how often a list is copied": (plain_net(seen=Noted), counts),
    "a buffer that is written to": (net(by_out, kept=ones), part("kept", Tensor.tolist)),
    "an enum's phases": (net(to_next_phase, phase=lambda: Phase.WARM), phases),
    "a count under a lock": (
        net(guarded, lock=lock, calls=lambda: 0),
        lambda model: model.calls,
    ),
}


# --- models that are run on copies of their parameters --------------------------------------------


def surrogate(factor: Callable[[Any], Any], **parts: Callable[[], Any]) -> Callable[[], nn.Module]:
    """A net with a surrogate gradient, and a factor read from it."""
    return own(lambda n, x: Step.apply(n.linear(x)) * factor(n), **parts)


def masked() -> nn.Module:
    """A mask for each parameter, as in pruning and continual learning."""
    model = own(lambda n, x: Step.apply(x @ (n.linear.weight * n.masks[n.linear.weight]).T))()
    model.masks = {p: torch.ones_like(p) for p in model.parameters()}
    return model


def tagged(read: Callable[[Any], Any]) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        model = surrogate(read)()
        model.linear.weight.gain = 2.0
        return model

    return make


def by_id() -> nn.Module:
    model = surrogate(lambda n: n.gains.get(id(n.linear.weight), 1.0))()
    model.gains = {id(model.linear.weight): 2.0}
    return model


def by_optimizer() -> nn.Module:
    """A factor of how often the optimizer has stepped."""
    model = surrogate(lambda n: 1.0 + n.steps.get(n.linear.weight, 0))()
    model.steps = {model.linear.weight: 1}
    return model


def in_list() -> nn.Module:
    model = own(lambda n, x: Step.apply(F.linear(x, *n.weights)))()
    model.weights = [model.linear.weight, model.linear.bias]
    return model


def in_closure() -> nn.Module:
    layer = nn.Linear(D, D)
    model = own(lambda n, x: Step.apply(layer(n.linear(x))))()
    model.layer = layer
    return model


def follows(n: Any, x: Tensor) -> Tensor:
    ema(n)
    return Step.apply(n.linear(x)) - n.teacher(x)


def private() -> nn.Module:
    return opacus.GradSampleModule(nn.Sequential(nn.Linear(D, D), nn.Tanh()))


# The rows of each must sum to its gradient.
ROWS: dict[str, Callable[[], nn.Module]] = {
    "a surrogate gradient": surrogate(lambda n: 1.0),
    "a mask by parameter, under a surrogate": masked,
    "an attribute of a parameter, under a surrogate": tagged(lambda n: n.linear.weight.gain),
    "an attribute asked for, under a surrogate": tagged(
        lambda n: getattr(n.linear.weight, "gain", 1.0)
    ),
    "a number by parameter, under a surrogate": by_id,
    "steps by parameter, under a surrogate": by_optimizer,
    "whether it is a parameter, under a surrogate": surrogate(
        lambda n: 2.0 if isinstance(n.linear.weight, nn.Parameter) else 1.0
    ),
    "whether it is a leaf, under a surrogate": surrogate(
        lambda n: 2.0 if n.linear.weight.is_leaf else 1.0
    ),
    "parameters in a list, under a surrogate": in_list,
    "a layer of a closure, under a surrogate": in_closure,
    "a teacher that follows, under a surrogate": own(follows, teacher=teacher),
    "a model made private": private,
}
