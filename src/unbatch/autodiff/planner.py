"""Where parameters meet samples, and what has to be pulled back how: the plan of a sweep, read off labels alone.

A *site* is a step at which a value made from parameters only (its *operand*) meets values of samples. A value is
*separate* while, on every way from it to the predictions, no sample listens to another: one sweep serves all samples
there, and a site is contracted locally. Below, each sample is a column of its own, pulled back from the *seeds*: the
lowest values that are still separate. No tensor is touched here.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch.utils._pytree import tree_leaves

from unbatch.analysis.domain.ownership import Ownership
from unbatch.analysis.domain.sample_layout import (
    Layout,
    Scattered,
    holds_its_place,
    layout_of,
    prediction_dim,
)
from unbatch.analysis.interpreter import Interpretation
from unbatch.capture import ops
from unbatch.capture.aliasing import by_memory
from unbatch.capture.graph import Graph, Ref, Step, is_ref
from unbatch.errors import MSG_NOT_COPY, MSG_NOT_FROZEN, StructureError


@dataclass(frozen=True)
class Site:
    """Step ``step`` uses the value ``operand`` as argument ``name``. ``way``: "local", "projected" or "columns"."""

    step: int
    operand: int
    name: str
    way: str


@dataclass
class BackwardPlan:
    """What a sweep has to do at which step. Values and steps by their number in the graph."""

    by: str
    samples: int
    parameters: dict[int, str]
    predictions: dict[int, int]  # prediction -> its sample axis
    sites: list[Site] = field(default_factory=list)
    chain: dict[int, bool] = field(
        default_factory=dict
    )  # steps without samples -> whether statistics move there
    seeds: list[int] = field(default_factory=list)  # values from which columns start
    unsplit: list[int] = field(
        default_factory=list
    )  # predictions that are not separate: columns start there, too
    gates: dict[int, list[int]] = field(
        default_factory=dict
    )  # step -> inputs through which columns must not pass
    frozen: set[int] = field(default_factory=set)  # values held constant
    frozen_norms: set[int] = field(
        default_factory=set
    )  # steps that are batch norms with constant statistics
    projections: dict[int, int] = field(
        default_factory=dict
    )  # step of a weight -> step of the batch norm above
    spanning: set[int] = field(
        default_factory=set
    )  # shared values, in part or whole, with an entry for every sample
    refused: StructureError | None = (
        None  # why rows do not exist, unless such values are counted to the samples
    )
    layouts: dict[int, Layout | Scattered] = field(
        default_factory=dict
    )  # where the samples lie, at sites and seeds
    by_place: bool = False  # slices were given to samples where they meet in no symmetric way
    direct: set[int] = field(default_factory=set)  # made from parameters without samples on the way
    theta: set[int] = field(default_factory=set)
    separate: dict[Any, bool] = field(default_factory=dict)

    @property
    def local(self) -> list[Site]:
        return [s for s in self.sites if s.way != "columns"]

    @property
    def columns(self) -> list[Site]:
        return [s for s in self.sites if s.way == "columns"]

    @property
    def divisible(self) -> bool:
        """It is known of every seed where the samples lie in it."""
        return all(i in self.layouts for i in self.seeds)


def plan_backward(
    graph: Graph, walk: Interpretation, samples: int, leading: bool, wanted: Iterable[str], by: str
) -> BackwardPlan:
    """Plan the sweep for the parameters ``wanted``, by ``by``.

    Raises ``StructureError`` where copy or frozen rows do not exist, naming the step that stands in the way (or leaves
    it in ``refused``).
    """
    names = set(wanted)
    parameters = {
        i: v.name for i, v in enumerate(graph.values) if v.kind == "parameters" and v.name in names
    }
    predictions = {
        r.index: d
        for r in graph.used_predictions
        if (d := prediction_dim(walk[r], samples, leading)) is not None
    }
    plan = BackwardPlan(by, samples, parameters, predictions)
    return _Planner(graph, walk, plan, leading).run()


@dataclass
class _Planner:
    graph: Graph
    walk: Interpretation
    plan: BackwardPlan
    leading: bool
    written: set[int] = field(default_factory=set)

    def run(self) -> BackwardPlan:
        graph, plan = self.graph, self.plan
        self.written = {
            graph.values[new.index].storage for s in graph.forward_steps for _, new in s.writes
        }
        if plan.by == "frozen":
            self._freeze()
        plan.theta = self._reach()
        self._pull()
        plan.unsplit = [p for p in plan.predictions if by_columns(plan, self.node(p))]
        plan.direct = set(plan.parameters)
        for step in graph.forward_steps:
            if self._on_path(step):
                self._place(step)
        for number in {s.step for s in plan.sites}:
            self._keep_layouts(self._outs(graph.steps[number]))
        self._keep_layouts(plan.seeds)
        return plan

    def _keep_layouts(self, values: Iterable[int]) -> None:
        self.plan.layouts |= {i: found for i in values if (found := self.layout(i)) is not None}

    # -- reading --

    def marks(self, i: int) -> Ownership:
        return self.walk.marks[i]

    def node(self, i: int) -> Any:
        """Values that share memory which is written to are one: what is written to one is seen in the other."""
        storage = self.graph.values[i].storage
        return ("memory", storage) if storage in self.written else i

    def layout(self, i: int) -> Layout | Scattered | None:
        marks = self.marks(i)
        found = layout_of(marks, self.plan.samples)
        if found is None and marks.owned and marks.all_owned:
            owner = np.broadcast_to(marks.owner, marks.shape).astype(np.int64)
            return Scattered(torch.from_numpy(owner.copy()), self.plan.samples)
        return found

    def _outs(self, step: Step) -> list[int]:
        refs = [*(r for r in step.outs if r is not None), *(new for _, new in step.written_results)]
        return [i for i in dict.fromkeys(r.index for r in refs) if self._real(i)]

    def _ins(self, step: Step) -> list[int]:
        return [
            i
            for i in dict.fromkeys(r.index for r in step.refs())
            if self._real(i) and i in self.plan.theta
        ]

    def _real(self, i: int) -> bool:
        dtype = self.graph.values[i].dtype
        return (dtype.is_floating_point or dtype.is_complex) and i in self.walk.marks

    def _loose(self, i: int) -> bool:
        """It belongs to no sample: made from parameters and statistics."""
        return not self.marks(i).owned and not self.marks(i).mixed

    def _passes(self, step: Step) -> bool:
        """Derivatives go through it."""
        traits = ops.traits(step.op)
        return step.grad and not traits.cuts and not traits.reads_shape_only

    def _on_path(self, step: Step) -> bool:
        return self._passes(step) and any(
            self.node(o) in self.plan.separate for o in self._outs(step)
        )

    # -- what depends on the parameters --

    def _reach(self) -> set[int]:
        reached = set(self.plan.parameters)
        nodes = {self.node(i) for i in reached}
        for step in self.graph.forward_steps:
            if self._passes(step) and any(
                self.node(r.index) in nodes for r in step.refs() if self._real(r.index)
            ):
                fresh = [o for o in self._outs(step) if o not in self.plan.frozen]
                reached.update(fresh)
                nodes.update(self.node(o) for o in fresh)
        return (
            reached
            | {i for i in self.walk.marks if self.node(i) in nodes and self._real(i)}
            - self.plan.frozen
        )

    # -- statistics held constant --

    def _freeze(self) -> None:
        """What cross-sample reductions give is held constant, what batch norms take inside as well."""
        for step in self.graph.forward_steps:
            for o in self._outs(step):
                if not self.walk.made_at(step, o):
                    continue
                if ops.is_batch_norm(step.op) and self.marks(o).owned:
                    self.plan.frozen_norms.add(step.index)
                elif self._loose(o):
                    self.plan.frozen.add(o)

    def _refused(self, step: Step, message: str) -> StructureError:
        return StructureError(message.format(place=step.place))

    # -- what is separate --

    def _pull(self) -> None:
        """From the predictions down: which values still belong to one sample each."""
        plan = self.plan
        for p in plan.predictions:
            alone = holds_its_place(self.marks(p), plan.samples, self.leading)
            self._feed(p, alone)
        for step in reversed(self.graph.forward_steps):
            if not self._on_path(step):
                continue
            outs = [
                o for o in self._outs(step) if self.node(o) in plan.separate and o in plan.theta
            ]
            apart = all(plan.separate[self.node(o)] for o in outs)
            local = apart and self._keeps_apart(step, outs)
            statistic = all(self._loose(o) for o in outs)
            same = set() if step.writes else {self.node(o) for o in outs}
            for i in [i for i in self._ins(step) if self.node(i) not in same]:
                self._feed(i, apart if statistic and self._loose(i) else local)

    def _feed(self, i: int, separate: bool) -> None:
        node = self.node(i)
        self.plan.separate[node] = self.plan.separate.get(node, True) and separate

    def _keeps_apart(self, step: Step, outs: Sequence[int]) -> bool:
        """Entries of sample n come from sample n, shared values, and statistics that come in from outside."""
        if any(not self.marks(o).separate for o in outs):
            return False
        if step.index in self.plan.frozen_norms:
            return True
        moving = [self.marks(i) for i in self._ins(step) if self.marks(i).depends_on_batch]
        given: frozenset[int] = frozenset().union(*(self.marks(r.index).given for r in step.refs()))
        fresh = any(self.marks(o).given - given for o in outs)
        return not moving or not (fresh or any(m.mixed for m in moving))

    # -- what to do at a step --

    def _place(self, step: Step) -> None:
        outs = [o for o in self._outs(step) if self.node(o) in self.plan.separate]
        ins = self._ins(step)
        loose = [i for i in ins if self._loose(i) and i in self.plan.direct]
        apart = all(self.plan.separate[self.node(o)] for o in outs)
        if not ins:
            return
        if not all(self._loose(o) for o in outs):
            for i in loose:
                self._site(step, i, outs, apart)
            if self.plan.by == "component":
                self._seed(step, outs if not step.writes else outs if apart else [], ins)
        elif loose:
            self.plan.spanning |= {
                new.index for _, new in step.writes if self._among_samples(new.index)
            }
            self._made_of_statistics(step, outs, ins, loose, apart)

    def _made_of_statistics(
        self, step: Step, outs: Sequence[int], ins: Sequence[int], loose: Sequence[int], apart: bool
    ) -> None:
        """A parameter meets parameters or statistics: samples meet it where they meet the result."""
        plan = self.plan
        onto_samples = any(not self._loose(i) for i in ins)
        moving = any(self.marks(o).depends_on_batch for o in outs)
        if plan.by != "component" and onto_samples:
            raise self._refused(step, MSG_NOT_COPY if plan.by == "copy" else MSG_NOT_FROZEN)
        if not moving or plan.by != "component" or (apart and not onto_samples):
            plan.chain[step.index] = moving and plan.by != "frozen"
            plan.direct.update(self._outs(step))
        else:
            for i in loose:
                self._columns(step, i, "columns")

    def _site(self, step: Step, operand: int, outs: Sequence[int], apart: bool) -> None:
        component = self.plan.by == "component"
        if self.layout(outs[0]) is None and self.marks(outs[0]).partly_shared:
            self.plan.spanning.add(outs[0])
        if (apart or self.plan.by == "copy") and self.layout(outs[0]) is not None:
            self.plan.sites += [
                Site(step.index, operand, n, "local") for n in _argument_names(step, operand)
            ]
            self._note_spanning(operand, outs[0])
        elif component:
            self._columns(
                step, operand, "projected" if self._below_norm(step, operand, outs) else "columns"
            )
        else:
            error = self._refused(step, MSG_NOT_COPY if self.plan.by == "copy" else MSG_NOT_FROZEN)
            if not self.plan.spanning:
                raise error
            self.plan.refused = error

    def _columns(self, step: Step, operand: int, way: str) -> None:
        """Columns reach the parameters in a statistic through the statistic itself."""
        if not self.marks(operand).depends_on_batch:
            self.plan.sites += [
                Site(step.index, operand, n, way) for n in _argument_names(step, operand)
            ]

    def _below_norm(self, step: Step, operand: int, outs: Sequence[int]) -> bool:
        """The result goes into a batch norm, and nowhere else, that is the topmost place of mixing."""
        users = [s for s in self.graph.steps if any(r.index in outs for r in s.refs())]
        transposed = step.name == "convolution" and step.args[6]
        bias = (
            self.graph.values[operand].shape[-1:]
            if _argument_names(step, operand) == ["self"]
            else None
        )
        odd = (
            bias is not None
            and bias != self.graph.values[outs[0]].shape[-1:]
            and step.name == "addmm"
        )
        if transposed or odd or outs[0] in self.plan.predictions:
            return False
        if step.name not in ("addmm", "mm", "convolution") or len(users) != 1 or len(outs) != 1:
            return False
        (norm,) = users
        above = self._outs(norm)
        layout = self.layout(outs[0])
        first = norm.refs()[0].index == outs[0]
        if not first or not isinstance(layout, Layout) or self.node(outs[0]) != outs[0]:
            return False
        fits = layout == Layout(0, self.plan.samples) and ops.is_training_batch_norm(norm)
        sep = bool(above) and self.plan.separate.get(self.node(above[0]), False)
        if fits and sep and layout_of(self.marks(above[0]), self.plan.samples) == layout:
            self.plan.projections[step.index] = norm.index
            return True
        return False

    def _seed(self, step: Step, outs: Sequence[int], ins: Sequence[int]) -> None:
        plan = self.plan
        moving = [i for i in ins if self.marks(i).depends_on_batch]
        below = [i for i in moving if not self.marks(i).owned or not plan.separate[self.node(i)]]
        alone = [
            o
            for o in outs
            if plan.separate[self.node(o)] and o in plan.theta and o not in plan.seeds
        ]
        parted = len(alone) < len(
            [o for o in outs if o in plan.theta]
        )  # another output is heard by other samples
        if alone and (below or parted):
            plan.seeds += alone
            plan.spanning |= {
                o for o in alone if self.layout(o) is None and self.marks(o).partly_shared
            }
            above = [i for i in moving if i not in below]
            if above:
                plan.gates[step.index] = above

    # -- shared values that have an entry for every sample --

    def _among_samples(self, i: int) -> bool:
        """It is written into a memory that holds values of samples, too."""
        storage = self.graph.values[i].storage
        return any(
            m.owned for j, m in self.walk.marks.items() if self.graph.values[j].storage == storage
        )

    def _note_spanning(self, operand: int, out: int) -> None:
        """An operand that is not broadcast along the samples was spread over them further up."""
        layout, shape = self.layout(out), self.graph.values[operand].shape
        whole = self.graph.values[out].shape
        if isinstance(layout, Layout):
            dim = layout.dim - len(whole) + len(shape)
            if (
                0 <= dim < len(shape)
                and shape[dim] == whole[layout.dim] > 1
                and operand not in self.plan.parameters
            ):
                self.plan.spanning.add(operand)


def by_columns(plan: BackwardPlan, node: Any) -> bool:
    return plan.by == "component" and not plan.separate[node]


def spread(graph: Graph, walk: Interpretation, plan: BackwardPlan) -> list[tuple[int, list[int]]]:
    """Where shared values with an entry for every sample got it: values, and the axes that may hold the samples."""
    in_memory = by_memory(graph)
    queue, seen, out = list(plan.spanning), set(plan.spanning), []
    while queue:
        i = queue.pop()
        step = graph.makers.get(i)
        if step is None:
            continue
        axes = [d for d, s in enumerate(graph.values[i].shape) if s == plan.samples]
        if ops.traits(step.op).fills_shape and axes:
            out.append((i, axes))
            continue
        shares = in_memory[graph.values[i].storage] if graph.written(i) else []
        near = [*(r.index for r in step.refs()), *shares]
        fresh = [r for r in near if r not in seen and r in walk.marks and _loosely(walk.marks[r])]
        seen.update(fresh)
        queue += fresh
    return sorted(out)


def _loosely(marks: Ownership) -> bool:
    return marks.partly_shared or not marks.depends_on_batch


def _argument_names(step: Step, operand: int) -> list[str]:
    """The argument that holds the operand; one entry even if it stands in several places (see ``Generic``)."""
    held = {n: tree_leaves(a, is_ref) for n, a in step.named.items()}
    return [
        n
        for n, refs in held.items()
        if any(isinstance(r, Ref) and r.index == operand for r in refs)
    ][:1]
