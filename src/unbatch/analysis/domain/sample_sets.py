"""Sets of samples, and the owner of what is made from elements of several owners.

Here live the numbers of the sets that statistics are taken over, and the two ways in which owners
come together: ``join`` (place by place, as in a sum of two values) and ``combine`` (along an axis,
as in a sum over it). What is done with the answer is in ``propagation.py``.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from unbatch.analysis.domain.choices import Choices
from unbatch.analysis.domain.ownership import (
    MIXED,
    SHARED,
    Array,
    code,
    group_number,
    group_owner,
    is_group,
    is_sample,
    mix,
    total,
)


@dataclass
class SampleSets:
    """The sets of samples that statistics were taken over, numbered as they come up.

    ``choices``: what samples chose of their own, where that is followed. ``membership``: ``[set,
    n]``, whether sample n belongs to the set. The whole batch is not
    among them: what is a function of all samples has the owner ``SHARED``.
    """

    samples: int
    choices: Choices | None = None
    membership: Array = field(init=False)

    def __post_init__(self) -> None:
        self.membership = np.zeros((0, self.samples), dtype=bool)

    def __len__(self) -> int:
        return len(self.membership)

    def owner_of(self, members: Array) -> int:
        """Return the owner of a symmetric function of ``members``, one for equal sets."""
        # A function of all samples is the same for each of them, as a constant is; that it depends
        # on the batch is noted in ``Ownership.statistics``.
        if members.all():
            return SHARED
        equal = np.flatnonzero((self.membership == members).all(axis=1))
        if len(equal):
            return group_owner(int(equal[0]))
        self.membership = np.vstack([self.membership, members])
        return group_owner(len(self.membership) - 1)

    def members(self, owner: int) -> Array:
        """Return which samples an owner stands for: one sample, or the set; ``[n]`` booleans."""
        if is_group(owner):
            return self.membership[group_number(owner)]
        return np.arange(self.samples) == owner

    def contains(self, group: Array, sample: Array) -> Array:
        """Tell, element by element, whether ``sample`` belongs to ``group``.

        Both are owners of elements; where they are something else the answer is False.
        """
        comparable = is_sample(sample) & is_group(group)
        # Where nothing can be compared the index is 0, which is valid and whose answer is dropped.
        inside = self.membership[group_number(group), np.where(comparable, sample, 0)]
        return np.asarray(comparable & inside)

    def overlap(self, groups: frozenset[int]) -> bool:
        """Tell whether some sample belongs to more than one of ``groups``."""
        if not groups:
            return False
        count = np.zeros(self.samples, dtype=np.int64)
        for group in sorted(groups):
            count += self.members(group)
        return bool((count > 1).any())

    def join(self, a: Array, b: Array) -> Array:
        """Return the owners of what is made of elements of owners ``a`` and ``b`` at its place.

        Shared with anything is that thing; equal owners stay; a sample with a set that it belongs
        to is the sample's, which uses a statistic of its set; everything else is mixed.
        """
        # For single samples and SHARED first, which is all there is without sets.
        equal_or_alone = np.where((b == SHARED) | (a == b), a, MIXED)
        joined = np.where(a == SHARED, b, equal_or_alone).astype(np.int32)
        if not len(self):
            return joined
        for sample, group in ((a, b), (b, a)):
            joined = np.where(self.contains(group, sample), sample, joined)
        return joined

    def combine(self, owner: Array, key: Array, of_sets: bool = False) -> tuple[Array, Array, bool]:
        """Return owners and keys of symmetric functions of the elements along the last axis.

        The third says whether several owners were combined in any of them. ``of_sets``: a function
        of statistics of several sets is one of all samples in them.
        """
        out_owner, out_key = single_owner(owner, -1), total(key, axis=-1)
        # Most rows have one owner at most (a reduction within samples), and need no further look.
        several = several_owners(owner, -1)
        if not several.any():
            return out_owner, out_key, False
        owners = []
        keys = []
        for row_owner, row_key in zip(owner[several], key[several], strict=True):
            one_owner, one_key = self._combine_several(row_owner, row_key, of_sets)
            owners.append(one_owner)
            keys.append(one_key)
        out_owner[several] = owners
        out_key[several] = keys
        return out_owner, out_key, True

    def _combine_several(self, owner: Array, key: Array, of_sets: bool) -> tuple[int, int]:
        """Owner and key of a symmetric function of one row of elements, of several owners.

        The function is one of the multiset ``M_n`` of keys that sample n contributes, for each n.
        It is symmetric in the samples if ``M_n`` is the same for all of them. Then it belongs to
        their set; otherwise exchanging two samples changes it, and it is mixed.
        """
        # For the keys [a, b] of sample 0 and [b, a] of sample 1: M_0 = M_1 = {a, b}, so their sum
        # is a statistic. With [a, b] and [a, a] it is mixed.
        names, inverse = np.unique(owner, return_inverse=True)
        contributions = np.zeros(len(names), dtype=np.uint64)  # hashes of M_n, by owner
        with np.errstate(over="ignore"):
            np.add.at(contributions, inverse, mix(key, code("element")))
        owned = names != SHARED
        if self.choices is not None:
            of_terms = self.choices.of_terms(owner, key)
            if of_terms is not None:
                return SHARED, of_terms
        if MIXED in names or len(np.unique(contributions[owned])) > 1:
            return MIXED, 0
        if is_group(names).any() and not of_sets:
            # The sum of their squares, say: exchanging samples of two sets changes it.
            return MIXED, 0
        members = [self.members(int(name)) for name in names[owned]]
        if np.sum(members, axis=0).max() > 1:
            # A sample that counts twice, alone and in a set say, has another part than the others.
            return MIXED, 0
        of_shared = np.uint64(0)
        if not owned.all():
            of_shared = contributions[~owned][0]
        out_key = mix(np.asarray(contributions[owned][0]), np.asarray(of_shared))
        return self.owner_of(np.any(members, axis=0)), int(out_key)


def single_owner(owner: Array, dim: int, keepdims: bool = False) -> Array:
    """Return the one owner along ``dim``, beside shared elements; meaningless for several."""
    # Larger than any sample, so that the minimum passes over what is shared. MIXED and the sets
    # are lower than any sample, and win.
    none = np.iinfo(np.int32).max
    lowest = np.where(owner == SHARED, none, owner).min(axis=dim, keepdims=keepdims)
    return np.where(lowest == none, SHARED, lowest).astype(np.int32)


def several_owners(owner: Array, dim: int, keepdims: bool = False) -> Array:
    """Tell whether there is more than one owner along ``dim``, shared elements aside."""
    first = single_owner(owner, dim, True)
    return np.asarray(((owner != first) & (owner != SHARED)).any(axis=dim, keepdims=keepdims))
