"""What is asked of autograd beyond its own functions: cotangents of values in the middle, many at once, or cut off.

Knows ops and tensors, and nothing about samples or plans.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge
from torch.utils._pytree import tree_map

from unbatch.graph import Step, filled


class _Attach(torch.autograd.Function):
    """Lets a value that depends on no leaf have a gradient: it is the first that samples and parameters make."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, anchor: Tensor) -> Tensor:
        ctx.mark_dirty(value)
        return value

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[None, None]:
        return None, None


class Gate(torch.autograd.Function):
    """The identity, through which the columns of another seed do not pass."""

    closed = False

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor | None:
        return torch.zeros_like(g) if Gate.closed else g

    @classmethod
    @contextmanager
    def shut(cls) -> Iterator[None]:
        """While columns are pulled back."""
        cls.closed = True
        try:
            yield
        finally:
            cls.closed = False


def attached(value: Tensor, anchor: Tensor) -> Tensor:
    """A value without history as one that has a gradient."""
    attached: Tensor = _Attach.apply(value.clone() if value._is_view() else value, anchor)
    return attached


def held(op: Any) -> Callable[..., Any]:
    """The op with its results cut off from what they were made of."""
    return lambda *args, **kwargs: tree_map(lambda t: t.detach() if isinstance(t, Tensor) else t, op(*args, **kwargs))


def norm_held(step: Step) -> Callable[..., Any]:
    """The batch norm of a step with its statistics held constant."""
    names = [a.name for a in step.op._schema.arguments]
    return lambda *args, **kwargs: frozen_norm(step.op, names, args, kwargs)


def frozen_norm(op: Any, names: Sequence[str], args: Any, kwargs: Any) -> Any:
    """A batch norm as it ran, with its statistics held constant."""
    arguments = dict(zip(names, args, strict=False)) | kwargs
    with torch.no_grad():
        outs = op(*args, **kwargs)
    y = standardised(arguments["input"], outs[1], outs[2], arguments["weight"], arguments["bias"])
    return (y.to(outs[0].dtype), *outs[1:])


def gradients(
    outputs: Sequence[Tensor], leaves: Mapping[str, Tensor], gs: Sequence[Tensor] | None = None, retain: bool = False
) -> dict[str, Tensor]:
    """By name; zero for what the outputs do not depend on."""
    live = [k for k, t in enumerate(outputs) if t.requires_grad]
    grads: Sequence[Tensor | None] = [None] * len(leaves)
    if live:
        chosen = None if gs is None else [gs[k] for k in live]
        tensors = [outputs[k] for k in live]
        grads = torch.autograd.grad(tensors, list(leaves.values()), chosen, retain_graph=retain, allow_unused=True)
    return {n: torch.zeros_like(p) if g is None else g for (n, p), g in zip(leaves.items(), grads, strict=True)}


def standardised(x: Tensor, mean: Tensor, scale: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """What a batch norm makes of ``x`` with given moments, by channel."""
    view = [1, -1, *[1] * (x.ndim - 2)]
    y = (x - mean.reshape(view)) * scale.reshape(view)
    y = y if weight is None else y * weight.reshape(view)
    return y if bias is None else y + bias.reshape(view)


def replayed(path: Sequence[Step], t: Tensor) -> Tensor:
    """A chain of steps with one operand each, run on another one."""
    for step in path:
        value = t
        args, kwargs = filled((step.args, step.kwargs), lambda _: value)  # noqa: B023  called at once
        t = step.op(*args, **kwargs)
    return t


def batched_grad(outputs: Sequence[Any], inputs: Sequence[Any], gs: Sequence[Tensor], count: int) -> list[Any]:
    """Gradients for ``count`` stacked cotangents; one after the other where they cannot be batched."""
    connected = [(o, g) for o, g in zip(outputs, gs, strict=True) if isinstance(o, GradientEdge) or o.requires_grad]
    if not connected or not inputs:
        return [None] * len(inputs)
    outputs, gs = [list(x) for x in zip(*connected, strict=True)]
    grad = torch.autograd.grad
    if count > 1:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return list(grad(outputs, inputs, gs, retain_graph=True, allow_unused=True, is_grads_batched=True))
        except RuntimeError:
            pass
    each = [grad(outputs, inputs, [g[k] for g in gs], retain_graph=True, allow_unused=True) for k in range(count)]
    return [None if rows[0] is None else torch.stack(rows) for rows in zip(*each, strict=True)]
