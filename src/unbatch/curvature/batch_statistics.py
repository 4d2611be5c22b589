"""What runs through the statistics of batch norms, apart from what does not.

With the statistics ``s`` of all batch norms as inputs of their own, ``F_n = f(x_n, θ, s)`` and ``s = S(θ)``, so that a
column of the Gauss-Newton factor is ``v_nj = p_nj + Bᵀ a_nj``: ``p`` with all statistics held constant, which costs
one pullback for all samples; ``a_nj = (∂F_n/∂s)ᵀ s_nj`` the *partial* derivative, with the other statistics held;
``B = dS/dθ`` the *total* one, through the batch norms below. B has R = 2 Σ C_l rows, however many columns there are.

Legend: ``r`` statistic: of every batch norm the means of its channels, then the reciprocals ``ρ`` of their standard
deviations; ``M`` values that a statistic is taken over.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from unbatch.analysis.domain.sample_layout import Layout, layout_of
from unbatch.autodiff.context import Context
from unbatch.autodiff.jvp import LinearisedGraph, differentiated
from unbatch.capture import ops
from unbatch.capture.graph import ExecutedOp, Graph, Step
from unbatch.capture.substitutes import moments
from unbatch.errors import StructureError
from unbatch.linalg.probes import gaussians_like, seeded

Named = Mapping[int, Tensor]  # by prediction


@dataclass(frozen=True)
class BatchNormStatistics:
    """A batch norm as it ran. ``source``, ``result``: its input and output in the graph; ``at``: where in ``s``."""

    call: ExecutedOp
    source: int
    result: int
    layout: Layout
    at: int

    @cached_property
    def moments(self) -> tuple[Tensor, Tensor]:
        """Means and reciprocal standard deviations, ``[channels]``."""
        op = self.call.op
        return moments(op, ops.batch_norm_arguments(op, self.call.arguments), self.call.outputs)

    @property
    def channels(self) -> int:
        return len(self.moments[0])

    @cached_property
    def normalised(self) -> Tensor:
        x, (mean, rstd) = self.call["input"], self.moments
        return (x - self._wide(mean)) * self._wide(rstd)

    def _wide(self, t: Tensor) -> Tensor:
        """By channel, beside the input."""
        return t.reshape(1, -1, *[1] * (self.call["input"].ndim - 2))

    def partial(self, g: Tensor) -> Tensor:
        """``[n, 2c]``: derivatives by both statistics of what has the cotangent ``g`` at the result."""
        gain, rstd = self.call["weight"], self.moments[1]
        rest = [d for d in range(g.ndim + 1) if d not in (0, 2)]
        sums = [self.layout.split(t).sum(rest) for t in (g, g * self.normalised)]
        weight = torch.ones_like(rstd) if gain is None else gain
        return torch.cat([-sums[0] * (weight * rstd), sums[1] * (weight / rstd)], 1)

    def pulled(self, u: Tensor) -> Tensor:
        """The cotangent of the input for ``u``, ``[2c]``, at the statistics."""
        (u_mean, u_rstd), rstd = u.chunk(2), self.moments[1]
        count = self.normalised.numel() // self.channels
        return (self._wide(u_mean) - self._wide(u_rstd * rstd.square()) * self.normalised) / count

    def pushed(self, dx: Tensor) -> Tensor:
        """``[2c]``: how both statistics move with the input."""
        rest = [d for d in range(dx.ndim) if d != 1]
        return torch.cat(
            [dx.mean(rest), -self.moments[1].square() * (dx * self.normalised).mean(rest)]
        )


@dataclass(frozen=True)
class Extent:
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
        pairs = zip(self.channels, self.shares, strict=True)
        return sum(2 * channels * share for channels, share in pairs)

    @staticmethod
    def of(setting: Context, parameters: Mapping[str, Tensor]) -> Extent | None:
        """Return None where samples depend on each other in other ways, too, or in half precision."""
        norms = _norms(setting, parameters)
        types = {p.dtype for p in parameters.values()}
        if not norms or len(types) > 1 or not types <= {torch.float32, torch.float64}:
            return None
        graph = setting.graph
        steps = differentiated(graph, setting.route(parameters, "component"))
        works = {step.index: _work(graph, step) for step in steps}
        work = sum(works.values())
        below = [sum(w for i, w in works.items() if i < index) for index in norms]
        channels = tuple(graph.values[source].shape[1] for source, _, _ in norms.values())
        return Extent(channels, tuple(w / work for w in below), work, types.pop().itemsize)


class Statistics:
    """The statistics of all batch norms, by which samples listen to each other and by nothing else."""

    def __init__(
        self, free: LinearisedGraph, frozen: LinearisedGraph, norms: list[BatchNormStatistics]
    ) -> None:
        self.free, self.frozen, self.norms = free, frozen, norms
        self.size = sum(2 * n.channels for n in norms)

    @staticmethod
    def of(setting: Context, parameters: Mapping[str, Tensor]) -> Statistics | None:
        """None where samples listen to each other in other ways, too, or in half precision."""
        found = _norms(setting, parameters)
        if not found:
            return None
        sources, results = [s for s, _, _ in found.values()], [r for _, r, _ in found.values()]
        free = LinearisedGraph(setting, parameters, watched=sources)
        frozen = LinearisedGraph(setting, parameters, frozen=True, watched=results)
        calls = {c.step.index: c for c in free.steps}
        norms: list[BatchNormStatistics] = []
        for index, (source, result, layout) in found.items():
            if index in calls and source in free.edges and result in frozen.edges:
                at = sum(2 * n.channels for n in norms)
                norms.append(BatchNormStatistics(calls[index], source, result, layout, at))
        types = {p.dtype for p in parameters.values()} | {n.moments[0].dtype for n in norms}
        fits = len(types) == 1 and types <= {torch.float32, torch.float64}
        made = Statistics(free, frozen, norms) if norms and fits else None
        return made if made is not None and made.holds() else None

    def holds(self) -> bool:
        """``Jᵀ u = (∂F/∂θ)ᵀ u + Bᵀ (∂F/∂s)ᵀ u`` for a random u, or it is not believed."""
        u = gaussians_like(
            {i: t for i, t in self.free.outputs.items() if t.requires_grad}, seeded(0)
        )
        through, held = self.pull(self.coefficients(u).sum(0)), self.frozen.pull(u)
        expected = self.free.pull(u)
        size = sum(float(g.norm()) for g in expected.values())
        off = sum(float((through[n] + held[n] - g).norm()) for n, g in expected.items())
        return off <= self.free.setting.rounding * size

    def coefficients(self, cotangents: Named) -> Tensor:
        """``a``, ``[n, R]``, for one column of every sample."""
        ends = {i: t for i, t in self.frozen.outputs.items() if i in cotangents and t.requires_grad}
        edges, gs = [self.frozen.edges[n.result] for n in self.norms], [cotangents[i] for i in ends]
        found = torch.autograd.grad(
            list(ends.values()), edges, gs, retain_graph=True, allow_unused=True
        )
        samples = self.frozen.setting.samples
        parts = [
            n.moments[0].new_zeros(samples, 2 * n.channels) if g is None else n.partial(g)
            for n, g in zip(self.norms, found, strict=True)
        ]
        return torch.cat(parts, 1)

    def pull(self, u: Tensor) -> dict[str, Tensor]:
        """``Bᵀ u``, by parameter."""
        here = [n for n in self.norms if u[n.at : n.at + 2 * n.channels].any()]
        ends = [self.free.edges[n.source] for n in here]
        gs = [n.pulled(u[n.at : n.at + 2 * n.channels]) for n in here]
        leaves = self.free.leaves
        found = torch.autograd.grad(
            ends, list(leaves.values()), gs, retain_graph=True, allow_unused=True
        )
        return {
            n: torch.zeros_like(p) if g is None else g
            for (n, p), g in zip(leaves.items(), found, strict=True)
        }

    def push(self, v: Mapping[str, Tensor]) -> Tensor:
        """``B v``, ``[R]``."""
        moved = self.free.push(v, [n.source for n in self.norms])
        return torch.cat([n.pushed(moved[n.source]) for n in self.norms])


def _work(graph: Graph, step: Step) -> int:
    """Multiplications of an op, about."""
    made = math.prod(graph.values[step.outs[0].index].shape) if step.outs[0] is not None else 0
    shapes = [graph.values[r.index].shape for r in step.refs()]
    if step.name == "convolution":
        return made * math.prod(shapes[1][1:])
    return made * shapes[-1][-2] if step.name in ("mm", "addmm", "bmm", "baddbmm") else made


def _norms(
    setting: Context, parameters: Mapping[str, Tensor]
) -> dict[int, tuple[int, int, Layout]]:
    """By step: input, output, and where the samples lie in it; nothing where anything else makes samples meet."""
    try:
        frozen, free = (setting.route(parameters, by).flow for by in ("frozen", "component"))
    except StructureError:
        return {}
    steps = [setting.graph.steps[i] for i in sorted(frozen.frozen_norms)]
    beside = {r.index for step in steps for r in step.outs[1:] if r is not None}
    if (frozen.frozen - beside) & free.theta or frozen.by_place:
        return {}
    out: dict[int, tuple[int, int, Layout]] = {}
    for step in steps:
        source, made = step.refs()[0].index, step.outs[0]
        layout = (
            layout_of(setting.walk.marks[made.index], setting.samples) if made is not None else None
        )
        if source in free.theta:
            if not isinstance(layout, Layout) or layout.dim == 1 or made is None:
                return {}
            out[step.index] = (source, made.index, layout)
    return out
