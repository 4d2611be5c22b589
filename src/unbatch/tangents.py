"""How tangents pass through one op: by the op itself where it is linear in what moves, else by its forward mode.

A rule takes the op as it ran, and the tangents of its arguments by name (None where nothing moves); it gives those of
the outputs, or None where it does not fit. Where the Jacobian of an op is symmetric, its backward kernel is the rule.
Knows ops and tensors only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._pytree import tree_leaves

from unbatch.compositions import SPELLED_OUT
from unbatch.derivatives import forward_mode, solid
from unbatch.errors import MSG_NO_TANGENT, StructureError
from unbatch.graph import Ref, Step, flat

aten = torch.ops.aten

Tangents = list[Tensor | None]


@dataclass(frozen=True)
class Ran:
    """An op as it ran: its arguments as they were given, and by name; its outputs."""

    step: Step
    args: Any
    kwargs: Any
    outs: tuple[Any, ...]

    @property
    def given(self) -> dict[str, Any]:
        return dict(zip(self.step.parameters, self.args, strict=False)) | self.kwargs

    def with_(self, other: Mapping[str, Any]) -> Any:
        """The op with some other arguments."""
        return self.step.op(**{**self.given, **other})


Rule = Callable[[Ran, Mapping[str, Any]], Tangents | None]

RULES: dict[str, Rule] = {}


def rule(names: str) -> Callable[[Rule], Rule]:
    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(names.split(), function))
        return function

    return register


@rule(
    "t transpose permute expand slice select unsqueeze squeeze clone sum mean neg alias "
    "constant_pad_nd _to_copy split split_with_sizes unbind index_select index gather roll flip diagonal cumsum "
    "avg_pool2d _adaptive_avg_pool2d avg_pool1d avg_pool3d upsample_nearest2d upsample_bilinear2d narrow detach_copy "
    "repeat movedim squeeze_ unsqueeze_ as_strided unfold im2col pixel_shuffle tril triu"
)
def linear(ran: Ran, moving: Mapping[str, Any]) -> Tangents | None:
    """Linear in its first argument."""
    (first, tangent), *others = moving.items()
    if not isinstance(tangent, Tensor) or any(t is not None for _, rest in others for t in tree_leaves(rest)):
        return None
    return flat(ran.with_({first: tangent}))


@rule("_pack_padded_sequence")
def packing(ran: Ran, moving: Mapping[str, Any]) -> Tangents:
    """Rows are moved; the counts beside them do not depend on values."""
    return [flat(ran.with_({"input": moving["input"]}))[0], None]


@rule("view _unsafe_view reshape")
def reshaping(ran: Ran, moving: Mapping[str, Any]) -> Tangents:
    """A tangent need not lie in memory as its value does."""
    shape = next(v for n, v in ran.given.items() if n != "self")
    return [moving["self"].reshape(shape)]


@rule("mm bmm dot mv")
def product(ran: Ran, moving: Mapping[str, Any]) -> Tangents:
    """Linear in each of its two arguments."""
    first, second = list(ran.given)[:2]
    return [_sum(*(ran.with_({n: moving[n]}) if moving[n] is not None else None for n in (first, second)))]


@rule("mul")
def scaling(ran: Ran, moving: Mapping[str, Any]) -> Tangents:
    x, y = ran.given["self"], ran.given["other"]
    dx, dy = moving["self"], moving.get("other")
    return [_sum(dx * y if dx is not None else None, x * dy if dy is not None else None)]


@rule("div")
def quotient(ran: Ran, moving: Mapping[str, Any]) -> Tangents | None:
    if moving["self"] is None or moving.get("other") is not None or ran.given.get("rounding_mode") is not None:
        return None
    return [moving["self"] / ran.given["other"]]


@rule("add sub")
def addition(ran: Ran, moving: Mapping[str, Any]) -> Tangents:
    dx, dy, given = moving["self"], moving.get("other"), ran.given
    alpha = given.get("alpha", 1) * (-1 if ran.step.name == "sub" else 1)
    shape = torch.broadcast_shapes(*(t.shape for t in (given["self"], given["other"]) if isinstance(t, Tensor)))
    dy = dy if dy is None or alpha == 1 else alpha * dy
    total = _sum(dx, dy)
    return [total if total is None or total.shape == shape else total.expand(shape)]


@rule("addmm baddbmm")
def affine(ran: Ran, moving: Mapping[str, Any]) -> Tangents:
    given = ran.given
    names = ("self", "mat1", "mat2") if "mat1" in given else ("self", "batch1", "batch2")
    (_, x, y), (db, dx, dy) = (given[n] for n in names), (moving[n] for n in names)
    multiply = torch.mm if "mat1" in given else torch.bmm
    total = _sum(multiply(dx, y) if dx is not None else None, multiply(x, dy) if dy is not None else None)
    alpha, beta = given.get("alpha", 1), given.get("beta", 1)
    total = total if total is None or alpha == 1 else alpha * total
    if db is not None:
        db = db if beta == 1 else beta * db
        total = db.expand(*x.shape[:-1], y.shape[-1]) if total is None else total.add_(db)
    return [total]


@rule("convolution")
def convolution(ran: Ran, moving: Mapping[str, Any]) -> Tangents:
    dx, dw, db = moving["input"], moving["weight"], moving["bias"]
    by_input = ran.with_({"input": dx, "bias": db}) if dx is not None else None
    by_weight = None
    if dw is not None or (db is not None and dx is None):
        dw = torch.zeros_like(ran.given["weight"]) if dw is None else dw
        by_weight = ran.with_({"weight": dw, "bias": db if dx is None else None})
    return [_sum(by_input, by_weight)]


@rule("embedding")
def lookup(ran: Ran, moving: Mapping[str, Any]) -> Tangents:
    """The row of the padding does not move."""
    table, padding = moving["weight"], ran.given.get("padding_idx", -1)
    if padding >= 0:
        table = table.index_fill(0, torch.tensor([padding], device=table.device), 0)
    return [ran.with_({"weight": table})]


@rule("cat stack")
def joining(ran: Ran, moving: Mapping[str, Any]) -> Tangents:
    pairs = zip(ran.given["tensors"], moving["tensors"], strict=True)
    return [ran.with_({"tensors": [torch.zeros_like(x) if dx is None else dx for x, dx in pairs]})]


# Elementwise ops, softmax and normalisations have symmetric Jacobians: pulled back is pushed forward.


@rule("relu relu_")
def relu(ran: Ran, moving: Mapping[str, Any]) -> Tangents:
    return [aten.threshold_backward(moving["self"], ran.given["self"], 0)]


@rule("tanh")
def tanh(ran: Ran, moving: Mapping[str, Any]) -> Tangents:
    return [aten.tanh_backward(moving["self"], ran.outs[0])]


@rule("sigmoid")
def sigmoid(ran: Ran, moving: Mapping[str, Any]) -> Tangents:
    return [aten.sigmoid_backward(moving["self"], ran.outs[0])]


@rule("gelu")
def gelu(ran: Ran, moving: Mapping[str, Any]) -> Tangents:
    return [aten.gelu_backward(moving["self"], ran.given["self"], approximate=ran.given.get("approximate", "none"))]


@rule("silu")
def silu(ran: Ran, moving: Mapping[str, Any]) -> Tangents:
    return [aten.silu_backward(moving["self"], ran.given["self"])]


@rule("_softmax")
def softmax(ran: Ran, moving: Mapping[str, Any]) -> Tangents:
    y = ran.outs[0]
    return [aten._softmax_backward_data(moving["self"].to(y.dtype), y, ran.given["dim"], y.dtype)]


@rule("native_layer_norm")
def layer_norm(ran: Ran, moving: Mapping[str, Any]) -> Tangents:
    given, (y, mean, rstd) = ran.given, ran.outs
    x, shape, dx = given["input"].to(mean.dtype), given["normalized_shape"], moving["input"]
    by_input = None
    if dx is not None:
        dx, only = dx.to(mean.dtype).contiguous(), (True, False, False)
        by_input = aten.native_layer_norm_backward(dx, x, shape, mean, rstd, None, None, only)[0]
        by_input = by_input if given["weight"] is None else by_input * given["weight"]
    by_scale = None if moving["weight"] is None else (x - mean) * rstd * moving["weight"]
    total = _shifted(_sum(by_input, by_scale), moving["bias"], x.shape)
    return [None if total is None else total.to(y.dtype), None, None]


@rule("native_batch_norm")
def batch_norm(ran: Ran, moving: Mapping[str, Any]) -> Tangents | None:
    given, (_, mean, rstd) = ran.given, ran.outs
    x, dx = given["input"], moving["input"]
    if not given["training"] or x.dtype != mean.dtype:
        return None
    view = [1, -1, *[1] * (x.ndim - 2)]
    by_input = None
    if dx is not None:
        kept = (None, None, None, mean, rstd, True, given["eps"])
        by_input = aten.native_batch_norm_backward(dx, x, *kept, (True, False, False))[0]
        by_input = by_input if given["weight"] is None else by_input.mul_(given["weight"].view(view))
    gain = None if moving["weight"] is None else moving["weight"] * rstd
    by_scale = None if gain is None else torch.addcmul(-(gain * mean).view(view), x, gain.view(view))
    shift = None if moving["bias"] is None else moving["bias"].view(view)
    return [_shifted(_sum(by_input, by_scale), shift, x.shape), None, None]


def _shifted(total: Tensor | None, shift: Tensor | None, shape: torch.Size) -> Tensor | None:
    if shift is None:
        return total
    return shift.expand(shape) if total is None else total + shift


def _sum(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return b if a is None else a if b is None else a + b


# --- any op ---------------------------------------------------------------------------------------


def through_op(ran: Ran, op: Any, here: Mapping[int, Tensor]) -> Tangents:
    """By forward mode of the op; where it has none, by its derivative's derivative, or by the op spelled out."""
    step = ran.step
    try:
        return _forward_mode(ran, op, here)
    except (NotImplementedError, RuntimeError) as missing:
        spelled = SPELLED_OUT.get(step.name)
        try:
            if spelled is not None:
                return _forward_mode(ran, spelled, here)
            return _twice_backward(ran, op, here)
        except (NotImplementedError, RuntimeError) as last:
            reason = missing if spelled is None else last
            place = f"{step.module or 'the model'}, {step.name}" + (f", {step.where}" if step.where else "")
            raise StructureError(MSG_NO_TANGENT.format(place=place, error=reason)) from reason


