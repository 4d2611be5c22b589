"""Rows of gradients by the fast path, against their definitions, over the whole table.

Tolerances are relative to the largest entry of the reference rows of a parameter, with a floor
relative to the largest entry of the whole gradient: biases before batch norm and biases of keys
have rows that are zero by cancellation.
"""

import pytest
import torch

from cases.gradients import CASES, by_groups
from cases.recordings import made
from unbatch.reference import definitions as reference

REFERENCE = {"component": reference.component, "copy": reference.copies, "frozen": reference.frozen}
ROWS, FLOOR, SUMS = 1e-10, 1e-12, 1e-12

EVERY = pytest.mark.parametrize("mode", ["train", "eval"])
EACH = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
BY = pytest.mark.parametrize("by", REFERENCE)


def has_reference(case, mode, by):
    possible = {"component": True, "copy": case.copies, "frozen": case.frozen}[by]
    return possible or not case.mixes_in(mode)


def largest(tensors):
    return max((t.abs().max().item() for t in tensors if t.numel()), default=0.0)


def check_rows(found, expected, scale):
    """Same names in the same order, same shapes, same numbers."""
    assert list(found) == list(expected)
    for name, row in expected.items():
        assert found[name].shape == row.shape, name
        bound = max(ROWS * largest([row]), FLOOR * scale)
        error = largest([found[name] - row])
        assert error <= bound, (
            f"{name}: off by {error:.1e}, allowed {bound:.1e}, largest entry {largest([row]):.1e}"
        )


def check_sum(rows, gradient, scale):
    for name, g in gradient.items():
        total = rows[name].sum(0) + rows.rest.get(name, torch.zeros_like(g))
        error = largest([total - g])
        assert error <= SUMS * scale, (
            f"{name}: the sum is off by {error:.1e}, the largest entry is {scale:.1e}"
        )


@BY
@EVERY
@EACH
def test_rows_are_those_of_the_definition(case, mode, by, recorded):
    if not has_reference(case, mode, by):
        pytest.skip("one sample cannot run on its own")
    args, problem = recorded(case, mode)
    check_rows(
        problem.gradients(by=by), REFERENCE[by](*args), largest(reference.gradient(*args).values())
    )


@BY
def test_rows_of_groups_are_those_of_each_group_as_a_batch(by):
    args, problem = made(next(case for case in CASES if case.name == "ghost batch norm"), "train")
    check_rows(
        problem.gradients(by=by),
        by_groups(REFERENCE[by]),
        largest(reference.gradient(*args).values()),
    )


@pytest.mark.parametrize("by", ["component", "copy"])
@EVERY
@EACH
def test_rows_and_rest_sum_to_the_gradient(case, mode, by, recorded):
    args, problem = recorded(case, mode)
    gradient = reference.gradient(*args)
    check_sum(problem.gradients(by=by), gradient, largest(gradient.values()))


@EVERY
@EACH
def test_rest_is_that_of_the_definition(case, mode, recorded):
    args, problem = recorded(case, mode)
    expected = {name: g for name, g in reference.rest(*args).items() if g.any()}
    found = {name: g for name, g in problem.gradients().rest.items() if g.any()}
    check_rows(found, expected, largest(reference.gradient(*args).values()))


@EVERY
@EACH
def test_rows_agree_where_samples_are_apart(case, mode, recorded):
    if case.mixes_in(mode):
        pytest.skip("samples meet")
    args, problem = recorded(case, mode)
    scale = largest(reference.gradient(*args).values())
    rows = dict(problem.gradients(by="component"))
    check_rows(problem.gradients(by="copy"), rows, scale)
    check_rows(problem.gradients(by="frozen"), rows, scale)


@EVERY
@EACH
def test_one_sweep_serves_all_samples_that_are_apart(case, mode, recorded):
    """Rows that are right may still have cost one backward pass for every sample."""
    if case.mixes_in(mode):
        pytest.skip("samples meet")
    plan = recorded(case, mode)[1].plan()
    assert plan.pullbacks == 1, str(plan)
    assert {site.way for site in plan.sites} <= {"local"}


@EACH
def test_rows_lie_flat_in_the_order_of_the_parameters(case, recorded):
    _, problem = recorded(case, "train")
    rows = problem.gradients()
    expected = torch.cat([row.reshape(problem.samples, row[0].numel()) for row in rows.values()], 1)
    assert torch.equal(rows.flat(), expected)


# The checkers see what is wrong: rows in another order, and rows that do not sum up.


def test_swapped_rows_are_caught():
    args, _ = made(CASES[0], "train")
    rows = reference.component(*args)
    check_rows(rows, rows, 1.0)
    with pytest.raises(AssertionError, match="off by"):
        check_rows({name: row.flip(0) for name, row in rows.items()}, rows, 1.0)


def test_a_missing_rest_is_caught():
    class Rows(dict):
        rest = {}  # noqa: RUF012

    args, _ = made(next(c for c in CASES if c.name == "mlp, with weight decay"), "train")
    with pytest.raises(AssertionError, match="the sum is off by"):
        check_sum(Rows(reference.component(*args)), reference.gradient(*args), 1.0)
