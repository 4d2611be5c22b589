"""Tests of the verdicts on the model: counterexamples to independence and to equivariance.

A test returns a counterexample, or None. It can show that a structure *fails* (replacing sample m
moved prediction n), never that it holds. A change is believed where it is still there in float64,
and is more than rounding of the values on the way.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from unbatch.verification.counterexample import Counterexample
from unbatch.verification.experiment import Experiment, relative_change
from unbatch.verification.permutations import predict_permuted
from unbatch.verification.variants import CLOSE_TO_DATA, GAIN, VARIANTS

# Changes above this are believed of a model that cannot be run in float64.
OBVIOUS = 1e-2

# In float64 at least this share of a true change is still there; of rounding, nothing is.
SURVIVES = 1e-2

# Tolerances up to this are those of a model that computes in float64 already.
COMPUTED_IN_DOUBLE = 1e-9

# In float64 a true change is what it was to this share of it; rounding is another one.
AGREE = 0.1

# Where rounding on the way moves predictions by more than this, no digit is left to compare.
LOST = 1e-3

# Samples whose sizes are further apart than this may lose digits in float64 as well.
UNEQUAL = 1e4

# A change counts where it is more than this many times what rounding on the way does, and where it
# is more than that many times, float64 need not be asked.
ROUNDINGS, FAR = 30, 1000

# How many samples are replaced one by one in search of the one that moved a prediction, and how
# often a set of samples is made smaller.
CANDIDATES, REDUCTIONS = 16, 64


# --- independence ---------------------------------------------------------------------------------


class Replacement(NamedTuple):
    """Other samples in place of all outside ``keep``: ``[N]``, boolean."""

    variant: str
    seed: int
    keep: Tensor

    def inputs(self, experiment: Experiment) -> Any:
        """Return the changed batch."""
        return experiment.changed(self.keep, self.variant, self.seed)

    @property
    def gain(self) -> float:
        """By how much more the results are rounded than those of the batch."""
        return GAIN.get(self.variant, 1.0)

    def only(self, replaced: Sequence[int]) -> Replacement:
        """Return the replacement of some of the samples that this one replaces, by the same."""
        keep = torch.ones_like(self.keep)
        keep[list(replaced)] = False
        return self._replace(keep=keep)


class Change(NamedTuple):
    """A prediction that changed, by how much relative to its size, and in each of its entries."""

    prediction: int
    amount: float
    difference: Tensor


def cross_sample_dependence(experiment: Experiment) -> Counterexample | None:
    """Return a prediction that moves when other samples are replaced.

    The batch is tried as it is; far from the data, where a branch may be taken that is not taken
    close to them; and in float64, where a dependence shows that rounding hides in the precision of
    the model (a statistic that an iteration starts from).
    """
    if not experiment.repeatable:
        return None
    counterexample = _moved_prediction(experiment)
    if counterexample is None:
        counterexample = _moved_prediction(experiment.stretched(100.0))
    if counterexample is None and experiment.wide is not None:
        counterexample = _moved_prediction(experiment.wide)
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
    replacements = experiment.draw.some(_replacements(experiment.samples), 8, "replacements")
    for replacement in replacements:
        witness = witness_of(experiment, replacement)
        if witness is not None:
            return witness
    return None


def _replacements(samples: int) -> Iterator[Replacement]:
    """Yield what is tried, over variants and sets of samples."""
    sets = list(partitions(samples))
    for variant in VARIANTS:
        tried = sets
        if variant not in CLOSE_TO_DATA:
            # Far from the data one set and its complement have to do.
            tried = sets[:2]
        for seed, keep in enumerate(tried):
            yield Replacement(variant, seed, keep)


def witness_of(experiment: Experiment, replacement: Replacement) -> Counterexample | None:
    """Return the prediction that a replacement moves most, and the fewest samples that move it.

    None where nothing moves, or what moves may be rounding.
    """
    change = _largest_change(experiment, replacement, replacement.keep)
    if change is None:
        return None
    # First in the precision of the model, and where float64 does not agree, in float64.
    for in_double in (False, True):
        at = experiment.wide if in_double else experiment
        if at is None:
            continue
        replaced, of_these = _narrowed(at, replacement, change)
        if _is_confirmed(experiment, replacement.only(replaced), of_these):
            return _counterexample(replaced, of_these)
        if not _is_confirmed(experiment, replacement, change):
            return None
    return _counterexample([int(m) for m in torch.nonzero(~replacement.keep)], change)


def _counterexample(replaced: Sequence[int], change: Change) -> Counterexample:
    """Return the change of a prediction by samples that were replaced."""
    together = tuple(replaced) if len(replaced) > 1 else ()
    return Counterexample(
        "replacing other samples", change.amount, change.prediction, replaced[0], together
    )


def _largest_change(
    experiment: Experiment, replacement: Replacement, watched: Tensor
) -> Change | None:
    """Return the largest change of a watched prediction.

    None where nothing changes beyond rounding, or the model does not take that batch.
    """
    rows = _rows_of(experiment, replacement)
    if rows is None:
        return None
    # What was replaced may change as it likes.
    amounts = torch.where(watched, relative_change(*rows), 0.0)
    worst = int(amounts.argmax())
    amount = float(amounts[worst])
    if amount <= experiment.by_type * replacement.gain:
        return None
    # To know what rounding of the inputs does takes a forward pass. An obvious change is held to
    # rounding of all values on the way, later.
    is_obvious = amount > OBVIOUS * replacement.gain
    if not is_obvious and amount <= experiment.tolerance * replacement.gain:
        return None
    return Change(worst, amount, (rows[1] - rows[0])[worst])


def _rows_of(experiment: Experiment, replacement: Replacement) -> tuple[Tensor, Tensor] | None:
    """Return predictions before and after; None where the model does not take that batch."""
    try:
        new = experiment.rows(experiment.predict(replacement.inputs(experiment)))
    except Exception:
        return None
    base = experiment.rows(experiment.base)
    if new.shape != base.shape:
        return None
    return base, new


def _is_confirmed(experiment: Experiment, replacement: Replacement, change: Change) -> bool:
    """Return whether a change is there in float64, and more than rounding on the way."""
    if _is_far_above(experiment, replacement, change):
        return True
    wide, n = experiment.wide, change.prediction
    if wide is None and not _is_believed_in_one_precision(experiment, change.amount):
        return False
    at = wide or experiment
    rows = _rows_of(at, replacement)
    if rows is None:
        return False
    amount = float(relative_change(*rows)[n])
    if wide is not None and amount <= max(SURVIVES * change.amount, wide.by_type):
        return False
    inputs = replacement.inputs(at)
    # The same change in two precisions is none of rounding.
    if wide is not None and experiment.by_type > COMPUTED_IN_DOUBLE:
        agrees = _agree(change.difference, (rows[1] - rows[0])[n])
        if agrees and not _unequal(at, inputs, rows):
            return True
    return is_above(amount, torch.maximum(at.roundings(at.inputs), at.roundings(inputs))[n])


def _is_far_above(experiment: Experiment, replacement: Replacement, change: Change) -> bool:
    """Return whether an obvious change is so far above rounding that one precision shows it."""
    if change.amount <= OBVIOUS * replacement.gain:
        return False
    rounding = 0.0
    for inputs in (experiment.inputs, replacement.inputs(experiment)):
        of_this = float(experiment.roundings(inputs)[change.prediction])
        # None at all: the recording cannot be run on it, or computes with whole numbers.
        if not of_this:
            return False
        rounding = max(rounding, of_this)
    return change.amount > FAR * rounding


def is_above(amount: float, rounding: Tensor) -> bool:
    """Return whether a change is more than rounding on the way explains."""
    return amount > ROUNDINGS * float(rounding) and float(rounding) <= LOST


def _is_believed_in_one_precision(experiment: Experiment, amount: float) -> bool:
    """Return whether a change counts although float64 cannot be asked."""
    if experiment.tolerance <= COMPUTED_IN_DOUBLE:
        return True
    return amount > max(100 * experiment.tolerance, OBVIOUS)


def _agree(a: Tensor, b: Tensor) -> bool:
    """Return whether two precisions show the same change of a prediction."""
    a, b = a.nan_to_num(0, 0, 0), b.nan_to_num(0, 0, 0)
    return float((a - b).abs().max()) <= AGREE * float(b.abs().max())


def _unequal(experiment: Experiment, inputs: Any, rows: Sequence[Tensor]) -> bool:
    """Return whether samples, or their predictions, are of very different size."""
    sizes = [_size_of_each(t) for t in rows if t.numel()]
    for batch in (experiment.inputs, inputs):
        for x, dim in zip(tree_leaves(batch), experiment.dims, strict=True):
            if dim is not None and x.is_floating_point() and x.numel():
                sizes.append(_size_of_each(x.detach().movedim(dim, 0)).to(sizes[0]))
    all_sizes = torch.cat(sizes).nan_to_num(0, 0, 0)
    # Samples of zeros, such as padding, are no question of digits.
    present = all_sizes[all_sizes > 0]
    return bool(len(present)) and float(present.max()) > UNEQUAL * float(present.min())


def _size_of_each(x: Tensor) -> Tensor:
    """Return the largest magnitude of each sample; its entries may be a single number."""
    return x.abs().reshape(len(x), -1).amax(1)


def _narrowed(
    experiment: Experiment, replacement: Replacement, change: Change
) -> tuple[list[int], Change]:
    """Return the fewest samples found whose replacement moves a prediction, and that change.

    One where one alone does, of the first few; else a set of which none can be left out, or the
    search for it has become long.
    """
    watched = torch.arange(experiment.samples) == change.prediction
    replaced = [int(m) for m in torch.nonzero(~replacement.keep)]
    for m in replaced[:CANDIDATES]:
        of_one = _largest_change(experiment, replacement.only([m]), watched)
        if of_one is not None:
            return [m], of_one
    # By halves first, then by ever smaller parts: a part is left out where the rest still moves it.
    part, tries = len(replaced) // 2, 0
    while part and tries < REDUCTIONS:
        start = 0
        while start < len(replaced) and tries < REDUCTIONS:
            rest = replaced[:start] + replaced[start + part :]
            tries += 1
            of_rest = None
            if rest:
                of_rest = _largest_change(experiment, replacement.only(rest), watched)
            if of_rest is None:
                start += part
            else:
                replaced, change = rest, of_rest
        part //= 2
    return replaced, change


# --- equivariance ---------------------------------------------------------------------------------


def not_equivariant(
    experiment: Experiment, orders: Sequence[Tensor] | None = None
) -> Counterexample | None:
    """Return that permuting the samples does more than permute the predictions.

    ``orders``: the permutations to try; by default some of all samples.
    """
    if not experiment.repeatable or not experiment.samples_are_alike:
        return None
    base = experiment.rows(experiment.base)
    if not base.shape[1]:
        return None
    size = _largest(base) + 1e-37
    for order in orders or _orders(experiment.samples):
        try:
            new = experiment.rows(predict_permuted(experiment, order))
        except Exception:
            continue
        if new.shape != base.shape:
            continue
        # Equivariant: F(X[order]) = F(X)[order].
        amount = float(_largest(new - base[order]) / size)
        if amount <= 10 * experiment.by_type:
            continue
        if amount <= OBVIOUS and amount <= 10 * experiment.tolerance:
            continue
        if _is_confirmed_for(experiment, order, amount):
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
    wide = experiment.wide
    if wide is None and amount <= max(100 * experiment.tolerance, OBVIOUS):
        return False
    at = wide or experiment
    base = at.rows(at.base)
    new = at.rows(predict_permuted(at, order))
    again = float(_largest(new - base[order]) / (_largest(base) + 1e-37))
    if wide is not None and again <= SURVIVES * amount:
        return False
    if wide is not None and experiment.by_type > COMPUTED_IN_DOUBLE:
        narrow = experiment.rows(predict_permuted(experiment, order))
        worst = int((new - base[order]).abs().nan_to_num(0, 0, 0).amax(1).argmax())
        change = narrow - experiment.rows(experiment.base)[order]
        agrees = _agree(change[worst], (new - base[order])[worst])
        if agrees and not _unequal(at, at.inputs, (base, new)):
            return True
    return is_above(again, at.roundings(at.inputs).max())


def _largest(rows: Tensor) -> Tensor:
    """Return the largest finite magnitude."""
    return rows.abs().nan_to_num(0, 0, 0).amax()
