"""The model, tried on a batch in which half of the samples are others and all have other places.

Independent and SIMD: the prediction of a sample that was kept is what it was, wherever it lies.
SIMD given statistics: so it is while every batch statistic is held, and permuted samples alone give
permuted predictions. What differs is looked at again in float64, and then by the tests of
``verify``, which may have a witness.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from unbatch.capture.graph import Graph
from unbatch.capture.steps import Step
from unbatch.verification.counterexample import Counterexample
from unbatch.verification.experiment import Experiment, Untestable, relative_change
from unbatch.verification.forward_tests import (
    OBVIOUS,
    SURVIVES,
    cross_sample_dependence,
    is_above,
    not_equivariant,
)
from unbatch.verification.frozen_statistics import freeze
from unbatch.verification.noise import draws, recorded_noise, stream_depends_on_data
from unbatch.verification.permutations import permuted_noise, predict_permuted
from unbatch.verification.trial_result import Contradiction, Outcome

NO_PLACE = "no prediction has a place of its own for each sample"
NOT_TAKEN = "the program takes no other batch of this size"

MOVED = "predictions of samples that were kept moved by {amount:.2g} of their size"

# Comparisons with a number: a label that is ignored, a token of padding.
COMPARISONS = ("eq", "ne")


@dataclass(frozen=True)
class Shuffle:
    """A changed batch: samples outside ``keep`` are others, and sample ``order[n]`` is at place n.

    ``marker``: an integer that the program compares with, put into one of the other samples.
    """

    order: Tensor
    keep: Tensor
    variant: str
    seed: int
    marker: int | None = None

    def inputs(self, experiment: Experiment) -> object:
        """Return the changed batch."""
        inputs = experiment.shuffled(self.order, self.keep, self.variant, self.seed)
        marker = self.marker
        if marker is None:
            return inputs
        place = int((~self.keep[self.order]).nonzero()[0])
        marked = experiment.on(inputs)
        return marked.with_leaves(lambda x, dim: _marked(x, dim, place, marker))

    @property
    def kept(self) -> Tensor:
        """Which places have a sample that was kept."""
        return self.keep[self.order]


def _marked(x: Tensor, dim: int | None, place: int, marker: int) -> Tensor:
    """Return integers with a marker in the sample at a place."""
    if dim is None or x.dtype not in (torch.int64, torch.int32):
        return x
    x = x.clone()
    x.select(dim, place).fill_(marker)
    return x


# Of an experiment, its predictions and a shuffle: by how much each place has moved, ``[N]``.
Measure = Callable[[Experiment, Tensor, Shuffle], Tensor]


@dataclass(frozen=True)
class Moved:
    """By how much a changed batch moves predictions that it should not, the largest amount."""

    shuffle: Shuffle
    measure: Measure
    amount: float


def try_independent(
    experiment: Experiment, predictions: Sequence[Tensor] | None, simd: bool
) -> Outcome:
    """Return what came of the trial of an independent forward, and of ``simd`` where that holds.

    ``predictions``: those for the batch itself, where they are there already.
    """
    base = _base(experiment, predictions)
    if not base.shape[1]:
        return NO_PLACE
    keep = _half(experiment.samples)
    ran = False
    # Every sample is watched in one of the passes, and replaced in the other.
    for seed, kept in enumerate((keep, ~keep)):
        moved = _first_that_runs(experiment, base, _shuffles(experiment, kept, seed, simd), others)
        if moved is None:
            continue
        ran = True
        if _is_confirmed(experiment, moved):
            return _against_independent(experiment, base, moved, simd)
    return {} if ran else NOT_TAKEN


def _against_independent(experiment: Experiment, base: Tensor, moved: Moved, simd: bool) -> Outcome:
    """Return which verdicts a change is against, with a witness where the tests have one.

    Samples that stay in their places, and do not move then, are independent all the same.
    """
    here = replace(moved.shuffle, order=torch.arange(experiment.samples))
    unpermuted = _first_that_runs(experiment, base, iter([here]), others)
    detail = MOVED.format(amount=moved.amount)
    dependence = cross_sample_dependence(experiment)
    order: Counterexample | None = None
    if simd and dependence is None:
        order = not_equivariant(experiment)
    against = {
        "simd_forward": Contradiction(detail, dependence or order),
        # Predictions that depend on each other may do so through statistics, which nobody knows.
        "simd_given_statistics": Contradiction(detail, order),
    }
    stays = unpermuted is not None and not _is_confirmed(experiment, unpermuted)
    if dependence is None and stays:
        return against
    return against | {"independent_forward": Contradiction(detail, dependence)}


def try_statistics(
    experiment: Experiment, predictions: Sequence[Tensor] | None, grouped: bool
) -> Outcome:
    """Return what came of the trial of SIMD given statistics.

    ``grouped``: some statistics are of groups, which samples would leave by other places.
    """
    base = _base(experiment, predictions)
    if not base.shape[1]:
        return NO_PLACE
    keep = _half(experiment.samples)
    for measure in (when_held, by_order):
        if grouped and measure is by_order:
            continue
        shuffles = _shuffles(experiment, keep, 0, not grouped)
        moved = _first_that_runs(experiment, base, shuffles, measure)
        if moved is None:
            # Statistics that cannot be held leave the order to be tried.
            continue
        if not _is_confirmed(experiment, moved):
            return {}
        witness = None if grouped else not_equivariant(experiment)
        detail = MOVED.format(amount=moved.amount)
        return {"simd_given_statistics": Contradiction(detail, witness)}
    return NOT_TAKEN


def _base(experiment: Experiment, predictions: Sequence[Tensor] | None) -> Tensor:
    """Return the predictions for the batch itself, ``[N, entries]``."""
    return experiment.rows(experiment.base if predictions is None else predictions)


# --- changed batches ------------------------------------------------------------------------------


def _half(samples: int) -> Tensor:
    """Return which samples to keep: about half of them, by chance, but not the first or last.

    What depends on one sample for all is mostly on one of these.
    """
    chance = torch.randperm(samples, generator=torch.Generator().manual_seed(samples))
    keep = chance < (samples + 1) // 2
    keep[0] = False
    if samples > 2:
        keep[-1] = False
    if not keep.any():
        keep[1] = True
    return keep


def _order(samples: int) -> Tensor:
    """Return a permutation that no pattern of indices explains."""
    index = torch.arange(samples)
    order = torch.randperm(samples, generator=torch.Generator().manual_seed(1))
    if torch.equal(order, index):
        return index.roll(1)
    return order


def _shuffles(experiment: Experiment, keep: Tensor, seed: int, permute: bool) -> Iterator[Shuffle]:
    """Yield changed batches, the most telling first: a program may not take all of them."""
    orders = [torch.arange(experiment.samples)]
    if permute and experiment.samples_are_alike:
        orders.insert(0, _order(experiment.samples))
    changes: list[tuple[str, int | None]] = [("noisy", None), ("rolled", None)]
    for marker in markers(experiment.graph, experiment.graph.forward_steps)[:1]:
        changes.insert(0, ("noisy", marker))
    for order in orders:
        for variant, value in changes:
            yield Shuffle(order, keep, variant, seed, value)


def markers(graph: Graph, steps: Iterable[Step]) -> list[int]:
    """Return the integers that steps compare integers with: labels to ignore, say."""
    found: dict[int, None] = {}
    for step in steps:
        other = step.named.get("other")
        if step.name not in COMPARISONS or not isinstance(other, int) or isinstance(other, bool):
            continue
        if all(not graph.values[ref.index].dtype.is_floating_point for ref in step.refs()):
            found[other] = None
    return list(found)


def _first_that_runs(
    experiment: Experiment, base: Tensor, shuffles: Iterator[Shuffle], measure: Measure
) -> Moved | None:
    """Return what the first changed batch moves that the program takes; None where it takes none.

    Of values that the program does not expect, results that are no numbers say little: then the
    next one.
    """
    last = None
    for shuffle in shuffles:
        try:
            amounts = measure(experiment, base, shuffle)
        except Exception:
            continue
        last = Moved(shuffle, measure, float(amounts.max()))
        if math.isfinite(last.amount):
            break
    return last


def _is_confirmed(experiment: Experiment, moved: Moved) -> bool:
    """Return whether predictions moved by more than rounding, in float64 as well."""
    amount = moved.amount
    # Most of what is tried ends here.
    if amount <= experiment.by_type or amount <= experiment.tolerance:
        return False
    if not experiment.repeatable:
        return False
    wide = experiment.wide
    if moved.measure is when_held or experiment.by_replay:
        wide = experiment.wide_replay
    if wide is None:
        return amount > max(100 * experiment.tolerance, OBVIOUS)
    again = moved.measure(wide, wide.rows(wide.base), moved.shuffle)
    n = int(again.argmax())
    if float(again[n]) <= max(SURVIVES * min(amount, 1.0), wide.by_type):
        return False
    if not math.isfinite(float(again[n])):
        return True
    shuffle = moved.shuffle
    changed = wide.changed(shuffle.keep, shuffle.variant, shuffle.seed)
    rounding = torch.maximum(wide.roundings(wide.inputs), wide.roundings(changed))
    return is_above(float(again[n]), rounding[shuffle.order[n]])


# --- by how much predictions move -----------------------------------------------------------------


def others(experiment: Experiment, base: Tensor, shuffle: Shuffle) -> Tensor:
    """Return by how much kept predictions move when others are replaced and all are permuted."""
    inputs = shuffle.inputs(experiment)
    with torch.no_grad():
        if draws(experiment.graph):
            new = experiment.replayed(inputs, _noise(experiment, shuffle))
        else:
            new = experiment.predict(inputs)
    return _amounts(base, experiment.rows(new), shuffle)


def when_held(experiment: Experiment, base: Tensor, shuffle: Shuffle) -> Tensor:
    """Return by how much predictions move under permutation, and then, statistics held, by others.

    The statistics are those of the permuted batch: one replay has them and the first answer.
    """
    noise = _noise(experiment, shuffle)
    everyone = torch.ones_like(shuffle.keep)
    with torch.no_grad():
        frozen = freeze(experiment, experiment.permuted(shuffle.order), noise)
        of_order = _amounts(base, frozen.before, replace(shuffle, keep=everyone))
        of_others = _amounts(base, frozen.rows(shuffle.inputs(experiment)), shuffle)
    return torch.maximum(of_order, of_others)


def by_order(experiment: Experiment, base: Tensor, shuffle: Shuffle) -> Tensor:
    """Return by how much predictions move when samples are permuted, and none is replaced."""
    new = experiment.rows(predict_permuted(experiment, shuffle.order))
    return _amounts(base, new, replace(shuffle, keep=torch.ones_like(shuffle.keep)))


def _noise(experiment: Experiment, shuffle: Shuffle) -> Mapping[int, Tensor]:
    """Return the noise that moves along with its samples."""
    if torch.equal(shuffle.order, torch.arange(experiment.samples)):
        # Drawn from the same random state, it is the same by itself.
        if stream_depends_on_data(experiment.graph):
            return recorded_noise(experiment.graph)
        return {}
    return permuted_noise(experiment, shuffle.order)


def _amounts(base: Tensor, new: Tensor, shuffle: Shuffle) -> Tensor:
    """Return by how much each kept prediction moved; infinite where it is no number any more."""
    if new.shape != base.shape:
        raise Untestable(NOT_TAKEN)
    expected = base[shuffle.order]
    amounts = relative_change(expected, new)
    lost = (torch.isfinite(expected.abs()) & ~torch.isfinite(new.abs())).any(1)
    amounts = torch.where(lost, torch.inf, amounts)
    return torch.where(shuffle.kept, amounts, 0.0)
