"""The changes of the third and the fourth hunt: an answer is about program and data as they are."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import unbatch as ub
from cases.changes import D, N, squares
from cases.hunt import fifth_changes as fifth
from cases.hunt import fourth_changes as fourth
from cases.hunt import kinds_of_place
from cases.hunt import third_changes as third
from cases.hunt.changes import CHANGES
from cases.hunt.known import WRONG_TODAY
from unbatch.errors import UnbatchError
from unbatch.problem import spot_check

PROGRAMS = {**third.CHANGES, **kinds_of_place.CHANGES, **fourth.CHANGES}
OF_LOSSES = {**third.LOSSES, **fourth.LOSSES}
OF_DATA = {**third.OF_DATA, **fourth.OF_DATA}


@pytest.fixture(autouse=True)
def as_they_were(monkeypatch) -> Iterator[None]:
    """The watch is alone, and what cases share is put back."""
    monkeypatch.setattr(spot_check, "SHARE", 0.0)
    yield
    put_back()


def put_back() -> None:
    while third.UNDO:
        third.UNDO.pop()()


def answers(problem: ub.Problem) -> list[Any]:
    torch.manual_seed(2)
    return [problem.predictions(), problem.gradients().flat(), *problem.gradient().values()]


def equal(a: list[Any], b: list[Any], close: Callable[..., bool]) -> bool:
    return len(a) == len(b) and all(map(close, a, b))


def outcome(
    model: Any, loss: Any, data: Any, changes: list[Callable[[], Any]], **options: Any
) -> str:
    """Say whether the answers after each change are right, stale, refused, or an error."""
    problem = ub.Problem(model, loss, data, **options)
    try:
        before = answers(problem)
        for change in changes:
            change()
            now = answers(ub.Problem(model, loss, data, **options))
            assert not equal(before, now, torch.equal), "no change"
            if not equal(answers(problem), now, torch.allclose):
                return "stale"
            before = now
    except UnbatchError as error:
        # No program of the tables raises anything.
        return "blamed" if "raised" in str(error) else "refused"
    except AssertionError:
        raise
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "right"


def of_model(name: str) -> str:
    torch.manual_seed(0)
    make, change = PROGRAMS[name]
    model, loss = make()
    of_loss = OF_LOSSES.get(name, lambda loss: None)
    data = torch.randn(N, D), torch.randn(N, D)
    return outcome(model, loss, data, [lambda: (change(model), of_loss(loss))])


def of_two(name: str) -> str:
    torch.manual_seed(0)
    make, first, second = third.TWICE[name]
    model, loss = make()
    data = torch.randn(N, D), torch.randn(N, D)
    return outcome(model, loss, data, [lambda: first(model), lambda: second(model)])


def of_data(name: str) -> str:
    torch.manual_seed(0)
    make, make_data, change = OF_DATA[name]
    beside = fourth.BESIDE.get(name, lambda model: None)
    model, loss = make()
    data = make_data()
    changes = [lambda: (change(*data), beside(model))]
    return outcome(model, loss, data, changes, in_dims=third.in_dims(data))


def of_function(name: str) -> str:
    torch.manual_seed(0)
    function, change = third.FUNCTIONS[name]
    parameters = {"w": third.matrix()}
    data = torch.randn(N, D), torch.randn(N, D)
    changes = [lambda: change(parameters)]
    return outcome(function, squares, data, changes, parameters=parameters)


def of_checked(name: str) -> str:
    torch.manual_seed(0)
    make, make_data, change = third.CHECKED[name]
    model, loss = make()
    data = make_data()
    return outcome(model, loss, data, [lambda: change(model, *data)])


def of_batches(name: str) -> str:
    torch.manual_seed(0)
    make, first, second = fourth.BATCHES[name]
    model, loss = make()
    x, other, y = first(), second(), torch.randn(N, D)
    try:
        problem = ub.Problem(model, loss, (x, y))
        answers(problem)
        now = answers(ub.Problem(model, loss, (other, y)))
        moved = answers(problem.with_batch(other, y))
    except UnbatchError:
        return "refused"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "right" if equal(moved, now, close) else "stale"


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Compare but for the order in which numbers are added up."""
    return a.shape == b.shape and torch.allclose(a, b, atol=1e-5)


CASES = {
    **dict.fromkeys(PROGRAMS, of_model),
    **dict.fromkeys(fourth.BATCHES, of_batches),
    **dict.fromkeys(third.TWICE, of_two),
    **dict.fromkeys(OF_DATA, of_data),
    **dict.fromkeys(third.FUNCTIONS, of_function),
}


@pytest.mark.filterwarnings("ignore:Sparse CS. tensor support is in beta:UserWarning")
@pytest.mark.parametrize("name", CASES)
def test_a_change_is_seen(name):
    result = CASES[name](name)
    wrong = result not in ("right", "refused")
    assert wrong == (f"change: {name}" in WRONG_TODAY), result


@pytest.mark.parametrize("name", third.CHECKED)
def test_a_change_is_seen_with_checks(name, monkeypatch):
    monkeypatch.setattr(spot_check, "SHARE", 1e9)  # as after a pause
    wrong = of_checked(name) not in ("right", "refused")
    assert wrong == (f"change: {name}" in WRONG_TODAY)


def test_what_is_listed_as_wrong_exists():
    tables = [*CHANGES, *CASES, *third.CHECKED, *fifth.CHANGES]
    known = {f"change: {name}" for name in tables}
    listed = {name for name in WRONG_TODAY if name.startswith("change: ")}
    assert known >= listed, listed - known
