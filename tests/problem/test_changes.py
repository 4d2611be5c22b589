"""Whatever a program reads may change between two questions: the second is about the program as it
is then.

The spot checks are switched off where the watch is tried, and the watch where those are.
"""

import socket
from collections.abc import Iterator
from itertools import count
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import unbatch as ub
from cases import changes
from cases.changes import CHANGES, LOSSES, SETTINGS_OF_PROCESS, D, N, Net, squares
from unbatch.capture import guards, holders, program, reachable
from unbatch.problem import session, spot_check
from unbatch.problem.spot_check import SpotChecks


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


# --- many batches ---------------------------------------------------------------------------------


def test_a_problem_that_was_asked_nothing_records_its_batches_once(monkeypatch):
    """Each batch begins at the problem itself, and what one records serves the next."""
    recorded: list[int] = []
    record = program.record
    monkeypatch.setattr(program, "record", lambda *args: recorded.append(1) or record(*args))
    model = nn.Linear(D, D)
    problem = ub.Problem(model, squares, (torch.randn(N, D), torch.randn(N, D)))
    for _ in range(3):
        answers(problem.with_batch(torch.randn(N, D), torch.randn(N, D)))
    assert len(recorded) == 1
    model.register_forward_hook(lambda module, inputs, output: 2 * output)
    for _ in range(3):
        check_fresh(problem.with_batch(torch.randn(N, D), torch.randn(N, D)))
    answers(problem)
    # Twice by the program, and by the fresh problem of each comparison.
    assert len(recorded) == 2 + 3


def test_a_training_loop_judges_its_batches_once(monkeypatch):
    """Also after the first step, where running statistics are no zeros and ones any more."""
    judged: list[int] = []
    analyse = session.analyse
    monkeypatch.setattr(session, "analyse", lambda *args: judged.append(1) or analyse(*args))
    model = nn.Sequential(nn.Linear(D, D), nn.BatchNorm1d(D), nn.Linear(D, D))
    problem = ub.Problem(model, squares, (torch.randn(N, D), torch.randn(N, D)))
    assert problem.gradients()
    for _ in range(4):
        model(torch.randn(N, D))
        assert problem.with_batch(torch.randn(N, D), torch.randn(N, D)).gradients()
    assert len(judged) == 1


# --- the spot checks ------------------------------------------------------------------------------


def hidden(net: Net, x: Tensor) -> Tensor:
    """Read what no walk of objects reaches."""
    return net.linear(x) * HIDDEN.get()


# A number that a library of C keeps.
HIDDEN = SimpleNamespace(
    get=lambda: socket.getdefaulttimeout() or 1.0, set=socket.setdefaulttimeout
)


def hidden_problem(**options: Any) -> ub.Problem:
    """A problem that has been asked nothing yet, with spot checks of its own."""
    torch.manual_seed(0)
    data = (torch.randn(N, D), torch.randn(N, D))
    problem = ub.Problem(Net(hidden), squares, data)
    problem._checks = SpotChecks(**options)
    return problem


@pytest.fixture
def unhide() -> Iterator[None]:
    yield
    HIDDEN.set(None)


def test_what_nobody_watches_is_seen_at_the_next_question(unhide):
    """After a pause, of which a check takes a small share."""
    now = count()
    problem = hidden_problem(clock=lambda: 100.0 * next(now), share=1.0)
    answers(problem)
    for scale in (3.0, 5.0):
        HIDDEN.set(scale)
        check_fresh(problem)


def test_what_nobody_watches_is_seen_at_other_numbers(unhide):
    problem = hidden_problem(share=1e9)
    answers(problem)
    HIDDEN.set(3.0)
    with torch.no_grad():
        problem.program.model.linear.weight.mul_(2)
    check_fresh(problem)


@pytest.mark.parametrize("asked", range(1, spot_check.FIRST + 1))
def test_the_first_uses_of_a_recording_are_checked_whatever_the_time(unhide, asked):
    problem = hidden_problem(clock=lambda: 0.0)
    for _ in range(asked):
        assert problem.structure
    HIDDEN.set(3.0)
    check_fresh(problem)


def test_without_spot_checks_it_is_not_seen(unhide):
    problem = hidden_problem(share=0.0)
    answers(problem)
    HIDDEN.set(3.0)
    with pytest.raises(AssertionError):
        check_fresh(problem)


def test_checks_take_their_share_of_the_time():
    """A loop of questions that take a second each, with checks of half a second."""
    time = [0.0]
    checks = SpotChecks(share=0.02, clock=lambda: time[0])
    checks.begin()
    made = 0
    for _ in range(1000):
        time[0] += 1.0
        if checks.are_due():
            checks.spent += 0.5
            checks.count += 1
            made += 1
            time[0] += 0.5
    assert 30 <= made <= 45


def test_a_program_that_never_repeats_itself_is_checked_a_few_times(unhide):
    def run(net, x):
        HIDDEN.set(HIDDEN.get() + 1)
        return net.linear(x) * HIDDEN.get()

    problem = ub.Problem(Net(run), squares, (torch.randn(N, D), torch.randn(N, D)))
    for _ in range(10):
        problem.predictions()
    assert problem._checks.failures == spot_check.MOST_FAILURES
    assert not problem._checks.are_due()


# --- planted --------------------------------------------------------------------------------------

FORGOTTEN = {
    "dicts": (holders.Entries, "entry nine of a dict"),
    "lists": (holders.Items, "a list appended to"),
    "attributes": (holders.Attributes, "an attribute of a dataclass"),
    "names": (holders.Names, "an attribute of a Python module"),
    "members": (holders.Members, "an attribute of a class"),
    "arrays": (holders.Array, "an array of numpy"),
    "hooks that were none": (holders.Empty, "a hook"),
    "classes": (holders.Classes, "the class of a module"),
}


@pytest.mark.parametrize("kind", FORGOTTEN)
def test_a_kind_of_place_that_is_forgotten_is_caught(kind, watch_alone, monkeypatch):
    holder, name = FORGOTTEN[kind]
    monkeypatch.setattr(holder, "same", lambda self, mark: True)
    monkeypatch.setattr(holder, "changed", lambda self, mark: iter(()))
    with pytest.raises((AssertionError, ub.UnbatchError)):
        test_a_change_is_seen_at_once(name, None)


def test_settings_that_are_forgotten_are_caught(watch_alone, monkeypatch):
    monkeypatch.setattr(guards, "settings", tuple)
    with pytest.raises(AssertionError):
        test_a_setting_of_the_process_is_seen_at_once("determinism", None)


def test_objects_of_libraries_that_are_not_read_are_caught(watch_alone, monkeypatch):
    monkeypatch.setattr(reachable._Walk, "reads_all", lambda self, kind: False)
    with pytest.raises(AssertionError):
        test_a_change_is_seen_at_once("the dilation of a layer", None)


def test_a_selection_before_the_program_is_refreshed_is_caught(monkeypatch):
    monkeypatch.setattr(ub.Problem, "_refreshed", lambda self: self.program)
    with pytest.raises((AssertionError, ub.UnregisteredParameterWarning)):
        test_a_change_before_any_question_about_a_gradient(None)
