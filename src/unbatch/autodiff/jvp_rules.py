"""How tangents pass through one op: by a rule for it, else by forward mode of that op alone.

A rule takes the op as it ran (``ExecutedOp``: its arguments by name and, where asked for, its
outputs) and the tangents of its arguments by name, None where an argument does not move. It returns
the tangents of the outputs, or None where it does not fit. Knows ops and tensors only; which step
comes when is for ``jvp.py``.

Three facts give most of the rules, for an op ``y = f(x)`` with the Jacobian ``J``:

    f linear in x          J dx = f(dx)                  the op itself is the rule
    f bilinear in x, z     dy = f(dx, z) + f(x, dz)      the op itself, twice
    J symmetric            J dx = Jᵀ dx                  its backward kernel is the rule
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from unbatch.autodiff.autograd import or_zeros
from unbatch.autodiff.forward_mode import Tangents, through_op
from unbatch.capture import ops
from unbatch.capture.recurrent_ops import Cells, Ran, slopes, tangents_of
from unbatch.capture.steps import ExecutedOp, Ref, Step, is_ref
from unbatch.capture.substitutes import moments
from unbatch.capture.trees import flat

aten = torch.ops.aten


Rule = Callable[[ExecutedOp, Mapping[str, Any]], Tangents | None]


RULES: dict[str, Rule] = {}


NEED_OUTPUTS: set[str] = set()  # the ops whose rule reads what the op returned


def rule(names: str, outputs: bool = False) -> Callable[[Rule], Rule]:
    """Register a rule for ops (space-separated); ``outputs``: it reads what the op returned."""

    def register(function: Rule) -> Rule:
        for name in names.split():
            RULES[name] = function
            if outputs:
                NEED_OUTPUTS.add(name)
        return function

    return register


def push_through(call: ExecutedOp, tangents: Mapping[int, Tensor]) -> Tangents:
    """Return the tangents of an op's outputs, from those of the values that it read (by number)."""
    step = call.step
    if step.name in RULES:
        outs = RULES[step.name](call, _by_name(step, tangents))
        if outs is not None:
            return outs
    return through_op(call, step.op, tangents)


def _by_name(step: Step, tangents: Mapping[int, Tensor]) -> dict[str, Any]:
    """Return the tangents of a step's arguments, in lists where the arguments are."""

    def tangent(leaf: Any) -> Tensor | None:
        if isinstance(leaf, Ref):
            return tangents.get(leaf.index)
        return None

    moving: dict[str, Any] = {}
    for name, argument in step.named.items():
        moving[name] = tree_map(tangent, argument, is_leaf=is_ref)
    return moving


# --- linear ops -----------------------------------------------------------------------------------


@rule(" ".join(ops.names(lambda row: row.moves and not row.takes_shape and not row.cuts)))
@rule(
    "sum mean neg constant_pad_nd index_select index gather roll flip diagonal cumsum avg_pool2d "
    "_adaptive_avg_pool2d avg_pool1d avg_pool3d upsample_nearest2d upsample_bilinear2d detach_copy "
    "squeeze_ unsqueeze_ as_strided unfold im2col pixel_shuffle tril triu"
)
def linear(call: ExecutedOp, moving: Mapping[str, Any]) -> Tangents | None:
    """Linear in the first argument, as long as no other one moves."""
    (first, tangent), *others = moving.items()
    if not isinstance(tangent, Tensor):
        return None
    for _, argument in others:
        if any(t is not None for t in tree_leaves(argument)):
            return None
    return flat(call.run_with({first: tangent}))


@rule("_pack_padded_sequence")
def packing(call: ExecutedOp, moving: Mapping[str, Any]) -> Tangents:
    """Rows are moved; the counts beside them do not depend on values."""
    return [flat(call.run_with({"input": moving["input"]}))[0], None]


@rule(" ".join(ops.names(lambda row: row.takes_shape)))
def reshaping(call: ExecutedOp, moving: Mapping[str, Any]) -> Tangents:
    """Linear, but a tangent need not lie in memory as its value does.

    A view of the one may not be possible for the other.
    """
    shape = next(v for n, v in call.arguments.items() if n != "self")
    return [moving["self"].reshape(shape)]


@rule("add sub")
def addition(call: ExecutedOp, moving: Mapping[str, Any]) -> Tangents:
    """``x ± αz``; where one of them was broadcast, its tangent alone would be too small."""
    arguments, alpha = call.arguments, call.arguments.get("alpha", 1)
    if call.step.name == "sub":
        alpha = -alpha
    total = _sum(moving["self"], _scaled(moving.get("other"), alpha))
    if total is None:
        return [None]
    operands = (arguments["self"], arguments["other"])
    shape = torch.broadcast_shapes(*(t.shape for t in operands if isinstance(t, Tensor)))
    if total.shape != shape:
        total = total.expand(shape)
    return [total]


