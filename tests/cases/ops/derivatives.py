"""Derivatives through every op of PyTorch's table, held against plain autograd in float64.

An op stands in a small net, on each sample alone, on the whole batch, and in place. What is asked:
is anything changed, do rows sum to the gradient, are they those of a loop, and do products, the
dense matrix, the diagonal and the trace agree with ``JᵀHJ`` from one backward pass for each entry.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import unbatch as ub
from cases.ops import calls
from cases.ops.apart import CRASHED, RAISED, apart
from cases.ops.calls import Sample
from cases.ops.known import LEFT_OUT
from cases.ops.table import op_table
from cases.ops.warned import quietly

RIGHT, REFUSED, WRONG, CHANGED = "right", "refused", "wrong", "changed"
SKIPPED = "no derivative"  # none, or none that is finite

STATUSES = (RIGHT, REFUSED, WRONG, CHANGED, RAISED, CRASHED, SKIPPED)

SAMPLES = 2
MOST_PARAMETERS, MOST_PREDICTIONS = 150, 120
SMALL = 30  # parameters up to which the dense matrix is asked for
CLOSE = 1e-6

FORMS = ("alone", "batch", "in place")


# --- the net --------------------------------------------------------------------------------------


class Net(nn.Module):
    """An op on tensors that depend on parameters, and on the sample.

    ``batched``: the op gets all samples, along the first axis of its tensors; else one at a time.
    """

    def __init__(self, op: Callable[..., Any], sample: Sample, batched: bool) -> None:
        super().__init__()
        self.op, self.sample, self.batched = op, sample, batched
        self.trained = []
        for i, t in enumerate(sample.tensors):
            self.register_buffer(f"t{i}", t.detach().clone())
            if t.is_floating_point():
                chance = torch.Generator().manual_seed(i)
                w = torch.randn(t.shape, generator=chance, dtype=torch.float64)
                self.register_parameter(f"w{i}", nn.Parameter(w.to(t.dtype)))
                self.trained.append(i)

    def forward(self, x: Tensor) -> Tensor:
        if self.batched:
            outs = [o for o in self.results(x) if o.ndim and o.shape[0] == len(x)]
            return torch.cat([o.reshape(len(x), -1) for o in outs], 1)
        rows = [torch.cat([o.reshape(-1) for o in self.results(one)]) for one in x]
        return torch.stack(rows)

    def results(self, x: Tensor) -> list[Tensor]:
        """Return what the op returns, as real numbers."""
        args, kwargs = self.sample.filled([self.argument(i, x) for i in self.places])
        results = []
        for t in tree_leaves(self.op(*args, **kwargs)):
            if isinstance(t, Tensor) and t.is_complex():
                t = torch.view_as_real(t.resolve_conj())
            if isinstance(t, Tensor) and t.is_floating_point() and t.layout == torch.strided:
                results.append(t)
        return results

    @property
    def places(self) -> range:
        return range(len(self.sample.tensors))

    def argument(self, i: int, x: Tensor) -> Tensor:
        """Return a tensor near to that of the table, so that an op that takes it takes this."""
        t = getattr(self, f"t{i}")
        if i not in self.trained:
            return t
        move = 0.01 * getattr(self, f"w{i}")
        if not self.batched:
            return t * (1 + move * x)
        if t.ndim and t.shape[0] == len(x):
            return t * (1 + move * x.reshape(-1, *[1] * (t.ndim - 1)))
        return t * (1 + move)


def loss(p: Tensor, y: Tensor) -> Tensor:
    return (p - y).square().sum() / len(p) / 2 + p.tanh().square().sum()


def in_place(op: Callable[..., Any]) -> Callable[..., Any]:
    """Return an op that writes, on a copy of its first argument."""

    def run(first: Tensor, *args: Any, **kwargs: Any) -> Any:
        return op(first.clone(), *args, **kwargs)

    return run


# --- the truth ------------------------------------------------------------------------------------


@dataclass
class Truth:
    """Rows of the gradient, and ``JᵀHJ``."""

    rows: Tensor
    matrix: Tensor

    @staticmethod
    def of(net: Net, x: Tensor, y: Tensor) -> Truth | None:
        """Return it by plain autograd; None where a derivative is not there, or not finite."""
        parameters = list(net.parameters())
        torch.manual_seed(0)
        p = net(x)
        (slope,) = torch.autograd.grad(loss(p, y), p, retain_graph=True)
        jacobian = []
        for entry in p.flatten():
            grads = torch.autograd.grad(entry, parameters, retain_graph=True, allow_unused=True)
            filled = []
            for g, w in zip(grads, parameters, strict=True):
                filled.append(torch.zeros_like(w) if g is None else g)
            jacobian.append(torch.cat([g.flatten() for g in filled]))
        J = torch.stack(jacobian)
        H = torch.autograd.functional.hessian(lambda z: loss(z.view_as(p), y), p.detach().flatten())
        rows = (J * slope.reshape(-1, 1)).reshape(len(p), -1, J.shape[1]).sum(1)
        truth = Truth(rows, J.T @ H @ J)
        finite = (
            p.isfinite().all() and truth.rows.isfinite().all() and truth.matrix.isfinite().all()
        )
        return truth if finite else None


# --- one trial ------------------------------------------------------------------------------------


@dataclass
class Trial:
    """The questions to one net, and what came of them."""

    net: Net
    x: Tensor
    y: Tensor
    truth: Truth
    found: list[tuple[str, str]] = field(default_factory=list)

    def run(self) -> list[tuple[str, str]]:
        self.before = {name: t.detach().clone() for name, t in self.net.state_dict().items()}
        torch.manual_seed(0)
        self.rng = torch.get_rng_state()
        self.problem = ub.Problem(self.net, loss, (self.x, self.y))
        rows, matrix = self.truth.rows, self.truth.matrix
        gradient = self.asked("gradient", self.problem.gradient)
        if gradient is not None:
            flat = torch.cat([gradient[name].flatten() for name, _ in self.net.named_parameters()])
            self.compare("gradient", flat, rows.sum(0))
        self.compare("rows", self.asked("rows", lambda: self.problem.gradients().flat()), rows)
        G = self.asked("matrix", self.problem.ggn)
        if G is not None:
            v = torch.linspace(-1, 1, len(matrix), dtype=torch.float64)
            self.compare("product", self.asked("product", lambda: G @ v), matrix @ v)
            self.compare("diagonal", self.asked("diagonal", G.diag), matrix.diagonal())
            self.compare("trace", self.asked("trace", G.trace), matrix.trace())
            if len(matrix) <= SMALL:
                self.compare("dense", self.asked("dense", G.to_dense), matrix)
        return self.found or [(RIGHT, "")]

    def asked(self, what: str, question: Callable[[], Any]) -> Any:
        """Return an answer, None where there is none; note what it changes."""
        answer = None
        try:
            answer = question()
        except ub.UnbatchError as error:
            self.found.append((REFUSED, f"{what}: {error}"))
        except Exception as error:
            self.found.append((RAISED, f"{what}: {type(error).__name__}: {error}"))
        if not torch.equal(torch.get_rng_state(), self.rng):
            self.found.append((CHANGED, f"{what}: the random state"))
            torch.set_rng_state(self.rng)
        for name, t in self.net.state_dict().items():
            if not torch.allclose(t, self.before[name], 0, 0, equal_nan=True):
                self.found.append((CHANGED, f"{what}: {name}"))
        return answer

    def compare(self, what: str, answer: Tensor | None, truth: Tensor) -> None:
        if answer is None:
            return
        size = max(float(truth.abs().max()), float(self.truth.rows.abs().max()) * 1e-3)
        error = float((answer - truth).abs().max())
        if not error <= CLOSE * size + 1e-12:
            self.found.append((WRONG, f"{what}: off by {error:.2g} of {size:.2g}"))


def judged(op: Callable[..., Any], sample: Sample, batched: bool) -> list[tuple[str, str]]:
    """Return what came of one trial: statuses, each with its reason."""
    torch.manual_seed(0)
    net = Net(op, sample, batched)
    count = SAMPLES
    if batched:
        sizes = [t.shape[0] for t in sample.tensors if t.ndim]
        count = sizes[0] if sizes else 0
    size = sum(w.numel() for w in net.parameters())
    if not 2 <= count <= 6 or not 0 < size <= MOST_PARAMETERS:
        return [(SKIPPED, "")]
    chance = torch.Generator().manual_seed(5)
    x = torch.randn(count, generator=chance, dtype=torch.float64)
    try:
        torch.manual_seed(0)
        p = net(x)
        if not p.requires_grad or not 0 < p.numel() <= MOST_PREDICTIONS:
            return [(SKIPPED, "")]
        truth = Truth.of(net, x, torch.zeros_like(p))
    except (RuntimeError, ValueError, IndexError, TypeError, AssertionError):
        return [(SKIPPED, "")]  # of a GPU alone, say
    if truth is None:
        return [(SKIPPED, "")]
    return Trial(net, x, torch.zeros_like(p.detach()), truth).run()


# --- all trials of an op --------------------------------------------------------------------------


# The version of PyTorch whose table of ops the page is of; another has other ops.
WRITTEN_UNDER = "2.13"


def names_of_ops() -> list[str]:
    """Return the ops of PyTorch's table that take float64."""
    found = []
    for name, op in op_table().items():
        if name not in LEFT_OUT and torch.float64 in op.dtypes:
            found.append(name)
    return found


