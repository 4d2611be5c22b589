"""How predictions enter a value: through which scalars, with which weights, and as a sum or not.

Here live three fields of ``Ownership``, which matter for a loss alone. ``atoms``: the scalars per
sample through which predictions enter. ``additive``: the value is a sum over samples of such
scalars. ``weighted``: its elements carry factors per sample. Owners and keys are in
``propagation.py``.

An example, the sum of squares with a weight per sample, ``(w * (f - y).pow(2).sum(1)).sum()``::

    value                    fields                because
    squares = (f - y) ** 2   no atom yet           a sample has several elements
    l = squares.sum(1)       atoms {l}             one element each, the same function
    w * l                    atoms {l}, weighted   w differs between samples, is no prediction
    (w * l).sum()            .., additive          a linear reduction over the samples

The weight is left out of the keys, so that the losses still are one function. That is right as
long as all that follows is linear. Where it is not, the weight is *absorbed*: the owner enters
the key, and the samples differ from there on.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np

from unbatch.analysis.domain.dependence import DependenceRecord
from unbatch.analysis.domain.ownership import Array, Ownership, code, digest, mix

# --- weights of samples ---------------------------------------------------------------------------


def sample_weight(operands: Sequence[Ownership], samples: int) -> int | None:
    """Return which of two operands is a constant factor that differs from sample to sample."""
    if len(operands) != 2:
        return None
    # At most one of them can be: a weight has no predictions, and what it weighs has.
    left, right = operands
    if _weighs(left, right, samples):
        return 0
    if _weighs(right, left, samples):
        return 1
    return None


def _weighs(weight: Ownership, value: Ownership, samples: int) -> bool:
    # Constant for the loss, and an owner for the value only: a weight is shared, with N entries
    # along the axis of the samples.
    if "predictions" in weight.sources or "predictions" not in value.sources:
        return False
    if not value.owned or weight.owned or weight.mixed:
        return False
    dim = value.sample_dim()
    if dim is None:
        return False
    dim += len(weight.shape) - len(value.shape)  # broadcasting aligns shapes at their ends
    if dim < 0 or math.prod(weight.shape) != samples:
        return False
    return weight.shape[dim] == samples and weight.plain(dim)


def weighted_key(owner: Array, key: Array) -> Array:
    """Return keys in which the owner takes part."""
    by_sample = np.broadcast_to(owner, key.shape).astype(np.uint64)
    return mix(key, mix(by_sample, code("weight")))


def absorb(x: Ownership) -> Ownership:
    """Return ``x`` with its factors per sample, if it has any, as part of the function."""
    # An example: (w_n l_n)^2 is another function for each n; with w_n in the key that shows.
    if not x.weighted:
        return x
    return replace(x, key=weighted_key(x.owner, x.key), weighted=False)


def absorb_unless_linear(operands: Sequence[Ownership], kind: str) -> list[Ownership]:
    """Absorb weights where an operation of this kind is not linear in what they multiply."""
    if kind in ("add", "sub"):
        return list(operands)
    if kind == "scale" and len(_entering(operands)) <= 1:
        # Linear in the one operand that depends on predictions, the others being its factors.
        return list(operands)
    return [absorb(x) for x in operands]


def any_weighted(xs: Iterable[Ownership]) -> bool:
    """Tell whether any value carries factors per sample."""
    return any(x.weighted for x in xs)


# --- scalars, and sums of them --------------------------------------------------------------------


def _entering(operands: Sequence[Ownership]) -> list[Ownership]:
    """The operands through which predictions enter."""
    return [x for x in operands if "predictions" in x.sources]


def one_element_each(x: Ownership) -> bool:
    """Tell whether there is one element for each sample that occurs, and no others."""
    return x.owned and math.prod(x.shape) == x.owner.size == len(np.unique(x.owner))


def with_atom(out: Ownership, operands: Sequence[Ownership], record: DependenceRecord) -> Ownership:
    """Return ``out`` as the scalar of its samples, if it is one element each, the same function.

    What entered before is forgotten: a loss of many logits enters through one number per sample. A
    function of such a number alone adds none: where the number is known, so is the function.
    """
    if "predictions" not in out.sources or out.mixed or not one_element_each(out):
        return out
    if record.of_predictions(out.statistics):
        return out
    # Scalars of different functions are not one scalar of the samples.
    keys = np.unique(out.key)
    if len(keys) != 1 or _is_one_scalar(operands):
        return out
    return replace(out, atoms=frozenset([int(keys[0])]))


def _is_one_scalar(operands: Sequence[Ownership]) -> bool:
    """Tell whether there is one operand, which is a scalar of the samples itself."""
    if len(operands) != 1:
        return False
    (x,) = operands
    return one_element_each(x) and len(x.atoms) == 1 and not x.weighted


def of_linear(
    out: Ownership,
    operands: Sequence[Ownership],
    kind: str,
    weighted: bool,
    record: DependenceRecord,
) -> Ownership:
    """Return a sum, a difference or a product with factors, with how predictions enter it.

    It is additive if every operand through which predictions enter is so, or (in a sum) belongs
    to one sample alone. ``weighted``: one of the operands is a weight per sample.
    """
    entering = _entering(operands)
    if not entering or (kind == "scale" and len(entering) > 1):
        # No prediction enters, or a product of predictions, which is linear in neither.
        return replace(out, weighted=False)
    if kind == "scale":
        record.factors |= _statistics_of_factors(operands)
    additive = not out.owned and all(_adds_up(x, kind, record) for x in entering)
    weighted = weighted or any_weighted(entering)
    if weighted and not additive and kind != "scale" and len(operands) > 1:
        # The terms may have different weights, and then there is no common factor.
        return absorb(replace(out, weighted=True))
    atoms = out.atoms
    if additive and not weighted and len(entering) > 1:
        atoms = _sum_of_atoms(out, entering, kind) or atoms
    return replace(out, additive=additive, weighted=weighted, atoms=atoms)


def _statistics_of_factors(operands: Sequence[Ownership]) -> set[int]:
    """The statistics by which something of the predictions is multiplied."""
    statistics: set[int] = set()
    for x in operands:
        if "predictions" not in x.sources:
            statistics |= x.statistics
    return statistics


def _sum_of_atoms(out: Ownership, terms: Sequence[Ownership], kind: str) -> frozenset[int]:
    """The one scalar of a sum of sums over the same samples, if each of these has one.

    sum_n a_n + sum_n b_n = sum_n (a_n + b_n): per sample it is a_n + b_n, again one. Where only
    some samples have a b_n, it is not one function of a sample.
    """
    if len({_owners(x) for x in terms}) > 1:
        return frozenset()
    # With two scalars in one term there is no a_n, and the sum keeps all of them.
    if any(len(x.atoms) != 1 for x in terms):
        return frozenset()
    # By the keys of the terms and not by their scalars, as a + b and a + 2 b are two scalars.
    if kind == "add":
        names = sorted(digest(x) for x in terms)
    else:
        names = [digest(out)]
    return frozenset([int(code("sum of terms", *names))])


def _owners(x: Ownership) -> bytes:
    """Return all owners of elements, sorted."""
    return np.unique(x.owner).tobytes()


def _adds_up(x: Ownership, kind: str, record: DependenceRecord) -> bool:
    """Tell whether a term is a sum over samples, or (not times a factor) of one sample alone."""
    if x.additive:
        return True
    return kind != "scale" and not x.mixed and not record.of_predictions(x.statistics)


def of_reduction(
    out: Ownership, x: Ownership, combined: bool, name: tuple[bool, bool], record: DependenceRecord
) -> Ownership:
    """Return a reduction of ``x`` with how predictions enter it.

    ``combined``: several samples were. ``name``: whether the reduction is linear, and a monoid
    (which can be taken sample by sample first). A monoid over everything is one over the samples
    of one scalar each, whatever ``x`` is. If ``x`` is that scalar already, it keeps the name it
    has.
    """
    linear, monoid = name
    # What is summed depends on one sample each, and on no other through a statistic.
    separate = combined and not x.mixed and not record.of_predictions(x.statistics)
    atoms = out.atoms
    if separate and monoid and not out.mixed and math.prod(out.shape) == 1:
        is_scalar = one_element_each(x) and len(x.atoms) == 1
        if not is_scalar:
            atoms = frozenset([int(out.key.reshape(-1)[0])])
    additive = linear and (x.additive or separate)
    return replace(out, atoms=atoms, additive=additive, weighted=x.weighted and linear)
