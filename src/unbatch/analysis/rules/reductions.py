"""Rules for reductions and layers made of them: sums, sorting, softmax, normalisation.

Index letters: n sample (here: any leading dim), c channel.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from unbatch.analysis.domain.ownership import Ownership, reshape, spell_out, squeeze, with_one
from unbatch.analysis.rules.elementwise import cast
from unbatch.analysis.rules.registry import (
    EVERY,
    RuleContext,
    all_mixed,
    numbered,
    pointwise,
    rule,
    shared_outputs,
    summary,
)
from unbatch.capture import ops

# --- reductions -----------------------------------------------------------------------------------


@rule(
    "sum mean amax amin prod logsumexp any all nansum nanmean norm linalg_vector_norm "
    "count_nonzero",
    counted="dim keepdim",
)
def monoid(call: RuleContext) -> Ownership:
    """Reductions that can be taken sample by sample first."""
    x = call["self"]
    if call["dtype"] is not None:
        x = cast(call, x)
    linear = call.name in ("sum", "mean")
    name: Any = call.name
    if not linear:
        # Norms of another order are other functions.
        order = call["p"] if call["ord"] is None else call["ord"]
        name = (call.name, repr(order))
    if x.shape:
        return call.algebra.reduce(name, x, call.dims(), bool(call["keepdim"]), monoid=True)
    if linear:
        return x
    return call.algebra.pointwise(name, x)


@rule("var std var_mean std_mean", counted="dim keepdim")
def moments(call: RuleContext) -> Any:
    """Functions of all elements at once, in no order."""
    x, dims, keepdim = call["self"], call.dims(), bool(call["keepdim"])
    name = (call.name, repr(call["correction"]), repr(call["unbiased"]))
    # No monoid: the variance over a batch is not made of the variances within its samples.
    spread = call.algebra.reduce(name, x, dims, keepdim)
    if not call.name.endswith("_mean"):
        return spread
    return [spread, call.algebra.reduce("mean", x, dims, keepdim)]


@rule("max min median nanmedian mode kthvalue aminmax argmax argmin", counted="dim keepdim")
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
    position_only = call.name.startswith("arg")
    if len(call.shapes) == 1 and not position_only:
        return values
    # The position knows the order: over the samples it is mixed.
    positions = summary(call, title, x, dims, keepdim, "position")
    if position_only:
        return positions
    return numbered([values, positions])


@rule("sort topk msort argsort", counted="dim")
def ordering(call: RuleContext) -> Any:
    """Sorted over the samples, values are symmetric in them, and as many as samples.

    The order itself, which says where each value was, is not symmetric.
    """
    a, x, all_values = call.algebra, call["self"], call["k"] is None
    if not x.shape:
        return numbered([a.pointwise(call.title, x)] * len(call.shapes))
    # Unless it is said, along the last dim.
    dim = len(x.shape) - 1
    if call.name == "msort":
        dim = 0
    elif call["dim"] is not None:
        dim = call.dims()[0]
    name = (call.name, repr(call["descending"]))
    how = "order" if all_values else "position"
    positions = a.scan(name, x, [dim], how, shape=call.shapes[-1])
    if not x.owner_varies(dim):
        # Within a sample the order is the sample's own affair.
        return _scanned(call, [dim])
    if call["sorted"] is False:
        # In an order that depends on that of the samples.
        return all_mixed(call, "order")
    # All samples as one statistic: as many numbers as entries for ``sort``, k of them for ``topk``.
    name = (call.name, repr(call["descending"] or call["largest"]))
    # Each rank has a key of its own, so that those that are used can be counted.
    values = replace(a.reduce(name, x, [dim], True, long=True), shape=call.shape)
    values = replace(spell_out(values, [dim]), ranked=1)
    return numbered([values, positions])[-len(call.shapes) :]


@rule(
    "cumsum cumprod cummax cummin logcumsumexp _fft_r2c _fft_c2r _fft_c2c diff fft_fft fft_ifft "
    "fft_rfft fft_irfft fft_hfft fft_ihfft",
    counted="dim",
)
def ordered(call: RuleContext) -> Any:
    """Functions along an axis that know the order."""
    if call["dim"] is None:
        return _scanned(call, [0])
    return _scanned(call, call.dims())


def _scanned(call: RuleContext, dims: list[int]) -> list[Ownership]:
    """Every output along ``dims`` as a function of all inputs there."""
    x = call["self"]
    outs = [call.algebra.scan(call.title, x, dims, shape=shape) for shape in call.shapes]
    if x.ranked:
        # One number for each rank, or as many: with keys of their own they are counted.
        stored = [d for d in dims if x.key.shape[d] > 1]
        outs = [replace(spell_out(out, stored), ranked=x.ranked) for out in outs]
    return numbered(outs)


@rule("segment_reduce", counted="axis")
def segments(call: RuleContext) -> Ownership:
    """Reductions of runs along an axis, which lengths or offsets mark: any entry may be in any."""
    a, data, axis = call.algebra, call["data"], call["axis"]
    out = a.scan("run", data, [axis])
    for m in call.named("lengths", "offsets"):
        runs = a.scan("run", m, [axis])
        runs = replace(runs, shape=with_one(runs.shape, [axis]))
        runs = reshape(runs, (*runs.shape, *[1] * (len(data.shape) - len(runs.shape))))
        out = replace(out, shape=with_one(out.shape, [axis]))
        out = a.pointwise(call.title, out, runs)
    return replace(out, shape=tuple(call.shape))


@rule(
    "_softmax _log_softmax _safe_softmax softmax log_softmax special_log_softmax",
    counted="dim half_to_float",
)
def softmax(call: RuleContext) -> Ownership:
    """An elementwise function of an entry and of the logsumexp of all."""
    a, x = call.algebra, call["self"]
    if not x.shape:
        return a.pointwise(call.name, x)
    # Not by the maximum and a sum, as kernels do: one statistic instead of two.
    normalisation = a.reduce("logsumexp", x, call.dims(), True, monoid=True)
    return a.pointwise(call.name, x, normalisation)


@rule("_softmax_backward_data", "_log_softmax_backward_data", counted="dim input_dtype")
def softmax_backward(call: RuleContext) -> Ownership:
    """The vjp of a softmax ``s`` is ``s * (g - sum(g * s))``."""
    a, g, s = call.algebra, call["grad_output"], call["output"]
    # A sum within the sample, as the softmax is over classes or positions.
    inner = a.reduce("sum", a.pointwise("mul", g, s), call.dims(of="output"), True)
    return a.pointwise(call.name, g, s, inner)


# --- normalisations -------------------------------------------------------------------------------


def channelwise(
    call: RuleContext, name: Any, x: Ownership, *channels: Ownership | None
) -> Ownership:
    """Return an elementwise function of ``x`` and of vectors along its second dim."""
    ones = [1] * (len(x.shape) - 2)
    # [c] as [c, 1, ..], which broadcasting aligns with the dims behind the first.
    vectors = [reshape(vector, (*vector.shape, *ones)) for vector in channels if vector is not None]
    return call.algebra.pointwise(name, x, *vectors)


@rule(
    "native_layer_norm _fused_rms_norm layer_norm rms_norm",
    counted="normalized_shape",
    apart={1: "weight bias", 2: "weight bias"},
)
def layer_norm(call: RuleContext) -> Any:
    """Moments over the last dims."""
    a, x = call.algebra, call["input"]
    dims = range(len(x.shape) - len(call["normalized_shape"]), len(x.shape))
    if "layer" in call.name:
        spread = [a.reduce("mean", x, dims, True), a.reduce("var", x, dims, True)]
    else:
        spread = [a.reduce("mean square", x, dims, True)]
    y = a.pointwise((call.name, call["eps"]), x, *spread, *call.named("weight", "bias"))
    return numbered([y, *spread[: len(call.shapes) - 1]])


@rule(
    "native_group_norm",
    "group_norm",
    counted="N C HxW group",
    apart={1: "weight bias", 2: "weight bias"},
)
def group_norm(call: RuleContext) -> Any:
    """Moments over groups of channels and all positions of a sample."""
    a, x, groups = call.algebra, call["input"], call["group"]
    # Groups and positions become dims of their own, so that moments are over the last alone.
    parts = reshape(x, (x.shape[0], groups, math.prod(x.shape[1:]) // groups))
    spread = [a.reduce("mean", parts, [2], True), a.reduce("var", parts, [2], True)]
    y = reshape(a.pointwise((call.name, call["eps"]), parts, *spread), x.shape)
    y = channelwise(call, "affine", y, call["weight"], call["bias"])
    by_group = [squeeze(m, [2]) for m in spread]
    return numbered([y, *by_group[: len(call.shapes) - 1]])


@rule(
    *ops.names(lambda row: row.batch_norm),
    ignored="running_mean running_var",
    apart=dict.fromkeys(range(1, 6), EVERY),
)
def batch_norm(call: RuleContext) -> Any:
    """Moments over all dims but the second; whether samples mix there shows in their owners."""
    norm = ops.batch_norm_arguments(call.op, call.arguments)
    outputs = ops.traits(call.op).batch_norm
    assert outputs is not None  # the rule is registered for batch norms
    results = shared_outputs(call, "unused")
    if not norm.training:
        title, spread = "batch_norm in eval", [norm.running_mean, norm.running_var]
    else:
        title, spread = "batch_norm", _batch_moments(call)
        if outputs.mean is not None and outputs.invstd is not None:
            results[outputs.mean], results[outputs.invstd] = spread
    results[0] = channelwise(call, (title, norm.eps), norm.input, *spread, norm.weight, norm.bias)
    after = {}
    if norm.training and outputs.running:
        after = running_statistics(call)
    # Most variants write running statistics in place; these return them, changed or not.
    for place, name in zip(outputs.running, ops.RUNNING, strict=False):
        results[place] = after.get(name, call[name])
    return results


def _batch_moments(call: RuleContext) -> list[Ownership]:
    """Mean and variance of each channel: batch statistics, if samples are among the other dims."""
    x = call["input"]
    dims = [0, *range(2, len(x.shape))]
    return [call.algebra.reduce("mean", x, dims), call.algebra.reduce("var", x, dims)]


def running_statistics(call: RuleContext) -> dict[str, Ownership]:
    """Return what a training batch norm leaves in its running statistics."""
    after = {}
    # The old value and the new one, weighted by the momentum; without running statistics, nothing.
    for name, moment in zip(ops.RUNNING, _batch_moments(call), strict=True):
        if call[name] is not None:
            after[name] = call.algebra.pointwise("momentum", call[name], moment)
    return after
