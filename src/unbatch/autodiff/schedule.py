"""The plan of a sweep, worked out step by step: what it does where it does anything of its own, and for whom.

Made once for every plan and kept with it. No tensor is touched here; ``sweep.py`` follows the route.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from unbatch.autodiff.contractions.row_block import RowBlockView
from unbatch.autodiff.planner import BackwardPlan, Site
from unbatch.capture import ops
from unbatch.capture.graph import Graph, Ref, Step, is_ref
from unbatch.capture.ops import Moves
from unbatch.capture.substitutes import replayed


@dataclass
class Operands:
    """Operands of one plan, by their number in the graph."""

    graph: Graph
    flow: BackwardPlan
    shapes: Mapping[str, tuple[int, ...]]
    views: dict[int, RowBlockView | None] = field(default_factory=dict)

    def made_from(self, i: int) -> list[str]:
        """The parameters an operand is made from."""
        seen: set[int] = set()
        queue, out = [i], []
        while queue:
            v = queue.pop()
            if v in seen:
                continue
            seen.add(v)
            if v in self.flow.parameters:
                out.append(self.flow.parameters[v])
            elif v in self.flow.direct:
                queue += [r.index for r in self.graph.makers[v].refs()]
        return out

    def view(self, i: int) -> RowBlockView | None:
        """How an operand is seen in its only parameter, if it is a view of it."""
        if i not in self.views:
            self.views[i] = self._view(i)
        return self.views[i]

    def _view(self, i: int) -> RowBlockView | None:
        path, names = self._path(i), self.made_from(i)
        if path is None or len(names) != 1:
            return None
        try:  # a view of the parameter as it lies in memory need not be one of rows that lie in order
            replayed(path, torch.empty(self.shapes[names[0]], device="meta"))
        except RuntimeError:
            return None
        plain = {(): False, ("t",): True}
        return RowBlockView(partial(replayed, path), plain.get(tuple(step.name for step in path)))

    def _path(self, i: int) -> list[Step] | None:
        """The steps by which a value is a view of a parameter."""
        path: list[Step] = []
        while i not in self.flow.parameters:
            step = self.graph.makers.get(i)
            if step is None or not _rearranges(step):
                return None
            path.insert(0, step)
            i = step.refs()[0].index
        return path

    def together(self, operands: Collection[int]) -> list[tuple[list[int], list[str]]]:
        """Operands and parameters that have to be contracted together, because they share one another."""
        merged: list[tuple[set[int], set[str]]] = []
        for i in operands:
            values, names = {i}, set(self.made_from(i))
            for other in [m for m in merged if m[1] & names]:
                values, names = values | other[0], names | other[1]
                merged.remove(other)
            merged.append((values, names))
        order = list(self.shapes)
        return [(sorted(values), sorted(names, key=order.index)) for values, names in merged]


def _rearranges(step: Step) -> bool:
    """The result shows every entry of its operand once, in the memory where that lies, and derivatives go through."""
    whole = ops.moves(step.op) in (Moves.SAME, Moves.RESHAPED, Moves.PERMUTED)
    return whole and ops.is_view(step.op) and not ops.traits(step.op).cuts


@dataclass(frozen=True)
class Use:
    """A site of a step: its operand is the ``at``-th tensor of its argument; where the samples lie in the outputs."""

    site: Site
    at: int
    layouts: tuple[Any, ...]
    group: int  # by which the operand is contracted, -1 for none


@dataclass(frozen=True)
class Hook:
    """A step at which a sweep does something of its own."""

    step: Step
    uses: tuple[Use, ...]  # the operands whose sites are contracted from the step's cotangent
    columns: frozenset[int]  # the operands that columns reach by autograd
    gated: frozenset[int]  # the inputs through which columns must not pass
    norm: str  # "held": a batch norm with its statistics held constant; "constant": one that has constants only
    below: frozenset[int]  # the steps of weights that use this batch norm's closed form
    spoiled: frozenset[int]  # the inputs whose memory is written to from here on
    at_home: bool  # writes in place

    @property
    def keeps(self) -> bool:
        return bool(self.uses or self.below)


@dataclass(frozen=True)
class Pool:
    """A matrix product below the last place of mixing whose operand is a view of a parameter, met nowhere else."""

    site: Site
    name: str
    view: RowBlockView
    out: int


@dataclass(frozen=True)
class Together:
    """Parameters that are contracted together, because their sites share an operand."""

    names: tuple[str, ...]
    operands: tuple[int, ...]
    sites: tuple[Site, ...]
    view: RowBlockView | None  # how the one operand is seen in the one parameter
    tied: bool  # columns reach some of them, too


@dataclass
class Schedule:
    """What a flow means for every step of a graph."""

    graph: Graph
    flow: BackwardPlan
    operands: Operands

    @cached_property
    def steps(self) -> list[Step]:
        """Those of the forward pass."""
        return self.graph.forward_steps

    @cached_property
    def inner(self) -> list[int]:
        """Values beside the predictions that the loss reads."""
        return self.graph.read_by_loss(self.flow.predictions)

    @cached_property
    def stops(self) -> dict[int, Hook]:
        flow, steps = self.flow, self.graph.steps
        written = {
            s.index
            for s in self.steps
            if s.writes and any(r and r.index in flow.seeds for r in s.outs)
        }
        special = {s.step for s in flow.sites} | set(flow.gates) | set(flow.projections.values())
        return {i: self._stop(steps[i]) for i in sorted(special | written | flow.frozen_norms)}

    def _stop(self, step: Step) -> Hook:
        flow = self.flow
        sites = [s for s in flow.sites if s.step == step.index]
        return Hook(
            step,
            tuple(self._use(step, s) for s in sites if s.way != "columns" or s in self.pools),
            frozenset(s.operand for s in sites if s.way == "columns" and s not in self.pools),
            frozenset(flow.gates.get(step.index, ())),
            self._norm(step),
            frozenset(i for i, norm in flow.projections.items() if norm == step.index),
            frozenset(r.index for r in step.refs() if self._spoiled(step, r.index)),
            bool(step.writes) and ops.writes_in_place(step.op) and step.outs[0] is not None,
        )

    def _norm(self, step: Step) -> str:
        if step.index in self.flow.frozen_norms:
            return "held"
        constant = ops.is_batch_norm(step.op) and not ops.is_training_batch_norm(step)
        return "constant" if constant else ""

    def _use(self, step: Step, site: Site) -> Use:
        refs = tree_leaves(step.named[site.name], is_leaf=is_ref)
        at = [r.index if isinstance(r, Ref) else None for r in refs].index(site.operand)
        layouts = tuple(self.flow.layouts.get(r.index) for r in step.outs if r is not None)
        group = next((k for k, g in enumerate(self.groups) if site in g.sites), -1)
        return Use(site, at, layouts, group)

    def _spoiled(self, step: Step, value: int) -> bool:
        return self._last_writes.get(self.graph.values[value].storage, -1) >= step.index

    @cached_property
    def _last_writes(self) -> dict[int, int]:
        """The last step that writes to a memory."""
        return {
            self.graph.values[old.index].storage: s.index
            for s in self.graph.steps
            for old, _ in s.writes
        }

    @cached_property
    def cut_off(self) -> list[Step]:
        """Steps whose results are held constant."""
        frozen = self.flow.frozen
        return [s for s in self.steps if any(r is not None and r.index in frozen for r in s.outs)]

    @cached_property
    def watched(self) -> frozenset[int]:
        """Values whose place in the backward pass is kept: seeds, and what columns are contracted at."""
        return frozenset([*self.flow.seeds, *(p.out for p in self.pools.values())])

    @cached_property
    def chain(self) -> dict[int, bool]:
        """Steps without samples whose results are differentiated, and whether statistics move there."""
        single = {
            g.operands[0]
            for g in self.groups
            if g.view is not None and len(g.sites) == 1 and not g.tied
        }
        wanted = {
            s.operand for s in self.flow.sites if s.way == "columns" or s.operand not in single
        }
        out: dict[int, bool] = {}
        for i, moving in sorted(self.flow.chain.items(), reverse=True):
            step = self.graph.steps[i]
            if moving or any(r is not None and r.index in wanted for r in step.outs):
                out[i] = moving
                wanted.update(r.index for r in step.refs())
        return out

    # -- which parameters go together --

    @cached_property
    def groups(self) -> list[Together]:
        local = [s for s in self.flow.sites if s.way != "columns"]
        out = []
        for values, names in self.operands.together(dict.fromkeys(s.operand for s in local)):
            sites = tuple(s for s in local if s.operand in values)
            view = self.operands.view(values[0]) if len(values) == len(names) == 1 else None
            out.append(
                Together(
                    tuple(names), tuple(values), sites, view, bool(set(self.reached) & set(names))
                )
            )
        return out

    # -- below the last mixing --

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
            plain = (
                step.name in ("mm", "addmm")
                and site.name in ("self", "mat1", "mat2")[step.name == "addmm" :]
            )
            if plain and view is not None and not step.writes and step.outs[0] is not None:
                (name,) = self.operands.made_from(site.operand)
                if met[name] == 1:
                    out[site] = Pool(site, name, view, step.outs[0].index)
        return out

    @cached_property
    def below(self) -> list[str]:
        """The parameters that columns reach by way of autograd."""
        by_autograd = [site.operand for site in self.flow.columns if site not in self.pools]
        reached = {n for i in by_autograd for n in self.operands.made_from(i)}
        return [n for n in self.operands.shapes if n in reached]

    @cached_property
    def reached(self) -> list[str]:
        """The parameters that columns reach, in whatever way."""
        pooled = {pool.name for pool in self.pools.values()}
        return [n for n in self.operands.shapes if n in pooled or n in self.below]

    @cached_property
    def convolves(self) -> bool:
        return any(s.name == "convolution" and s.index >= self._lowest for s in self.steps)

    @property
    def _lowest(self) -> int:
        return min((s.step for s in self.flow.columns), default=0)

    @cached_property
    def column_bytes(self) -> int:
        """What one column takes on its way down: about twice the largest values it passes."""
        values = [
            self.graph.values[i]
            for i in self.flow.theta
            if self.graph.values[i].step >= self._lowest
        ]
        return 4 * max((math.prod(v.shape) * v.dtype.itemsize for v in values), default=0)
