"""Asking changes nothing: whatever a program does and wherever it stops, all it could change is as
it was.
"""

import random
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import unbatch as ub
from cases.function_net import D, flat
from cases.state import STATEFUL, Countdown, assert_unchanged, state, stateful_problem, usual

# ---------------------------------------------------------------- what must not change


QUESTIONS: dict[str, Callable[[ub.Problem], Any]] = {
    "structure": lambda p: str(p.structure),
    "verify": lambda p: p.verify(),
    "crosstalk": lambda p: p.crosstalk(),
    "crosstalk by probes": lambda p: p.crosstalk(probes=2),
    "gradient": lambda p: p.gradient(),
    "predictions": lambda p: p.predictions(),
    "another batch": lambda p: (p.structure, p.with_batch(p.inputs, p.targets).structure),
}


# ---------------------------------------------------------------- programs that change much


@pytest.mark.parametrize("question", QUESTIONS)
@pytest.mark.parametrize("make", STATEFUL.values(), ids=STATEFUL)
def test_asking_changes_nothing(make, question):
    """Whether it gets an answer or not: some of these programs cut their own gradients off."""
    problem = stateful_problem(make)
    before = state(problem)
    with suppress(RuntimeError):
        QUESTIONS[question](problem)
    assert_unchanged(before, state(problem))


NORMS = {
    "batch norm": lambda: nn.Sequential(nn.Linear(D, D), nn.BatchNorm1d(D)),
    "instance norm": lambda: nn.Sequential(
        nn.Unflatten(1, (1, D)),
        nn.InstanceNorm1d(1, track_running_stats=True),
        nn.Flatten(),
        nn.Linear(D, D),
    ),
}


@pytest.mark.parametrize("question", QUESTIONS)
@pytest.mark.parametrize("make", NORMS.values(), ids=NORMS)
def test_asking_in_inference_mode_changes_nothing(make, question):
    """There a norm reaches us whole, not as the op that it is made of."""
    problem = stateful_problem(make)
    before = state(problem)
    with torch.inference_mode(), suppress(RuntimeError):
        QUESTIONS[question](problem)
    assert_unchanged(before, state(problem))


def test_frozen_parameters_stay_frozen():
    problem = stateful_problem(usual)
    problem.program.model[0].weight.requires_grad_(False)
    before = state(problem)
    for ask in QUESTIONS.values():
        ask(problem)
    assert_unchanged(before, state(problem))
    assert "0.weight" not in problem.gradient()


# ---------------------------------------------------------------- programs that stop


class Failing(nn.Module):
    """Stops in the middle of a run, when it has changed this and that."""

    def __init__(self, at: int, error: type[BaseException]):
        super().__init__()
        self.model = usual()
        self.countdown = Countdown(at, error)

    def forward(self, x):
        x.mul_(2)
        h = self.model[1](self.model[0](x))
        h.add_(1)
        self.countdown.tick()
        self.late = h
        return self.model[3](self.model[2](h))


@pytest.mark.parametrize(
    "question", ["structure", "verify", "crosstalk", "gradient", "predictions"]
)
@pytest.mark.parametrize("at", [1, 2, 3, 5, 9])
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_program_that_stops_changes_nothing(error, at, question):
    problem = stateful_problem(lambda: Failing(at, error))
    before = state(problem)
    with suppress(ub.CaptureError, ValueError, KeyboardInterrupt):
        QUESTIONS[question](problem)
    if at == 1:
        assert problem.program.model.countdown.runs >= 1
    assert_unchanged(before, state(problem))


def test_interrupts_are_not_swallowed():
    for at in (1, 2, 5):
        with pytest.raises(KeyboardInterrupt):
            _ = stateful_problem(lambda at=at: Failing(at, KeyboardInterrupt)).structure


def test_interrupt_in_the_loss():
    def loss(p, y):
        p.register_hook(lambda g: g)
        raise KeyboardInterrupt

    problem = ub.Problem(usual(), loss, (flat(), flat()))
    before = state(problem)
    with pytest.raises(KeyboardInterrupt):
        problem.verify()
    assert_unchanged(before, state(problem))


def test_the_checker_sees_changes():
    """Each of these is a change that `assert_unchanged` has to report."""
    changes: dict[str, Callable[[ub.Problem], Any]] = {
        "parameter": lambda p: p.program.model[0].weight.data.mul_(1 + 1e-6),
        "running statistics": lambda p: p.program.model(p.inputs),
        "gradient": lambda p: p.program.model[0].weight.grad.add_(1),
        "gradient replaced": lambda p: setattr(
            p.program.model[0].weight, "grad", p.program.model[0].weight.grad.clone()
        ),
        "flag": lambda p: p.program.model[2].eval(),
        "requires_grad": lambda p: p.program.model[0].weight.requires_grad_(False),
        "attribute": lambda p: setattr(p.program.model[0], "new", 1),
        "hook": lambda p: p.program.model[0].register_forward_hook(print),
        "tensor hook": lambda p: p.program.model[0].weight.register_hook(print),
        "data": lambda p: p.inputs.zero_(),
        "torch": lambda p: torch.rand(1),
        "numpy": lambda p: np.random.rand(),
        "random": lambda p: random.random(),
    }
    for name, change in changes.items():
        problem = stateful_problem(usual)
        before = state(problem)
        change(problem)
        after = state(problem)
        with pytest.raises(AssertionError, match="changed"):
            missed(name, before, after)


def missed(name: str, before: dict[str, Any], after: dict[str, Any]) -> None:
    assert_unchanged(before, after)
    pytest.fail(f"missed: {name}")
