"""The cost of per-sample and per-component gradients, here and with other tools, in plain backward
passes.

    python benchmarks/gradients_cost.py                                       measures everything and prints the table
    python benchmarks/gradients_cost.py --workloads W1,W6 --quantities rows,norms --rounds 3
    python benchmarks/gradients_cost.py --write        writes docs/benchmarks/gradients.md and results/gradients.json
    python benchmarks/gradients_cost.py --memory       measures and prints peak memory instead of time

The unit is one forward and backward pass of the same batch. Process CPU time on one thread; in
every round all contestants, the unit among them, have their turn one after the other, and the
figure is the median over the rounds of the ratio within a round. Memory that was freed stays with
the process, so nobody pays for fresh pages. Before a contestant is timed its answer is held against
a loop of plain autograd in float64. `make bench-gradients` installs the other tools; without them
the table says so.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import json
import os
import resource
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.utils._per_sample_grad import call_for_per_sample_grads

import unbatch as ub
from lib import interleaved
from lib.interleaved import Ask, Offer
from lib.workloads import WORKLOADS, Workload

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs" / "benchmarks" / "gradients.md"
RESULTS = ROOT / "benchmarks" / "results" / "gradients.json"
BUDGET = 256 * 2**20  # bytes for the temporaries of component rows, in the memory benchmark

Rows = Mapping[str, Tensor]


# --- what is asked --------------------------------------------------------------------------------


INDEPENDENT = ("rows", "norms", "squares", "variance")
MIXED = ("rows", "copy", "norms", "squares", "variance")
ASKED = dict.fromkeys(WORKLOADS, INDEPENDENT) | {"W5": MIXED, "W6": (*MIXED, "gram")}
QUANTITIES = tuple(dict.fromkeys(q for asked in ASKED.values() for q in asked))

# Counted: what writing the result and one backward pass take at least. W5: N backward passes,
# measured, so it can be missed by the noise. Where nothing stands nobody has counted.
FLOORS = {
    "rows": {"W1": 3.9, "W2": 1.1, "W3": 1.1, "W4": 1.0, "W5": 39.6, "W7": 1.03, "W7b": 1.03},
    "norms": {"W1": 0.6, "W2": 1.0, "W3": 1.0, "W4": 1.0, "W7": 1.0, "W7b": 1.0},
}


# --- what the numbers should be -------------------------------------------------------------------


def squared_norms(rows: Rows) -> Tensor:
    """[N], over all parameters."""
    return sum(torch.linalg.vector_norm(r.flatten(1), dim=1).square() for r in rows.values())  # type: ignore[return-value]


def squares(rows: Rows) -> Rows:
    """Return the sum over samples of the squared entries. Overwrites the rows, to need no fresh
    memory.
    """
    return {name: r.square_().sum(0) for name, r in rows.items()}


def variances(rows: Rows) -> Rows:
    """Return the biased variance: mean of the squares less square of the
    mean. Overwrites the rows.
    """
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


def from_rows(rows: Callable[[], Rows]) -> Offer:
    """Compute every quantity from rows, for tools that offer nothing else."""
    return {quantity: lambda f=f: f(rows()) for quantity, f in FROM_ROWS.items()}


def autograd_rows(
    model: nn.Module, X: Tensor, y: Tensor, out: dict[str, Tensor] | None = None
) -> Rows:
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


COPIED = {
    nn.Linear: _linear,
    nn.Conv2d: _convolution,
    nn.BatchNorm1d: _batch_norm,
    nn.BatchNorm2d: _batch_norm,
}


def copied_rows(model: nn.Module, X: Tensor, y: Tensor, cotangent: Tensor | None = None) -> Rows:
    """Copy rows by definition: every sample gets parameters of its own, and one backward pass
    serves them all.

    With a ``cotangent`` of the predictions instead of the slope of the loss, if there is one.
    """
    model = copy.deepcopy(model)
    copies = {
        n: p.detach().repeat(len(X), *[1] * p.ndim).requires_grad_()
        for n, p in model.named_parameters()
    }
    for path, module in model.named_modules():
        if forward := COPIED.get(type(module)):
            module.forward = partial(
                forward, module, *(copies.get(f"{path}.{name}") for name in ("weight", "bias"))
            )
    predictions = model(X)
    top = F.cross_entropy(predictions, y) if cotangent is None else predictions
    grads = torch.autograd.grad(top, list(copies.values()), cotangent)
    return dict(zip(copies, grads, strict=True))


def references(workload: Workload, quantities: Iterable[str]) -> dict[str, Any]:
    """Return every quantity, from rows in float64."""
    model, X, y = workload.build()
    model, X = model.double(), X.double()
    rows = autograd_rows(model, X, y)
    # The quantities that use up the rows get their own; what is kept is kept in single precision.
    own = {
        q: {n: r.clone() for n, r in rows.items()} if q in ("squares", "variance") else rows
        for q in quantities
    }
    return {
        q: interleaved.single(copied_rows(model, X, y) if q == "copy" else FROM_ROWS[q](own[q]))
        for q in quantities
    }


# --- the contestants ------------------------------------------------------------------------------
# Each takes model, inputs and labels, and says how it answers which quantity.


def vmap_grad(model: nn.Module, X: Tensor, y: Tensor) -> Offer:
    def loss(parameters: dict[str, Tensor], x: Tensor, label: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(model, parameters, (x[None],)), label[None]) / len(X)

    parameters = {name: p.detach() for name, p in model.named_parameters()}
    return from_rows(lambda: vmap(grad(loss), (None, 0, 0))(parameters, X, y))


def backpack(model: nn.Module, X: Tensor, y: Tensor) -> Offer:
    tool, extensions = (
        importlib.import_module("backpack"),
        importlib.import_module("backpack.extensions"),
    )
    tool.extend(model)

    def ask(extension: str, attribute: str) -> Rows:
        with tool.backpack(getattr(extensions, extension)()):
            F.cross_entropy(model(X), y).backward()
        return interleaved.harvest(model, attribute)

    rows = partial(ask, "BatchGrad", "grad_batch")
    return {
        "rows": rows,
        "copy": rows,  # it has one kind of rows, and the guard says which
        "norms": lambda: sum(ask("BatchL2Grad", "batch_l2").values()),
        "squares": partial(ask, "SumGradSquared", "sum_grad_squared"),
        "variance": partial(ask, "Variance", "variance"),
        "gram": lambda: gram(rows()),
    }


def opacus(model: nn.Module, X: Tensor, y: Tensor) -> Offer:
    """Rows by hooks, norms by ghost clipping."""
    tool = importlib.import_module("opacus.grad_sample")
    ghost = importlib.import_module("opacus.grad_sample.grad_sample_module_fast_gradient_clipping")
    other = copy.deepcopy(model)
    hooked = tool.GradSampleModule(model, loss_reduction="sum")
    clipped = ghost.GradSampleModuleFastGradientClipping(other, loss_reduction="sum")

    def rows() -> Rows:
        F.cross_entropy(hooked(X), y).backward()
        return interleaved.harvest(model, "grad_sample")

    def norms() -> Tensor:
        F.cross_entropy(clipped(X), y).backward()
        found = clipped.get_norm_sample().square()
        interleaved.harvest(other, "_norm_sample")
        return found

    return from_rows(rows) | {"copy": rows, "norms": norms}


def expanded_weights(model: nn.Module, X: Tensor, y: Tensor) -> Offer:
    def rows() -> Rows:
        F.cross_entropy(call_for_per_sample_grads(model, loss_reduction="sum")(X), y).backward()
        return interleaved.harvest(model, "grad_sample")

    return from_rows(rows) | {"copy": rows}


def loop(model: nn.Module, X: Tensor, y: Tensor) -> Offer:
    """N calls of autograd.grad on one graph; norms and moments row by row, in the memory of one
    row.
    """
    parameters = dict(model.named_parameters())
    buffers = {name: p.new_empty(len(X), *p.shape) for name, p in parameters.items()}

    def each() -> Iterable[tuple[Tensor, ...]]:
        losses = F.cross_entropy(model(X), y, reduction="none") / len(X)
        return (
            torch.autograd.grad(loss, list(parameters.values()), retain_graph=True)
            for loss in losses
        )

    def norms() -> Tensor:
        return torch.stack([sum(g.square().sum() for g in row) for row in each()])  # type: ignore[misc]

    def moments() -> tuple[Rows, Rows]:
        first, second = (
            {name: torch.zeros_like(p) for name, p in parameters.items()} for _ in range(2)
        )
        for row in each():
            for name, g in zip(parameters, row, strict=True):
                first[name].add_(g)
                second[name].addcmul_(g, g)
        return first, second

    def variance() -> Rows:
        first, second = moments()
        return {
            name: second[name] / len(X) - (first[name] / len(X)).square() for name in parameters
        }

    rows = partial(autograd_rows, model, X, y, buffers)
    return {
        "rows": rows,
        "norms": norms,
        "squares": lambda: moments()[1],
        "variance": variance,
        "gram": lambda: gram(rows()),
    }


def batched(model: nn.Module, X: Tensor, y: Tensor) -> Offer:
    """One call of autograd.grad with `is_grads_batched=True`."""
    parameters = dict(model.named_parameters())

    def rows() -> Rows:
        losses = F.cross_entropy(model(X), y, reduction="none")
        seeds = torch.eye(len(X)) / len(X)
        found = torch.autograd.grad(losses, list(parameters.values()), seeds, is_grads_batched=True)
        return dict(zip(parameters, found, strict=True))

    return from_rows(rows)


def ours(model: nn.Module, X: Tensor, y: Tensor) -> Offer:
    """This library; rows are written into the same memory again."""
    problem = interleaved.asked_anew(model, X, y)
    buffers: dict[str, Tensor] = {}

    def rows(by: str) -> Rows:
        if not buffers:
            buffers.update(
                {name: p.new_empty(len(X), *p.shape) for name, p in model.named_parameters()}
            )
        return problem().gradients(by=by, out=buffers)

    return {
        "rows": partial(rows, "component"),
        "copy": partial(rows, "copy"),
        "norms": lambda: problem().compute(ub.SquaredNorms()).total,
        "squares": lambda: problem().compute(ub.SumOfSquares()),
        "variance": lambda: problem().compute(ub.Variance()),
        "gram": lambda: problem().compute(ub.Dots()),
    }


CONTESTANTS: dict[str, Callable[[nn.Module, Tensor, Tensor], Offer]] = {
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


# --- measuring ------------------------------------------------------------------------------------


def offers(contestant: str, workload: Workload, samples: int | None = None) -> Offer:
    """Return the question for each quantity. If the setup of the tool fails, each raises that
    error.
    """
    if contestant in WHERE_MIXED and not workload.mixes:
        return {}
    try:
        return CONTESTANTS[contestant](*workload.build(samples))
    except Exception as error:
        return dict.fromkeys(QUANTITIES, interleaved.complaining(error))


def measure(name: str, quantities: Sequence[str], rounds: int) -> dict[str, Any]:
    """Measure all tools on all quantities of one workload, by turns."""
    workload, quantities = WORKLOADS[name], [q for q in ASKED[name] if q in quantities]
    step = interleaved.plain(*workload.build())
    step()
    unit, truths = interleaved.turn(step), references(workload, quantities)
    offered = {contestant: offers(contestant, workload) for contestant in CONTESTANTS}
    found = interleaved.contest(step, unit, offered, truths, rounds)
    return {
        "title": workload.title,
        "samples": workload.samples,
        "plain_ms": 1e3 * unit,
        "quantities": found,
    }


# --- memory ---------------------------------------------------------------------------------------

MEMORY = ("W1", "W3", "W4")
RIVALS = ("unbatch", "vmap(grad)", "BackPACK", "Opacus")


def peak() -> int:
    """Return the peak of resident memory so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
        1 if sys.platform == "darwin" else 1024
    )


