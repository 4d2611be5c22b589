"""The loss as a function of the predictions, cut off from what they are made of.

Lives here: how the loss is evaluated (called, or replayed from the recording), its gradient, and
its Hessian times a vector. The form of that Hessian is for the wing of the curvature.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from unbatch.autodiff.autograd import detached, or_zeros, pick, solid
from unbatch.autodiff.context import Context
from unbatch.capture.after_run import AfterRun, lasting
from unbatch.capture.graph import Graph
from unbatch.capture.own_nodes import own_derivatives, own_nodes
from unbatch.capture.steps import Ref, Step, is_ref
from unbatch.capture.trees import copied
from unbatch.errors import (
    MSG_BACKWARD_INSIDE,
    MSG_NO_GRAPH,
    MSG_NO_SECOND_DERIVATIVE,
    StructureError,
)
from unbatch.linalg.precision import (
    DIFFERENCES_IN_DOUBLE,
    DIFFERENCES_IN_SINGLE,
    NARROW,
    in_double,
    largest,
)
from unbatch.linalg.probes import gaussians_like, seeded

Named = Mapping[int, Tensor]  # tensors by the number of a value in the graph


@dataclass
class LossAt:
    """The loss as a function of the outputs that it reads, at a point.

    ``predictions``: these, with an axis of samples or without. ``inner``: what else of the model
    the loss reads; ``outputs``: all that the model returned.
    ``replayed``: from the recording, although the loss could be called.
    """

    context: Context
    predictions: Named
    inner: Named
    outputs: Named
    replayed: bool = False
    # What the run has left that can be differentiated twice.
    _after: AfterRun = field(default_factory=AfterRun, init=False, repr=False, compare=False)

    # -- first derivative --

    @cached_property
    def slope(self) -> dict[int, Tensor]:
        """``∂L/∂F``, for every output that the loss depends on."""
        after = AfterRun()
        value, leaves = self._value(after)
        with self._differentiated([value], after):
            return _gradient(value, leaves, create_graph=False)

    @property
    def slope_of_samples(self) -> dict[int, Tensor]:
        """The part of the slope that can be divided into those of samples."""
        return {i: g for i, g in self.slope.items() if i in self.context.axes}

    @property
    def slope_of_joined(self) -> dict[int, Tensor]:
        """The part by outputs without an axis of samples, which rows leave to the rest."""
        return {i: g for i, g in self.slope.items() if i in self.context.outputs.joined}

    def _value(self, after: AfterRun | None = None) -> tuple[Tensor, dict[int, Tensor]]:
        return loss_value(
            self.context, self.predictions, self.inner, self.outputs, self.replayed, after
        )

    def _differentiated(
        self, values: Iterable[Tensor], after: AfterRun
    ) -> AbstractContextManager[object]:
        """Return a context for a backward pass through the loss: as one right after its run.

        Nothing, where all of it is PyTorch's: the guard costs more than most losses.
        """
        if self.context.graph.hooks_loss or own_nodes(values):
            return self.context.program.untouched(after=after)
        return nullcontext()

    # -- second derivative --

    def hessian_times(self, v: Named) -> dict[int, Tensor]:
        """Return ``H v`` with ``H = ∇²_F L``, by double backward.

        Raises ``StructureError`` where that does not exist.
        """
        try:
            slope, leaves = self._differentiable_slope
            with self._differentiated(slope.values(), self._after):
                return _derivative_along(slope, leaves, v)
        except StructureError:
            raise
        except NotImplementedError as error:
            raise StructureError(MSG_NO_SECOND_DERIVATIVE.format(error=error)) from error
        except RuntimeError as error:
            # PyTorch has no type of error for a function that is not differentiable twice.
            if "not implemented" not in str(error) and "twice" not in str(error):
                raise
            raise StructureError(MSG_NO_SECOND_DERIVATIVE.format(error=error)) from error

    @cached_property
    def _differentiable_slope(self) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
        """The gradient, connected to the leaves in place of the predictions, and these."""
        value, leaves = self._value(self._after)
        with self._differentiated([value], self._after):
            slope = _gradient(value, leaves, create_graph=True)
        names = own_derivatives(value)
        if names:
            self._check_against_differences(slope, leaves, " and ".join(sorted(set(names))))
        return slope, leaves

    def _check_against_differences(self, slope: Named, leaves: Named, names: str) -> None:
        """Raise where a hand-written derivative is not the one of the loss.

        It may carry no graph, and PyTorch then takes what it leaves out for zero. Central
        differences of the gradient ``g`` say what ``H v`` should be: ``(g(F + hv) − g(F − hv)) /
        2h``.
        """
        precision = DIFFERENCES_IN_SINGLE
        if _all_double(leaves.values()):
            precision = DIFFERENCES_IN_DOUBLE
        step, relative, rounding = precision
        # Where the gradient itself is not finite, there is nothing to compare.
        finite = _finite_entries(slope, leaves)
        step *= max(1.0, largest(_entries(leaves, finite).values()))
        # One random direction: a product that is wrong is wrong along almost all of them.
        v = gaussians_like(leaves, seeded(0))
        product = _derivative_along(slope, leaves, v)
        ahead, behind = self._slope_at(leaves, v, step), self._slope_at(leaves, v, -step)
        difference = {i: (ahead[i] - behind[i]) / (2 * step) for i in leaves}
        product, difference = _entries(product, finite), _entries(difference, finite)
        # A difference loses digits to its step, in proportion to the gradient that it is taken of.
        allowed = relative * largest([*product.values(), *difference.values()])
        allowed += rounding / step * largest(_entries(slope, finite).values())
        if not largest(product[i] - difference[i] for i in leaves) <= allowed:
            reason = MSG_NO_GRAPH.format(names=names)
            raise StructureError(MSG_NO_SECOND_DERIVATIVE.format(error=reason))

    def _slope_at(self, leaves: Named, v: Named, step: float) -> dict[int, Tensor]:
        """Return the gradient at the predictions moved by ``step`` in the direction ``v``."""
        moved = {i: t.detach() + step * v[i] for i, t in leaves.items()}
        slope = replace(self, predictions={**self.predictions, **moved}).slope
        return dict(zip(moved, or_zeros(map(slope.get, moved), moved.values()), strict=True))

    def is_as_replayed(self) -> bool:
        """Return whether a replay has these derivatives, first and second.

        Not so where some were written by hand. Raises as ``hessian_times`` does.
        """
        if by_graph(self.context, self.inner):
            return True
        other = replace(self, replayed=True)
        if not other._agrees(self.slope):
            return False
        # One random direction: a product that is wrong is wrong along almost all of them.
        v = gaussians_like(self._differentiable_slope[1], seeded(0))
        product, replayed = self.hessian_times(v), other.hessian_times(v)
        allowed = self.context.rounding * largest(product.values())
        return largest(replayed[i] - product[i] for i in product) <= allowed

    # -- in float64 --

    def in_double(self) -> LossAt | None:
        """Return the same in float64; None where the loss does not take it."""
        replayed = by_graph(self.context, self.inner)
        casts = replayed and self._casts_to_narrow_types()
        if _all_double(self.predictions.values()) and not casts:
            return self
        if replayed:
            return self._as_double(replayed=True)
        called = self._as_double(replayed=False)
        if called is not None:
            return called
        # The loss may hold numbers of its own in another precision. Replayed, they are in float64
        # as well; but a recording has not the derivatives that were written by hand, or taken
        # inside the loss.
        if own_derivatives(self._value()[0]) or _backward_inside(self.context):
            return None
        other = self._as_double(replayed=True)
        if other is None or not self._agrees(other.slope):
            return None
        return other

    def _casts_to_narrow_types(self) -> bool:
        """Tell whether the recorded loss computes in less than float64."""
        graph = self.context.graph
        for step in graph.loss_steps:
            for ref in step.outs:
                if ref is not None and graph.values[ref.index].dtype in NARROW:
                    return True
        return False

    def _as_double(self, replayed: bool) -> LossAt | None:
        """Return the loss with all that goes into it in float64.

        None if it does not take that, or its gradient is in another type all the same.
        """
        context = self.context
        if replayed:
            context = context.in_double()
        other = LossAt(
            replace(context, targets=in_double(self.context.targets)),
            in_double(dict(self.predictions)),
            in_double(dict(self.inner)),
            in_double(dict(self.outputs)),
            replayed,
        )
        try:
            slope = other.slope
        except (RuntimeError, TypeError):
            return None
        if not _all_double(slope.values()):
            return None
        return other

    def _agrees(self, slope: Named) -> bool:
        """Tell whether a gradient is this one, up to rounding."""
        if slope.keys() != self.slope.keys():
            return False
        allowed = self.context.rounding * largest(self.slope.values())
        return all(largest([slope[i] - g]) <= allowed for i, g in self.slope.items())


# --- derivatives of a value -----------------------------------------------------------------------


def _gradient(value: Tensor, leaves: Named, create_graph: bool) -> dict[int, Tensor]:
    """Return the gradient by the leaves that the value depends on."""
    if not value.requires_grad or not leaves:
        return {}
    with torch.enable_grad():
        grads = torch.autograd.grad(
            value, list(leaves.values()), allow_unused=True, create_graph=create_graph
        )
    return {i: solid(g) for i, g in zip(leaves, grads, strict=True) if g is not None}


def _derivative_along(slope: Named, leaves: Named, v: Named) -> dict[int, Tensor]:
    """Return the derivative of ``⟨slope, v⟩`` by the leaves, zero for those without effect."""
    live = [i for i, g in slope.items() if g.requires_grad and i in v]
    grads: Sequence[Tensor | None] = [None] * len(leaves)
    if live:
        ends, vectors = pick(slope, live), pick(v, live)
        grads = torch.autograd.grad(
            ends, list(leaves.values()), vectors, retain_graph=True, allow_unused=True
        )
    # A loss that is linear in a prediction has no second derivative by it.
    product = or_zeros(grads, detached(leaves).values())
    return detached(dict(zip(leaves, product, strict=True)))


def nonzero_gradients(
    value: Tensor, leaves: Mapping[str, Tensor], retain: bool = False
) -> dict[str, Tensor]:
    """Return the gradient of a value by name, without what is zero.

    ``retain``: another backward pass will follow.
    """
    if not value.requires_grad:
        return {}
    wanted = list(leaves.values())
    grads = torch.autograd.grad(value, wanted, retain_graph=retain, allow_unused=True)
    by_name = zip(leaves, grads, strict=True)
    return without_zeros({n: g for n, g in by_name if g is not None})


def without_zeros(named: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors that have an entry other than zero, or not a number."""
    return {name: t for name, t in named.items() if bool((t != 0).any())}


