"""Forms of ops: what is known of a name is believed of the forms that were looked at, and of no
other.
"""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import unbatch as ub
from unbatch.capture import forms, ops
from unbatch.capture.forms import full_name, line

aten = torch.ops.aten

MIXING = {
    "relu.planted": lambda x, by: torch.relu(x.roll(by, 0)),
    "clone.planted": lambda x, by: x.roll(by, 0),
    "sum.planted": lambda x, by: x.cumsum(0) * by,
    "add.planted": lambda x, by: x + x.mean(0) * by,
    "new_zeros.planted": lambda x, by: x.roll(by, 0).clone(),
}


class Calls(nn.Module):
    """A layer that is one op."""

    def __init__(self, op):
        super().__init__()
        self.op = op

    def forward(self, x):
        return self.op(x, 1)


@pytest.fixture
def planted():
    """Overloads that a later PyTorch might bring, under names that have rules."""
    with torch.library._scoped_library("aten", "FRAGMENT") as library:
        for name, function in MIXING.items():
            library.define(f"{name}(Tensor self, int by) -> Tensor")
            library.impl(name, function, "CompositeExplicitAutograd")
        yield


@pytest.mark.parametrize("name", MIXING)
def test_a_form_that_was_not_known_has_no_rule(planted, name):
    word = name.removesuffix(".planted")
    op = getattr(aten, word).planted
    assert full_name(op) == f"aten::{name}"
    assert ops.base_name(op) not in ops.TRAITS
    model = nn.Sequential(Calls(op), nn.Linear(3, 3))
    problem = ub.Problem(model, F.mse_loss, (torch.randn(6, 3), torch.randn(6, 3)))
    assert problem.structure.independent_forward.status == "fails"


def test_the_forms_that_are_installed_are_known():
    new = {*forms.installed()} - forms.known()
    assert not new, f"look at these, then run python -m unbatch.capture.forms: {sorted(new)}"


def test_a_form_has_its_own_line_for_each_set_of_arguments():
    add = aten.add.Tensor._schema
    assert line(add) == "add.Tensor self other alpha"
    longer = [*add.arguments, SimpleNamespace(name="mask")]
    assert line(SimpleNamespace(name=add.name, overload_name="Tensor", arguments=longer)) not in (
        forms.known()
    )


def test_known_forms_have_short_names():
    assert full_name(aten.add_.Tensor) == "add_"
    assert full_name(aten.sum.dim_IntList) == "sum"


def test_the_file_is_in_order():
    lines = forms.FILE.read_text(encoding="utf-8").splitlines()
    assert lines == sorted(set(lines))