def _placed(ran: Ran, here: Mapping[int, Tensor], make: Callable[[Tensor, Tensor], Tensor]) -> Any:
    """The arguments, with ``make(value, tangent)`` where something moves; what the op writes to is copied first."""

    def both(refs: Any, values: Any) -> Any:
        if isinstance(refs, list | tuple):
            return type(refs)(both(r, v) for r, v in zip(refs, values, strict=True))
        return make(values, here[refs.index]) if isinstance(refs, Ref) and refs.index in here else values

    args = list(ran.args)
    if ran.step.op._schema.is_mutable:
        args[0] = args[0].clone()
    return both(ran.step.args, tuple(args)), {k: both(r, ran.kwargs[k]) for k, r in ran.step.kwargs.items()}


def _forward_mode(ran: Ran, op: Any, here: Mapping[int, Tensor]) -> Tangents:
    with forward_mode():
        dual = lambda x, dx: forward_ad.make_dual(x, dx.to(x.dtype))  # noqa: E731
        args, kwargs = _placed(ran, here, dual)
        outs = flat(op(*args, **kwargs))
        tangents = [forward_ad.unpack_dual(o).tangent if isinstance(o, Tensor) else None for o in outs]
        return [None if t is None else solid(t) for t in tangents]


def _twice_backward(ran: Ran, op: Any, here: Mapping[int, Tensor]) -> Tangents:
    """``J v`` as the derivative of ``Jᵀ w``, which is linear in ``w``."""
    leaves: list[tuple[Tensor, Tensor]] = []

    def leaf(x: Tensor, dx: Tensor) -> Tensor:
        leaves.append((x.detach().clone().requires_grad_(), dx))
        return leaves[-1][0]

    with torch.enable_grad():
        args, kwargs = _placed(ran, here, leaf)
        outs = flat(op(*args, **kwargs))
        live = [o for o in outs if isinstance(o, Tensor) and o.requires_grad]
        ws = [torch.zeros_like(o, requires_grad=True) for o in live]
        xs, dxs = zip(*leaves, strict=True)
        back = torch.autograd.grad(live, xs, ws, create_graph=True, allow_unused=True)
        pairs = [(g, dx) for g, dx in zip(back, dxs, strict=True) if g is not None and g.requires_grad]
        if not pairs:
            return [None for _ in outs]
        found = iter(torch.autograd.grad([g for g, _ in pairs], ws, [dx for _, dx in pairs], allow_unused=True))
        return [next(found) if isinstance(o, Tensor) and o.requires_grad else None for o in outs]
