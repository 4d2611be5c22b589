"""`nn.RNN`, `nn.LSTM` and `nn.GRU` with all their options, against loops of plain autograd.

A case is a model of sequences [N, T, D] in float64 and the loss is cross entropy; what is asked are
rows, squared norms, and the diagonal and products of the Gauss-Newton matrix.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import unbatch as ub

N, T, D, H, C = 5, 4, 3, 4, 3
LENGTHS = torch.tensor([4, 1, 3, 4, 2])

KINDS: dict[str, Callable[..., nn.Module]] = {
    "RNN": nn.RNN,
    "RNN with relu": partial(nn.RNN, nonlinearity="relu"),
    "LSTM": nn.LSTM,
    "GRU": nn.GRU,
}
OPTIONS: dict[str, dict[str, Any]] = {
    "": {},
    "time first": {"batch_first": False},
    "no bias": {"bias": False},
    "both ways": {"bidirectional": True},
    "two layers": {"num_layers": 2},
    "two layers both ways, no bias": {"num_layers": 2, "bidirectional": True, "bias": False},
    "two layers with dropout": {"num_layers": 2, "dropout": 0.4},
    "projected": {"proj_size": 2},
    "projected, no bias, two layers both ways": {
        "proj_size": 2,
        "num_layers": 2,
        "bidirectional": True,
        "bias": False,
    },
}
CASES = {}
for _kind, _option in itertools.product(KINDS, OPTIONS):
    if _kind == "LSTM" or "proj_size" not in OPTIONS[_option]:
        CASES[f"{_kind}, {_option}".strip(", ")] = _kind, OPTIONS[_option]


class Net(nn.Module):
    """A recurrence between two linear layers; ``form`` says what goes in, and what is read."""

    def __init__(self, make: Callable[..., nn.Module], form: str, **options: Any) -> None:
        super().__init__()
        options = {"batch_first": True, **options}
        self.form, self.time_first = form, not options["batch_first"]
        self.inner = nn.Linear(D, D)
        self.rnn = make(D, H, **options)
        sides = 1 + options.get("bidirectional", False)
        self.out = nn.Linear(sides * (options.get("proj_size") or H), C)
        # Learned, and of other sizes where it is the cell that they start.
        self.first = nn.ParameterList(
            nn.Parameter(torch.randn(sides * options.get("num_layers", 1), 1, width) / 2)
            for width in (options.get("proj_size") or H, H)[: 1 + (make is nn.LSTM)]
        )

    def forward(self, x: Tensor) -> Tensor:
        h = self.inner(x)
        if self.time_first:
            h = h.transpose(0, 1)
        return self.out(getattr(self, self.form)(h))

    def whole(self, h: Tensor) -> Tensor:
        """Outputs of all steps."""
        y = self.rnn(h)[0]
        return y.mean(0 if self.time_first else 1)

    def last(self, h: Tensor) -> Tensor:
        """Last states, from learned first ones."""
        first = [p.expand(-1, N, -1).contiguous() for p in self.first]
        _, states = self.rnn(h, tuple(first) if len(first) == 2 else first[0])
        if len(first) == 2:
            states = states[0]
        # Of the last layer, both directions.
        sides = 1 + self.rnn.bidirectional
        return states[-sides:].transpose(0, 1).flatten(1)

    def packed(self, h: Tensor) -> Tensor:
        rows = pack_padded_sequence(h, LENGTHS, not self.time_first, enforce_sorted=False)
        y = pad_packed_sequence(self.rnn(rows)[0], batch_first=not self.time_first)[0]
        return y.sum(0 if self.time_first else 1)

    def sorted(self, h: Tensor) -> Tensor:
        lengths = LENGTHS.sort(descending=True).values
        rows = pack_padded_sequence(h, lengths, batch_first=not self.time_first)
        states = self.rnn(rows)[1]
        if isinstance(states, tuple):
            states = states[0] + states[1].sum(-1, keepdim=True)
        sides = 1 + self.rnn.bidirectional
        return states[-sides:].transpose(0, 1).flatten(1)


FORMS = ("whole", "last", "packed", "sorted")


def made(name: str, form: str, dtype: torch.dtype = torch.float64) -> tuple[Net, Tensor, Tensor]:
    torch.manual_seed(0)
    kind, options = CASES[name]
    net = Net(KINDS[kind], form, **options).to(dtype)
    return net, torch.randn(N, T, D, dtype=dtype), torch.arange(N) % C


def rows_by_autograd(
    net: nn.Module, X: Tensor, y: Tensor, cotangents: Callable[[Tensor], Tensor]
) -> dict[str, Tensor]:
    """Return ``Jᵀ`` of cotangents [N, C], sample by sample."""
    torch.manual_seed(1)
    predictions, parameters = net(X), dict(net.named_parameters())
    of_predictions = cotangents(predictions.detach())
    rows: dict[str, list[Tensor]] = {name: [] for name in parameters}
    for n in range(N):
        alone = torch.zeros_like(predictions)
        alone[n] = of_predictions[n]
        grads = torch.autograd.grad(
            predictions, list(parameters.values()), alone, retain_graph=True, allow_unused=True
        )
        for (name, parameter), grad in zip(parameters.items(), grads, strict=True):
            rows[name].append(torch.zeros_like(parameter) if grad is None else grad)
    return {name: torch.stack(of_parameter) for name, of_parameter in rows.items()}


def slope(y: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda p: (p.softmax(1) - F.one_hot(y, C)) / N


def root(column: int) -> Callable[[Tensor], Tensor]:
    """A column of a root of the Hessian: ``(diag(q) − qqᵀ) = Σ_c q_c (e_c − q)(e_c − q)ᵀ``."""

    def cotangents(p: Tensor) -> Tensor:
        q = p.softmax(1)
        unit = F.one_hot(torch.tensor(column), C)
        return (q[:, column, None] / N).sqrt() * (unit - q)

    return cotangents


def problem(net: nn.Module, X: Tensor, y: Tensor) -> ub.Problem:
    torch.manual_seed(1)
    return ub.Problem(net, F.cross_entropy, (X, y))


def close(a: Tensor, b: Tensor, bound: float = 1e-10) -> bool:
    return float((a - b).abs().max()) <= bound * max(1.0, float(b.abs().max()))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", CASES)
def test_all_is_what_autograd_says(name: str, form: str) -> None:
    net, X, y = made(name, form)
    rows = rows_by_autograd(net, X, y, slope(y))
    asked = problem(net, X, y)  # with the same noise, which is recorded
    answer, norms = asked.gradients(), asked.compute(ub.SquaredNorms())
    G = asked.ggn()
    diagonal = G.diag()
    columns = [rows_by_autograd(net, X, y, root(c)) for c in range(C)]
    v = {n: torch.randn_like(p) for n, p in net.named_parameters()}
    product = G @ v
    dots = [sum((column[n] * v[n]).flatten(1).sum(1) for n in v) for column in columns]
    at = 0
    for n, expected in rows.items():
        assert close(answer[n], expected), n
        assert close(norms[n], expected.flatten(1).square().sum(1)), n
        exact = sum(column[n].square().sum(0) for column in columns)
        assert close(diagonal[at : at + exact.numel()], exact.flatten()), n
        exact = sum(
            torch.einsum("n,n...->...", d, column[n])
            for d, column in zip(dots, columns, strict=True)
        )
        assert close(product[n], exact), n
        at += v[n].numel()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", CASES)
def test_weights_are_contracted_and_not_pulled_back(
    name: str, form: str, dtype: torch.dtype
) -> None:
    net, X, y = made(name, form, dtype)
    plan = problem(net, X, y).plan(ub.SquaredNorms())
    assert {site.kind for site in plan.sites} == {"linear", "shift"}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", CASES)
def test_single_precision(name: str, form: str, training: bool) -> None:
    net, X, y = made(name, form, torch.float32)
    net.train(training)
    if training and net.rnn.dropout:
        pytest.skip("other noise in float64")
    answer = problem(net, X, y).gradients()
    rows = rows_by_autograd(net.double(), X.double(), y, slope(y))
    for n, expected in rows.items():
        assert close(answer[n].double(), expected, 1e-5), n


def test_weights_by_dtype_that_are_not_taken_apart_are_right() -> None:
    net, X, y = made("LSTM, two layers", "whole", torch.bfloat16)
    answer = problem(net, X, y).gradients()
    rows = rows_by_autograd(net.double(), X.double(), y, slope(y))
    for n, expected in rows.items():
        assert close(answer[n].double(), expected, 0.1), n
