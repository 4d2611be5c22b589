"""Predictions for a permuted batch, with the noise of every sample permuted along.

Dropout gives each sample a mask of its own. If only the samples were permuted, sample n would get
the mask of another one, and its prediction would change for no reason of the model. So the noise
that was recorded is permuted, too, wherever the analysis says which sample an element of it is for.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from unbatch.analysis.domain.ownership import Ownership
from unbatch.analysis.interpreter import Interpretation
from unbatch.capture import ops
from unbatch.capture.graph import Graph
from unbatch.capture.steps import Ref, Step, filled
from unbatch.verification.experiment import Experiment, Untestable
from unbatch.verification.noise import draws, noise_refs, results_of

MSG_NOISE = "noise is used in a way in which it cannot be permuted with its samples"
MSG_AMOUNTS = "samples use different amounts of noise"

Owners = np.ndarray  # for every element of a tensor, the sample that it belongs to
Origins = np.ndarray  # for every element of a tensor, the number of an element of the noise

# Ops that draw an order: of features, say.
ORDERS = ("randperm",)

NOBODY = -1


def predict_permuted(experiment: Experiment, order: Tensor) -> list[Tensor]:
    """Return the predictions with sample ``order[n]``, and its noise, in the place of sample n.

    Raises ``Untestable`` where it cannot be said which noise belongs to which sample.
    """
    inputs = experiment.permuted(order)
    if not draws(experiment.graph):
        return experiment.predict(inputs)
    return experiment.replayed(inputs, permuted_noise(experiment, order))


def permuted_noise(experiment: Experiment, order: Tensor) -> dict[int, Tensor]:
    """Return all noise of the recording by value, that of sample ``order[n]`` in the place of n.

    Raises ``Untestable`` where it cannot be said which noise belongs to which sample.
    """
    graph = experiment.graph
    noise = {}
    for ref in noise_refs(graph):
        owners = _owners(graph, experiment.findings.forward, ref)
        value = graph.known(ref)
        if value is None:
            raise Untestable(MSG_NOISE)
        noise[ref] = value
        if owners is not None:
            noise[ref] = _permute_owned(value, owners, order)
    return noise


def _permute_owned(value: Tensor, owners: Owners, order: Tensor) -> Tensor:
    """Return ``value`` where sample n has the elements of sample ``order[n]``, in their order."""
    axis = _axis(owners, len(order))
    if axis is not None:
        return value.index_select(axis, order.to(value.device))
    flat = value.reshape(-1)
    places = [_places(owners, n) for n in range(len(order))]
    out = flat.clone()
    for n, m in enumerate(order.tolist()):
        if len(places[n]) != len(places[m]):
            raise Untestable(MSG_AMOUNTS)
        out[places[n]] = flat[places[m]]
    return out.reshape(value.shape)


def _axis(owners: Owners, samples: int) -> int | None:
    """Return the axis along which the samples lie, by the strides of what was broadcast."""
    axes = [axis for axis, stride in enumerate(owners.strides) if stride and owners.shape[axis] > 1]
    if len(axes) != 1:
        return None
    line = np.moveaxis(owners, axes[0], 0).reshape(owners.shape[axes[0]], -1)[:, 0]
    if not np.array_equal(line, np.arange(samples)):
        return None
    return axes[0]


def _places(owners: Owners, n: int) -> Tensor:
    """Return the places of the elements of sample n, in a flat tensor."""
    return torch.from_numpy(np.flatnonzero(owners.reshape(-1) == n))


# --- which noise belongs to which sample ----------------------------------------------------------


def _owners(graph: Graph, forward: Interpretation, noise: int) -> Owners | None:
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
    owners = list(_owners_by_use(graph, forward, noise))
    if not owners:
        return None
    if any(not _equal(other, owners[0]) for other in owners):
        raise Untestable(MSG_NOISE)  # one sample's here, and another's there
    return owners[0]


def _owners_by_use(graph: Graph, forward: Interpretation, noise: int) -> Iterator[Owners | None]:
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
            owners = _owners_in_result(ownership, graph.values[read[0]].shape)
            yield _of_drawn(owners, of_read, drawn.shape)
    if any(ref.index in origins for ref in graph.predictions):
        raise Untestable(MSG_NOISE)  # predictions are made of noise alone, which nobody owns


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
    if ops.moves(step.op) is not None and len(step.outs) == 1:
        numbers = torch.from_numpy(np.ascontiguousarray(origins))
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
    of_drawn[origins.reshape(-1)] = owners.reshape(-1)
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
