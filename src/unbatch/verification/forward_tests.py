"""Tests of the verdicts on the model: counterexamples to independence and to equivariance.

A test returns a counterexample, or None. It can show that a structure *fails* (replacing sample m
moved prediction n), never that it holds. A change that may be rounding is looked at again in
float64 before it is believed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from unbatch.verification.counterexample import Counterexample
from unbatch.verification.experiment import Experiment, relative_change
from unbatch.verification.permutations import predict_permuted
from unbatch.verification.variants import CLOSE_TO_DATA, GAIN, VARIANTS

# Changes above this are no rounding in any precision: they are believed without a second look.
OBVIOUS = 1e-2

# In float64 at least this share of a true change is still there; of rounding, nothing is.
SURVIVES = 1e-2

# Tolerances up to this are those of a model that computes in float64 already.
COMPUTED_IN_DOUBLE = 1e-9

# How many samples are replaced one by one in search of the one that moved a prediction.
CANDIDATES = 16


# --- independence ---------------------------------------------------------------------------------


class Change(NamedTuple):
    """The prediction that changed most, and by how much relative to its size."""

    prediction: int
    amount: float


def cross_sample_dependence(experiment: Experiment) -> Counterexample | None:
    """Return a prediction that moves when other samples are replaced.

    The batch is tried as it is; far from the data, where a branch may be taken that is not taken
    close to them; and in float64, where a dependence shows that rounding hides in the precision of
    the model (a statistic that an iteration starts from).
    """
    if not experiment.repeatable:
        return None
    wide = experiment.in_double()
    counterexample = _moved_prediction(experiment)
    if counterexample is None:
        counterexample = _moved_prediction(experiment.stretched(100.0))
    if counterexample is None and wide is not None:
        counterexample = _moved_prediction(wide)
    return counterexample


def partitions(samples: int) -> Iterator[Tensor]:
    """Yield few sets of samples such that every ordered pair is separated by one of them.

    By the bits of their indices: ``2 log2(N)`` sets in place of ``N``.
    """
    index = torch.arange(samples)
    bits = math.ceil(math.log2(max(samples, 2)))
    for bit in range(bits):
        for side in (0, 1):
            keep = (index >> bit) & 1 == side
            if keep.any() and not keep.all():
                yield keep


def _moved_prediction(experiment: Experiment) -> Counterexample | None:
    """Return the first confirmed change of a prediction, over variants and sets of samples."""
    sets = list(partitions(experiment.samples))
    for variant in VARIANTS:
        tried = sets
        if variant not in CLOSE_TO_DATA:
            # Far from the data one set and its complement have to do.
            tried = sets[:2]
        for seed, keep in enumerate(tried):
            change = _largest_change(experiment, variant, seed, keep, keep)
            if change is None:
                continue
            if not _is_confirmed(experiment, variant, seed, keep, change):
                continue
            return _narrowed(experiment, variant, seed, keep, change)
    return None


def _largest_change(
    experiment: Experiment, variant: str, seed: int, keep: Tensor, watched: Tensor
) -> Change | None:
    """Return the largest change of a watched prediction when all samples outside ``keep`` change.

    None where nothing changes beyond rounding, or the model does not take that batch.
    """
    try:
        new = experiment.rows(experiment.predict(experiment.changed(keep, variant, seed)))
    except Exception:
        return None
    base = experiment.rows(experiment.base)
    if new.shape != base.shape:
        return None
    # What was replaced may change as it likes.
    amounts = torch.where(watched, relative_change(base, new), 0.0)
    worst = int(amounts.argmax())
    if amounts[worst] <= experiment.tolerance * GAIN.get(variant, 1.0):
        return None
    return Change(worst, float(amounts[worst]))


def _is_confirmed(
    experiment: Experiment, variant: str, seed: int, keep: Tensor, change: Change
) -> bool:
    """Return whether a change is far above rounding, or still there in float64."""
    if change.amount > max(100 * experiment.tolerance, OBVIOUS):
        return True
    wide = experiment.in_double()
    if wide is None:
        # No second look is possible: small changes are believed of a model in float64 alone.
        return experiment.tolerance <= COMPUTED_IN_DOUBLE
    again = _largest_change(wide, variant, seed, keep, keep)
    return again is not None and again.amount > SURVIVES * change.amount


def _narrowed(
    experiment: Experiment, variant: str, seed: int, keep: Tensor, change: Change
) -> Counterexample:
    """Return one sample whose replacement alone moves the prediction, where there is one."""
    test = "replacing other samples"
    index = torch.arange(experiment.samples)
    replaced = [int(m) for m in torch.nonzero(~keep)]
    for m in replaced[:CANDIDATES]:
        watched = index == change.prediction
        of_one = _largest_change(experiment, variant, seed, index != m, watched)
        if of_one is not None:
            return Counterexample(test, of_one.amount, change.prediction, m)
    return Counterexample(test, change.amount, change.prediction, replaced[0])


# --- equivariance ---------------------------------------------------------------------------------


def not_equivariant(experiment: Experiment) -> Counterexample | None:
    """Return that permuting the samples does more than permute the predictions."""
    if not experiment.repeatable:
        return None
    base = experiment.rows(experiment.base)
    if not base.shape[1]:
        return None
    size = _largest(base) + 1e-37
    for order in _orders(experiment.samples):
        try:
            new = experiment.rows(predict_permuted(experiment, order))
        except Exception:
            continue
        if new.shape != base.shape:
            continue
        # Equivariant: F(X[order]) = F(X)[order].
        amount = float(_largest(new - base[order]) / size)
        if amount <= 10 * experiment.tolerance:
            continue
        if amount > OBVIOUS or _is_confirmed_for(experiment, order, amount):
            return Counterexample("permuting the samples", amount)
    return None


def _orders(samples: int) -> Iterator[Tensor]:
    """Yield permutations: neighbours, distant samples, and what no pattern of indices explains."""
    index = torch.arange(samples)
    yield index.roll(1)
    yield index.flip(0)
    yield torch.randperm(samples, generator=torch.Generator().manual_seed(0))


def _is_confirmed_for(experiment: Experiment, order: Tensor, amount: float) -> bool:
    """Return whether a difference between permuted predictions is still there in float64."""
    wide = experiment.in_double()
    if wide is None:
        return amount > 100 * experiment.tolerance
    base = wide.rows(wide.base)
    new = wide.rows(predict_permuted(wide, order))
    return float(_largest(new - base[order])) > SURVIVES * amount * float(_largest(base))


def _largest(rows: Tensor) -> Tensor:
    """Return the largest finite magnitude."""
    return rows.abs().nan_to_num(0, 0, 0).amax()