@rule("embedding")
def lookup(call: ExecutedOp, moving: Mapping[str, Any]) -> Tangents:
    """Linear in the table, of which the row of the padding does not move."""
    table, padding = moving["weight"], call.arguments.get("padding_idx", -1)
    if padding >= 0:
        table = table.index_fill(0, torch.tensor([padding], device=table.device), 0)
    return [call.run_with({"weight": table})]


@rule("cat stack")
def joining(call: ExecutedOp, moving: Mapping[str, Any]) -> Tangents:
    """Linear in all tensors together; those that do not move are zero."""
    tensors = or_zeros(moving["tensors"], call.arguments["tensors"])
    return [call.run_with({"tensors": tensors})]


# --- bilinear ops ---------------------------------------------------------------------------------


@rule("mm bmm dot mv")
def product(call: ExecutedOp, moving: Mapping[str, Any]) -> Tangents:
    """``x z`` with two matrices or vectors."""
    x, z = list(call.arguments)[:2]
    arguments = call.arguments
    return [_bilinear(call.op, arguments[x], arguments[z], moving[x], moving[z])]


@rule("mul")
def scaling(call: ExecutedOp, moving: Mapping[str, Any]) -> Tangents:
    """``x z``, entry by entry; ``z`` may be a number."""
    x, z = call.arguments["self"], call.arguments["other"]
    return [_bilinear(operator.mul, x, z, moving["self"], moving.get("other"))]


@rule("div")
def quotient(call: ExecutedOp, moving: Mapping[str, Any]) -> Tangents | None:
    """``x / z``, linear in ``x``.

    Where ``z`` moves, or the result is rounded, forward mode serves.
    """
    rounded = call.arguments.get("rounding_mode") is not None
    if rounded or moving["self"] is None or moving.get("other") is not None:
        return None
    return [moving["self"] / call.arguments["other"]]


@rule("addmm baddbmm")
def affine(call: ExecutedOp, moving: Mapping[str, Any]) -> Tangents:
    """``βb + αxz``."""
    arguments = call.arguments
    x_name, z_name, multiply = "batch1", "batch2", torch.bmm
    if "mat1" in arguments:
        x_name, z_name, multiply = "mat1", "mat2", torch.mm
    x, z = arguments[x_name], arguments[z_name]
    total = _bilinear(multiply, x, z, moving[x_name], moving[z_name])
    total = _scaled(total, arguments.get("alpha", 1))
    db = _scaled(moving["self"], arguments.get("beta", 1))
    if db is None:
        return [total]
    if total is None:
        return [db.expand(*x.shape[:-1], z.shape[-1])]
    return [total.add_(db)]


@rule("convolution")
def convolution(call: ExecutedOp, moving: Mapping[str, Any]) -> Tangents:
    """``conv(x, w) + b``.

    The tangent of the bias goes along with that of the input or, if there is none, of the weight.
    """
    dx, dw, db = moving["input"], moving["weight"], moving["bias"]
    by_input = by_weight = None
    if dx is not None:
        by_input = call.run_with({"input": dx, "bias": db})
        db = None
    if dw is not None or db is not None:
        if dw is None:
            dw = torch.zeros_like(call.arguments["weight"])
        by_weight = call.run_with({"weight": dw, "bias": db})
    return [_sum(by_input, by_weight)]


# --- ops with a symmetric Jacobian ----------------------------------------------------------------

# Elementwise ops have a diagonal one, and a softmax has ``diag(y) − yyᵀ``.
# − x̂x̂ᵀ/M)/σ``.


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
    form = call.arguments.get("approximate", "none")
    return [aten.gelu_backward(moving["self"], call.arguments["self"], approximate=form)]


@rule("silu")
def silu(call: ExecutedOp, moving: Mapping[str, Any]) -> Tangents:
    return [aten.silu_backward(moving["self"], call.arguments["self"])]


@rule("_softmax", outputs=True)
def softmax(call: ExecutedOp, moving: Mapping[str, Any]) -> Tangents:
    y = call.outputs[0]
    dx = moving["self"].to(y.dtype)
    return [aten._softmax_backward_data(dx, y, call.arguments["dim"], y.dtype)]


# A norm, over the M features of a sample or the M entries of a channel, is y = w x̂ + b with
# x̂ = (x − μ)/σ. Of the three products that make up dy, the first is the backward kernel's, as the
# matrix in it is symmetric:
#
#     dx̂ = (dx − mean(dx) − x̂ mean(x̂ dx)) / σ = (I − 11ᵀ/M − x̂x̂ᵀ/M) dx / σ
#     dy = w dx̂ + x̂ dw + db