def _finite_entries(slope: Named, leaves: Named) -> dict[int, Tensor]:
    """Return which entries of a gradient are finite; a leaf without a gradient has a zero one."""
    finite: dict[int, Tensor] = {}
    for i, leaf in leaves.items():
        finite[i] = slope.get(i, leaf).detach().isfinite()
    return finite


def _entries(tensors: Named, which: Named) -> dict[int, Tensor]:
    """Return some entries of each tensor, in one dimension."""
    return {i: t.detach()[which[i]] for i, t in tensors.items()}


def _all_double(tensors: Iterable[Tensor]) -> bool:
    return all(t.dtype == torch.float64 for t in tensors)


# --- evaluating the loss --------------------------------------------------------------------------


def loss_value(
    context: Context,
    predictions: Named,
    inner: Named,
    outputs: Named,
    replayed: bool = False,
    after: AfterRun | None = None,
) -> tuple[Tensor, dict[int, Tensor]]:
    """Return the loss at these predictions, and the leaves in their place that it depends on.

    ``after``: notes what a run of the loss leaves.
    """
    leaves: dict[int, Tensor] = {}
    for i, t in predictions.items():
        if t.is_floating_point() or t.is_complex():
            leaves[i] = t.detach().requires_grad_()
    # The caller may be in ``no_grad``; the loss as a function of the leaves is not.
    with torch.enable_grad():
        if replayed or by_graph(context, inner):
            return _replayed(context, {**predictions, **leaves}, inner), leaves
        # What the loss writes to is not a leaf.
        ends = leaves
        if _loss_writes(context):
            ends = _cloned(leaves)
        return loss_of(context, output_of(context, {**outputs, **ends}), after), leaves


