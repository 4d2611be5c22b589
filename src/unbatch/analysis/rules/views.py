"""Rules for ops that move elements: views, slices, shifts and joins.

Where samples do not lie along the dims that are moved (these are plain), only the index of an
element changes, and its key is renamed. Where they do, the op itself is run on an integer tensor of
positions, and owners follow. Lookups by tensors of indices are in ``indexing.py``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np
import torch

from unbatch.analysis.domain import folds
from unbatch.analysis.domain.ownership import (
    MIXED,
    Array,
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
    with_one,
    without_dims,
)
from unbatch.analysis.rules.registry import EVERY, RuleContext, mixed, rule
from unbatch.capture import ops

# --- the same elements in another shape -----------------------------------------------------------


@rule(
    "view _unsafe_view reshape _reshape_alias flatten unflatten _reshape_copy view_copy resize",
    counted=EVERY,
)
def view(call: RuleContext) -> Ownership:
    """The same elements in row-major order; with a type, the same bytes."""
    x = call["self"]
    if call["dtype"] is not None and x.shape == call.shape:
        # Types of one size: each element is read as another number.
        return call.algebra.pointwise(call.title, x)
    if call["dtype"] is not None or math.prod(x.shape) != math.prod(call.shape):
        return mixed(call, call.shape, "resized")
    return reshape(x, call.shape)


@rule("permute t transpose movedim mT numpy_T swapaxes", counted=EVERY)
def transposition(call: RuleContext) -> Ownership:
    """The dims in another order."""
    x = call["self"]
    order = list(range(len(x.shape)))
    if call.name == "t":
        order.reverse()
    elif call.name != "transpose":
        order = [d % len(x.shape) for d in call["dims"]]
    elif order:  # a scalar has no dims to exchange
        i, j = call["dim0"], call["dim1"]
        order[i], order[j] = order[j], order[i]
    return permute(x, order)


@rule("expand", "expand_copy", "broadcast_to", counted=EVERY)
def expansion(call: RuleContext) -> Ownership:
    """Elements repeated."""
    return expand(call["self"], call.shape)


@rule("squeeze unsqueeze squeeze_copy unsqueeze_copy atleast_1d", counted=EVERY)
def sizes_of_one(call: RuleContext) -> Ownership:
    """Dims of size one come and go."""
    return reshape(call["self"], call.shape)


@rule("view_as_complex view_as_complex_copy view_as_real view_as_real_copy", counted=EVERY)
def as_complex(call: RuleContext) -> Ownership:
    """Pairs along the last dim, which become one number, or come from one."""
    x = call["self"]
    last = len(x.shape)
    if call.name.startswith("view_as_real"):
        # The new dim is plain: by its index the real or the imaginary part.
        return replace(unsqueeze(x, last), shape=tuple(call.shape))
    pairs = call.algebra.scan("complex", x, [last - 1])
    return squeeze(replace(pairs, shape=(*x.shape[:-1], 1)), [last - 1])


# --- moves along some dims ------------------------------------------------------------------------


@rule("flip", "roll", "fliplr", "flipud", counted=EVERY)
def shift(call: RuleContext) -> Ownership:
    """Moves along ``dims`` only; without dims, along any."""
    x = call["self"]
    if not call["dims"]:
        return anywhere(call, x)
    dims = call.dims("dims")
    if x.explicit(dims):
        return moved(x, lambda place: _run(call, place), call.shape)
    return replace(x.with_name((call.title, tuple(dims), x.shape)), shape=tuple(call.shape))


@rule("pixel_shuffle pixel_unshuffle channel_shuffle native_channel_shuffle", counted=EVERY)
def shuffle(call: RuleContext) -> Ownership:
    """Moves between channels and positions, the last three dims."""
    x = call["self"]
    ndim = len(x.shape)
    if x.explicit(range(max(ndim - 3, 0), ndim)):
        return moved(x, lambda place: _run(call, place), call.shape)
    return replace(x.with_name((call.title, x.shape)), shape=tuple(call.shape))


@rule("unfold rot90 diagonal narrow tile diag diag_embed unfold_copy diagonal_copy", counted=EVERY)
def movement(call: RuleContext) -> Ownership:
    """Moves of whatever kind."""
    return anywhere(call, call["self"])


def anywhere(call: RuleContext, x: Ownership) -> Ownership:
    """Return ``x`` after an op that may move any of its elements anywhere."""
    all_plain = not x.explicit(range(len(x.shape)))
    if not all_plain or (x.shape and x.size == 1):
        return moved(x, lambda place: _run(call, place), call.shape)
    if not x.depends_on_batch:
        # Elements of a constant that differ by index do so after any movement.
        return shared(call.shape, (call.title, x.shape, int(x.key.reshape(-1)[0])), x.sources)
    # One key, of which every element is another index: so it is with the elements of the result.
    ones = [1] * len(call.shape)
    key = mix(x.key.reshape(()), code(call.title, x.shape)).reshape(ones)
    return replace(x, shape=tuple(call.shape), owner=x.owner.reshape(ones), key=key)


def _run(call: RuleContext, place: Array) -> Array:
    """The op itself on an integer tensor in place of its one tensor argument."""
    arguments = {}
    for name, argument in call.arguments.items():
        is_tensor = isinstance(argument, Ownership)
        # Counted from one, so that zeros beside the elements become -1: these are new.
        arguments[name] = torch.from_numpy(place + 1) if is_tensor else argument
    for name in ops.results_given(call.op):
        arguments[name] = torch.empty(0, dtype=torch.int64)
    # The numbers of elements go where the elements would; so no rule has to know how an op moves.
    out = call.op(**arguments)
    if not isinstance(out, torch.Tensor):
        out = out[0]
    return out.contiguous().numpy() - 1


@rule("constant_pad_nd", counted="pad")
def padding(call: RuleContext) -> Ownership:
    """New elements around old ones. ``pad``: two widths for each dim, from the last on."""
    x, pad = call["self"], call["pad"]
    last = len(x.shape) - 1
    dims = [last - i for i in range(len(pad) // 2) if pad[2 * i] or pad[2 * i + 1]]
    if not x.explicit(dims):
        return replace(x.with_key((call.title, x.shape)), shape=tuple(call.shape))

    def run(place: Array) -> Array:
        # Filled with -1, which is how ``moved`` knows what is new.
        return torch.ops.aten.constant_pad_nd(torch.from_numpy(place), pad, -1).numpy()

    return moved(x, run, call.shape)


@rule("tril", "triu", counted=EVERY)
def triangle(call: RuleContext) -> Ownership:
    """Part of the elements of a matrix become zero, by their index."""
    x = call["self"]
    ndim = len(x.shape)
    if not x.explicit([ndim - 2, ndim - 1]):
        return x.with_key(call.title)
    return moved(x, lambda place: _run(call, place), call.shape)


@rule("repeat", counted=EVERY)
def repetition(call: RuleContext) -> Ownership:
    """Copies along some dims, and new dims at the front."""
    x, repeats = call["self"], call["repeats"]
    if 0 in call.shape:
        return shared(call.shape, "empty", x.sources)
    # Repeats may be more than dims: then they are for new dims at the front.
    x = reshape(x, (*[1] * (len(repeats) - len(x.shape)), *x.shape))
    for size, count in zip(x.shape, repeats, strict=True):
        if count > 1 and size > 1:
            return moved(x, lambda place: _run(call, place), call.shape)
    return expand(x, call.shape)


# --- parts ----------------------------------------------------------------------------------------


@rule("slice", "slice_copy", counted=EVERY)
def part(call: RuleContext) -> Ownership:
    """A slice along one dim."""
    x = call["self"]
    dim = call["dim"] % len(x.shape)
    if call.shape == x.shape:
        return x
    # As slices in Python, bounds may be absent, negative, or beyond the end.
    bounds = slice(call["start"], call["end"], call["step"])
    return _slice(x, dim, slice(*bounds.indices(x.shape[dim])), call.shape)


def _slice(x: Ownership, dim: int, entries: slice, shape: Sequence[int]) -> Ownership:
    """``x`` with some entries along ``dim``, of which ``shape`` is left."""
    # Where samples (or anything that differs) lie along the dim, arrays are sliced as the value is.
    if x.key.shape[dim] > 1:
        where = (*[slice(None)] * dim, entries)
        return replace(x, shape=tuple(shape), owner=x.owner[where], key=x.key[where])
    if x.plain(dim):
        x = x.with_name((dim, entries.start, entries.step))
    return replace(x, shape=tuple(shape))


@rule(
    "split split_with_sizes chunk unbind tensor_split split_copy split_with_sizes_copy unbind_copy "
    "unsafe_split unsafe_chunk unsafe_split_with_sizes",
    counted="dim split_size split_sizes chunks sections indices split_size_or_sections",
)
def pieces(call: RuleContext) -> list[Ownership]:
    """Slices that follow on each other, or one entry each."""
    x = call["self"]
    dim = (call["dim"] or 0) % len(x.shape)
    if call.name.startswith("unbind"):
        return [_entry(x, dim, i) for i in range(x.shape[dim])]
    slices = []
    start = 0  # where the last one ended
    for shape in call.shapes:
        stop = start + shape[dim]
        slices.append(_slice(x, dim, slice(start, stop, 1), shape))
        start = stop
    return slices


@rule("select", "select_copy", counted=EVERY)
def select(call: RuleContext) -> Ownership:
    """One entry along a dim, which goes."""
    x = call["self"]
    dim = call["dim"] % len(x.shape)
    return _entry(x, dim, call["index"] % x.shape[dim])


def _entry(x: Ownership, dim: int, index: int) -> Ownership:
    """``x`` at one index along ``dim``."""
    shape = without_dims(x.shape, [dim])
    # Along a plain dim one entry stands for all, and along an expanded one all are equal.
    stored = index if x.key.shape[dim] > 1 else 0
    key = x.key.take(stored, axis=dim)
    if x.plain(dim):
        key = mix(key, code("index", dim, index))
    return replace(x, shape=shape, owner=x.owner.take(stored, axis=dim), key=key)


# --- joins ----------------------------------------------------------------------------------------


@rule("cat stack concat", counted=EVERY)
def join(call: RuleContext) -> Ownership:
    """Values side by side."""
    parts = call["tensors"]
    ndim = len(call.shape)
    dim = (call["dim"] or 0) % ndim
    # A stack of [n, c] is a join of [n, 1, c]: what follows knows one op only.
    if call.name == "stack":
        parts = [unsqueeze(m, dim) for m in parts]
    else:
        # Empty ones of one dim PyTorch leaves out, and of others nothing is left.
        parts = [m for m in parts if m.shape != (0,) and m.shape[dim]]
    if not parts:
        return shared(call.shape, "empty")
    if len(parts) == 1:
        return parts[0]
    together = _side_by_side(call, parts, dim)
    if together is not None:
        return together
    return _concatenated(call, parts, dim)


def _concatenated(call: RuleContext, parts: list[Ownership], dim: int) -> Ownership:
    """Parts spelled out, and their arrays side by side."""
    # A dim that is explicit in one part has to be so in all; along ``dim`` it is anyway.
    stored = list(np.max([m.key.shape for m in parts], axis=0).tolist())
    explicit = [d for d, size in enumerate(stored) if d == dim or size > 1]
    owners = []
    keys = []
    for m in parts:
        view = list(stored)
        view[dim] = m.shape[dim]
        spelled = spell_out(m, explicit)
        owners.append(np.broadcast_to(spelled.owner, view))
        keys.append(np.broadcast_to(spelled.key, view))
    owner, key = np.concatenate(owners, axis=dim), np.concatenate(keys, axis=dim)
    out = call.algebra.result(call.shape, owner, key, parts, "joined")
    return compress(replace(out, fold=folds.of_parts(parts)), [dim])


def _side_by_side(call: RuleContext, parts: list[Ownership], dim: int) -> Ownership | None:
    """Parts whose owners agree: along ``dim`` the elements of the result differ by their index.

    None where they do not agree, so that the result has to say which element is whose.
    """
    using = 0
    owned = False
    for m in parts:
        if m.explicit([dim]):
            return None
        using += bool(m.statistics)
        owned = owned or m.owned
    if 0 < using < len(parts) and not owned:
        # Joined as one value, all would count as statistics, also what is a constant.
        return None
    if not _owners_agree(call, parts):
        return None
    # One function of what stands at each place of the parts; by its index along ``dim`` an element
    # is of one of the parts. Their sizes say where one ends and the next begins.
    entries = []
    sizes = []
    for m in parts:
        entries.append(_one_entry(m, dim))
        sizes.append(m.shape[dim])
    name = (call.name, dim, sizes)
    together = call.algebra.pointwise(name, *entries)
    return replace(together, shape=tuple(call.shape), fold=folds.of_parts(parts))


def _one_entry(x: Ownership, dim: int) -> Ownership:
    """A value plain along ``dim`` as if it had one entry there."""
    return replace(x, shape=with_one(x.shape, [dim]))


def _owners_agree(call: RuleContext, parts: list[Ownership]) -> bool:
    """Tell whether parts can be joined without samples becoming mixed by it."""
    owner = parts[0].owner
    for m in parts[1:]:
        if not _broadcasts(owner.shape, m.owner.shape):
            return False
        # Side by side nothing is combined: joined owners only say whether one array can stand for
        # all parts, which it can where none of them has another owner than the others.
        joined = call.algebra.join(owner, m.owner)
        became_mixed = (joined == MIXED) & (owner != MIXED) & (m.owner != MIXED)
        if became_mixed.any():
            return False
        owner = joined
    return True


def _broadcasts(a: Iterable[int], b: Iterable[int]) -> bool:
    """Tell whether shapes of equally many dims go together."""
    return all(i == j or 1 in (i, j) for i, j in zip(a, b, strict=True))
