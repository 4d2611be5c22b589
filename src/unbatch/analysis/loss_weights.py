"""The weights ``w_n`` of ``L = Σ w_n ℓ_n``, read off the last steps of the loss.

The convention: ``ℓ_n`` sums over the entries of a sample, so the mean of N·C squared errors has
``w = 1/(N·C)``. What cannot be read off is None, never a guess.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from unbatch.analysis.domain.ownership import Ownership, is_sample
from unbatch.capture import ops
from unbatch.capture.aliasing import known_at
from unbatch.capture.graph import Graph
from unbatch.capture.steps import Ref, Step

MEAN, SUM = 1, 2  # reductions, as ATen numbers them


def weights(graph: Graph, marks: Mapping[int, Ownership], samples: int) -> Tensor | None:
    """Return the weights ``[N]``, or None where they cannot be read off.

    ``marks``: the ownership of the values in a loss that is known to be a sum over the samples.
    """
    # From the loss upwards: steps that scale it, until the one that sums over the samples.
    # An example: ``F.mse_loss(F, y) / 2`` on N·C entries. The division scales by 1/2, the loss op
    # shares by 1/(N·C), and w_n = 1/(2·N·C).
    factor, ref = 1.0, graph.loss
    while ref is not None and ref.index in graph.makers:
        step = graph.makers[ref.index]
        share = _share(step, graph)
        if share is not None:
            if not _treats_alike(step, marks, samples):
                return None
            return torch.full((samples,), factor * share, dtype=torch.float64)
        # A sum of two losses, say: there are two ways up, and no one weight.
        scale = _scale(step)
        if scale is None:
            return None
        factor *= scale
        ref = step.refs()[0]
    return None


def _treats_alike(step: Step, marks: Mapping[int, Ownership], samples: int) -> bool:
    """Tell whether every sample has the same part in what a step sums up.

    Not where some are left out, counted twice, or scaled by their place.
    """
    owned, others = [], []
    for ref in step.refs():
        operand = marks[ref.index]
        if operand.owned:
            owned.append(operand)
        else:
            others.append(operand)
    # Beside a likelihood others have one entry for each class, not for each sample.
    if ops.traits(step.op).entrywise_loss and _varies_over_samples(others, owned):
        return False
    if not owned:
        return False
    return all(_even(operand, samples) for operand in owned)


def _varies_over_samples(others: list[Ownership], owned: list[Ownership]) -> bool:
    """Tell whether an operand that belongs to no sample has entries along an axis of samples.

    Axes are counted from the last, as broadcasting does.
    """
    axes = []
    for operand in owned:
        rank = len(operand.shape)
        axes += [d - rank for d in range(rank) if operand.owner_varies(d)]
    for operand in others:
        for axis in axes:
            if len(operand.shape) >= -axis and operand.shape[axis] > 1:
                return True
    return False


def _even(marks: Ownership, samples: int) -> bool:
    """Tell whether every sample owns as many elements, of the same functions.

    A factor that only some of them have is in no key, but ``weighted`` or a statistic.
    """
    if marks.weighted or marks.statistics:
        return False
    owner = np.broadcast_to(marks.owner, marks.key.shape)
    own = is_sample(owner)
    owner, key = owner[own], marks.key[own]
    counts = np.bincount(owner, minlength=samples)
    if (counts != counts[0]).any():
        return False
    # Sorted, as the order of a sample's elements makes no difference to what they add up to.
    by_sample = key[np.lexsort((key, owner))].reshape(samples, -1)
    return bool((by_sample == by_sample[:1]).all())


def _scale(step: Step) -> float | None:
    """Return by what number a step from scalar to scalar multiplies, without its sign.

    What is a matter of sign belongs to the loss of a sample. None: it does something else.
    """
    name = ops.base_name(step.op)
    if ops.keeps_order(step.op) or name == "neg":
        return 1.0
    other = (step.defaults | step.named).get("other")
    if not isinstance(other, int | float) or not other:
        return None
    if name == "mul":
        return abs(other)
    if name == "div":
        return 1 / abs(other)
    return None


def _share(step: Step, graph: Graph) -> float | None:
    """Return what each entry is multiplied by in the step that sums over the samples.

    None where the step is no such sum.
    """
    arguments = step.defaults | step.named
    refs = step.refs()
    entries = 0
    if refs:
        entries = math.prod(graph.values[refs[0].index].shape)
    if step.name in ("sum", "mean") and entries > 1 and _returns_scalar(step, graph):
        return 1.0 if step.name == "sum" else 1 / entries
    if ops.traits(step.op).entrywise_loss and arguments["reduction"] in (MEAN, SUM):
        return 1.0 if arguments["reduction"] == SUM else 1 / entries
    if step.name in ("nll_loss_forward", "nll_loss2d_forward"):
        return _share_of_likelihood(arguments, graph, step.index)
    return None


def _returns_scalar(step: Step, graph: Graph) -> bool:
    out = step.outs[0]
    return out is not None and math.prod(graph.values[out.index].shape) == 1


def _share_of_likelihood(arguments: dict[str, Any], graph: Graph, step: int) -> float | None:
    """Return one over the number of labels that count, or over their class weights.

    Both are numbers of the targets: where these are not known, None.
    """
    if arguments["reduction"] == SUM:
        return 1.0
    if arguments["reduction"] != MEAN:
        return None
    labels = _known(arguments["target"], graph, step)
    if labels is None:
        return None
    # PyTorch's mean divides by the weights of the labels that count, and not by N.
    counted = labels[labels != arguments["ignore_index"]]
    total = float(counted.numel())
    if arguments["weight"] is not None:
        table = _known(arguments["weight"], graph, step)
        if table is None:
            return None
        total = float(table.double()[counted].sum())
    # All labels ignored: PyTorch's mean is then 0/0.
    if not total:
        return None
    return 1 / total


def _known(argument: Any, graph: Graph, step: int) -> Tensor | None:
    """Return the numbers of an argument where they are known."""
    if isinstance(argument, Ref):
        return known_at(graph, argument.index, step)
    return None
