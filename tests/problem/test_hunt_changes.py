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
from unbatch.capture import foreign, holders, iterators, own_writes, reachable
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


# --- planted --------------------------------------------------------------------------------------

FORGOTTEN = {
    "a number of C": foreign.Memory,
    "a variable of a context": foreign.Variable,
    "a dict in a variable of a context": foreign.Variable,
    "an entry of a Python module's namespace": foreign.Namespace,
    "an item of a simple queue": foreign.Queue,
    "an attribute of a scripted module": foreign.Scripted,
    "what a file in memory holds": foreign.InMemory,
    "a variable of the environment": foreign.Environment,
    "an attribute of a parameter": holders.OfTensors,
    "a count advanced": iterators.Position,
}


@pytest.mark.parametrize("name", FORGOTTEN)
def test_a_kind_of_place_that_is_forgotten_is_caught(name, monkeypatch):
    holder = FORGOTTEN[name]
    monkeypatch.setattr(holder, "same", lambda self, mark: True)
    if name != "a dict in a variable of a context":
        assert not is_fresh(name)
        return
    # What lies behind a place is another one.
    assert is_fresh(name)


REFERENCES = {
    "an attribute behind a weak reference": (reachable._Walk, "follow_weak", False),
    "a global that a property of a metaclass reads": (reachable._Walk, "user_class", None),
    "a global of a module imported inside": (reachable, "_imported", ()),
    "a rest of a division": (own_writes.Idle, "agrees", True),
    "the sum of a history": (own_writes, "_containers", ()),
}


@pytest.mark.parametrize("name", REFERENCES)
def test_a_step_of_the_walk_that_is_left_out_is_caught(name, monkeypatch):
    place, function, result = REFERENCES[name]
    monkeypatch.setattr(place, function, lambda *args: result)
    assert not is_fresh(name)
