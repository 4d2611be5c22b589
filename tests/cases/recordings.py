"""A problem of a case in a mode: made afresh, or recorded once and lent to every test that only
asks.

Recording a model and judging its structure takes longer than most questions about it. `Recordings`
does both once for each case and mode. A test that was lent a problem may ask anything and change
nothing; what it was lent is looked at afterwards. A test that changes a model, or plants a bug,
makes its own with `made`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

import unbatch as ub
from cases.gradients import GradientCase

Arguments = tuple[Any, ...]  # of the reference: model, loss, inputs, targets


def made(case: GradientCase, mode: str) -> tuple[Arguments, ub.Problem]:
    """The arguments of the reference, and the problem; recorded at the random state at which the
    reference runs.
    """
    torch.manual_seed(0)
    model, loss, inputs, targets = case.build()
    model.train(mode == "train")
    torch.manual_seed(0)
    problem = ub.Problem(model, loss, (inputs, targets))
    problem.predictions()
    torch.manual_seed(0)
    return (model, loss, inputs, targets), problem


def state(arguments: Arguments) -> dict[str, Any]:
    """What a question must leave as it is: all numbers, gradients and flags, as plain data."""
    model, _, inputs, targets = arguments
    before: dict[str, Any] = {}
    for path, module in model.named_modules():
        before[f"{path} training"] = module.training
        before[f"{path} attributes"] = sorted(module.__dict__)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        before[name] = tensor.detach().clone()
        before[f"{name} gradient"] = tensor.grad
        before[f"{name} flags"] = (id(tensor), tensor.requires_grad)
    for i, leaf in enumerate(tree_leaves((inputs, targets))):
        before[f"data {i}"] = leaf.detach().clone() if isinstance(leaf, Tensor) else leaf
    return before


def changes(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """The names of what is not bitwise as it was."""
    differing = sorted(before.keys() ^ after.keys())
    for name in before.keys() & after.keys():
        if not alike(before[name], after[name]):
            differing.append(name)
    return differing


def alike(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and bool(torch.equal(a.nan_to_num(), b.nan_to_num()))
    return a is b or bool(a == b)


def check_asks_only(fixtures: Sequence[str]) -> None:
    """Raise for a test that patches the package: what is recorded under a planted bug must not be
    lent to others.
    """
    assert "monkeypatch" not in fixtures, (
        "a test with monkeypatch takes `made(case, mode)`, not `recorded`"
    )


@dataclass
class Lent:
    """A problem that tests share, and the state in which each has to leave it."""

    arguments: Arguments
    problem: ub.Problem
    state: dict[str, Any]


class Recordings:
    """Problems by case and mode. Only the last few are kept: tests of one case run one after the
    other.
    """

    KEPT = 64

    def __init__(self) -> None:
        self.lent: dict[tuple[str, str], Lent] = {}
        self.count = 0  # of recordings made

    def lend(self, case: GradientCase, mode: str) -> tuple[Arguments, ub.Problem]:
        """As `made`, at the same random state, from what was recorded before
        where there is such.
        """
        key = (case.name, mode)
        if key not in self.lent:
            self.lent[key] = self._record(case, mode)
            self.count += 1
            if len(self.lent) > self.KEPT:
                self.lent.pop(next(iter(self.lent)))
        torch.manual_seed(0)
        lent = self.lent[key]
        return lent.arguments, lent.problem

    def take_back(self, case: GradientCase, mode: str) -> None:
        """Raise where a test has changed what it was lent, which no other test is lent then."""
        key = (case.name, mode)
        lent = self.lent[key]
        changed = changes(lent.state, state(lent.arguments))
        if changed:
            del self.lent[key]
        assert not changed, (
            f"a shared problem was changed: {changed}; to change it take `made(case, mode)`"
        )

    def _record(self, case: GradientCase, mode: str) -> Lent:
        arguments, problem = made(case, mode)
        before = state(arguments)
        assert problem.structure.samples
        return Lent(arguments, problem, before)
