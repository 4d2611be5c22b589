"""Derivatives through every op of PyTorch's table: right, refused in words, and nothing changed."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

from op_derivatives import PAGE

from cases.ops import derivatives
from cases.ops.derivatives import (
    REFUSED,
    RIGHT,
    SKIPPED,
    WRITTEN_UNDER,
    line_of,
    names_of_ops,
    outcomes_of,
)
from unbatch.versions import minor

EVERY = 32  # of the ops of the table, one in so many is quick
ALLOWED = (RIGHT, REFUSED, SKIPPED)


def lines_of_page():
    lines = {}
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        if line.startswith("| `"):
            lines[line.split("`")[1]] = line
    return lines


LINES = lines_of_page()


def faults(outcomes):
    return [outcome for outcome in outcomes if outcome[1] not in ALLOWED]


@pytest.mark.parametrize("name", list(LINES)[::EVERY])
def test_some_ops(name):
    assert not faults(outcomes_of(name))


@pytest.mark.parametrize("name", list(LINES))
def test_every_op_is_as_the_table_says(name):
    outcomes = outcomes_of(name)
    assert not faults(outcomes)
    assert line_of(name, outcomes) == LINES[name], "the table is out of date"


@pytest.mark.skipif(
    minor(torch.__version__) != WRITTEN_UNDER, reason="another version has other ops"
)
def test_the_table_leaves_no_op_out():
    assert list(LINES) == names_of_ops()


def test_a_wrong_rule_is_caught(monkeypatch):
    from unbatch.autodiff import adjoint, jvp_rules

    monkeypatch.setitem(jvp_rules.RULES, "tanh", lambda call, moving: [moving["self"]])
    assert not faults(outcomes_of("tanh")), "the rule is not believed"
    monkeypatch.setattr(adjoint.AdjointTest, "agrees", lambda self, pushed: True)
    assert any(status == derivatives.WRONG for _, status, _ in outcomes_of("tanh"))


def test_a_write_is_caught():
    sample = derivatives.samples_of(derivatives.op_table()["tanh"])[0]
    net = derivatives.Net(torch.tanh, sample, False)
    trial = derivatives.Trial(net, torch.ones(2), torch.zeros(()), None)
    trial.before = {name: t.clone() for name, t in net.state_dict().items()}
    trial.rng = torch.get_rng_state()
    with torch.no_grad():
        trial.asked("rows", lambda: net.t0.add_(1))
    assert trial.found[0][0] == derivatives.CHANGED
