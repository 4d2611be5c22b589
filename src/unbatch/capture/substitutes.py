"""What runs in the place of a recorded step when a computation is replayed.

The same values with other derivatives (none, or those of a batch norm whose statistics are
constants), or the same op with given statistics. Knows ops and tensors, and nothing about samples
or plans.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._pytree import tree_map

from unbatch.capture import ops
from unbatch.capture.ops import BatchNormArguments
from unbatch.capture.steps import Step, filled
from unbatch.capture.trees import flat

# Mean and ``1/σ``, by channel.
Moments = tuple[Tensor, Tensor]


def held(op: Any) -> Callable[..., Any]:
    """Return the op with its results cut off from what they were made of."""

    def run(*args: Any, **kwargs: Any) -> Any:
        return tree_map(_detached, op(*args, **kwargs))

    return run


def _detached(t: Any) -> Any:
    if isinstance(t, Tensor):
        return t.detach()
    return t


def unmoved(op: Any) -> Callable[..., Any]:
    """Return the op on values alone, in forward mode, which ``no_grad`` does not end.

    What it writes to keeps its tangent.
    """

    def run(*args: Any, **kwargs: Any) -> Any:
        duals: dict[int, Tensor] = {}

        def primal(t: Any) -> Any:
            if not isinstance(t, Tensor):
                return t
            value = forward_ad.unpack_dual(t).primal
            duals[id(value)] = t
            return value

        def dual(t: Any) -> Any:
            # An op in place returns the primal that it was given: that has a tangent already.
            return duals.get(id(t), t)

        args, kwargs = tree_map(primal, (args, kwargs))
        return tree_map(dual, op(*args, **kwargs))

    return run


def laid_out(t: Tensor, strides: Sequence[int]) -> Tensor:
    """Return the same values in another order in memory, which what comes later may rely on."""
    if t.stride() == tuple(strides):
        return t
    return t.new_empty_strided(t.shape, strides).copy_(t)


def replayed(path: Sequence[Step], t: Tensor) -> Tensor:
    """Return what a chain of steps with one operand each makes of another one."""
    for step in path:
        t = _on(step, t)
    return t


def _on(step: Step, operand: Tensor) -> Any:
    args, kwargs = filled((step.args, step.kwargs), lambda _: operand)
    return step.op(*args, **kwargs)


# --- batch norm -----------------------------------------------------------------------------------
#
# Per channel, with mean ``μ``, standard deviation ``σ``, weight ``γ`` and bias ``β``,
#
#   y = γ (x - μ) / σ + β = gain · x + shift,   gain = γ / σ,   shift = β - μ · gain.
#
# In training ``μ`` and ``σ`` are functions of ``x``; held constant, ``∂y/∂x = gain``.


def moments(op: Any, norm: BatchNormArguments, outputs: Sequence[Any]) -> Moments:
    """Return the mean and ``1/σ`` that a batch norm used, by channel."""
    if not norm.training:
        return norm.running_mean, (norm.running_var + norm.eps).rsqrt()
    returned = ops.batch_moments(op, outputs)
    if returned is not None:
        return returned
    # Half precision would overflow in the squares; PyTorch's kernels add in float32 as well.
    x = norm.input.to(torch.promote_types(norm.input.dtype, torch.float32))
    variance, mean = torch.var_mean(x, [d for d in range(x.ndim) if d != 1], correction=0)
    return mean, (variance + norm.eps).rsqrt()


def standardised(
    x: Tensor, mean: Tensor, scale: Tensor, weight: Tensor | None, bias: Tensor | None
) -> Tensor:
    """Return what a batch norm makes of ``x`` with the given moments, by channel."""
    view = [1, -1, *[1] * (x.ndim - 2)]
    gain = scale
    if weight is not None:
        gain = scale * weight
    shift = -mean * gain if bias is None else bias - mean * gain
    return torch.addcmul(shift.reshape(view), x.to(gain.dtype), gain.reshape(view))


def norm_with_constant_statistics(
    step: Step, constants: Moments | None = None
) -> Callable[..., Any]:
    """Return the batch norm of a step with its statistics held constant.

    At ``constants``; by default at those of its input.
    """

    def run(*args: Any, **kwargs: Any) -> Any:
        arguments = ops.by_argument(step.op, args, kwargs)
        norm = ops.batch_norm_arguments(step.op, arguments)
        with torch.no_grad():
            first, *others = flat(step.op(*args, **kwargs))
            mean, invstd = constants or moments(step.op, norm, [first, *others])
        y = standardised(norm.input, mean, invstd, norm.weight, norm.bias)
        return laid_out(y.to(first.dtype), first.stride()), *others

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


def norm_in_eval_mode(step: Step) -> Callable[..., Any]:
    """Return the batch norm of a step that normalises with constants.

    Its own derivative is slower, and keeps its input.
    """

    def run(*args: Any, **kwargs: Any) -> Any:
        arguments = ops.by_argument(step.op, args, kwargs)
        norm = ops.batch_norm_arguments(step.op, arguments)
        x = norm.input
        if not x.requires_grad or _takes_gradient(norm.weight) or _takes_gradient(norm.bias):
            return step.op(*args, **kwargs)  # a derivative by gain or shift needs the input
        with torch.no_grad():
            y, *others = flat(step.op(*args, **kwargs))
            _, gain = moments(step.op, norm, ())
            if norm.weight is not None:
                gain = gain * norm.weight
            gain = gain.to(x.dtype).reshape(1, -1, *[1] * (x.ndim - 2))
        return _Scaled.apply(x, y, gain), *others

    return run


def _takes_gradient(t: Tensor | None) -> bool:
    return t is not None and t.requires_grad
