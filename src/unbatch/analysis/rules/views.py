"""Rules for ops that move elements: views, slices, shifts and joins.

Where samples do not lie along the dims that are moved, only the index of an element changes and its key is renamed.
Where they do, the op itself is run on an integer tensor of positions, and owners follow.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace

import numpy as np
import torch

from unbatch.analysis.domain.ownership import (
    MIXED,
    Ownership,
    code,
    compress,
    expand,
    mix,
    moved,
    permute,
    reshape,
    shared,
    spell_out,
    squeeze,
    unsqueeze,
)
from unbatch.analysis.rules.registry import RuleContext, mixed, rule


@rule("view _unsafe_view reshape _reshape_alias flatten unflatten _reshape_copy view_copy resize")
def view(call: RuleContext) -> Ownership:
    x = call["self"]
    if call["dtype"] is not None:
        return (
            call.algebra.pointwise(call.title, x)
            if x.shape == call.shape
            else mixed(call, call.shape, "resized")
        )
    if math.prod(x.shape) != math.prod(call.shape):
        return mixed(call, call.shape, "resized")
    return reshape(x, call.shape)


@rule("permute t transpose movedim mT numpy_T swapaxes")
def transposition(call: RuleContext) -> Ownership:
    x = call["self"]
    if call.name == "t":
        order = list(range(len(x.shape)))[::-1]
    elif call.name == "transpose":
        order = list(range(len(x.shape)))
        i, j = call["dim0"], call["dim1"]
        if order:
            order[i], order[j] = order[j], order[i]
    else:
        order = [d % len(x.shape) for d in call["dims"]]
    return permute(x, order)


@rule("expand", "expand_copy", "broadcast_to")
def expansion(call: RuleContext) -> Ownership:
    return expand(call["self"], call.shape)


@rule("squeeze unsqueeze squeeze_copy unsqueeze_copy atleast_1d")
def sizes_of_one(call: RuleContext) -> Ownership:
    return reshape(call["self"], call.shape)


@rule("view_as_complex", "view_as_real")
def as_complex(call: RuleContext) -> Ownership:
    x = call["self"]
    if call.name == "view_as_real":
        return replace(unsqueeze(x, len(x.shape)), shape=tuple(call.shape))
    last = len(x.shape) - 1
    return squeeze(
        replace(call.algebra.scan("complex", x, [last]), shape=(*x.shape[:-1], 1)), [last]
    )


# --- moves along some dims ------------------------------------------------------------------------


def shifted(call: RuleContext, x: Ownership, dims: Iterable[int]) -> Ownership:
    """``x`` after an op that moves elements along ``dims`` only."""
    if not any(x.key.shape[d] > 1 for d in dims):
        return replace(x.with_key((call.title, tuple(dims))), shape=tuple(call.shape))
    return moved(x, lambda place: _run(call, place), call.shape)


def _run(call: RuleContext, place: np.ndarray) -> np.ndarray:
    """The op itself on an integer tensor in place of its one tensor argument."""
    arguments = {
        k: torch.from_numpy(place) if isinstance(a, Ownership) else a
        for k, a in call.arguments.items()
    }
    out = call.op(**arguments)
    return (out if isinstance(out, torch.Tensor) else out[0]).contiguous().numpy()


@rule("pixel_shuffle pixel_unshuffle channel_shuffle native_channel_shuffle")
def shuffle(call: RuleContext) -> Ownership:
    x = call["self"]
    lead = len(x.shape) - 3
    if any(k > 1 for k in x.key.shape[max(lead, 0) :]):
        return moved(x, lambda place: _run(call, place), call.shape)
    return replace(x.with_key(call.title), shape=tuple(call.shape))


@rule(
    "slice flip roll unfold repeat tril triu constant_pad_nd rot90 diagonal narrow slice_copy tile diag "
    "diag_embed fliplr flipud unfold_copy diagonal_copy"
)
def movement(call: RuleContext) -> Ownership:
    x = call["self"]
    name = call.name.removesuffix("_copy")
    if name == "slice":
        return _slice(call, x)
    if name in ("flip", "roll") and call["dims"]:
        return shifted(call, x, call.dims("dims"))
    if name == "constant_pad_nd":
        pads = call["pad"]
        dims = [
            len(x.shape) - 1 - i for i in range(len(pads) // 2) if pads[2 * i] or pads[2 * i + 1]
        ]
        return _padded(call, x, dims)
    if name in ("tril", "triu"):
        dims = [len(x.shape) - 2, len(x.shape) - 1]
        return (
            x.with_key(call.title)
            if not any(x.key.shape[d] > 1 for d in dims)
            else _masked(call, x)
        )
    if name == "repeat":
        return _repeat(call, reshape(x, (*[1] * (len(call["repeats"]) - len(x.shape)), *x.shape)))
    if not any(k > 1 for k in x.key.shape) and (x.size != 1 or not x.shape):
        return (
            shared(call.shape, (call.title, int(x.key.reshape(-1)[0])), x.sources)
            if not x.depends_on_batch
            else _spread_out(call, x)
        )
    return moved(x, lambda place: _run(call, place), call.shape)


def _spread_out(call: RuleContext, x: Ownership) -> Ownership:
    """All elements plain, of a statistic: the elements of the result are plain too."""
    view = [1] * len(call.shape)
    key = mix(x.key.reshape(()), code(call.title)).reshape(view)
    return replace(x, shape=tuple(call.shape), owner=x.owner.reshape(view), key=key)


def _slice(call: RuleContext, x: Ownership) -> Ownership:
    dim = call["dim"] % len(x.shape)
    if call.shape == x.shape:
        return x
    start, stop, step = slice(call["start"], call["end"], call["step"]).indices(x.shape[dim])
    if x.key.shape[dim] == 1:
        return replace(
            x.with_key((dim, start, step)) if x.plain(dim) else x, shape=tuple(call.shape)
        )
    cut = tuple(slice(start, stop, step) if d == dim else slice(None) for d in range(len(x.shape)))
    return replace(x, shape=tuple(call.shape), owner=x.owner[cut], key=x.key[cut])


def _padded(call: RuleContext, x: Ownership, dims: list[int]) -> Ownership:
    if not any(x.key.shape[d] > 1 for d in dims):
        return replace(x.with_key(call.title), shape=tuple(call.shape))

    def run(place: np.ndarray) -> np.ndarray:
        return torch.ops.aten.constant_pad_nd(torch.from_numpy(place), call["pad"], -1).numpy()

    return moved(x, run, call.shape)


def _masked(call: RuleContext, x: Ownership) -> Ownership:
    """Part of the elements become zero, by their index."""

    def run(place: np.ndarray) -> np.ndarray:
        return call.op(torch.from_numpy(place + 1), call["diagonal"]).numpy() - 1

    return moved(x, run, call.shape)


def _repeat(call: RuleContext, x: Ownership) -> Ownership:
    dims = [d for d, r in enumerate(call["repeats"]) if r > 1]
    if all(x.shape[d] == 1 for d in dims):
        return expand(x, call.shape)
    return moved(x, lambda place: _run(call, place), call.shape)


@rule("select", "select_copy")
def select(call: RuleContext) -> Ownership:
    x, dim = call["self"], call["dim"] % len(call["self"].shape)
    return bounded(call, _take(x, dim, call["index"] % x.shape[dim]), x)


def bounded(call: RuleContext, out: Ownership, x: Ownership) -> Ownership:
    """A fixed number of entries picked from a statistic that is as long as the batch is a statistic of fixed size."""
    roots = call.algebra.roots
    if x.owned or x.mixed or out.size >= x.size or not any(roots[r].long for r in x.given):
        return out
    root = call.algebra.statistic("picked", out.owner, out.size, x.sources)
    kept = frozenset(r for r in x.given if not roots[r].long)
    return replace(out, given=kept if root is None else kept | {root})


def _take(x: Ownership, dim: int, index: int) -> Ownership:
    if x.key.shape[dim] > 1:
        owner, key = x.owner.take(index, axis=dim), x.key.take(index, axis=dim)
    else:
        owner, key = x.owner.take(0, axis=dim), x.key.take(0, axis=dim)
        key = mix(key, code("index", dim, index)) if x.plain(dim) else key
    return replace(
        x, shape=tuple(s for d, s in enumerate(x.shape) if d != dim), owner=owner, key=key
    )


@rule(
    "split split_with_sizes chunk unbind tensor_split split_copy split_with_sizes_copy unbind_copy "
    "unsafe_split unsafe_chunk unsafe_split_with_sizes"
)
def pieces(call: RuleContext) -> list[Ownership]:
    x, dim = call["self"], (call["dim"] or 0) % len(call["self"].shape)
    if call.name.startswith("unbind"):
        return [_take(x, dim, i) for i in range(x.shape[dim])]
    out, start = [], 0
    for shape in call.shapes:
        cut = tuple(
            slice(start, start + shape[dim]) if d == dim else slice(None) for d in range(len(shape))
        )
        if x.key.shape[dim] > 1:
            out.append(replace(x, shape=shape, owner=x.owner[cut], key=x.key[cut]))
        else:
            out.append(replace(x.with_key((dim, start, 1)) if x.plain(dim) else x, shape=shape))
        start += shape[dim]
    return out


# --- joins ----------------------------------------------------------------------------------------


@rule("cat stack concat hstack vstack")
def join(call: RuleContext) -> Ownership:
    parts = [m for m in call["tensors"] if call.name == "stack" or m.shape != (0,)]
    ndim = len(call.shape)
    dim = (call["dim"] or 0) % ndim
    if call.name == "stack":
        parts = [unsqueeze(m, dim) for m in parts]
    if len(parts) == 1:
        return parts[0]
    if (
        not any(m.key.shape[dim] > 1 for m in parts)
        and (together := _side_by_side(call, parts, dim)) is not None
    ):
        return together
    stored = [max(m.key.shape[d] for m in parts) for d in range(ndim)]
    spelled = [spell_out(m, [d for d in range(ndim) if d == dim or stored[d] > 1]) for m in parts]
    view = [[m.shape[d] if d == dim else stored[d] for d in range(ndim)] for m in parts]
    owner = np.concatenate(
        [np.broadcast_to(m.owner, v) for m, v in zip(spelled, view, strict=True)], axis=dim
    )
    key = np.concatenate(
        [np.broadcast_to(m.key, v) for m, v in zip(spelled, view, strict=True)], axis=dim
    )
    out = call.algebra.result(call.shape, owner, key, parts, "joined")
    return compress(out, [dim])


def _side_by_side(call: RuleContext, parts: list[Ownership], dim: int) -> Ownership | None:
    """Parts whose owners agree: along ``dim`` the elements of the result differ by their index."""
    ones = [
        replace(m, shape=tuple(1 if d == dim else s for d, s in enumerate(m.shape))) for m in parts
    ]
    owner = ones[0].owner
    for m in ones[1:]:
        if not all(a == b or 1 in (a, b) for a, b in zip(owner.shape, m.owner.shape, strict=True)):
            return None
        agreed = call.algebra.join(owner, m.owner)
        if ((agreed == MIXED) & (owner != MIXED) & (m.owner != MIXED)).any():
            return None
        owner = agreed
    if (
        all(not m.owned for m in parts)
        and any(m.given for m in parts)
        and not all(m.given for m in parts)
    ):
        return None
    out = call.algebra.pointwise((call.name, dim, [m.shape[dim] for m in parts]), *ones)
    return replace(out, shape=tuple(call.shape))
