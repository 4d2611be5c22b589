"""The tables of cases against the analyser: every verdict is the truth, or an allowed "unknown"."""

import pytest

from cases.losses import LOSSES
from cases.models import MODELS
from cases.verdicts import check, check_weights, structure_of, truth_of

# Honest "unknown"s that the tables do not ask for: what it would take to decide them.
KNOWN_UNKNOWN = {
    "mean of the three nearest neighbours": (
        "its batch size is written into it: no larger batch can be tried"
    ),
    "take from the flat batch with own offsets": "bounds on the values of an index",
    "mean over chunks of unequal size": "sums over sets of samples whose weights differ",
    "weights by index, in a loop": "sums of terms with a number of their own",
    "a statistic that a rare where lets through": "a witness where the rare branch is taken",
}


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
