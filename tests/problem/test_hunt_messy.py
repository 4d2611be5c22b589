"""The messy programs of the hunt: a question leaves no trace of them."""

import decimal
import gc
import os
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

import unbatch as ub
from cases.changes import D, N, squares
from cases.hunt import kinds_of_trace, messy
from cases.hunt.known import WRONG_TODAY
from unbatch.capture import foreign, holders

MESSY = {**messy.MESSY, **kinds_of_trace.MESSY}


@pytest.fixture(autouse=True)
def as_they_were() -> Iterator[None]:
    """What belongs to the process is put back after each."""
    path, limit = list(sys.path), sys.getrecursionlimit()
    context, environment = decimal.getcontext().copy(), dict(os.environ)
    kinds_of_trace.reset()
    token = messy.COUNT.set(0)
    yield
    messy.COUNT.reset(token)
    sys.path[:] = path
    sys.setrecursionlimit(limit)
    gc.enable()
    decimal.setcontext(context)
    os.environ.clear()
    os.environ.update(environment)
    kinds_of_trace.reset()
    torch.set_printoptions(profile="default")
    np.set_printoptions(precision=8)
    torch.set_grad_enabled(True)
    torch.autograd.set_detect_anomaly(False, check_nan=True)
    torch.sparse.check_sparse_tensor_invariants.disable()
    torch.distributions.Distribution.set_default_validate_args(True)
    messy.__dict__.pop("MADE", None)
    vars(messy.MODULE).pop("last", None)


def ask(problem: ub.Problem) -> list[Any]:
    assert problem.structure.samples == N
    return [problem.predictions(), problem.gradients().flat(), *problem.gradient().values()]


def leaves_no_trace(name: str) -> bool:
    make, keeps = MESSY[name]
    torch.manual_seed(0)
    model = make()
    problem = ub.Problem(model, squares, (torch.randn(N, D), torch.randn(N, D)))
    before = keeps(model)
    try:
        ask(problem)
    except ub.CaptureError:
        return False  # it is no reason to refuse
    return bool(keeps(model) == before)


@pytest.mark.parametrize("name", MESSY)
def test_a_question_leaves_no_trace(name):
    assert leaves_no_trace(name) != (f"messy: {name}" in WRONG_TODAY), (
        "take it out of WRONG_TODAY, or put it in"
    )


@pytest.mark.parametrize("name", kinds_of_trace.MESSY)
def test_the_programs_do_leave_one(name):
    """Run plainly, each changes what it is said to change."""
    make, keeps = MESSY[name]
    model = make()
    before = keeps(model)
    model(torch.randn(N, D))
    assert keeps(model) != before


PLANTED = {
    "an array of C": foreign.Memory,
    "a variable of a context": foreign.Variable,
    "a new global": holders.Names,
    "a global by a name that is data": foreign.Namespace,
    "a simple queue": foreign.Queue,
    "a file on a disk": foreign.File,
    "a file in memory that is cut": foreign.InMemory,
    "a variable of the environment": foreign.Environment,
    "an attribute of a parameter": holders.OfTensors,
    "a cache of results that has some": foreign.Cache,
    "the level of a logger": foreign._LoggerStates,
}


@pytest.mark.parametrize("name", PLANTED)
def test_a_place_that_is_not_put_back_is_caught(name, monkeypatch):
    monkeypatch.setattr(PLANTED[name], "restore", lambda self, content=None: False)
    assert not leaves_no_trace(name)
