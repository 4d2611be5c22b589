"""A backward plan worked out step by step: what is done at which step, and for which parameters.

Lives here: the operands of a plan (from which parameters, and as which view of them), and the
``Hook`` of every step at which the passes do something of their own. Made once for every plan and
kept with it. No tensor is touched here; ``vjp.py`` follows the schedule.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from unbatch.analysis.domain.sample_layout import AnyLayout
from unbatch.autodiff.contractions.row_block import RowBlockView
from unbatch.autodiff.dependence import values_read, values_returned, within
from unbatch.autodiff.planner import BackwardPlan, Site
from unbatch.capture import ops
from unbatch.capture.graph import Graph
from unbatch.capture.ops import Moves
from unbatch.capture.steps import Ref, Step, is_ref
from unbatch.capture.substitutes import norm_in_eval_mode, norm_with_constant_statistics, replayed

# A matrix product with a parameter: the arguments that may be the parameter.
MATRICES = {"mm": ("self", "mat2"), "addmm": ("mat1", "mat2")}


# --- operands -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Operands:
    """Operands of one plan, by their number in the graph.

    ``shapes``: of the parameters, in the order in which they were asked for.
    """

    graph: Graph
    plan: BackwardPlan
    shapes: Mapping[str, tuple[int, ...]]
    _views: dict[int, RowBlockView | None] = field(default_factory=dict)

    def parameters_of(self, operand: int) -> list[str]:
        """Return the parameters that an operand is made from."""
        names = []
        # Steps without samples lead from parameters to the operand, and only these are followed.
        queue, visited = [operand], set[int]()
        while queue:
            value = queue.pop()
            if value in visited:
                continue
            visited.add(value)
            if value in self.plan.parameters:
                names.append(self.plan.parameters[value])
            elif value in self.plan.direct:
                queue += values_read(self.graph.makers[value])
        return names

    def view(self, operand: int) -> RowBlockView | None:
        """Return how an operand is seen in its only parameter; None if it is no view of one."""
        if operand not in self._views:
            self._views[operand] = self._view(operand)
        return self._views[operand]

    def _view(self, operand: int) -> RowBlockView | None:
        path, names = self._path(operand), self.parameters_of(operand)
        if path is None or len(names) != 1:
            return None
        # A view of the parameter as it lies in memory need not be one of rows, which lie in order.
        try:
            replayed(path, torch.empty(self.shapes[names[0]], device="meta"))
        except RuntimeError:
            return None
        transposed = None
        if not path:
            transposed = False
        elif len(path) == 1 and path[0].name == "t":
            transposed = True
        return RowBlockView(partial(replayed, path), transposed)

    def _path(self, value: int) -> list[Step] | None:
        """Return the steps by which a value is a view of a parameter; None if it is not."""
        path: list[Step] = []
        while value not in self.plan.parameters:
            step = self.graph.makers.get(value)
            if step is None or not _rearranges(step):
                return None
            path.insert(0, step)
            value = step.refs()[0].index
        return path

    def groups(self, operands: Collection[int]) -> list[tuple[list[int], list[str]]]:
        """Return operands and parameters in groups that are contracted together.

        Operands that are made from a common parameter are in one group, and so is all that it is
        made from.
        """
        groups: list[tuple[set[int], set[str]]] = []
        for operand in operands:
            values, names = {operand}, set(self.parameters_of(operand))
            # The groups so far have no parameter in common: those that share one with the operand
            # become one group, the others stay.
            others = []
            for group in groups:
                if group[1] & names:
                    values |= group[0]
                    names |= group[1]
                else:
                    others.append(group)
            groups = [*others, (values, names)]
        return [(sorted(values), within(self.shapes, names)) for values, names in groups]


def _rearranges(step: Step) -> bool:
    """Tell whether a step is a differentiable view that shows every entry of what it reads once."""
    shows_all = ops.moves(step.op) in (Moves.SAME, Moves.RESHAPED, Moves.PERMUTED)
    return shows_all and ops.is_view(step.op) and not ops.traits(step.op).cuts


# --- the schedule ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Use:
    """A site of a step: its operand is the ``at``-th tensor of its argument."""

    site: Site
    at: int
    layouts: tuple[AnyLayout | None, ...]  # where the samples lie in the outputs
    group: int  # in which the operand is contracted, -1 for none


@dataclass(frozen=True)
class Hook:
    """A step at which the passes do something of their own."""

    step: Step
    run: Callable[..., Any]  # its op, or a batch norm with constant statistics in its place
    uses: tuple[Use, ...]  # the sites contracted from the step's cotangent
    by_autograd: frozenset[int]  # the operands that columns reach by autograd
    gated: frozenset[int]  # the inputs that columns of other seeds do not enter
    projecting: frozenset[int]  # the steps of sites that use this batch norm's closed form
    overwritten: frozenset[int]  # the inputs whose memory is written to from here on
    in_place: int | None  # the value it returns, if that is the tensor that it was given

    def by_way(self, way: str) -> list[Use]:
        """Return the uses whose sites are contracted in one of the ways."""
        return [use for use in self.uses if use.site.way == way]

    @property
    def keeps_arguments(self) -> bool:
        """Whether a contraction reads what went into the step."""
        return bool(self.uses or self.projecting)


@dataclass(frozen=True)
class PooledSite:
    """A matrix product below the mixing frontier whose operand is a parameter's only use.

    The operand is a view of the parameter, and its rows come from the columns' cotangents ``out``
    by a contraction, without autograd.
    """

    site: Site
    name: str
    view: RowBlockView
    out: int


@dataclass(frozen=True)
class GroupMembers:
    """Parameters that are contracted together, because their sites share an operand."""

    names: tuple[str, ...]
    operands: tuple[int, ...]
    sites: tuple[Site, ...]
    view: RowBlockView | None  # how the one operand is seen in the one parameter
    reached_by_columns: bool  # columns reach some of them, too


@dataclass(frozen=True)
class Schedule:
    """What a backward plan means for every step of a graph."""

    graph: Graph
    plan: BackwardPlan
    operands: Operands

    @cached_property
    def steps(self) -> list[Step]:
        """The steps of the forward pass."""
        return self.graph.forward_steps

    @cached_property
    def inner(self) -> list[int]:
        """Values beside the outputs that the loss reads."""
        return self.graph.read_by_loss([*self.plan.predictions, *self.plan.joined])

    @cached_property
    def read_afterwards(self) -> list[int]:
        """All values of the model that are read after it has run."""
        values = [*self.plan.predictions, *self.inner]
        values += [ref.index for ref in self.graph.predictions]
        return list(dict.fromkeys(values))

    @cached_property
    def cut_off(self) -> list[Step]:
        """Steps whose results are held constant."""
        frozen = self.plan.frozen
        return [step for step in self.steps if not frozen.isdisjoint(values_returned(step))]

    @cached_property
    def cut_numbers(self) -> frozenset[int]:
        """The numbers of the steps that are cut off."""
        return frozenset(step.index for step in self.cut_off)

    @cached_property
    def watched(self) -> frozenset[int]:
        """Values whose edge in the autograd graph is kept.

        Seeds, from which columns start, and the values at which pooled sites take the cotangents
        of columns.
        """
        values = set(self.plan.seeds)
        for pooled in self.pooled_sites.values():
            values.add(pooled.out)
        return frozenset(values)

    # -- steps at which something is done --

    @cached_property
    def hooks(self) -> dict[int, Hook]:
        """By step."""
        plan = self.plan
        numbers = {*plan.frozen_norms, *plan.gates, *plan.projections.values()}
        for site in plan.sites:
            numbers.add(site.step)
        for step in self.steps:
            # In place, a seed is one tensor with the value before it: its edge has to be that after
            # the step.
            if step.writes and within(values_returned(step), plan.seeds):
                numbers.add(step.index)
        return {number: self._hook(self.graph.steps[number]) for number in sorted(numbers)}

    def _hook(self, step: Step) -> Hook:
        """Return what is done at one step."""
        uses: list[Use] = []
        by_autograd: set[int] = set()
        for site in self.plan.sites:
            if site.step != step.index:
                continue
            # At a pooled site, columns end: its contraction takes them from there.
            if site.way == "columns" and site not in self.pooled_sites:
                by_autograd.add(site.operand)
            else:
                uses.append(self._use(step, site))
        overwritten: set[int] = set()
        for value in values_read(step):
            if self._last_write(value) >= step.index:
                overwritten.add(value)
        projecting: set[int] = set()
        for below, norm in self.plan.projections.items():
            if norm == step.index:
                projecting.add(below)
        in_place = None
        if step.writes and ops.writes_in_place(step.op) and step.outs[0] is not None:
            in_place = step.outs[0].index
        return Hook(
            step,
            self._substitute(step),
            tuple(uses),
            frozenset(by_autograd),
            frozenset(self.plan.gates.get(step.index, ())),
            frozenset(projecting),
            frozenset(overwritten),
            in_place,
        )

    def _substitute(self, step: Step) -> Callable[..., Any]:
        """Return what runs in place of a step: a batch norm may have constants for statistics."""
        if step.index in self.plan.frozen_norms:
            return norm_with_constant_statistics(step)
        if ops.is_batch_norm(step.op) and not ops.is_training_batch_norm(step):
            return norm_in_eval_mode(step)
        run: Callable[..., Any] = step.op
        return run

    def _use(self, step: Step, site: Site) -> Use:
        leaves = tree_leaves(step.named[site.name], is_leaf=is_ref)
        # An argument may be a list of tensors (of a ``cat``), and the operand one of them.
        layouts = tuple(map(self.plan.layouts.get, values_returned(step)))
        group = -1
        for number, members in enumerate(self.groups):
            if site in members.sites:
                group = number
                break
        return Use(site, leaves.index(Ref(site.operand)), layouts, group)

    def _last_write(self, value: int) -> int:
        """Return the last step that writes to the memory of a value, -1 if there is none."""
        return self._last_writes.get(self.graph.values[value].storage, -1)

    @cached_property
    def _last_writes(self) -> dict[int, int]:
        """By memory."""
        last: dict[int, int] = {}
        for step in self.graph.steps:
            for old, _ in step.writes:
                last[self.graph.values[old.index].storage] = step.index
        return last

    @cached_property
    def contracted(self) -> dict[int, list[tuple[Site, int]]]:
        """By step with a hook, the sites that are contracted from its cotangent, with their groups.

        Beside its own sites these are the ones that use it as the batch norm right above.
        """
        by_step: dict[int, list[tuple[Site, int]]] = {}
        for number, hook in self.hooks.items():
            uses = hook.by_way("local")
            for below in hook.projecting:
                uses += self.hooks[below].by_way("projected")
            by_step[number] = [(use.site, use.group) for use in uses]
        return by_step

    @cached_property
    def chain(self) -> dict[int, bool]:
        """Steps that are run on the parameters, and whether statistics move in their results.

        An operand that is a view of a parameter, at one site and above the frontier, needs none:
        its rows are that parameter's rows, seen through the view.
        """
        viewed: set[int] = set()
        for group in self.groups:
            alone = len(group.sites) == 1 and not group.reached_by_columns
            if alone and group.view is not None:
                viewed.add(group.operands[0])
        needed: set[int] = set()
        for site in self.plan.sites:
            if site.way == "columns" or site.operand not in viewed:
                needed.add(site.operand)
        chain: dict[int, bool] = {}
        # From the last step to the first, so that what makes an operand comes after the operand.
        for number, moving in sorted(self.plan.chain.items(), reverse=True):
            step = self.graph.steps[number]
            if moving or not needed.isdisjoint(values_returned(step)):
                chain[number] = moving
                needed.update(values_read(step))
        return chain

    # -- which parameters go together --

    @cached_property
    def groups(self) -> list[GroupMembers]:
        """The parameters of all sites above the mixing frontier."""
        local, operands = self.plan.local, self.operands
        groups = []
        for values, names in operands.groups(dict.fromkeys(s.operand for s in local)):
            view = None
            if len(values) == len(names) == 1:
                view = operands.view(values[0])
            sites = tuple(s for s in local if s.operand in values)
            reached = not set(names).isdisjoint(self.reached)
            groups.append(GroupMembers(tuple(names), tuple(values), sites, view, reached))
        return groups

    # -- below the mixing frontier --

    @cached_property
    def pooled_sites(self) -> dict[Site, PooledSite]:
        """By site."""
        # With another site, a parameter has rows from elsewhere that would have to be added.
        sites_of: dict[str, int] = {}
        for site in self.plan.sites:
            for name in self.operands.parameters_of(site.operand):
                sites_of[name] = sites_of.get(name, 0) + 1
        by_site: dict[Site, PooledSite] = {}
        for site in self.plan.columns:
            step, view = self.graph.steps[site.step], self.operands.view(site.operand)
            if view is None or site.name not in MATRICES.get(step.name, ()):
                continue
            (name,) = self.operands.parameters_of(site.operand)
            out = step.outs[0]
            if sites_of[name] == 1 and out is not None and not step.writes:
                by_site[site] = PooledSite(site, name, view, out.index)
        return by_site

    @cached_property
    def by_autograd(self) -> list[str]:
        """The parameters that columns reach by autograd."""
        names: set[str] = set()
        for site in self.plan.columns:
            if site not in self.pooled_sites:
                names.update(self.operands.parameters_of(site.operand))
        return within(self.operands.shapes, names)

    @cached_property
    def reached(self) -> list[str]:
        """The parameters that columns reach, by autograd or by a contraction."""
        names = set(self.by_autograd)
        for pooled in self.pooled_sites.values():
            names.add(pooled.name)
        return within(self.operands.shapes, names)

    @cached_property
    def convolves(self) -> bool:
        """Whether columns are pulled through a convolution."""
        lowest = self._lowest
        return any(step.name == "convolution" and step.index >= lowest for step in self.steps)

    @cached_property
    def _lowest(self) -> int:
        """The first step with a site that columns reach."""
        return min((s.step for s in self.plan.columns), default=0)

    @cached_property
    def column_bytes(self) -> int:
        """The memory that one column takes on its way down.

        Measured, it is about four times the largest value that it passes.
        """
        largest = 0
        for i in self.plan.theta:
            value = self.graph.values[i]
            if value.step >= self._lowest:
                largest = max(largest, value.entries * value.dtype.itemsize)
        return 4 * largest
