"""Rules for ops that compute, from the simplest on: constants, noise, elementwise families, reductions, normalisations.

Each rule states an op as a short composition of the algebra's operations.
"""

from __future__ import annotations

from typing import Any

from unbatch.analysis.domain.ownership import Ownership, collapse, expand, shared
from unbatch.analysis.rules.registry import RuleContext, pointwise, rule
from unbatch.capture import ops

# --- values from nowhere --------------------------------------------------------------------------


@rule(
    "zeros ones full empty scalar_tensor zeros_like ones_like full_like empty_like new_zeros new_ones "
    "new_full new_empty empty_strided new_empty_strided zero fill empty_permuted"
)
def constant(call: RuleContext) -> Ownership:
    """All elements equal. A tensor may be filled with the value of another."""
    arguments = ("value", "fill_value", "s")
    fills = [call[k] for k in arguments if isinstance(call[k], Ownership)]
    written = [
        repr(call[k])
        for k in arguments
        if call[k] is not None and not isinstance(call[k], Ownership)
    ]
    base = shared(
        call.shape,
        (call.name.removeprefix("new_").removesuffix("_like"), written),
        (),
        range(len(call.shape)),
    )
    return call.algebra.pointwise("fill", base, *fills) if fills else base


@rule("arange linspace logspace eye tril_indices triu_indices hann_window hamming_window")
def sequence(call: RuleContext) -> Ownership:
    return shared(call.shape, call.title)


@rule(
    "rand randn randint rand_like randn_like randint_like uniform exponential random randperm log_normal "
    "cauchy geometric normal_functional"
)
def noise(call: RuleContext) -> Ownership:
    """Fresh and identically distributed; whatever sample consumes an element, it becomes part of that sample."""
    return shared(call.shape, "noise", ["noise"], range(len(call.shape)))


@rule("bernoulli normal poisson binomial _standard_gamma _sample_dirichlet multinomial")
def shaped_noise(call: RuleContext) -> Ownership:
    """Noise whose distribution may depend on values; filled in place, what was there before does not matter."""
    a = call.algebra
    shaping = [
        call[k] for k in ("p", "mean", "std", "count", "prob") if isinstance(call[k], Ownership)
    ]
    if (
        not ops.writes_in_place(call.op)
        and isinstance(call["self"], Ownership)
        and not isinstance(call["p"], float)
    ):
        shaping.append(call["self"])
    if call.name in ("multinomial", "_sample_dirichlet"):
        last = [len(call["self"].shape) - 1]
        shaping = [collapse(a.scan(call.title, m, last), last, True) for m in shaping]
        if shaping and shaping[0].shape[:-1] == call.shape[:-1]:
            shaping = [expand(m, call.shape) for m in shaping]
    fresh = noise(call)
    return a.pointwise(call.title, fresh, *shaping) if shaping else fresh


@rule("native_dropout", "_fused_dropout")
def fused_dropout(call: RuleContext) -> Any:
    """Values kept or not, as noise says, and that noise."""
    x = call.marks[0]
    if call["train"] is False:
        return [x, shared(call.shape, "all kept", (), range(len(call.shape)))]
    mask = noise(call)
    return [call.algebra.pointwise(call.title, x, mask), mask]


# --- elementwise ----------------------------------------------------------------------------------


@rule("add", "sub", "rsub")
def addition(call: RuleContext) -> Ownership:
    if (
        call.name != "rsub"
        and not isinstance(call["other"], Ownership)
        and call["other"] == 0
        and len(call.marks) == 1
    ):
        return call.marks[0]
    plain = (
        call.name == "add" and call["alpha"] in (None, 1) and isinstance(call["other"], Ownership)
    )
    return call.algebra.pointwise(
        "add" if plain else call.title, *call.marks, kind="add" if plain else "sub"
    )


@rule(
    "mul div neg _to_copy clone detach alias positive lift_fresh lift_fresh_copy true_divide _conj "
    "view_as_real_copy to contiguous lift _lazy_clone"
)
def scaling(call: RuleContext) -> Ownership:
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


def cast(call: RuleContext, x: Ownership) -> Ownership:
    """To another floating-point type it is still the same number; to others it is not."""
    dtype = call["dtype"]
    floating = dtype is not None and dtype.is_floating_point
    return call.algebra.pointwise((call.name, repr(dtype)), x, kind="scale" if floating else "")


@rule("copy")
def overwrite(call: RuleContext) -> Ownership:
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
def elementwise(call: RuleContext) -> Any:
    return pointwise(call)


@rule("bucketize", "searchsorted", "isin")
def among(call: RuleContext) -> Ownership:
    """Each value is compared with all of a sorted list (or of a set)."""
    a = call.algebra
    x, table = (
        (call["elements"], call["test_elements"])
        if call.name == "isin"
        else (call["self"], call["boundaries"])
    )
    if call.name == "searchsorted":
        x, table = call["self"], call["sorted_sequence"]
        if isinstance(table, Ownership) and len(table.shape) > 1 and isinstance(x, Ownership):
            last = [len(table.shape) - 1]
            rows = collapse(a.scan("row", table, last), last, True)
            return a.pointwise(call.title, x, rows)
    tables = [
        collapse(a.scan("table", t, range(len(t.shape))), list(range(len(t.shape))), False)
        for t in [table]
        if isinstance(t, Ownership)
    ]
    values = [m for m in [x] if isinstance(m, Ownership)]
    return a.pointwise(call.title, *values, *tables)


@rule("glu")
def gated(call: RuleContext) -> Ownership:
    return call.algebra.scan(call.title, call["self"], call.dims(), shape=call.shape)


@rule("pow", "square", "float_power")
def power(call: RuleContext) -> Ownership:
    """Whole powers of what is mixed are still polynomials of it."""
    exponent = 2 if call.name == "square" else call["exponent"]
    whole = isinstance(exponent, int | float) and exponent == int(exponent) and exponent > 0
    return call.algebra.pointwise(call.title, *call.marks, polynomial=whole)


# --- reductions -----------------------------------------------------------------------------------
# --- normalisations -------------------------------------------------------------------------------


@rule("eq", "ne")
def comparison(call: RuleContext) -> Ownership:
    """Targets compared with the ignored label of PyTorch's losses, where it does not occur, are all alike."""
    x = call.marks[0]
    if (
        call["other"] == -100
        and not isinstance(call["other"], Ownership)
        and not call.occurs("self", -100)
    ):
        return shared(call.shape, "nothing ignored", (), range(len(call.shape)))
    return call.algebra.pointwise(call.title, x, *call.marks[1:])