def rows_within(budget: int, model: nn.Module, X: Tensor, y: Tensor) -> Ask:
    """Compute component rows into preallocated memory, with a budget for everything else."""
    buffers = {name: p.new_zeros(len(X), *p.shape) for name, p in model.named_parameters()}
    problem = ub.Problem(model, F.cross_entropy, (X, y))
    return lambda: problem.gradients(by="component", out=buffers, memory=budget)


def growth(
    name: str, contestant: str, quantity: str, samples: int, budget: int | None
) -> int | str:
    """Return how far the peak of memory rises above that of a plain step, in a fresh process."""
    workload = WORKLOADS[name]
    model, X, y = workload.build(samples)
    try:
        ask = (
            rows_within(budget, model, X, y)
            if budget
            else offers(contestant, workload, samples)[quantity]
        )
        _load()
        interleaved.plain(model, X, y)()
        before = peak()
        ask()
    except Exception as error:
        return interleaved.excuse(error)
    return peak() - before


def _load() -> None:
    """Load what PyTorch needs for the first vjp (45 MiB), so that it is not measured."""
    x = torch.ones(1, requires_grad=True)
    torch.autograd.grad(x * 1, x, torch.ones(1))


def in_a_child(*what: object) -> int | str:
    command = [sys.executable, __file__, "--child", json.dumps(what)]
    run = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    return json.loads(run.stdout) if run.returncode == 0 else "raises in a child"


