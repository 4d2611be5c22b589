"""The models and losses of the hunt: every verdict is the truth, or an allowed "unknown"."""

import warnings

import pytest

import unbatch as ub
from cases.hunt import LOSSES, MODELS
from cases.hunt.known import WRONG_TODAY
from cases.hunt.third_losses import OWN, SPLITS, OwnLossCase, SplitCase
from cases.hunt.third_statistics import SIZES
from cases.losses import LossCase
from cases.models import ModelCase
from cases.verdicts import check, check_weights, structure_of, truth_of
from unbatch.errors import ContradictedProofWarning

# A wrong verdict, and errors that are none of the program.
WRONG = (
    AssertionError,
    KeyError,
    OverflowError,
    RuntimeError,
    ValueError,
    ub.CaptureError,
    ContradictedProofWarning,
)

TABLES = {
    "model": [case.name for case in MODELS],
    "loss": [case.name for case in LOSSES],
    "own": [case.name for case in OWN],
    "split": [case.name for case in SPLITS],
    "size": [case.name for case in SIZES],
}


def named(cases: list) -> list:
    return [pytest.param(case, id=case.name) for case in cases]


Case = ModelCase | LossCase | OwnLossCase | SplitCase


def judge(case: Case) -> bool:
    """Raise where a verdict is wrong; return whether one was proved that a trial took back."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ContradictedProofWarning)
        is_own = isinstance(case, OwnLossCase | SplitCase)
        structure = case.structure() if is_own else structure_of(case)
    truth = case.truth() if is_own else truth_of(case)
    check(structure, truth, case.accept_unknown)
    if isinstance(case, LossCase):
        check_weights(structure, case.weights_depend_on_targets)
    return any(issubclass(w.category, ContradictedProofWarning) for w in caught)


def check_case(case: Case, kind: str) -> None:
    """Raise where a case is wrong, or is so no longer and is listed as wrong."""
    if f"{kind}: {case.name}" not in WRONG_TODAY:
        judge(case)
        return
    try:
        contradicted = judge(case)
    except WRONG:
        return
    assert contradicted, "it is right today: take it off the list"


@pytest.mark.parametrize("case", named(MODELS))
def test_verdicts_on_the_forward_pass(case):
    check_case(case, "model")


@pytest.mark.parametrize("case", named(LOSSES))
def test_verdicts_on_the_loss(case):
    check_case(case, "loss")


@pytest.mark.parametrize("case", named([c for c in MODELS + LOSSES if "written: " in c.name]))
def test_indices_are_read_as_they_were_written(case):
    assert not judge(case), "only a trial has found it"


@pytest.mark.parametrize("case", named(OWN))
def test_verdicts_on_a_loss_of_the_models_own(case):
    check_case(case, "own")


@pytest.mark.parametrize("case", named(SPLITS))
def test_verdicts_on_the_canonical_split(case):
    check_case(case, "split")


@pytest.mark.parametrize("case", named(SIZES))
def test_sizes_of_statistics(case):
    is_right = case.found() == case.size
    is_listed = f"size: {case.name}" in WRONG_TODAY
    assert is_right != is_listed, (case.found(), case.size, is_listed)


@pytest.mark.parametrize("kind", TABLES)
def test_names_are_unique(kind):
    names = TABLES[kind]
    assert len(names) == len(set(names)), sorted({n for n in names if names.count(n) > 1})


def test_what_is_listed_as_wrong_exists():
    known = {f"{kind}: {name}" for kind, names in TABLES.items() for name in names}
    listed = {name for name in WRONG_TODAY if name.partition(":")[0] in TABLES}
    assert known >= listed, listed - known
