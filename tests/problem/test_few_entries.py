"""A few entries of a large tensor, written by way of its data, where no version tells of it."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import unbatch as ub
from unbatch.capture import guards
from unbatch.problem import spot_check

MANY, D = 5000, 3


@pytest.fixture(autouse=True)
def alone(monkeypatch) -> None:
    """Nothing is held against the model."""
    monkeypatch.setattr(spot_check, "SHARE", 0.0)


class Net(nn.Module):
    def __init__(self, run: Callable[[Any, Tensor], Tensor], table: Tensor) -> None:
        super().__init__()
        self.linear, self.run = nn.Linear(D, D), run
        self.register_buffer("table", table)

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


def squares(output: Tensor, target: Tensor) -> Tensor:
    return (output - target).square().sum()


def branches(net: Any, x: Tensor) -> Tensor:
    h = net.linear(x)
    return 2 * h if net.table[4321] > 0 else h


def counts(net: Any, x: Tensor) -> Tensor:
    return net.linear(x) * float((net.table > 0).sum())


def selects(net: Any, x: Tensor) -> Tensor:
    return net.linear(x) + net.table[net.table > 0].sum()


def looks_up(net: Any, x: Tensor) -> Tensor:
    return net.linear(x) + net.table[3333]


def one(table: Tensor) -> None:
    table.data[4321] = 1.0


def permutation() -> Tensor:
    return torch.eye(100)[torch.randperm(100)]


def by_permutation(net: Any, x: Tensor) -> Tensor:
    return net.linear(x) + (net.table @ torch.arange(100.0))[:D]


def swapped(table: Tensor) -> None:
    table.data[[0, 57]] = table.data[[57, 0]]


CASES: dict[str, tuple[Callable[..., Tensor], Callable[[], Tensor], Callable[[Tensor], None]]] = {
    "a branch by an entry": (branches, lambda: torch.zeros(MANY), one),
    "a count that Python reads": (counts, lambda: torch.zeros(MANY), one),
    "a size that entries decide": (selects, lambda: torch.zeros(MANY), one),
    "an entry that is added": (
        looks_up,
        lambda: torch.arange(1.0 * MANY),
        lambda t: t.data[3333].zero_(),
    ),
    "rows of a permutation": (by_permutation, permutation, swapped),
    "bits of another sign": (looks_up, lambda: torch.ones(MANY), lambda t: t.data[3333].neg_()),
    "an entry of whole numbers": (
        looks_up,
        lambda: torch.zeros(MANY, dtype=torch.int16),
        lambda t: t.data[3333].fill_(7),
    ),
    "an entry of complex numbers": (
        lambda net, x: net.linear(x) + net.table[3333].imag,
        lambda: torch.zeros(MANY, dtype=torch.complex64),
        lambda t: t.data[3333].fill_(7j),
    ),
    "an entry of a transposed table": (
        lambda net, x: net.linear(x) + net.table[33, 33],
        lambda: torch.zeros(70, 80).T,
        lambda t: t.data[33, 33].fill_(7),
    ),
}


def answers(problem: ub.Problem) -> list[Tensor]:
    return [problem.predictions(), problem.gradients().flat(), *problem.gradient().values()]


def is_up_to_date(name: str) -> bool:
    torch.manual_seed(0)
    run, make, change = CASES[name]
    net, data = Net(run, make()), (torch.randn(4, D), torch.randn(4, D))
    problem = ub.Problem(net, squares, data)
    before = answers(problem)
    change(net.table)
    now, fresh = answers(problem), answers(ub.Problem(net, squares, data))
    assert any(not torch.equal(a, b) for a, b in zip(before, fresh, strict=True)), "no change"
    return all(map(torch.allclose, now, fresh))


@pytest.mark.parametrize("name", CASES)
def test_answers_are_about_every_entry(name):
    assert is_up_to_date(name)


@pytest.mark.parametrize("name", ["a branch by an entry", "rows of a permutation"])
def test_contents_that_are_not_looked_at_are_caught(name, monkeypatch):
    monkeypatch.setattr(guards.Guard, "contents", lambda self, data=(): b"")
    assert not is_up_to_date(name)


def test_a_verdict_that_rests_on_an_entry():
    """Samples that stay in their places, until two of them are exchanged."""
    net = Net(lambda net, x: net.linear(x)[net.table], torch.arange(MANY))
    problem = ub.Problem(net, squares, (torch.randn(MANY, D), torch.randn(MANY, D)))
    assert problem.structure.independent_forward
    net.table.data[[10, 4321]] = net.table.data[[4321, 10]]
    assert not problem.structure.independent_forward
    net.table.data[[10, 4321]] = net.table.data[[4321, 10]]
    assert problem.structure.independent_forward


@pytest.mark.parametrize("dtype", [torch.bool, torch.int8, torch.bfloat16, torch.float64])
def test_any_entry_changes_the_sums(dtype):
    for size in (MANY, 2 * guards.ROWS * guards.COLUMNS + 17):
        table = torch.zeros(size, dtype=dtype)
        before = guards._weighted_sums(table)
        for i in (0, 1, guards.COLUMNS, size - 1):
            changed = table.clone()
            changed[i] = 1
            assert not torch.equal(guards._weighted_sums(changed), before)
