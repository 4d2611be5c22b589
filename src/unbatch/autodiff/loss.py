"""The loss with the predictions held apart from what they are made of: its value, and products of its derivatives."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from unbatch.autodiff.autograd import solid
from unbatch.autodiff.context import Context
from unbatch.capture.graph import Graph, Ref, Step, is_ref
from unbatch.capture.isolation import untouched
from unbatch.errors import (
    MSG_BACKWARD_INSIDE,
    MSG_NO_GRAPH,
    MSG_NO_SECOND_DERIVATIVE,
    StructureError,
)
from unbatch.linalg.precision import DIFFERENCES_IN_DOUBLE, DIFFERENCES_IN_SINGLE, NARROW, in_double
from unbatch.linalg.probes import gaussians_like, seeded

Named = Mapping[int, Tensor]  # tensors by the number of a value in the graph


@dataclass
class LossAt:
    """The loss as a function of the predictions, at a point.

    ``inner``: what else of the model the loss reads; ``outputs``: all that the model returned. ``replayed``: from the
    recording, although the loss could be called.
    """

    setting: Context
    predictions: Named
    inner: Named
    outputs: Named
    replayed: bool = False

    @cached_property
    def slope(self) -> dict[int, Tensor]:
        """``∂L/∂F``, for every prediction that the loss depends on."""
        return self._gradient(*self._value, create_graph=False)

    @property
    def _value(self) -> tuple[Tensor, dict[int, Tensor]]:
        return loss_value(self.setting, self.predictions, self.inner, self.outputs, self.replayed)

    @staticmethod
    def _gradient(value: Tensor, leaves: Named, create_graph: bool) -> dict[int, Tensor]:
        if not value.requires_grad or not leaves:
            return {}
        with torch.enable_grad():
            grads = torch.autograd.grad(
                value, list(leaves.values()), allow_unused=True, create_graph=create_graph
            )
        return {i: solid(g) for i, g in zip(leaves, grads, strict=True) if g is not None}

    @cached_property
    def _curved(self) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
        """The gradient, connected to the leaves in place of the predictions, and these."""
        value, leaves = self._value
        slope = self._gradient(value, leaves, create_graph=True)
        if names := own_derivatives(value):
            self._check_against_differences(slope, leaves, " and ".join(sorted(set(names))))
        return slope, leaves

    def _check_against_differences(self, slope: Named, leaves: Named, names: str) -> None:
        """A derivative that somebody wrote may carry no graph, and PyTorch then takes what it leaves out for zero."""
        double = all(t.dtype == torch.float64 for t in leaves.values())
        step, rtol, rounding = DIFFERENCES_IN_DOUBLE if double else DIFFERENCES_IN_SINGLE
        step *= max(1.0, _largest(leaves.values()))
        v = gaussians_like(leaves, seeded(0))
        told = _times(slope, leaves, v)
        ahead, behind = (
            self._slope_at({i: t.detach() + s * v[i] for i, t in leaves.items()})
            for s in (step, -step)
        )
        seen = {i: (ahead[i] - behind[i]) / (2 * step) for i in leaves}
        allowed = rtol * _largest([*told.values(), *seen.values()]) + rounding / step * _largest(
            slope.values()
        )
        if _largest(told[i] - seen[i] for i in leaves) > allowed:
            raise StructureError(
                MSG_NO_SECOND_DERIVATIVE.format(error=MSG_NO_GRAPH.format(names=names))
            )

    def _slope_at(self, moved: Named) -> dict[int, Tensor]:
        slope = replace(self, predictions={**self.predictions, **moved}).slope
        return {i: slope[i] if i in slope else torch.zeros_like(t) for i, t in moved.items()}

    def hessian_times(self, v: Named) -> dict[int, Tensor]:
        """``H v`` with ``H = ∇²_F L``, by double backward. Raises ``StructureError`` where that does not exist."""
        try:
            return _times(*self._curved, v)
        except StructureError:
            raise
        except NotImplementedError as error:
            raise StructureError(MSG_NO_SECOND_DERIVATIVE.format(error=error)) from error
        except RuntimeError as error:
            if "not implemented" not in str(error) and "twice" not in str(error):
                raise
            raise StructureError(MSG_NO_SECOND_DERIVATIVE.format(error=error)) from error

    @property
    def _narrowed(self) -> bool:
        """The loss casts what it is given."""
        graph = self.setting.graph
        made = [r.index for s in graph.loss_steps for r in s.outs if r is not None]
        return any(graph.values[i].dtype in NARROW for i in made)

    def in_double(self) -> LossAt | None:
        """The same in float64; None where the loss does not take it."""
        replayed = by_graph(self.setting, self.inner)
        if all(t.dtype == torch.float64 for t in self.predictions.values()) and not (
            replayed and self._narrowed
        ):
            return self
        if replayed:
            return self._as_double(replayed=True)
        called = self._as_double(replayed=False)
        if called is not None or own_derivatives(self._value[0]) or _backward_inside(self.setting):
            return called
        other = self._as_double(
            replayed=True
        )  # the loss has numbers of its own, in its own precision
        return other if other is not None and self._agrees(other.slope) else None

    def _as_double(self, replayed: bool) -> LossAt | None:
        setting = self.setting.in_double() if replayed else self.setting
        setting = replace(setting, targets=in_double(self.setting.targets))
        predictions, inner, outputs = (
            in_double(dict(t)) for t in (self.predictions, self.inner, self.outputs)
        )
        other = LossAt(setting, predictions, inner, outputs, replayed)
        try:
            return other if all(g.dtype == torch.float64 for g in other.slope.values()) else None
        except (RuntimeError, TypeError):
            return None

    def _agrees(self, slope: Named) -> bool:
        allowed = self.setting.rounding * _largest(self.slope.values())
        return slope.keys() == self.slope.keys() and all(
            _largest([slope[i] - g]) <= allowed for i, g in self.slope.items()
        )


def _times(slope: Named, leaves: Named, v: Named) -> dict[int, Tensor]:
    """The derivative of ``⟨slope, v⟩`` by the leaves, zero where nothing flows."""
    live = [i for i, g in slope.items() if g.requires_grad and i in v]
    found: Sequence[Tensor | None] = [None] * len(leaves)
    if live:
        ends, vectors = [slope[i] for i in live], [v[i] for i in live]
        found = torch.autograd.grad(
            ends, list(leaves.values()), vectors, retain_graph=True, allow_unused=True
        )
    pairs = zip(leaves.items(), found, strict=True)
    return {i: torch.zeros_like(leaf) if h is None else solid(h.detach()) for (i, leaf), h in pairs}


def _largest(tensors: Iterable[Tensor]) -> float:
    return max((float(t.detach().abs().max()) for t in tensors if t.numel()), default=0.0)


# Kernels that work out the gradient with the value: PyTorch takes it for a constant.
WITHOUT_GRAPH = ("CudnnCtcLossBackward", "MiopenCtcLossBackward")


def own_derivatives(value: Tensor) -> list[str]:
    """The functions on the way to a value whose derivative may have none itself: written in Python, or by a library."""
    seen, waiting, names = set[Any](), [value.grad_fn], list[str]()
    while waiting:
        node: Any = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        waiting += [before for before, _ in node.next_functions]
        name = type(node).__name__.rstrip("0123456789")
        if name in WITHOUT_GRAPH:
            names.append(name.removesuffix("Backward"))
        elif isinstance(node, torch.autograd.function.BackwardCFunction):
            names.append(
                type(node).__name__.removeprefix("GeneratedBackwardFor_").removesuffix("Backward")
            )
    return names


def loss_value(
    setting: Context, predictions: Named, inner: Named, outputs: Named, replayed: bool = False
) -> tuple[Tensor, dict[int, Tensor]]:
    """The loss at these predictions, connected to leaves in their place."""
    leaves = {
        i: t.detach().requires_grad_()
        for i, t in predictions.items()
        if t.is_floating_point() or t.is_complex()
    }
    graph = setting.graph
    with torch.enable_grad():
        if replayed or by_graph(setting, inner):
            assert graph.loss is not None
            constant = {i: t.detach() for i, t in inner.items()}
            feed = {**setting.constants, **setting.data, **constant, **predictions, **leaves}
            (value,) = graph.run(
                feed, [graph.loss.index], keep=noise(graph), steps=graph.loss_steps
            )
        else:
            copied = any(s.writes for s in graph.loss_steps)
            filled = {**outputs, **{i: t.clone() if copied else t for i, t in leaves.items()}}
            value = loss_of(setting, output_of(setting, filled))
    return value, leaves


def by_graph(setting: Context, inner: Mapping[int, Tensor]) -> bool:
    """The loss has to be replayed, because it cannot be called with predictions alone, or draws noise.

    Raises ``StructureError`` where that would not give its derivatives: a backward pass, once recorded, takes for
    constants what it was handed by the forward pass. (Of a model with its own loss, the whole recording is tested.)
    """
    steps = setting.graph.loss_steps
    replayed = setting.own_loss or bool(inner) or any(s.noise for s in steps)
    inside = _backward_inside(setting)
    if replayed and inside is not None and not setting.own_loss:
        raise StructureError(MSG_BACKWARD_INSIDE.format(op=inside.name, where=inside.where))
    return replayed


def _backward_inside(setting: Context) -> Step | None:
    return next((s for s in setting.graph.loss_steps if "_backward" in s.name), None)


def output_of(setting: Context, values: Mapping[int, Tensor]) -> Any:
    """The output of the model with these tensors in it."""
    return tree_map(
        lambda r: values[r.index] if isinstance(r, Ref) else r, setting.skeleton, is_leaf=is_ref
    )


def loss_of(setting: Context, output: Any) -> Tensor:
    loss = setting.program.loss
    modules = [m for m in (loss,) if isinstance(m, torch.nn.Module)]
    harmless = not modules and not any(s.noise or s.writes for s in setting.graph.loss_steps)
    with nullcontext() if harmless else untouched(modules), torch.enable_grad():
        value = setting.program.evaluate(output, setting.targets)
    assert isinstance(value, Tensor)
    return value


def noise(graph: Graph) -> dict[int, Tensor]:
    """What was drawn in the loss when it was recorded."""
    refs = [r for s in graph.loss_steps if s.noise for r in s.outs if r is not None]
    return {r.index: v for r in refs if (v := graph.known(r.index)) is not None}


def rest_of_loss(
    setting: Context, outputs: Named, parameters: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The gradient of the loss with all outputs of the model held constant, by the parameters that it reads itself."""
    copied = any(s.writes for s in setting.graph.loss_steps)
    fixed = {i: t.detach().clone() if copied else t.detach() for i, t in outputs.items()}
    return nonzero_gradients(loss_of(setting, output_of(setting, fixed)), parameters)


def nonzero_gradients(value: Tensor, leaves: Mapping[str, Tensor]) -> dict[str, Tensor]:
    if not value.requires_grad:
        return {}
    grads = torch.autograd.grad(value, list(leaves.values()), allow_unused=True)
    return {
        n: g for n, g in zip(leaves, grads, strict=True) if g is not None and bool((g != 0).any())
    }
