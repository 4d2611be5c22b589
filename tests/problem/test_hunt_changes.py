"""The changes of the hunt: an answer is about the program as it is."""

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import unbatch as ub
from cases.changes import D, N
from cases.hunt import changes, kinds_of_change
from cases.hunt.known import WRONG_TODAY
from unbatch.problem import spot_check

CHANGES = {**changes.CHANGES, **kinds_of_change.CHANGES}


@pytest.fixture(autouse=True)
def as_they_were(monkeypatch) -> Iterator[None]:
    """The watch is alone, and what cases share is put back."""
    monkeypatch.setattr(spot_check, "SHARE", 0.0)
    kinds_of_change.reset()
    token = changes.LEVEL.set(1.0)
    yield
    changes.LEVEL.reset(token)
    changes.FACTORS["plain"] = changes.GAIN = changes.MODULE.GAIN = 1.0
    changes.MODULE.inner.GAIN = vars(changes.Described)["factor"].scale = 1.0
    vars(changes.Marked.PLAIN).pop("scale", None)
    os.environ.pop("UNBATCH_GAIN", None)


def answers(problem: ub.Problem) -> list[Any]:
    return [problem.predictions(), problem.gradients().flat(), *problem.gradient().values()]


def is_fresh(name: str) -> bool:
    """Tell whether the answers after a change are those of a problem made afresh."""
    make, change = CHANGES[name]
    torch.manual_seed(0)
    model, loss = make()
    data = torch.randn(N, D), torch.randn(N, D)
    problem = ub.Problem(model, loss, data)
    try:
        before = answers(problem)
    except ub.CaptureError:
        return False  # it is no reason to refuse
    change(model)
    now = answers(ub.Problem(model, loss, data))
    if len(before) == len(now):
        pairs = zip(before, now, strict=True)
        assert any(a.shape != b.shape or not torch.equal(a, b) for a, b in pairs), "no change"
    again = answers(problem)
    return len(again) == len(now) and all(map(torch.allclose, again, now))


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_is_seen(name):
    assert is_fresh(name) != (f"change: {name}" in WRONG_TODAY), (
        "take it out of WRONG_TODAY, or put it in"
    )
