"""Which noise belongs to which sample, as far as it is proved.

Where noise is used says whose it may be (``noise_use.py``): a guess, since an axis may be as long
as the batch for other reasons. Where there is doubt, the noise counts as data of these samples, and
the analysis has to find that every prediction depends on its own alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from unbatch.analysis.domain.ownership import Ownership, batched, code, mix, shared
from unbatch.analysis.domain.sample_layout import in_its_place, uniform
from unbatch.analysis.initial import initial_ownership
from unbatch.analysis.interpreter import Interpretation, interpret
from unbatch.capture.graph import Graph
from unbatch.capture.steps import Ref, Step
from unbatch.verification.experiment import Experiment, Untestable
from unbatch.verification.noise import noise_refs
from unbatch.verification.noise_use import MSG_NOISE, ORDERS, Owners, is_aligned, owners_by_use


def owners_of_noise(experiment: Experiment) -> Mapping[int, Owners | None]:
    """Return the sample of each element of all noise, by value; None where all samples share it.

    Raises ``Untestable`` where that cannot be said.
    """
    known = experiment.noise_owners
    if "owners" not in known:
        known["owners"] = _proved_owners(experiment)
    if known["owners"] is None:
        raise Untestable(MSG_NOISE)
    owners: Mapping[int, Owners | None] = known["owners"]
    return owners


def _proved_owners(experiment: Experiment) -> dict[int, Owners | None] | None:
    """Return whose the noise is if that is proved, else None."""
    graph, forward = experiment.graph, experiment.findings.forward
    if all(_only_orders(graph, forward, ref) for ref in noise_refs(graph)):
        return dict.fromkeys(noise_refs(graph))
    try:
        owners = {ref: owners_by_use(graph, forward, ref) for ref in noise_refs(graph)}
    except Untestable:
        return None
    if all(is_aligned(graph, forward, ref) for ref in owners):
        return owners
    return owners if _is_proved(experiment, owners) else None


def _only_orders(graph: Graph, forward: Interpretation, noise: int) -> bool:
    """Return whether noise is an order into which something of the samples is brought, and no more.

    Of samples, which are mixed by that, or of what each of them has: nobody's in both cases.
    """
    drawn = graph.values[noise]
    if graph.steps[drawn.step].name not in ORDERS or Ref(noise) in graph.predictions:
        return False
    for step in graph.forward_steps:
        if step.index == drawn.step or not _reads_memory_of(graph, step, drawn.storage):
            continue
        if step.name != "index" or not _is_brought_into(step, forward, noise):
            return False
    return True


def _is_brought_into(step: Step, forward: Interpretation, order: int) -> bool:
    """Return whether an index brings something of the samples into an order."""
    # By two indices at once every sample would have an entry of the order for itself.
    indices = [i for i in step.named["indices"] if i is not None]
    operand: Ref = step.named["self"]
    return indices == [Ref(order)] and forward[operand].owned


def _reads_memory_of(graph: Graph, step: Step, storage: int) -> bool:
    return any(graph.values[ref.index].storage == storage for ref in step.refs())


def _is_proved(experiment: Experiment, owners: Mapping[int, Owners | None]) -> bool:
    """Return whether predictions depend on their samples' noise alone, and on it in one way.

    Shared noise is data of nobody, each element another: by its index it may be a sample's after
    all. Where predictions are not the same function for all samples, it may be for that reason.
    """
    forward, leading = experiment.findings.forward, experiment.findings.leading
    graph, samples = experiment.graph, experiment.samples
    again = interpret(
        graph,
        samples,
        initial_ownership(graph, experiment.dims, not experiment.samples_are_alike),
        graph.forward_steps,
        tuple(forward.assumed),
        policy=replace(forward.policy, held=_as_data(forward, owners, samples)),
    )
    is_shared = any(o is None and _has_several(graph, ref) for ref, o in owners.items())
    for ref in graph.used_predictions:
        if not in_its_place(again[ref], samples, leading):
            return False
        if uniform(again[ref], samples, leading):
            continue
        if is_shared or uniform(forward[ref], samples, leading):
            return False
    return True


def _has_several(graph: Graph, value: int) -> bool:
    return math.prod(graph.values[value].shape) > 1


def _as_data(
    forward: Interpretation, owners: Mapping[int, Owners | None], samples: int
) -> dict[int, Ownership]:
    """Return the ownership of noise as if it were data, with these owners."""
    held = {}
    for ref, of_elements in owners.items():
        marks = forward.ownership[ref]
        # What is drawn by the samples' own values is theirs already.
        if not marks.all_owned:
            held[ref] = _data_of(ref, marks, of_elements, samples)
    return held


def _data_of(ref: int, marks: Ownership, owners: Owners | None, samples: int) -> Ownership:
    """Return the ownership of data with these owners, each element of a sample another."""
    name = ("drawn", ref)
    if owners is None:
        return shared(marks.shape, name, marks.sources)
    axis = sample_axis(owners, samples)
    if axis is not None:
        data = batched(marks.shape, axis, name)
        return replace(marks, owner=data.owner, key=data.key)
    flat = owners.reshape(-1)
    # Its place among the elements of its sample.
    place = np.zeros(flat.shape, dtype=np.uint64)
    for owner in np.unique(flat):
        its_own = flat == owner
        place[its_own] = np.arange(its_own.sum())
    key = mix(place, code(*name)).reshape(marks.shape)
    return replace(marks, owner=owners.astype(np.int32), key=key)


def sample_axis(owners: Owners, samples: int) -> int | None:
    """Return the axis along which the samples lie, by the strides of what was broadcast."""
    axes = [axis for axis, stride in enumerate(owners.strides) if stride and owners.shape[axis] > 1]
    if len(axes) != 1:
        return None
    line = np.moveaxis(owners, axes[0], 0).reshape(owners.shape[axes[0]], -1)[:, 0]
    if not np.array_equal(line, np.arange(samples)):
        return None
    return axes[0]
