"""What per-sample and per-component gradients cost here and with other tools, in plain backward passes.

    python benchmarks/gradients.py                                       measures everything and prints the table
    python benchmarks/gradients.py --workloads W1,W6 --quantities rows,norms --rounds 3
    python benchmarks/gradients.py --write        writes docs/gradients_benchmark.md and results/gradients.json
    python benchmarks/gradients.py --memory       measures and prints peak memory instead of time

The unit is one forward and backward pass of the same batch. Process CPU time on one thread; in every round all
contestants, the unit among them, have their turn one after the other, and the figure is the median over the rounds of
the ratio within a round. Memory that was freed stays with the process, so nobody pays for fresh pages. Before a
contestant is timed its answer is held against a loop of plain autograd in float64. `make bench-gradients` installs
the other tools; without them the table says so.
"""

from __future__ import annotations

import argparse
import copy
import ctypes
import datetime
import importlib
import itertools
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.utils._per_sample_grad import call_for_per_sample_grads

import unbatch as ub

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs" / "gradients_benchmark.md"
RESULTS = ROOT / "benchmarks" / "results" / "gradients.json"
ROUNDS = 5
SPENT, AT_MOST = 0.1, 5  # a turn repeats what is short: until so many seconds are spent, at most so often
TOLERANCE = 1e-3  # relative, in float32 against float64
BUDGET = 256 * 2**20  # bytes for the temporaries of component rows, in the memory benchmark

Rows = Mapping[str, Tensor]
Ask = Callable[[], Any]


# --- the workloads ------------------------------------------------------------------------------------


class Residual(nn.Module):
    """A block of ResNet-20. The shortcut has no parameters (option A): every second pixel, padded with zeros."""

    def __init__(self, narrow: int, wide: int) -> None:
        super().__init__()
        self.stride = wide // narrow
        self.conv1 = nn.Conv2d(narrow, wide, 3, self.stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(wide)
        self.conv2 = nn.Conv2d(wide, wide, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(wide)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        pad = (y.shape[1] - x.shape[1]) // 2
        return F.relu(y + F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, pad, pad)))


class Encoder(nn.Module):
    """A post-norm transformer encoder layer written with linear layers only: no fused kernel, no packed projection."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in (self.query, self.key, self.value))
        attention = (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(-1)
        x = self.norm1(x + self.out((attention @ v).transpose(1, 2).flatten(2)))
        return self.norm2(x + self.down(F.relu(self.up(x))))


class MeanOverPositions(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean(1)


def mlp(norm: bool = False) -> nn.Module:
    """784-512-256-10, with batch norm before the activations if asked."""
    layers: list[nn.Module] = []
    for narrow, wide in ((784, 512), (512, 256)):
        layers += [nn.Linear(narrow, wide), *([nn.BatchNorm1d(wide)] if norm else []), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(256, 10))


def lenet() -> nn.Module:
    """Two 5 x 5 convolutions and two linear layers: LeNet as it came with Caffe."""
    convolutions = [nn.Conv2d(1, 20, 5), nn.MaxPool2d(2), nn.Conv2d(20, 50, 5), nn.MaxPool2d(2)]
    return nn.Sequential(*convolutions, nn.Flatten(), nn.Linear(800, 500), nn.ReLU(), nn.Linear(500, 10))


def net3c3d() -> nn.Module:
    """3c3d as in DeepOBS; rounding up the pooled sizes stands for TensorFlow's padding "same"."""
    layers: list[nn.Module] = []
    for convolution in (nn.Conv2d(3, 64, 5), nn.Conv2d(64, 96, 3), nn.Conv2d(96, 128, 3, padding=1)):
        layers += [convolution, nn.ReLU(), nn.MaxPool2d(3, 2, ceil_mode=True)]
    dense = [nn.Linear(1152, 512), nn.ReLU(), nn.Linear(512, 256), nn.ReLU(), nn.Linear(256, 10)]
    return nn.Sequential(*layers, nn.Flatten(), *dense)


