"""Where a model that computes its own loss is cut into model and loss.

The rule: the predictions are the last values that a parameter produced, before any parameter-free op. Going up from the
loss, the first steps at which values of samples meet a parameter are the cut; a step that has no sample axis any more
and still takes a parameter (weight decay, say) is no prediction: there the split fails.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
from torch import Tensor

from unbatch.analysis.domain.ownership import Array, Ownership, code, is_sample
from unbatch.analysis.initial import scrambled
from unbatch.analysis.interpreter import Interpretation
from unbatch.analysis.rules.registry import stand_in
from unbatch.capture import ops
from unbatch.capture.graph import Graph
from unbatch.capture.sample_axes import SampleAxes
from unbatch.capture.steps import Ref, Step
from unbatch.capture.tracer import Recorder
from unbatch.errors import MSG_FOLD_CUT, InputError


def split(graph: Graph, forward: Interpretation) -> tuple[Graph, list[Step]]:
    """The graph with its predictions and the steps of its loss, and the steps where parameters enter the loss."""
    assert graph.loss is not None
    makers = graph.makers
    cut: list[Ref] = []
    entering: list[Step] = []
    seen: set[int] = set()
    queue = [graph.loss]
    while queue:
        ref = queue.pop(0)
        step = makers.get(ref.index)
        if step is None or ref.index in seen:
            continue
        seen.add(ref.index)
        if _takes_parameters(step, forward):
            if forward[ref].owned or (forward[ref].mixed and _has_room(graph, ref, forward)):
                cut.append(_reshaped(ref, graph))
                continue
            entering.append(step)
        queue += [r for r in step.refs() if forward[r].depends_on_batch]
    if cut:
        graph = replace(
            graph, predictions=sorted(cut, key=lambda r: r.index), after_cut=_downstream(graph, cut)
        )
    return graph, entering


def folded(graph: Graph, forward: Interpretation, fold: SampleAxes) -> Graph:
    """The graph with one axis of samples in front of its predictions; the loss reads them as the model made them.

    Which sample a prediction belongs to is told by its place, as for what a model returns. Raises ``InputError`` where
    no prediction has places for all samples.
    """
    for ref in graph.predictions:
        value = stand_in(graph.values[ref.index])
        axes = fold.axes(value)
        if axes is not None:
            graph = _folded(graph, ref, fold, axes)
        elif value.shape[:1] == (forward.algebra.samples,) and forward[ref].sample_dim() != 0:
            raise InputError(
                MSG_FOLD_CUT.format(shapes=[tuple(value.shape)], dims=fold.dims, sizes=fold.sizes)
            )
    ready = [
        r
        for r in graph.predictions
        if graph.values[r.index].shape[:1] == (forward.algebra.samples,)
    ]
    if not graph.after_cut or not ready:
        shapes = [graph.values[r.index].shape for r in graph.predictions]
        raise InputError(MSG_FOLD_CUT.format(shapes=shapes, dims=fold.dims, sizes=fold.sizes))
    return graph


def _folded(graph: Graph, ref: Ref, fold: SampleAxes, axes: tuple[int, ...]) -> Graph:
    recorder, value = Recorder({}), stand_in(graph.values[ref.index])
    recorder.declare(value, "step", "")
    with recorder:
        rows = fold.folded(value, [axes])
        front, cut = recorder.ref(rows).index, len(recorder.graph.steps)
        back = recorder.ref(_laid_out(fold.unfolded(rows, [axes]), value))
    out, names = graph.inserted(recorder.graph, ref, back, cut)
    predictions = [names[front] if r == ref else r for r in graph.predictions]
    return replace(
        out, predictions=predictions, folded={**graph.folded, names[front].index: ref.index}
    )


def _laid_out(t: Tensor, like: Tensor) -> Tensor:
    """In memory as ``like`` is, for what is recorded to be a view stays one."""
    if t.stride() == like.stride():
        return t
    order = sorted(range(t.ndim), key=like.stride().__getitem__, reverse=True)
    return t.permute(order).contiguous().permute(sorted(range(t.ndim), key=order.__getitem__))


# --- labels ---------------------------------------------------------------------------------------


def placed(
    graph: Graph, forward: Interpretation, start: Mapping[int, Ownership], walked: Interpretation
) -> dict[int, Ownership]:
    """Labels among what the loss reads, as belonging to the samples with whose predictions the loss compares them.

    They are constants, and a language model compares the prediction at a word with the next word: ``y_n`` is what
    stands beside prediction n, not what came in with word n. Labels that are in their place are left out, and so are
    those that are not set beside predictions one by one; where they are others', the loss is then unknown.
    """
    out = dict[int, Ownership]()
    numbers = scrambled(graph, forward)
    for step in graph.loss_steps:
        beside = [walked[r] for r in step.refs() if "predictions" in walked[r].sources]
        for ref in step.refs() if len(beside) == 1 and _one_by_one(step, beside[0]) else ():
            label = start.get(ref.index)
            apart = graph.folded or ref.index in numbers
            if label is not None and apart and (owner := _beside(label, beside[0])) is not None:
                key = np.broadcast_to(code("label", ref.index), owner.shape)
                out[ref.index] = replace(label, owner=owner, key=key)
    return out


def _one_by_one(step: Step, prediction: Ownership) -> bool:
    """Each label is set beside the entries of one prediction."""
    if step.name == "gather":
        return not prediction.owner_varies(step.named["dim"] % len(prediction.shape))
    return ops.is_pointwise(step.op) or step.name.startswith("nll_loss")


def _beside(label: Ownership, prediction: Ownership) -> Array | None:
    """The samples of a prediction along the axes of labels, where these are of one kind and belong to others."""
    kinds = np.unique(label.key[is_sample(label.owner)] if label.owned else label.key)
    if label.sources != {"inputs"} or label.mixed or len(kinds) != 1 or prediction.mixed:
        return None
    for dim in reversed(range(prediction.owner.ndim)):  # classes: their entries belong together
        if not prediction.owner_varies(dim):
            prediction = replace(prediction, owner=prediction.owner.take([0], axis=dim))
    owner, shape = prediction.owner, label.owner.shape if label.owned else label.shape
    if [s for s in owner.shape if s > 1] != [s for s in shape if s > 1]:
        return None
    owner = owner.reshape(shape)
    return None if not is_sample(owner).all() or (owner == label.owner).all() else owner


# --- the cut --------------------------------------------------------------------------------------


def _takes_parameters(step: Step, forward: Interpretation) -> bool:
    """Values of samples meet a parameter (or something made from parameters only) here."""
    marks = [forward[r] for r in step.refs()]
    shared = any("parameters" in m.sources and not m.depends_on_batch for m in marks)
    return shared and any(m.depends_on_batch for m in marks)


def _has_room(graph: Graph, ref: Ref, forward: Interpretation) -> bool:
    """One number for several samples is no prediction: where they have met, it is the loss itself."""
    return forward.algebra.samples == 1 or math.prod(graph.values[ref.index].shape) > 1


def _reshaped(ref: Ref, graph: Graph) -> Ref:
    """A linear layer flattens its input and unflattens its output: the value it means is the unflattened one."""
    users = [s for s in graph.steps if any(r.index == ref.index for r in s.refs())]
    if len(users) != 1 or not ops.traits(users[0].op).takes_shape or users[0].outs[0] is None:
        return ref
    seen = users[0].outs[0]
    return seen if len(graph.values[seen.index].shape) > len(graph.values[ref.index].shape) else ref


def _downstream(graph: Graph, cut: list[Ref]) -> frozenset[int]:
    """Steps that depend on the cut, and are not needed for it."""
    reached = {r.index for r in cut}
    needed = _upstream(graph, cut)
    out = set()
    for step in graph.steps:
        if step.index not in needed and any(r.index in reached for r in step.refs()):
            out.add(step.index)
            reached |= {
                r.index for r in [*(o for o in step.outs if o), *(new for _, new in step.writes)]
            }
    return frozenset(out)


def _upstream(graph: Graph, refs: list[Ref]) -> set[int]:
    wanted = {r.index for r in refs}
    out = set()
    for step in reversed(graph.steps):
        if wanted & {
            r.index for r in [*(o for o in step.outs if o), *(new for _, new in step.writes)]
        }:
            out.add(step.index)
            wanted |= {r.index for r in step.refs()}
    return out
