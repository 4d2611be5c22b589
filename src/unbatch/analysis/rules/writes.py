"""Rules for writes by index: ``index_put``, ``scatter``, and their relatives.

An index that is the same for every batch says which element is overwritten by which. One that
depends on data may let anything land anywhere along its dim. Lookups are in ``indexing.py``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from unbatch.analysis.domain.folds import is_sum
from unbatch.analysis.domain.ownership import (
    SHARED,
    Array,
    Ownership,
    compress,
    expand,
    mix,
    reshape,
    shared,
    spell_out,
)
from unbatch.analysis.domain.propagation import Propagation
from unbatch.analysis.rules.indexing import as_mask, by_chance, crop, exact, is_mask
from unbatch.analysis.rules.registry import EVERY, RuleContext, filled, mixed, rule

# --- at places that are known ---------------------------------------------------------------------


def scattered(
    algebra: Propagation, base: Ownership, place: Array, src: Ownership, accumulate: bool
) -> Ownership:
    """Return ``base`` with ``src`` written to its flat positions ``place``, one for each element.

    Where ``accumulate``, what lands at a position is added to what is there.
    """
    # Element by element, since any of them may be overwritten by any other.
    base, src = spell_out(base), spell_out(src)
    owner = np.broadcast_to(base.owner, base.shape).reshape(-1).copy()
    key = np.broadcast_to(base.key, base.shape).reshape(-1).copy()
    spots = place.reshape(-1)
    src_owner = np.broadcast_to(src.owner, src.shape).reshape(-1)
    src_key = np.broadcast_to(src.key, src.shape).reshape(-1)
    root = None
    if not accumulate:
        owner[spots], key[spots] = src_owner, src_key
    else:
        sums = np.zeros(len(owner), dtype=bool)
        of_sets = is_sum(base) and is_sum(src)
        for run in _equal_runs(spots):
            # All that lands at one place, and what was there: a sum over their samples.
            spot = spots[run[0]]
            owners = np.append(src_owner[run], owner[spot])[None]
            keys = np.append(src_key[run], key[spot])[None]
            sum_owner, sum_key, several = algebra.sets.combine(owners, keys, of_sets)
            owner[spot], key[spot] = sum_owner[0], sum_key[0]
            sums[spot] = several
        if sums.any():
            owner = np.where(sums, algebra.across_sets(owner, [base, src]), owner)
            root = algebra.statistic("sum", owner, owner.size, base.sources | src.sources)
    owner, key = owner.reshape(base.shape), key.reshape(base.shape)
    out = algebra.result(base.shape, owner, key, [base, src], "scattered", root)
    return compress(out)


def _equal_runs(spots: Array) -> list[Array]:
    """The indices of equal entries of ``spots``, one array for each value that occurs."""
    if not len(spots):
        return []
    # [5, 2, 5] gives [1] and [0, 2]: what lands at one place is added up in one go, as by ``sum``.
    order = np.argsort(spots, kind="stable")
    return np.split(order, np.flatnonzero(np.diff(spots[order])) + 1)


def _positions(x: Ownership) -> Array:
    """The flat position of every element."""
    return np.arange(math.prod(x.shape)).reshape(x.shape)


@rule("slice_scatter", "select_scatter", "diagonal_scatter", counted=EVERY)
def scatter_view(call: RuleContext) -> Ownership:
    """A copy in which a view has been overwritten."""
    x = call["self"]
    place = _view(call, _positions(x))
    return scattered(call.algebra, x, place, expand(call["src"], place.shape), accumulate=False)


def _view(call: RuleContext, place: Array) -> Array:
    """The positions that a view shows, which are those to be overwritten."""
    if call.name == "select_scatter":
        entry = torch.from_numpy(place).select(call["dim"], call["index"])
        return entry.contiguous().numpy()
    if call.name == "diagonal_scatter":
        dims = (call["offset"], call["dim1"], call["dim2"])
        return torch.from_numpy(place).diagonal(*dims).contiguous().numpy()
    dim = call["dim"] or 0
    where = [slice(None)] * place.ndim
    where[dim] = slice(call["start"], call["end"], call["step"] or 1)
    return np.ascontiguousarray(place[tuple(where)])


# --- along one dim --------------------------------------------------------------------------------


ADDING = ("scatter_add", "index_add", "scatter_reduce", "index_reduce")
PUTS = ("index_put", "_unsafe_index_put", "_index_put_impl")


@rule(
    "scatter scatter_add scatter_reduce index_add index_copy index_put index_fill "
    "_unsafe_index_put index_reduce _index_put_impl masked_scatter put",
    counted="dim index indices value",
)
def scatter(call: RuleContext) -> Ownership:
    """Values written to (or added at) the places that an index says.

    ``index_add`` and its like have one index for whole slices; ``scatter`` has one for each
    element.
    """
    x, index = call["self"], call["index"]
    accumulate = call.name in ADDING or bool(call["accumulate"]) or bool(call["reduce"])
    if call.name in PUTS:
        return _index_put(call, x, accumulate)
    # ``put`` and ``masked_scatter`` count through all elements: not followed.
    if call["dim"] is None:
        return mixed(call, call.shape, "scattered")
    dim = call.dims()[0]
    by_slice = call.name.startswith("index_")
    numbers: Any = call.values.get("index")
    # Without a tensor a number is written, the same at each place.
    src = _source(call, () if by_slice else index.shape)
    chosen = by_chance(x, index, numbers) and not src.depends_on_batch
    if chosen or not exact(call, index, numbers):
        return _scatter_anywhere(call, dim, src, by_slice)
    if by_slice:
        place = _positions(x).take(numbers.reshape(-1), axis=dim)
    else:
        place = np.take_along_axis(crop(_positions(x), index.shape, dim), numbers, dim)
        src = _head(src, index.shape)
    return scattered(call.algebra, x, place, expand(src, place.shape), accumulate)


def _source(call: RuleContext, shape: Sequence[int]) -> Ownership:
    """What is written: a tensor, or a number that stands for a tensor of ``shape``."""
    # With the name of the op and its factor: the sum of an element and of twice an element are
    # different functions of it.
    sources = call.named("src", "source", "value")
    if not sources:
        return filled(shape, ("value", repr(call["value"])))
    return sources[0].with_key((call.name, repr(call["alpha"]), repr(call["reduce"])))


def _head(x: Ownership, shape: Sequence[int]) -> Ownership:
    """The first elements along each dim, as many as an index has; a scalar stays one."""
    if not x.shape:
        return x
    return replace(x, shape=tuple(shape), owner=crop(x.owner, shape), key=crop(x.key, shape))


def _scatter_anywhere(call: RuleContext, dim: int, src: Ownership, by_slice: bool) -> Ownership:
    """Any source element along ``dim`` may land anywhere along it.

    So each element there depends on all pairs of an index and what it places.
    """
    a, x, index = call.algebra, call["self"], call["index"]
    if by_slice:
        shape = [1] * len(x.shape)
        if index.shape:
            shape[dim] = index.shape[0]
        index = reshape(index, shape)
    else:
        src = _head(src, index.shape)
    pairs = a.pointwise("place", index, src)
    # ``pairs`` has the length of the index along ``dim``; what may land has that of ``x``.
    landed = a.scan("landing", pairs, [dim], "scattered")
    shape = list(landed.shape)
    shape[dim] = x.shape[dim]
    landed = replace(landed, shape=tuple(shape))
    if by_slice:
        landed = expand(landed, x.shape)
    elif landed.shape != x.shape:
        landed = _pad_to(landed, x.shape)
    return a.pointwise(call.title, x, landed)


def _pad_to(x: Ownership, sizes: Sequence[int]) -> Ownership:
    """A source that covers only the head of some dims: beyond it nothing lands."""
    # A write of three columns into five: nothing of the source can land in the other two.
    x = spell_out(x)
    widths = [(0, size - old) for size, old in zip(sizes, x.shape, strict=True)]
    owner = np.pad(np.broadcast_to(x.owner, x.shape), widths, constant_values=SHARED)
    key = np.pad(np.broadcast_to(x.key, x.shape), widths, constant_values=0)
    return compress(replace(x, shape=tuple(sizes), owner=owner, key=key))


# --- by a list of indices -------------------------------------------------------------------------


def _index_put(call: RuleContext, x: Ownership, accumulate: bool) -> Ownership:
    """``x[indices] = values``."""
    indices, values = call["indices"], call["values"]
    numbers = [as_mask(array) for array in call.values["indices"]]
    fixed, loose = _split(call, numbers)
    if not loose:
        where: list[Any] = [slice(None)] * len(indices)
        for d in fixed:
            where[d] = numbers[d]
        # Numpy's indexing of positions says where PyTorch's would write.
        place = _positions(x)[tuple(where)]
        return scattered(call.algebra, x, place, expand(values, place.shape), accumulate)
    if len(indices) == 1 and is_mask(numbers[0]) and not values.shape:
        # A scalar where a mask says so: place by place, whatever the mask is.
        mask = indices[0]
        mask = reshape(mask, (*mask.shape, *[1] * (len(x.shape) - len(mask.shape))))
        return call.algebra.pointwise("where", x, mask, values)
    if len(fixed) == 1 and _are_vectors(call, numbers, [*fixed, *loose]):
        return _put_anywhere(call, fixed[0], numbers[fixed[0]].reshape(-1), loose, accumulate)
    return mixed(call, call.shape, "scattered")


def _split(call: RuleContext, numbers: list[Any]) -> tuple[list[int], list[int]]:
    """The dims whose indices are followed, and those whose indices may hit anything."""
    fixed = []
    loose = []
    for d, index in enumerate(call["indices"]):
        if index is None:
            continue
        if exact(call, index, numbers[d]):
            fixed.append(d)
        else:
            loose.append(d)
    return fixed, loose


def _are_vectors(call: RuleContext, numbers: list[Any], dims: list[int]) -> bool:
    """Tell whether the indices at ``dims`` are numbers (and no masks), at most in a row."""
    rank = 0
    for d in dims:
        if is_mask(numbers[d]):
            return False
        rank = max(rank, len(call["indices"][d].shape))
    return rank == 1


def _put_anywhere(
    call: RuleContext, dim: int, rows: Array, loose: list[int], accumulate: bool
) -> Ownership:
    """A vector of values, at ``rows`` along ``dim``, and anywhere along the dims in ``loose``.

    An example, ``x[arange(n), y] = 1`` for labels ``y``: row n depends on label n, as a whole.
    """
    a, x, values = call.algebra, call["self"], call["values"]
    operands = [call["indices"][d] for d in loose]
    if len(values.shape) > 1:
        # What decides the place still counts as used by samples.
        a.pointwise("place", *operands)
        return mixed(call, call.shape, "scattered")
    landing = expand(a.pointwise("place", *operands, values), (len(rows),))
    # Of several values that land at one place the last stays, unless they are added up or all one.
    if not accumulate and math.prod(values.shape) > 1:
        in_turn = _in_turn(landing, rows)
        if in_turn is None:
            return mixed(call, call.shape, "scattered")
        landing = in_turn
    by_row = scattered(a, shared((x.shape[dim],), "nothing"), rows, landing, accumulate=True)
    # By row, and plain along the loose dims: each entry there may be hit, by its index.
    column = [1] * len(x.shape)
    column[dim] = x.shape[dim]
    by_row = reshape(by_row, column)
    shape = list(column)
    for d in loose:
        shape[d] = x.shape[d]
    return a.pointwise(call.title, x, replace(by_row, shape=tuple(shape)))


def _in_turn(landing: Ownership, rows: Array) -> Ownership | None:
    """What is written to ``rows``, one after the other, by its turn among those of the same row.

    None where values of several samples are written to one row.
    """
    landing = spell_out(landing)
    turns = np.zeros(len(rows), dtype=np.uint64)
    for run in _equal_runs(rows):
        if len(run) > 1 and len(np.unique(landing.owner[run])) > 1:
            return None
        turns[run] = np.arange(len(run))
    return replace(landing, key=mix(landing.key, turns))
