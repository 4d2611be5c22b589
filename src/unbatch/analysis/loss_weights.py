"""The weights ``w_n`` of ``L = Σ w_n ℓ_n``, read off the last steps of the loss.

The convention: ``ℓ_n`` sums over the entries of a sample, so the mean of N·C squared errors has ``w = 1/(N·C)``. What
cannot be read off is None, never a guess.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from unbatch.analysis.domain.ownership import Ownership
from unbatch.capture import ops
from unbatch.capture.graph import Graph
from unbatch.capture.steps import Ref, Step

MEAN, SUM = 1, 2


def weights(graph: Graph, marks: Mapping[int, Ownership], samples: int) -> Tensor | None:
    """``[N]``, or None. ``marks``: of the values in a loss of which it is known that it is a sum over the samples."""
    factor, ref = 1.0, graph.loss
    while ref is not None and ref.index in graph.makers:
        step = graph.makers[ref.index]
        share = _share(step, graph)
        if share is not None and not _treats_alike(step, marks, samples):
            return None
        if share is not None:
            return torch.full((samples,), factor * share, dtype=torch.float64)
        scale = _scale(step)
        if scale is None:
            return None
        factor *= scale
        ref = step.refs()[0]
    return None


def _treats_alike(step: Step, marks: Mapping[int, Ownership], samples: int) -> bool:
    """Every sample has the same part in what a step sums up: none left out, counted twice, or scaled by its place."""
    seen = [marks[r.index] for r in step.refs()]
    owned = [m for m in seen if m.owned]
    entrywise = ops.traits(step.op).entrywise_loss
    others = (
        [m for m in seen if not m.owned] if entrywise else []
    )  # of likelihoods, one entry for each class
    places = [d - len(m.shape) for m in owned for d in range(len(m.shape)) if m.owner_varies(d)]
    by_place = any(len(m.shape) >= -d and m.shape[d] > 1 for m in others for d in places)
    return bool(owned) and not by_place and all(_even(m, samples) for m in owned)


def _even(marks: Ownership, samples: int) -> bool:
    """Every sample owns as many elements, of the same functions, with no factor that only some of them have."""
    owner = np.broadcast_to(marks.owner, marks.key.shape)
    of_first, *others = (np.sort(marks.key[owner == n]) for n in range(samples))
    return not (marks.weighted or marks.given) and all(
        np.array_equal(of_first, keys) for keys in others
    )


def _scale(step: Step) -> float | None:
    """A step from scalar to scalar that multiplies by a number; what is a matter of sign belongs to the loss."""
    arguments = step.defaults | step.named
    other = arguments.get("other")
    name = ops.base_name(step.op)
    if ops.keeps_order(step.op) or name == "neg":
        return 1.0
    if not isinstance(other, int | float) or not other:
        return None
    return {"mul": abs(other), "div": 1 / abs(other)}.get(name)


def _share(step: Step, graph: Graph) -> float | None:
    """What each entry is multiplied by in the step that sums over the samples."""
    arguments = step.defaults | step.named
    refs = step.refs()
    entries = math.prod(graph.values[refs[0].index].shape) if refs else 0
    whole = step.outs[0] is not None and math.prod(graph.values[step.outs[0].index].shape) == 1
    if step.name in ("sum", "mean") and whole and entries > 1:
        return 1.0 if step.name == "sum" else 1 / entries
    if ops.traits(step.op).entrywise_loss and arguments["reduction"] in (MEAN, SUM):
        return 1.0 if arguments["reduction"] == SUM else 1 / entries
    if step.name in ("nll_loss_forward", "nll_loss2d_forward"):
        return _of_likelihood(arguments, graph)
    return None


def _of_likelihood(arguments: dict[str, Any], graph: Graph) -> float | None:
    if arguments["reduction"] == SUM:
        return 1.0
    target, classes = arguments["target"], arguments["weight"]
    labels = graph.known(target.index) if isinstance(target, Ref) else None
    if arguments["reduction"] != MEAN or labels is None:
        return None
    kept = labels[labels != arguments["ignore_index"]]
    if classes is None:
        return 1 / kept.numel() if kept.numel() else None
    table = graph.known(classes.index) if isinstance(classes, Ref) else None
    total = None if table is None else float(table.double()[kept].sum())
    return 1 / total if total else None
