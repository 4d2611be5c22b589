"""The self-check of a backward plan: it is run against a plain backward pass before it is believed.

Rows by component are linear in the cotangents of the samples. So if ``Σ_n c_n row_n`` agrees with a
plain backward pass for one random choice of weights and cotangents, it agrees for all but a set of
measure zero. One sample's row, its norm and its squares are then held against the sum in which all
others weigh nothing. Frozen rows are compared with a replay whose statistics are frozen, copy rows
by their sum. Where a sum is not finite, another batch takes the place of this one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from unbatch.analysis.domain.sample_layout import Layout
from unbatch.autodiff.autograd import detached, gradients, leaves_of
from unbatch.autodiff.context import Context
from unbatch.autodiff.dependence import values_returned
from unbatch.autodiff.other_batches import finite_batches, is_finite
from unbatch.autodiff.planner import BackwardPlan
from unbatch.autodiff.schedule import Schedule
from unbatch.capture.substitutes import held, norm_with_constant_statistics
from unbatch.gradients.replayed_rows import ReplayedRows
from unbatch.linalg.precision import DOUBLE, in_double, largest
from unbatch.linalg.probes import gaussians_like, seeded
from unbatch.linalg.rows import real, squares

ALWAYS = 2**26  # bytes that a trial in float64 may take in any case

# What ops raise that have no float64 kernel, or that read a dtype.
NO_DOUBLE = (RuntimeError, TypeError, NotImplementedError, IndexError)

# Rounding in the largest numbers shows, to this share, in small ones that are their difference.
CANCELLATION = 1e-3


def trusted(
    context: Context, parameters: Mapping[str, Tensor], by: str, memory: int
) -> bool | None:
    """Return whether the planned backward pass gives what a plain one gives.

    In float64 where the computation can be run in it and ``memory`` allows, so that small gradients
    count as much as large ones. The answer is kept with the plan. None where nothing can be
    compared, because parameters are not finite, say.
    """
    # Plans are made for a set of parameters and a decomposition, and so are answers.
    key = (tuple(parameters), by)
    if key not in context.trust:
        plan = context.schedule(parameters, by).plan
        form = plan.form
        passes = context.tested.plans.get((key, form))
        if passes is None:
            passes = _is_possible(context, plan) and _passes(context, parameters, by, memory)
        if passes is None:
            return None  # on another batch it may be found out
        context.trust[key] = passes
        if form is not None and passes:
            context.tested.plans[key, form] = True
    return context.trust[key]


def _is_possible(context: Context, plan: BackwardPlan) -> bool:
    """Return whether cotangents can be cut into those of samples, and contracted at all sites."""
    if not plan.divisible:
        return False
    graph = context.graph
    # No contraction knows sparse or nested operands, or cotangents.
    at_sites: set[int] = set()
    for site in plan.sites:
        at_sites.update([site.operand, *values_returned(graph.steps[site.step])])
    return all(graph.values[i].is_strided for i in at_sites)


def _passes(
    context: Context, parameters: Mapping[str, Tensor], by: str, memory: int
) -> bool | None:
    # Forward and backward together take about three times the values, as measured.
    fits = 3 * context.values_in_double <= max(memory, ALWAYS)
    # Where float64 does not fit, float32 may do; if that fails, rounding may be to blame, and
    # float64 decides all the same.
    if not fits and _agrees(context, parameters, by, context.rounding):
        return True
    try:
        doubles = {name: in_double(p.detach()) for name, p in parameters.items()}
        return _agrees(context.in_double(), doubles, by, DOUBLE)
    except NO_DOUBLE:
        if not fits:
            return False
        return _agrees(context, parameters, by, context.rounding)


def _agrees(
    context: Context, parameters: Mapping[str, Tensor], by: str, bound: float
) -> bool | None:
    """Return whether a trial agrees with a plain backward pass, up to a relative error.

    None where no plain backward pass is finite, on this batch or on others in its place.
    """
    trial = _Trial(context, parameters, by)
    if trial.is_finite:
        return trial.agrees(bound)
    # What one sample has that is not finite is in every sum, and hides all others.
    for other in finite_batches(context, trial.predictions):
        trial = _Trial(other, parameters, by)
        if trial.is_finite:
            return trial.agrees(bound)
    return None


class _Trial:
    """A plain backward pass, with random cotangents, to hold a planned one against."""

    def __init__(self, context: Context, parameters: Mapping[str, Tensor], by: str) -> None:
        self.context, self.parameters, self.by = context, parameters, by
        self.weights = _random_weights(context, parameters, by)
        schedule = context.schedule(parameters, by)
        self.predictions, self.cotangents, self.expected = _plain_sum(
            schedule, parameters, context.data, self.weights
        )

    @property
    def is_finite(self) -> bool:
        """Whether there is something to compare."""
        return is_finite(self.expected)

    def agrees(self, bound: float) -> bool:
        """Return whether the planned pass agrees with it, up to a relative error."""
        rows = ReplayedRows(self.context, self.parameters, self.by, self.cotangents)
        trial = rows.trial(self.weights, self.context.samples // 2)
        scale = largest(self.cotangents.values())
        norms, magnitudes, roots = {}, {}, {}
        for name, row in trial.of_sample.items():
            norms[name] = squares(row[None]).sqrt()
            magnitudes[name] = row.abs()
            # Roots, because errors of squares would be held against the squares of small numbers.
            roots[name] = trial.squares[name].sqrt()
        return (
            _close(trial.weighted, self.expected, bound, scale)
            and _close(trial.row, trial.of_sample, bound, scale)
            and _close(trial.norm, norms, bound, scale)
            and _close(roots, magnitudes, bound, scale)
            and _close({**trial.of_sample, **trial.beside}, trial.of_sample, bound, scale)
        )


def _random_weights(context: Context, parameters: Mapping[str, Tensor], by: str) -> Tensor:
    """Return weights of samples, ``[N]``; ones for copy rows, of which only the sum can be
    compared.
    """
    # Between 0.5 and 1.5: no sample is lost, and no two weigh the same.
    weights = torch.rand(context.samples, generator=seeded(0), dtype=torch.float64) + 0.5
    if by == "copy":
        weights = torch.ones_like(weights)
    like = next(iter(parameters.values()))
    return weights.to(like.device, real(like.dtype))


def _plain_sum(
    schedule: Schedule,
    parameters: Mapping[str, Tensor],
    feed: Mapping[int, Tensor],
    weights: Tensor,
) -> tuple[dict[int, Tensor], dict[int, Tensor], dict[str, Tensor]]:
    """Return predictions, random cotangents of them, and ``Σ_n c_n row_n`` for these.

    By one backward pass of a plain replay in which what a decomposition holds constant is constant.
    """
    graph, plan = schedule.graph, schedule.plan
    leaves = leaves_of(parameters)
    live = plan.by_number(leaves)
    # The replay knows nothing of sites, contractions or columns: an independent definition.
    constant: dict[int, Callable[..., Any]] = {}
    for step in schedule.cut_off:
        constant[step.index] = held(step.op)
    for i in plan.frozen_norms:
        constant[i] = norm_with_constant_statistics(graph.steps[i])
    with torch.enable_grad():
        outputs = graph.run(
            {**feed, **live}, list(plan.predictions), instead=constant, steps=graph.forward_steps
        )
    values = zip(plan.predictions, outputs, strict=True)
    # A prediction that no parameter moves has no cotangent to pull back.
    predictions = {i: output for i, output in values if output.requires_grad}
    cotangents = gaussians_like(predictions, seeded(1))
    # Rows are linear in cotangents, so that one pass with scaled ones gives the weighted sum.
    scaled = []
    for i, g in cotangents.items():
        scaled.append(Layout(plan.predictions[i], plan.samples).scaled(g, weights))
    total = gradients(list(predictions.values()), leaves, scaled)
    return detached(predictions), cotangents, detached(total)


def _close(
    computed: Mapping[str, Tensor], expected: Mapping[str, Tensor], bound: float, scale: float
) -> bool:
    """Return whether tensors agree up to rounding.

    Of that there is more where what is large cancels, as in biases right below batch norms.
    """
    size = max(largest(expected.values()), scale)
    for name, reference in expected.items():
        if not reference.numel():
            continue
        allowed = bound * (float(reference.abs().max()) + CANCELLATION * size)
        error = float((computed[name] - reference).abs().max())
        if not error <= allowed:  # true for not a number as well
            return False
    return True
