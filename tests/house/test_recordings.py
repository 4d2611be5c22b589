"""What tests share stays as it is: a test that changes a lent problem fails, and the next one is
lent another.
"""

import pytest
import torch

from cases.gradients import CASES
from cases.recordings import Recordings, check_asks_only, made
from unbatch.reference import definitions as reference

CASE = next(case for case in CASES if case.name == "batch norm, ce")
DROPOUT = next(case for case in CASES if case.name == "dropout")


def write(arguments, _):
    with torch.no_grad():
        arguments[0].get_parameter("0.weight").mul_(2)


def write_past_autograd(arguments, _):
    arguments[0].get_parameter("0.weight").data.mul_(2)


def switch_mode(arguments, _):
    arguments[0].eval()


def leave_gradients(arguments, _):
    model, loss, inputs, targets = arguments
    loss(model(inputs), targets).backward()


def write_data(arguments, _):
    arguments[2].add_(1)


def hang_something_on(arguments, _):
    arguments[0].note = "seen"


CHANGES = [write, write_past_autograd, switch_mode, leave_gradients, write_data, hang_something_on]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_test_that_changes_what_it_was_lent_fails_and_spoils_nothing(change):
    recordings = Recordings()
    arguments, problem = recordings.lend(CASE, "train")
    rows = problem.gradients().flat()
    change(arguments, problem)
    with pytest.raises(AssertionError, match="a shared problem was changed"):
        recordings.take_back(CASE, "train")
    _, other = recordings.lend(CASE, "train")
    assert other is not problem
    assert torch.equal(other.gradients().flat(), rows)


def test_asking_is_no_change_and_records_once():
    recordings = Recordings()
    for _ in range(3):
        arguments, problem = recordings.lend(CASE, "train")
        problem.gradients(by="copy")
        problem.ggn().diag()
        reference.component(*arguments)
        recordings.take_back(CASE, "train")
    assert recordings.count == 1


def test_modes_are_apart():
    recordings = Recordings()
    _, train = recordings.lend(CASE, "train")
    arguments, problem = recordings.lend(CASE, "eval")
    assert problem is not train
    assert not arguments[0].training
    assert not train.structure.independent_forward
    assert problem.structure.independent_forward


def test_noise_is_that_of_a_problem_of_ones_own():
    recordings = Recordings()
    recordings.lend(DROPOUT, "train")
    torch.rand(7)
    arguments, problem = recordings.lend(DROPOUT, "train")
    own = made(DROPOUT, "train")[1].gradients().flat()
    assert torch.equal(problem.gradients().flat(), own)
    torch.manual_seed(0)
    expected = reference.flat(reference.component(*arguments))
    torch.testing.assert_close(own, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("names", [["monkeypatch"], ["always", "monkeypatch", "case"]])
def test_a_test_that_plants_a_bug_is_lent_nothing(names):
    with pytest.raises(AssertionError, match="monkeypatch"):
        check_asks_only(names)
    check_asks_only(["case", "mode", "recorded"])
