"""One replay of the recorded forward pass, which keeps what the contractions will read.

Lives here: what runs in place of the recorded steps, as a ``Schedule`` says. Values of samples are
connected to autograd by way of an anchor and of the seeds, not by way of the parameters: their
derivatives are contracted at the sites. Only operands, which no sample has a part in, are connected
to the parameters. The backward passes are in ``vjp.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.utils._pytree import tree_leaves, tree_map

from unbatch.analysis.domain.sample_layout import Layout
from unbatch.autodiff.autograd import Gate, attached, detached, leaves_of, subset
from unbatch.autodiff.contractions.batch_norm import PooledRows
from unbatch.autodiff.contractions.contraction import Contraction, OperandUse
from unbatch.autodiff.contractions.registry import contraction_for, projected
from unbatch.autodiff.planner import Site
from unbatch.autodiff.schedule import Hook, Schedule
from unbatch.capture.graph import Graph
from unbatch.capture.steps import Ref, Step
from unbatch.capture.substitutes import held
from unbatch.capture.trees import flat

# What takes the cotangents of a step's outputs. Autograd's graph holds the hooks that call it, and
# would keep alive what holds the graph: so it is held by a weak reference, which this is.
GradientReady = Callable[[], Callable[[Hook, Sequence[Tensor | None]], None] | None]


@dataclass
class ForwardPass:
    """The forward pass of one question, after ``run``."""

    schedule: Schedule
    graph: Graph
    parameters: Mapping[str, Tensor]
    feed: Mapping[int, Tensor]
    gradient_ready: GradientReady
    predictions: dict[int, Tensor] = field(default_factory=dict)
    outputs: dict[int, Tensor] = field(default_factory=dict)  # all that the model returns, detached
    inner: dict[int, Tensor] = field(default_factory=dict)  # what else the loss reads, detached
    edges: dict[int, GradientEdge] = field(default_factory=dict)  # of the values that are watched
    contractions: dict[Site, Contraction] = field(default_factory=dict)
    # Steps whose cotangents no hook hands over, and the edges of their outputs by position.
    without_hook: list[tuple[Hook, dict[int, GradientEdge]]] = field(default_factory=list)
    # Sites below a batch norm that has not run yet, whose closed form they use.
    _below_norm: dict[Site, OperandUse] = field(default_factory=dict)

    @cached_property
    def leaves(self) -> dict[str, Tensor]:
        """The parameters as they are differentiated by."""
        return leaves_of(self.parameters)

    @cached_property
    def operands(self) -> dict[int, Tensor]:
        """Parameters, and what is made of them without samples, connected to the leaves."""
        return self.schedule.plan.by_number(self.leaves)

    @cached_property
    def anchor(self) -> Tensor:
        """The leaf of all values of samples, so that autograd gives them cotangents."""
        return torch.zeros((), requires_grad=True)

    def run(self) -> None:
        """Run the model."""
        schedule, graph = self.schedule, self.graph
        constants = detached(schedule.plan.by_number(self.parameters))
        # A graph with other numbers shares the steps of the one that the schedule was made for.
        steps = schedule.steps
        if graph.steps is not schedule.graph.steps:
            steps = graph.forward_steps
        with torch.enable_grad():
            tensors = graph.run(
                {**self.feed, **constants},
                schedule.read_afterwards,
                visit=self._keep_edge,
                instead=self._substitutes(),
                steps=steps,
            )
        values = dict(zip(schedule.read_afterwards, tensors, strict=True))
        self.predictions = subset(values, schedule.plan.predictions)
        self.inner = detached(subset(values, schedule.inner))
        for ref in graph.predictions:
            self.outputs[ref.index] = values[ref.index].detach()

    def _keep_edge(self, i: int, value: Tensor) -> None:
        """Keep the place of a value in the autograd graph, if it is watched."""
        if i in self.schedule.watched and i not in self.edges and value.requires_grad:
            self.edges[i] = get_gradient_edge(value)

    def _substitutes(self) -> dict[int, Callable[..., Any]]:
        """Return what runs in place of a step, by step; later ones take precedence."""
        schedule = self.schedule
        instead: dict[int, Callable[..., Any]] = {}
        for step in schedule.cut_off:
            instead[step.index] = held(step.op)
        for number, hook in schedule.hooks.items():
            instead[number] = partial(self._run_hook, hook)
        for number, moving in schedule.chain.items():
            instead[number] = partial(self._run_on_parameters, self.graph.steps[number], moving)
        return instead

    # -- from parameters to operands --

    def _run_on_parameters(self, step: Step, moving: bool, *args: Any, **kwargs: Any) -> Any:
        """Run a step without samples on the parameters, for the operand, and return its result.

        In the replay the result is a constant, unless statistics in it move with the parameters.
        """
        connected_args = _map_with_refs(self._operand, step.args, args)
        connected_kwargs = _map_with_refs(self._operand, step.kwargs, kwargs)
        result = step.op(*connected_args, **connected_kwargs)
        for ref, value in zip(step.outs, flat(result), strict=False):
            if ref is not None and isinstance(value, Tensor):
                self.operands[ref.index] = value
        # Statistics that move have a path of their own through the replay; anything else is the
        # same, detached.
        if moving:
            return step.op(*args, **kwargs)
        return tree_map(_detached, result)

    def _operand(self, ref: Any, value: Any) -> Any:
        """Return an argument as it is made of the parameters, or else as a constant."""
        if not isinstance(ref, Ref):
            return value
        if ref.index in self.operands:
            return self.operands[ref.index]
        return value.detach()

    # -- steps with sites, seeds or gates --

    def _run_hook(self, hook: Hook, *args: Any, **kwargs: Any) -> Any:
        """Run a step with what the schedule has for it, and return what the step returns.

        In this order: connect its inputs, keep them, run it, give its result a gradient, prepare
        the contractions, and have the cotangent of the result handed over.
        """
        step = hook.step
        written = None
        if hook.in_place is not None:
            written = args[0]
        if hook.by_autograd or hook.gated:
            connect = partial(self._connect, hook)
            args = _map_with_refs(connect, step.args, args)
            kwargs = _map_with_refs(connect, step.kwargs, kwargs)
        arguments: dict[str, Any] = {}
        if hook.keeps_arguments:
            arguments = self._kept_arguments(hook, args, kwargs)
        # The hooks below are for the result alone; the tensor that is written to has a history
        # before it.
        if written is not None:
            args = (args[0].clone(), *args[1:])
        result = hook.run(*args, **kwargs)
        outs = flat(result)
        # The first value that samples and parameters make together depends on no leaf.
        if hook.uses and not outs[0].requires_grad:
            outs[0] = attached(outs[0], self.anchor)
            is_several = isinstance(result, tuple | list)
            result = tuple(outs) if is_several else outs[0]
        if hook.keeps_arguments:
            self._prepare_contractions(hook, arguments, outs)
            self._register_gradient_hooks(hook, outs)
        if written is None or hook.in_place is None:
            return result
        self._keep_edge(hook.in_place, outs[0])
        return written.copy_(outs[0])

    def _connect(self, hook: Hook, ref: Any, value: Any) -> Any:
        """Return an argument connected to the parameters, or behind a gate.

        Columns go on to the parameters there, or stop.
        """
        if not isinstance(ref, Ref):
            return value
        if ref.index in hook.by_autograd:
            value = self.operands[ref.index]
        if ref.index in hook.gated:
            value = Gate.apply(value)
        return value

    def _kept_arguments(self, hook: Hook, args: Any, kwargs: Any) -> dict[str, Any]:
        """Return the arguments by name, detached.

        Those whose memory is written to from here on are copied.
        """
        step = hook.step
        named = dict(zip(step.parameters, args, strict=False)) | kwargs
        arguments: dict[str, Any] = {}
        if step.plain and not hook.overwritten:
            for name, value in named.items():
                arguments[name] = value
                if isinstance(value, Tensor) and value.requires_grad:
                    arguments[name] = value.detach()
            return arguments
        # One tensor for each value: contractions find their operand among the arguments by
        # identity.
        by_value: dict[int, Tensor] = {}

        def keep(ref: Any, value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            if not isinstance(ref, Ref):
                return value.detach()
            if ref.index not in by_value:
                by_value[ref.index] = value.detach()
                if ref.index in hook.overwritten:
                    by_value[ref.index] = value.detach().clone()
            return by_value[ref.index]

        for name, value in named.items():
            arguments[name] = _map_with_refs(keep, step.named.get(name), value)
        return arguments

    def _prepare_contractions(self, hook: Hook, arguments: dict[str, Any], outs: list[Any]) -> None:
        """Keep what the contractions need of the step that just ran, and no more."""
        outputs = tuple(o.detach() for o in outs if isinstance(o, Tensor))
        for use in hook.uses:
            site = use.site
            operand = arguments[site.name]
            if not isinstance(operand, Tensor):
                operand = tree_leaves(operand)[use.at]
            call = OperandUse(hook.step, arguments, outputs, operand, site.name, use.layouts)
            if site.way == "projected":
                self._below_norm[site] = call
                continue
            if site in self.schedule.pooled_sites:
                self.contractions[site] = PooledRows(call)
            else:
                self.contractions[site] = contraction_for(call)
            call.outputs = ()  # read while a contraction is chosen, and not later
        if hook.projecting:
            self._prepare_projected(hook, arguments, outputs)

    def _prepare_projected(
        self, hook: Hook, arguments: dict[str, Any], outputs: tuple[Tensor, ...]
    ) -> None:
        """Contract the sites below a batch norm by its closed form."""
        layout = Layout(0, self.schedule.plan.samples)
        norm = OperandUse(hook.step, arguments, outputs, outputs[0], "", (layout,))
        for site in list(self._below_norm):
            if site.step in hook.projecting:
                call = self._below_norm.pop(site)
                self.contractions[site] = projected(call, norm)
                call.outputs = ()

    def _register_gradient_hooks(self, hook: Hook, outs: Sequence[Any]) -> None:
        """Have the cotangents of a step's outputs handed over in the backward pass.

        None is asked for if no site waits for it.
        """
        if not self.schedule.contracted[hook.step.index]:
            return
        moving = [isinstance(out, Tensor) and out.requires_grad for out in outs]
        if moving[0] and moving.count(True) == 1:
            # This hook fires as soon as the cotangent is there: what is contracted is freed then.
            outs[0].register_hook(partial(_hand_over, self.gradient_ready, hook))
        elif any(moving):
            # Of several outputs, autograd hands out the cotangents together at the end of the pass.
            edges: dict[int, GradientEdge] = {}
            for k, out in enumerate(outs):
                if moving[k]:
                    edges[k] = get_gradient_edge(out)
            self.without_hook.append((hook, edges))


def _hand_over(gradient_ready: GradientReady, hook: Hook, cotangent: Tensor) -> None:
    """Call what takes the cotangents, from a hook of autograd."""
    receive = gradient_ready()
    assert receive is not None  # it holds the graph that runs this
    receive(hook, [cotangent])


def _detached(t: Any) -> Any:
    if isinstance(t, Tensor):
        return t.detach()
    return t


def _map_with_refs(function: Callable[[Any, Any], Any], refs: Any, values: Any) -> Any:
    """Map over arguments, each beside the reference that it came from."""
    if isinstance(refs, tuple | list):
        pairs = zip(refs, values, strict=True)
        return type(refs)(_map_with_refs(function, ref, value) for ref, value in pairs)
    if isinstance(refs, dict):
        return {key: _map_with_refs(function, ref, values[key]) for key, ref in refs.items()}
    return function(refs, values)
