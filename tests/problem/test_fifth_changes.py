"""The changes of the fifth hunt, on batches of several sizes, and acts that change nothing."""

import random
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import unbatch as ub
from cases.changes import D, N, squares
from cases.hunt import fifth_changes as fifth
from cases.hunt.known import WRONG_TODAY
from unbatch.capture import holders
from unbatch.errors import StaleError
from unbatch.problem import problem as problems
from unbatch.problem import spot_check

SIZES = (N, N + 3, N)


@pytest.fixture(autouse=True)
def alone(monkeypatch) -> Iterator[None]:
    """The watch is alone, and draws of Python are as they were."""
    monkeypatch.setattr(spot_check, "SHARE", 0.0)
    state = random.getstate()
    yield
    random.setstate(state)


def vector(problem: ub.Problem) -> torch.Tensor:
    return torch.linspace(-1, 1, problem.gradients().flat().shape[1])


def answers(problem: ub.Problem) -> list[Any]:
    flat = torch.cat([g.flatten() for g in problem.gradient().values()])
    G = problem.ggn()
    return [problem.predictions(), problem.gradients().flat(), flat, G @ vector(problem)]


def close(a: list[Any], b: list[Any]) -> bool:
    pairs = list(zip(a, b, strict=True))
    return all(x.shape == y.shape and torch.allclose(x, y, atol=1e-5) for x, y in pairs)


def product(G: Any, v: torch.Tensor) -> Any:
    """Return a product with a matrix from before; None where it says that it is stale."""
    try:
        return G @ v
    except StaleError:
        return None


def is_fresh(name: str) -> bool:
    """Tell whether all answers after a change are those of a problem made afresh."""
    make, change = fifth.CHANGES[name]
    torch.manual_seed(0)
    model, loss = make()
    batches = [(torch.randn(n, D), torch.randn(n, D)) for n in SIZES]
    first = ub.Problem(model, loss, batches[0])
    kept = [first, *[first.with_batch(*batch) for batch in batches[1:]]]
    before = [answers(problem) for problem in kept]
    matrices, v = [problem.ggn() for problem in kept], vector(first)
    for G in matrices:
        G @ v
    change(model)
    products = [product(G, v) for G in matrices]
    now = [answers(ub.Problem(model, loss, batch)) for batch in batches]
    assert not all(map(close, before, now)), "no change"
    for p, fresh in zip(products, now, strict=True):
        if p is not None and not close([p], fresh[-1:]):
            return False
    return all(close(answers(problem), fresh) for problem, fresh in zip(kept, now, strict=True))


@pytest.mark.parametrize("name", fifth.CHANGES)
def test_a_change_is_seen(name):
    assert is_fresh(name) != (f"change: {name}" in WRONG_TODAY), (
        "take it out of WRONG_TODAY, or put it in"
    )


@pytest.mark.parametrize("name", fifth.UNRELATED)
def test_what_changes_nothing_makes_nothing_stale(name):
    make, act = fifth.UNRELATED[name]
    torch.manual_seed(0)
    model, loss = make()
    problem = ub.Problem(model, loss, (torch.randn(N, D), torch.randn(N, D)))
    before, G = answers(problem), problem.ggn()
    v = vector(problem)
    G @ v
    session = problem._recorded()
    act(model)
    assert torch.allclose(G @ v, before[-1])
    assert close(answers(problem), before)
    assert problem._recorded().recording.graph is session.recording.graph


@pytest.mark.parametrize("name", fifth.MESSY)
def test_a_question_leaves_no_trace(name):
    make, keeps = fifth.MESSY[name]
    torch.manual_seed(0)
    model = make()
    problem = ub.Problem(model, squares, (torch.randn(N, D), torch.randn(N, D)))
    before = keeps(model)
    rows, gradient = problem.gradients(), problem.gradient()
    problem.verify()
    assert keeps(model) == before
    for key, g in gradient.items():
        assert torch.allclose(rows[key].sum(0), g, atol=1e-5)


def test_the_first_name_leaves_draws_of_python_alone():
    program = "import random, unbatch; s = random.getstate(); unbatch.Problem; "
    program += "assert random.getstate() == s; dir(unbatch); unbatch.plot"
    subprocess.run([sys.executable, "-c", program], check=True)


# --- planted --------------------------------------------------------------------------------------


def test_hooks_that_are_not_looked_into_are_caught(monkeypatch):
    monkeypatch.setattr(holders.Hooks, "tables", staticmethod(lambda tensor: (None, None)))
    assert not is_fresh("a hook of a parameter starts to scale")


def test_a_recording_that_is_moved_unseen_is_caught(monkeypatch):
    monkeypatch.setattr(problems, "may_be_moved", lambda session: True)
    assert not is_fresh("a hook of a value gets a mask")