def _replayed(context: Context, predictions: Named, inner: Named) -> Tensor:
    """Return the loss from its recorded steps, with the noise that was drawn then."""
    graph = context.graph
    assert graph.loss is not None
    feed = {**context.constants, **context.data, **detached(inner), **predictions}
    (value,) = graph.run(feed, [graph.loss.index], keep=noise(graph), steps=graph.loss_steps)
    return value


def by_graph(context: Context, inner: Mapping[int, Tensor]) -> bool:
    """Tell whether the loss has to be replayed, as it cannot be called with predictions alone.

    It reads something else of the model, or draws noise. Raises ``StructureError`` where a replay
    would not give its derivatives: a backward pass, once recorded, takes for constants what it was
    handed by the forward pass. (Of a model with its own loss, the whole recording is tested.)
    """
    replayed = context.own_loss or context.alone or bool(inner) or _loss_draws(context)
    inside = _backward_inside(context)
    if replayed and inside is not None and not context.own_loss:
        raise StructureError(MSG_BACKWARD_INSIDE.format(op=inside.name, where=inside.where))
    return replayed


def _backward_inside(context: Context) -> Step | None:
    """Return the first step of the loss that is a derivative, None if it takes none."""
    for step in context.graph.loss_steps:
        if "_backward" in step.name:
            return step
    return None


