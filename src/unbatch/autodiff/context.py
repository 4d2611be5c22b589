"""The recorded problem as the passes see it: graph, owners and batch, and the plans made so far.

Lives here: what several questions about one recording share. What a pass does with it is elsewhere:
a plan is made by ``planner.py``, run by ``vjp.py`` and ``jvp.py``, and tested by the wing that asks
for it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from unbatch.analysis.domain.ownership import Ownership
from unbatch.analysis.interpreter import Interpretation, interpret
from unbatch.analysis.number_facts import Fact
from unbatch.analysis.outputs import Outputs
from unbatch.analysis.policy import Mixed, Policy
from unbatch.autodiff.planner import BackwardPlan, plan_backward, spread
from unbatch.autodiff.readers import read_by
from unbatch.autodiff.schedule import Operands, Schedule
from unbatch.capture.graph import Graph
from unbatch.capture.program import Program
from unbatch.capture.steps import Value
from unbatch.capture.trees import copied
from unbatch.linalg.precision import BACKWARD, in_double, tolerance

# Of a plan: the names of the parameters, and by which decomposition.
Key = tuple[tuple[str, ...], str]


@dataclass
class Tested:
    """What was tested of the derivatives of recordings of one form, whatever their sizes.

    ``plans``: whether plans passed their self-check, by what they are without sizes.
    ``ways``: how tangents are pushed, for parameters and decomposition.
    """

    plans: dict[Any, bool] = field(default_factory=dict)
    ways: dict[Any, str] = field(default_factory=dict)


@dataclass
class Context:
    """A recording with its interpretation and its batch, and what is known of its derivatives.

    ``owners``: those of the values that the recording starts from; ``leading``: samples lie
    along the first axis of the inputs; ``outputs``: those that the loss reads. ``faithful``: the
    recording has the derivatives of the model; ``split``: parameters reach the loss through the
    predictions only. ``alone``: the program may be another one by now, and is not run.
    """

    program: Program
    graph: Graph
    interpretation: Interpretation
    owners: Mapping[int, Ownership]
    samples: int
    leading: bool
    outputs: Outputs
    inputs: Any
    targets: Any
    skeleton: Any  # what the model returned, with references in place of tensors
    faithful: bool
    split: bool
    # What is in the way of derivatives, in words: a backward pass that is not linear, or one that
    # lets other samples into a sample's row. Empty where nothing is.
    not_linear: str = ""
    joined_backward: str = ""
    alone: bool = False
    # Found out by questions, and kept for the next one.
    schedules: dict[Key, Schedule] = field(default_factory=dict)
    trust: dict[Key, bool] = field(default_factory=dict)  # whether a plan passed its self-check
    tested: Tested = field(default_factory=Tested)  # on batches of other sizes, too
    last_form: Any = None  # of the second derivative of the loss: the guess that is tried first
    # On which plans rely, beside those of the interpretation.
    facts: list[Fact] = field(default_factory=list)
    buffer: Tensor | None = None  # memory of ``scratch``

    # -- plans --

    def schedule(self, parameters: Mapping[str, Tensor], by: str) -> Schedule:
        """Return the schedule of a backward pass, made when it is first asked for.

        Raises ``StructureError`` where rows by ``by`` do not exist.
        """
        key = (tuple(parameters), by)
        if key not in self.schedules:
            plan, facts = _plan(self, key)
            self.facts += facts
            shapes = {name: tuple(p.shape) for name, p in parameters.items()}
            operands = Operands(self.graph, plan, shapes)
            self.schedules[key] = Schedule(self.graph, plan, operands)
        return self.schedules[key]

    def in_double(self) -> Context:
        """Return the same problem and plans in float64; nothing of it was tested yet."""
        graph = self.graph.in_double()
        schedules = {key: Schedule(graph, s.plan, s.operands) for key, s in self.schedules.items()}
        return replace(
            self,
            graph=graph,
            inputs=in_double(self.inputs),
            schedules=schedules,
            trust={},
            tested=Tested(),
            buffer=None,
        )

    def on_copies(self) -> Context:
        """Return the same problem and plans on copies of all that the recording starts from.

        The program is not run any more.
        """
        inputs, targets = tree_map(copied, (self.inputs, self.targets))
        parameters = {}
        for name, p in self.program.parameters.items():
            parameters[name] = p.detach().clone().requires_grad_(p.requires_grad)
        numbers = dict(replace(self, inputs=inputs, targets=targets).data)
        for i, value in enumerate(self.graph.values):
            if value.kind == "parameters":
                numbers[i] = parameters[value.name]
            elif value.kind in ("buffers", "constants") and value.concrete is not None:
                numbers[i] = value.concrete.clone()
        graph = self.graph.moved(numbers, self.graph.rng)
        schedules = {key: Schedule(graph, s.plan, s.operands) for key, s in self.schedules.items()}
        return replace(
            self,
            program=replace(self.program, parameters=parameters),
            graph=graph,
            inputs=inputs,
            targets=targets,
            alone=True,
            schedules=schedules,
            trust=dict(self.trust),
            facts=[],
            buffer=None,
        )

    # -- the recording --

    @property
    def axes(self) -> Mapping[int, int]:
        """Prediction -> the axis along which its samples lie."""
        return self.outputs.axes

    @property
    def own_loss(self) -> bool:
        """Whether the model computes its loss itself."""
        return self.program.loss is None

    @cached_property
    def rounding(self) -> float:
        """Relative error of a gradient that rounding explains.

        By the coarsest floating-point type on the way.
        """
        return tolerance({value.dtype for value in self._computed()}, BACKWARD)

    @property
    def types_of_parameters(self) -> set[torch.dtype]:
        """The floating-point types of all parameters, also of those that are not asked about."""
        types = {value.dtype for value in self.graph.values if value.kind == "parameters"}
        return {dtype for dtype in types if dtype.is_floating_point or dtype.is_complex}

    @property
    def values_in_double(self) -> int:
        """Bytes of all that the forward pass computes, in float64."""
        entries = 0
        for value in self._computed():
            if value.dtype.is_floating_point:
                entries += value.entries
        return 8 * entries

    def _computed(self) -> Iterator[Value]:
        """Iterate over the values that steps of the forward pass return."""
        for step in self.graph.forward_steps:
            for ref in step.outs:
                if ref is not None:
                    yield self.graph.values[ref.index]

    # -- numbers --

    @property
    def data(self) -> dict[int, Tensor]:
        """Inputs and targets by their number in the graph."""
        tensors: dict[int, Tensor] = {}
        for refs, tree in ((self.graph.inputs, self.inputs), (self.graph.targets, self.targets)):
            for ref, leaf in zip(refs, tree_leaves(tree), strict=True):
                if ref is not None:
                    tensors[ref.index] = leaf
        return tensors

    @property
    def constants(self) -> dict[int, Tensor]:
        """Parameters by their number in the graph, detached."""
        tensors: dict[int, Tensor] = {}
        for i, value in enumerate(self.graph.values):
            if value.kind == "parameters":
                tensors[i] = self.program.parameters[value.name].detach()
        return tensors

    def numbers(self, values: Sequence[int]) -> dict[int, Tensor]:
        """Return values of the forward pass, by their number in the graph."""
        feed, steps = self.data | self.constants, self.graph.forward_steps
        with torch.no_grad():
            tensors = self.graph.run(feed, values, steps=steps)
        return dict(zip(values, tensors, strict=True))

    def scratch(self, shape: Sequence[int], like: Tensor) -> Tensor:
        """Return memory for rows that nobody keeps: the same each time.

        Fresh memory would cost more than what fills it.
        """
        size = math.prod(shape) * like.element_size()
        if self.buffer is None or self.buffer.numel() < size or self.buffer.device != like.device:
            self.buffer = torch.empty(size, dtype=torch.uint8, device=like.device)
        return self.buffer[:size].view(like.dtype).view(*shape)


# --- planning -------------------------------------------------------------------------------------


def _plan(context: Context, key: Key) -> tuple[BackwardPlan, list[Fact]]:
    """Return a plan and the facts that it relies on, beside those of the interpretation.

    Raises ``StructureError`` where the rows do not exist.
    """
    names, by = key
    interpretation, facts = context.interpretation, list[Fact]()
    as_read = _as_read(context, names)
    if as_read is not None and (by == "component" or _without_columns(context, as_read, key)):
        interpretation = as_read
        facts += interpretation.facts
    elif by == "copy" and _mixed(interpretation):
        # In a copy of the model for sample n, slice n of whatever the samples were mixed into is
        # sample n's own.
        interpretation = _interpreted(context, Policy(Mixed.BY_PLACE))
        facts += interpretation.facts
    plan = _planned(context, interpretation, key)
    if plan.spanning:
        origins = spread(context.graph, interpretation, plan)
        interpretation, more = _with_spanning_owned(context, interpretation, origins)
        facts += more
        plan = _planned(context, interpretation, key)
    if plan.refusal is not None:
        raise plan.refusal
    return plan, facts


def _interpreted(context: Context, policy: Policy) -> Interpretation:
    """Return another interpretation of the forward pass, by a policy."""
    return interpret(
        context.graph,
        context.samples,
        context.owners,
        context.graph.forward_steps,
        tuple(context.interpretation.assumed),
        policy=policy,
    )


def _planned(context: Context, interpretation: Interpretation, key: Key) -> BackwardPlan:
    names, by = key
    return plan_backward(context.graph, interpretation, context.samples, context.leading, names, by)


def _as_read(context: Context, names: tuple[str, ...]) -> Interpretation | None:
    """Return an interpretation in which mixed values count to the samples that read them.

    None where nothing is gained by it.
    """
    plan = _planned(context, context.interpretation, (names, "component"))
    if not plan.unsplit:
        return None
    counted = read_by(context.graph, context.interpretation, plan)
    if not counted:
        return None
    as_read = _interpreted(context, replace(context.interpretation.policy, read_by=counted))
    # What moves with the samples must not have become a constant on the way to the predictions.
    for i in plan.flowing:
        moves = context.interpretation.ownership[i].depends_on_batch
        if moves and not as_read.ownership[i].depends_on_batch:
            return None
    return as_read


def _without_columns(context: Context, as_read: Interpretation, key: Key) -> bool:
    """Tell whether it is proved at all sites which sample's own the entries are.

    What mixes the samples is below them then, and in the way of no decomposition.
    """
    names, _ = key
    return not _planned(context, as_read, (names, "component")).columns


def _with_spanning_owned(
    context: Context, interpretation: Interpretation, origins: Iterable[tuple[int, list[int]]]
) -> tuple[Interpretation, list[Fact]]:
    """Return an interpretation that counts some shared values to the samples, and its facts.

    ``origins``: values with an entry for every sample, and the axes along which the entries may
    lie. What a value holds for sample n is read by sample n alone exactly if no value is mixed then
    that was not mixed before; otherwise it stays shared.
    """
    mixed_before = _mixed(interpretation)
    best, facts = interpretation, list[Fact]()
    owned: dict[int, int] = {}
    for value, axes in origins:
        for axis in axes:
            policy = replace(interpretation.policy, counted={**owned, value: axis})
            trial = _interpreted(context, policy)
            if _mixed(trial) <= mixed_before:
                owned[value] = axis
                best = trial
                facts += trial.facts
                break
    return best, facts


def _mixed(interpretation: Interpretation) -> set[int]:
    """Return the values in which samples are mixed."""
    return {i for i, owners in interpretation.ownership.items() if owners.coupled}
