"""Rules of reductions and of layers that are made of them: sums, sorting, softmax, normalisation."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from unbatch.analysis.domain.ownership import Ownership, collapse, reshape, shared, squeeze
from unbatch.analysis.rules.elementwise import cast
from unbatch.analysis.rules.registry import RuleContext, numbered, pointwise, rule
from unbatch.capture import ops


@rule(
    "sum mean amax amin prod logsumexp any all nansum nanmean norm linalg_vector_norm count_nonzero"
)
def monoid(call: RuleContext) -> Ownership:
    """Reductions that can be taken sample by sample first."""
    x = call["self"]
    if call["dtype"] is not None:
        x = cast(call, x)
    name: Any = (
        call.name
        if call.name in ("sum", "mean")
        else (call.name, repr(call["ord"] if call["ord"] is not None else call["p"]))
    )
    if not x.shape:
        return x if name in ("sum", "mean") else call.algebra.pointwise(name, x)
    return call.algebra.reduce(name, x, call.dims(), bool(call["keepdim"]), monoid=True)


@rule("var std var_mean std_mean")
def moments(call: RuleContext) -> Any:
    x, dims, keepdim = call["self"], call.dims(), bool(call["keepdim"])
    first = call.algebra.reduce(
        (call.name, repr(call["correction"]), repr(call["unbiased"])), x, dims, keepdim
    )
    return (
        [first, call.algebra.reduce("mean", x, dims, keepdim)]
        if call.name.endswith("_mean")
        else first
    )


@rule("max min median nanmedian mode kthvalue aminmax argmax argmin")
def selection(call: RuleContext) -> Any:
    """The extreme or middle value; its *position* is no symmetric function of the samples."""
    x = call["self"]
    if call["other"] is not None:
        return pointwise(call)
    if not x.shape:
        return numbered([call.algebra.pointwise(call.title, x)] * len(call.shapes))
    dims, keepdim = call.dims(), bool(call["keepdim"])
    title = (call.name, call["k"])
    values = call.algebra.reduce(title, x, dims, keepdim, monoid=call.name in ("max", "min"))
    if call.name == "aminmax":
        return [values, values.with_key("max")]
    if len(call.shapes) == 1 and not call.name.startswith("arg"):
        return values
    places = collapse(call.algebra.scan(title, x, dims, "position"), dims, keepdim)
    return places if call.name.startswith("arg") else numbered([values, places])


@rule("sort topk msort argsort")
def ordering(call: RuleContext) -> Any:
    """Sorted over the samples, values are symmetric in them (and as many as samples); the order itself is not."""
    x = call["self"]
    if not x.shape:
        return numbered([call.algebra.pointwise(call.title, x)] * len(call.shapes))
    dim = call.dims()[0] if call["dim"] is not None else len(x.shape) - 1
    places = call.algebra.scan(
        (call.name, repr(call["descending"])),
        x,
        [dim],
        "order" if call["k"] is None else "position",
        shape=call.shapes[-1],
    )
    if not x.owner_varies(dim):
        return numbered([call.algebra.scan(call.title, x, [dim], shape=s) for s in call.shapes])
    whole = call.algebra.reduce(
        (call.name, repr(call["descending"] or call["largest"])),
        x,
        [dim],
        True,
        long=call["k"] is None,
    )
    stored = list(whole.key.shape)
    values = replace(
        whole, shape=call.shape, owner=whole.owner.reshape(stored), key=whole.key.reshape(stored)
    )
    return numbered([values, places])[-len(call.shapes) :]


@rule("cumsum cumprod cummax cummin logcumsumexp _fft_r2c _fft_c2r _fft_c2c diff")
def ordered(call: RuleContext) -> Any:
    dims = call.dims() if call["dim"] is not None else [0]
    return numbered(
        [call.algebra.scan(call.title, call["self"], dims, shape=s) for s in call.shapes]
    )


@rule("_softmax _log_softmax _safe_softmax softmax log_softmax")
def softmax(call: RuleContext) -> Ownership:
    x = call["self"]
    if not x.shape:
        return call.algebra.pointwise(call.name, x)
    return call.algebra.pointwise(
        call.name, x, call.algebra.reduce("logsumexp", x, call.dims(), True, monoid=True)
    )


@rule("_softmax_backward_data", "_log_softmax_backward_data")
def softmax_backward(call: RuleContext) -> Ownership:
    a = call.algebra
    product = a.pointwise("mul", call["grad_output"], call["output"])
    return a.pointwise(
        call.name,
        call["grad_output"],
        call["output"],
        a.reduce("sum", product, call.dims(of="output"), True),
    )


def channelwise(
    call: RuleContext, name: Any, x: Ownership, *channels: Ownership | None
) -> Ownership:
    """An elementwise function of ``x`` and of vectors along its second dim."""
    trailing = [1] * (len(x.shape) - 2)
    return call.algebra.pointwise(
        name, x, *(reshape(p, (*p.shape, *trailing)) for p in channels if p is not None)
    )


@rule("native_layer_norm _fused_rms_norm layer_norm rms_norm")
def layer_norm(call: RuleContext) -> Any:
    a, x = call.algebra, call["input"]
    dims = range(len(x.shape) - len(call["normalized_shape"]), len(x.shape))
    names = ["mean", "var"] if "layer" in call.name else ["mean square"]
    spread = [a.reduce(name, x, dims, True) for name in names]
    affine = [p for p in (call["weight"], call["bias"]) if p is not None]
    return numbered(
        [
            a.pointwise((call.name, call["eps"]), x, *spread, *affine),
            *spread[: len(call.shapes) - 1],
        ]
    )


@rule("native_group_norm", "group_norm")
def group_norm(call: RuleContext) -> Any:
    a, x = call.algebra, call["input"]
    groups = call["group"]
    parts = reshape(x, (x.shape[0], groups, math.prod(x.shape[1:]) // groups))
    spread = [a.reduce(name, parts, [2], True) for name in ("mean", "var")]
    y = reshape(a.pointwise((call.name, call["eps"]), parts, *spread), x.shape)
    y = channelwise(call, "affine", y, call["weight"], call["bias"])
    return numbered([y, *(squeeze(s, [2]) for s in spread[: len(call.shapes) - 1])])


@rule(*ops.names(lambda row: row.batch_norm))
def batch_norm(call: RuleContext) -> Any:
    """Statistics over all dims but the second; whether they mix samples is for the marks to say."""
    norm, outputs = (
        ops.batch_norm_arguments(call.op, call.arguments),
        ops.traits(call.op).batch_norm,
    )
    assert outputs is not None
    out = [shared(shape, "unused") for shape in call.shapes]
    moments_, title = [norm.running_mean, norm.running_var], "batch_norm in eval"
    if norm.training:
        moments_, title = _batch_moments(call), "batch_norm"
    out[0] = channelwise(call, (title, norm.eps), norm.input, *moments_, norm.weight, norm.bias)
    if norm.training and outputs.mean is not None and outputs.invstd is not None:
        out[outputs.mean], out[outputs.invstd] = moments_
    after = running_statistics(call) if norm.training and outputs.running else {}
    for place, name in zip(outputs.running, ops.RUNNING, strict=False):
        out[place] = after.get(name, call[name])
    return out


def _batch_moments(call: RuleContext) -> list[Ownership]:
    x = call["input"]
    dims = [d for d in range(len(x.shape)) if d != 1]
    return [call.algebra.reduce(name, x, dims) for name in ("mean", "var")]


def running_statistics(call: RuleContext) -> dict[str, Ownership]:
    """Return what a training batch norm leaves in its running statistics."""
    out = {}
    for name, moment in zip(ops.RUNNING, _batch_moments(call), strict=True):
        if call[name] is not None:
            out[name] = call.algebra.pointwise("momentum", call[name], moment)
    return out
