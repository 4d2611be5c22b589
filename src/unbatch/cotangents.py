"""The loss with the predictions held apart from what they are made of: its value, and products of its derivatives."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from unbatch.derivatives import solid
from unbatch.errors import MSG_NO_SECOND_DERIVATIVE, StructureError
from unbatch.graph import Graph, Ref, is_ref, widest
from unbatch.purity import untouched
from unbatch.setting import Setting

Named = Mapping[int, Tensor]  # tensors by the number of a value in the graph


@dataclass
class LossAt:
    """The loss as a function of the predictions, at a point.

    ``inner``: what else of the model the loss reads; ``outputs``: all that the model returned.
    """

    setting: Setting
    predictions: Named
    inner: Named
    outputs: Named

    @cached_property
    def slope(self) -> dict[int, Tensor]:
        """``∂L/∂F``, for every prediction that the loss depends on."""
        return self._gradient(*self._value, create_graph=False)

    @property
    def _value(self) -> tuple[Tensor, dict[int, Tensor]]:
        return loss_value(self.setting, self.predictions, self.inner, self.outputs)

    @staticmethod
    def _gradient(value: Tensor, leaves: Named, create_graph: bool) -> dict[int, Tensor]:
        if not value.requires_grad or not leaves:
            return {}
        with torch.enable_grad():
            grads = torch.autograd.grad(value, list(leaves.values()), allow_unused=True, create_graph=create_graph)
        return {i: solid(g) for i, g in zip(leaves, grads, strict=True) if g is not None}

    @cached_property
    def _curved(self) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
        """The gradient, connected to the leaves in place of the predictions, and these."""
        value, leaves = self._value
        return self._gradient(value, leaves, create_graph=True), leaves

    def hessian_times(self, v: Named) -> dict[int, Tensor]:
        """``H v`` with ``H = ∇²_F L``, by double backward. Raises ``StructureError`` where that does not exist."""
        try:
            slope, leaves = self._curved
            live = [i for i, g in slope.items() if g.requires_grad and i in v]
            found: Sequence[Tensor | None] = [None] * len(leaves)
            if live:
                ends, vectors = [slope[i] for i in live], [v[i] for i in live]
                found = torch.autograd.grad(ends, list(leaves.values()), vectors, retain_graph=True, allow_unused=True)
        except NotImplementedError as error:
            raise StructureError(MSG_NO_SECOND_DERIVATIVE.format(error=error)) from error
        except RuntimeError as error:
            if "not implemented" not in str(error) and "twice" not in str(error):
                raise
            raise StructureError(MSG_NO_SECOND_DERIVATIVE.format(error=error)) from error
        pairs = zip(leaves.items(), found, strict=True)
        return {i: torch.zeros_like(leaf) if h is None else solid(h.detach()) for (i, leaf), h in pairs}

    def in_double(self) -> LossAt | None:
        """The same in float64; None where the loss does not take it."""
        if all(t.dtype == torch.float64 for t in self.predictions.values()):
            return self
        wide = [{i: widest(t) for i, t in named.items()} for named in (self.predictions, self.inner, self.outputs)]
        targets = tree_map(lambda t: widest(t) if isinstance(t, Tensor) else t, self.setting.targets)
        setting = self.setting.widened() if by_graph(self.setting, self.inner) else self.setting
        other = LossAt(replace(setting, targets=targets), *wide)
        try:
            return other if all(g.dtype == torch.float64 for g in other.slope.values()) else None
        except (RuntimeError, TypeError):
            return None


def loss_value(
    setting: Setting, predictions: Mapping[int, Tensor], inner: Mapping[int, Tensor], outputs: Mapping[int, Tensor]
) -> tuple[Tensor, dict[int, Tensor]]:
    """The loss at these predictions, connected to leaves in their place."""
    leaves = {i: t.detach().requires_grad_() for i, t in predictions.items() if t.is_floating_point() or t.is_complex()}
    graph = setting.graph
    with torch.enable_grad():
        if by_graph(setting, inner):
            assert graph.loss is not None
            outside = {i: setting.program.parameters[v.name].detach() for i, v in enumerate(graph.values)
                       if v.kind == "parameters"}  # fmt: skip
            constant = {i: t.detach() for i, t in inner.items()}
            feed = {**outside, **setting.data, **constant, **predictions, **leaves}
            (value,) = graph.run(feed, [graph.loss.index], keep=noise(graph), steps=graph.loss_steps)
        else:
            copied = any(s.writes for s in graph.loss_steps)
            filled = {**outputs, **{i: t.clone() if copied else t for i, t in leaves.items()}}
            value = loss_of(setting, output_of(setting, filled))
    return value, leaves


def by_graph(setting: Setting, inner: Mapping[int, Tensor]) -> bool:
    """The loss has to be replayed, because it cannot be called with predictions alone, or draws noise."""
    return setting.own_loss or bool(inner) or any(s.noise for s in setting.graph.loss_steps)


def output_of(setting: Setting, values: Mapping[int, Tensor]) -> Any:
    """The output of the model with these tensors in it."""
    return tree_map(lambda r: values[r.index] if isinstance(r, Ref) else r, setting.skeleton, is_leaf=is_ref)


def loss_of(setting: Setting, output: Any) -> Tensor:
    loss, targets = setting.program.loss, setting.targets
    assert loss is not None
    modules = [m for m in (loss,) if isinstance(m, torch.nn.Module)]
    harmless = not modules and not any(s.noise or s.writes for s in setting.graph.loss_steps)
    with nullcontext() if harmless else untouched(modules), torch.enable_grad():
        value = loss(output, targets) if targets is not None else loss(output)
    assert isinstance(value, Tensor)
    return value


def noise(graph: Graph) -> dict[int, Tensor]:
    """What was drawn in the loss when it was recorded."""
    refs = [r for s in graph.loss_steps if s.noise for r in s.outs if r is not None]
    return {r.index: v for r in refs if (v := graph.known(r.index)) is not None}


def nonzero_gradients(value: Tensor, leaves: Mapping[str, Tensor]) -> dict[str, Tensor]:
    if not value.requires_grad:
        return {}
    grads = torch.autograd.grad(value, list(leaves.values()), allow_unused=True)
    return {n: g for n, g in zip(leaves, grads, strict=True) if g is not None and bool((g != 0).any())}
