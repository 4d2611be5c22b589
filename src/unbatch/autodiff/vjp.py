"""Cotangents pulled back from the predictions to the parameter use sites.

Where samples are separate, one backward pass gives the cotangents of all of them, and a site is
contracted as soon as its cotangent is there. Below the mixing frontier every sample is a column,
pulled back in chunks from the seeds. What is done where is said by a ``Schedule``; what comes out
are row blocks: rows of one parameter for a slice of samples, or contractions that do without rows.

Lives here: the backward passes, and the way from operands to parameters. What the forward pass
keeps is in ``forward.py``.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from unbatch.analysis.domain.sample_layout import AnyLayout, Layout
from unbatch.autodiff.autograd import Gate, batched_grad, pick, solid
from unbatch.autodiff.contractions.batch_norm import PooledRows
from unbatch.autodiff.contractions.contraction import Contraction
from unbatch.autodiff.contractions.matmul import Linear
from unbatch.autodiff.contractions.row_block import LazyRowBlock, RowBlock, RowBlockView
from unbatch.autodiff.dependence import within
from unbatch.autodiff.forward import ForwardPass
from unbatch.autodiff.planner import BackwardPlan, Site
from unbatch.autodiff.schedule import GroupMembers, Hook, PooledSite, Schedule
from unbatch.capture.graph import Graph
from unbatch.linalg.rows import sum_of

# Why there are sites, and why columns. Legend: n, m samples; θ a parameter, u an operand made of
# it, y the result of a step that combines u with values of samples (a site); F_n a prediction, and
# g_n = ∂L/∂F_n its cotangent.
#
#     row_n = (∂F_n/∂θ)ᵀ g_n = Σ_sites (∂u/∂θ)ᵀ Σ_m (∂y_m/∂u)ᵀ (∂F_n/∂y_m)ᵀ g_n
#
# Where y is separate, ∂F_n/∂y_m = 0 for m ≠ n. One backward pass from all g together then gives
# ȳ_n = (∂F_n/∂y_n)ᵀ g_n for every sample, and the site is contracted sample by sample:
# (∂y_n/∂u)ᵀ ȳ_n.
#
# Elsewhere all m contribute to row n. But z̄_n is known at a seed z, the lowest value that is still
# separate. What is below is pulled back once for each n, from a z̄ that is zero but for the entries
# of sample n: a column.


@dataclass
class Group:
    """Parameters that are contracted together.

    With the contractions of their sites in one backward pass, as they get their cotangents.
    """

    members: GroupMembers
    contractions: dict[int, list[Contraction]] = field(default_factory=dict)  # by operand
    waiting: int = 0  # for the cotangents of so many sites
    # The one contraction, and how its operand is seen in the one parameter, if that is all there
    # is.
    single: tuple[Contraction, RowBlockView] | None = None

    def add(self, operand: int, contraction: Contraction) -> None:
        """Take the contraction of one more site, which has received its cotangent."""
        self.contractions.setdefault(operand, []).append(contraction)
        self.waiting -= 1

    def complete(self) -> None:
        """Get ready to be read: no more cotangents will come."""
        self.waiting = 0
        contractions: list[Contraction] = []
        for operand, of_operand in self.contractions.items():
            self.contractions[operand] = _joined(of_operand)
            contractions += self.contractions[operand]
        if self.members.view is not None and len(contractions) == 1:
            self.single = contractions[0], self.members.view

    def free(self) -> None:
        """Let go of the cotangents, and of what the contractions kept of the forward pass."""
        self.contractions, self.single = {}, None

    @property
    def lean(self) -> frozenset[str]:
        """What can be had without rows."""
        if self.single is None:
            return frozenset()
        return self.single[0].lean


class Seed(NamedTuple):
    """A value from which columns start, and the cotangents of all samples there."""

    edge: GradientEdge | Tensor
    layout: AnyLayout
    cotangent: Tensor


@dataclass(frozen=True)
class _BackwardPass:
    """What is wanted of the backward pass from the predictions that is under way."""

    take: Callable[[Group], None] | None
    last: bool


@dataclass
class Sweep:
    """The forward pass of one question, and its backward passes."""

    schedule: Schedule
    graph: Graph
    parameters: Mapping[str, Tensor]
    feed: Mapping[int, Tensor]
    # What the last backward pass has left: cotangents to start columns from, and groups to be
    # contracted.
    seeds: list[Seed] = field(default_factory=list)
    groups: list[Group] = field(default_factory=list)
    kinds: dict[Site, str] = field(default_factory=dict)  # how each site was contracted
    spent: bool = False  # nothing is left for another backward pass
    _under_way: _BackwardPass | None = None

    @property
    def plan(self) -> BackwardPlan:
        """The plan that the schedule was made for."""
        return self.schedule.plan

    # -- forward --

    @cached_property
    def _forward(self) -> ForwardPass:
        ready = weakref.WeakMethod(self._gradient_ready)
        return ForwardPass(self.schedule, self.graph, self.parameters, self.feed, ready)

    def forward(self) -> None:
        """Run the model."""
        self._forward.run()

    @property
    def predictions(self) -> dict[int, Tensor]:
        """By number in the graph."""
        return self._forward.predictions

    @property
    def outputs(self) -> dict[int, Tensor]:
        """All that the model returns, detached."""
        return self._forward.outputs

    @property
    def inner(self) -> dict[int, Tensor]:
        """Values beside the predictions that the loss reads, detached."""
        return self._forward.inner

    # -- backward, where samples are separate --

    def pull(
        self,
        cotangents: Mapping[int, Tensor],
        take: Callable[[Group], None] | None = None,
        last: bool = True,
    ) -> None:
        """Run one backward pass from the predictions to the sites above the frontier and the seeds.

        ``take`` is called with each group as soon as its cotangents are there, to contract it;
        groups that are tied to columns, or all if there is no ``take``, stay in ``groups``.
        ``last``: no other backward pass will follow, and what has been contracted need not be kept.
        """
        self.groups = [Group(g, waiting=len(g.sites)) for g in self.schedule.groups]
        self.spent = last
        self._under_way = _BackwardPass(take, last)
        at_seeds = self._backward(cotangents, last)
        # Groups with all their cotangents were completed on the way, by the hooks.
        # Sites that the loss does not depend on have no cotangents to wait for.
        for group in self.groups:
            if group.contractions and group.waiting:
                self._complete(group)
        self._under_way = (
            None  # ``take`` may hold this sweep, and hooks have to rest while columns are pulled
        )
        self.seeds = self._seeds(cotangents, at_seeds)

    def _backward(self, cotangents: Mapping[int, Tensor], last: bool) -> dict[int, Tensor | None]:
        """Run autograd, and return the cotangents of the seeds.

        Those of the sites are handed over by hooks on the way, or at the end.
        """
        plan, forward = self.plan, self._forward
        ends, gs = [], []
        for i, cotangent in cotangents.items():
            if self.predictions[i].requires_grad:
                ends.append(self.predictions[i])
                gs.append(cotangent)
        seeds = within(plan.seeds, forward.edges)
        edges: list[Any] = pick(forward.edges, seeds)
        for _, of_outputs in forward.without_hook:
            edges += of_outputs.values()
        at_edges: Sequence[Tensor | None] = [None] * len(edges)
        if ends:
            # The anchor is an input of the whole computation: with it, all sites are passed.
            inputs = [*edges, forward.anchor]
            retain = bool(plan.columns) or not last
            at_edges = torch.autograd.grad(ends, inputs, gs, retain_graph=retain, allow_unused=True)
        others = iter(at_edges[len(seeds) :])
        for hook, of_outputs in forward.without_hook:
            received: list[Tensor | None] = [None] * (max(of_outputs) + 1)
            for k in of_outputs:
                received[k] = next(others)
            self._gradient_ready(hook, received)
        return dict(zip(seeds, at_edges, strict=False))

    def _gradient_ready(self, hook: Hook, cotangents: Sequence[Tensor | None]) -> None:
        """Contract the sites of a step whose outputs have their cotangents."""
        under_way = self._under_way
        if under_way is None:
            return
        received = [None if g is None else solid(g.detach()) for g in cotangents]
        if all(g is None for g in received):
            return
        contractions = self._forward.contractions
        for site, number in self.schedule.contracted[hook.step.index]:
            # A contraction takes one cotangent: for more backward passes, it is kept as it is.
            last = under_way.last
            contraction = contractions.pop(site) if last else contractions[site].fresh_copy()
            contraction.receive(received)
            self.kinds[site] = contraction.kind
            group = self.groups[number]
            group.add(site.operand, contraction)
            if not group.waiting:
                self._complete(group)

    def _complete(self, group: Group) -> None:
        """Contract a group that has all its cotangents, and free it, if somebody takes it."""
        group.complete()
        under_way = self._under_way
        if under_way is None or under_way.take is None or group.members.reached_by_columns:
            return
        under_way.take(group)
        group.free()

    def _seeds(
        self, cotangents: Mapping[int, Tensor], at_seeds: Mapping[int, Tensor | None]
    ) -> list[Seed]:
        """Return what columns start from; a prediction that is not separate is a seed itself."""
        plan, seeds = self.plan, []
        for i, g in at_seeds.items():
            if g is not None:
                seeds.append(Seed(self._forward.edges[i], plan.layouts[i], g.detach()))
        for i, g in cotangents.items():
            if i in plan.unsplit and self.predictions[i].requires_grad:
                layout = Layout(plan.predictions[i], plan.samples)
                seeds.append(Seed(self.predictions[i], layout, g))
        return seeds

    # -- below the mixing frontier --

    def columns(
        self, first: int, last: int, outs: Mapping[str, Tensor]
    ) -> Iterator[tuple[str, RowBlock]]:
        """Iterate over row blocks of samples ``first`` to ``last``.

        As far as they come from below the frontier: a parameter may have sites above it as well.
        """
        where = slice(first, last)
        alone = [seed.layout.only(seed.cotangent, first, last) for seed in self.seeds]
        rows, at_pooled = self._from_seeds(alone, last - first)
        for name in list(rows):
            yield name, RowBlock(where, rows.pop(name))
        for pooled, g in at_pooled:
            contraction = self._pooled_rows(pooled.site).of(g, first)
            yield pooled.name, self._pooled_block(pooled, contraction, where, outs.get(pooled.name))

    def sum_of_columns(self, weights: Tensor) -> dict[str, Tensor]:
        """Return ``Σ_n c_n row_n``, as far as rows come from below the frontier.

        At the price of one backward pass.
        """
        scaled = [seed.layout.scaled(seed.cotangent, weights)[None] for seed in self.seeds]
        rows, at_pooled = self._from_seeds(scaled, 1)
        sums = _only_row(rows)
        for pooled, g in at_pooled:
            contraction = self._pooled_rows(pooled.site).of(g, 0)
            block = self._pooled_block(pooled, contraction, slice(0, 1), None)
            sums[pooled.name] = block.rows()[0]
        return sums

    def _pooled_rows(self, site: Site) -> PooledRows:
        contraction = self._forward.contractions[site]
        assert isinstance(contraction, PooledRows)
        return contraction

    def _pooled_block(
        self, pooled: PooledSite, contraction: Contraction, where: slice, out: Tensor | None
    ) -> LazyRowBlock:
        like = self.parameters[pooled.name].detach()
        return LazyRowBlock(where, contraction, pooled.view, out, like)

    def _from_seeds(
        self, cotangents: Sequence[Tensor], count: int
    ) -> tuple[dict[str, Tensor], list[tuple[PooledSite, Tensor]]]:
        """Pull columns back, ``count`` of them, from their cotangents at the seeds.

        Return rows by parameter, and for pooled sites the cotangents of their outputs:
        ``[count, *shape]`` each.
        """
        forward, names = self._forward, self.schedule.by_autograd
        # A pooled site whose product depends on no seed has no edge, and no rows from here.
        pooled_sites = [p for p in self.schedule.pooled_sites.values() if p.out in forward.edges]
        inputs: list[GradientEdge | Tensor] = []
        inputs += pick(forward.leaves, names)
        for pooled in pooled_sites:
            inputs.append(forward.edges[pooled.out])
        with Gate.shut():
            at_inputs = batched_grad([seed.edge for seed in self.seeds], inputs, cotangents, count)
        at_leaves = zip(names, at_inputs[: len(names)], strict=True)
        at_pooled = zip(pooled_sites, at_inputs[len(names) :], strict=True)
        rows = {name: r for name, r in at_leaves if r is not None}
        return rows, [(pooled, g) for pooled, g in at_pooled if g is not None]

    # -- from operands to parameters --

    def blocks(
        self, group: Group, where: slice, out: Tensor | None
    ) -> Iterator[tuple[str, RowBlock]]:
        """Iterate over the row blocks of a group, for a slice of samples.

        The rows of a single parameter are formed in ``out``, if that is given.
        """
        if group.single is not None:
            (name,) = group.members.names
            yield name, LazyRowBlock(where, *group.single, out, self.parameters[name].detach())
            return
        for name, rows in self.rows(group, where).items():
            yield name, RowBlock(where, rows)

    def rows(self, group: Group, where: slice) -> dict[str, Tensor]:
        """Return rows of the parameters of a group, summed over their sites."""
        first, last, _ = where.indices(self.plan.samples)
        # Rows of operands are summed first: the way to the parameters is then taken once.
        sums: dict[int, Tensor] = {}
        for operand, contractions in group.contractions.items():
            sums[operand] = sum_of([c.rows(where) for c in contractions])
        return self._to_parameters(group, sums, last - first)

    def weighted_sum(self, weights: Tensor) -> dict[str, Tensor]:
        """Return ``Σ_n c_n row_n`` of every parameter, at about the price of its gradient.

        All groups must still be there.
        """
        totals = {n: torch.zeros_like(p) for n, p in self.parameters.items()}
        for group in self.groups:
            if group.contractions:
                _add(totals, self.group_sum(group, weights))
        _add(totals, self.sum_of_columns(weights))
        return totals

    def group_sum(self, group: Group, weights: Tensor) -> dict[str, Tensor]:
        """Return ``Σ_n c_n row_n`` of the parameters of a group, without the columns below."""
        if group.single is not None:
            # Some contractions have weighted sums without rows.
            blocks = self.blocks(group, slice(0, self.plan.samples), None)
            return {name: block.weighted_sum(weights) for name, block in blocks}
        sums: dict[int, Tensor] = {}
        for operand, contractions in group.contractions.items():
            sums[operand] = sum_of([c.weighted_sum(weights) for c in contractions])[None]
        # A weighted sum goes to the parameters as a single row.
        return _only_row(self._to_parameters(group, sums, 1))

    def _to_parameters(
        self, group: Group, sums: dict[int, Tensor], count: int
    ) -> dict[str, Tensor]:
        """Return rows of the parameters of a group, from rows of the operands made of them.

        ``sums``: by operand, ``count`` rows each.
        """
        rows: dict[str, Tensor] = {}
        operands, cotangents = [], []
        for operand, of_operand in sums.items():
            # An operand may be a parameter itself, used beside others that are made of it (tied).
            if operand in self.plan.parameters:
                rows[self.plan.parameters[operand]] = of_operand
            else:
                operands.append(self._forward.operands[operand])
                cotangents.append(of_operand)
        if not operands:
            return rows
        names = group.members.names
        leaves = pick(self._forward.leaves, names)
        for name, r in zip(names, batched_grad(operands, leaves, cotangents, count), strict=True):
            if r is None:
                continue
            if name in rows:
                rows[name] = rows[name] + r
            elif any(r.data_ptr() == other.data_ptr() for other in rows.values()):
                # Autograd may hand out one tensor for two leaves, and rows may be written to.
                rows[name] = r.clone()
            else:
                rows[name] = r
        return rows


def _add(totals: dict[str, Tensor], share: Mapping[str, Tensor]) -> None:
    for name, t in share.items():
        totals[name] += t


def _only_row(rows: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the one row of every parameter."""
    return {name: of_parameter[0] for name, of_parameter in rows.items()}


def _joined(contractions: list[Contraction]) -> list[Contraction]:
    """Return the contractions of one operand, those that are matrix products as one."""
    products: list[Linear] = []
    others: list[Contraction] = []
    for contraction in contractions:
        if type(contraction) is Linear and not contraction.batched:
            products.append(contraction)
        else:
            others.append(contraction)
    # Those of a recurrence are many, one for each time step, and small.
    orders = {product.features_first for product in products}
    if len(products) < 2 or len(orders) > 1:
        return contractions
    return [Linear.joined(products), *others]
