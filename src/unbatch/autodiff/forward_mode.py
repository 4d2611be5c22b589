"""How tangents pass through one op for which there is no rule: by forward mode of that op alone.

Where PyTorch has no forward mode of the op, a composition of plain ops stands in, or double
backward. The rules, which are cheaper, are in ``jvp_rules.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._pytree import tree_map

from unbatch.autodiff.autograd import forward_mode, solid, zero_leaves
from unbatch.autodiff.compositions import COMPOSITIONS, Composition
from unbatch.capture import ops
from unbatch.capture.steps import ExecutedOp, Ref
from unbatch.capture.trees import cloned, flat
from unbatch.errors import MSG_NO_TANGENT, StructureError

Tangents = list[Tensor | None]  # of the outputs of an op; None for what does not move


def through_op(call: ExecutedOp, op: Any, tangents: Mapping[int, Tensor]) -> Tangents:
    """Return the tangents of the outputs by forward mode of ``op``, in place of that of the call.

    Where it has none: by forward mode of plain ops that it is composed of, or by double backward.
    Raises ``StructureError`` where there is none of these.
    """
    try:
        return _by_forward_mode(call, op, tangents)
    except (NotImplementedError, RuntimeError) as error:
        composition, missing = COMPOSITIONS.get(call.step.name), error
    try:
        if composition is not None:
            return _by_forward_mode(call, partial(_composed, composition), tangents)
        return _by_double_backward(call, op, tangents)
    except (NotImplementedError, RuntimeError) as error:
        # The first reason is the op's own; a composition that refuses says more.
        reason = error
        if composition is None:
            reason = missing
        message = MSG_NO_TANGENT.format(place=call.step.place, error=reason)
        raise StructureError(message) from reason


def _by_forward_mode(call: ExecutedOp, op: Any, tangents: Mapping[int, Tensor]) -> Tangents:
    """Return the tangents of the outputs; raises where some op has no forward mode."""
    with forward_mode():
        arguments = _with_tangents(call, tangents, _dual)
        outs = flat(ops.results(call.op, arguments, op(**arguments)))
        return [_tangent(out) for out in outs]


def _composed(composition: Composition, **arguments: Any) -> Any:
    return composition(arguments)


def _tangent(out: Any) -> Tensor | None:
    if not isinstance(out, Tensor):
        return None
    tangent = forward_ad.unpack_dual(out).tangent
    if tangent is None:
        return None
    return solid(tangent)


def _dual(x: Tensor, dx: Tensor) -> Tensor:
    return forward_ad.make_dual(x, dx.to(x.dtype))


def _by_double_backward(call: ExecutedOp, op: Any, tangents: Mapping[int, Tensor]) -> Tangents:
    """Return ``J v`` as the derivative of ``w ↦ Jᵀw``, which is linear, in the direction ``v``."""
    xs: list[Tensor] = []
    dxs: list[Tensor] = []

    def leaf(x: Tensor, dx: Tensor) -> Tensor:
        xs.append(x.detach().clone().requires_grad_())
        dxs.append(dx)
        return xs[-1]

    # Rules are called where no gradients are recorded; here the op has to have some.
    with torch.enable_grad():
        arguments = _with_tangents(call, tangents, leaf)
        outs = flat(ops.results(call.op, arguments, op(**arguments)))
        moving = [k for k, y in enumerate(outs) if isinstance(y, Tensor) and y.requires_grad]
        ys = [outs[k] for k in moving]
        ws = zero_leaves(ys)
        pulled = torch.autograd.grad(ys, xs, ws, create_graph=True, allow_unused=True)
        ends: list[Tensor] = []
        vs: list[Tensor] = []
        # What does not depend on ``w`` adds nothing: an input through which no derivative goes.
        for pulled_back, dx in zip(pulled, dxs, strict=True):
            if pulled_back is not None and pulled_back.requires_grad:
                ends.append(pulled_back)
                vs.append(dx)
        pushed: Tangents = [None] * len(outs)
        if ends:
            grads = torch.autograd.grad(ends, ws, vs, allow_unused=True)
            for k, grad in zip(moving, grads, strict=True):
                pushed[k] = grad
    return pushed


def _with_tangents(
    call: ExecutedOp, tangents: Mapping[int, Tensor], combine: Callable[[Tensor, Tensor], Tensor]
) -> dict[str, Any]:
    """Return the arguments, with ``combine(value, tangent)`` for values that move.

    What the op writes to is copied first.
    """

    def combined(refs: Any, values: Any) -> Any:
        if isinstance(refs, list | tuple):
            pairs = zip(refs, values, strict=True)
            return type(refs)(combined(ref, value) for ref, value in pairs)
        if isinstance(refs, Ref) and refs.index in tangents:
            return combine(values, tangents[refs.index])
        return values

    arguments = dict(call.arguments)
    for name in ops.written(call.op, arguments):
        if arguments.get(name) is not None:
            arguments[name] = tree_map(cloned, arguments[name])
    return {name: combined(refs, arguments[name]) for name, refs in call.step.named.items()}
