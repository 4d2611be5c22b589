"""The messy programs of the third hunt, and of the fourth: a question leaves no trace of them."""

import gc
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

import unbatch as ub
from cases.changes import D, N, squares
from cases.hunt import fourth_messy as fourth
from cases.hunt import fourth_settings, kinds_of_place, third_settings
from cases.hunt import third_messy as third
from cases.hunt.known import WRONG_TODAY
from cases.hunt.messy import MESSY
from cases.hunt.third_changes import in_dims
from unbatch.errors import UnbatchError

PROGRAMS = {**third.MESSY, **kinds_of_place.MESSY, **fourth.MESSY}
OF_LOSS = {**third.OF_LOSS, **fourth.OF_LOSS}


@pytest.fixture(autouse=True)
def as_they_were() -> Iterator[None]:
    """What cases share is put back."""
    yield
    put_back()


def put_back() -> None:
    while third.UNDO:
        third.UNDO.pop()()
    third.COUNTS.update(calls=0, made=0)
    fourth.COUNTS.update(calls=0)
    fourth_settings.CALLS = 0
    third.MADE.clear()
    kinds_of_place.MADE.clear()
    kinds_of_place.Noisy.looks = 0
    third.Tracked.calls = third_settings.CALLS = 0
    vars(third).pop("__warningregistry__", None)


def ask(problem: ub.Problem) -> list[Any]:
    assert problem.structure.samples == N
    return [problem.predictions(), problem.gradients().flat(), *problem.gradient().values()]


def outcome(problem: ub.Problem, keeps: Callable[[], Any]) -> str:
    """Say whether a question left all as it was, was refused, left a trace, or failed."""
    before, result = keeps(), "right"
    try:
        ask(problem)
    except UnbatchError as error:
        # No program of the tables raises anything.
        result = f"blamed: {error}" if "raised" in str(error) else "refused"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    after = keeps()
    if after != before:
        return f"trace: {before} {after}"
    return result


def of_model(name: str) -> str:
    make, keeps = PROGRAMS[name]
    torch.manual_seed(0)
    model = make()
    problem = ub.Problem(model, squares, (torch.randn(N, D), torch.randn(N, D)))
    return outcome(problem, lambda: keeps(model))


def of_data(name: str) -> str:
    make, loss, make_data, keeps = third.OF_DATA[name]
    torch.manual_seed(0)
    model, data = make(), make_data()
    try:
        problem = ub.Problem(model, loss, data, in_dims=in_dims(data))
    except ub.InputError:
        return "refused"
    return outcome(problem, lambda: keeps(*data))


def of_loss(name: str) -> str:
    make, keeps = OF_LOSS[name]
    torch.manual_seed(0)
    loss, model, data = make(), nn.Linear(D, D), (torch.randn(N, D), torch.randn(N, D))
    problem = ub.Problem(model, loss, data)
    before = keeps(loss), [t.tolist() for t in data]
    result = outcome(problem, lambda: (keeps(loss), [t.tolist() for t in data]))
    if result != "right":
        return result
    problem.ggn().diag()
    after = keeps(loss), [t.tolist() for t in data]
    return "right" if after == before else f"trace of the matrix: {before} {after}"


def of_verified(name: str) -> str:
    make, keeps = fourth.VERIFIED[name]
    torch.manual_seed(0)
    model = make()
    problem = ub.Problem(model, squares, (torch.randn(N, D), torch.randn(N, D)))
    before = keeps(model)
    problem.verify()
    del problem
    gc.collect()
    after = keeps(model)
    return "right" if after == before else f"trace: {before} {after}"


def of_rows(name: str) -> str:
    torch.manual_seed(0)
    problem = ub.Problem(fourth.ROWS[name](), squares, (torch.randn(N, D), torch.randn(N, D)))
    try:
        rows, gradient = problem.gradients(), problem.gradient()
    except UnbatchError:
        return "refused"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    sums = {key: rows[key].sum(0) for key in gradient}
    right = [torch.allclose(sums[key], gradient[key], atol=1e-5) for key in gradient]
    return "right" if all(right) else "wrong rows"


CASES = {
    **dict.fromkeys(PROGRAMS, of_model),
    **dict.fromkeys(fourth.ROWS, of_rows),
    **dict.fromkeys(fourth.VERIFIED, of_verified),
    **dict.fromkeys(third.OF_DATA, of_data),
    **dict.fromkeys(OF_LOSS, of_loss),
}


@pytest.mark.filterwarnings(
    "ignore:this layer is old",
    "ignore:Full backward hook is firing",
    "ignore:Sparse CSR tensor support",
    "ignore:.* take part without being parameters",
    "ignore:torch.quantize_per_tensor",
)
@pytest.mark.parametrize("name", CASES)
def test_a_question_leaves_no_trace(name):
    result = CASES[name](name)
    wrong = result not in ("right", "refused")
    assert wrong == (f"messy: {name}" in WRONG_TODAY), result


def test_what_is_listed_as_wrong_exists():
    known = {f"messy: {name}" for name in [*MESSY, *CASES]}
    listed = {name for name in WRONG_TODAY if name.startswith("messy: ")}
    assert known >= listed, listed - known
