"""Columns of the Gauss-Newton factor through the statistics of batch norms, and beside them.

With the statistics ``s`` of all batch norms as inputs of their own, ``F_n = f(x_n, θ, s)`` and
``s = S(θ)``, so that a column of the Gauss-Newton factor is

    v_nj = p_nj + Bᵀ a_nj

    p_nj = (∂F_n/∂θ)ᵀ s_nj   all statistics held constant: one pullback serves all samples
    a_nj = (∂F_n/∂s)ᵀ s_nj   the *partial* derivative: the other statistics held constant
    B    = dS/dθ             the *total* derivative: through the batch norms below

B has R = 2 Σ C_l rows, however many columns there are. What is made of p, a and B stands in
``low_rank.py``; whether that is cheaper is decided in ``strategy.py``.

Legend: ``r`` statistic: of every batch norm the means of its channels, then the reciprocals ``ρ``
of their standard deviations; ``M`` values that a statistic is taken over.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from unbatch.analysis.domain.sample_layout import Layout, SeveralAxes, any_layout_of
from unbatch.autodiff.context import Context
from unbatch.autodiff.jvp import LinearisedGraph, differentiated
from unbatch.capture import ops
from unbatch.capture.graph import Graph
from unbatch.capture.steps import ExecutedOp, Step
from unbatch.capture.substitutes import moments
from unbatch.errors import StructureError
from unbatch.linalg.probes import gaussians_like, seeded

Named = Mapping[int, Tensor]  # by prediction

MATRIX_PRODUCTS = ("mm", "addmm", "bmm", "baddbmm")

# --- one batch norm -------------------------------------------------------------------------------


@dataclass(frozen=True)
class BatchNormStatistics:
    """A batch norm as it ran, and the derivatives of and by its statistics.

    ``source``, ``result``: its input and output in the graph; ``at``: where in ``s`` its
    statistics begin.
    """

    call: ExecutedOp
    source: int
    result: int
    layout: Layout | SeveralAxes
    at: int

    @cached_property
    def moments(self) -> tuple[Tensor, Tensor]:
        """Means and reciprocal standard deviations, ``[channels]`` each."""
        op = self.call.op
        return moments(op, ops.batch_norm_arguments(op, self.call.arguments), self.call.outputs)

    @property
    def channels(self) -> int:
        return len(self.moments[0])

    @property
    def where(self) -> slice:
        """Return where in ``s`` its statistics are."""
        return slice(self.at, self.at + 2 * self.channels)

    @cached_property
    def normalised(self) -> Tensor:
        """The input with mean 0 and variance 1: ``x̂ = (x − mean) ρ``."""
        x, (mean, rstd) = self.call["input"], self.moments
        return (x - self._by_channel(mean)) * self._by_channel(rstd)

    def _by_channel(self, t: Tensor) -> Tensor:
        """Return ``[channels]`` in a shape that broadcasts against the input."""
        return t.reshape(1, -1, *[1] * (self.call["input"].ndim - 2))

    def partial(self, g: Tensor) -> Tensor:
        """Return ``[n, 2c]``: derivatives by both statistics, for a cotangent ``g`` of the output.

        Of ``y = γ (x − mean) ρ + β``: by mean ``−γρ Σ g``, by ρ ``γ Σ g (x − mean)``, which is
        ``(γ/ρ) Σ g x̂``.
        """
        gain, rstd = self.call["weight"], self.moments[1]
        if gain is None:
            gain = torch.ones_like(rstd)
        # Split, a value is [n, blocks of a sample, channels, ..]: sum over all but n and channels.
        inside = _axes_but(g.ndim + 1, 0, 2)
        by_mean = self.layout.split(g).sum(inside)
        by_rstd = self.layout.split(g * self.normalised).sum(inside)
        return torch.cat([-by_mean * (gain * rstd), by_rstd * (gain / rstd)], 1)

    def pulled(self, u: Tensor) -> Tensor:
        """Return the cotangent of the input for ``u``, ``[2c]``, at the statistics.

        As ``∂mean/∂x = 1/M`` and ``∂ρ/∂x = −ρ² x̂ / M``.
        """
        (u_mean, u_rstd), rstd = u.chunk(2), self.moments[1]
        M = self.normalised.numel() // self.channels
        by_rstd = self._by_channel(u_rstd * rstd.square()) * self.normalised
        return (self._by_channel(u_mean) - by_rstd) / M

    def pushed(self, dx: Tensor) -> Tensor:
        """Return ``[2c]``: how both statistics move with the input."""
        inside = _axes_but(dx.ndim, 1)
        by_rstd = -self.moments[1].square() * (dx * self.normalised).mean(inside)
        return torch.cat([dx.mean(inside), by_rstd])


def _axes_but(ndim: int, *others: int) -> list[int]:
    return [axis for axis in range(ndim) if axis not in others]


# --- what it costs, before anything has run -------------------------------------------------------


@dataclass(frozen=True)
class StatisticsCost:
    """What it takes to go by way of batch statistics, from shapes alone: nothing has run for it.

    ``shares``: what part of a backward pass it takes to pull a statistic of each batch norm down
    from there; ``work``: multiplications of a forward pass, about.
    """

    channels: tuple[int, ...]
    shares: tuple[float, ...]
    work: int
    element_size: int

    @property
    def size(self) -> int:
        """Return how many statistics there are: a mean and a deviation for every channel."""
        return 2 * sum(self.channels)

    @property
    def passes(self) -> float:
        """Return what pulling back all statistics takes, in whole backward passes."""
        passes = 0.0
        for channels, share in zip(self.channels, self.shares, strict=True):
            passes += 2 * channels * share
        return passes

    @staticmethod
    def of(context: Context, parameters: Mapping[str, Tensor]) -> StatisticsCost | None:
        """Return None where samples depend on each other in other ways, or in half precision."""
        norms = _batch_norms(context, parameters)
        dtypes = _dtypes(parameters)
        if not norms or not _is_full_precision(dtypes):
            return None
        graph = context.graph
        steps = differentiated(graph, context.schedule(parameters, "component"))
        works = {step.index: multiplications(graph, step) for step in steps}
        work = sum(works.values())
        shares, channels = [], []
        for norm in norms:
            # A pullback from a batch norm goes through the steps before it only.
            below = sum(w for index, w in works.items() if index < norm.step)
            shares.append(below / work)
            channels.append(graph.values[norm.source].shape[1])
        return StatisticsCost(tuple(channels), tuple(shares), work, dtypes.pop().itemsize)


def _dtypes(parameters: Mapping[str, Tensor]) -> set[torch.dtype]:
    return {p.dtype for p in parameters.values()}


def _is_full_precision(dtypes: set[torch.dtype]) -> bool:
    """Return whether all is in float32, or all in float64."""
    return len(dtypes) == 1 and dtypes <= {torch.float32, torch.float64}


def multiplications(graph: Graph, step: Step) -> int:
    """Return about how many multiplications an op takes."""
    output = step.outs[0]
    if output is None:
        return 0
    read = [graph.values[ref.index] for ref in step.refs()]
    entries = graph.values[output.index].entries
    # A jagged tensor has none that could be counted, and a length that is no number.
    if not all(value.entries for value in read):
        return entries
    shapes = [value.shape for value in read]
    if step.name == "convolution":
        # Of every output entry: the input channels of a group times the entries of the kernel.
        return entries * math.prod(shapes[1][1:])
    if step.name in MATRIX_PRODUCTS:
        # Of every output entry: the length of the rows of the right matrix, the last argument.
        return entries * shapes[-1][-2]
    return entries  # pointwise, about


# --- all batch norms ------------------------------------------------------------------------------


class Statistics:
    """The statistics of all batch norms, where nothing else makes samples depend on each other.

    ``free`` is the linear map ``J``, ``frozen`` the one with all statistics held constant; each of
    them is one forward pass.
    """

    def __init__(
        self, free: LinearisedGraph, frozen: LinearisedGraph, norms: list[BatchNormStatistics]
    ) -> None:
        self.free, self.frozen, self.norms = free, frozen, norms
        self.size = norms[-1].where.stop  # they lie in ``s`` one after the other

    @staticmethod
    def of(context: Context, parameters: Mapping[str, Tensor]) -> Statistics | None:
        """Return None where samples depend on each other in other ways, or in half precision."""
        places = _batch_norms(context, parameters)
        if not places:
            return None
        sources = [place.source for place in places]
        results = [place.result for place in places]
        # B is pulled back from the input of a batch norm, a from its output.
        free = LinearisedGraph(context, parameters, watched=sources)
        frozen = LinearisedGraph(context, parameters, frozen=True, watched=results)
        norms = _executed(places, free, frozen)
        dtypes = _dtypes(parameters)
        for norm in norms:
            dtypes.add(norm.moments[0].dtype)  # under autocast another than that of the parameters
        if not norms or not _is_full_precision(dtypes):
            return None
        statistics = Statistics(free, frozen, norms)
        if not statistics.holds():
            return None
        return statistics

    def holds(self) -> bool:
        """Return whether the split agrees with J for one random cotangent ``u``.

        ``Jᵀ u = (∂F/∂θ)ᵀ u + Bᵀ (∂F/∂s)ᵀ u``: a self-check, without which it is not used.
        """
        outputs = {i: t for i, t in self.free.outputs.items() if t.requires_grad}
        # One cotangent suffices: two different linear maps agree on it with probability zero.
        u = gaussians_like(outputs, seeded(0))
        through = self.pull(self.coefficients(u).sum(0))
        beside = self.frozen.pull(u)
        size, error = 0.0, 0.0
        for name, g in self.free.pull(u).items():
            size += float(g.norm())
            error += float((through[name] + beside[name] - g).norm())
        return error <= self.free.context.rounding * size

    def coefficients(self, cotangents: Named) -> Tensor:
        """Return ``a``, ``[n, R]``, for one column of every sample."""
        ends, vectors = [], []
        for i, output in self.frozen.outputs.items():
            if i in cotangents and output.requires_grad:
                ends.append(output)
                vectors.append(cotangents[i])
        edges = [self.frozen.edges[n.result] for n in self.norms]
        at_norms: Sequence[Tensor | None] = torch.autograd.grad(
            ends, edges, vectors, retain_graph=True, allow_unused=True
        )
        # With statistics constant one pullback keeps all samples apart.
        samples = self.frozen.context.samples
        partials = []
        for norm, g in zip(self.norms, at_norms, strict=True):
            if g is None:  # no prediction depends on the result of this batch norm
                partials.append(norm.moments[0].new_zeros(samples, 2 * norm.channels))
            else:
                partials.append(norm.partial(g))
        return torch.cat(partials, 1)

    def pull(self, u: Tensor) -> dict[str, Tensor]:
        """Return ``Bᵀ u``, by parameter."""
        # A statistic with a zero cotangent is left out: the pullback then begins lower down.
        ends, vectors = [], []
        for norm in self.norms:
            if u[norm.where].any():
                ends.append(self.free.edges[norm.source])
                vectors.append(norm.pulled(u[norm.where]))
        leaves = self.free.leaves
        grads: Sequence[Tensor | None] = torch.autograd.grad(
            ends, list(leaves.values()), vectors, retain_graph=True, allow_unused=True
        )
        by_name = {}
        for (name, p), g in zip(leaves.items(), grads, strict=True):
            # None: no statistic depends on this parameter.
            by_name[name] = torch.zeros_like(p) if g is None else g
        return by_name

    def push(self, v: Mapping[str, Tensor]) -> Tensor:
        """Return ``B v``, ``[R]``."""
        # The jvp may stop at the inputs of the batch norms.
        tangents = self.free.push(v, [norm.source for norm in self.norms])
        return torch.cat([norm.pushed(tangents[norm.source]) for norm in self.norms])


# --- where the batch norms are --------------------------------------------------------------------


@dataclass(frozen=True)
class _BatchNorm:
    """A batch norm in the graph: its step, input, output, and where the samples lie in that."""

    step: int
    source: int
    result: int
    layout: Layout | SeveralAxes


def _batch_norms(context: Context, parameters: Mapping[str, Tensor]) -> Sequence[_BatchNorm]:
    """Return the batch norms; none where anything else makes samples depend on each other."""
    # Two plans: with statistics held constant, and as the model is.
    try:
        frozen = context.schedule(parameters, "frozen").plan
        free = context.schedule(parameters, "component").plan
    except StructureError:
        return []
    steps = [context.graph.steps[i] for i in sorted(frozen.frozen_norms)]
    # Values that are held constant beside the statistics themselves, and depend on parameters,
    # are another way for samples to depend on each other.
    statistics: set[int] = set()
    for step in steps:
        statistics.update(ref.index for ref in step.outs[1:] if ref is not None)
    if (frozen.frozen - statistics) & free.theta or frozen.by_place:
        return []
    norms = []
    for step in steps:
        source, result = step.refs()[0].index, step.outs[0]
        if source not in free.theta:
            continue  # its statistics do not depend on the parameters
        if result is None:
            return []
        layout = any_layout_of(context.interpretation.ownership[result.index], context.samples)
        # 1 is the axis of the channels.
        if not isinstance(layout, Layout | SeveralAxes) or 1 in layout.dims:
            return []
        norms.append(_BatchNorm(step.index, source, result.index, layout))
    return norms


def _executed(
    places: Sequence[_BatchNorm], free: LinearisedGraph, frozen: LinearisedGraph
) -> list[BatchNormStatistics]:
    """Return the batch norms that ran, with their places in ``s`` one after the other."""
    calls = {call.step.index: call for call in free.steps}
    norms: list[BatchNormStatistics] = []
    at = 0
    for place in places:
        # Left out: a batch norm that no parameter reaches, or whose output reaches no prediction.
        if place.step not in calls or place.source not in free.edges:
            continue
        if place.result not in frozen.edges:
            continue
        call = calls[place.step]
        norm = BatchNormStatistics(call, place.source, place.result, place.layout, at)
        norms.append(norm)
        at = norm.where.stop
    return norms
