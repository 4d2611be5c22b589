"""Whose noise may be, by the steps that combine it with samples: a guess.

Noise belongs to nobody when it is drawn. Its owners show at the first step that combines it with
samples; until then it is followed through steps that move, rescale or threshold it. Whether the
guess is right is proved in ``noise_owners.py``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import numpy as np
import torch
from torch import Tensor

from unbatch.analysis.domain.ownership import Ownership
from unbatch.analysis.interpreter import Interpretation
from unbatch.capture import ops
from unbatch.capture.aliasing import Window, places
from unbatch.capture.graph import Graph
from unbatch.capture.steps import Ref, Step, Value, filled
from unbatch.verification.experiment import Untestable
from unbatch.verification.noise import results_of

MSG_NOISE = "noise is used in a way in which it cannot be permuted with its samples"

Owners = np.ndarray  # for every element of a tensor, the sample that it belongs to
Origins = np.ndarray  # for every element of a tensor, the number of an element of the noise

# Ops that draw an order: of features, say.
ORDERS = ("randperm",)

# Ops that bring elements into another order.
REORDERS = ("flip", "roll")

# Arguments that each sample is multiplied with, or chooses from.
WEIGHTS = {
    "mm": ("self", "mat2"),
    "addmm": ("mat1", "mat2"),
    "mv": ("self", "vec"),
    "convolution": ("weight",),
    "embedding": ("weight",),
}

NOBODY = -1


def owners_by_use(graph: Graph, forward: Interpretation, noise: int) -> Owners | None:
    """Return the sample of each element of a noise value, None where all samples share it.

    Noise belongs to nobody when it is drawn. Its owners show at the first step that combines it
    with samples; until then it is followed through steps that rescale or threshold it (a dropout
    mask is made of uniform numbers).
    """
    drawn = graph.values[noise]
    if graph.steps[drawn.step].name in ORDERS:
        return None  # the same for the whole batch
    marks = forward.ownership[noise]
    if marks.owned or marks.mixed:
        # Drawn by the samples' own values, and made with them in one op.
        return _owners_in_result(marks, drawn.shape)
    owners = list(_owners_at_uses(graph, forward, noise))
    if not owners:
        return None
    if any(not _equal(other, owners[0]) for other in owners):
        raise Untestable(MSG_NOISE)  # one sample's here, and another's there
    return owners[0]


def is_aligned(graph: Graph, forward: Interpretation, noise: int) -> bool:
    """Return whether noise is combined with samples entry by entry, and nothing else is done to it.

    As in dropout. Then whose it is needs no proof: it never leaves its place.
    """
    drawn, marks = graph.values[noise], forward.ownership[noise]
    if marks.owned or graph.steps[drawn.step].name in ORDERS:
        return marks.all_owned
    in_place = {noise}
    for step in graph.forward_steps:
        if step.index > drawn.step and not _keeps_in_place(graph, forward, step, drawn, in_place):
            return False
    return not any(_shows(graph, ref, drawn, in_place) for ref in graph.predictions)


def _keeps_in_place(
    graph: Graph, forward: Interpretation, step: Step, drawn: Value, in_place: set[int]
) -> bool:
    """Return whether a step uses noise entry by entry, if at all.

    ``in_place``: the values that are made of the noise alone; what the step makes is added.
    """
    read = [ref.index for ref in step.refs() if _shows(graph, ref, drawn, in_place)]
    if not read:
        return True
    by_entry = ops.is_pointwise(step.op) or ops.moves(step.op) is ops.Moves.SAME
    if not by_entry or not in_place.issuperset(read):
        return False
    for ref in results_of(step):
        if forward[ref].all_owned:
            continue
        if not _stays_in_place(graph, forward, step, ref, drawn):
            return False
        in_place.add(ref.index)
    return True


def _shows(graph: Graph, ref: Ref, drawn: Value, in_place: set[int]) -> bool:
    return ref.index in in_place or graph.values[ref.index].storage == drawn.storage


def _stays_in_place(
    graph: Graph, forward: Interpretation, step: Step, ref: Ref, drawn: Value
) -> bool:
    """Return whether a result has one entry for each of the noise, in memory of its own."""
    value, marks = graph.values[ref.index], forward[ref]
    if marks.owned or marks.mixed or value.shape != drawn.shape:
        return False
    return not step.writes or value.storage == drawn.storage


def _owners_at_uses(graph: Graph, forward: Interpretation, noise: int) -> Iterator[Owners | None]:
    """Yield the owners of noise at each step that combines it, or what is made of it, with samples.

    Raises ``Untestable`` where these cannot be told.
    """
    drawn = graph.values[noise]
    # Of every element of a value that is made of the noise alone, the number of the one it is from;
    # None where that is not known.
    origins: dict[int, Origins | None] = {noise: _numbered(drawn.shape)}
    for step in graph.forward_steps:
        if step.index <= drawn.step:
            continue
        origins.update(_seen_in_memory(graph, step, drawn, origins))
        read = [ref.index for ref in step.refs() if ref.index in origins]
        if not read:
            continue
        of_read = _same([origins[r] for r in read])
        for ref in results_of(step):
            ownership = forward.ownership[ref.index]
            # Noise times a statistic is still nobody's.
            if not ownership.owned and not ownership.mixed:
                shape = graph.values[ref.index].shape
                origins[ref.index] = _carried(step, read[0], of_read, shape)
                continue
            if ref not in step.outs:
                # Written into a part of something else.
                raise Untestable(MSG_NOISE)
            if _is_weight(step, read[0], forward):
                yield None
                continue
            owners = _owners_in_result(ownership, graph.values[read[0]].shape)
            yield _of_drawn(owners, of_read, drawn.shape)
    if any(ref.index in origins for ref in graph.predictions):
        raise Untestable(MSG_NOISE)  # predictions are made of noise alone, which nobody owns


def _is_weight(step: Step, read: int, forward: Interpretation) -> bool:
    """Return whether a step applies noise to samples as a weight, which is the same for all."""
    if forward.ownership[read].owned:
        return False
    names = WEIGHTS.get(step.name, ())
    return any(step.named.get(name) == Ref(read) for name in names)


def _seen_in_memory(
    graph: Graph, step: Step, drawn: Value, known: Mapping[int, Origins | None]
) -> dict[int, Origins]:
    """Return what a step sees of noise that was written to a part of a memory, by value."""
    seen = {}
    for ref in step.refs():
        value = graph.values[ref.index]
        if ref.index in known or value.storage != drawn.storage:
            continue
        if value.dtype == drawn.dtype:
            (seen[ref.index],) = places(Window.of(drawn), [Window.of(value)])
    return seen


def _equal(a: np.ndarray | None, b: np.ndarray | None) -> bool:
    if a is None or b is None:
        return a is b
    return np.array_equal(a, b)


def _same(origins: list[Origins | None]) -> Origins | None:
    """Return the origins of all values of noise that a step reads; None where they differ."""
    first = origins[0]
    return first if all(_equal(o, first) for o in origins) else None


def _numbered(shape: tuple[int, ...]) -> Origins:
    return np.arange(math.prod(shape)).reshape(shape)


def _carried(
    step: Step, read: int, origins: Origins | None, shape: tuple[int, ...]
) -> Origins | None:
    """Return the origins of what a step makes of noise; None where they are not known."""
    if origins is None:
        return None
    if ops.keeps_order(step.op):
        return origins.reshape(shape)
    if ops.is_pointwise(step.op):
        return np.broadcast_to(origins, shape)
    only_moves = ops.moves(step.op) is not None or step.name in REORDERS
    if only_moves and len(step.outs) == 1:
        numbers = torch.from_numpy(origins.copy())
        moved: Tensor = step.op(*filled(step.args, lambda _: numbers), **step.kwargs)
        return moved.numpy()
    if _looks_up(step, read):
        wide = origins.reshape(*origins.shape, *[1] * (len(shape) - origins.ndim))
        return np.broadcast_to(wide, shape)
    return None


def _looks_up(step: Step, read: int) -> bool:
    """Return whether noise chooses rows of a table: its dims lead in the result."""
    table = step.named.get("weight") if step.name == "embedding" else step.named.get("self")
    if isinstance(table, Ref) and table.index == read:
        return False
    if step.name == "embedding":
        return True
    return step.name == "index" and len(step.named["indices"]) == 1


def _of_drawn(
    owners: Owners | None, origins: Origins | None, drawn: tuple[int, ...]
) -> Owners | None:
    """Return owners of what was made of noise as those of the noise.

    Raises ``Untestable`` where an element of it would have several, or it is not known which.
    """
    if owners is None:
        return None
    if origins is None:
        raise Untestable(MSG_NOISE)
    of_drawn = np.full(math.prod(drawn), NOBODY)
    # Beside noise there may be other things.
    is_noise = origins >= 0
    owners, origins = owners[is_noise], origins[is_noise]
    of_drawn[origins] = owners
    if not np.array_equal(of_drawn[origins], owners):
        raise Untestable(MSG_NOISE)
    return of_drawn.reshape(drawn)


def _owners_in_result(ownership: Ownership, shape: tuple[int, ...]) -> Owners | None:
    """Return the owners of noise of a shape by those of the result that it is combined into."""
    if ownership.mixed:
        raise Untestable(MSG_NOISE)
    dim = ownership.sample_dim()
    if dim is None:
        if ownership.shape != shape:
            raise Untestable(MSG_NOISE)
        return np.broadcast_to(ownership.owner, shape)
    # Shapes are broadcast from the right.
    axis = dim - len(ownership.shape) + len(shape)
    if axis < 0 or shape[axis] == 1:
        return None
    if shape[axis] != ownership.shape[dim]:
        raise Untestable(MSG_NOISE)
    along = [1] * len(shape)
    along[axis] = -1
    return np.broadcast_to(np.arange(shape[axis]).reshape(along), shape)