def measure_memory(names: Iterable[str]) -> list[dict[str, Any]]:
    """Return bytes above a plain step: norms and sums of squares at two
    batch sizes, rows at three.
    """
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
        jobs += [
            ("W5", contestant, "rows", samples, None)
            for contestant in ("autograd loop", "is_grads_batched")
        ]
    keys = ("workload", "contestant", "quantity", "samples", "budget")
    return [dict(zip(keys, job, strict=True)) | {"bytes": in_a_child(*job)} for job in jobs]


# --- the page -------------------------------------------------------------------------------------

HEADER = """\
# Gradients, measured

<!-- Written by benchmarks/gradients_cost.py; change that, not this. -->

What rows, squared norms, sums of squares and variances of per-sample gradients cost, as multiples
of one plain forward and backward pass on the same batch. If samples interact (W5, W6: batch norm in
train mode), "rows" and what is derived from them are per component, and "copy" are copy rows;
"gram" is the matrix of inner products of the rows. *Floor* is a lower bound on the cost: for rows
one backward pass and the bytes to write. For W5 it is the time of N backward passes in an earlier
measurement.

Measured on {date}, {device}, torch {torch}, {tools}; float32, cross entropy (mean), one thread,
process CPU time, all contestants interleaved, medians of {rounds} rounds after one to warm up.
Freed memory stays with the process. unbatch is used as in training, with another batch each time
and after a change of the parameters, and writes rows into the caller's memory (`out=`). For tools
that only offer rows, the other quantities are computed from these. Each result was first compared
with a loop of autograd in float64: **wrong** means a relative error above {tolerance:g}; it is
timed nevertheless. *Refuses* is a deliberate error, *raises* any other; a dash means that the tool
does not offer the quantity or was not run. `make bench-gradients` repeats all of it.
"""

