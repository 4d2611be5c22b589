"""The parameter use sites, and the VJP that each of them needs: the plan of a backward pass.

A *site* is a step at which an *operand*, a value made from parameters only, is combined with values
of samples. Where its results are separate (``dependence.py``), it is contracted from the cotangent
that one backward pass gives all samples. Elsewhere the cotangent of each sample is pulled back
alone, a *column*, starting from the *seeds*: the lowest values that are still separate (the mixing
frontier).

Lives here: the plan, and how it is made. What it means step by step is for ``schedule.py``; no
tensor is touched.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves

from unbatch.analysis.domain.ownership import Ownership
from unbatch.analysis.domain.sample_layout import (
    AnyLayout,
    Layout,
    SeveralAxes,
)
from unbatch.analysis.interpreter import Interpretation
from unbatch.analysis.outputs import Outputs
from unbatch.autodiff.dependence import (
    Dependence,
    OwnedGraph,
    find_dependence,
    values_read,
    within,
)
from unbatch.capture import ops
from unbatch.capture.aliasing import by_memory
from unbatch.capture.graph import Graph
from unbatch.capture.steps import Ref, Step, is_ref
from unbatch.errors import MSG_NOT_COPY, MSG_NOT_FROZEN, StructureError

# An example, by component in train mode. Linear → BN → ReLU → Linear → BN → ReLU → Linear:
#
#     step             operands    way         because
#     third Linear     V, c        local       its result is separate
#     second BN        γ′, β′      local       its result is separate, and the lowest: a seed
#     second Linear    U, a        projected   right below a batch norm whose result is separate
#     first BN         γ, β        columns     the second one mixes what is made of them
#     first Linear     W, b        columns     likewise
#
# In eval mode, or with frozen statistics, all are local and there is no seed. A copy of the model
# for each sample has local sites only: its batch norms are constant but for that sample.


@dataclass(frozen=True)
class Site:
    """Step ``step`` uses the value ``operand`` as its argument ``name``.

    ``way``: "local" (contracted from the one cotangent of all samples), "projected" (by the closed
    form of the batch norm right above) or "columns" (each sample is pulled back alone).
    """

    step: int
    operand: int
    name: str
    way: str


@dataclass(frozen=True)
class BackwardPlan:
    """What a backward pass does at which step. Values and steps by their number in the graph.

    ``refusal``: why rows do not exist, unless the values ``spanning`` are counted to the samples
    (``spread``).
    """

    by: str
    by_place: bool  # where samples mix in no symmetric way, slice n was counted to sample n
    samples: int
    parameters: Mapping[int, str]
    predictions: Mapping[int, int]  # prediction -> its sample axis
    joined: tuple[int, ...]  # outputs without such an axis
    # What depends on the parameters, and how (``dependence.py``).
    theta: frozenset[int]
    flowing: frozenset[int]  # of these, what some output depends on
    frozen: frozenset[int]
    frozen_norms: frozenset[int]
    direct: frozenset[int]  # made from parameters, with no sample on the way
    # Where parameters are used.
    sites: tuple[Site, ...]
    chain: Mapping[int, bool]  # steps from parameters to operands -> whether statistics move there
    projections: Mapping[int, int]  # step of a "projected" site -> the batch norm above it
    # Where columns start, and where they must not pass.
    seeds: tuple[int, ...]
    unsplit: tuple[int, ...]  # predictions that are not separate: columns start there, too
    gates: Mapping[int, tuple[int, ...]]  # step -> inputs that columns of other seeds do not enter
    # Where the samples lie in the values at sites and seeds.
    layouts: Mapping[int, AnyLayout]
    spanning: frozenset[int]  # shared values, in part or whole, with an entry for every sample
    refusal: StructureError | None

    @property
    def local(self) -> list[Site]:
        """The sites that one backward pass for all samples serves."""
        return [s for s in self.sites if s.way != "columns"]

    @property
    def columns(self) -> list[Site]:
        """The sites that each sample is pulled back to alone."""
        return [s for s in self.sites if s.way == "columns"]

    def by_number(self, named: Mapping[str, Tensor]) -> dict[int, Tensor]:
        """Return tensors that are named as the parameters by their number in the graph."""
        return {i: named[name] for i, name in self.parameters.items()}

    @property
    def form(self) -> Any:
        """What is left of the plan without sizes, to compare; None where samples lie unevenly."""
        layouts = []
        for i, layout in sorted(self.layouts.items()):
            if layout.form is None:
                return None
            layouts.append((i, layout.form))
        sets = (self.theta, self.frozen, self.frozen_norms, self.direct, self.spanning)
        mappings = (self.parameters, self.predictions, self.chain, self.projections, self.gates)
        return (
            (self.by, self.by_place, self.sites, self.seeds, self.unsplit),
            sets,
            tuple(tuple(sorted(mapping.items())) for mapping in mappings),
            tuple(layouts),
        )

    @property
    def divisible(self) -> bool:
        """Whether the cotangent of every seed can be cut into the samples' own."""
        return all(i in self.layouts for i in self.seeds)


