"""How tangents pass through one op: by the op itself where it is linear in what moves, else by its forward mode.

A rule takes the op as it ran, and the tangents of its arguments by name (None where nothing moves); it gives those of
the outputs, or None where it does not fit. Where the Jacobian of an op is symmetric, its backward kernel is the rule.
Knows ops and tensors only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._pytree import tree_leaves

from unbatch.autodiff.autograd import forward_mode, solid
from unbatch.autodiff.compositions import SPELLED_OUT
from unbatch.capture import ops
from unbatch.capture.graph import ExecutedOp, Ref, flat
from unbatch.capture.substitutes import moments
from unbatch.errors import MSG_NO_TANGENT, StructureError

aten = torch.ops.aten


Tangents = list[Tensor | None]


Rule = Callable[[ExecutedOp, Mapping[str, Any]], Tangents | None]


RULES: dict[str, Rule] = {}


NEED_OUTPUTS: set[str] = set()  # the ops whose rule reads what the op returned


def rule(names: str, outputs: bool = False) -> Callable[[Rule], Rule]:
    """Register a rule for ops (space-separated); ``outputs``: it reads what the op returned."""

    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(names.split(), function))
        NEED_OUTPUTS.update(names.split() if outputs else ())
        return function

    return register


@rule(" ".join(ops.names(lambda row: row.moves and not row.takes_shape and not row.cuts)))
@rule(
    "sum mean neg constant_pad_nd index_select index gather roll flip diagonal cumsum avg_pool2d _adaptive_avg_pool2d "
    "avg_pool1d avg_pool3d upsample_nearest2d upsample_bilinear2d detach_copy squeeze_ unsqueeze_ as_strided unfold "
    "im2col pixel_shuffle tril triu"
)
def linear(call: ExecutedOp, moving: Mapping[str, Any]) -> Tangents | None:
    """Linear in its first argument."""
    (first, tangent), *others = moving.items()
    if not isinstance(tangent, Tensor) or any(
        t is not None for _, rest in others for t in tree_leaves(rest)
    ):
        return None
    return flat(call.with_({first: tangent}))


@rule("_pack_padded_sequence")
def packing(call: ExecutedOp, moving: Mapping[str, Any]) -> Tangents:
    """Rows are moved; the counts beside them do not depend on values."""
    return [flat(call.with_({"input": moving["input"]}))[0], None]


@rule(" ".join(ops.names(lambda row: row.takes_shape)))
def reshaping(call: ExecutedOp, moving: Mapping[str, Any]) -> Tangents:
    """A tangent need not lie in memory as its value does."""
    shape = next(v for n, v in call.arguments.items() if n != "self")
    return [moving["self"].reshape(shape)]


@rule("mm bmm dot mv")
def product(call: ExecutedOp, moving: Mapping[str, Any]) -> Tangents:
    """Linear in each of its two arguments."""
    first, second = list(call.arguments)[:2]
    return [
        _sum(
            *(
                call.with_({n: moving[n]}) if moving[n] is not None else None
                for n in (first, second)
            )
        )
    ]


@rule("mul")
def scaling(call: ExecutedOp, moving: Mapping[str, Any]) -> Tangents:
    x, y = call.arguments["self"], call.arguments["other"]
    dx, dy = moving["self"], moving.get("other")
    return [_sum(dx * y if dx is not None else None, x * dy if dy is not None else None)]


@rule("div")
def quotient(call: ExecutedOp, moving: Mapping[str, Any]) -> Tangents | None:
    if (
        moving["self"] is None
        or moving.get("other") is not None
        or call.arguments.get("rounding_mode") is not None
    ):
        return None
    return [moving["self"] / call.arguments["other"]]


@rule("add sub")
def addition(call: ExecutedOp, moving: Mapping[str, Any]) -> Tangents:
    dx, dy, given = moving["self"], moving.get("other"), call.arguments
    alpha = given.get("alpha", 1) * (-1 if call.step.name == "sub" else 1)
    shape = torch.broadcast_shapes(
        *(t.shape for t in (given["self"], given["other"]) if isinstance(t, Tensor))
    )
    dy = dy if dy is None or alpha == 1 else alpha * dy
    total = _sum(dx, dy)
    return [total if total is None or total.shape == shape else total.expand(shape)]


@rule("addmm baddbmm")
def affine(call: ExecutedOp, moving: Mapping[str, Any]) -> Tangents:
    given = call.arguments
    names = ("self", "mat1", "mat2") if "mat1" in given else ("self", "batch1", "batch2")
    (_, x, y), (db, dx, dy) = (given[n] for n in names), (moving[n] for n in names)
    multiply = torch.mm if "mat1" in given else torch.bmm
    total = _sum(
        multiply(dx, y) if dx is not None else None, multiply(x, dy) if dy is not None else None
    )
    alpha, beta = given.get("alpha", 1), given.get("beta", 1)
    total = total if total is None or alpha == 1 else alpha * total
    if db is not None:
        db = db if beta == 1 else beta * db
        total = db.expand(*x.shape[:-1], y.shape[-1]) if total is None else total.add_(db)
    return [total]


@rule("convolution")
def convolution(call: ExecutedOp, moving: Mapping[str, Any]) -> Tangents:
    dx, dw, db = moving["input"], moving["weight"], moving["bias"]
    by_input = call.with_({"input": dx, "bias": db}) if dx is not None else None
    by_weight = None
    if dw is not None or (db is not None and dx is None):
        dw = torch.zeros_like(call.arguments["weight"]) if dw is None else dw
        by_weight = call.with_({"weight": dw, "bias": db if dx is None else None})
    return [_sum(by_input, by_weight)]


@rule("embedding")
def lookup(call: ExecutedOp, moving: Mapping[str, Any]) -> Tangents:
    """The row of the padding does not move."""
    table, padding = moving["weight"], call.arguments.get("padding_idx", -1)
    if padding >= 0:
        table = table.index_fill(0, torch.tensor([padding], device=table.device), 0)
    return [call.with_({"weight": table})]


@rule("cat stack")
def joining(call: ExecutedOp, moving: Mapping[str, Any]) -> Tangents:
    pairs = zip(call.arguments["tensors"], moving["tensors"], strict=True)
    return [call.with_({"tensors": [torch.zeros_like(x) if dx is None else dx for x, dx in pairs]})]


# Elementwise ops, softmax and normalisations have symmetric Jacobians: pulled back is pushed forward.


@rule("relu relu_")
def relu(call: ExecutedOp, moving: Mapping[str, Any]) -> Tangents:
    return [aten.threshold_backward(moving["self"], call.arguments["self"], 0)]


@rule("tanh", outputs=True)
def tanh(call: ExecutedOp, moving: Mapping[str, Any]) -> Tangents:
    return [aten.tanh_backward(moving["self"], call.outputs[0])]


@rule("sigmoid", outputs=True)
def sigmoid(call: ExecutedOp, moving: Mapping[str, Any]) -> Tangents:
    return [aten.sigmoid_backward(moving["self"], call.outputs[0])]


@rule("gelu")
def gelu(call: ExecutedOp, moving: Mapping[str, Any]) -> Tangents:
    return [
        aten.gelu_backward(
            moving["self"],
            call.arguments["self"],
            approximate=call.arguments.get("approximate", "none"),
        )
    ]


@rule("silu")
def silu(call: ExecutedOp, moving: Mapping[str, Any]) -> Tangents:
    return [aten.silu_backward(moving["self"], call.arguments["self"])]


@rule("_softmax", outputs=True)
def softmax(call: ExecutedOp, moving: Mapping[str, Any]) -> Tangents:
    y = call.outputs[0]
    return [
        aten._softmax_backward_data(moving["self"].to(y.dtype), y, call.arguments["dim"], y.dtype)
    ]


@rule("native_layer_norm", outputs=True)
def layer_norm(call: ExecutedOp, moving: Mapping[str, Any]) -> Tangents:
    given, (y, mean, rstd) = call.arguments, call.outputs
    x, shape, dx = given["input"].to(mean.dtype), given["normalized_shape"], moving["input"]
    by_input = None
    if dx is not None:
        dx, only = dx.to(mean.dtype).contiguous(), (True, False, False)
        by_input = aten.native_layer_norm_backward(dx, x, shape, mean, rstd, None, None, only)[0]
        by_input = by_input if given["weight"] is None else by_input * given["weight"]
    by_scale = None if moving["weight"] is None else (x - mean) * rstd * moving["weight"]
    total = _shifted(_sum(by_input, by_scale), moving["bias"], x.shape)
    return [None if total is None else total.to(y.dtype), None, None]


@rule(" ".join(ops.names(lambda row: row.batch_norm)), outputs=True)
def batch_norm(call: ExecutedOp, moving: Mapping[str, Any]) -> Tangents | None:
    norm = ops.batch_norm_arguments(call.op, call.arguments)
    if not norm.training:
        return None
    mean, rstd = moments(call.op, norm, call.outputs)
    x, dx = norm.input, moving["input"]
    if x.dtype != mean.dtype:
        return None
    view = [1, -1, *[1] * (x.ndim - 2)]
    by_input = None
    if dx is not None:
        kept = (None, None, None, mean, rstd, True, norm.eps)
        by_input = aten.native_batch_norm_backward(dx, x, *kept, (True, False, False))[0]
        by_input = by_input if norm.weight is None else by_input.mul_(norm.weight.view(view))
    by_scale = None
    if moving["weight"] is not None:
        gain = moving["weight"] * rstd
        by_scale = torch.addcmul(-(gain * mean).view(view), x, gain.view(view))
    shift = None if moving["bias"] is None else moving["bias"].view(view)
    total = _shifted(_sum(by_input, by_scale), shift, x.shape)
    return [total, *[None] * (len(call.outputs) - 1)]


def _shifted(total: Tensor | None, shift: Tensor | None, shape: torch.Size) -> Tensor | None:
    if shift is None:
        return total
    return shift.expand(shape) if total is None else total + shift


def _sum(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return b if a is None else a if b is None else a + b


# --- any op ---------------------------------------------------------------------------------------


def through_op(call: ExecutedOp, op: Any, here: Mapping[int, Tensor]) -> Tangents:
    """By forward mode of the op; where it has none, by its derivative's derivative, or by the op spelled out."""
    step = call.step
    try:
        return _forward_mode(call, op, here)
    except (NotImplementedError, RuntimeError) as missing:
        spelled = SPELLED_OUT.get(step.name)
        try:
            if spelled is not None:
                return _forward_mode(call, spelled, here)
            return _twice_backward(call, op, here)
        except (NotImplementedError, RuntimeError) as last:
            reason = missing if spelled is None else last
            raise StructureError(MSG_NO_TANGENT.format(place=step.place, error=reason)) from reason


