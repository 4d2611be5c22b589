"""Ownership of what a view shows after its memory was written to through another view.

Which views share memory, and where they overlap, is geometry (``capture/aliasing.py``).
"""

from __future__ import annotations

import numpy as np

from unbatch.analysis.domain.ownership import (
    MIXED,
    Array,
    Ownership,
    code,
    compress,
    spell_out,
)
from unbatch.analysis.domain.propagation import Propagation

HOW = "written through a view"  # samples are mixed where they come together in memory


def is_whole(hit: Array, before: Ownership, update: Ownership) -> bool:
    """Tell whether a view shows all of what was written, in the same order."""
    return before.shape == update.shape and np.array_equal(hit.reshape(-1), np.arange(hit.size))


def scrambled_bytes(algebra: Propagation, before: Ownership, update: Ownership) -> Ownership:
    """Return the ownership of a view of another item size, whose bytes are not followed."""
    ones = [1] * len(before.shape)
    owner = np.full(ones, MIXED, dtype=np.int32)
    key = np.broadcast_to(code("bytes"), ones)
    return algebra.result(before.shape, owner, key, [before, update], HOW)


def overwritten(
    algebra: Propagation, before: Ownership, update: Ownership, hit: Array
) -> Ownership:
    """Return the ownership of a view after a write.

    ``hit``: for each of its entries the place in what was written (``update``), -1 where it is not.
    """
    # Element by element, since a view may show any part of what was written, in any order.
    new_owner = np.broadcast_to(update.owner, update.shape).reshape(-1)
    new_key = np.broadcast_to(update.key, update.shape).reshape(-1)
    full = spell_out(before)
    old_owner = np.broadcast_to(full.owner, before.shape)
    old_key = np.broadcast_to(full.key, before.shape)
    # Where nothing was hit the index -1 takes the last element, and ``where`` drops it again.
    owner = np.where(hit >= 0, new_owner[hit], old_owner).astype(np.int32)
    key = np.where(hit >= 0, new_key[hit], old_key)
    return compress(algebra.result(before.shape, owner, key, [before, update], HOW))
