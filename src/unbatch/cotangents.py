"""The loss with the predictions held apart from what they are made of: its value, and its derivatives by them."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from unbatch.graph import Graph, Ref, is_ref
from unbatch.purity import untouched
from unbatch.setting import Setting


def cotangents(
    setting: Setting, predictions: Mapping[int, Tensor], inner: Mapping[int, Tensor], outputs: Mapping[int, Tensor]
) -> dict[int, Tensor]:
    """``∂L/∂F`` for every prediction that has samples.

    ``inner``: what else of the model the loss reads; ``outputs``: all that the model returned.
    """
    value, leaves = loss_value(setting, predictions, inner, outputs)
    if not value.requires_grad or not leaves:
        return {}
    grads = torch.autograd.grad(value, list(leaves.values()), allow_unused=True)
    return {i: g for i, g in zip(leaves, grads, strict=True) if g is not None}


def loss_value(
    setting: Setting, predictions: Mapping[int, Tensor], inner: Mapping[int, Tensor], outputs: Mapping[int, Tensor]
) -> tuple[Tensor, dict[int, Tensor]]:
    """The loss at these predictions, connected to leaves in their place."""
    leaves = {i: t.detach().requires_grad_() for i, t in predictions.items() if t.is_floating_point() or t.is_complex()}
    graph = setting.graph
    with torch.enable_grad():
        if setting.own_loss or inner or any(s.noise for s in graph.loss_steps):
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
