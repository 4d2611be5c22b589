"""The checker of the grammar that stands at the top of ``graph.py``.

Tests hold every graph against it that is recorded or rewritten; at run time nobody pays for it.
"""

from __future__ import annotations

from collections.abc import Mapping

from unbatch.capture import ops
from unbatch.capture.graph import Graph
from unbatch.capture.steps import Ref, Step, indices
from unbatch.capture.trees import flat


class GraphError(AssertionError):
    """A recording that breaks the grammar: a fault of this package."""


def check_graph(graph: Graph) -> None:
    """Raise ``GraphError``, with the step and what is wrong, if a recording breaks the grammar."""
    # Value -> the step that makes it, filled in the order of steps: what is missing comes later.
    makers: dict[int, int] = {}
    for place, step in enumerate(graph.steps):
        if step.index != place:
            raise GraphError(f"Step {place} ({step.name}) says that it is step {step.index}.")
        _check_reads(graph, step, makers)
        _check_writes(step)
        # An op in place returns what it has written: that value is made once, and named twice.
        for i in dict.fromkeys(indices(step.made())):
            if i in makers:
                raise GraphError(
                    f"Step {place} ({step.name}) makes value {i}, which step {makers[i]} has made."
                )
            makers[i] = place
    _check_values(graph, makers)
    _check_cut(graph, makers)
    _check_host_reads(graph, makers)
    _check_calls(graph)
    _check_ends(graph)


def _check_reads(graph: Graph, step: Step, makers: Mapping[int, int]) -> None:
    """Hold that what a step reads is there before it."""
    for ref in [*step.refs(), *(old for old, _ in step.writes)]:
        if not 0 <= ref.index < len(graph.values):
            raise GraphError(
                f"Step {step.index} ({step.name}) reads value {ref.index} of {len(graph.values)}."
            )
        if graph.values[ref.index].kind == "step" and ref.index not in makers:
            raise GraphError(
                f"Step {step.index} ({step.name}) reads value {ref.index} before it is made."
            )


def _check_writes(step: Step) -> None:
    """Hold that what an op writes to, as its schema says, has a new version, and nothing else.

    What the schema keeps to itself (running statistics) is not asked for here.
    """
    olds = [old for old, _ in step.writes]
    for old in olds:
        if old not in step.refs():
            raise GraphError(
                f"Step {step.index} ({step.name}) writes to value {old.index}, "
                "which it does not read."
            )
    for name in ops.declared_writes(step.op):
        for ref in flat(step.named.get(name)):
            if isinstance(ref, Ref) and ref not in olds:
                raise GraphError(
                    f"Step {step.index} ({step.name}) writes to {name!r}, which is not recorded."
                )


def _check_values(graph: Graph, makers: Mapping[int, int]) -> None:
    """Hold that values know the step that makes them, and have as many strides as axes."""
    # -1 stands for no step, in the values as well.
    for i, value in enumerate(graph.values):
        maker = makers.get(i, -1)
        if value.step != maker:
            raise GraphError(
                f"Value {i} says that step {value.step} makes it, and step {maker} does."
            )
        if (value.kind == "step") != (maker >= 0):
            raise GraphError(f"Value {i} is of the kind {value.kind!r}, and step {maker} makes it.")
        # What is sparse or nested has no strides.
        if value.stride and len(value.stride) != len(value.shape):
            raise GraphError(f"Value {i} of shape {value.shape} has the strides {value.stride}.")


def _check_cut(graph: Graph, makers: Mapping[int, int]) -> None:
    """Hold that the model reads and returns nothing that the loss makes."""
    outside = graph.after_cut - set(range(len(graph.steps)))
    if outside:
        raise GraphError(
            f"The steps {sorted(outside)} of the loss are none of the {len(graph.steps)} steps."
        )
    of_loss = {i for i, step in makers.items() if step in graph.after_cut}
    for step in graph.forward_steps:
        early = sorted(of_loss.intersection(indices(step.refs())))
        if early:
            raise GraphError(
                f"Step {step.index} ({step.name}) of the model reads {early}, which the loss makes."
            )
    for ref in graph.predictions:
        if ref.index in of_loss:
            raise GraphError(
                f"The prediction {ref.index} is made by step {makers[ref.index]}, of the loss."
            )


def _check_host_reads(graph: Graph, makers: Mapping[int, int]) -> None:
    """Hold that Python read nothing before it was made.

    A read before step ``s`` comes after step ``s - 1``; after the last step ``s`` is their number.
    """
    for read in (*graph.host_reads, *graph.sizings):
        if not makers.get(read.ref.index, -1) < read.step <= len(graph.steps):
            raise GraphError(
                f"Value {read.ref.index} was read by Python before step {read.step} has made it."
            )


def _check_calls(graph: Graph) -> None:
    """Hold that modules ran from a step to a later one."""
    count = len(graph.steps)
    for call in graph.calls:
        if not 0 <= call.start <= call.stop <= count:
            raise GraphError(
                f"The module {call.module!r} ran from step {call.start} to {call.stop} of {count}."
            )


def _check_ends(graph: Graph) -> None:
    """Hold that inputs, targets, predictions and the loss are values of the graph."""
    for ref in [*graph.inputs, *graph.targets, *graph.predictions, graph.loss]:
        if ref is not None and not 0 <= ref.index < len(graph.values):
            raise GraphError(
                f"Value {ref.index} of {len(graph.values)} is said to be an end of the computation."
            )
