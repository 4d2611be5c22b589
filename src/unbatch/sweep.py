"""One replay of the recorded forward pass, and cotangents pulled back from the predictions to the sites.

Where samples are separate, one backward pass gives the cotangents of all of them; below, every sample is a column,
pulled back in chunks from the seeds. What is to be done where is said by a ``Flow``; what comes out are *parts*: rows
of one parameter for a slice of samples, or contractions that do without rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.utils._pytree import tree_leaves, tree_map

from unbatch.contractions import Call, Linear, Meeting
from unbatch.derivatives import Gate, attached, batched_grad, frozen_norm, gradients, held, norm_held
from unbatch.graph import Graph, Ref, Step, flat, is_ref
from unbatch.kinds import meeting, projected
from unbatch.layout import Layout
from unbatch.mixing import Pooled
from unbatch.operands import Operands
from unbatch.parts import FromSite, Part, View
from unbatch.sites import Flow, Site


@dataclass(frozen=True)
class Pool:
    """A matrix product below the last place of mixing whose operand is a view of a parameter, met nowhere else."""

    site: Site
    name: str
    view: View
    out: int


@dataclass
class Group:
    """Parameters that are contracted together, because their sites share an operand."""

    names: list[str]
    operands: list[int]
    meetings: dict[int, list[Meeting]]
    view: View | None = None


@dataclass
class Sweep:
    """The forward pass of one question, with everything its sites keep."""

    graph: Graph
    flow: Flow
    operands: Operands
    parameters: Mapping[str, Tensor]
    feed: Mapping[int, Tensor]
    leaves: dict[str, Tensor] = field(default_factory=dict)
    live: dict[int, Tensor] = field(default_factory=dict)
    edges: dict[int, GradientEdge] = field(default_factory=dict)
    made: dict[Site, Meeting] = field(default_factory=dict)  # what each site keeps of the forward pass
    _waiting: dict[Site, Call] = field(default_factory=dict)  # for the batch norm above them
    meetings: list[tuple[Site, Meeting]] = field(default_factory=list)  # those that a cotangent has reached
    predictions: dict[int, Tensor] = field(default_factory=dict)
    inner: dict[int, Tensor] = field(default_factory=dict)  # values beside the predictions that the loss reads
    seeds: list[tuple[Any, Any, Tensor]] = field(default_factory=list)  # edge, layout, cotangent

    @cached_property
    def _writes(self) -> dict[int, int]:
        """The last step that writes to a memory."""
        return {self.graph.values[old.index].storage: s.index for s in self.graph.steps for old, _ in s.writes}

    # -- forward --

    def forward(self) -> dict[int, Tensor]:
        """Run the model; the predictions, detached, by their number in the graph."""
        self.leaves = {n: p.detach().requires_grad_() for n, p in self.parameters.items()}
        self.live = {i: self.leaves[name] for i, name in self.flow.parameters.items()}
        dead = {i: self.leaves[name].detach() for i, name in self.flow.parameters.items()}
        self._anchor = torch.zeros((), requires_grad=True)
        used = self.graph.read_by_loss(self.flow.predictions)
        wanted = [*self.flow.predictions, *used]
        with torch.enable_grad():
            outs = self.graph.run(
                {**self.feed, **dead},
                wanted,
                visit=self._visit,
                instead=self._instead(),
                steps=self.graph.forward_steps,
            )
        found = dict(zip(wanted, outs, strict=True))
        self.predictions = {i: found[i] for i in self.flow.predictions}
        self.inner = {i: found[i].detach() for i in used}
        return {i: t.detach() for i, t in self.predictions.items()}

    def _visit(self, i: int, value: Tensor) -> None:
        if i in self._kept_edges and i not in self.edges and value.requires_grad:
            self.edges[i] = get_gradient_edge(value)

    def _instead(self) -> dict[int, Callable[..., Any]]:
        flow, steps = self.flow, self.graph.steps
        sites: dict[int, list[Site]] = {}
        for site in flow.sites:
            sites.setdefault(site.step, []).append(site)
        self._kept_edges = set(flow.seeds)
        written = {
            s.index for s in self.graph.forward_steps if s.writes and any(r and r.index in flow.seeds for r in s.outs)
        }
        special = set(sites) | written | flow.frozen_norms | set(flow.gates) | set(flow.projections.values())
        self._kept_edges |= {r.index for i in sites for r in steps[i].outs if r is not None}
        out: dict[int, Callable[..., Any]] = {}
        for i in special:
            out[i] = self._site_step(steps[i], sites.get(i, []))
        for i in flow.chain:
            out[i] = self._chain_step(steps[i])
        for step in self.graph.forward_steps:
            if any(r is not None and r.index in flow.frozen for r in step.outs) and step.index not in out:
                out[step.index] = held(step.op)
        return out

    def _chain_step(self, step: Step) -> Callable[..., Any]:
        moving = self.flow.chain[step.index]

        def run(*args: Any, **kwargs: Any) -> Any:
            alive = self._with_live(step, args, kwargs, None)
            result = step.op(*alive[0], **alive[1])
            for ref, value in zip(step.outs, flat(result), strict=False):
                if ref is not None and isinstance(value, Tensor):
                    self.live[ref.index] = value
            if moving:
                return step.op(*args, **kwargs)
            return tree_map(lambda t: t.detach() if isinstance(t, Tensor) else t, result)

        return run

    def _with_live(self, step: Step, args: Any, kwargs: Any, only: set[int] | None) -> tuple[Any, Any]:
        """The arguments with values made from parameters connected to them (``only`` those), the others cut off."""

        def choose(ref: Any, value: Any) -> Any:
            if not isinstance(ref, Ref):
                return value
            if only is None:
                return self.live.get(ref.index, value.detach())
            return self.live[ref.index] if ref.index in only else value

        return tuple(_zip_map(choose, r, v) for r, v in ((step.args, args), (step.kwargs, kwargs)))

    def _site_step(self, step: Step, sites: Sequence[Site]) -> Callable[..., Any]:
        columns = {s.operand for s in sites if s.way == "columns" and s not in self.pools}
        local = [s for s in sites if s.way != "columns" or s in self.pools]
        gated = set(self.flow.gates.get(step.index, ()))
        norm = step.index in self.flow.frozen_norms
        names = [a.name for a in step.op._schema.arguments]
        below = [i for i, norm_ in self.flow.projections.items() if norm_ == step.index]

        mutable = bool(step.writes) and step.op._schema.is_mutable and step.outs[0] is not None

        def run(*args: Any, **kwargs: Any) -> Any:
            home = args[0] if mutable else None
            args, kwargs = self._with_live(step, args, kwargs, columns)
            if gated:
                gate = lambda r, v: Gate.apply(v) if isinstance(r, Ref) and r.index in gated else v  # noqa: E731
                args = _zip_map(gate, step.args, args)
            kept = self._keep(step, dict(zip(names, args, strict=False)) | kwargs) if local or below else {}
            if home is not None:
                args = (args[0].clone(), *args[1:])
            result = frozen_norm(step.op, names, args, kwargs) if norm else step.op(*args, **kwargs)
            outs = flat(result)
            if local and not outs[0].requires_grad:
                outs[0] = attached(outs[0], self._anchor)
                result = (outs[0], *outs[1:]) if isinstance(result, tuple | list) else outs[0]
            if local or below:
                seen = tuple(o.detach() for o in outs if isinstance(o, Tensor))
                for site in local:
                    self._meet(site, self._call(step, site, kept, seen))
                if below:
                    norm_call = Call(step.op, kept, seen, seen[0], "", (Layout(0, self.flow.samples),))
                    self._project(below, norm_call)
            if home is None:
                return result
            assert step.outs[0] is not None
            self._visit(step.outs[0].index, outs[0])
            return home.copy_(outs[0])

        return run

    def _meet(self, site: Site, call: Call) -> None:
        """Keep what the site's contraction needs of the step that just ran, and no more."""
        if site.way == "projected":
            self._waiting[site] = call
            return
        self.made[site] = Pooled(call) if site in self.pools else meeting(call)
        call.outputs = ()

    def _project(self, below: Sequence[int], norm: Call) -> None:
        for site in [s for s in self._waiting if s.step in below]:
            call = self._waiting.pop(site)
            self.made[site] = projected(call, norm)
            call.outputs = ()

    def _keep(self, step: Step, arguments: dict[str, Any]) -> dict[str, Any]:
        """The arguments, detached; those whose memory is written to from here on are copied."""
        names = [a.name for a in step.op._schema.arguments]
        refs = dict(zip(names, step.args, strict=False)) | step.kwargs

        known: dict[int, Tensor] = {}

        def one(ref: Any, value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            if isinstance(ref, Ref) and ref.index in known:
                return known[ref.index]
            spoiled = isinstance(ref, Ref) and self._writes.get(self.graph.values[ref.index].storage, -1) >= step.index
            kept = value.detach().clone() if spoiled else value.detach()
            if isinstance(ref, Ref):
                known[ref.index] = kept
            return kept

        return {n: _zip_map(one, refs.get(n), a) for n, a in arguments.items()}

    def _call(self, step: Step, site: Site, kept: dict[str, Any], outs: tuple[Tensor, ...]) -> Call:
        layouts = tuple(self.flow.layouts.get(r.index) for r in step.outs if r is not None)
        names = [a.name for a in step.op._schema.arguments]
        ref = (dict(zip(names, step.args, strict=False)) | step.kwargs)[site.name]
        at = [r.index if isinstance(r, Ref) else None for r in tree_leaves(ref, is_leaf=is_ref)].index(site.operand)
        return Call(step.op, kept, outs, tree_leaves(kept[site.name])[at], site.name, layouts)

    # -- backward --

    def pull(self, cotangents: Mapping[int, Tensor]) -> None:
        """One backward pass from the predictions to all sites above the last mixing, and to the seeds."""
        flow = self.flow
        wanted = {r: self.edges[r] for r in self.edges}
        outputs = [(self.predictions[i], g) for i, g in cotangents.items() if self.predictions[i].requires_grad]
        grads: Sequence[Tensor | None] = [None] * len(wanted)
        if outputs and wanted:
            tensors, gs = [list(x) for x in zip(*outputs, strict=True)]
            edges: Any = list(wanted.values())
            grads = torch.autograd.grad(tensors, edges, gs, retain_graph=bool(flow.columns), allow_unused=True)
        found = dict(zip(wanted, grads, strict=True))
        steps = self.graph.steps
        for site in flow.local:
            step = flow.projections[site.step] if site.way == "projected" else site.step
            outs = [r.index for r in steps[step].outs if r is not None]
            gs_ = [found.get(o) for o in outs]
            met = self.made[site]
            if any(g is not None for g in gs_):
                met.receive([g.detach() if g is not None else None for g in gs_])
                self.meetings.append((site, met))
        self.seeds = [
            (self.edges[i], flow.layouts[i], g.detach()) for i in flow.seeds if (g := found.get(i)) is not None
        ]
        for i, g in cotangents.items():
            if i in flow.unsplit and self.predictions[i].requires_grad:
                self.seeds.append((self.predictions[i], Layout(flow.predictions[i], flow.samples), g))

    @cached_property
    def convolves(self) -> bool:
        return any(s.name == "convolution" and s.index >= self._lowest for s in self.graph.forward_steps)

    @property
    def _lowest(self) -> int:
        return min((s.step for s in self.flow.columns), default=0)

    @cached_property
    def column_bytes(self) -> int:
        """What one column takes on its way down: about twice the largest values it passes."""
        values = [self.graph.values[i] for i in self.flow.theta if self.graph.values[i].step >= self._lowest]
        return 4 * max((math.prod(v.shape) * v.dtype.itemsize for v in values), default=0)

    @cached_property
    def below(self) -> list[str]:
        """The parameters that columns reach by way of autograd."""
        reached = {
            n for site in self.flow.columns if site not in self.pools for n in self.operands.made_from(site.operand)
        }
        return [n for n in self.leaves if n in reached]

    @cached_property
    def reached(self) -> list[str]:
        """The parameters that columns reach, in whatever way."""
        pooled = {pool.name for pool in self.pools.values()}
        return [n for n in self.leaves if n in pooled or n in self.below]

    @cached_property
    def pools(self) -> dict[Site, Pool]:
        met: dict[str, int] = {}
        steps = self.graph.steps
        for site in self.flow.sites:
            for n in self.operands.made_from(site.operand):
                met[n] = met.get(n, 0) + 1
        out = {}
        for site in self.flow.columns:
            step, view = steps[site.step], self.operands.view(site.operand)
            plain = step.name in ("mm", "addmm") and site.name in ("self", "mat1", "mat2")[step.name == "addmm" :]
            if plain and view is not None and not step.writes and step.outs[0] is not None:
                (name,) = self.operands.made_from(site.operand)
                if met[name] == 1:
                    out[site] = Pool(site, name, view, step.outs[0].index)
        return out

    def columns(self, first: int, last: int, outs: Mapping[str, Tensor]) -> Iterator[tuple[str, Part]]:
        """Parts of samples ``first`` to ``last``, as far as they come from below the last mixing."""
        where = slice(first, last)
        rows, cots = self._from_seeds([layout.only(g, first, last) for _, layout, g in self.seeds], last - first)
        for name in list(rows):
            yield name, Part(where, rows.pop(name))
        for site, g in cots.items():
            pool, met = self.pools[site], self._pooled(site).of(g, first)
            yield pool.name, FromSite(where, met, pool.view, outs.get(pool.name), self.leaves[pool.name].detach())

    def _pooled(self, site: Site) -> Pooled:
        made = self.made[site]
        assert isinstance(made, Pooled)
        return made

    def _from_seeds(self, gs: Sequence[Tensor], count: int) -> tuple[dict[str, Tensor], dict[Site, Tensor]]:
        """Rows by parameter, and for pooled sites the cotangents of their outputs."""
        pools = [p for p in self.pools.values() if p.out in self.edges]
        wanted: list[Any] = [*(self.leaves[n] for n in self.below), *(self.edges[p.out] for p in pools)]
        with Gate.shut():
            rows = batched_grad([e for e, _, _ in self.seeds], wanted, gs, count)
        leaves, edges = rows[: len(self.below)], rows[len(self.below) :]
        return (
            {n: r for n, r in zip(self.below, leaves, strict=True) if r is not None},
            {p.site: g for p, g in zip(pools, edges, strict=True) if g is not None},
        )

    def weighted_sum(self, weights: Tensor) -> dict[str, Tensor]:
        """``Σ_n c_n row_n`` of every parameter, at about the price of its gradient."""
        sums: dict[int, Tensor] = {}
        for site, met in self.meetings:
            one = met.weighted_sum(weights)
            sums[site.operand] = sums[site.operand] + one if site.operand in sums else one
        out = {n: torch.zeros_like(leaf) for n, leaf in self.leaves.items()}
        for i in [i for i in sums if i in self.flow.parameters]:
            out[self.flow.parameters[i]] += sums.pop(i)
        chained = batched_grad(
            [self.live[i] for i in sums], list(self.leaves.values()), [g[None] for g in sums.values()], 1
        )
        scaled = [layout.scaled(g, weights)[None] for _, layout, g in self.seeds]
        rows, cots = self._from_seeds(scaled, 1)
        for n, r in [*zip(out, chained, strict=True), *rows.items()]:
            if r is not None:
                out[n] += r[0]
        for site, g in cots.items():
            pool, met = self.pools[site], self._pooled(site).of(g, 0)
            out[pool.name] += FromSite(slice(0, 1), met, pool.view, None, out[pool.name]).rows()[0]
        return out

    # -- from operands to parameters --

    def groups(self) -> list[Group]:
        """Which parameters have to be contracted together."""
        met: dict[int, list[Meeting]] = {}
        for site, meeting_ in self.meetings:
            met.setdefault(site.operand, []).append(meeting_)
        met = {i: _joined(meetings) for i, meetings in met.items()}
        out = []
        for values, names in self.operands.together(met):
            alone = len(values) == len(names) == len(met[values[0]]) == 1
            view = self.operands.view(values[0]) if alone else None
            out.append(Group(names, values, {i: met[i] for i in values}, view))
        return out

    def rows(self, group: Group, where: slice) -> dict[str, Tensor]:
        """Rows of the parameters of a group, summed over their sites."""
        first, last, _ = where.indices(self.flow.samples)
        sums = {i: _sum([m.rows(where) for m in group.meetings[i]]) for i in group.operands}
        out: dict[str, Tensor] = {}
        for i in [i for i in group.operands if i in self.flow.parameters]:
            out[self.flow.parameters[i]] = sums.pop(i)
        if sums:
            leaves = [self.leaves[n] for n in group.names]
            made = batched_grad([self.live[i] for i in sums], leaves, list(sums.values()), last - first)
            for n, r in zip(group.names, made, strict=True):
                if r is not None:
                    taken = any(r.data_ptr() == other.data_ptr() for other in out.values())
                    out[n] = out[n] + r if n in out else r.clone() if taken else r
        return out

    def parts(self, group: Group, where: slice, out: Tensor | None) -> Iterator[tuple[str, Part]]:
        """The parts of a group's parameters, for a slice of samples; a single one is formed in ``out`` if given."""
        if group.view is not None:
            (name,), (i,) = group.names, group.operands
            yield name, FromSite(where, group.meetings[i][0], group.view, out, self.leaves[name].detach())
            return
        for name, rows in self.rows(group, where).items():
            yield name, Part(where, rows)


def plainly(
    graph: Graph, flow: Flow, parameters: Mapping[str, Tensor], feed: Mapping[int, Tensor], weights: Tensor
) -> tuple[dict[int, Tensor], dict[str, Tensor]]:
    """Random cotangents ``g``, and ``Σ_n c_n row_n`` for them by one backward pass of a plain replay.

    What a sweep has to agree with.
    """
    steps = graph.steps
    leaves = {n: p.detach().requires_grad_() for n, p in parameters.items()}
    live = {i: leaves[name] for i, name in flow.parameters.items()}
    instead: dict[int, Callable[..., Any]] = {i: norm_held(steps[i]) for i in flow.frozen_norms}
    for step in graph.forward_steps:
        if any(r is not None and r.index in flow.frozen for r in step.outs) and step.index not in instead:
            instead[step.index] = held(step.op)
    with torch.enable_grad():
        outs = graph.run({**feed, **live}, list(flow.predictions), instead=instead, steps=graph.forward_steps)
    generator = torch.Generator().manual_seed(1)
    cotangents = {
        i: torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t)
        for i, t in zip(flow.predictions, outs, strict=True)
        if t.requires_grad
    }
    seen = [t for t in outs if t.requires_grad]
    gs = [Layout(flow.predictions[i], flow.samples).scaled(g, weights) for i, g in cotangents.items()]
    total = gradients(seen, leaves, gs)
    return cotangents, {n: t.detach() for n, t in total.items()}


def _joined(meetings: list[Meeting]) -> list[Meeting]:
    """Uses of one operand that are matrix products are one product."""
    products = [m for m in meetings if type(m) is Linear and not m.batched]
    alike = len({m.features_first for m in products}) == 1 and len(products) > 1
    return [Linear.joined(products), *(m for m in meetings if m not in products)] if alike else meetings


def _sum(tensors: Sequence[Tensor]) -> Tensor:
    total = tensors[0]
    for t in tensors[1:]:
        total = total + t
    return total


def _zip_map(function: Callable[[Any, Any], Any], refs: Any, values: Any) -> Any:
    """Map over arguments beside the references that they came from."""
    if isinstance(refs, tuple | list):
        return type(refs)(_zip_map(function, r, v) for r, v in zip(refs, values, strict=True))
    if isinstance(refs, dict):
        return {k: _zip_map(function, r, values[k]) for k, r in refs.items()}
    return function(refs, values)
