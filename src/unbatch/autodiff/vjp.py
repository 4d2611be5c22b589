"""One replay of the recorded forward pass, and cotangents pulled back from the predictions to the sites.

Where samples are separate, one backward pass gives the cotangents of all of them, and a site is contracted as soon as
its cotangent is there; below, every sample is a column, pulled back in chunks from the seeds. What is to be done where
is said by a ``Route``; what comes out are *parts*: rows of one parameter for a slice of samples, or contractions that
do without rows.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.utils._pytree import tree_leaves, tree_map

from unbatch.analysis.domain.sample_layout import Layout
from unbatch.autodiff.autograd import Gate, attached, batched_grad, solid
from unbatch.autodiff.contractions.batch_norm import Pooled
from unbatch.autodiff.contractions.contraction import Contraction, OperandUse
from unbatch.autodiff.contractions.matmul import Linear
from unbatch.autodiff.contractions.registry import contraction_for, projected
from unbatch.autodiff.contractions.row_block import LazyRowBlock, RowBlock, RowBlockView
from unbatch.autodiff.planner import BackwardPlan, Site
from unbatch.autodiff.schedule import Hook, Schedule, Together
from unbatch.capture.graph import Graph, Ref, Step, flat
from unbatch.capture.substitutes import held, norm_evaluated, norm_held
from unbatch.linalg.rows import sum_of


@dataclass
class Group:
    """Parameters that are contracted together, and what cotangents met at their sites."""

    together: Together
    meetings: dict[int, list[Contraction]] = field(default_factory=dict)  # by operand
    waiting: int = 0  # for how many sites
    only: tuple[Contraction, RowBlockView] | None = (
        None  # the one meeting and how its operand is seen in the one parameter, if so
    )

    def complete(self) -> None:
        """No more cotangents will come."""
        self.waiting = 0
        self.meetings = {i: _joined(meetings) for i, meetings in self.meetings.items()}
        alone = [m for each in self.meetings.values() for m in each]
        if self.together.view is not None and len(alone) == 1:
            self.only = alone[0], self.together.view

    def let_go(self) -> None:
        self.meetings, self.only = {}, None

    @property
    def lean(self) -> frozenset[str]:
        """What can be had without rows."""
        return self.only[0].lean if self.only is not None else frozenset()


@dataclass
class Sweep:
    """The forward pass of one question, with what its sites keep of it, and its backward passes."""

    route: Schedule
    graph: Graph
    parameters: Mapping[str, Tensor]
    feed: Mapping[int, Tensor]
    edges: dict[int, GradientEdge] = field(default_factory=dict)
    made: dict[Site, Contraction] = field(
        default_factory=dict
    )  # what each site keeps of the forward pass
    predictions: dict[int, Tensor] = field(default_factory=dict)
    outputs: dict[int, Tensor] = field(default_factory=dict)  # all that the model returns, detached
    inner: dict[int, Tensor] = field(
        default_factory=dict
    )  # values beside the predictions that the loss reads
    seeds: list[tuple[Any, Any, Tensor]] = field(default_factory=list)  # edge, layout, cotangent
    groups: list[Group] = field(
        default_factory=list
    )  # what the last backward pass has left to be contracted
    kinds: dict[Site, str] = field(default_factory=dict)  # how each site was contracted
    spent: bool = False  # nothing is left for another backward pass
    _for_norm: dict[Site, OperandUse] = field(
        default_factory=dict
    )  # calls that wait for the batch norm above them
    _several: list[tuple[Hook, list[GradientEdge | None]]] = field(
        default_factory=list
    )  # stops with several outputs
    _take: Callable[[Group], None] | None = None
    _last: bool = True  # nothing is kept for another backward pass
    _listening: bool = False  # a backward pass from the predictions is under way, and no column

    @property
    def flow(self) -> BackwardPlan:
        return self.route.flow

    @cached_property
    def leaves(self) -> dict[str, Tensor]:
        """The parameters as they are differentiated by."""
        return {n: p.detach().requires_grad_() for n, p in self.parameters.items()}

    @cached_property
    def live(self) -> dict[int, Tensor]:
        """What is made of parameters without samples, connected to them."""
        return {i: self.leaves[name] for i, name in self.flow.parameters.items()}

    @property
    def _steps(self) -> Sequence[Step]:
        return (
            self.route.steps
            if self.graph.steps is self.route.graph.steps
            else self.graph.forward_steps
        )

    # -- forward --

    def forward(self) -> None:
        """Run the model."""
        graph, flow = self.graph, self.flow
        dead = {i: self.parameters[name].detach() for i, name in flow.parameters.items()}
        self._anchor = torch.zeros((), requires_grad=True)
        used = self.route.inner
        wanted = list(
            dict.fromkeys([*flow.predictions, *used, *(r.index for r in graph.predictions)])
        )
        with torch.enable_grad():
            outs = graph.run(
                {**self.feed, **dead},
                wanted,
                visit=self._visit,
                instead=self._instead(),
                steps=self._steps,
            )
        found = dict(zip(wanted, outs, strict=True))
        self.predictions = {i: found[i] for i in flow.predictions}
        self.inner = {i: found[i].detach() for i in used}
        self.outputs = {r.index: found[r.index].detach() for r in graph.predictions}

    def _visit(self, i: int, value: Tensor) -> None:
        if i in self.route.watched and i not in self.edges and value.requires_grad:
            self.edges[i] = get_gradient_edge(value)

    def _instead(self) -> dict[int, Callable[..., Any]]:
        out: dict[int, Callable[..., Any]] = {s.index: held(s.op) for s in self.route.cut_off}
        out |= {i: partial(self._stop, stop) for i, stop in self.route.stops.items()}
        out |= {
            i: partial(self._chain, self.graph.steps[i], moving)
            for i, moving in self.route.chain.items()
        }
        return out

    def _chain(self, step: Step, moving: bool, *args: Any, **kwargs: Any) -> Any:
        """A step without samples, run on what the parameters make as well."""

        def alive(ref: Any, value: Any) -> Any:
            return self.live.get(ref.index, value.detach()) if isinstance(ref, Ref) else value

        lively = [_zip_map(alive, r, v) for r, v in ((step.args, args), (step.kwargs, kwargs))]
        result = step.op(*lively[0], **lively[1])
        for ref, value in zip(step.outs, flat(result), strict=False):
            if ref is not None and isinstance(value, Tensor):
                self.live[ref.index] = value
        if moving:
            return step.op(*args, **kwargs)
        return tree_map(lambda t: t.detach() if isinstance(t, Tensor) else t, result)

    def _stop(self, stop: Hook, *args: Any, **kwargs: Any) -> Any:
        step = stop.step
        home = args[0] if stop.at_home else None
        if stop.columns or stop.gated:
            connect = partial(self._connected, stop)
            args, kwargs = (
                _zip_map(connect, step.args, args),
                _zip_map(connect, step.kwargs, kwargs),
            )
        kept = self._keep(stop, args, kwargs) if stop.keeps else {}
        if home is not None:
            args = (args[0].clone(), *args[1:])
        norm = {"held": norm_held, "constant": norm_evaluated}.get(stop.norm)
        result = step.op(*args, **kwargs) if norm is None else norm(step)(*args, **kwargs)
        outs = flat(result)
        if stop.uses and not outs[0].requires_grad:
            outs[0] = attached(outs[0], self._anchor)
            result = (outs[0], *outs[1:]) if isinstance(result, tuple | list) else outs[0]
        if stop.keeps:
            self._meet(stop, kept, outs)
        if home is None:
            return result
        assert step.outs[0] is not None
        self._visit(step.outs[0].index, outs[0])
        return home.copy_(outs[0])

    def _connected(self, stop: Hook, ref: Any, value: Any) -> Any:
        """Operands that columns reach are connected to the parameters; columns of other seeds meet a gate."""
        if not isinstance(ref, Ref):
            return value
        value = self.live[ref.index] if ref.index in stop.columns else value
        return Gate.apply(value) if ref.index in stop.gated else value

    def _keep(self, stop: Hook, args: Any, kwargs: Any) -> dict[str, Any]:
        """The arguments by name, detached; those whose memory is written to from here on are copied."""
        named = dict(zip(stop.step.parameters, args, strict=False)) | kwargs
        if stop.step.plain and not stop.spoiled:
            return {
                n: a.detach() if isinstance(a, Tensor) and a.requires_grad else a
                for n, a in named.items()
            }
        known: dict[int, Tensor] = {}

        def one(ref: Any, value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            if not isinstance(ref, Ref):
                return value.detach()
            if ref.index not in known:
                known[ref.index] = (
                    value.detach().clone() if ref.index in stop.spoiled else value.detach()
                )
            return known[ref.index]

        refs = stop.step.named
        return {n: _zip_map(one, refs.get(n), a) for n, a in named.items()}

    def _meet(self, stop: Hook, kept: dict[str, Any], outs: list[Any]) -> None:
        """Keep what the contractions need of the step that just ran, and no more; ask for its cotangent."""
        seen = tuple(o.detach() for o in outs if isinstance(o, Tensor))
        for use in stop.uses:
            held_ = kept[use.site.name]
            operand = held_ if isinstance(held_, Tensor) else tree_leaves(held_)[use.at]
            call = OperandUse(stop.step, kept, seen, operand, use.site.name, use.layouts)
            if use.site.way == "projected":
                self._for_norm[use.site] = call
            else:
                self.made[use.site] = (
                    Pooled(call) if use.site in self.route.pools else contraction_for(call)
                )
                call.outputs = ()
        if stop.below:
            norm = OperandUse(stop.step, kept, seen, seen[0], "", (Layout(0, self.flow.samples),))
            for site in [s for s in self._for_norm if s.step in stop.below]:
                call = self._for_norm.pop(site)
                self.made[site] = projected(call, norm)
                call.outputs = ()
        self._listen(stop, outs)

    # -- backward --

    def _listen(self, stop: Hook, outs: Sequence[Any]) -> None:
        if not any(u.group >= 0 and u.site.way == "local" for u in stop.uses) and not stop.below:
            return
        moving = [o for o in outs if isinstance(o, Tensor) and o.requires_grad]
        if len(moving) == 1 and moving[0] is outs[0]:
            me = weakref.ref(
                self
            )  # the graph holds the hook, and would keep alive what holds the graph

            def arrived(g: Tensor) -> None:
                sweep = me()
                assert sweep is not None
                sweep._arrived(stop, [g])

            moving[0].register_hook(arrived)
        elif moving:
            edges = [
                get_gradient_edge(o) if isinstance(o, Tensor) and o.requires_grad else None
                for o in outs
            ]
            self._several.append((stop, edges))

    def pull(
        self,
        cotangents: Mapping[int, Tensor],
        take: Callable[[Group], None] | None = None,
        last: bool = True,
    ) -> None:
        """One backward pass from the predictions to all sites above the last mixing, and to the seeds.

        ``take`` is given each group as soon as its cotangents are there, to contract it; what it is not given stays in
        ``groups``. ``last``: no other backward pass will follow, and what has been contracted need not be kept.
        """
        flow, route = self.flow, self.route
        self._take, self._last, self.spent, self._listening = take, last, last, True
        self.groups = [Group(g, waiting=len(g.sites)) for g in route.groups]
        outputs = [
            (self.predictions[i], g)
            for i, g in cotangents.items()
            if self.predictions[i].requires_grad
        ]
        wanted: list[Any] = [self.edges[i] for i in flow.seeds if i in self.edges]
        several = [e for _, edges in self._several for e in edges if e is not None]
        found: list[Tensor | None] = [None] * (len(wanted) + len(several))
        if outputs:
            tensors, gs = [list(x) for x in zip(*outputs, strict=True)]
            inputs = [*wanted, *several, self._anchor]
            retain = bool(flow.columns) or not last
            found = list(
                torch.autograd.grad(tensors, inputs, gs, retain_graph=retain, allow_unused=True)
            )
        more = iter(found[len(wanted) :])
        for stop, edges in self._several:
            self._arrived(stop, [next(more) if e is not None else None for e in edges])
        for group in [g for g in self.groups if g.meetings and g.waiting]:
            self._complete(group)
        self._listening, self._take = False, None  # who takes may hold this sweep
        self._seed(
            cotangents, dict(zip([i for i in flow.seeds if i in self.edges], found, strict=False))
        )

    def _seed(self, cotangents: Mapping[int, Tensor], found: Mapping[int, Tensor | None]) -> None:
        flow = self.flow
        self.seeds = [
            (self.edges[i], flow.layouts[i], g.detach()) for i, g in found.items() if g is not None
        ]
        for i, g in cotangents.items():
            if i in flow.unsplit and self.predictions[i].requires_grad:
                self.seeds.append(
                    (self.predictions[i], Layout(flow.predictions[i], flow.samples), g)
                )

    def _arrived(self, stop: Hook, gs: Sequence[Tensor | None]) -> None:
        """The cotangents of a step's outputs are there."""
        if not self._listening or all(g is None for g in gs):
            return
        gs = [solid(g.detach()) if g is not None else None for g in gs]
        local = [(u.site, u.group) for u in stop.uses if u.site.way == "local"]
        under = [
            (u.site, u.group)
            for i in stop.below
            for u in self.route.stops[i].uses
            if u.site.way == "projected"
        ]
        for site, number in [*local, *under]:
            met = self.made.pop(site) if self._last else self.made[site].again()
            met.receive(gs)
            self.kinds[site] = met.kind
            group = self.groups[number]
            group.meetings.setdefault(site.operand, []).append(met)
            group.waiting -= 1
            if not group.waiting:
                self._complete(group)

    def _complete(self, group: Group) -> None:
        group.complete()
        if self._take is not None and not group.together.tied:
            self._take(group)
            group.let_go()

    # -- below the last mixing --

    def columns(
        self, first: int, last: int, outs: Mapping[str, Tensor]
    ) -> Iterator[tuple[str, RowBlock]]:
        """Parts of samples ``first`` to ``last``, as far as they come from below the last mixing."""
        where = slice(first, last)
        rows, cots = self._from_seeds(
            [layout.only(g, first, last) for _, layout, g in self.seeds], last - first
        )
        for name in list(rows):
            yield name, RowBlock(where, rows.pop(name))
        for site, g in cots.items():
            pool, met = self.route.pools[site], self._pooled(site).of(g, first)
            yield (
                pool.name,
                LazyRowBlock(
                    where, met, pool.view, outs.get(pool.name), self.parameters[pool.name].detach()
                ),
            )

    def _pooled(self, site: Site) -> Pooled:
        made = self.made[site]
        assert isinstance(made, Pooled)
        return made

    def _from_seeds(
        self, gs: Sequence[Tensor], count: int
    ) -> tuple[dict[str, Tensor], dict[Site, Tensor]]:
        """Rows by parameter, and for pooled sites the cotangents of their outputs."""
        pools = [p for p in self.route.pools.values() if p.out in self.edges]
        below = self.route.below
        wanted: list[Any] = [*(self.leaves[n] for n in below), *(self.edges[p.out] for p in pools)]
        with Gate.shut():
            rows = batched_grad([e for e, _, _ in self.seeds], wanted, gs, count)
        leaves, edges = rows[: len(below)], rows[len(below) :]
        return (
            {n: r for n, r in zip(below, leaves, strict=True) if r is not None},
            {p.site: g for p, g in zip(pools, edges, strict=True) if g is not None},
        )

    def sum_of_columns(self, weights: Tensor) -> dict[str, Tensor]:
        """``Σ_n c_n row_n``, as far as rows come from below the last mixing: one backward pass."""
        scaled = [layout.scaled(g, weights)[None] for _, layout, g in self.seeds]
        rows, cots = self._from_seeds(scaled, 1)
        out = {n: r[0] for n, r in rows.items()}
        for site, g in cots.items():
            pool, met = self.route.pools[site], self._pooled(site).of(g, 0)
            out[pool.name] = LazyRowBlock(
                slice(0, 1), met, pool.view, None, self.parameters[pool.name].detach()
            ).rows()[0]
        return out

    # -- from operands to parameters --

    def weighted_sum(self, weights: Tensor) -> dict[str, Tensor]:
        """``Σ_n c_n row_n`` of every parameter, at about the price of its gradient; all groups must be there still."""
        out = {n: torch.zeros_like(p) for n, p in self.parameters.items()}
        made = [self.group_sum(group, weights) for group in self.groups if group.meetings]
        for sums in [*made, self.sum_of_columns(weights)]:
            for name, one in sums.items():
                out[name] += one
        return out

    def group_sum(self, group: Group, weights: Tensor) -> dict[str, Tensor]:
        """``Σ_n c_n row_n`` of the parameters of a group, without the columns below."""
        if group.only is not None:
            where = slice(0, self.flow.samples)
            return {
                name: part.weighted_sum(weights) for name, part in self.parts(group, where, None)
            }
        sums = {
            i: sum_of([m.weighted_sum(weights) for m in meetings])
            for i, meetings in group.meetings.items()
        }
        return {
            n: r[0]
            for n, r in self._to_parameters(group, {i: g[None] for i, g in sums.items()}, 1).items()
        }

    def rows(self, group: Group, where: slice) -> dict[str, Tensor]:
        """Rows of the parameters of a group, summed over their sites."""
        first, last, _ = where.indices(self.flow.samples)
        sums = {
            i: sum_of([m.rows(where) for m in meetings]) for i, meetings in group.meetings.items()
        }
        return self._to_parameters(group, sums, last - first)

    def _to_parameters(
        self, group: Group, sums: dict[int, Tensor], count: int
    ) -> dict[str, Tensor]:
        """From rows of operands to rows of the parameters that they are made from."""
        out: dict[str, Tensor] = {}
        for i in [i for i in sums if i in self.flow.parameters]:
            out[self.flow.parameters[i]] = sums.pop(i)
        if sums:
            leaves = [self.leaves[n] for n in group.together.names]
            made = batched_grad([self.live[i] for i in sums], leaves, list(sums.values()), count)
            for n, r in zip(group.together.names, made, strict=True):
                if r is not None:
                    taken = any(r.data_ptr() == other.data_ptr() for other in out.values())
                    out[n] = out[n] + r if n in out else r.clone() if taken else r
        return out

    def parts(
        self, group: Group, where: slice, out: Tensor | None
    ) -> Iterator[tuple[str, RowBlock]]:
        """The parts of a group's parameters, for a slice of samples; a single one is formed in ``out`` if given."""
        if group.only is not None:
            (name,) = group.together.names
            yield name, LazyRowBlock(where, *group.only, out, self.parameters[name].detach())
            return
        for name, rows in self.rows(group, where).items():
            yield name, RowBlock(where, rows)


def _joined(meetings: list[Contraction]) -> list[Contraction]:
    """Uses of one operand that are matrix products are one product."""
    products = [m for m in meetings if type(m) is Linear and not m.batched]
    alike = len({m.features_first for m in products}) == 1 and len(products) > 1
    return (
        [Linear.joined(products), *(m for m in meetings if m not in products)]
        if alike
        else meetings
    )


def _zip_map(function: Callable[[Any, Any], Any], refs: Any, values: Any) -> Any:
    """Map over arguments beside the references that they came from."""
    if isinstance(refs, tuple | list):
        return type(refs)(_zip_map(function, r, v) for r, v in zip(refs, values, strict=True))
    if isinstance(refs, dict):
        return {k: _zip_map(function, r, values[k]) for k, r in refs.items()}
    return function(refs, values)