def _placed(
    call: ExecutedOp, here: Mapping[int, Tensor], make: Callable[[Tensor, Tensor], Tensor]
) -> dict[str, Any]:
    """The arguments, with ``make(value, tangent)`` where something moves; what the op writes to is copied first."""

    def both(refs: Any, values: Any) -> Any:
        if isinstance(refs, list | tuple):
            return type(refs)(both(r, v) for r, v in zip(refs, values, strict=True))
        return (
            make(values, here[refs.index])
            if isinstance(refs, Ref) and refs.index in here
            else values
        )

    arguments = dict(call.arguments)
    if ops.writes_in_place(call.op):
        first = call.step.parameters[0]
        arguments[first] = arguments[first].clone()
    return {name: both(refs, arguments[name]) for name, refs in call.step.named.items()}


def _forward_mode(call: ExecutedOp, op: Any, here: Mapping[int, Tensor]) -> Tangents:
    with forward_mode():
        dual = lambda x, dx: forward_ad.make_dual(x, dx.to(x.dtype))  # noqa: E731
        arguments = _placed(call, here, dual)
        outs = flat(op(**arguments))
        tangents = [
            forward_ad.unpack_dual(o).tangent if isinstance(o, Tensor) else None for o in outs
        ]
        return [None if t is None else solid(t) for t in tangents]