MEMORY_HEADER = """\
## Memory

Peak resident memory above that of a plain step, in MiB, of the first question, each in its own
process. The rows of unbatch on W5 are written to preallocated memory, with `memory=` {budget} MiB
for everything else; those of the others are included in their figure.
"""


def speeds(results: Mapping[str, Any]) -> str:
    lines: list[Sequence[object]] = [("workload", "quantity", "floor", *CONTESTANTS)]
    for name, result in results.items():
        for quantity, entries in result["quantities"].items():
            floor = FLOORS.get(quantity, {}).get(name, "–")
            lines.append(
                (name, quantity, floor, *(interleaved.cell(entries[c]) for c in CONTESTANTS))
            )
    return interleaved.table(lines)


def workloads(results: Mapping[str, Any]) -> str:
    facts = [
        (name, r["title"], r["samples"], f"{r['plain_ms']:.1f} ms") for name, r in results.items()
    ]
    return interleaved.table([("workload", "model", "N", "plain step"), *facts])


def memory_table(found: Iterable[Mapping[str, Any]]) -> str:
    lines: dict[tuple[Any, ...], dict[str, str]] = {}
    for f in found:
        figure = f["bytes"] if isinstance(f["bytes"], str) else f"{f['bytes'] / 2**20:.0f}"
        lines.setdefault((f["workload"], f["quantity"], f["samples"]), {})[f["contestant"]] = figure
    names = [c for c in CONTESTANTS if any(c in line for line in lines.values())]
    body = [(*key, *(line.get(c, "–") for c in names)) for key, line in lines.items()]
    return interleaved.table([("workload", "quantity", "N", *names), *body])


def page(data: Mapping[str, Any]) -> str:
    """`docs/benchmarks/gradients.md`."""
    text = (
        interleaved.header(HEADER, data)
        + "\n"
        + workloads(data["results"])
        + "\n"
        + speeds(data["results"])
    )
    if data.get("memory"):
        text += (
            "\n"
            + MEMORY_HEADER.format(budget=BUDGET // 2**20)
            + "\n"
            + memory_table(data["memory"])
        )
    return text


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    made = interleaved.parser(__doc__, WORKLOADS, QUANTITIES)
    made.add_argument(
        "--memory", action="store_true", help="peak memory instead of time; with --write, both"
    )
    made.add_argument("--child", help=argparse.SUPPRESS)
    return interleaved.parsed(made, arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # the tools' own deprecations, and torch's remarks about them
    if options.child:
        print(json.dumps(growth(*json.loads(options.child))))
        return
    data = interleaved.facts(options.rounds, PACKAGES) | {"results": {}}
    if options.memory:
        data["memory"] = measure_memory(options.workloads)
        print(memory_table(data["memory"]))
    if options.write or not options.memory:
        interleaved.keep_memory()
        for name in options.workloads:
            data["results"][name] = measure(name, options.quantities, options.rounds)
            print(speeds({name: data["results"][name]}), flush=True)
    if options.write:
        interleaved.save(page(data), data, DOCS, RESULTS)


if __name__ == "__main__":
    main()
