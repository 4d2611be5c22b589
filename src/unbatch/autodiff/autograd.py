"""What PyTorch's autograd lacks: gradients by name, many at once, or stopped on their way.

Knows ops and tensors, and nothing about samples or plans.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.graph import GradientEdge

from unbatch.capture.trees import dense

Key = TypeVar("Key", str, int)  # the name of a parameter, or the number of a value in a graph

Value = TypeVar("Value")

FORWARD_MODE_SCRIPTS = "torch._decomp.decompositions_for_jvp"  # a module, loaded at the first dual


# --- tensors by name or number --------------------------------------------------------------------


def detached(tensors: Mapping[Key, Tensor]) -> dict[Key, Tensor]:
    """Return the same values without their history."""
    return {key: t.detach() for key, t in tensors.items()}


def leaves_of(tensors: Mapping[Key, Tensor]) -> dict[Key, Tensor]:
    """Return the same values as leaves to differentiate by."""
    return {key: t.detach().requires_grad_() for key, t in tensors.items()}


def zero_leaves(like: Sequence[Tensor]) -> list[Tensor]:
    """Return zeros to differentiate by."""
    return [torch.zeros_like(t, requires_grad=True) for t in like]


def pick(values: Mapping[Key, Value], keys: Iterable[Key]) -> list[Value]:
    """Return some of the values, in the order of ``keys``."""
    return [values[key] for key in keys]


def subset(tensors: Mapping[Key, Tensor], keys: Iterable[Key]) -> dict[Key, Tensor]:
    """Return some of the tensors with their keys, in the order of ``keys``."""
    return {key: tensors[key] for key in keys}


# --- values in the middle -------------------------------------------------------------------------


class _Attach(torch.autograd.Function):
    """The identity, with a leaf as a second input.

    With it, a value that depends on no leaf has a gradient.
    """

    @staticmethod
    def forward(ctx: Any, value: Tensor, anchor: Tensor) -> Tensor:
        ctx.mark_dirty(value)
        return value

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[None, None]:
        return None, None


def attached(value: Tensor, anchor: Tensor) -> Tensor:
    """Return a value without history as one that has a gradient.

    ``anchor``: a leaf, which gets none.
    """
    # Autograd marks no view as written to.
    if value._is_view():
        value = value.clone()
    attached: Tensor = _Attach.apply(value, anchor)
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
        """Shut all gates while columns are pulled back.

        The columns of one seed do not enter the values of another through a gate.
        """
        cls.closed = True
        try:
            yield
        finally:
            cls.closed = False


def solid(t: Tensor) -> Tensor:
    """Return a tensor with memory of its own.

    PyTorch keeps some zeros without, and some kernels read there all the same.
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
    # Autograd refuses outputs that depend on no leaf.
    cotangents: Sequence[Tensor | None] = [None] * len(outputs)
    if gs is not None:
        cotangents = gs
    ends, of_ends = _connected(outputs, cotangents)
    grads: Sequence[Tensor | None] = [None] * len(leaves)
    for leaf in leaves.values():
        if not leaf.requires_grad:
            leaf.requires_grad_()  # the program has frozen it, before or after it was used
    if ends:
        grads = torch.autograd.grad(
            ends, list(leaves.values()), of_ends, retain_graph=retain, allow_unused=True
        )
    return dict(zip(leaves, or_zeros(grads, leaves.values()), strict=True))


def or_zeros(grads: Iterable[Tensor | None], like: Iterable[Tensor]) -> list[Tensor]:
    """Return gradients, zero where there is none."""
    filled: list[Tensor] = []
    for grad, t in zip(grads, like, strict=True):
        if grad is None:
            grad = torch.zeros_like(t)
        if grad.layout != t.layout:
            grad = grad.to_dense()  # an embedding may leave out what is zero
        filled.append(solid(grad))
    return filled


def _connected(outputs: Sequence[Any], cotangents: Sequence[Any]) -> tuple[list[Any], list[Any]]:
    """Return the outputs that depend on a leaf, and their cotangents."""
    ends: list[Any] = []
    of_ends: list[Any] = []
    for output, cotangent in zip(outputs, cotangents, strict=True):
        if isinstance(output, GradientEdge) or output.requires_grad:
            ends.append(output)
            of_ends.append(cotangent)
    return ends, of_ends


def batched_grad(
    outputs: Sequence[GradientEdge | Tensor],
    inputs: Sequence[GradientEdge | Tensor],
    gs: Sequence[Tensor],
    count: int,
    together: bool = True,
) -> list[Any]:
    """Return ``[count, *shape]`` for each input: gradients for stacked cotangents, or None.

    They are pulled back ``together`` in one call or, where an op cannot be batched, one after the
    other.
    """
    ends, cotangents = _connected(outputs, gs)
    if not ends or not inputs:
        return [None] * len(inputs)
    if together and count > 1:
        # It fails where vmap has no rule for an op on the way, and warns where it has a slow one.
        with suppress(RuntimeError), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return list(_grad(ends, inputs, cotangents, batched=True))
    single = []
    for k in range(count):
        # In memory of their own, in order: some backward passes look at where theirs begins, and
        # that of a batch norm gives other numbers for some strides of a single image.
        of_sample = [g[k].clone(memory_format=torch.contiguous_format) for g in cotangents]
        single.append(_grad(ends, inputs, of_sample))
    return [_stacked(of_input) for of_input in zip(*single, strict=True)]


def _stacked(rows: tuple[Any, ...]) -> Tensor | None:
    """Return rows as one tensor; an input without a gradient has none in any of them."""
    if rows[0] is None:
        return None
    return torch.stack(list(map(dense, rows)))


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
    """Open a level of forward mode."""
    _load_forward_mode()
    with forward_ad.dual_level():
        yield


def _load_forward_mode() -> None:
    """Load what PyTorch's forward mode needs before its first use.

    It is loaded by `torch.jit.script`, which warns that it is deprecated: a ``DeprecationWarning``
    in PyTorch 2.13, a ``FutureWarning`` since, and none of it is about what a user has written.
    """
    if FORWARD_MODE_SCRIPTS in sys.modules:
        return
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r".torch\.jit\.script. is")
        forward_ad._maybe_load_decompositions()
