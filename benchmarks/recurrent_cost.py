"""The cost of per-sample gradients and of the Gauss-Newton diagonal of recurrent networks, here and
with other tools, in plain backward passes.

    python benchmarks/recurrent_cost.py                                   measures everything and prints the table
    python benchmarks/recurrent_cost.py --workloads LSTM --quantities norms --rounds 3
    python benchmarks/recurrent_cost.py --write      writes docs/benchmarks/recurrent.md and results/recurrent.json

The unit is one forward and backward pass of the same batch. Process CPU time on one thread; in
every round all contestants, the unit among them, have their turn one after the other, and the
figure is the median over the rounds of the ratio within a round. Before a contestant is timed its
answer is held against a loop of plain autograd in float64.
"""

from __future__ import annotations

import argparse
import importlib
import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, vjp, vmap
from torch.nn.utils.rnn import pack_padded_sequence

import unbatch as ub
from lib import interleaved
from lib.interleaved import Offer

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs" / "benchmarks" / "recurrent.md"
RESULTS = ROOT / "benchmarks" / "results" / "recurrent.json"
N, T, WIDTH, LAYERS, CLASSES = 32, 100, 128, 2, 5
QUANTITIES = ("rows", "norms", "diagonal")

Rows = Mapping[str, Tensor]


# --- the models -----------------------------------------------------------------------------------


