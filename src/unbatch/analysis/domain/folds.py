"""Statistics of sets of samples that may be combined over the sets.

A sum over all samples is the sum of the sums over parts of them, and the largest of all is the
largest of those of the parts. A largest sum is neither: it depends on which sample is in which set.
So a statistic of a set remembers here by what it was made, as long as what is done with it leaves
that as it is::

    value                      fold      because
    s = x.view(3, 2).sum(1)    sum       over the two samples of each set
    3 * s                      sum       3 (a + b) = 3 a + 3 b
    3 * s + 1                  affine    summed over sets, 1 counts as often as there are sets
    s.exp()                    none      nor is it one of the exponentials
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from unbatch.analysis.domain.ownership import SHARED, Fold, Ownership

LINEAR = ("sum", "mean")  # names of the reductions that are linear

SUM, AFFINE = "sum", "affine"

# By the name of a reduction that all parts may be put through again, however they are cut.
ASSOCIATIVE = {
    "sum": SUM,
    "mean": SUM,  # of sets that are as large as each other, as their keys agree
    "amax": "max",
    "max": "max",
    "amin": "min",
    "min": "min",
    "prod": "prod",
    "logsumexp": "logsumexp",
    "any": "any",
    "all": "all",
    "nansum": "nansum",
    "norm": "norm",
    "linalg_vector_norm": "norm",
}


def kind_of(name: Any) -> str:
    """Return the kind of fold that a reduction is, by its name; "" for none."""
    if isinstance(name, str):
        return ASSOCIATIVE.get(name, "")
    if not isinstance(name, tuple) or not isinstance(name[0], str):
        return ""
    kind, order = ASSOCIATIVE.get(name[0], ""), name[-1]
    if kind != "norm":
        return kind
    # A norm of order zero counts, and a count of counts is none.
    if order in ("0", "0.0"):
        return ""
    if order == "None":
        order = "2"  # as is not said
    return f"norm {float(order)}"


def continues(x: Ownership, name: Any) -> bool:
    """Tell whether a reduction of statistics of sets is one over the samples of the sets."""
    if is_loss(x):
        return True
    kind = kind_of(name)
    if not kind:
        return False
    return _kind(x) == kind or (kind == SUM and _kind(x) == AFFINE)


def is_sum(x: Ownership) -> bool:
    """Tell whether statistics of sets, if a value has any, are sums over these, and no more."""
    if not x.grouped or is_loss(x):
        return True
    return _kind(x) == SUM


def is_loss(x: Ownership) -> bool:
    """Tell whether a value is made of predictions, of which statistics of sets may be anything."""
    # What a sample uses of the predictions of others counts against it, however it was made.
    return "predictions" in x.sources


def with_reduction(out: Ownership, x: Ownership, name: Any, root: int | None) -> Ownership:
    """Return a reduction of ``x`` with the fold that it is; ``root``: the statistic it defines."""
    kind = kind_of(name)
    if not out.grouped or not kind or is_loss(x):
        return out
    if x.grouped and not continues(x, name):
        return out
    if _kind(x) == AFFINE:
        kind = AFFINE
    return replace(out, fold=_fold(kind, roots_of([x]), root))


def with_linear(
    out: Ownership, operands: Sequence[Ownership], kind: str, root: int | None
) -> Ownership:
    """Return a sum, a difference or a product with factors with the fold that it is.

    ``root``: the statistic that a sum of several samples defines.
    """
    if not out.grouped:
        return out
    grouped = [x for x in operands if x.grouped]
    kinds = {_kind(x) for x in grouped}
    if not kinds <= {SUM, AFFINE}:
        return out
    if kind == "scale":
        if len(grouped) > 1:
            return out
    elif len(operands) < 2 or any((x.owner == SHARED).any() for x in operands):
        # What is added of no sample, a number say, counts once for each of the sets.
        kinds.add(AFFINE)
    of_sum = AFFINE if AFFINE in kinds else SUM
    return replace(out, fold=_fold(of_sum, roots_of(operands), root))


def of_parts(parts: Sequence[Ownership]) -> Fold | None:
    """Return the fold that all parts of a value are that are statistics of sets."""
    grouped = [x for x in parts if x.grouped]
    kinds = {_kind(x) for x in grouped}
    if kinds == {SUM, AFFINE}:
        kinds = {AFFINE}
    if len(kinds) != 1:
        return None
    return _fold(kinds.pop(), roots_of(parts), None)


def _kind(x: Ownership) -> str:
    return "" if x.fold is None else x.fold.kind


def roots_of(xs: Sequence[Ownership]) -> frozenset[int]:
    """Return the statistics that values are, combined or not, and that none of them uses inside."""
    roots: set[int] = set()
    inside: set[int] = set()
    for x in xs:
        of_x = frozenset() if x.fold is None else x.fold.roots
        roots |= of_x
        inside |= x.statistics - of_x
    return frozenset(roots - inside)


def _fold(kind: str, roots: frozenset[int], root: int | None) -> Fold | None:
    if root is not None:
        roots |= {root}
    if not kind or not roots:
        return None
    return Fold(kind, roots)
