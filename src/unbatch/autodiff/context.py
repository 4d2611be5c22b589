"""The problem as the engine sees it: what was recorded, what was found, the data, and the plans kept for them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from unbatch.analysis.domain.ownership import Ownership
from unbatch.analysis.domain.sample_layout import prediction_dim
from unbatch.analysis.interpreter import Interpretation, interpret
from unbatch.analysis.number_facts import Fact
from unbatch.analysis.policy import Mixed, Policy
from unbatch.autodiff.planner import BackwardPlan, plan_backward, spread
from unbatch.autodiff.schedule import Operands, Schedule
from unbatch.capture.graph import Graph
from unbatch.capture.program import Program
from unbatch.linalg.precision import BACKWARD, in_double, tolerance


def _mixed(walk_: Interpretation) -> set[int]:
    return {i for i, m in walk_.marks.items() if m.coupled}


@dataclass
class Context:
    """A recording with its walk and its data. ``faithful``: the recording has the derivatives of the model."""

    program: Program
    graph: Graph
    walk: Interpretation
    given: Mapping[int, Ownership]
    samples: int
    leading: bool
    inputs: Any
    targets: Any
    skeleton: Any  # what the model returned, with references in place of tensors
    faithful: bool
    split: bool
    routes: dict[Any, Schedule] = field(default_factory=dict)
    trust: dict[Any, bool] = field(default_factory=dict)  # whether a plan passed its self-check
    forward_modes: dict[Any, bool] = field(
        default_factory=dict
    )  # whether tangents go through all steps at once
    last_form: Any = None  # of the second derivative of the loss: the guess that is tried first
    facts: list[Fact] = field(default_factory=list)  # on which plans rely, beside those of the walk
    buffer: Tensor | None = None

    def route(self, parameters: Mapping[str, Tensor], by: str) -> Schedule:
        """The plan of a sweep, kept for the next question."""
        names = list(parameters)
        key = (tuple(names), by)
        if key not in self.routes:
            seen = self.walk
            if by == "copy" and _mixed(seen):
                steps, by_place = self.graph.forward_steps, Policy(Mixed.BY_PLACE)
                seen = interpret(self.graph, self.samples, self.given, steps, policy=by_place)
                self.facts += seen.facts
            plan = plan_backward(self.graph, seen, self.samples, self.leading, names, by)
            if plan.spanning:
                plan = plan_backward(
                    self.graph, self._spread(plan, seen), self.samples, self.leading, names, by
                )
            if plan.refused is not None:
                raise plan.refused
            plan.by_place = seen.by_place
            operands = Operands(
                self.graph, plan, {n: tuple(p.shape) for n, p in parameters.items()}
            )
            self.routes[key] = Schedule(self.graph, plan, operands)
        return self.routes[key]

    def _spread(self, plan: BackwardPlan, seen: Interpretation) -> Interpretation:
        """The walk with shared values that have an entry for every sample counted to the samples, where that fits.

        What such a value holds for sample n is used by sample n only if no new place of mixing comes up.
        """
        chosen: dict[int, int] = {}
        best = seen
        for value, axes in spread(self.graph, seen, plan):
            for axis in axes:
                policy = replace(seen.policy, counted=chosen | {value: axis})
                steps = self.graph.forward_steps
                trial = interpret(
                    self.graph,
                    self.samples,
                    self.given,
                    steps,
                    policy=policy,
                )
                if _mixed(trial) <= _mixed(seen):
                    chosen[value] = axis
                    self.facts += trial.facts
                    best = trial
                    break
        return best

    @cached_property
    def axes(self) -> dict[int, int]:
        """Prediction -> the axis along which its samples lie."""
        found = {
            r.index: prediction_dim(self.walk[r], self.samples, self.leading)
            for r in self.graph.used_predictions
        }
        return {i: d for i, d in found.items() if d is not None}

    def scratch(self, shape: Sequence[int], like: Tensor) -> Tensor:
        """Memory for rows that nobody keeps, the same at every question: fresh memory costs more than what fills it."""
        size = math.prod(shape) * like.element_size()
        if self.buffer is None or self.buffer.numel() < size or self.buffer.device != like.device:
            self.buffer = torch.empty(size, dtype=torch.uint8, device=like.device)
        return self.buffer[:size].view(like.dtype).view(*shape)

    def in_double(self) -> Context:
        """The same plans on the same numbers in float64."""
        graph, inputs = self.graph.in_double(), in_double(self.inputs)
        routes = {key: Schedule(graph, r.flow, r.operands) for key, r in self.routes.items()}
        other = replace(
            self, graph=graph, inputs=inputs, routes=routes, trust={}, forward_modes={}, buffer=None
        )
        other.__dict__["axes"] = self.axes
        return other

    @cached_property
    def rounding(self) -> float:
        """By the coarsest floating-point type on the way."""
        kinds = {
            self.graph.values[r.index].dtype
            for s in self.graph.forward_steps
            for r in s.outs
            if r is not None
        }
        return tolerance(kinds, BACKWARD)

    @property
    def values_in_double(self) -> int:
        """Bytes of all that the forward pass computes, in float64."""
        made = [
            self.graph.values[r.index]
            for s in self.graph.forward_steps
            for r in s.outs
            if r is not None
        ]
        return sum(8 * math.prod(v.shape) for v in made if v.dtype.is_floating_point)

    @property
    def constants(self) -> dict[int, Tensor]:
        """Parameters by their number in the graph, connected to nothing."""
        named = [(i, v.name) for i, v in enumerate(self.graph.values) if v.kind == "parameters"]
        return {i: self.program.parameters[name].detach() for i, name in named}

    def numbers(self, wanted: Sequence[int]) -> dict[int, Tensor]:
        """Values of the forward pass, by their number in the graph."""
        with torch.no_grad():
            found = self.graph.run(
                self.data | self.constants, wanted, steps=self.graph.forward_steps
            )
        return dict(zip(wanted, found, strict=True))

    @property
    def own_loss(self) -> bool:
        return self.program.loss is None

    @property
    def data(self) -> dict[int, Tensor]:
        """Inputs and targets by their number in the graph."""
        pairs = [(self.graph.inputs, self.inputs), (self.graph.targets, self.targets)]
        return {
            r.index: x
            for refs, tree in pairs
            for r, x in zip(refs, tree_leaves(tree), strict=True)
            if r is not None
        }
