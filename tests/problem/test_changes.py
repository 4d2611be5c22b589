"""Whatever a program reads may change between two questions: the second is about the program as it
is then.

The spot checks are switched off where the watch is tried, and the watch where those are.
"""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

import unbatch as ub
from cases import changes
from cases.changes import CHANGES, LOSSES, SETTINGS_OF_PROCESS, D, N, squares
from unbatch.problem import spot_check


@pytest.fixture
def watch_alone(monkeypatch) -> None:
    monkeypatch.setattr(spot_check, "SHARE", 0.0)


@pytest.fixture(autouse=True)
def as_they_were() -> Iterator[None]:
    """Classes and globals of the cases are put back after each."""
    kinds = [changes.Attributed, changes.Doubling, changes.Scales, changes.SETTINGS]
    before = [dict(vars(kind)) for kind in kinds]
    table, gain = dict(changes.TABLE), changes.GAIN
    yield
    for kind, names in zip(kinds, before, strict=True):
        for name, value in names.items():
            if vars(kind)[name] is not value:
                setattr(kind, name, value)
    changes.TABLE.update(table)
    changes.GAIN = gain


def made(make: Any) -> ub.Problem:
    """A problem that has answered all questions before."""
    torch.manual_seed(0)
    model, loss = make()
    problem = ub.Problem(model, loss, (torch.randn(N, D), torch.randn(N, D)))
    answers(problem)
    return problem


def answers(problem: ub.Problem) -> list[Any]:
    """Answers to several questions, from a recording and by running the model."""
    rows = problem.gradients()
    gradient = problem.gradient()
    assert list(rows) == list(gradient)
    return [problem.predictions(), rows.flat(), *gradient.values(), problem.ggn().diag()]


def check_fresh(problem: ub.Problem) -> None:
    """Raise where an answer is another than a problem made afresh has."""
    program = problem.program
    fresh = ub.Problem(program.model, program.loss, (problem.inputs, problem.targets))
    torch.testing.assert_close(answers(problem), answers(fresh))


def change(problem: ub.Problem, name: str) -> None:
    """Do what a case is about."""
    before = answers(problem)
    CHANGES[name][1](problem.program.model)
    if name in LOSSES:
        LOSSES[name](problem.program.loss)
    program = problem.program
    fresh = ub.Problem(program.model, program.loss, (problem.inputs, problem.targets))
    now = answers(fresh)
    if len(before) == len(now) and "gradients" not in name:
        pairs = zip(before, now, strict=True)
        assert any(a.shape != b.shape or not torch.equal(a, b) for a, b in pairs), "no change"


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_is_seen_at_once(name, watch_alone):
    problem = made(CHANGES[name][0])
    change(problem, name)
    check_fresh(problem)


@pytest.mark.parametrize("name", SETTINGS_OF_PROCESS)
def test_a_setting_of_the_process_is_seen_at_once(name, watch_alone):
    make, switch, back = SETTINGS_OF_PROCESS[name]
    problem = made(make)
    before = answers(problem)
    switch()
    try:
        check_fresh(problem)
        assert not all(map(torch.equal, before, answers(problem)))
    finally:
        back()
    torch.testing.assert_close(answers(problem), before)


def test_a_change_before_any_question_about_a_gradient(watch_alone):
    """Parameters are those of the moment of the question, whichever it is."""
    for ask in ("gradient", "gradients"):
        model = nn.Sequential(nn.Linear(D, D))
        problem = ub.Problem(model, squares, (torch.randn(N, D), torch.randn(N, D)))
        assert problem.structure
        model[0] = nn.Linear(D, D)
        model.append(nn.Linear(D, D))
        out = getattr(problem, ask)()
        assert list(out) == ["0.weight", "0.bias", "1.weight", "1.bias"]
        assert all(bool(g.any()) for g in out.values())