class Classifier(nn.Module):
    """Two layers, and a linear one that reads the last state; ``packed``: of sequences of T to T/2
    steps.
    """

    def __init__(self, rnn: nn.Module, packed: bool) -> None:
        super().__init__()
        self.rnn, self.packed = rnn, packed
        self.head = nn.Linear(WIDTH, CLASSES)
        self.lengths = torch.linspace(T, T // 2, N).long()

    def forward(self, x: Tensor) -> Tensor:
        if self.packed:
            x = pack_padded_sequence(x, self.lengths, batch_first=True)
        states = self.rnn(x)[1]
        if isinstance(states, tuple):
            states = states[0]
        return self.head(states[-1])


@dataclass(frozen=True)
class Workload:
    """A recurrence of PyTorch, and the one that Opacus has in its place."""

    kind: str
    packed: bool

    @property
    def title(self) -> str:
        form = "packed, " if self.packed else ""
        return f"{self.kind}, {form}{LAYERS} layers of {WIDTH}, {T} steps"

    def build(self) -> tuple[nn.Module, Tensor, Tensor]:
        """Return model, inputs and labels, the same each time."""
        torch.manual_seed(0)
        rnn = getattr(nn, self.kind)(WIDTH, WIDTH, LAYERS, batch_first=True)
        model = Classifier(rnn, self.packed)
        return model, torch.randn(N, T, WIDTH), torch.randint(CLASSES, (N,))


WORKLOADS = {
    f"{kind}{'-packed' * packed}": Workload(kind, packed)
    for kind in ("LSTM", "GRU", "RNN")
    for packed in (False, True)
}


# --- what the numbers should be -------------------------------------------------------------------


def squared_norms(rows: Rows) -> Tensor:
    """[N], over all parameters."""
    return torch.stack([r.flatten(1).square().sum(1) for r in rows.values()]).sum(0)


def hessian_columns(predictions: Tensor) -> list[Tensor]:
    """Return ``sqrt(q_c / N) (e_c − q)`` for every class c, [N, C]: their squares sum to the Hessian
    of a mean cross entropy.
    """
    q = predictions.detach().softmax(1)
    units = torch.eye(CLASSES, dtype=q.dtype)
    return [(q[:, c, None] / N).sqrt() * (units[c] - q) for c in range(CLASSES)]


def losses(model: nn.Module, X: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(model(X), y, reduction="none") / N


# --- the contestants ------------------------------------------------------------------------------
# Each takes model, inputs and labels, and says how it answers which quantity.


def ours(model: nn.Module, X: Tensor, y: Tensor) -> Offer:
    """This library; rows are written into the same memory again."""
    problem = interleaved.asked_anew(model, X, y)
    buffers = {name: p.new_empty(N, *p.shape) for name, p in model.named_parameters()}
    return {
        "rows": lambda: problem().gradients(out=buffers),
        "norms": lambda: problem().compute(ub.SquaredNorms()).total,
        "diagonal": lambda: problem().ggn().diag(),
    }


def loop(model: nn.Module, X: Tensor, y: Tensor) -> Offer:
    """One backward pass for every sample, and for every sample and class; in the memory of a row."""
    parameters = dict(model.named_parameters())
    leaves = list(parameters.values())
    buffers = {name: p.new_empty(N, *p.shape) for name, p in parameters.items()}

    def rows() -> Rows:
        for n, loss in enumerate(losses(model, X, y)):
            row = torch.autograd.grad(loss, leaves, retain_graph=True)
            for name, g in zip(parameters, row, strict=True):
                buffers[name][n] = g
        return buffers

    def norms() -> Tensor:
        found = []
        for loss in losses(model, X, y):
            row = torch.autograd.grad(loss, leaves, retain_graph=True)
            found.append(torch.stack([g.square().sum() for g in row]).sum())
        return torch.stack(found)

    def diagonal() -> Tensor:
        total = [torch.zeros_like(p) for p in leaves]
        predictions = model(X)
        for column in hessian_columns(predictions):
            for n in range(N):
                row = torch.autograd.grad(predictions[n], leaves, column[n], retain_graph=True)
                for t, g in zip(total, row, strict=True):
                    t.addcmul_(g, g)
        return torch.cat([t.flatten() for t in total])

    return {"rows": rows, "norms": norms, "diagonal": diagonal}


def vmap_grad(model: nn.Module, X: Tensor, y: Tensor) -> Offer:
    """``torch.func``; lengths of packed sequences are no tensors to it."""
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def predict(chosen: Rows, x: Tensor) -> Tensor:
        return functional_call(model, dict(chosen), (x[None],))

    def loss(chosen: Rows, x: Tensor, label: Tensor) -> Tensor:
        return F.cross_entropy(predict(chosen, x), label[None]) / N

    def rows() -> Rows:
        return vmap(grad(loss), (None, 0, 0))(parameters, X, y)

    def pulled(x: Tensor, cotangent: Tensor) -> Rows:
        return vjp(lambda chosen: predict(chosen, x), parameters)[1](cotangent[None])[0]

    def diagonal() -> Tensor:
        with torch.no_grad():
            columns = hessian_columns(model(X))
        total = {name: torch.zeros_like(p) for name, p in parameters.items()}
        for column in columns:
            for name, r in vmap(pulled)(X, column).items():
                total[name] += r.square().sum(0)
        return torch.cat([t.flatten() for t in total.values()])

    return {"rows": rows, "norms": lambda: squared_norms(rows()), "diagonal": diagonal}


def opacus(model: nn.Module, X: Tensor, y: Tensor) -> Offer:
    """Rows by hooks, with its own recurrence in the place of PyTorch's; norms by ghost clipping."""
    layers = importlib.import_module("opacus.layers")
    tool = importlib.import_module("opacus.grad_sample")
    ghost = importlib.import_module("opacus.grad_sample.grad_sample_module_fast_gradient_clipping")

    def with_theirs() -> nn.Module:
        theirs = getattr(layers, f"DP{type(model.rnn).__name__}")(
            WIDTH, WIDTH, LAYERS, batch_first=True
        )
        theirs.load_state_dict(model.rnn.state_dict())
        other = Classifier(theirs, model.packed)
        other.head.load_state_dict(model.head.state_dict())
        return other

    inner, other = with_theirs(), with_theirs()
    hooked = tool.GradSampleModule(inner, loss_reduction="sum")
    clipped = ghost.GradSampleModuleFastGradientClipping(other, loss_reduction="sum")

    def rows() -> Rows:
        losses(hooked, X, y).sum().backward()
        return interleaved.harvest(inner, "grad_sample")

    def norms() -> Tensor:
        losses(clipped, X, y).sum().backward()
        found = clipped.get_norm_sample().square()
        interleaved.harvest(other, "_norm_sample")
        return found

    def diagonal() -> Tensor:
        with torch.no_grad():
            columns = hessian_columns(model(X))
        total: dict[str, Tensor] = {}
        for column in columns:
            (hooked(X) * column).sum().backward()
            for name, r in interleaved.harvest(inner, "grad_sample").items():
                squares = r.square().sum(0)
                total[name] = total[name] + squares if name in total else squares
        return torch.cat([total[name].flatten() for name, _ in model.named_parameters()])

    return {"rows": rows, "norms": norms, "diagonal": diagonal}


CONTESTANTS: dict[str, Callable[[nn.Module, Tensor, Tensor], Offer]] = {
    "unbatch": ours,
    "autograd loop": loop,
    "vmap(grad)": vmap_grad,
    "Opacus": opacus,
}
PACKAGES = {"Opacus": "opacus"}


# --- measuring ------------------------------------------------------------------------------------


def offers(contestant: str, workload: Workload) -> Offer:
    """Return the question for each quantity. If the setup of the tool fails, each raises that
    error.
    """
    try:
        return CONTESTANTS[contestant](*workload.build())
    except Exception as error:
        return dict.fromkeys(QUANTITIES, interleaved.complaining(error))


def measure(name: str, quantities: Sequence[str], rounds: int) -> dict[str, Any]:
    """Measure all tools on all quantities of one workload, by turns."""
    workload = WORKLOADS[name]
    step = interleaved.plain(*workload.build())
    step()
    unit = interleaved.turn(step)
    model, X, y = workload.build()
    exact = loop(model.double(), X.double(), y)
    truths = {q: interleaved.single(exact[q]()) for q in quantities}
    offered = {contestant: offers(contestant, workload) for contestant in CONTESTANTS}
    found = interleaved.contest(step, unit, offered, truths, rounds)
    return {
        "title": workload.title,
        "samples": N,
        "plain_ms": 1e3 * unit,
        "quantities": found,
    }


# --- the page -------------------------------------------------------------------------------------

HEADER = """\
# Recurrent networks, measured

<!-- Written by benchmarks/recurrent_cost.py; change that, not this. -->

What rows and squared norms of per-sample gradients, and the diagonal of the Gauss-Newton matrix,
cost for `nn.LSTM`, `nn.GRU` and `nn.RNN`, as multiples of one plain forward and backward pass on the
same batch. The loss is the mean cross entropy of five classes, read off the last state. Packed
sequences have 100 to 50 steps.

Measured on {date}, {device}, torch {torch}, {tools}; float32, one thread, process CPU time, all
contestants interleaved, medians of {rounds} rounds. Opacus runs its own layers (`DPLSTM`, `DPGRU`,
`DPRNN`) with the same weights. Each result was first compared with a loop of autograd in float64:
**wrong** means a relative error above {tolerance:g}; it is timed nevertheless. *Raises* is an
error. `python benchmarks/recurrent_cost.py --write` repeats all of it.
"""


def speeds(results: Mapping[str, Any]) -> str:
    lines: list[Sequence[object]] = [("model", "plain step", "quantity", *CONTESTANTS)]
    for name, result in results.items():
        for quantity, entries in result["quantities"].items():
            cells = [interleaved.cell(entries[c]) for c in CONTESTANTS]
            lines.append((name, f"{result['plain_ms']:.0f} ms", quantity, *cells))
    return interleaved.table(lines)


def page(data: Mapping[str, Any]) -> str:
    """`docs/benchmarks/recurrent.md`."""
    return interleaved.header(HEADER, data) + "\n" + speeds(data["results"])


def before() -> dict[str, Any]:
    """Return what was measured earlier: workloads that are not measured again stay on the page."""
    if not RESULTS.exists():
        return {}
    found: dict[str, Any] = json.loads(RESULTS.read_text())["results"]
    return found


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    made = interleaved.parser(__doc__, WORKLOADS, QUANTITIES)
    return interleaved.parsed(made, arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # the tools' own deprecations, and torch's remarks about them
    data = interleaved.facts(options.rounds, PACKAGES) | {"results": {}}
    interleaved.keep_memory()
    measured = before() if options.write else {}
    for name in options.workloads:
        measured[name] = measure(name, options.quantities, options.rounds)
        print(speeds({name: measured[name]}), flush=True)
        data["results"] = {key: measured[key] for key in WORKLOADS if key in measured}
        if options.write:
            interleaved.save(page(data), data, DOCS, RESULTS)


if __name__ == "__main__":
    main()
