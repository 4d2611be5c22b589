"""Wrong rules, hashes and sizes are planted, and the sweep has to notice each of them."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from cases.ops.aten import tensor
from cases.ops.claims import RAISED, WRONG, Outcome, Trial, judge
from unbatch.analysis import interpreter
from unbatch.analysis.completeness import as_list
from unbatch.analysis.domain import ownership, propagation, sample_sets
from unbatch.analysis.rules import indexing, registry
from unbatch.analysis.rules.registry import RULES, RuleContext

N = 4


def outcomes(function: Callable[..., Any], tensors: int = 1) -> Iterator[Outcome]:
    """What comes of a program on squares: each alone along each axis, and all along one."""
    draws = [[tensor((N, N), "float", 10 * k + i) for i in range(tensors)] for k in range(3)]
    dims: list[tuple[int | None, ...]] = [(0,) * tensors, (1,) * tensors]
    for i in range(tensors):
        for d in (0, 1):
            dims.append(tuple(d if j == i else None for j in range(tensors)))
    for axes in dict.fromkeys(dims):
        yield judge(Trial("planted", function, draws, axes, N))


# --- wrong rules ----------------------------------------------------------------------------------


def without_the_last(call: RuleContext) -> Any:
    """An argument is missed."""
    return call.algebra.pointwise(call.title, *call.tensors[:-1])


def unmoved(call: RuleContext) -> Any:
    """Elements stay where they were."""
    return call["self"]


def without_constants(call: RuleContext) -> Any:
    """Other arguments than tensors are missed."""
    return call.algebra.pointwise(call.name, *call.tensors)


def symmetric(call: RuleContext) -> Any:
    """A function that knows the order counts as one that does not."""
    x = call.algebra.reduce(call.title, call["self"], call.dims(), True)
    return ownership.expand(x, call.shape)


def along_the_next(call: RuleContext) -> Any:
    """A softmax over another dim."""
    x = call["self"]
    dim = (call.dims()[0] + 1) % len(x.shape)
    return call.algebra.pointwise("softmax", x, call.algebra.reduce("logsumexp", x, [dim], True))


def raising(call: RuleContext) -> Any:
    raise ValueError(call.name)


def of_another_shape(call: RuleContext) -> Any:
    return registry.filled((7,), call.title)


def shared_result(call: RuleContext) -> Any:
    """What depends on samples counts as shared."""
    return [registry.shared(shape, call.title) for shape in call.shapes]


def first_of_two(call: RuleContext) -> Any:
    """Both results count as the same function."""
    values = call.algebra.scan(call.title, call["self"], call.dims())
    return [values, values]


def one_sum_for_all(call: RuleContext) -> Any:
    """A product of matrices counts as a function of the place alone."""
    return registry.filled(call.shape, call.title)


RULE_BUGS: dict[str, tuple[str, Callable[..., Any], Callable[..., Any], int]] = {
    "an argument missed": ("where", without_the_last, lambda x, y: torch.where(x > 0.5, x, y), 2),
    "a mask missed": ("lerp", without_the_last, lambda x, y, z: torch.lerp(x, y, z), 3),
    "elements that do not move": ("flip", unmoved, lambda x: x.flip(0) + x, 1),
    "a transposition that is none": ("transpose", unmoved, lambda x: x.transpose(0, 1), 1),
    "constants missed": (
        "clamp",
        without_constants,
        lambda x: (x.clamp(max=0.5), x.clamp(max=0.3)),
        1,
    ),
    "an order missed": ("cumsum", symmetric, lambda x: x.cumsum(0), 1),
    "another dim": ("_softmax", along_the_next, lambda x: x.softmax(1), 1),
    "a rule that raises": ("exp", raising, lambda x: x.exp(), 1),
    "a rule of another shape": ("tanh", of_another_shape, lambda x: x.tanh(), 1),
    "a result that counts as shared": ("sort", shared_result, lambda x: x.sort(1).values, 1),
    "two results in one": ("cummax", first_of_two, lambda x: x.cummax(1), 1),
    "a product that counts as shared": ("mm", one_sum_for_all, lambda x, y: x @ y, 2),
}


def as_the_rule_says(call: Any, rule: Any, defaults: Any) -> Any:
    return as_list(rule(call)), frozenset()


@pytest.mark.parametrize("bug", RULE_BUGS)
def test_a_wrong_rule_is_noticed(bug, monkeypatch):
    name, rule, program, tensors = RULE_BUGS[bug]
    before = [outcome.status for outcome in outcomes(program, tensors)]
    assert not {WRONG, RAISED} & set(before)
    monkeypatch.setitem(RULES, name, rule)
    # Without what would mend a rule that forgets an argument.
    monkeypatch.setattr(interpreter, "completed", as_the_rule_says)
    after = [outcome.status for outcome in outcomes(program, tensors)]
    wanted = RAISED if rule in (raising, of_another_shape) else WRONG
    assert wanted in after


# --- wrong hashes and sizes -----------------------------------------------------------------------


@dataclass(frozen=True)
class Plant:
    """A function of the analysis that is replaced, and a program on which that shows."""

    place: Any
    name: str
    wrong: Callable[..., Any]
    program: Callable[..., Any]
    tensors: int = 1


def one_code(*things: object) -> Any:
    return np.uint64(7)


def no_index(size: int, dim: int, ndim: int) -> Any:
    return np.zeros(ownership._along(size, dim, ndim), dtype=np.uint64)


def first_owner_only(owner: Any, dim: int, keepdims: bool = False) -> Any:
    return np.zeros(sample_sets.single_owner(owner, dim, keepdims).shape, dtype=bool)


BUGS = {
    "names left out of keys": Plant(propagation, "code", one_code, lambda x: (x.exp(), x.tanh())),
    "the index left out of keys": Plant(
        ownership, "index_along", no_index, lambda x: x.reshape(16)[:8] * 1
    ),
    "the order left out of a scan": Plant(
        propagation, "index_along", no_index, lambda x: _sums_in_two_orders(x)
    ),
    "which dims are plain left out": Plant(
        propagation,
        "_implicit_dims",
        lambda x, explicit: [],
        lambda x, y: (x + y[0], x + y[0][:, None]),
        2,
    ),
    "several owners not seen": Plant(
        sample_sets, "several_owners", first_owner_only, lambda x: x.sum(0)
    ),
    "a scan over several owners": Plant(
        propagation, "several_owners", first_owner_only, lambda x: x.cumsum(0)
    ),
    "a lookup one further on": Plant(
        indexing,
        "as_mask",
        lambda numbers: None if numbers is None else numbers * 0,
        lambda x: x[torch.tensor([2, 0, 3, 1])],
    ),
    "memory written through a view": Plant(
        interpreter, "_through_views", lambda *_: None, lambda x: _written_through_a_view(x)
    ),
}


def _sums_in_two_orders(x: Tensor) -> Any:
    # Looked up one by one, so that each number has its own key.
    first = N * torch.arange(N)[:, None]
    flat = x.reshape(N * N)
    left, right = torch.tensor([0, 0, 1]), torch.tensor([0, 1, 0])
    return flat[first + left].cumsum(1), flat[first + right].cumsum(1)


def _written_through_a_view(x: Tensor) -> Tensor:
    base = torch.zeros(N, N, dtype=x.dtype)
    row = base[0]
    row.copy_(x.sum(1))
    return base * 1


@pytest.mark.parametrize("bug", BUGS)
def test_a_wrong_hash_or_size_is_noticed(bug, monkeypatch):
    plant = BUGS[bug]
    before = [outcome.status for outcome in outcomes(plant.program, plant.tensors)]
    assert not {WRONG, RAISED} & set(before)
    monkeypatch.setattr(plant.place, plant.name, plant.wrong)
    after = [outcome.status for outcome in outcomes(plant.program, plant.tensors)]
    assert WRONG in after


def test_a_wrong_count_is_noticed(monkeypatch):
    """A mean over two equal numbers and over three: the size of what is reduced is in the key."""

    def program(x: Tensor) -> Any:
        return x[:, :1].expand(N, 2).sum(1), x[:, :1].expand(N, 3).sum(1)

    assert WRONG not in [outcome.status for outcome in outcomes(program)]
    monkeypatch.setattr(propagation, "mix", _without_counts)
    monkeypatch.setattr(
        sample_sets, "total", lambda keys, axis, keepdims=False: keys.max(axis=axis)
    )
    assert WRONG in [outcome.status for outcome in outcomes(program)]


TRUE_MIX = ownership.mix


def _without_counts(a: Any, b: Any) -> Any:
    """Hash pairs, but for the counts of a reduction, which come as a number without dims."""
    if np.ndim(b) == 0:
        return a
    return TRUE_MIX(a, b)
