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
from torch.autograd import forward_ad
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


def solid(t: Tensor) -> Tensor:
    """Zeros that torch keeps without memory, as plain ones: some kernels read the memory that is not there."""
    return torch.zeros(t.shape, dtype=t.dtype, device=t.device) if t._is_zerotensor() else t


def held(op: Any) -> Callable[..., Any]:
    """The op with its results cut off from what they were made of."""
    return lambda *args, **kwargs: tree_map(lambda t: t.detach() if isinstance(t, Tensor) else t, op(*args, **kwargs))


def unmoved(op: Any) -> Callable[..., Any]:
    """In forward mode, which ``no_grad`` does not end: the op on values alone. What it writes to keeps its tangent."""

    def run(*args: Any, **kwargs: Any) -> Any:
        given: dict[int, Tensor] = {}

        def value(t: Any) -> Any:
            if not isinstance(t, Tensor):
                return t
            primal = forward_ad.unpack_dual(t).primal
            given[id(primal)] = t
            return primal

        args, kwargs = tree_map(value, (args, kwargs))
        return tree_map(lambda t: given.get(id(t), t), op(*args, **kwargs))

    return run


def laid_out(t: Tensor, strides: Sequence[int]) -> Tensor:
    """The same values in another order in memory, which what comes later may rely on."""
    return t if t.stride() == tuple(strides) else t.new_empty_strided(t.shape, strides).copy_(t)


def norm_held(step: Step) -> Callable[..., Any]:
    """The batch norm of a step with its statistics held constant."""

    def run(*args: Any, **kwargs: Any) -> Any:
        given = dict(zip(step.parameters, args, strict=False)) | kwargs
        with torch.no_grad():
            outs = step.op(*args, **kwargs)
        y = standardised(given["input"], outs[1], outs[2], given["weight"], given["bias"])
        return (laid_out(y.to(outs[0].dtype), outs[0].stride()), *outs[1:])

    return run


class _Scaled(torch.autograd.Function):
    """``y``, whose derivative by ``x`` is a factor for each channel."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, gain: Tensor) -> Tensor:
        ctx.save_for_backward(gain)
        ctx.mark_dirty(y)  # so that it is no view of ``y``, and may be written to
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None]:
        (gain,) = ctx.saved_tensors
        return g * gain, None, None


def norm_evaluated(step: Step) -> Callable[..., Any]:
    """The batch norm of a step that normalises with constants: its own derivative is slower, and keeps its input."""

    def run(*args: Any, **kwargs: Any) -> Any:
        given = step.defaults | dict(zip(step.parameters, args, strict=False)) | kwargs
        x, weight, bias = given["input"], given["weight"], given["bias"]
        if not x.requires_grad or any(t is not None and t.requires_grad for t in (weight, bias)):
            return step.op(*args, **kwargs)
        with torch.no_grad():
            y, *others = step.op(*args, **kwargs)
            gain = (given["running_var"] + given["eps"]).rsqrt()
            gain = (gain if weight is None else gain * weight).to(x.dtype).reshape(1, -1, *[1] * (x.ndim - 2))
        return (_Scaled.apply(x, y, gain), *others)

    return run


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
    return {n: torch.zeros_like(p) if g is None else solid(g) for (n, p), g in zip(leaves.items(), grads, strict=True)}


def standardised(x: Tensor, mean: Tensor, scale: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """What a batch norm makes of ``x`` with given moments, by channel."""
    view = [1, -1, *[1] * (x.ndim - 2)]
    gain = scale if weight is None else scale * weight
    shift = -mean * gain if bias is None else bias - mean * gain
    return torch.addcmul(shift.reshape(view), x.to(gain.dtype), gain.reshape(view))


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


@contextmanager
def forward_mode() -> Iterator[None]:
    """A level of forward mode, whose first use loads scripts that torch itself warns about."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*torch.jit.script.*", DeprecationWarning)
        forward_ad._maybe_load_decompositions()
    with forward_ad.dual_level():
        yield
