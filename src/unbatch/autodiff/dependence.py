"""Which values depend on the parameters, and which are separate: read off ownership alone.

Seen from the predictions, a value is *separate* while no sample depends on another on any path from
it to them: one cotangent of the value then serves all samples at once. Lives here: the graph
together with the owners of its values, and three facts about it (what is held constant, what
depends on the parameters, what is separate). What follows from them for the backward pass is for
``planner.py``. No tensor is touched here.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple, TypeVar

from unbatch.analysis.domain.ownership import Ownership
from unbatch.analysis.domain.sample_layout import AnyLayout, any_layout_of, in_its_place
from unbatch.analysis.interpreter import Interpretation
from unbatch.capture import ops
from unbatch.capture.graph import Graph
from unbatch.capture.steps import Step

Key = TypeVar("Key", int, str)  # the number of a value, or the name of a parameter


class Node(NamedTuple):
    """One value, or all values of one memory that is written to.

    What is written to one of these is seen in the others, and so is a dependence.
    """

    number: int  # of the value, or of the memory
    is_memory: bool


def values_read(step: Step) -> list[int]:
    """Return the values that a step reads, in order; one that stands in two places, twice."""
    return [ref.index for ref in step.refs()]


def values_returned(step: Step) -> list[int]:
    """Return the values that a step returns, without what it only writes."""
    return [ref.index for ref in step.outs if ref is not None]


def within(values: Iterable[Key], allowed: Container[Key]) -> list[Key]:
    """Return those of the values that are allowed, in their order."""
    return [value for value in values if value in allowed]


@dataclass(frozen=True)
class OwnedGraph:
    """A recorded forward pass and the owners of its values.

    ``leading``: the first axis of a prediction is that of the samples wherever it has their number.
    """

    graph: Graph
    interpretation: Interpretation
    samples: int
    leading: bool

    @cached_property
    def nodes(self) -> list[Node]:
        """By value."""
        values = self.graph.values
        written: set[int] = set()
        for step in self.graph.forward_steps:
            for _, new in step.writes:
                written.add(values[new.index].storage)
        nodes = []
        for i, value in enumerate(values):
            if value.storage in written:
                nodes.append(Node(value.storage, is_memory=True))
            else:
                nodes.append(Node(i, is_memory=False))
        return nodes

    def owners(self, value: int) -> Ownership:
        """Return who owns the elements of a value."""
        return self.interpretation.ownership[value]

    def layout(self, value: int) -> AnyLayout | None:
        """Return where the samples lie in a value.

        None where some element belongs to no single sample.
        """
        return any_layout_of(self.owners(value), self.samples)

    def is_differentiable(self, value: int) -> bool:
        """Tell whether a value can have a cotangent: integers and booleans have none."""
        dtype = self.graph.values[value].dtype
        return (
            dtype.is_floating_point or dtype.is_complex
        ) and value in self.interpretation.ownership

    def is_shared(self, value: int) -> bool:
        """Tell whether a value belongs to no sample: one of parameters and batch statistics."""
        owners = self.owners(value)
        return not owners.owned and not owners.mixed

    def results(self, step: Step) -> list[int]:
        """Return the differentiable values that a step makes, by return or by writing."""
        values = values_returned(step)
        values += [new.index for _, new in step.written_results]
        return self._differentiable(values)

    def reads(self, step: Step) -> list[int]:
        """Return the differentiable values that a step reads."""
        return self._differentiable(values_read(step))

    def _differentiable(self, values: Iterable[int]) -> list[int]:
        return [i for i in dict.fromkeys(values) if self.is_differentiable(i)]

    # -- of several values --

    def nodes_of(self, values: Iterable[int]) -> set[Node]:
        """Return the nodes of some values."""
        return {self.nodes[i] for i in values}

    def all_shared(self, values: Iterable[int]) -> bool:
        """Tell whether none of the values belongs to a sample."""
        return all(self.is_shared(i) for i in values)

    def moving(self, values: Iterable[int]) -> list[int]:
        """Return those of the values that change if a sample does."""
        return [i for i in values if self.owners(i).depends_on_batch]


# An example. Linear → batch norm → ReLU → Linear in train mode, from the predictions down:
#
#     value               separate    because
#     predictions Va + c  yes         slice n belongs to sample n
#     a = relu(h)         yes         the second Linear works sample by sample
#     h = BN(z)           yes         so does the ReLU
#     z = Wx + b          no          every entry of h depends on all samples of z
#     x                   no          so it does through z; but x does not depend on parameters
#
# With statistics held constant, the batch norm works sample by sample too, and z is separate.


@dataclass(frozen=True)
class Dependence:
    """What a backward pass from the predictions passes, for some parameters."""

    owned: OwnedGraph
    frozen: frozenset[int]  # values held constant
    frozen_norms: frozenset[int]  # steps that are batch norms with constant statistics
    theta: frozenset[int]  # values that depend on the parameters
    separate: Mapping[Node, bool]  # what the predictions depend on, and whether it is separate

    def is_separate(self, value: int) -> bool:
        """Tell whether a value that the predictions depend on is separate."""
        return self.separate[self.owned.nodes[value]]

    def all_separate(self, values: Iterable[int]) -> bool:
        """Tell whether all of the values are separate."""
        return all(self.is_separate(i) for i in values)

    def flowing_to(self, outputs: Iterable[int]) -> frozenset[int]:
        """Return what depends on the parameters, and what some outputs depend on.

        Outputs without an axis of samples count as well, to which ``separate`` says nothing.
        """
        owned = self.owned
        passed = owned.nodes_of(outputs)
        for step in reversed(owned.graph.forward_steps):
            if not has_derivatives(step) or passed.isdisjoint(owned.nodes_of(owned.results(step))):
                continue
            passed |= owned.nodes_of(self.reads(step))
        return frozenset(i for i in self.theta if owned.nodes[i] in passed)

    def reads(self, step: Step) -> list[int]:
        """Return the values that a step reads and that depend on the parameters."""
        return within(self.owned.reads(step), self.theta)

    def pulled_back(self, step: Step) -> list[int]:
        """Return the results of a step that have a cotangent, if derivatives go through it."""
        if not has_derivatives(step):
            return []
        return _with_cotangent(self.owned, self.separate, step)


def find_dependence(
    owned: OwnedGraph, parameters: Iterable[int], predictions: Iterable[int], freeze: bool
) -> Dependence:
    """Return what depends on ``parameters``, and what of it is separate.

    ``freeze``: batch statistics are held constant.
    """
    frozen, frozen_norms = frozenset[int](), frozenset[int]()
    if freeze:
        frozen, frozen_norms = _statistics(owned)
    theta = _reached(owned, parameters, frozen)
    separate = _separate(owned, predictions, theta, frozen_norms)
    return Dependence(owned, frozen, frozen_norms, theta, separate)


def has_derivatives(step: Step) -> bool:
    """Tell whether derivatives go through a step."""
    traits = ops.traits(step.op)
    return step.grad and not traits.cuts and not traits.reads_shape_only


def _with_cotangent(owned: OwnedGraph, separate: Mapping[Node, bool], step: Step) -> list[int]:
    """Return the results of a step that the predictions depend on."""
    return [i for i in owned.results(step) if owned.nodes[i] in separate]


def _statistics(owned: OwnedGraph) -> tuple[frozenset[int], frozenset[int]]:
    """Return the values that are batch statistics, and the batch norms that keep theirs inside."""
    values, norms = set[int](), set[int]()
    for step in owned.graph.forward_steps:
        for i in owned.results(step):
            # What was a statistic before this step is held constant where it came up.
            if not owned.interpretation.made_at(step, i):
                continue
            if ops.is_batch_norm(step.op) and owned.owners(i).owned:
                norms.add(step.index)
            elif owned.is_shared(i):
                values.add(i)
    return frozenset(values), frozenset(norms)


def _reached(
    owned: OwnedGraph, parameters: Iterable[int], frozen: frozenset[int]
) -> frozenset[int]:
    """Return what depends on the parameters.

    The results of a step do, if derivatives go through it and one of its inputs does.
    """
    nodes = owned.nodes
    reached = set(parameters)
    reached_nodes = owned.nodes_of(reached)
    for step in owned.graph.forward_steps:
        if not has_derivatives(step):
            continue
        if reached_nodes.isdisjoint(owned.nodes_of(owned.reads(step))):
            continue
        for i in owned.results(step):
            if i not in frozen:
                reached.add(i)
                reached_nodes.add(nodes[i])
    # Through a memory that is written to, a value may depend on parameters that were written after
    # it was made.
    for i in owned.interpretation.ownership:
        if nodes[i] in reached_nodes and owned.is_differentiable(i) and i not in frozen:
            reached.add(i)
    return frozenset(reached)


# --- what is separate -----------------------------------------------------------------------------


def _separate(
    owned: OwnedGraph,
    predictions: Iterable[int],
    theta: frozenset[int],
    frozen_norms: frozenset[int],
) -> dict[Node, bool]:
    """Return for each node whether all paths from it to the predictions keep samples separate.

    From the predictions down, so that all paths from a value are known when a step that makes it
    comes up.
    """
    separation = _Separation(owned, theta, frozen_norms)
    for p in predictions:
        in_place = in_its_place(owned.owners(p), owned.samples, owned.leading)
        separation.add_path(p, in_place)
    for step in reversed(owned.graph.forward_steps):
        if has_derivatives(step):
            separation.pull_through(step)
    return separation.separate


@dataclass
class _Separation:
    """The nodes passed so far, on the way from the predictions down."""

    owned: OwnedGraph
    theta: frozenset[int]
    frozen_norms: frozenset[int]
    separate: dict[Node, bool] = field(default_factory=dict)

    def add_path(self, value: int, separate: bool) -> None:
        """Note one more path from a value to the predictions."""
        node = self.owned.nodes[value]
        self.separate[node] = self.separate.get(node, True) and separate

    def pull_through(self, step: Step) -> None:
        """Lengthen the paths from a step's results to what the step reads."""
        owned = self.owned
        outs = _with_cotangent(owned, self.separate, step)
        if not outs:
            return
        outs = within(outs, self.theta)
        reads = within(owned.reads(step), self.theta)
        above = all(self.separate[node] for node in owned.nodes_of(outs))
        through = above and self._keeps_separate(step, outs, reads)
        # From shared values to shared values, a step computes the same for all samples and mixes
        # none: such an input is as separate as what is made of it.
        makes_shared = owned.all_shared(outs)
        # A view of a memory is the same node as that memory, and no step on a path. A step that
        # writes is one.
        own_nodes = set[Node]()
        if not step.writes:
            own_nodes = owned.nodes_of(outs)
        for i in reads:
            if owned.nodes[i] in own_nodes:
                continue
            if makes_shared and owned.is_shared(i):
                self.add_path(i, above)
            else:
                self.add_path(i, through)

    def _keeps_separate(self, step: Step, outs: Sequence[int], reads: Sequence[int]) -> bool:
        """Tell whether a step makes entries of sample n from those of sample n alone.

        Shared values may come in, and statistics that were there before.
        """
        owned = self.owned
        if not all(owned.owners(o).separate for o in outs):
            return False
        # Whose these are was read off what comes after them, and says nothing of what they are
        # made of.
        if not owned.interpretation.fresh.isdisjoint(outs):
            return False
        if step.index in self.frozen_norms:
            return True
        moving = owned.moving(reads)
        if not moving:
            return True  # what the samples do here is constant, and has no cotangent
        # In a statistic that moves, all samples are mixed already.
        if any(owned.owners(i).mixed for i in moving):
            return False
        # A statistic that comes up here is a sum over all samples: each of them is read by all
        # others.
        older: set[int] = set()
        for i in values_read(step):
            older |= owned.owners(i).statistics
        return all(owned.owners(o).statistics <= older for o in outs)