def resnet20(frozen: bool) -> nn.Module:
    """In train mode; `frozen` puts the batch norms alone in eval mode."""
    stem = [nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
    blocks = [Residual(a, b) for a, b in ((16, 16),) * 3 + ((16, 32), (32, 32), (32, 32), (32, 64), (64, 64), (64, 64))]
    model = nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.train(not frozen)
    return model


def encoder(builtin: bool = False) -> nn.Module:
    """Two layers of width 128 with 4 heads, a linear head on the mean over positions; no dropout."""
    layer = partial(nn.TransformerEncoderLayer, dropout=0.0, batch_first=True) if builtin else Encoder
    return nn.Sequential(layer(128, 4, 512), layer(128, 4, 512), MeanOverPositions(), nn.Linear(128, 10))


@dataclass(frozen=True)
class Workload:
    title: str
    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    samples: int
    mixes: bool = False
    quantities: tuple[str, ...] = ("rows", "norms", "squares", "variance")

    def build(self, samples: int | None = None) -> tuple[nn.Module, Tensor, Tensor]:
        """Model, inputs and labels, the same at every call."""
        torch.manual_seed(0)
        N = samples or self.samples
        return self.make(), torch.randn(N, *self.shape), torch.randint(10, (N,))


MIXED = ("rows", "copy", "norms", "squares", "variance")
IMAGE = (3, 32, 32)
WORKLOADS = {
    "W1": Workload("MLP 784-512-256-10", mlp, (784,), 128),
    "W2": Workload("two 5x5 convolutions and two linear layers (LeNet), 28x28", lenet, (1, 28, 28), 128),
    "W3": Workload("3c3d, CIFAR-10", net3c3d, IMAGE, 64),
    "W4": Workload("ResNet-20, batch norm in eval mode", partial(resnet20, frozen=True), IMAGE, 64),
    "W5": Workload("ResNet-20, batch norm in train mode", partial(resnet20, frozen=False), IMAGE, 64, True, MIXED),
    "W6": Workload(
        "MLP 784-512-256-10, batch norm in train mode", partial(mlp, norm=True), (784,), 128, True, (*MIXED, "gram")
    ),
    "W7": Workload("transformer encoder, linear layers and softmax spelled out", encoder, (64, 128), 32),
    "W7b": Workload("transformer encoder, nn.TransformerEncoderLayer", partial(encoder, True), (64, 128), 32),
}

# Counted: what writing the result and one backward pass take at least. W5: N backward passes, measured, so it can be
# missed by the noise. Where nothing stands nobody has counted.
FLOORS = {
    "rows": {"W1": 3.9, "W2": 1.1, "W3": 1.1, "W4": 1.0, "W5": 39.6, "W7": 1.03, "W7b": 1.03},
    "norms": {"W1": 0.6, "W2": 1.0, "W3": 1.0, "W4": 1.0, "W7": 1.0, "W7b": 1.0},
}


# --- what the numbers should be -----------------------------------------------------------------------


def squared_norms(rows: Rows) -> Tensor:
    """[N], over all parameters."""
    return sum(torch.linalg.vector_norm(r.flatten(1), dim=1).square() for r in rows.values())  # type: ignore[return-value]


def squares(rows: Rows) -> Rows:
    """Sum over samples of the squared entries. The rows are used up: nobody needs fresh memory for the squares."""
    return {name: r.square_().sum(0) for name, r in rows.items()}


def variances(rows: Rows) -> Rows:
    """Biased, as mean of the squares less square of the mean. The rows are used up."""
    means = {name: r.mean(0) for name, r in rows.items()}
    return {name: s / len(rows[name]) - means[name].square() for name, s in squares(rows).items()}


def gram(rows: Rows) -> Tensor:
    """[N, N]."""
    return sum(r.flatten(1) @ r.flatten(1).T for r in rows.values())  # type: ignore[return-value]


FROM_ROWS: dict[str, Callable[[Rows], Any]] = {
    "rows": lambda rows: rows,
    "norms": squared_norms,
    "squares": squares,
    "variance": variances,
    "gram": gram,
}


def from_rows(rows: Callable[[], Rows]) -> dict[str, Ask]:
    """Every quantity the way one gets it from a tool that offers rows only."""
    return {quantity: lambda f=f: f(rows()) for quantity, f in FROM_ROWS.items()}


def autograd_rows(model: nn.Module, X: Tensor, y: Tensor, out: dict[str, Tensor] | None = None) -> Rows:
    """Component rows by definition: one backward pass per loss term, each as it enters the mean."""
    parameters = dict(model.named_parameters())
    out = out or {name: p.new_empty(len(X), *p.shape) for name, p in parameters.items()}
    losses = F.cross_entropy(model(X), y, reduction="none") / len(X)
    for n, loss in enumerate(losses):
        row = torch.autograd.grad(loss, list(parameters.values()), retain_graph=True)
        for name, g in zip(parameters, row, strict=True):
            out[name][n] = g
    return out


def _linear(layer: nn.Linear, W: Tensor, b: Tensor, x: Tensor) -> Tensor:
    return torch.einsum("noi,ni->no", W, x) + b


def _convolution(layer: nn.Conv2d, W: Tensor, b: Tensor | None, x: Tensor) -> Tensor:
    convolve = vmap(lambda x, w: F.conv2d(x[None], w, None, layer.stride, layer.padding)[0])
    return convolve(x, W) + (0 if b is None else b[..., None, None])


def _batch_norm(layer: nn.BatchNorm1d | nn.BatchNorm2d, W: Tensor, b: Tensor, x: Tensor) -> Tensor:
    align = (..., *[None] * (x.ndim - 2))
    return F.batch_norm(x, None, None, training=True, eps=layer.eps) * W[align] + b[align]


COPIED = {nn.Linear: _linear, nn.Conv2d: _convolution, nn.BatchNorm1d: _batch_norm, nn.BatchNorm2d: _batch_norm}


def copied_rows(model: nn.Module, X: Tensor, y: Tensor) -> Rows:
    """Copy rows by definition: every sample gets parameters of its own, and one backward pass serves them all."""
    model = copy.deepcopy(model)
    copies = {n: p.detach().repeat(len(X), *[1] * p.ndim).requires_grad_() for n, p in model.named_parameters()}
    for path, module in model.named_modules():
        if forward := COPIED.get(type(module)):
            module.forward = partial(forward, module, *(copies.get(f"{path}.{name}") for name in ("weight", "bias")))
    grads = torch.autograd.grad(F.cross_entropy(model(X), y), list(copies.values()))
    return dict(zip(copies, grads, strict=True))


def references(workload: Workload, quantities: Iterable[str]) -> dict[str, Any]:
    """Every quantity from rows in float64."""
    model, X, y = workload.build()
    model, X = model.double(), X.double()
    rows = autograd_rows(model, X, y)
    # The quantities that use up the rows get their own; what is kept is kept in single precision.
    own = {q: {n: r.clone() for n, r in rows.items()} if q in ("squares", "variance") else rows for q in quantities}
    return {q: single(copied_rows(model, X, y) if q == "copy" else FROM_ROWS[q](own[q])) for q in quantities}


def single(found: Any) -> Any:
    return found.float() if isinstance(found, Tensor) else {name: t.float() for name, t in found.items()}


def distance(found: Any, truth: Any) -> float:
    """Relative, over all parameters together."""
    if isinstance(truth, Tensor):
        found, truth = {"": found}, {"": truth}
    off = sum(float((found[name] - t).norm()) ** 2 for name, t in truth.items())
    return (off / sum(float(t.norm()) ** 2 for t in truth.values())) ** 0.5


# --- the contestants ----------------------------------------------------------------------------------
# Each takes model, inputs and labels, and says how it answers which quantity.


class Incomplete(Exception):
    """The tool has no answer for some of the parameters, and said so in a warning at most."""


def plain(model: nn.Module, X: Tensor, y: Tensor) -> Ask:
    parameters = list(model.parameters())
    return lambda: torch.autograd.grad(F.cross_entropy(model(X), y), parameters)


def vmap_grad(model: nn.Module, X: Tensor, y: Tensor) -> dict[str, Ask]:
    def loss(parameters: dict[str, Tensor], x: Tensor, label: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(model, parameters, (x[None],)), label[None]) / len(X)

    parameters = {name: p.detach() for name, p in model.named_parameters()}
    return from_rows(lambda: vmap(grad(loss), (None, 0, 0))(parameters, X, y))


def harvest(model: nn.Module, attribute: str) -> Rows:
    """Take away what a tool left at the parameters."""
    found = {name: getattr(p, attribute, None) for name, p in model.named_parameters()}
    for p in model.parameters():
        setattr(p, attribute, None)
        p.grad = None
    if left_out := [name for name, value in found.items() if value is None]:
        raise Incomplete(f"nothing for {', '.join(left_out)}")
    return found


def backpack(model: nn.Module, X: Tensor, y: Tensor) -> dict[str, Ask]:
    tool, extensions = importlib.import_module("backpack"), importlib.import_module("backpack.extensions")
    tool.extend(model)

    def ask(extension: str, attribute: str) -> Rows:
        with tool.backpack(getattr(extensions, extension)()):
            F.cross_entropy(model(X), y).backward()
        return harvest(model, attribute)

    rows = partial(ask, "BatchGrad", "grad_batch")
    return {
        "rows": rows,
        "copy": rows,  # it has one kind of rows, and the guard says which
        "norms": lambda: sum(ask("BatchL2Grad", "batch_l2").values()),
        "squares": partial(ask, "SumGradSquared", "sum_grad_squared"),
        "variance": partial(ask, "Variance", "variance"),
        "gram": lambda: gram(rows()),
    }


def opacus(model: nn.Module, X: Tensor, y: Tensor) -> dict[str, Ask]:
    """Rows by hooks, norms by ghost clipping."""
    tool = importlib.import_module("opacus.grad_sample")
    ghost = importlib.import_module("opacus.grad_sample.grad_sample_module_fast_gradient_clipping")
    other = copy.deepcopy(model)
    hooked = tool.GradSampleModule(model, loss_reduction="sum")
    clipped = ghost.GradSampleModuleFastGradientClipping(other, loss_reduction="sum")

    def rows() -> Rows:
        F.cross_entropy(hooked(X), y).backward()
        return harvest(model, "grad_sample")

    def norms() -> Tensor:
        F.cross_entropy(clipped(X), y).backward()
        found = clipped.get_norm_sample().square()
        harvest(other, "_norm_sample")
        return found

    return from_rows(rows) | {"copy": rows, "norms": norms}


def expanded_weights(model: nn.Module, X: Tensor, y: Tensor) -> dict[str, Ask]:
    def rows() -> Rows:
        F.cross_entropy(call_for_per_sample_grads(model, loss_reduction="sum")(X), y).backward()
        return harvest(model, "grad_sample")

    return from_rows(rows) | {"copy": rows}


def loop(model: nn.Module, X: Tensor, y: Tensor) -> dict[str, Ask]:
    """N calls of autograd.grad on one graph; norms and moments row by row, in the memory of one row."""
    parameters = dict(model.named_parameters())
    buffers = {name: p.new_empty(len(X), *p.shape) for name, p in parameters.items()}

    def each() -> Iterable[tuple[Tensor, ...]]:
        losses = F.cross_entropy(model(X), y, reduction="none") / len(X)
        return (torch.autograd.grad(loss, list(parameters.values()), retain_graph=True) for loss in losses)

    def norms() -> Tensor:
        return torch.stack([sum(g.square().sum() for g in row) for row in each()])  # type: ignore[misc]

    def moments() -> tuple[Rows, Rows]:
        first, second = ({name: torch.zeros_like(p) for name, p in parameters.items()} for _ in range(2))
        for row in each():
            for name, g in zip(parameters, row, strict=True):
                first[name].add_(g)
                second[name].addcmul_(g, g)
        return first, second

    def variance() -> Rows:
        first, second = moments()
        return {name: second[name] / len(X) - (first[name] / len(X)).square() for name in parameters}

    rows = partial(autograd_rows, model, X, y, buffers)
    return {
        "rows": rows,
        "norms": norms,
        "squares": lambda: moments()[1],
        "variance": variance,
        "gram": lambda: gram(rows()),
    }


def batched(model: nn.Module, X: Tensor, y: Tensor) -> dict[str, Ask]:
    """One call of autograd.grad with `is_grads_batched=True`."""
    parameters = dict(model.named_parameters())

    def rows() -> Rows:
        losses = F.cross_entropy(model(X), y, reduction="none")
        seeds = torch.eye(len(X)) / len(X)
        found = torch.autograd.grad(losses, list(parameters.values()), seeds, is_grads_batched=True)
        return dict(zip(parameters, found, strict=True))

    return from_rows(rows)


def ours(model: nn.Module, X: Tensor, y: Tensor) -> dict[str, Ask]:
    """This library, asked as in training: about another batch each time, after the parameters have been written to.

    The recording survives that; rows are written where they were before.
    """
    known: Any = [ub.Problem(model, F.cross_entropy, (X, y))]
    batches = itertools.cycle([(X, y), (X.clone(), y.clone())])
    buffers: dict[str, Tensor] = {}

    def problem() -> Any:
        for p in model.parameters():
            p.detach().view(-1)[:1].add_(0)
        known[0] = known[0].with_batch(*next(batches))
        return known[0]

    def rows(by: str) -> Rows:
        if not buffers:
            buffers.update({name: p.new_empty(len(X), *p.shape) for name, p in model.named_parameters()})
        return problem().gradients(by=by, out=buffers)

    return {
        "rows": partial(rows, "component"),
        "copy": partial(rows, "copy"),
        "norms": lambda: problem().compute(ub.Norms()).total,
        "squares": lambda: problem().compute(ub.SumOfSquares()),
        "variance": lambda: problem().compute(ub.Variance()),
        "gram": lambda: problem().compute(ub.Dots()),
    }


CONTESTANTS: dict[str, Callable[[nn.Module, Tensor, Tensor], dict[str, Ask]]] = {
    "unbatch": ours,
    "vmap(grad)": vmap_grad,
    "BackPACK": backpack,
    "Opacus": opacus,
    "Expanded Weights": expanded_weights,
    "autograd loop": loop,
    "is_grads_batched": batched,
}
WHERE_MIXED = ("autograd loop", "is_grads_batched")  # elsewhere nobody would
PACKAGES = {"BackPACK": "backpack-for-pytorch", "Opacus": "opacus"}


# --- measuring ----------------------------------------------------------------------------------------


@dataclass
class Entry:
    """What one contestant did about one quantity. `status` is "ok", "wrong", or says why there is no figure."""

    status: str
    ratio: float | None = None  # to the plain step, median over rounds
    first: float | None = None  # the same of the very first call, all preparation included
    error: float | None = None  # relative, against float64


def keep_memory() -> None:
    """Ask the C library to keep what is freed, instead of returning it and paying for fresh pages each time."""
    if platform.libc_ver()[0] == "glibc":
        trim_threshold, mmap_max = -1, -4
        library = ctypes.CDLL(None)
        library.mallopt(trim_threshold, -1)
        library.mallopt(mmap_max, 0)


def seconds(ask: Ask) -> float:
    start = time.process_time()
    ask()
    return time.process_time() - start


def turn(ask: Ask) -> float:
    """Seconds of one call; of the median call if the calls are short."""
    spent = [seconds(ask)]
    while sum(spent) < SPENT and len(spent) < AT_MOST:
        spent.append(seconds(ask))
    return statistics.median(spent)


EXCUSES: dict[type[Exception], str] = {
    Incomplete: "leaves out parameters",
    ModuleNotFoundError: "not installed",
    NotImplementedError: "refuses",
    ub.UnbatchError: "refuses",
}


def excuse(error: Exception) -> str:
    for kind, word in EXCUSES.items():
        if isinstance(error, kind):
            return word
    return f"raises {type(error).__name__}"


def offers(contestant: str, workload: Workload, samples: int | None = None) -> dict[str, Ask]:
    """How it answers which quantity. Where it cannot even be set up, every answer is that complaint."""
    if contestant in WHERE_MIXED and not workload.mixes:
        return {}
    try:
        return CONTESTANTS[contestant](*workload.build(samples))
    except Exception as error:
        return dict.fromkeys(workload.quantities, partial(_complain, error))


def _complain(error: Exception) -> None:
    raise error


def judged(ask: Ask | None, truth: Any, unit: float) -> Entry:
    """The first call, held against the truth."""
    if ask is None:
        return Entry("not offered")
    start = time.process_time()
    try:
        found = ask()
    except Exception as error:
        return Entry(excuse(error))
    first = (time.process_time() - start) / unit
    error = distance(found, truth)
    return Entry("ok" if error <= TOLERANCE else "wrong", first=first, error=error)


def measure(workload: Workload, quantities: Sequence[str], rounds: int) -> dict[str, Any]:
    """All contestants on all quantities of one workload, interleaved."""
    quantities = [q for q in workload.quantities if q in quantities]
    step = plain(*workload.build())
    step()
    unit, truths = turn(step), references(workload, quantities)
    offered = {contestant: offers(contestant, workload) for contestant in CONTESTANTS}
    asks = {(q, c): offered[c].get(q) for q in quantities for c in CONTESTANTS}
    entries = {(q, c): judged(ask, truths[q], unit) for (q, c), ask in asks.items()}
    del truths
    running = [key for key, entry in entries.items() if entry.first is not None]
    found = [one_round(step, {key: asks[key] for key in running}) for _ in range(rounds)]
    for key in running:
        entries[key].ratio = statistics.median(ratios[key] for ratios in found)
    table = {q: {c: asdict(entries[q, c]) for c in CONTESTANTS} for q in quantities}
    return {"title": workload.title, "samples": workload.samples, "plain_ms": 1e3 * unit, "quantities": table}


def one_round(step: Ask, asks: Mapping[Any, Ask]) -> dict[Any, float]:
    unit = turn(step)
    return {key: turn(ask) / unit for key, ask in asks.items()}


# --- memory -------------------------------------------------------------------------------------------

MEMORY = ("W1", "W3", "W4")
RIVALS = ("unbatch", "vmap(grad)", "BackPACK", "Opacus")


def peak() -> int:
    """Bytes of the largest resident set so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def rows_within(budget: int, model: nn.Module, X: Tensor, y: Tensor) -> Ask:
    """Component rows into memory that is there already, with so many bytes for everything else."""
    buffers = {name: p.new_zeros(len(X), *p.shape) for name, p in model.named_parameters()}
    problem = ub.Problem(model, F.cross_entropy, (X, y))
    return lambda: problem.gradients(by="component", out=buffers, memory=budget)


def growth(name: str, contestant: str, quantity: str, samples: int, budget: int | None) -> int | str:
    """How far the peak of this process rises above that of a plain step. Meant for a process of its own."""
    workload = WORKLOADS[name]
    model, X, y = workload.build(samples)
    try:
        ask = rows_within(budget, model, X, y) if budget else offers(contestant, workload, samples)[quantity]
        _load()
        plain(model, X, y)()
        before = peak()
        ask()
    except Exception as error:
        return excuse(error)
    return peak() - before


def _load() -> None:
    """What PyTorch loads when a gradient is first taken with a cotangent (45 MiB): not what is measured here."""
    x = torch.ones(1, requires_grad=True)
    torch.autograd.grad(x * 1, x, torch.ones(1))


def in_a_child(*what: object) -> int | str:
    command = [sys.executable, __file__, "--child", json.dumps(what)]
    run = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    return json.loads(run.stdout) if run.returncode == 0 else "raises in a child"


def measure_memory(names: Iterable[str]) -> list[dict[str, Any]]:
    """Bytes above a plain step: norms and sums of squares at two batch sizes, component rows at three."""
    jobs: list[tuple[str, str, str, int, int | None]] = [
        (name, contestant, quantity, times * WORKLOADS[name].samples, None)
        for name in names
        if name in MEMORY
        for quantity in ("norms", "squares")
        for times in (1, 2)
        for contestant in RIVALS
    ]
    for samples in (16, 64, 128) if "W5" in names else ():
        jobs += [("W5", "unbatch", "rows", samples, BUDGET)]
        jobs += [("W5", contestant, "rows", samples, None) for contestant in ("autograd loop", "is_grads_batched")]
    keys = ("workload", "contestant", "quantity", "samples", "budget")
    return [dict(zip(keys, job, strict=True)) | {"bytes": in_a_child(*job)} for job in jobs]


# --- the page -----------------------------------------------------------------------------------------

HEADER = """\
# Gradients, measured

<!-- Written by benchmarks/gradients.py; change that, not this. -->

What rows, squared norms, sums of squares and variances of per-sample gradients cost, as multiples of one plain
forward and backward pass on the same batch. Where samples mix (W5, W6: batch norm in train mode) "rows" and what is
derived from them are per component, and "copy" are rows per copy of the parameters; "gram" is the matrix of inner
products of the rows. *Floor* counts what the result cannot do without: for rows the bytes to write beside one backward
pass. For W5 it is what N backward passes took in an earlier measurement.

Measured on {date}, {device}, torch {torch}, {tools}; float32, cross entropy (mean), one thread, process CPU time, all
contestants interleaved, medians of {rounds} rounds after one to warm up. Freed memory stays with the process.
unbatch is asked as in training, about another batch each time and after the parameters were written to, and writes rows
into the caller's memory (`out=`). Tools that offer rows only get the other quantities from them.
Each answer was first held against a loop of autograd in float64: **wrong** is one that is off by more than
{tolerance:g} relative, and it is timed nevertheless. *Refuses* is a deliberate no, *raises* any other; a dash says that
the tool does not offer it or was not asked. `make bench-gradients` repeats all of it.
"""

MEMORY_HEADER = """\
## Memory

Peak resident memory above that of a plain step, in MiB, of the first question, each in a process of its own. The rows
of unbatch on W5 go to memory that is there before, with `memory=` {budget} MiB for everything else; those of the others
are part of their figure.
"""


def table(lines: Sequence[Sequence[object]]) -> str:
    head, *body = lines
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in (head, ["---"] * len(head), *body)) + "\n"


def cell(entry: Mapping[str, Any]) -> str:
    if entry["ratio"] is None:
        return "–" if entry["status"] == "not offered" else entry["status"]
    figure = f"{entry['ratio']:.3g}"
    return figure if entry["status"] == "ok" else f"**wrong** by {100 * entry['error']:.0f} % ({figure})"


def speeds(results: Mapping[str, Any]) -> str:
    lines: list[Sequence[object]] = [("workload", "quantity", "floor", *CONTESTANTS)]
    for name, result in results.items():
        for quantity, entries in result["quantities"].items():
            floor = FLOORS.get(quantity, {}).get(name, "–")
            lines.append((name, quantity, floor, *(cell(entries[c]) for c in CONTESTANTS)))
    return table(lines)


def workloads(results: Mapping[str, Any]) -> str:
    facts = [(name, r["title"], r["samples"], f"{r['plain_ms']:.1f} ms") for name, r in results.items()]
    return table([("workload", "model", "N", "plain step"), *facts])


def memory_table(found: Iterable[Mapping[str, Any]]) -> str:
    lines: dict[tuple[Any, ...], dict[str, str]] = {}
    for f in found:
        figure = f["bytes"] if isinstance(f["bytes"], str) else f"{f['bytes'] / 2**20:.0f}"
        lines.setdefault((f["workload"], f["quantity"], f["samples"]), {})[f["contestant"]] = figure
    names = [c for c in CONTESTANTS if any(c in line for line in lines.values())]
    body = [(*key, *(line.get(c, "–") for c in names)) for key, line in lines.items()]
    return table([("workload", "quantity", "N", *names), *body])


def tools() -> dict[str, str]:
    """The versions of the other tools that are installed."""
    found = {}
    for tool, package in PACKAGES.items():
        try:
            found[tool] = version(package)
        except PackageNotFoundError:
            found[tool] = "not installed"
    return found


def device() -> str:
    return f"{platform.machine()} CPU with {torch.backends.cpu.get_cpu_capability()}"


def page(data: Mapping[str, Any]) -> str:
    """`docs/gradients_benchmark.md`."""
    named = ", ".join(f"{tool} {number}" for tool, number in data["tools"].items())
    facts = {key: data[key] for key in ("date", "device", "torch", "rounds")}
    text = HEADER.format(**facts, tools=named, tolerance=TOLERANCE)
    text += "\n" + workloads(data["results"]) + "\n" + speeds(data["results"])
    if data.get("memory"):
        text += "\n" + MEMORY_HEADER.format(budget=BUDGET // 2**20) + "\n" + memory_table(data["memory"])
    return text


def save(data: Mapping[str, Any], docs: Path = DOCS, results: Path = RESULTS) -> None:
    results.parent.mkdir(parents=True, exist_ok=True)
    docs.write_text(page(data))
    results.write_text(json.dumps(data, indent=1) + "\n")


def facts(rounds: int) -> dict[str, Any]:
    known = {"date": datetime.date.today().isoformat(), "device": device(), "python": platform.python_version()}
    return known | {"torch": version("torch").partition("+")[0], "tools": tools(), "rounds": rounds}


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    every = dict.fromkeys(q for w in WORKLOADS.values() for q in w.quantities)
    parser.add_argument("--workloads", default=",".join(WORKLOADS), help="comma-separated")
    parser.add_argument("--quantities", default=",".join(every), help="comma-separated")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--memory", action="store_true", help="peak memory instead of time; with --write, both")
    parser.add_argument("--write", action="store_true", help="write the page and the figures behind it")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    for name, known in (("workloads", WORKLOADS), ("quantities", every)):
        chosen = getattr(options, name).split(",")
        if unknown := [c for c in chosen if c not in known]:
            parser.error(f"--{name} knows {', '.join(known)}; got {', '.join(unknown)}")
        setattr(options, name, chosen)
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # the tools' own deprecations, and torch's remarks about them
    if options.child:
        print(json.dumps(growth(*json.loads(options.child))))
        return
    data = facts(options.rounds) | {"results": {}}
    if options.memory:
        data["memory"] = measure_memory(options.workloads)
        print(memory_table(data["memory"]))
    if options.write or not options.memory:
        keep_memory()
        for name in options.workloads:
            data["results"][name] = measure(WORKLOADS[name], options.quantities, options.rounds)
            print(speeds({name: data["results"][name]}), flush=True)
    if options.write:
        save(data)


if __name__ == "__main__":
    main()