def _twice_backward(call: ExecutedOp, op: Any, here: Mapping[int, Tensor]) -> Tangents:
    """``J v`` as the derivative of ``Jᵀ w``, which is linear in ``w``."""
    leaves: list[tuple[Tensor, Tensor]] = []

    def leaf(x: Tensor, dx: Tensor) -> Tensor:
        leaves.append((x.detach().clone().requires_grad_(), dx))
        return leaves[-1][0]

    with torch.enable_grad():
        arguments = _placed(call, here, leaf)
        outs = flat(op(**arguments))
        live = [o for o in outs if isinstance(o, Tensor) and o.requires_grad]
        ws = [torch.zeros_like(o, requires_grad=True) for o in live]
        xs, dxs = zip(*leaves, strict=True)
        back = torch.autograd.grad(live, xs, ws, create_graph=True, allow_unused=True)
        pairs = [
            (g, dx) for g, dx in zip(back, dxs, strict=True) if g is not None and g.requires_grad
        ]
        if not pairs:
            return [None for _ in outs]
        found = iter(
            torch.autograd.grad(
                [g for g, _ in pairs], ws, [dx for _, dx in pairs], allow_unused=True
            )
        )
        return [next(found) if isinstance(o, Tensor) and o.requires_grad else None for o in outs]
