"""Predictions for other samples while every batch statistic keeps its value.

If samples depend on each other through batch statistics alone, then with these held constant the
other samples may be replaced and a prediction does not change in a single bit. The recorded graph
is replayed with the same numbers in place of the statistics, on the batch and on changed ones.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from unbatch.analysis.interpreter import Interpretation
from unbatch.capture import ops
from unbatch.capture.graph import Graph
from unbatch.capture.steps import Step
from unbatch.capture.substitutes import norm_with_constant_statistics
from unbatch.verification.experiment import Experiment, Untestable
from unbatch.verification.forward_tests import partitions
from unbatch.verification.noise import recorded_noise, results_of, stream_depends_on_data

MSG_READ_BY_PYTHON = (
    "statistics of overlapping groups, or values read by Python, cannot be held constant"
)
MSG_HIDDEN = "an op uses a batch statistic of its own making, so it cannot be held constant"


def change_with_frozen_statistics(experiment: Experiment) -> float:
    """Return the largest absolute change of a prediction whose own sample is not replaced.

    Raises ``Untestable`` where statistics cannot be held constant.
    """
    noise = {}
    if stream_depends_on_data(experiment.graph):
        # Other samples would draw other noise for all.
        noise = recorded_noise(experiment.graph)
    frozen = freeze(experiment, experiment.inputs, noise)
    base = frozen.rows(experiment.inputs)
    if not base.shape[1]:
        return 0.0
    worst = 0.0
    for seed, keep in enumerate(partitions(experiment.samples)):
        # Constants are those of the batch, and only the other samples change.
        new = frozen.rows(experiment.changed(keep, "noisy", seed))
        # Entries that are not finite do not count.
        change = (new - base).abs()[keep].nan_to_num(0, 0, 0)
        worst = max(worst, float(change.amax()))
    return worst


@dataclass(frozen=True)
class Frozen:
    """A replay with constants.

    ``values``: the statistics, and noise that is held, by value of the graph. ``norms``: what runs
    in place of the batch norms, by step. ``before``: the predictions for the batch of which the
    statistics are.
    """

    experiment: Experiment
    values: dict[int, Tensor]
    norms: dict[int, Callable[..., Any]]
    before: Tensor

    def rows(self, inputs: Any) -> Tensor:
        """Return the predictions for other inputs."""
        experiment = self.experiment
        predictions = experiment.graph.run(
            experiment.feed(inputs),
            experiment.prediction_refs,
            keep=self.values,
            instead=self.norms,
        )
        return experiment.rows(predictions)


def freeze(experiment: Experiment, inputs: Any, noise: Mapping[int, Tensor]) -> Frozen:
    """Replay a batch once, and hold every batch statistic at the value that it has there.

    ``noise``: held in that replay, and in all that follow. Raises ``Untestable``.
    """
    graph = experiment.graph
    forward = experiment.findings.forward
    if forward.algebra.uses_overlapping_sets() or graph.host_reads:
        raise Untestable(MSG_READ_BY_PYTHON)
    statistics: set[int] = set()
    for step in graph.forward_steps:
        statistics |= _statistics(forward, step)
    # A batch norm returns its moments together with its result, so to pin them would be too late:
    # another function runs in its place.
    norms = {}
    read = _read_beside_norms(graph)
    for step in graph.forward_steps:
        moments = _batch_moments(step, statistics)
        if moments is not None:
            # The function in its place leaves nothing in the running statistics.
            if any(new.index in read for _, new in step.writes):
                raise Untestable(MSG_HIDDEN)
            norms[step.index] = moments
        elif _hides_statistic(forward, step):
            raise Untestable(MSG_HIDDEN)
    held_at = {graph.values[i].step for i in statistics} | norms.keys()
    if not _steps_of_statistics(experiment) <= held_at:
        raise Untestable(MSG_HIDDEN)
    values: dict[int, Tensor] = {}

    def keep(i: int, t: Tensor) -> None:
        if i in statistics:
            # Later steps may write to it.
            values[i] = t.clone()

    predictions = graph.run(
        experiment.feed(inputs), experiment.prediction_refs, keep=noise, visit=keep
    )
    before = experiment.rows(predictions)
    held = {}
    for i, (mean, invstd) in norms.items():
        held[i] = norm_with_constant_statistics(graph.steps[i], (values[mean], values[invstd]))
    return Frozen(experiment, values | dict(noise), held, before)


def _read_beside_norms(graph: Graph) -> set[int]:
    """Return the values that are predictions, or are read by anything but batch norms."""
    read = {ref.index for ref in graph.predictions}
    for step in graph.forward_steps:
        if not ops.is_batch_norm(step.op):
            read.update(ref.index for ref in step.refs())
    return read


def _steps_of_statistics(experiment: Experiment) -> set[int]:
    """Return the steps that make the statistics which predictions rest on."""
    forward = experiment.findings.forward
    roots: set[int] = set()
    for ref in experiment.prediction_refs:
        roots |= forward.ownership[ref].statistics
    return {forward.algebra.record.definitions[root].step for root in roots}


def _statistics(forward: Interpretation, step: Step) -> set[int]:
    """Return the results of a step that are batch statistics made there.

    What a later step makes of a statistic is none: it follows from the one that is held.
    """
    statistics = set()
    for ref in results_of(step):
        ownership = forward.ownership.get(ref.index)
        # What belongs to a sample, or mixes samples without being a statistic, is recomputed.
        if ownership is None or ownership.owned or ownership.mixed:
            continue
        if forward.made_at(step, ref.index):
            statistics.add(ref.index)
    return statistics


def _batch_moments(step: Step, statistics: set[int]) -> tuple[int, int] | None:
    """Return the values that are mean and ``1/σ`` of a batch norm, where these are of the batch.

    Instance norm is a batch norm by its name, and has moments of its own for every sample.
    """
    if not ops.is_training_batch_norm(step):
        return None
    moments = ops.batch_moments(step.op, step.outs)
    if moments is None:
        return None
    mean, invstd = moments
    if statistics.isdisjoint((mean.index, invstd.index)):
        return None
    return mean.index, invstd.index


def _hides_statistic(forward: Interpretation, step: Step) -> bool:
    """Return whether a step makes a batch statistic and uses it: to hold it is too late then."""
    steps = {statistic.step for statistic in forward.algebra.record.definitions}
    if step.index not in steps:
        return False
    return any(ref is not None and forward.ownership[ref.index].owned for ref in step.outs)