def output_of(context: Context, values: Mapping[int, Tensor]) -> Any:
    """Return the output of the model with these tensors in it."""

    def filled(leaf: Any) -> Any:
        if isinstance(leaf, Ref):
            return values[leaf.index]
        return leaf

    return tree_map(filled, context.skeleton, is_leaf=is_ref)


def loss_of(context: Context, output: Any, after: AfterRun | None = None) -> Tensor:
    """Return the loss of an output, with everything else left as it is."""
    targets, writes = context.targets, _loss_writes(context)
    with _protected(context, after), torch.enable_grad():
        if writes:
            targets = tree_map(copied, targets)  # what it writes has to last for the derivatives
        with lasting() if writes else nullcontext():
            value = context.program.evaluate(output, targets)
    assert isinstance(value, Tensor)
    return value


def _protected(context: Context, after: AfterRun | None) -> AbstractContextManager[object]:
    """Return what keeps a loss from changing itself and random states.

    Nothing, where it can change neither: the guard costs more than most losses.
    """
    # To note what is left takes time, and no backward pass of a library's reads it.
    if context.program.loss_is_of_library:
        after = None
    is_module = isinstance(context.program.loss, torch.nn.Module)
    if is_module or _loss_draws(context) or _loss_writes(context):
        return context.program.untouched(after=after)
    if context.program.reachable.leaves_traces:
        return context.program.untouched(after=after)
    return nullcontext()


def _loss_writes(context: Context) -> bool:
    return context.graph.loss_writes


def _loss_draws(context: Context) -> bool:
    return any(step.noise for step in context.graph.loss_steps)


def _cloned(tensors: Named) -> dict[int, Tensor]:
    return {i: t.clone() for i, t in tensors.items()}


def noise(graph: Graph) -> dict[int, Tensor]:
    """Return what was drawn in the loss when it was recorded."""
    drawn: dict[int, Tensor] = {}
    for step in graph.loss_steps:
        if not step.noise:
            continue
        for ref in step.outs:
            if ref is None:
                continue
            value = graph.known(ref.index)
            if value is not None:
                drawn[ref.index] = value
    return drawn


def rest_of_loss(
    context: Context, outputs: Named, parameters: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Return the gradient that bypasses the predictions: by parameters that the loss reads itself.

    All outputs of the model are held constant.
    """
    fixed = detached(outputs)
    if _loss_writes(context):
        fixed = _cloned(fixed)
    value = loss_of(context, output_of(context, fixed))
    return nonzero_gradients(value, parameters, context.graph.has_history)
