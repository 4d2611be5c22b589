"""Tests of the verdicts on the loss, as a function of the predictions F.

    reduction:  L = Σ_n w_n ℓ_n(F_n, y_n)             second differences over two samples vanish
    SIMD loss:  L = ρ(ℓ(F_1, y_1), .., ℓ(F_N, y_N))    ∂L/∂F_n = (∂ρ/∂ℓ_n) ∇ℓ(F_n, y_n), so other
                                                      samples scale this row and do not turn it

A test returns a counterexample, or None, which proves nothing. Directions are up to sign.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from unbatch.linalg.precision import LOSS_WITH_CASTS
from unbatch.verification.counterexample import Counterexample
from unbatch.verification.loss_experiment import TINY, LossExperiment, scaled_by

# How many pairs of samples are tried for a second difference.
PAIRS = 12

# A value that is rounded may be off by this many times what one rounding of the predictions does.
ROUNDINGS = 100

# A true second difference is the same to this share of it when predictions move by these factors.
STEADY = 0.1
NUDGES = (1e-7, -3e-7, 5e-7, -7e-7)

# Factors for predictions far from where they are, and the second difference that counts there.
FAR = (30.0, -1e3)
FAR_DIFFERENCE = 1e-6

# Mixed second derivatives that are of rank one agree to this, relative to their squares.
RANK_ONE = 1e-8

# Of gradients by central differences: absolute, and in the rounding of the loss over the step.
SLOPE, ROUNDED_SLOPE = 1e-6, 1e6

Swap = Mapping[int, int]  # which sample gives its prediction in place of which


# --- is it a sum? ---------------------------------------------------------------------------------


def not_a_sum(loss: LossExperiment) -> Counterexample | None:
    """Return a second difference over two samples that does not vanish.

    ``L(F) - L(F_a → ·) - L(F_b → ·) + L(F_a, F_b → ·)``: of a sum over samples every term cancels.
    """
    samples = loss.experiment.samples
    if samples < 2:
        return None
    tolerance = max(loss.tolerances.second_difference, ROUNDINGS * loss.rounding)
    for a, b in loss.draw.some(_pairs(samples), 2, "pairs of samples"):
        of_a = {a: (a + 1) % samples}
        of_b = {b: (b + 1) % samples}
        swaps: list[Swap] = [{}, of_a, of_b, of_a | of_b]
        corners = [loss.swapped(swap) for swap in swaps]
        difference = abs(_second_difference(loss, corners))
        if difference > tolerance and _is_steady(loss, corners):
            return Counterexample("second difference over two samples", difference)
    far = _far_difference(loss, max(tolerance, FAR_DIFFERENCE))
    if not far:
        return None
    return Counterexample("second difference over two samples, stretched", far)


def _pairs(samples: int) -> list[tuple[int, int]]:
    """Return some ordered pairs of different samples."""
    return list(itertools.permutations(range(samples), 2))[:PAIRS]


def _second_difference(loss: LossExperiment, corners: Sequence[list[Tensor]]) -> float:
    """Return the second difference relative to the loss; 0 where a value is not finite."""
    values = torch.stack([loss.value(predictions).detach() for predictions in corners])
    if not torch.isfinite(values).all():
        return 0.0
    neither, of_a, of_b, both = values
    size = float(values.abs().max()) + TINY
    return float(neither - of_a - of_b + both) / size


def _is_steady(loss: LossExperiment, corners: Sequence[list[Tensor]]) -> bool:
    """Return whether a difference hardly changes when predictions move.

    Of rounding every value is another draw, so that it comes out anew.
    """
    difference = _second_difference(loss, corners)
    for nudge in NUDGES:
        nudged = [scaled_by(predictions, 1 + nudge) for predictions in corners]
        nudged_difference = _second_difference(loss, nudged)
        if abs(difference - nudged_difference) > STEADY * abs(difference):
            return False
    return True


def _far_difference(loss: LossExperiment, tolerance: float) -> float:
    """Return a second difference far from the predictions, for branches that are rarely taken."""
    for factor in loss.draw.some(FAR, 1, "factors"):
        try:
            corners = [loss.scaled(rows, factor) for rows in ((), (0,), (1,), (0, 1))]
            difference = abs(_second_difference(loss, corners))
            if difference > tolerance and _is_steady(loss, corners):
                return difference
        except Exception:
            # It does not take such predictions (a logarithm, an assertion).
            return 0.0
    return 0.0


# --- through one scalar of its own? ---------------------------------------------------------------


def direction_depends_on_predictions(loss: LossExperiment) -> Counterexample | None:
    """Return that the direction of one gradient row changes when the other predictions change."""
    samples = loss.experiment.samples
    base = loss.gradient(loss.predictions())
    if base.shape[1] == 1:
        # A single entry has no direction to change.
        return mixed_derivatives(loss)
    if base.shape[1] < 2 or samples < 2:
        return None
    floor = loss.floor(base)
    amount, sample = 0.0, 0
    for shift in (1, 2):
        for n in loss.draw.some(range(samples), 2, "rows of the gradient"):
            others = loss.gradient(loss.swapped(_rolled(samples, shift, but=n)))
            amount, sample = max((amount, sample), (sine(base[n], others[n], floor), n))
    tolerance = loss.tolerances.direction
    # Differences of values have half of the digits, so only values that are good to float64 do.
    if amount <= tolerance and loss.fine:
        amount, sample = _turn_by_values(loss), 0
        tolerance = LOSS_WITH_CASTS.direction
    if amount <= tolerance:
        return None
    test = "direction of the gradient by one prediction when the others change"
    return Counterexample(test, amount, moved_by=sample)


def _rolled(samples: int, shift: int, but: int) -> dict[int, int]:
    """Return the swap that gives every sample but one the prediction of the ``shift``-th next."""
    swap = {n: (n + shift) % samples for n in range(samples)}
    del swap[but]
    return swap


def _turn_by_values(loss: LossExperiment) -> float:
    """Return how far the row of sample 0 turns, by differences of values.

    Where the loss detaches something, its gradient does not show on what it depends.
    """
    samples = loss.experiment.samples
    size = float(loss.value(loss.predictions()).detach().abs())
    floor = SLOPE + ROUNDED_SLOPE * loss.rounding * size
    worst = 0.0
    for shift in (1, 2):
        slopes = loss.slope(loss.predictions(), 0)
        other_slopes = loss.slope(loss.swapped(_rolled(samples, shift, but=0)), 0)
        worst = max(worst, sine(slopes, other_slopes, floor))
    return worst


def mixed_derivatives(loss: LossExperiment) -> Counterexample | None:
    """Return mixed second derivatives that are not of rank one off the diagonal.

    With one entry per prediction ``∂²L/∂F_a∂F_b = (∂²ρ/∂ℓ_a∂ℓ_b) ℓ'_a ℓ'_b`` for a ≠ b. For a ρ of
    one sum over samples the first factor is the same for every pair, so the minors
    ``H_ab H_cd - H_ad H_cb`` of four different samples vanish.
    """
    samples = loss.experiment.samples
    if samples < 4 or not loss.fine:
        return None
    leaves = [p.requires_grad_() for p in loss.predictions()]
    value = loss.value(leaves)
    if not value.requires_grad:
        return None
    (gradient,) = torch.autograd.grad(value, leaves, create_graph=True)
    gradient = gradient.reshape(-1)
    if not gradient.requires_grad:
        return None
    rows = []
    for n in range(samples):
        (row,) = torch.autograd.grad(gradient[n], leaves, retain_graph=True)
        rows.append(row.reshape(-1))
    H = torch.stack(rows)
    last = samples - 1
    worst = 0.0
    for a, b, c, d in [(0, 1, 2, 3), (0, 2, 1, 3), (0, 1, 3, 2), (last, 0, last - 1, 1)]:
        worst = max(worst, float((H[a, b] * H[c, d] - H[a, d] * H[c, b]).abs()))
    amount = worst / (float(H.abs().max()) ** 2 + TINY)
    if amount <= RANK_ONE:
        return None
    return Counterexample("mixed second derivatives of the loss", amount)


def direction_depends_on_index(loss: LossExperiment) -> Counterexample | None:
    """Return that samples with equal predictions and targets have rows of other directions."""
    samples = loss.experiment.samples
    if samples < 2 or not loss.experiment.samples_are_alike:
        return None
    floor = loss.floor(loss.gradient(loss.predictions()))
    # All samples get the target of the first, and then the prediction of sample k.
    equal = loss.with_targets(lambda t: t[:1].expand(samples, *t.shape[1:]).contiguous())
    for k in range(min(samples, 3)):
        rows = equal.gradient(equal.swapped(dict.fromkeys(range(samples), k)))
        if rows.shape[1] < 2:
            # A single entry has no direction.
            continue
        worst = _largest_turn(rows[:1].expand_as(rows), rows, floor)
        if worst > equal.tolerances.direction:
            return Counterexample("gradient rows of equal samples", worst)
    return None


# --- through its own target? ----------------------------------------------------------------------


def direction_depends_on_targets(loss: LossExperiment) -> Counterexample | None:
    """Return that the direction of one gradient row depends on targets of other samples.

    On its own target as well: where all targets together are one constant that every sample uses
    (their order does not matter), nothing follows.
    """
    samples = loss.experiment.samples
    base = loss.gradient(loss.predictions())
    if base.shape[1] < 2 or samples < 3:
        return None
    floor = loss.floor(base)
    if not _order_of_targets_matters(loss, base, floor):
        return None
    amount, sample = 0.0, -1
    for n in range(samples):
        if _turn_by_targets(loss, base, n, _only(n, samples), floor) < LOSS_WITH_CASTS.direction:
            # Its own target does not matter to this row.
            continue
        turn = _turn_by_targets(loss, base, n, _all_but(n, samples), floor)
        amount, sample = max((amount, sample), (turn, n))
    if amount <= loss.tolerances.direction:
        return None
    test = "direction of the gradient by one prediction when targets of others change"
    return Counterexample(test, amount, moved_by=sample)


def _order_of_targets_matters(loss: LossExperiment, base: Tensor, floor: float) -> bool:
    """Return whether a row turns when every sample gets the target of another one."""
    rolled = loss.with_targets(lambda t: t.roll(1, 0))
    rows = rolled.gradient(rolled.predictions())
    return _largest_turn(base, rows, floor) >= LOSS_WITH_CASTS.direction


def _turn_by_targets(
    loss: LossExperiment, base: Tensor, n: int, order: Tensor, floor: float
) -> float:
    """Return how far row n turns when sample m gets the target of sample ``order[m]``."""
    other = loss.with_targets(lambda t: t[order.to(t.device)])
    rows = other.gradient(other.predictions())
    return sine(base[n], rows[n], floor)


def _only(n: int, samples: int) -> Tensor:
    """Return the order in which sample n, and it alone, gets the target of the next one."""
    order = torch.arange(samples)
    order[n] = (n + 1) % samples
    return order


def _all_but(n: int, samples: int) -> Tensor:
    """Return the order in which all other samples get the target of the one after n."""
    order = torch.full((samples,), (n + 1) % samples)
    order[n] = n
    return order


def _largest_turn(rows: Tensor, others: Tensor, floor: float) -> float:
    """Return the largest angle between a row and its counterpart, by its sine."""
    return float(sines(rows, others, floor).max())


def sine(a: Tensor, b: Tensor, floor: float) -> float:
    """Return ``sines`` of two single gradients."""
    return float(sines(a[None], b[None], floor))


def sines(a: Tensor, b: Tensor, floor: float) -> Tensor:
    """Return how far gradients are from multiples of each other, row by row: ``[n]``.

    For small angles it is their sine; 0 where one of them vanishes or is not finite.
    """
    of_a, of_b = a.norm(dim=1), b.norm(dim=1)
    sized = (of_a >= floor) & (of_b >= floor) & (of_a > 0) & (of_b > 0)
    sized &= torch.isfinite(a).all(1) & torch.isfinite(b).all(1)
    a, b = a / of_a[:, None], b / of_b[:, None]
    # Up to sign: the factor ∂ρ/∂ℓ_n may be negative.
    turns = (a - b * torch.sign((a * b).sum(1, keepdim=True))).norm(dim=1)
    return torch.where(sized, turns, 0)


# --- do parameters enter? -------------------------------------------------------------------------


def parameter_enters(loss: LossExperiment) -> Counterexample | None:
    """Return a parameter that changes the loss although the predictions are held fixed."""
    program = loss.experiment.program
    if program.loss is None or not program.modules:
        return None
    # Of their own, as a loss may write to what it is given.
    predictions = loss.predictions()
    before = loss.value(loss.predictions()).detach()
    tolerance = max(loss.tolerances.parameter, ROUNDINGS * loss.rounding)
    moving = {name: p for name, p in program.parameters.items() if p.is_floating_point()}

    def change(parameters: Iterable[Tensor]) -> float:
        with program.untouched(), torch.no_grad():
            for p in parameters:
                # Not a factor alone: a parameter may be zero.
                p.mul_(1.5).add_(0.1)
            after = loss.value(predictions).detach()
        return float((after - before).abs()) / (float(before.abs()) + TINY)

    # Those of a vocabulary one by one take as many evaluations of a large loss.
    if loss.draw.share is not None and change(moving.values()) <= tolerance:
        return None
    for name, p in moving.items():
        amount = change([p])
        if amount > tolerance:
            test = f"changing the parameter {name!r} with the predictions held fixed"
            return Counterexample(test, amount)
    return None