def plan_backward(
    graph: Graph,
    interpretation: Interpretation,
    samples: int,
    leading: bool,
    names: Iterable[str],
    by: str,
) -> BackwardPlan:
    """Return the plan for the parameters ``names``, by ``by``.

    Raises ``StructureError`` where copy or frozen rows do not exist, naming the step that is in the
    way (or leaves it in ``refusal``).
    """
    chosen = set(names)
    parameters: dict[int, str] = {}
    for i, value in enumerate(graph.values):
        if value.kind == "parameters" and value.name in chosen:
            parameters[i] = value.name
    outputs = Outputs.of(graph, interpretation.ownership, samples, leading)
    owned = OwnedGraph(graph, interpretation, samples, leading)
    dependence = find_dependence(owned, parameters, outputs.axes, freeze=by == "frozen")
    return _Planner(owned, dependence, by, parameters, outputs).plan()


@dataclass
class _Planner:
    """Goes through the steps in order; the fields with defaults become those of the plan."""

    owned: OwnedGraph
    dependence: Dependence
    by: str
    parameters: dict[int, str]
    outputs: Outputs
    sites: list[Site] = field(default_factory=list)
    chain: dict[int, bool] = field(default_factory=dict)
    projections: dict[int, int] = field(default_factory=dict)
    seeds: list[int] = field(default_factory=list)
    gates: dict[int, tuple[int, ...]] = field(default_factory=dict)
    direct: set[int] = field(default_factory=set)
    spanning: set[int] = field(default_factory=set)
    refusal: StructureError | None = None

    def plan(self) -> BackwardPlan:
        """Go through the steps, and return what was found."""
        # In the order of the steps, so that ``direct`` holds all operands before they are used.
        self.direct.update(self.parameters)
        for step in self.owned.graph.forward_steps:
            outs = self.dependence.pulled_back(step)
            reads = self.dependence.reads(step)
            if outs and reads:
                self._place(step, outs, reads)
        unsplit: list[int] = []
        if self.by == "component":
            unsplit += [p for p in self.outputs.axes if not self.dependence.is_separate(p)]
        return BackwardPlan(
            by=self.by,
            by_place=self.owned.interpretation.by_place,
            samples=self.owned.samples,
            parameters=self.parameters,
            predictions=self.outputs.axes,
            joined=self.outputs.joined,
            theta=self.dependence.theta,
            flowing=self.dependence.flowing_to(self.outputs.smooth),
            frozen=self.dependence.frozen,
            frozen_norms=self.dependence.frozen_norms,
            direct=frozenset(self.direct),
            sites=tuple(self.sites),
            chain=self.chain,
            projections=self.projections,
            seeds=tuple(self.seeds),
            unsplit=tuple(unsplit),
            gates=self.gates,
            layouts=self._layouts(),
            spanning=frozenset(self.spanning),
            refusal=self.refusal,
        )

    def _layouts(self) -> dict[int, AnyLayout]:
        values: list[int] = []
        for site in self.sites:
            values += self.owned.results(self.owned.graph.steps[site.step])
        layouts: dict[int, AnyLayout] = {}
        for i in dict.fromkeys([*values, *self.seeds]):
            layout = self.owned.layout(i)
            if layout is not None:
                layouts[i] = layout
        return layouts

    # -- what happens at a step --

    def _place(self, step: Step, outs: Sequence[int], reads: Sequence[int]) -> None:
        """Find out what a step is: a site, a seed, or a step from parameters to operands."""
        owned = self.owned
        operands = [i for i in within(reads, self.direct) if owned.is_shared(i)]
        separate = self.dependence.all_separate(outs)
        if owned.all_shared(outs):
            if operands:
                self._place_shared(step, outs, reads, operands)
            return
        for i in operands:
            self._add_site(step, i, outs, separate)
        # What is written lies in a memory, of which other values may be views that are not
        # separate.
        if self.by == "component" and (separate or not step.writes):
            self._add_seeds(step, outs, reads)

    def _place_shared(
        self, step: Step, outs: Sequence[int], reads: Sequence[int], operands: Sequence[int]
    ) -> None:
        """Place a step from parameters, and perhaps statistics, to what belongs to no sample.

        Its result is an operand, and the site is where that is combined with samples; unless a
        statistic in it moves with the parameters on a path of its own, which columns then have to
        take.
        """
        owned = self.owned
        # Written into a buffer beside samples (a class token, say), it is one entry for each of
        # them.
        for _, new in step.writes:
            if self._lies_among_samples(new.index):
                self.spanning.add(new.index)
        reads_samples = not owned.all_shared(reads)
        moving = bool(owned.moving(outs))
        if self.by != "component" and reads_samples:
            raise _refusal(self.by, step)
        separate = self.dependence.all_separate(outs)
        by_columns = self.by == "component" and moving and (reads_samples or not separate)
        if by_columns:
            for i in operands:
                self._add_by_columns(step, i, "columns")
        else:
            self.chain[step.index] = moving and self.by != "frozen"
            self.direct.update(owned.results(step))

    # -- sites --

    def _add_site(self, step: Step, operand: int, outs: Sequence[int], separate: bool) -> None:
        """Add the site of an operand, by the cheapest way that keeps samples apart."""
        layout = self.owned.layout(outs[0])
        if layout is None and self.owned.owners(outs[0]).partly_shared:
            self.spanning.add(outs[0])
        # A copy is a model of its own for each sample: its results hold no other samples.
        if layout is not None and (separate or self.by == "copy"):
            self._append(step, operand, "local")
            self._note_spanning(operand, outs[0], layout)
        elif self.by == "component":
            norm = self._norm_above(step, operand, outs)
            if norm is not None:
                self.projections[step.index] = norm
            self._add_by_columns(step, operand, "columns" if norm is None else "projected")
        elif self.spanning:
            # The values that span the samples may be counted to them, and the rows exist then: not
            # raised yet.
            self.refusal = _refusal(self.by, step)
        else:
            raise _refusal(self.by, step)

    def _add_by_columns(self, step: Step, operand: int, way: str) -> None:
        """Add a site below the mixing frontier.

        Columns reach the parameters in a statistic through that statistic, which is a value of its
        own.
        """
        if not self.owned.owners(operand).depends_on_batch:
            self._append(step, operand, way)

    def _append(self, step: Step, operand: int, way: str) -> None:
        name = _argument_name(step, operand)
        if name is not None:
            self.sites.append(Site(step.index, operand, name, way))

    def _norm_above(self, step: Step, operand: int, outs: Sequence[int]) -> int | None:
        """Return the batch norm whose closed form serves the site, None if there is none.

        It alone reads the result, and nothing mixes samples above it.
        """
        if not _can_be_projected(step, outs):
            return None
        (out,) = outs
        # The bias of an ``addmm`` is broadcast; the closed form is for one with an entry for each
        # feature.
        values = self.owned.graph.values
        fits = values[operand].shape[-1:] == values[out].shape[-1:]
        is_bias = step.name == "addmm" and _argument_name(step, operand) == "self"
        if is_bias and not fits:
            return None
        users = [s for s in self.owned.graph.steps if out in values_read(s)]
        if out in self.outputs.axes or len(users) != 1:
            return None
        (norm,) = users
        reads_it_first = norm.refs()[0].index == out
        if not reads_it_first or self.owned.nodes[out].is_memory:
            return None
        return norm.index if self._is_projecting(norm, self.owned.layout(out)) else None

    def _is_projecting(self, norm: Step, layout: AnyLayout | None) -> bool:
        """Tell whether a step is a batch norm, and its result separate, as its input is laid out.

        Samples lie along the first axis, or several of which none is that of the channels.
        """
        if not ops.is_training_batch_norm(norm):
            return False
        rows = layout == Layout(0, self.owned.samples)
        if not rows and (not isinstance(layout, SeveralAxes) or 1 in layout.dims):
            return False
        above = self.owned.results(norm)
        if not above:
            return False
        separate = self.dependence.separate.get(self.owned.nodes[above[0]], False)
        return separate and self.owned.layout(above[0]) == layout

    # -- seeds --

    def _add_seeds(self, step: Step, outs: Sequence[int], reads: Sequence[int]) -> None:
        """Start columns at separate results of a step whose inputs are not all separate."""
        dependence, owned = self.dependence, self.owned
        moving = owned.moving(reads)
        above = [i for i in moving if owned.owners(i).owned and dependence.is_separate(i)]
        depending = within(outs, dependence.theta)
        fresh = [o for o in depending if dependence.is_separate(o) and o not in self.seeds]
        # If another result of the step is read by other samples, no site below gets its cotangent
        # from one backward pass.
        needed = len(above) < len(moving) or len(fresh) < len(depending)
        if not fresh or not needed:
            return
        self.seeds += fresh
        for o in fresh:
            if owned.layout(o) is None and owned.owners(o).partly_shared:
                self.spanning.add(o)
        # A separate input is served by the one backward pass. Columns would count it twice.
        if above:
            self.gates[step.index] = tuple(above)

    # -- shared values that have an entry for every sample --

    def _lies_among_samples(self, value: int) -> bool:
        """Tell whether a value is written into a memory that holds values of samples, too."""
        values = self.owned.graph.values
        storage = values[value].storage
        for i, owners in self.owned.interpretation.ownership.items():
            if owners.owned and values[i].storage == storage:
                return True
        return False

    def _note_spanning(self, operand: int, out: int, layout: AnyLayout) -> None:
        """Note an operand that has an entry for every sample.

        It is not broadcast along the samples at this site, so it was spread over them further up.
        """
        if not isinstance(layout, Layout) or operand in self.parameters:
            return
        values = self.owned.graph.values
        shape, out_shape = values[operand].shape, values[out].shape
        dim = layout.dim - len(out_shape) + len(shape)  # broadcasting aligns shapes at their end
        if 0 <= dim < len(shape) and shape[dim] == out_shape[layout.dim] > 1:
            self.spanning.add(operand)


