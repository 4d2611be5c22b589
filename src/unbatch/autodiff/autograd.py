"""What is asked of autograd beyond its own functions: cotangents of values in the middle, many at once, or cut off.

Knows ops and tensors, and nothing about samples or plans.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.graph import GradientEdge


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


def solid(t: Tensor) -> Tensor:
    """Zeros that torch keeps without memory, as plain ones: some kernels read the memory that is not there."""
    return torch.zeros(t.shape, dtype=t.dtype, device=t.device) if t._is_zerotensor() else t


def gradients(
    outputs: Sequence[Tensor],
    leaves: Mapping[str, Tensor],
    gs: Sequence[Tensor] | None = None,
    retain: bool = False,
) -> dict[str, Tensor]:
    """By name; zero for what the outputs do not depend on."""
    live = [k for k, t in enumerate(outputs) if t.requires_grad]
    grads: Sequence[Tensor | None] = [None] * len(leaves)
    if live:
        chosen = None if gs is None else [gs[k] for k in live]
        tensors = [outputs[k] for k in live]
        grads = torch.autograd.grad(
            tensors, list(leaves.values()), chosen, retain_graph=retain, allow_unused=True
        )
    return {
        n: torch.zeros_like(p) if g is None else solid(g)
        for (n, p), g in zip(leaves.items(), grads, strict=True)
    }


def batched_grad(
    outputs: Sequence[Any], inputs: Sequence[Any], gs: Sequence[Tensor], count: int
) -> list[Any]:
    """Gradients for ``count`` stacked cotangents; one after the other where they cannot be batched."""
    connected = [
        (o, g)
        for o, g in zip(outputs, gs, strict=True)
        if isinstance(o, GradientEdge) or o.requires_grad
    ]
    if not connected or not inputs:
        return [None] * len(inputs)
    outputs, gs = [list(x) for x in zip(*connected, strict=True)]
    grad = torch.autograd.grad
    if count > 1:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return list(
                    grad(
                        outputs,
                        inputs,
                        gs,
                        retain_graph=True,
                        allow_unused=True,
                        is_grads_batched=True,
                    )
                )
        except RuntimeError:
            pass
    each = [
        grad(outputs, inputs, [g[k] for g in gs], retain_graph=True, allow_unused=True)
        for k in range(count)
    ]
    return [None if rows[0] is None else torch.stack(rows) for rows in zip(*each, strict=True)]


@contextmanager
def forward_mode() -> Iterator[None]:
    """A level of forward mode, whose first use loads scripts that torch itself warns about."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*torch.jit.script.*", DeprecationWarning)
        forward_ad._maybe_load_decompositions()
    with forward_ad.dual_level():
        yield
