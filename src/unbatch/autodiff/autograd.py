"""What PyTorch's autograd lacks: cotangents of values in the middle, many at once, or stopped on
their way.

Knows ops and tensors, and nothing about samples or plans.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.graph import GradientEdge


class _Attach(torch.autograd.Function):
    """The identity, with a leaf as a second input, so that a value that depends on none has a
    gradient.
    """

    @staticmethod
    def forward(ctx: Any, value: Tensor, anchor: Tensor) -> Tensor:
        ctx.mark_dirty(value)
        return value

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[None, None]:
        return None, None


def attached(value: Tensor, anchor: Tensor) -> Tensor:
    """Return a value without history as one that has a gradient; ``anchor``: a leaf, which gets
    none.
    """
    # Autograd marks no view as written to.
    own = value.clone() if value._is_view() else value
    attached: Tensor = _Attach.apply(own, anchor)
    return attached


class Gate(torch.autograd.Function):
    """The identity, which lets no gradient pass while the gates are shut."""

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
        """Shut all gates while columns are pulled back: those of one seed do not enter another's
        values.
        """
        cls.closed = True
        try:
            yield
        finally:
            cls.closed = False


def solid(t: Tensor) -> Tensor:
    """Return a tensor with memory of its own: PyTorch keeps zeros without, and some kernels read
    there all the same.
    """
    if t._is_zerotensor():
        return torch.zeros(t.shape, dtype=t.dtype, device=t.device)
    return t


def gradients(
    outputs: Sequence[Tensor],
    leaves: Mapping[str, Tensor],
    gs: Sequence[Tensor] | None = None,
    retain: bool = False,
) -> dict[str, Tensor]:
    """Return gradients by name, zero for what the outputs do not depend on.

    ``gs``: the cotangents of the outputs, by default those of scalars; ``retain``: another backward
    pass will follow.
    """
    live = [k for k, t in enumerate(outputs) if t.requires_grad]
    grads: Sequence[Tensor | None] = [None] * len(leaves)
    if live:
        ends = [outputs[k] for k in live]
        cotangents = None
        if gs is not None:
            cotangents = [gs[k] for k in live]
        grads = torch.autograd.grad(
            ends, list(leaves.values()), cotangents, retain_graph=retain, allow_unused=True
        )
    named: dict[str, Tensor] = {}
    for (name, leaf), grad in zip(leaves.items(), grads, strict=True):
        named[name] = torch.zeros_like(leaf) if grad is None else solid(grad)
    return named


def batched_grad(
    outputs: Sequence[GradientEdge | Tensor],
    inputs: Sequence[GradientEdge | Tensor],
    gs: Sequence[Tensor],
    count: int,
) -> list[Any]:
    """Return gradients by the inputs for ``count`` stacked cotangents, ``[count, *shape]``; None
    where there is none.

    They are pulled back in one call or, where an op cannot be batched, one after the other.
    """
    ends: list[Any] = []
    cotangents: list[Tensor] = []
    for output, g in zip(outputs, gs, strict=True):
        if isinstance(output, GradientEdge) or output.requires_grad:
            ends.append(output)
            cotangents.append(g)
    if not ends or not inputs:
        return [None] * len(inputs)
    if count > 1:
        # It fails where vmap has no rule for an op on the way, and warns where it has a slow one.
        with suppress(RuntimeError), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return list(_grad(ends, inputs, cotangents, batched=True))
    single = [_grad(ends, inputs, [g[k] for g in cotangents]) for k in range(count)]
    return [_stacked(of_input) for of_input in zip(*single, strict=True)]


def _stacked(rows: Sequence[Any]) -> Tensor | None:
    """Return rows as one tensor; an input without a gradient has none in any of them."""
    return None if rows[0] is None else torch.stack(rows)


def _grad(
    ends: Sequence[Any], inputs: Sequence[Any], cotangents: Sequence[Tensor], batched: bool = False
) -> tuple[Any, ...]:
    return torch.autograd.grad(
        ends,
        inputs,
        cotangents,
        retain_graph=True,
        allow_unused=True,
        is_grads_batched=batched,
    )


@contextmanager
def forward_mode() -> Iterator[None]:
    """Open a level of forward mode; the first one loads scripts that PyTorch itself warns about."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*torch.jit.script.*", DeprecationWarning)
        forward_ad._maybe_load_decompositions()
    with forward_ad.dual_level():
        yield