def samples_of(op: Any) -> list[Sample]:
    """Return the smallest sample input, and one in the middle of those that are small enough."""
    try:
        with quietly():
            drawn = [draws[0] for draws in calls.drawn(op, torch.float64)]
    except Exception:
        return []
    fitting = [s for s in drawn if _parameters(s) <= MOST_PARAMETERS // 2]
    fitting.sort(key=_parameters)
    chosen = [s for s in fitting if _parameters(s) > 1][:1]
    return chosen + fitting[len(fitting) // 2 : len(fitting) // 2 + 1]


def _parameters(sample: Sample) -> int:
    return sum(t.numel() for t in sample.tensors if t.is_floating_point())


def trials(name: str) -> Iterator[tuple[str, Callable[..., Any], Sample, bool]]:
    """Yield the trials of an op: form, op, sample, and whether it gets the whole batch."""
    op = op_table()[name]
    samples = samples_of(op)
    for sample in samples:
        yield "alone", op.op, sample, False
        yield "batch", op.op, sample, True
    if op.inplace_variant is not None:
        for sample in samples[:1]:
            yield "in place", in_place(op.inplace_variant), sample, False


def all_judged(name: str) -> list[tuple[str, str, str]]:
    """Return form, status and reason of all trials of an op."""
    outcomes = []
    for form, op, sample, batched in trials(name):
        for status, why in judged(op, sample, batched):
            outcomes.append((form, status, why[:300]))
    return outcomes


def outcomes_of(name: str) -> list[tuple[str, str, str]]:
    """Return the same from a process of its own."""
    outcomes = apart(all_judged, name)
    if outcomes and isinstance(outcomes[0], str):
        return [("", *outcomes)]  # it ended
    return outcomes


# --- the table ------------------------------------------------------------------------------------


def line_of(name: str, outcomes: Sequence[tuple[str, str, str]]) -> str:
    """Return the line of an op in the table."""
    counts = Counter(status for _, status, _ in outcomes)
    return f"| `{name}` | {' | '.join(str(counts[s] or '') for s in STATUSES)} |"


def page(lines: Iterable[str]) -> str:
    """Return the table, with the sums of its columns."""
    lines = list(lines)
    sums = Counter[str]()
    for line in lines:
        for status, cell in zip(STATUSES, line.split("|")[2:], strict=False):
            sums[status] += int(cell.strip() or 0)
    head = f"| op | {' | '.join(STATUSES)} |"
    total = f"| all | {' | '.join(str(sums[s]) for s in STATUSES)} |"
    return "\n".join([HEAD, head, "|---" * (1 + len(STATUSES)) + "|", total, *lines]) + "\n"


HEAD = """# Derivatives through the ops of PyTorch's table

Each op stands in a small net: on each sample alone, on the whole batch, and in place. The net is
asked for its gradient, its rows, and a product, the diagonal, the trace and (if small) the entries
of its Gauss-Newton matrix. *Right*: nothing is changed, rows sum to the gradient and are those of a
loop, and all of the matrix is that of plain autograd, in float64. *No derivative*: none by plain
autograd, none that is finite, or a net that is too large. Numbers count trials, or the answers of a
trial that are not right.

`python tests/gradients/op_derivatives.py` writes this page.
"""
