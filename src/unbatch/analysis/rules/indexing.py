"""Rules for lookups by index: ``x[index]``, ``gather``, and shapes that depend on data.

An index that is the same for every batch is *followed*: its numbers say which element goes where.
One that depends on data may hit anything along its dim, so what it yields depends on all that lies
along it. Writes by index are in ``writes.py``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from unbatch.analysis.domain.ownership import (
    SHARED,
    Array,
    Ownership,
    code,
    compress,
    digest,
    expand,
    follow_samples,
    is_sample,
    mix,
    moved,
    reshape,
    shared,
    spell_out,
    total,
)
from unbatch.analysis.domain.propagation import Propagation
from unbatch.analysis.rules.registry import (
    EVERY,
    RuleContext,
    all_mixed,
    all_shared,
    known_for_every_batch,
    mixed,
    rule,
    shared_outputs,
    standing_for,
)

# --- which indices are followed -------------------------------------------------------------------


def exact(call: RuleContext, index: Ownership, values: Any) -> bool:
    """Tell whether an index is the same for every batch, and its numbers ``values`` are known.

    Into predictions an index counts as the same if it comes from what is constant for the loss.
    """
    if values is None:
        return False
    # ``log_p[arange(n), y]`` in a loss: the labels are what they are, so the entries that they
    # pick can be followed. In a forward pass the same lookup depends on its indices.
    into_predictions = "predictions" in call["self"].sources
    if into_predictions and index.sources and call.algebra.is_constant(index):
        return True
    changing = {"inputs", "targets", "predictions", "internals"}
    return not index.depends_on_batch and not index.sources & changing


def by_chance(x: Ownership, index: Ownership, values: Any) -> bool:
    """Tell whether chance chooses rows of a table, as the time of a diffusion.

    It does so by one law for all samples, whatever it chose this time.
    """
    return "noise" in index.sources and not x.depends_on_batch and not is_mask(values)


def own_choice(x: Ownership, dim: int, index: Ownership) -> bool:
    """Tell whether samples choose among what is theirs, as a label does among classes.

    Whatever they choose is theirs then, and the numbers of the index do not matter.
    """
    # One owner along ``dim``, and no element shared: any choice is the sample's own.
    return index.owned and not index.mixed and x.owner.shape[dim] == 1 and x.all_owned


def any_entry(algebra: Propagation, x: Ownership, dim: int) -> Ownership:
    """Return what may be any entry along ``dim``: samples that look it up use all of them."""
    scanned = algebra.scan("lookup", x, [dim], "looked up")
    # One of all, so no more numbers than the index has: by its keys these are counted.
    return standing_for(replace(scanned, ranked=x.ranked), x)


def as_mask(values: Any) -> Any:
    """Return the numbers of an index, as booleans if they are bytes (PyTorch's older masks)."""
    if values is not None and values.dtype == np.uint8:
        return values.astype(bool)
    return values


def is_mask(values: Any) -> bool:
    """Tell whether an index is known to be a mask."""
    return values is not None and values.dtype == bool


# The key of an index that says at which place of the batch its own sample lies; and as it is once
# the integers have been told from the mask that they were made of.
PLACE = code("own place")
OWN_PLACE = mix(PLACE, code([("type", "torch.int64")]))


def is_own_place(x: Ownership, dim: int, index: Ownership) -> bool:
    """Tell whether each entry of an index picks along ``dim`` what is its own sample's."""
    if not index.key.size or not (index.key == OWN_PLACE).all():
        return False
    return bool(is_sample(_owners(index)).all()) and x.sample_dim() == dim


def _owners(x: Ownership) -> Array:
    return np.broadcast_to(spell_out(x).owner, x.shape)


# --- lookups by a list of indices -----------------------------------------------------------------


@dataclass(frozen=True)
class FollowedIndex:
    """The numbers of an index, non-negative, along ``dim`` of the value."""

    dim: int
    numbers: Array

    @property
    def name(self) -> tuple[int, int]:
        """What stands for the numbers in a key."""
        return self.dim, code(self.numbers.shape, self.numbers.tobytes()).item()


@dataclass(frozen=True)
class Selection:
    """The value and the indices of ``x[indices]``, sorted by what is known about them.

    ``ranks``: of the index at each dim of ``x``, None for a dim without. ``followed``: the indices
    whose numbers are known; ``loose``: the others, whose dims of ``x`` have been scanned.
    """

    x: Ownership
    ranks: list[int | None]
    followed: list[FollowedIndex]
    loose: list[Ownership]

    @property
    def indexed_dims(self) -> list[int]:
        """The dims of ``x`` that have an index."""
        return [d for d, rank in enumerate(self.ranks) if rank is not None]

    @property
    def fixed_dims(self) -> list[int]:
        """The dims whose index is followed. An empty index selects nothing, and is left out."""
        return [index.dim for index in self.followed if index.numbers.size]

    @property
    def rank(self) -> int:
        """How many dims the indices have, broadcast."""
        rank = 0
        for dim_rank in self.ranks:
            rank = max(rank, dim_rank or 0)
        return rank

    @property
    def position(self) -> int:
        """Where numpy and PyTorch put the dims of the indices.

        In place of the dims that are indexed, if these are adjacent; otherwise at the front.
        """
        dims = self.indexed_dims
        if dims and dims == list(range(dims[0], dims[-1] + 1)):
            return dims[0]
        return 0

    def where(self, dims: list[int]) -> tuple[Any, ...]:
        """Return an index for owners and keys: by the numbers along ``dims``.

        Along the other dims with an index all entries are alike, and the first stands for them.
        """
        first = np.zeros((1,) * self.rank, dtype=np.int64)
        where: list[Any] = [slice(None)] * len(self.ranks)
        for d in self.indexed_dims:
            where[d] = first
        for index in self.followed:
            if index.dim in dims:
                where[index.dim] = index.numbers
        return tuple(where)


@rule("index _unsafe_index index_select gather take_along_dim take", counted=EVERY)
def lookup(call: RuleContext) -> Ownership:
    """Elements of a value at the places that indices say."""
    x = call["self"]
    if call.name == "gather":
        return _gather(call)
    if call.name == "take":
        flat = reshape(x, (math.prod(x.shape),))
        return indexed(call, flat, [call["index"]], [call.values.get("index")])
    if call.name == "index_select":
        before = [None] * call.dims()[0]
        indices = [*before, call["index"]]
        return indexed(call, x, indices, [*before, call.values.get("index")])
    return indexed(call, x, list(call["indices"]), list(call.values["indices"]))


def indexed(call: RuleContext, x: Ownership, indices: list[Any], values: list[Any]) -> Ownership:
    """Return ``x[indices]``, with the numbers of the indices in ``values`` where known."""
    if len(indices) == 1:
        own = _chosen_by_samples(call, x, indices[0], values[0])
        if own is not None:
            return own
    # First all indices are sorted, since where the dims of the result go depends on all of them.
    selection = _sorted_by_knowledge(call, x, indices, values)
    if selection is not None:
        return _selected(call, selection)
    chosen = _chosen_constants(call, x, indices[0], values[0])
    if chosen is not None:
        return chosen
    # A mask that depends on data: how many elements there are does, too.
    if call.depends_on_batch:
        return mixed(call, call.shape, "data-dependent shape")
    return shared(call.shape, call.title)


def _sorted_by_knowledge(
    call: RuleContext, x: Ownership, indices: list[Any], values: list[Any]
) -> Selection | None:
    """Go through the indices, with the dims of ``x`` that they act on; None for a loose mask."""
    ranks: list[int | None] = []
    followed: list[FollowedIndex] = []
    loose: list[Ownership] = []
    for index, number in zip(indices, values, strict=True):
        dim = len(ranks)
        if index is None:
            ranks.append(None)
            continue
        numbers = as_mask(number)
        if is_own_place(x, dim, index):
            # Whatever the numbers are on other batches: each says where its own sample lies.
            x = _with_choice(call, x, index)
            followed.append(FollowedIndex(dim, _owners(index).astype(np.int64)))
            ranks.append(len(index.shape))
            continue
        chosen = own_choice(x, dim, index) or by_chance(x, index, numbers)
        if exact(call, index, numbers) and not chosen:
            x = _with_choice(call, x, index)
            # A mask of several dims acts as one index along each of them. Negative numbers count
            # from the end.
            parts = np.nonzero(numbers) if is_mask(numbers) else (numbers,)
            for part in parts:
                size = max(x.shape[len(ranks)], 1)
                followed.append(FollowedIndex(len(ranks), np.asarray(part) % size))
                ranks.append(np.ndim(part))
        elif is_mask(numbers):
            return None
        else:
            # Any entry along the dim may be hit, so each result depends on all of them.
            x = any_entry(call.algebra, x, dim)
            loose.append(index)
            ranks.append(len(index.shape))
    return Selection(x, ranks, followed, loose)


def _with_choice(call: RuleContext, x: Ownership, index: Ownership) -> Ownership:
    """What is selected by constants of the batch depends on these constants, as on weights."""
    # Which words count in a loss, say, is read off a mask of targets. It acts as a factor of zero
    # or one does: entered among the factors, it leaves the loss a weighted sum.
    if not index.depends_on_batch:
        return x
    root = call.algebra.statistic("selected", np.full(1, SHARED), 1, index.sources)
    if root is None:
        return x
    call.algebra.record.factors.add(root)
    return replace(x, statistics=x.statistics | {root})


def _selected(call: RuleContext, selection: Selection) -> Ownership:
    """The elements that are selected.

    An example, ``x[:, index]`` for ``x`` of shape [n, o] with a followed index of shape [2, 3]:
    the result has shape [n, 2, 3]. If ``o`` is plain, so are the two new dims, and the key is
    renamed after the numbers of the index. If it is explicit (samples lie there), owners and keys
    are looked up.
    """
    x, rank, before = selection.x, selection.rank, selection.position
    dims = selection.fixed_dims
    numbers = []
    shapes = []
    for followed in selection.followed:
        if followed.dim in dims:
            numbers.append(followed.numbers)
            shapes.append(followed.numbers.shape)
    # The dims of the index, as far as they are known to differ: with loose indices alone there are
    # none, and ``pointwise`` brings them in below.
    picked = np.broadcast_shapes(*shapes)
    picked = (1,) * (rank - len(picked)) + picked
    shape = (*call.shape[:before], *picked, *call.shape[before + rank :])
    if x.explicit(dims):
        x = spell_out(x, dims)
        where = selection.where(dims)
        out = replace(x, shape=shape, owner=x.owner[where], key=x.key[where])
        out = compress(out, range(before, before + rank))
    else:
        where = selection.where([])
        out = replace(x, shape=shape, owner=x.owner[where], key=x.key[where])
        if selection.followed:
            # Which entries were picked is part of what an index means now.
            names = [index.name for index in selection.followed]
            out = replace(out, key=mix(out.key, code("index", names)))
        if numbers:
            out = _repeated(out, numbers, before + rank)
    if not selection.loose:
        return out
    # What a loose index says is part of the result, at the place of the index.
    ones_after = [1] * (len(shape) - before - rank)
    operands = []
    # Aligned with the dims of the index in ``out``, as broadcasting would not do by itself.
    for index in selection.loose:
        ones_before = [1] * (rank - len(index.shape))
        operands.append(reshape(index, (*ones_before, *index.shape, *ones_after)))
    return call.algebra.pointwise("lookup", out, *operands)


def _repeated(out: Ownership, numbers: list[Array], end: int) -> Ownership:
    """``out`` with the dims of an index explicit along which it repeats itself.

    The elements there are equal, as in an expanded value. The dims of the index end before ``end``.
    """
    # An example: ``x[:, [3, 3]]`` with plain features. By their index the two columns would count
    # as different functions, and they are one.
    owner, key = out.owner, out.key
    broadcast = np.broadcast_arrays(*numbers)
    for d in range(-broadcast[0].ndim, 0):
        if broadcast[0].shape[d] > 1 and _all_constant_along(broadcast, d):
            stored = list(key.shape)
            stored[end + d] = out.shape[end + d]
            owner, key = np.broadcast_to(owner, stored), np.broadcast_to(key, stored)
    return replace(out, owner=owner, key=key)


def _all_constant_along(arrays: Sequence[Array], dim: int) -> bool:
    """Tell whether each array repeats itself along a dim: then so does what they pick together."""
    return all(_constant_along(array, dim) for array in arrays)


def _constant_along(array: Array, dim: int) -> bool:
    """Tell whether all entries along a dim are equal."""
    return bool((array == array.take([0], axis=dim)).all())


def _chosen_by_samples(
    call: RuleContext, x: Ownership, mask: Ownership | None, numbers: Any
) -> Ownership | None:
    """Return what samples choose of their own by masks of their own, where that is followed.

    The mask is a constant of the loss, and has the first dims of ``x``.
    """
    a, choices = call.algebra, call.algebra.choices
    numbers = as_mask(numbers)
    if choices is None or mask is None or not is_mask(numbers) or not a.is_constant(mask):
        return None
    rank = len(mask.shape)
    if not mask.owned or x.shape[:rank] != mask.shape:
        return None
    candidates = spell_out(_beside_mask(call, x, mask), range(rank))
    if candidates.explicit(range(rank, len(x.shape))):
        return None
    owner = np.broadcast_to(candidates.owner, candidates.key.shape).reshape(numbers.shape)
    if not is_sample(owner).all():
        return None
    key = candidates.key.reshape(numbers.shape)
    owners, keys = choices.chosen(owner, key, numbers)
    stored = (len(owners), *[1] * (len(x.shape) - rank))
    return replace(
        candidates, shape=call.shape, owner=owners.reshape(stored), key=keys.reshape(stored)
    )


def _beside_mask(call: RuleContext, x: Ownership, mask: Ownership) -> Ownership:
    """Return each entry of a value with that of the mask of its first dims."""
    beside = reshape(mask, (*mask.shape, *[1] * (len(x.shape) - len(mask.shape))))
    return call.algebra.pointwise("chosen", x, beside)


def _chosen_constants(
    call: RuleContext, x: Ownership, mask: Ownership | None, numbers: Any
) -> Ownership | None:
    """Return what a mask selects, element by element, where both are constants of a loss.

    Labels without those that only fill up, say. An element is the first, second, .. that is chosen
    of what belongs to its owner. None where it is not so.
    """
    a = call.algebra
    if mask is None or not is_mask(numbers) or x.shape[: len(mask.shape)] != mask.shape:
        return None
    if not a.constant or not (a.is_constant(x) and a.is_constant(mask)):
        return None
    candidates = spell_out(_beside_mask(call, x, mask))
    owner = np.broadcast_to(candidates.owner, candidates.shape)
    key = np.broadcast_to(candidates.key, candidates.shape)
    owners = owner[numbers]
    keys = np.zeros(owners.shape, dtype=np.uint64)
    for one in np.unique(owners).tolist():
        own = owners == one
        order = np.arange(np.count_nonzero(own), dtype=np.uint64)
        keys[own] = mix(total(key[owner == one], 0), order)
    return replace(candidates, shape=call.shape, owner=owners, key=keys)


# --- lookups along one dim ------------------------------------------------------------------------


def _gather(call: RuleContext) -> Ownership:
    """``x[index[i], j]`` at the place [i, j]: the other dims are those of the index, cropped."""
    x, index, dim = call["self"], call["index"], call.dims()[0]
    numbers: Any = None
    if not own_choice(x, dim, index):
        numbers = call.values.get("index")
    follows = exact(call, index, numbers) and not by_chance(x, index, numbers)
    # With samples somewhere among the elements, each place is looked up.
    if follows and x.explicit(range(len(x.shape))):

        def run(place: Array) -> Array:
            return np.take_along_axis(crop(place, index.shape, dim), numbers, dim)

        return moved(x, run, call.shape)
    # Along ``dim`` one entry is left that depends on all; it is combined with the index.
    scanned = any_entry(call.algebra, x, dim)
    shape = list(index.shape)
    shape[dim] = 1
    out = replace(
        scanned,
        shape=tuple(shape),
        owner=crop(scanned.owner, index.shape, dim),
        key=crop(scanned.key, index.shape, dim),
    )
    if follows:
        out = replace(out, shape=call.shape)
        index = index.with_key(numbers.tobytes())
    return call.algebra.pointwise("lookup", out, index)


def crop(array: Array, shape: Sequence[int], dim: int | None = None) -> Array:
    """Return the first entries along each dim, as many as ``shape`` has; all along ``dim``."""
    where = [slice(size) for size in shape]
    if dim is not None:
        where[dim] = slice(None)
    return array[tuple(where)]


def _places_of_chosen(call: RuleContext) -> Ownership | None:
    """Return ``nonzero(mask)`` where the mask is a constant of a loss, each row a sample's.

    Along the samples it says where the own sample lies, on any batch. Along other dims an entry is
    the first, second, .. place of what belongs to its owner. None where it is not so.
    """
    a, mask, numbers = call.algebra, call["self"], call.values.get("self")
    if numbers is None or not a.constant or not a.is_constant(mask):
        return None
    spelled = spell_out(mask)
    owner = np.broadcast_to(spelled.owner, mask.shape)
    key = np.broadcast_to(spelled.key, mask.shape)
    chosen = np.asarray(numbers).astype(bool)
    if not is_sample(owner).all() or len(call.shape) != 2:
        return None
    keys = np.zeros(call.shape, dtype=np.uint64)
    for d in range(call.shape[1]):
        if owner.shape[d] == a.samples and follow_samples(owner, d, a.samples):
            keys[:, d] = PLACE
            continue
        for one in np.unique(owner[chosen]).tolist():
            rows = np.flatnonzero(owner[chosen] == one)
            order = np.arange(len(rows), dtype=np.uint64)
            of_mask = mix(total(key[owner == one], 0), code("place", d))
            keys[rows, d] = mix(of_mask, order)
    owners = np.broadcast_to(owner[chosen][:, None], call.shape)
    return replace(spelled, shape=call.shape, owner=owners, key=keys)


def _masked_select(call: RuleContext) -> Ownership | None:
    """Return what a mask chooses of a value, flat; None where it is not known."""
    x, mask, numbers = call["self"], call["mask"], as_mask(call.values.get("mask"))
    if is_mask(numbers) and np.broadcast_shapes(x.shape, mask.shape) == x.shape:
        mask, numbers = expand(mask, x.shape), np.broadcast_to(numbers, x.shape)
    chosen = _chosen_by_samples(call, x, mask, numbers)
    if chosen is None:
        chosen = _chosen_constants(call, x, mask, numbers)
    # Of nothing chosen there are no owners.
    is_whole = x.shape == mask.shape and 0 not in call.shape
    if chosen is None and is_whole and exact(call, mask, numbers):
        return indexed(call, x, [mask], [numbers])
    return chosen


# --- shapes that depend on data -------------------------------------------------------------------


@rule("bincount", "histc", counted=EVERY)
def counts(call: RuleContext) -> Ownership:
    """How often each value occurs does not depend on the order."""
    x = call["self"]
    operands = [m for m in call.tensors if m.shape == x.shape]
    if len(operands) > 1:
        x = call.algebra.pointwise("weigh", *operands)
    # One statistic of all values; the counts of the numbers are told apart by their index.
    whole = call.algebra.reduce(call.title, x)
    return replace(whole, shape=call.shape, owner=whole.owner.reshape(1), key=whole.key.reshape(1))


@rule(
    "nonzero masked_select _unique2 unique_dim unique_consecutive repeat_interleave", counted=EVERY
)
def data_dependent(call: RuleContext) -> Any:
    """How many elements there are depends on the values, and so does which is whose."""
    if call.name == "repeat_interleave" and call.tensors and not call.tensors[0].depends_on_batch:
        name = (call.title, digest(call.tensors[0]))
        return shared_outputs(call, name)
    if call.name == "masked_select":
        chosen = _masked_select(call)
        if chosen is not None:
            return chosen
    if call.name == "nonzero":
        places = _places_of_chosen(call)
        if places is not None:
            return places
    # Where every batch has the same values it has the same shape; else not even the number of
    # elements can be relied on.
    for m in call.tensors:
        if not known_for_every_batch(m):
            return all_mixed(call, "data-dependent shape")
    return all_shared(call)