@rule("native_layer_norm", outputs=True)
def layer_norm(call: ExecutedOp, moving: Mapping[str, Any]) -> Tangents:
    """``w x̂ + b`` with ``x̂ = (x − μ)/σ`` within each sample."""
    arguments, (y, mean, rstd) = call.arguments, call.outputs
    # Of inputs in half precision the kernel keeps statistics in float32, and so does this.
    x, dx, dw = arguments["input"].to(mean.dtype), moving["input"], moving["weight"]
    by_input = by_weight = None
    if dx is not None:
        dx = dx.to(mean.dtype).contiguous()
        shape, only_input = arguments["normalized_shape"], (True, False, False)
        by_input, *_ = aten.native_layer_norm_backward(
            dx, x, shape, mean, rstd, None, None, only_input
        )
        if arguments["weight"] is not None:
            by_input = by_input * arguments["weight"]
    if dw is not None:
        by_weight = (x - mean) * rstd * dw
    total = _shifted(_sum(by_input, by_weight), moving["bias"], x.shape)
    if total is not None:
        total = total.to(y.dtype)
    return [total, None, None]


@rule(" ".join(ops.names(lambda row: row.batch_norm)), outputs=True)
def batch_norm(call: ExecutedOp, moving: Mapping[str, Any]) -> Tangents | None:
    """``w x̂ + b`` with ``x̂ = (x − μ)/σ`` over the batch or constant, channel by channel."""
    norm = ops.batch_norm_arguments(call.op, call.arguments)
    mean, rstd = moments(call.op, norm, call.outputs)
    x, dx, dw, db = norm.input, moving["input"], moving["weight"], moving["bias"]
    # In mixed precision, and where constant statistics move, the op's own forward mode serves.
    running = moving.get("running_mean"), moving.get("running_var")
    if x.dtype != mean.dtype or (not norm.training and running != (None, None)):
        return None
    per_channel = [1, -1, *[1] * (x.ndim - 2)]
    beside = db
    if dw is not None:
        # x̂ dw + db, without x̂ in memory
        gain = dw * rstd
        shift = -gain * mean if db is None else db - gain * mean
        beside = torch.addcmul(shift.view(per_channel), x, gain.view(per_channel))
    elif db is not None:
        beside = db.view(per_channel)
    if dx is None:
        return [_expanded(beside, x.shape), *[None] * (len(call.outputs) - 1)]
    factor = norm.weight
    if norm.training:
        saved = (None, None, None, mean, rstd, True, norm.eps)
        dx = aten.native_batch_norm_backward(dx, x, *saved, (True, False, False))[0]
    else:
        factor = rstd if factor is None else rstd * factor
    if factor is not None:
        factor = factor.view(per_channel)
    return [_scaled_sum(dx, factor, beside), *[None] * (len(call.outputs) - 1)]


def _scaled_sum(dx: Tensor, factor: Tensor | None, beside: Tensor | None) -> Tensor:
    """Return ``dx factor + beside``, in one pass through memory where both are there."""
    if factor is None:
        return dx if beside is None else dx + beside
    if beside is None:
        return dx * factor
    return torch.addcmul(beside, dx, factor)


def _expanded(t: Tensor | None, shape: torch.Size) -> Tensor | None:
    return None if t is None else t.expand(shape)


# The largest entry of a window is where it is while inputs move a little.


@rule(
    "max_pool2d_with_indices max_pool3d_with_indices adaptive_max_pool2d adaptive_max_pool3d",
    outputs=True,
)
def largest(call: ExecutedOp, moving: Mapping[str, Any]) -> Tangents:
    """Entries of the last axes, by numbers that count through them all."""
    dx, indices = moving["self"], call.outputs[1]
    axes = 3 if "3d" in call.step.name else 2
    # The numbers count through all of a plane, or of a volume.
    picked = dx.flatten(-axes).gather(-1, indices.flatten(-axes))
    return [picked.view(indices.shape), None]


@rule("unbatch::recurrent_cells", outputs=True)
def recurrent_cells(call: ExecutedOp, moving: Mapping[str, Any]) -> Tangents:
    """One layer of a recurrence; what moves beside the gates and first states adds nothing."""
    cells = Cells(*(call.arguments[name] for name in Cells._fields))
    ran = Ran(*call.outputs)
    return list(slopes(cells, ran).push(tangents_of(cells, moving)))


# --- sums of tangents, of which any may be missing ------------------------------------------------


def _sum(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    if a is None:
        return b
    if b is None:
        return a
    return a + b


def _scaled(tangent: Tensor | None, factor: float) -> Tensor | None:
    if tangent is None or factor == 1:
        return tangent
    return factor * tangent


def _shifted(total: Tensor | None, shift: Tensor | None, shape: torch.Size) -> Tensor | None:
    if shift is None:
        return total
    if total is None:
        return shift.expand(shape)
    return total + shift


def _bilinear(
    multiply: Callable[[Any, Any], Tensor],
    x: Any,
    z: Any,
    dx: Tensor | None,
    dz: Tensor | None,
) -> Tensor | None:
    """Return ``dx z + x dz``."""
    by_x = by_z = None
    if dx is not None:
        by_x = multiply(dx, z)
    if dz is not None:
        by_z = multiply(x, dz)
    return _sum(by_x, by_z)