def _refusal(by: str, step: Step) -> StructureError:
    """Return the error for rows that do not exist."""
    message = MSG_NOT_COPY if by == "copy" else MSG_NOT_FROZEN
    return StructureError(message.format(place=step.place))


def _argument_name(step: Step, operand: int) -> str | None:
    """Return the argument that holds the operand.

    The first, if it stands in several: ``GenericContraction`` finds the others.
    """
    for name, argument in step.named.items():
        for ref in tree_leaves(argument, is_ref):
            if isinstance(ref, Ref) and ref.index == operand:
                return name
    return None


def _can_be_projected(step: Step, outs: Sequence[int]) -> bool:
    """Tell whether there is a closed form for the op right below a batch norm."""
    if len(outs) != 1:
        return False
    if step.name == "convolution":
        transposed = bool(step.args[6])
        return not transposed
    return step.name in ("addmm", "mm")


# --- where shared values got their entry for every sample -----------------------------------------


def spread(
    graph: Graph, interpretation: Interpretation, plan: BackwardPlan
) -> list[tuple[int, list[int]]]:
    """Return the values that first had an entry for every sample, and the axes that may hold them.

    An ``expand`` (or ``zeros``, ..) that makes as many entries as there are samples has no samples
    in it, but what is computed from it may be used sample by sample.
    """
    in_memory = by_memory(graph)
    queue, visited = list(plan.spanning), set(plan.spanning)
    origins = []
    while queue:
        value = queue.pop()
        step = graph.makers.get(value)
        if step is None:
            continue
        axes = [d for d, size in enumerate(graph.values[value].shape) if size == plan.samples]
        if ops.traits(step.op).fills_shape and axes:
            origins.append((value, axes))
            continue
        # It came from somewhere further up, or was written into a memory by another step.
        sources = values_read(step)
        if graph.written(value):
            sources += in_memory[graph.values[value].storage]
        for i in sources:
            if (
                i not in visited
                and i in interpretation.ownership
                and _may_span(interpretation.ownership[i])
            ):
                visited.add(i)
                queue.append(i)
    return sorted(origins)


def _may_span(owners: Ownership) -> bool:
    return owners.partly_shared or not owners.depends_on_batch
