"""What an interpretation starts from: the ownership of values that are there before its first step.

For the forward pass these are inputs, parameters and constants; for the loss targets, predictions,
and what else it reads of the model.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from unbatch.analysis.domain.ownership import Ownership, batched, code, shared
from unbatch.analysis.domain.sample_layout import prediction_dim
from unbatch.analysis.interpreter import Interpretation
from unbatch.analysis.number_facts import alike, exact_numbers
from unbatch.capture.graph import Graph
from unbatch.capture.steps import Ref, Value

OUTSIDE = ("parameters", "buffers", "constants", "inputs", "targets")


def initial_ownership(
    graph: Graph, dims: Sequence[int | None], fixed: bool = False
) -> dict[int, Ownership]:
    """Return what the forward pass starts from.

    Inputs belong to their samples along ``dims`` (None: to none); everything else that exists
    before the model runs is shared. ``fixed``: whole numbers that belong to no sample are constants
    of the program, as the ends of edges are where rows belong to samples by an index.
    """
    # Inputs are among what is there before the model runs: these marks replace the shared ones.
    marks = _outside(graph)
    marks.update(_data(graph, graph.inputs, dims, "inputs", fixed))
    return marks


def loss_marks(
    graph: Graph,
    forward: Interpretation,
    targets: Sequence[int | None],
    samples: int,
    leading: bool = True,
    fixed: bool = False,
) -> dict[int, Ownership]:
    """Return what the loss starts from; ``targets``: their sample axes, ``fixed``: as for inputs.

    Predictions are fresh: each belongs to its sample and depends on nothing else. Targets belong to
    their samples as constants, inner values of the model are shared, and what the model makes of
    its inputs alone stays what it is.
    """
    marks = _outside(graph)
    marks.update(_data(graph, graph.targets, targets, "targets", fixed))
    # Predictions come last, and overrule what the forward pass has proved of them: however the
    # model mixes samples, the loss is judged as a function of predictions that are there.
    numbers = set(scrambled(graph, forward))
    for index, value in forward.ownership.items():
        kind = graph.values[index].kind
        if index in numbers:
            marks[index] = shared(value.shape, ("numbers", index), value.sources)
        elif kind == "inputs":
            marks[index] = value
        elif kind == "step" and "parameters" in value.sources:
            marks[index] = shared(value.shape, ("internal", index), ["internals"])
        elif kind == "step":
            # Made of data alone: a statistic of these is a constant in the loss.
            marks[index] = replace(value, statistics=frozenset())
    for i, ref in enumerate(graph.predictions):
        marks[ref.index] = fresh_prediction(forward[ref], i, samples, leading)
    return marks


def scrambled(graph: Graph, forward: Interpretation) -> list[int]:
    """Return integers made of data alone, in no order of samples, that a model's own loss reads.

    Which labels count, say. In the loss they are constants whose numbers are known.
    """
    if not graph.own_loss:
        return []
    # In the order of the program, each once.
    read: dict[int, None] = {}
    for step in graph.loss_steps:
        for ref in step.refs():
            read[ref.index] = None
    return [index for index in read if _is_scrambled(graph, forward, index)]


def _is_scrambled(graph: Graph, forward: Interpretation, index: int) -> bool:
    value, marks = graph.values[index], forward.ownership.get(index)
    if marks is None or value.kind != "step" or value.step in graph.after_cut:
        return False
    of_data = "parameters" not in marks.sources
    return marks.mixed and of_data and graph.known(index) is not None


def fresh_prediction(
    prediction: Ownership, leaf: int, samples: int, leading: bool = True
) -> Ownership:
    """Return a prediction as the loss sees it: slice n is sample n's and depends on nothing else.

    ``leaf``: its number among the predictions. One that no sample can be found in is shared.
    """
    # By its axis where it has one; otherwise by its owners, as where [n t, c] has n t rows. What
    # belongs to no sample, or is mixed, is shared.
    dim = prediction_dim(prediction, samples, leading)
    if dim is not None:
        marks = batched(prediction.shape, dim, ("prediction", leaf))
    elif prediction.owned and not prediction.mixed:
        marks = Ownership(prediction.shape, prediction.owner, prediction.key)
    else:
        return shared(prediction.shape, ("prediction", leaf), ["predictions"])
    atoms = _atoms(marks, leaf, samples)
    return replace(marks, sources=frozenset(["predictions"]), atoms=atoms)


def _atoms(marks: Ownership, leaf: int, samples: int) -> frozenset[int]:
    """Return the scalars per sample that a prediction is.

    A single one is itself an atom. Of more than one, two atoms stand for all: the loss is SIMD only
    if a single scalar per sample, made of them, enters it.
    """
    keys = np.unique(marks.key)
    one_each = marks.owner.size == math.prod(marks.shape) == samples
    if one_each and len(keys) == 1:
        return frozenset([int(keys[0])])
    return frozenset({int(code("prediction", leaf, 0)), int(code("prediction", leaf, 1))})


def _outside(graph: Graph) -> dict[int, Ownership]:
    """Return what exists before model and loss run, as shared."""
    marks = {}
    for index, value in enumerate(graph.values):
        if value.kind in OUTSIDE:
            marks[index] = _constant(value, index)
    return marks


def _constant(value: Value, index: int) -> Ownership:
    if value.kind == "parameters":
        return shared(value.shape, ("parameter", value.name), ["parameters"])
    # Equal entries are the same constant, whatever their index.
    return shared(value.shape, (value.kind, value.name or index), (), alike(value.concrete))


def _data(
    graph: Graph, refs: Sequence[Ref | None], dims: Sequence[int | None], kind: str, fixed: bool
) -> dict[int, Ownership]:
    """Return the ownership of inputs or targets with these sample axes; None: shared."""
    marks = {}
    for i, (ref, dim) in enumerate(zip(refs, dims, strict=True)):
        if ref is None:
            continue
        shape = graph.values[ref.index].shape
        if dim is None and fixed and exact_numbers(graph.known(ref.index)) is not None:
            marks[ref.index] = shared(shape, (kind, i))
        elif dim is None:
            marks[ref.index] = shared(shape, (kind, i), [kind])
        else:
            axis = dim % max(len(shape), 1)
            marks[ref.index] = batched(shape, axis, (kind, i), [kind])
    return marks
