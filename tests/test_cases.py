"""The tables of cases against the analyser: every verdict is the truth, or an allowed "unknown"."""

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map

import unbatch as ub
from cases_losses import LOSSES, LossCase
from cases_models import MODELS, ModelCase
from unbatch import Structure

# Honest "unknown"s that the tables do not ask for: what it would take to decide them.
KNOWN_UNKNOWN = {
    "mean of the three nearest neighbours": "its batch size is written into it, so no larger batch can be tried",
    "take from the flat batch with own offsets": "bounds on the values of an index",
    "mean over chunks of unequal size": "sums over sets of samples whose weights differ",
    "weights by index, in a loop": "sums of terms with a number of their own",
    "a statistic that a rare where lets through": "a witness where the rare branch is taken",
}

FORWARD = ("independent_forward", "simd_forward", "simd_given_statistics")
LOSS = ("reduction", "simd_loss")


class Identity(nn.Module):
    """Predictions that are the inputs: leaves only the loss to judge."""

    def forward(self, *x):
        return tree_map(lambda t: t * 1, x if len(x) > 1 else x[0])


def nothing(predictions, targets=None):
    """A loss that reads every prediction."""
    return 0 * sum(t.sum() for t in tree_leaves(predictions) if isinstance(t, torch.Tensor))


def structure_of_model(case: ModelCase) -> Structure:
    model, inputs = case.build()
    inputs = inputs if isinstance(inputs, tuple) else (inputs,)
    if isinstance(model, nn.Module):
        return ub.Problem(model, nothing, (inputs, None), in_dims=(case.in_dims, None)).structure
    called = lambda parameters, x: model(*x)  # noqa: E731
    return ub.Problem(called, nothing, (inputs, None), in_dims=(case.in_dims, None), parameters={}).structure


def structure_of_loss(loss: Callable, inputs: tuple) -> Structure:
    predictions, targets = inputs
    samples = tree_leaves(predictions)[0].shape[0]
    dims = tree_map(lambda t: 0 if t.shape[:1] == (samples,) else None, targets)
    return ub.Problem(Identity(), loss, (predictions, targets), in_dims=(0, dims)).structure


def structure_of(case: ModelCase | LossCase) -> Structure:
    torch.manual_seed(0)
    if isinstance(case, ModelCase):
        return structure_of_model(case)
    return structure_of_loss(case.loss, case.inputs())


def truth_of(case: ModelCase | LossCase) -> dict[str, str]:
    if isinstance(case, ModelCase):
        return dict(zip(FORWARD, (case.independent, case.simd, case.given), strict=True))
    return dict(zip(LOSS, (case.reduction, case.simd_loss), strict=True))


def check(structure: Structure, truth: dict[str, str], accept_unknown: bool) -> None:
    """Raise where a verdict is neither the truth nor an "unknown" that is allowed."""
    for name, status in truth.items():
        verdict = getattr(structure, name)
        if verdict.status == "unknown":
            assert accept_unknown, f"{name} is unknown: {verdict.culprits} {verdict.note}"
            assert not verdict.basis, f"{name} is unknown, with the basis {verdict.basis!r}"
        else:
            assert verdict.status == status, f"{name} {verdict.status}, in truth it {status}: {verdict}"
            assert verdict.basis in {"proved", "witness", "assumed"}, verdict
            assert (verdict.status, verdict.basis) != ("holds", "witness"), f"a witness proves no {name}"
    decided = {name: getattr(structure, name).status for name in FORWARD}
    assert (decided["simd_forward"] == "holds") <= (decided["independent_forward"] == "holds"), decided
    assert (decided["simd_forward"] == "holds") <= (decided["simd_given_statistics"] == "holds"), decided


def check_weights(structure: Structure, on_targets: bool | None) -> None:
    """Raise where it is wrong whether the weights listen to the targets of other samples."""
    if structure.reduction and on_targets is not None:
        said = structure.reduction.weights_depend_on
        assert ("targets" in said) == on_targets, f"weights depend on {set(said)}, on targets: {on_targets}"


def named(cases: list) -> list:
    return [pytest.param(case, id=case.name) for case in cases]


@pytest.mark.parametrize("case", named(MODELS))
def test_verdicts_on_the_forward_pass(case):
    check(structure_of(case), truth_of(case), case.accept_unknown or case.name in KNOWN_UNKNOWN)


@pytest.mark.parametrize("case", named(LOSSES))
def test_verdicts_on_the_loss(case):
    structure = structure_of(case)
    check(structure, truth_of(case), case.accept_unknown or case.name in KNOWN_UNKNOWN)
    check_weights(structure, case.weights_depend_on_targets)


@pytest.mark.parametrize("name", KNOWN_UNKNOWN)
def test_known_unknowns_are_unknown(name):
    """An entry that has become decided leaves the table."""
    (case,) = [c for c in [*MODELS, *LOSSES] if c.name == name]
    assert not case.accept_unknown, "the case is marked already"
    structure = structure_of(case)
    statuses = [getattr(structure, verdict).status for verdict in truth_of(case)]
    assert "unknown" in statuses, f"decided by now: {statuses}; take it out of KNOWN_UNKNOWN"


def test_names_are_unique():
    names = [case.name for case in [*MODELS, *LOSSES]]
    assert len(names) == len(set(names)), sorted({n for n in names if names.count(n) > 1})


def test_most_marked_cases_are_decided():
    """`accept_unknown` is a courtesy, and no hiding place: it covers few cases."""
    assert sum(c.accept_unknown for c in MODELS) < 0.15 * len(MODELS)
    assert sum(c.accept_unknown for c in LOSSES) < 0.15 * len(LOSSES)
