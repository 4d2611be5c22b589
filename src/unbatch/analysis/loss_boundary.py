"""Where a model that computes its own loss is cut into model and loss.

The rule: the predictions are the last values that a parameter produced, before any parameter-free
op. Going up from the loss, the first steps at which values of samples are combined with a parameter
are the cut. A step that has no sample axis any more and still takes a parameter (weight decay, say)
is no prediction: there the split fails.

Here live also the two things that follow from a cut: folding the sample axes of its predictions,
and finding out which labels belong to which of them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from torch import Tensor

from unbatch.analysis.domain.ownership import Array, Ownership, code, is_sample, varies
from unbatch.analysis.initial import scrambled
from unbatch.analysis.interpreter import Interpretation
from unbatch.analysis.rules.registry import stand_in
from unbatch.capture import ops
from unbatch.capture.graph import Graph
from unbatch.capture.sample_axes import Fold
from unbatch.capture.steps import Ref, Step
from unbatch.capture.tracer import Recorder

# --- the cut --------------------------------------------------------------------------------------


def split(graph: Graph, forward: Interpretation) -> tuple[Graph, list[Step]]:
    """Return the graph, cut, and the steps at which parameters enter its loss all the same.

    The graph has the predictions and the steps of its loss filled in; where no value can be a
    prediction it is as it was.
    """
    assert graph.loss is not None
    cut: list[Ref] = []
    parameter_steps: list[Step] = []
    visited: set[int] = set()
    queue = [graph.loss]
    while queue:
        ref = queue.pop(0)
        step = graph.makers.get(ref.index)
        if step is None or ref.index in visited:
            continue
        visited.add(ref.index)
        if _takes_parameters(step, forward):
            # The search ends at the first such value on each way up: what lies behind is the model.
            if _can_be_prediction(ref, forward):
                cut.append(_unflattened(ref, graph))
                continue
            if any(_is_of_parameters_alone(forward[operand]) for operand in step.refs()):
                parameter_steps.append(step)
        # Only what carries data is followed: a regulariser of parameters alone is no way to a
        # prediction.
        queue += [operand for operand in step.refs() if _carries_data(forward[operand])]
    if not cut:
        return graph, parameter_steps
    predictions = sorted(cut, key=lambda ref: ref.index)
    return (
        replace(graph, predictions=predictions, after_cut=_downstream(graph, cut)),
        parameter_steps,
    )


def _takes_parameters(step: Step, forward: Interpretation) -> bool:
    """Tell whether values of samples are combined with what parameters make without samples.

    Or, where there are none of samples, data that belong to no sample with parameters alone.
    """
    operands = [forward[ref] for ref in step.refs()]
    # A value of both, as every inner value of a model is, counts as one of samples.
    if any(marks.depends_on_batch for marks in operands):
        return any("parameters" in m.sources for m in operands if not m.depends_on_batch)
    takes_data = any("inputs" in marks.sources for marks in operands)
    return takes_data and any(map(_is_of_parameters_alone, operands))


def _is_of_parameters_alone(marks: Ownership) -> bool:
    return "parameters" in marks.sources and not _carries_data(marks)


def _carries_data(marks: Ownership) -> bool:
    """Tell whether a value depends on samples, or on inputs that belong to none."""
    return marks.depends_on_batch or "inputs" in marks.sources


def _can_be_prediction(ref: Ref, forward: Interpretation) -> bool:
    """Tell whether a value belongs to samples, is mixed and has room for all, or has none in it.

    One number for several samples is no prediction: where they are mixed, it is the loss itself.
    """
    marks = forward[ref]
    if marks.owned or not marks.depends_on_batch:
        return True
    has_room = forward.algebra.samples == 1 or math.prod(marks.shape) > 1
    return marks.mixed and has_room


def _unflattened(ref: Ref, graph: Graph) -> Ref:
    """Return the output of a linear layer in the shape that its user sees.

    The layer flattens its input and unflattens its output: the value it means is the latter.
    """
    users = [step for step in graph.steps if ref in step.refs()]
    # With several users the value is seen in its own shape by some of them.
    if len(users) != 1 or not ops.traits(users[0].op).takes_shape:
        return ref
    reshaped = users[0].outs[0]
    if reshaped is None:
        return ref
    has_more_axes = len(graph.values[reshaped.index].shape) > len(graph.values[ref.index].shape)
    return reshaped if has_more_axes else ref


def _read(step: Step) -> set[int]:
    """Return the numbers of the values that a step reads."""
    return {ref.index for ref in step.refs()}


def _made(step: Step) -> set[int]:
    """Return the numbers of the values that a step returns or writes."""
    refs = [*step.outs]
    for _, new in step.writes:
        refs.append(new)
    return {ref.index for ref in refs if ref is not None}


def _downstream(graph: Graph, cut: Iterable[Ref]) -> frozenset[int]:
    """Return the steps that depend on the cut, and are not needed for it."""
    reached = {ref.index for ref in cut}
    # One prediction may be made of another: the steps between the two belong to the model, though
    # they are downstream of the cut as well.
    needed = _upstream(graph, reached)
    steps = set()
    for step in graph.steps:
        if step.index in needed:
            continue
        if not reached.isdisjoint(_read(step)):
            steps.add(step.index)
            reached |= _made(step)
    return frozenset(steps)


def _upstream(graph: Graph, values: Iterable[int]) -> set[int]:
    """Return the steps that these values need."""
    needed = set(values)
    steps = set()
    for step in reversed(graph.steps):
        if needed & _made(step):
            steps.add(step.index)
            needed |= _read(step)
    return steps


# --- several sample axes --------------------------------------------------------------------------


def folded(graph: Graph, forward: Interpretation, fold: Fold) -> Graph:
    """Return the graph with one axis of samples in front of its predictions.

    The loss reads them as the model made them. Which sample a prediction belongs to is known by its
    place, as for what a model returns. Raises ``InputError`` where no prediction has places for all
    samples.
    """
    samples = forward.algebra.samples
    for ref in graph.predictions:
        value = stand_in(graph.values[ref.index])
        axes = fold.axes(value)
        if axes is not None:
            graph = _folded_prediction(graph, ref, fold, axes)
        # A first axis that has their number by chance would be taken for that of the samples.
        elif value.shape[:1] == (samples,) and forward[ref].sample_dim() != 0:
            raise fold.misfit([tuple(value.shape)])
    shapes = []
    folds_one = False
    for ref in graph.predictions:
        shape = graph.values[ref.index].shape
        shapes.append(shape)
        folds_one = folds_one or shape[:1] == (samples,)
    # Without a cut there is no prediction to fold.
    if not graph.after_cut or not folds_one:
        raise fold.misfit(shapes)
    return graph


def _folded_prediction(graph: Graph, ref: Ref, fold: Fold, axes: Any) -> Graph:
    """Return the graph with steps behind a prediction that fold its axes, and unfold them again.

    The cut lies between the two.
    """
    recorder, value = Recorder({}), stand_in(graph.values[ref.index])
    # The steps are recorded on their own and put into the graph, which renumbers its values.
    recorder.declare(value, "step", "")
    with recorder:
        rows = fold.folded(value, [axes])
        front, cut = recorder.ref(rows).index, len(recorder.graph.steps)
        back = recorder.ref(_laid_out(fold.unfolded(rows, [axes]), value))
    inserted, names = graph.inserted(recorder.graph, ref, back, cut)
    # In its place among the predictions, of which a loss may have several.
    predictions = list(graph.predictions)
    predictions[predictions.index(ref)] = names[front]
    origins = {**graph.folded, names[front].index: ref.index}
    return replace(inserted, predictions=predictions, folded=origins)


def _laid_out(t: Tensor, like: Tensor) -> Tensor:
    """Return a tensor that lies in memory as ``like`` does: what is recorded as a view stays."""
    # A loss that takes a view of what the model made has to find memory laid out for that view.
    if t.stride() == like.stride():
        return t
    order = sorted(range(t.ndim), key=like.stride().__getitem__, reverse=True)
    back = sorted(range(t.ndim), key=order.__getitem__)
    return t.permute(order).contiguous().permute(back)


# --- labels ---------------------------------------------------------------------------------------


def placed(
    graph: Graph,
    forward: Interpretation,
    start: Mapping[int, Ownership],
    loss: Interpretation,
) -> dict[int, Ownership]:
    """Return labels that the loss reads, as belonging to the samples it compares them with.

    They are constants, and a language model compares the prediction at a word with the next word:
    ``y_n`` is what stands beside prediction n, not what came in with word n. Labels that are in
    their place are left out, and so are those that are not set beside predictions one by one; where
    they are others', the loss is then unknown. ``start``: what ``loss`` started from.
    """
    labels: dict[int, Ownership] = {}
    numbers = scrambled(graph, forward)
    for step in graph.loss_steps:
        prediction = _single_prediction(step, loss)
        if prediction is None or not _one_by_one(step, prediction):
            continue
        for ref in step.refs():
            label = start.get(ref.index)
            # Elsewhere a label came in with the sample it belongs to.
            if label is None or not (graph.folded or ref.index in numbers):
                continue
            owner = _beside(label, prediction)
            if owner is not None:
                key = np.broadcast_to(code("label", ref.index), owner.shape)
                labels[ref.index] = replace(label, owner=owner, key=key)
    return labels


def _single_prediction(step: Step, loss: Interpretation) -> Ownership | None:
    """Return the one operand of a step that predictions enter; None where it is not one."""
    operands = [loss[ref] for ref in step.refs() if "predictions" in loss[ref].sources]
    if len(operands) != 1:
        return None
    return operands[0]


def _one_by_one(step: Step, prediction: Ownership) -> bool:
    """Tell whether each label is set beside the entries of one prediction."""
    # ``gather`` picks the entry of a class by its label. Along the samples it would pick others'.
    if step.name == "gather":
        return not prediction.owner_varies(step.named["dim"] % len(prediction.shape))
    return ops.is_pointwise(step.op) or step.name.startswith("nll_loss")


def _beside(label: Ownership, prediction: Ownership) -> Array | None:
    """Return the owners of a label by its place beside a prediction.

    None where it has them already, where the two do not match entry by entry, and for labels of
    several kinds: what is a function of its place would be taken for the same at every place.
    """
    if label.sources != {"inputs"} or label.mixed or prediction.mixed or not _of_one_kind(label):
        return None
    owner = prediction.owner
    for dim in reversed(range(owner.ndim)):
        # Along classes all entries belong together: one label is beside all of them.
        if not varies(owner, dim):
            owner = owner.take([0], axis=dim)
    shape = label.owner.shape if label.owned else label.shape
    # [n, 1, t] and [n, t] hold the same entries in the same order.
    if _without_ones(owner.shape) != _without_ones(shape):
        return None
    owner = owner.reshape(shape)
    if not is_sample(owner).all() or (owner == label.owner).all():
        return None
    return owner


def _without_ones(shape: Iterable[int]) -> list[int]:
    return [size for size in shape if size > 1]


def _of_one_kind(label: Ownership) -> bool:
    """Tell whether all entries of a label that belong to samples are the same function of them."""
    keys = label.key[is_sample(label.owner)] if label.owned else label.key
    return len(np.unique(keys)) == 1
