"""Rules for ops that compute, from the simplest on: constants, noise, elementwise families, reductions, normalisations.

Each rule states an op as a short composition of the algebra's operations.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from unbatch import ops
from unbatch.labels import Marks, collapse, expand, reshape, shared, squeeze
from unbatch.rules import Call, numbered, pointwise, rule

# --- values from nowhere --------------------------------------------------------------------------


@rule(
    "zeros ones full empty scalar_tensor zeros_like ones_like full_like empty_like new_zeros new_ones "
    "new_full new_empty empty_strided new_empty_strided zero fill empty_permuted"
)
def constant(call: Call) -> Marks:
    """All elements equal. A tensor may be filled with the value of another."""
    arguments = ("value", "fill_value", "s")
    fills = [call[k] for k in arguments if isinstance(call[k], Marks)]
    written = [repr(call[k]) for k in arguments if call[k] is not None and not isinstance(call[k], Marks)]
    base = shared(
        call.shape,
        (call.name.removeprefix("new_").removesuffix("_like"), written),
        (),
        range(len(call.shape)),
    )
    return call.algebra.pointwise("fill", base, *fills) if fills else base


@rule("arange linspace logspace eye tril_indices triu_indices hann_window hamming_window")
def sequence(call: Call) -> Marks:
    return shared(call.shape, call.title)


@rule(
    "rand randn randint rand_like randn_like randint_like uniform exponential random randperm log_normal "
    "cauchy geometric normal_functional"
)
def noise(call: Call) -> Marks:
    """Fresh and identically distributed; whatever sample consumes an element, it becomes part of that sample."""
    return shared(call.shape, "noise", ["noise"], range(len(call.shape)))


@rule("bernoulli normal poisson binomial _standard_gamma _sample_dirichlet multinomial")
def shaped_noise(call: Call) -> Marks:
    """Noise whose distribution may depend on values; filled in place, what was there before does not matter."""
    a = call.algebra
    shaping = [call[k] for k in ("p", "mean", "std", "count", "prob") if isinstance(call[k], Marks)]
    if not ops.writes_in_place(call.op) and isinstance(call["self"], Marks) and not isinstance(call["p"], float):
        shaping.append(call["self"])
    if call.name in ("multinomial", "_sample_dirichlet"):
        last = [len(call["self"].shape) - 1]
        shaping = [collapse(a.scan(call.title, m, last), last, True) for m in shaping]
        if shaping and shaping[0].shape[:-1] == call.shape[:-1]:
            shaping = [expand(m, call.shape) for m in shaping]
    fresh = noise(call)
    return a.pointwise(call.title, fresh, *shaping) if shaping else fresh


@rule("native_dropout", "_fused_dropout")
def fused_dropout(call: Call) -> Any:
    """Values kept or not, as noise says, and that noise."""
    x = call.marks[0]
    if call["train"] is False:
        return [x, shared(call.shape, "all kept", (), range(len(call.shape)))]
    mask = noise(call)
    return [call.algebra.pointwise(call.title, x, mask), mask]


# --- elementwise ----------------------------------------------------------------------------------


@rule("add", "sub", "rsub")
def addition(call: Call) -> Marks:
    if call.name != "rsub" and not isinstance(call["other"], Marks) and call["other"] == 0 and len(call.marks) == 1:
        return call.marks[0]
    plain = call.name == "add" and call["alpha"] in (None, 1) and isinstance(call["other"], Marks)
    return call.algebra.pointwise("add" if plain else call.title, *call.marks, kind="add" if plain else "sub")


@rule(
    "mul div neg _to_copy clone detach alias positive lift_fresh lift_fresh_copy true_divide _conj "
    "view_as_real_copy to contiguous lift _lazy_clone"
)
def scaling(call: Call) -> Marks:
    marks = call.marks
    if not marks:
        return shared(call.shape, call.title)
    if call.name == "div" and len(marks) == 2 and "predictions" in marks[1].sources:
        return call.algebra.pointwise(call.title, *marks)
    if call["rounding_mode"] is not None:
        return call.algebra.pointwise(call.title, *marks)
    if len(marks) == 1 and call.name not in ("mul", "div", "neg"):
        return marks[0] if call["dtype"] is None and call.name != "_conj" else cast(call, marks[0])
    return call.algebra.pointwise(call.title, *marks, kind="scale")


def cast(call: Call, x: Marks) -> Marks:
    """To another floating-point type it is still the same number; to others it is not."""
    dtype = call["dtype"]
    floating = dtype is not None and dtype.is_floating_point
    return call.algebra.pointwise((call.name, repr(dtype)), x, kind="scale" if floating else "")


@rule("copy")
def overwrite(call: Call) -> Marks:
    return expand(call["src"], call.shape)


@rule(
    "dropout rrelu_with_noise rrelu_with_noise_functional complex polar "
    "view_as_complex_copy log_sigmoid_forward prelu _prelu_kernel softplus_backward elu_backward "
    "leaky_relu_backward hardtanh_backward hardswish hardswish_backward log_sigmoid_backward "
    "hardsigmoid_backward mish_backward quantize_per_tensor dequantize "
    "fake_quantize_per_tensor_affine_cachemask celu softshrink softshrink_backward isclose real imag "
    "threshold glu_jvp special_erf nan_to_num frexp erfinv logit lgamma where masked_fill "
    "clamp xlogy special_log_softmax"
)
def elementwise(call: Call) -> Any:
    return pointwise(call)


@rule("bucketize", "searchsorted", "isin")
def among(call: Call) -> Marks:
    """Each value is compared with all of a sorted list (or of a set)."""
    a = call.algebra
    x, table = (call["elements"], call["test_elements"]) if call.name == "isin" else (call["self"], call["boundaries"])
    if call.name == "searchsorted":
        x, table = call["self"], call["sorted_sequence"]
        if isinstance(table, Marks) and len(table.shape) > 1 and isinstance(x, Marks):
            last = [len(table.shape) - 1]
            rows = collapse(a.scan("row", table, last), last, True)
            return a.pointwise(call.title, x, rows)
    tables = [
        collapse(a.scan("table", t, range(len(t.shape))), list(range(len(t.shape))), False)
        for t in [table]
        if isinstance(t, Marks)
    ]
    values = [m for m in [x] if isinstance(m, Marks)]
    return a.pointwise(call.title, *values, *tables)


@rule("glu")
def gated(call: Call) -> Marks:
    return call.algebra.scan(call.title, call["self"], call.dims(), shape=call.shape)


@rule("pow", "square", "float_power")
def power(call: Call) -> Marks:
    """Whole powers of what is mixed are still polynomials of it."""
    exponent = 2 if call.name == "square" else call["exponent"]
    whole = isinstance(exponent, int | float) and exponent == int(exponent) and exponent > 0
    bent = set(call.algebra.bent)
    out = call.algebra.pointwise(call.title, *call.marks)
    call.algebra.bent = bent if whole else call.algebra.bent
    return out


# --- reductions -----------------------------------------------------------------------------------


@rule("sum mean amax amin prod logsumexp any all nansum nanmean norm linalg_vector_norm count_nonzero")
def monoid(call: Call) -> Marks:
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
def moments(call: Call) -> Any:
    x, dims, keepdim = call["self"], call.dims(), bool(call["keepdim"])
    first = call.algebra.reduce((call.name, repr(call["correction"]), repr(call["unbiased"])), x, dims, keepdim)
    return [first, call.algebra.reduce("mean", x, dims, keepdim)] if call.name.endswith("_mean") else first


@rule("max min median nanmedian mode kthvalue aminmax argmax argmin")
def selection(call: Call) -> Any:
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
def ordering(call: Call) -> Any:
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
        (call.name, repr(call["descending"] or call["largest"])), x, [dim], True, long=call["k"] is None
    )
    stored = list(whole.key.shape)
    values = replace(whole, shape=call.shape, owner=whole.owner.reshape(stored), key=whole.key.reshape(stored))
    return numbered([values, places])[-len(call.shapes) :]


@rule("cumsum cumprod cummax cummin logcumsumexp _fft_r2c _fft_c2r _fft_c2c diff")
def ordered(call: Call) -> Any:
    dims = call.dims() if call["dim"] is not None else [0]
    return numbered([call.algebra.scan(call.title, call["self"], dims, shape=s) for s in call.shapes])


@rule("_softmax _log_softmax _safe_softmax softmax log_softmax")
def softmax(call: Call) -> Marks:
    x = call["self"]
    if not x.shape:
        return call.algebra.pointwise(call.name, x)
    return call.algebra.pointwise(call.name, x, call.algebra.reduce("logsumexp", x, call.dims(), True, monoid=True))


@rule("_softmax_backward_data", "_log_softmax_backward_data")
def softmax_backward(call: Call) -> Marks:
    a = call.algebra
    product = a.pointwise("mul", call["grad_output"], call["output"])
    return a.pointwise(
        call.name, call["grad_output"], call["output"], a.reduce("sum", product, call.dims(of="output"), True)
    )


# --- normalisations -------------------------------------------------------------------------------


def channelwise(call: Call, name: Any, x: Marks, *channels: Marks | None) -> Marks:
    """An elementwise function of ``x`` and of vectors along its second dim."""
    trailing = [1] * (len(x.shape) - 2)
    return call.algebra.pointwise(name, x, *(reshape(p, (*p.shape, *trailing)) for p in channels if p is not None))


@rule("native_layer_norm _fused_rms_norm layer_norm rms_norm")
def layer_norm(call: Call) -> Any:
    a, x = call.algebra, call["input"]
    dims = range(len(x.shape) - len(call["normalized_shape"]), len(x.shape))
    names = ["mean", "var"] if "layer" in call.name else ["mean square"]
    spread = [a.reduce(name, x, dims, True) for name in names]
    affine = [p for p in (call["weight"], call["bias"]) if p is not None]
    return numbered([a.pointwise((call.name, call["eps"]), x, *spread, *affine), *spread[: len(call.shapes) - 1]])


@rule("native_group_norm", "group_norm")
def group_norm(call: Call) -> Any:
    a, x = call.algebra, call["input"]
    groups = call["group"]
    parts = reshape(x, (x.shape[0], groups, math.prod(x.shape[1:]) // groups))
    spread = [a.reduce(name, parts, [2], True) for name in ("mean", "var")]
    y = reshape(a.pointwise((call.name, call["eps"]), parts, *spread), x.shape)
    y = channelwise(call, "affine", y, call["weight"], call["bias"])
    return numbered([y, *(squeeze(s, [2]) for s in spread[: len(call.shapes) - 1])])


@rule(*ops.names(lambda row: row.batch_norm))
def batch_norm(call: Call) -> Any:
    """Statistics over all dims but the second; whether they mix samples is for the marks to say."""
    norm, outputs = ops.batch_norm_arguments(call.op, call.arguments), ops.traits(call.op).batch_norm
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


def _batch_moments(call: Call) -> list[Marks]:
    x = call["input"]
    dims = [d for d in range(len(x.shape)) if d != 1]
    return [call.algebra.reduce(name, x, dims) for name in ("mean", "var")]


def running_statistics(call: Call) -> dict[str, Marks]:
    """Return what a training batch norm leaves in its running statistics."""
    out = {}
    for name, moment in zip(ops.RUNNING, _batch_moments(call), strict=True):
        if call[name] is not None:
            out[name] = call.algebra.pointwise("momentum", call[name], moment)
    return out


@rule("eq", "ne")
def comparison(call: Call) -> Marks:
    """Targets compared with the ignored label of PyTorch's losses, where it does not occur, are all alike."""
    x = call.marks[0]
    if call["other"] == -100 and not isinstance(call["other"], Marks) and not call.occurs("self", -100):
        return shared(call.shape, "nothing ignored", (), range(len(call.shape)))
    return call.algebra.pointwise(call.title, x, *call.marks[1:])
