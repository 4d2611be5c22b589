"""What a walk starts from: the marks of inputs, targets, parameters and constants, and of predictions for the loss."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from unbatch.analysis.domain.ownership import Ownership, batched, code, shared
from unbatch.analysis.domain.sample_layout import prediction_dim
from unbatch.analysis.interpreter import Interpretation
from unbatch.analysis.number_facts import alike
from unbatch.capture.graph import Graph
from unbatch.capture.steps import Ref


def forward_marks(graph: Graph, dims: Sequence[int | None]) -> dict[int, Ownership]:
    """Inputs belong to their samples; everything else that exists before the model runs is shared."""
    marks = _outside(graph)
    for i, (ref, dim) in enumerate(zip(graph.inputs, dims, strict=True)):
        if ref is not None:
            marks[ref.index] = _leaf(graph, ref, dim, i, "inputs")
    return marks


def loss_marks(
    graph: Graph,
    forward: Interpretation,
    targets: Sequence[int | None],
    samples: int,
    leading: bool = True,
) -> dict[int, Ownership]:
    """Predictions are fresh and belong to their samples; targets too, as constants; model internals are shared."""
    marks = _outside(graph)
    for i, (ref, dim) in enumerate(zip(graph.targets, targets, strict=True)):
        if ref is not None:
            marks[ref.index] = _leaf(graph, ref, dim, i, "targets")
    numbers = scrambled(graph, forward)
    for i, known in forward.marks.items():
        if i in numbers:
            marks[i] = shared(known.shape, ("numbers", i), known.sources)
        elif graph.values[i].kind == "step":
            inner = "parameters" in known.sources
            marks[i] = (
                shared(known.shape, ("internal", i), ["internals"])
                if inner
                else replace(known, given=frozenset())
            )
        elif graph.values[i].kind == "inputs":
            marks[i] = known
    for i, ref in enumerate(graph.predictions):
        marks[ref.index] = fresh_prediction(forward[ref], i, samples, leading)
    return marks


def scrambled(graph: Graph, forward: Interpretation) -> list[int]:
    """Integers that a loss of the model's own reads, made of data alone, in no order of samples: which labels count.

    In the loss they are constants whose numbers are known.
    """
    if not graph.own_loss:
        return []
    read = dict.fromkeys(r.index for s in graph.loss_steps for r in s.refs())
    return [
        i
        for i in read
        if i in forward.marks and graph.values[i].step not in graph.after_cut and graph.values[i].kind == "step"
        and forward.marks[i].mixed and "parameters" not in forward.marks[i].sources and graph.known(i) is not None
    ]  # fmt: skip


def fresh_prediction(known: Ownership, leaf: int, samples: int, leading: bool = True) -> Ownership:
    """A prediction as the loss sees it: slice n belongs to sample n and depends on nothing else."""
    dim = prediction_dim(known, samples, leading)
    if dim is None:
        if known.owned and not known.mixed:
            marks = Ownership(known.shape, known.owner, known.key)
        else:
            return shared(known.shape, ("prediction", leaf), ["predictions"])
    else:
        marks = batched(known.shape, dim, ("prediction", leaf))
    keys = np.unique(marks.key)
    alone = marks.owner.size == math.prod(marks.shape) == samples and len(keys) == 1
    atoms = [int(keys[0])] if alone else [int(code("prediction", leaf, part)) for part in (0, 1)]
    return replace(marks, sources=frozenset(["predictions"]), atoms=frozenset(atoms))


def _outside(graph: Graph) -> dict[int, Ownership]:
    return {
        i: _constant(v, i)
        for i, v in enumerate(graph.values)
        if v.kind in ("parameters", "buffers", "constants", "inputs", "targets")
    }


def _constant(value: Any, index: int) -> Ownership:
    if value.kind == "parameters":
        return shared(value.shape, ("parameter", value.name), ["parameters"])
    return shared(value.shape, (value.kind, value.name or index), (), alike(value.concrete))


def _leaf(graph: Graph, ref: Ref, dim: int | None, i: int, kind: str) -> Ownership:
    shape = graph.values[ref.index].shape
    return (
        shared(shape, (kind, i), [kind])
        if dim is None
        else batched(shape, dim % max(len(shape), 1), (kind, i), [kind])
    )
