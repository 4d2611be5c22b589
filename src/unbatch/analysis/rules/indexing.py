"""Rules for lookups and writes by index.

An index that is the same for every batch is followed element by element; one that depends on data may hit anything
along its dim.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from unbatch.analysis.domain.ownership import (
    SHARED,
    Ownership,
    code,
    compress,
    expand,
    mix,
    moved,
    reshape,
    shared,
    spell_out,
    total,
)
from unbatch.analysis.domain.propagation import Propagation
from unbatch.analysis.rules.registry import RuleContext, mixed, rule
from unbatch.analysis.rules.views import bounded

# --- indexing -------------------------------------------------------------------------------------


def exact(call: RuleContext, index: Ownership, values: Any) -> bool:
    """The index is the same for every batch (or counts as constant), and its numbers are known."""
    loose = {"inputs", "targets", "predictions", "internals"}
    if values is None:
        return False
    constant = (
        index.sources
        and index.sources <= call.algebra.constant
        and "predictions" in call["self"].sources
    )
    return bool(constant) or (not index.depends_on_batch and not index.sources & loose)


def own_choice(x: Ownership, dim: int, index: Ownership) -> bool:
    """Samples choose among what is theirs, as a label does among classes: whatever they choose, it is theirs."""
    return index.owned and not index.mixed and x.owner.shape[dim] == 1 and x.all_owned


@rule("index _unsafe_index index_select gather take_along_dim take")
def lookup(call: RuleContext) -> Ownership:
    if call.name == "gather":
        return _gather(call)
    x = call["self"]
    if call.name == "take":
        x = reshape(x, (math.prod(x.shape),))
    single = call.name in ("index_select", "take")
    at = (call.dims()[0] if call.name == "index_select" else 0) if single else 0
    indices = [None] * at + [call["index"]] if single else list(call["indices"])
    values = [None] * at + [call.values.get("index")] if single else list(call.values["indices"])
    return indexed(call, x, indices, values)


def indexed(call: RuleContext, x: Ownership, indices: list[Any], values: list[Any]) -> Ownership:
    """``x[indices]``: fixed indices are followed; one that depends on data may hit anything along its dim."""
    a = call.algebra
    cut: list[Any] = []
    loose: list[Ownership] = []
    named: list[Any] = []
    dim = 0
    for index, value in zip(indices, values, strict=True):
        if index is None:
            cut.append(slice(None))
            dim += 1
            continue
        value = value.astype(bool) if value is not None and value.dtype == np.uint8 else value
        spans = len(index.shape) if value is not None and value.dtype == bool else 1
        if exact(call, index, value) and not own_choice(x, dim, index):
            parts = list(np.nonzero(value)) if value.dtype == bool else [value]
            x = _selected(call, x, index)
            for part in parts:
                cut.append(np.asarray(part) % max(x.shape[dim], 1))
                named.append((dim, code(cut[-1].shape, cut[-1].tobytes()).item()))
                dim += 1
        elif spans > 1 or (value is not None and value.dtype == bool):
            return (
                mixed(call, call.shape, "data-dependent shape")
                if x.depends_on_batch or index.depends_on_batch
                else shared(call.shape, call.title)
            )
        else:
            x = listened(a, x, index)
            x = a.scan("lookup", x, [dim], "looked up")
            cut.append(np.zeros((1,) * len(index.shape), dtype=np.int64))
            loose.append(index)
            dim += 1
    return _pick(call, x, cut, loose, named)


def listened(algebra: Propagation, x: Ownership, index: Ownership) -> Ownership:
    """A statistic in which samples look something up is used whole."""
    if index.owned:
        algebra.consume_alone(x)
    return x


def _selected(call: RuleContext, x: Ownership, index: Ownership) -> Ownership:
    """What is left after a selection by constants of the batch depends on these constants, as weights do."""
    if not index.depends_on_batch:
        return x
    root = call.algebra.statistic("selected", np.full(1, SHARED), 1, index.sources)
    assert root is not None
    call.algebra.factors.add(root)
    return replace(x, given=x.given | {root})


def _pick(
    call: RuleContext, x: Ownership, cut: list[Any], loose: list[Ownership], named: list[Any]
) -> Ownership:
    fixed = [d for d, _ in named if cut[d].size]
    arrays = [c for c in cut if not isinstance(c, slice)]
    rank = max((c.ndim for c in arrays), default=0)
    spell = any(x.key.shape[d] > 1 for d in fixed)
    if spell:
        x = spell_out(x, fixed)
    where = tuple(
        c
        if isinstance(c, slice) or (spell and d in fixed)
        else np.zeros((1,) * rank, dtype=np.int64)
        for d, c in enumerate(cut)
    )
    owner, key = x.owner[where], x.key[where]
    key = mix(key, code("index", named)) if named and not spell else key
    before = _position(cut)
    picked = (
        np.broadcast_shapes(*(c.shape for d, c in enumerate(cut) if d in fixed)) if fixed else ()
    )
    picked = (1,) * (rank - len(picked)) + picked
    shape = (*call.shape[:before], *picked, *call.shape[before + rank :])
    out = replace(x, shape=shape, owner=owner, key=key)
    if spell:
        out = compress(out, range(before, before + rank))
    elif fixed:
        out = _alike(out, np.broadcast_arrays(*(cut[d] for d in fixed)), before + rank)
    out = bounded(call, out, x)
    if not loose:
        return out
    tail = len(shape) - before - rank
    marks = [reshape(i, (*[1] * (rank - len(i.shape)), *i.shape, *[1] * tail)) for i in loose]
    return call.algebra.pointwise("lookup", out, *marks)


def _alike(out: Ownership, picked: Sequence[np.ndarray], end: int) -> Ownership:
    """Dims of an index along which it repeats itself: the elements there are equal."""
    owner, key = out.owner, out.key
    for d in range(-picked[0].ndim, 0):
        if picked[0].shape[d] > 1 and all((p == p.take([0], axis=d)).all() for p in picked):
            stored = [s if e != end + d else out.shape[e] for e, s in enumerate(key.shape)]
            owner, key = np.broadcast_to(owner, stored), np.broadcast_to(key, stored)
    return replace(out, owner=owner, key=key)


def _position(cut: list[Any]) -> int:
    """Where numpy and PyTorch put the dims of an advanced index."""
    arrays = [d for d, c in enumerate(cut) if not isinstance(c, slice)]
    adjacent = not arrays or arrays == list(range(arrays[0], arrays[-1] + 1))
    return arrays[0] if arrays and adjacent else 0


def _gather(call: RuleContext) -> Ownership:
    x, index, dim = call["self"], call["index"], call.dims()[0]
    values: Any = call.values.get("index") if not own_choice(x, dim, index) else None
    if exact(call, index, values) and any(k > 1 for k in x.key.shape):
        return moved(
            x,
            lambda place: np.take_along_axis(_crop(place, index.shape, dim), values, dim),
            call.shape,
        )
    x = x if exact(call, index, values) else listened(call.algebra, x, index)
    seen = call.algebra.scan("lookup", x, [dim], "looked up")
    cut = tuple(slice(0, s) if d != dim else slice(None) for d, s in enumerate(index.shape))
    shape = tuple(1 if d == dim else s for d, s in enumerate(index.shape))
    seen = replace(seen, shape=shape, owner=seen.owner[cut], key=seen.key[cut])
    if exact(call, index, values):
        seen = bounded(call, replace(seen, shape=call.shape), x)
    return call.algebra.pointwise(
        "lookup",
        seen,
        index if not exact(call, index, values) else index.with_key(values.tobytes()),
    )


def _crop(place: np.ndarray, shape: Sequence[int], dim: int) -> np.ndarray:
    return place[tuple(slice(None) if d == dim else slice(0, s) for d, s in enumerate(shape))]


# --- scattering -----------------------------------------------------------------------------------


def scattered(
    algebra: Propagation, base: Ownership, place: np.ndarray, src: Ownership, accumulate: bool
) -> Ownership:
    """Write ``src`` into the flat positions ``place`` of ``base``, adding up where ``accumulate``."""
    base, src = spell_out(base), spell_out(src)
    owner = np.broadcast_to(base.owner, base.shape).reshape(-1).copy()
    key = np.broadcast_to(base.key, base.shape).reshape(-1).copy()
    spots = place.reshape(-1)
    new_owner = np.broadcast_to(src.owner, src.shape).reshape(-1)
    new_key = np.broadcast_to(src.key, src.shape).reshape(-1)
    joined = False
    if accumulate:
        order = np.argsort(spots, kind="stable")
        for run in np.split(order, np.flatnonzero(np.diff(spots[order])) + 1) if len(spots) else []:
            spot = spots[run[0]]
            owners = np.append(new_owner[run], owner[spot])[None]
            keys = np.append(new_key[run], key[spot])[None]
            o, k, met = algebra.sets.combine(owners, keys)
            owner[spot], key[spot], joined = o[0], k[0], joined or met
    else:
        owner[spots], key[spots] = new_owner, new_key
    root = (
        algebra.statistic("sum", owner, owner.size, base.sources | src.sources) if joined else None
    )
    out = algebra.result(
        base.shape,
        owner.reshape(base.shape),
        key.reshape(base.shape),
        [base, src],
        "scattered",
        root,
    )
    return compress(out)


@rule(
    "scatter scatter_add scatter_reduce index_add index_copy index_put index_fill _unsafe_index_put "
    "index_reduce _index_put_impl masked_scatter put"
)
def scatter(call: RuleContext) -> Ownership:
    x = call["self"]
    adding = (
        call.name in ("scatter_add", "index_add", "scatter_reduce", "index_reduce")
        or bool(call["accumulate"])
        or bool(call["reduce"])
    )
    if call.name in ("index_put", "_unsafe_index_put", "_index_put_impl"):
        return _index_put(call, x, adding)
    if call["dim"] is None:
        return mixed(call, call.shape, "scattered")
    dim, index = call.dims()[0], call["index"]
    values: Any = call.values.get("index")
    src = next(
        (call[k] for k in ("src", "source", "value") if isinstance(call[k], Ownership)), None
    )
    whole = call.name.startswith("index_")
    src = (
        src.with_key((call.name, repr(call["alpha"]), repr(call["reduce"])))
        if src is not None
        else None
    )
    if src is None:
        shape = index.shape if not whole else ()
        src = shared(shape, ("value", repr(call["value"])), (), range(len(shape)))
    if exact(call, index, values):
        positions = np.arange(math.prod(x.shape)).reshape(x.shape)
        place = (
            positions.take(values.reshape(-1), axis=dim)
            if whole
            else np.take_along_axis(_crop(positions, index.shape, dim), values, dim)
        )
        cropped = src if whole or not src.shape else _head(src, index.shape)
        return scattered(call.algebra, x, place, expand(cropped, place.shape), adding)
    return _scatter_anywhere(call, x, dim, index, src, whole)


def _head(x: Ownership, shape: Sequence[int]) -> Ownership:
    cut = tuple(slice(0, s) for s in shape)
    return replace(x, shape=tuple(shape), owner=x.owner[cut], key=x.key[cut])


def _scatter_anywhere(
    call: RuleContext, x: Ownership, dim: int, index: Ownership, src: Ownership, whole: bool
) -> Ownership:
    """Any source element along ``dim`` may land anywhere along it."""
    a = call.algebra
    if whole:
        index = reshape(
            index, [index.shape[0] if d == dim and index.shape else 1 for d in range(len(x.shape))]
        )
    elif src.shape:
        src = _head(src, index.shape)
    pairs = a.pointwise("place", index, src)
    landed = a.scan("landing", pairs, [dim], "scattered")
    landed = replace(
        landed, shape=tuple(x.shape[dim] if d == dim else s for d, s in enumerate(landed.shape))
    )
    sizes = list(x.shape)
    if list(landed.shape) != sizes:
        landed = _pad_to(landed, sizes)
    return a.pointwise(call.title, x, landed)


def _pad_to(x: Ownership, sizes: Sequence[int]) -> Ownership:
    """A source that covers only the head of some dims: beyond it nothing lands."""
    x = spell_out(x)
    widths = [(0, s - d) for s, d in zip(sizes, x.shape, strict=True)]
    owner = np.pad(np.broadcast_to(x.owner, x.shape), widths, constant_values=SHARED)
    key = np.pad(np.broadcast_to(x.key, x.shape), widths, constant_values=0)
    return compress(replace(x, shape=tuple(sizes), owner=owner, key=key))


def _index_put(call: RuleContext, x: Ownership, adding: bool) -> Ownership:
    indices, values = list(call["indices"]), list(call.values["indices"])
    if all(i is None or exact(call, i, v) for i, v in zip(indices, values, strict=True)):
        positions = np.arange(math.prod(x.shape)).reshape(x.shape)
        place = positions[tuple(slice(None) if v is None else v for v in values)]
        return scattered(call.algebra, x, place, expand(call["values"], place.shape), adding)
    if (
        len([i for i in indices if i is not None]) == 1
        and values[-1] is not None
        and values[-1].dtype == bool
    ):
        mask, at = indices[-1], len(indices) - 1
        if not call["values"].shape and at == 0:
            mask = reshape(mask, (*mask.shape, *[1] * (len(x.shape) - len(mask.shape))))
            return call.algebra.pointwise("where", x, mask, call["values"])
    return _put_anywhere(call, x, indices, values)


def _put_anywhere(
    call: RuleContext, x: Ownership, indices: list[Any], values: list[Any]
) -> Ownership:
    """Fixed indices keep their dims; along the others a value may land anywhere. Only for one value per index."""
    a = call.algebra
    lone = [d for d, i in enumerate(indices) if i is not None and not exact(call, i, values[d])]
    fixed = [d for d, i in enumerate(indices) if i is not None and d not in lone]
    rank = max(len(i.shape) for i in indices if i is not None)
    if (
        any(
            i is not None and values[d] is not None and values[d].dtype == bool
            for d, i in enumerate(indices)
        )
        or len(fixed) != 1
        or rank != 1
    ):
        return mixed(call, call.shape, "scattered")
    rows = values[fixed[0]].reshape(-1)
    dim = fixed[0]
    landing = a.pointwise(
        "place",
        *(indices[d] for d in lone),
        *([call["values"]] if len(call["values"].shape) <= 1 else []),
    )
    if len(call["values"].shape) > 1:
        return mixed(call, call.shape, "scattered")
    landing = expand(landing, (len(rows),)) if landing.shape != (len(rows),) else landing
    base = shared((x.shape[dim],), "nothing")
    into = scattered(a, base, rows, landing, True)
    into = reshape(into, [x.shape[d] if d == dim else 1 for d in range(len(x.shape))])
    into = replace(
        into, shape=tuple(x.shape[d] if d in lone or d == dim else 1 for d in range(len(x.shape)))
    )
    return a.pointwise(call.title, x, into)


# --- shapes that depend on data -------------------------------------------------------------------


@rule("bincount", "histc")
def counts(call: RuleContext) -> Ownership:
    """How often each value occurs does not depend on the order."""
    a, x = call.algebra, call["self"]
    operands = [m for m in call.marks if m.shape == x.shape]
    whole = a.reduce(call.title, a.pointwise("weigh", *operands) if len(operands) > 1 else x)
    return replace(whole, shape=call.shape, owner=whole.owner.reshape(1), key=whole.key.reshape(1))


@rule("nonzero masked_select _unique2 unique_dim unique_consecutive repeat_interleave")
def data_dependent(call: RuleContext) -> Any:
    if call.name == "repeat_interleave" and call.marks and not call.marks[0].depends_on_batch:
        return [
            shared(s, (call.title, int(total(call.marks[0].key.reshape(-1), 0))))
            for s in call.shapes
        ]
    if not any(m.depends_on_batch or m.sources & {"inputs", "targets"} for m in call.marks):
        seed = [int(total(m.key.reshape(-1), 0)) for m in call.marks]
        return [
            shared(s, (call.title, seed, i), frozenset().union(*(m.sources for m in call.marks)))
            for i, s in enumerate(call.shapes)
        ]
    return [mixed(call, s, "data-dependent shape") for s in call.shapes]


@rule("slice_scatter", "select_scatter", "diagonal_scatter")
def scatter_view(call: RuleContext) -> Ownership:
    return written(call, call["self"], call["src"], lambda place: _part(call, place))


def _part(call: RuleContext, place: np.ndarray) -> np.ndarray:
    x = torch.from_numpy(place)
    if call.name == "select_scatter":
        return x.select(call["dim"], call["index"]).contiguous().numpy()
    dim = call["dim"] or 0
    cut = [slice(None)] * x.ndim
    cut[dim] = slice(call["start"], call["end"], call["step"] or 1)
    return np.ascontiguousarray(place[tuple(cut)])


def written(call: RuleContext, base: Ownership, src: Ownership, window: Any) -> Ownership:
    """``base`` with the elements at ``window(positions)`` replaced by ``src``."""
    place = window(np.arange(math.prod(base.shape)).reshape(base.shape))
    src = expand(src, place.shape)
    return scattered(call.algebra, base, place, src, accumulate=False)
