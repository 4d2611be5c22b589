"""Owners of elements: a sample, all of them, a set of them, or several in no symmetric way."""

import numpy as np
import pytest

from unbatch.analysis.domain import ownership as labels
from unbatch.analysis.domain.ownership import (
    MIXED,
    SHARED,
    Ownership,
    batched,
    group_number,
    group_owner,
    is_group,
    is_sample,
    shared,
)

GROUPS = [group_owner(n) for n in range(3)]


def marks(*owners: int) -> Ownership:
    owner = np.array(owners, dtype=np.int32)
    return Ownership(owner.shape, owner, np.arange(len(owners), dtype=np.uint64))


def test_every_owner_is_one_thing():
    """A sample, shared, mixed, or a set of samples whose number comes back."""
    owners = np.array([0, 5, SHARED, MIXED, *GROUPS])
    assert is_sample(owners).tolist() == [True, True, False, False, False, False, False]
    assert is_group(owners).tolist() == [False, False, False, False, True, True, True]
    assert len(set(owners.tolist())) == len(owners)
    assert group_number(np.array(GROUPS)).tolist() == [0, 1, 2]


def test_the_number_of_what_is_no_group_can_be_looked_up():
    """It is used as an index beside a mask, so it must be one."""
    assert group_number(np.array([3, SHARED, MIXED])).tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    ("value", "true"),
    [
        (shared([4], "weight"), set()),
        (batched([4, 2], 0, "batch"), {"owned", "all_owned"}),
        (marks(0, SHARED), {"owned", "partly_shared"}),
        (marks(0, MIXED), {"owned", "mixed", "coupled"}),
        (marks(SHARED, MIXED), {"mixed", "coupled"}),
        (marks(0, GROUPS[1]), {"owned", "grouped", "coupled"}),
        (marks(GROUPS[0], SHARED), {"grouped", "coupled"}),
    ],
)
def test_what_a_value_is_follows_from_its_owners(value, true):
    properties = {"owned", "all_owned", "partly_shared", "mixed", "grouped", "coupled"}
    assert {name for name in properties if getattr(value, name)} == true


def test_a_group_that_passes_for_shared_is_caught(monkeypatch):
    """A planted bug: with the codes of groups one too high, the first of them is mixed."""
    monkeypatch.setattr(labels, "_FIRST_GROUP", MIXED)
    assert marks(group_owner(0)).mixed
    assert not marks(GROUPS[0]).mixed
