"""Rules for ops that compute place by place: constants, noise, and elementwise functions.

Each rule states an op as a short composition of the operations of ``domain/propagation.py``. Sums
and what is made of them are in ``reductions.py``.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from unbatch.analysis.domain.ownership import SHARED, Ownership, expand, shared
from unbatch.analysis.rules.registry import (
    EVERY,
    RuleContext,
    family,
    filled,
    pointwise,
    rule,
    summary,
)
from unbatch.capture import ops

# --- values from nowhere --------------------------------------------------------------------------


FILLS = ("value", "fill_value", "s")  # arguments that say with what a tensor is filled


@rule(
    "zeros ones full empty scalar_tensor zeros_like ones_like full_like empty_like new_zeros "
    "new_ones new_full new_empty empty_strided new_empty_strided zero fill empty_permuted",
    counted="size stride physical_layout value fill_value s",
    ignored="self",
)
def constant(call: RuleContext) -> Ownership:
    """All elements equal. A tensor may be filled with the value of another."""
    fills = call.named(*FILLS)
    numbers = []
    for name in FILLS:
        value = call[name]
        if value is not None and not isinstance(value, Ownership):
            numbers.append(repr(value))
    # However a tensor of ones is made, it is the same function of nothing.
    name = call.name.removeprefix("new_").removesuffix("_like")
    base = filled(call.shape, (name, numbers))
    if not fills:
        return base
    return call.algebra.pointwise("fill", base, *fills)


@rule("arange linspace logspace eye tril_indices triu_indices hann_window hamming_window")
def sequence(call: RuleContext) -> Ownership:
    """Numbers by their index, the same for every batch but for ends that are tensors."""
    by_index = shared(call.shape, call.title)
    if not call.tensors:
        return by_index
    return call.algebra.pointwise(call.title, by_index, *call.tensors)


# What the same law is called in other forms: into a new tensor, or into one that is there.
LAWS = {
    "rand": "uniform",
    "rand_like": "uniform",
    "randn": "normal",
    "randn_like": "normal",
    "normal_functional": "normal",
    "randint": "random",
    "randint_like": "random",
}


@rule(
    "rand randn randint rand_like randn_like randint_like uniform exponential random randperm "
    "log_normal cauchy geometric normal_functional",
    counted="size self",
    ignored="self",
)
def noise(call: RuleContext) -> Ownership:
    """Fresh and identically distributed.

    Whatever sample consumes an element, it becomes part of that sample; so all elements of one law
    are alike. The law is the kind of noise, and the arguments that are not at their defaults.
    """
    return filled(call.shape, ("noise", LAWS.get(call.name, call.name)), ["noise"])


@rule(
    "bernoulli normal poisson binomial _standard_gamma _sample_dirichlet multinomial",
    ignored="self",
)
def shaped_noise(call: RuleContext) -> Ownership:
    """Noise whose distribution may depend on values."""
    shaping = call.named("p", "mean", "std", "count", "prob")
    # Filled in place, what was there before does not matter; nor does it where p is a number.
    reads_self = not ops.writes_in_place(call.op) and not isinstance(call["p"], float)
    if reads_self:
        shaping += call.named("self")
    if call.name in ("multinomial", "_sample_dirichlet"):
        # A draw depends on all probabilities of its row.
        last = [len(call["self"].shape) - 1]
        shaping = [summary(call, call.title, m, last, True) for m in shaping]
        if shaping and shaping[0].shape[:-1] == call.shape[:-1]:
            shaping = [expand(m, call.shape) for m in shaping]
    fresh = noise(call)
    if not shaping:
        return fresh
    return call.algebra.pointwise(call.title, fresh, *shaping)


@rule(*ops.names(lambda row: row.dropout and row.dropout.alone), apart={1: "input self"})
def fused_dropout(call: RuleContext) -> Any:
    """Values that noise lets through, and that noise."""
    x = call.tensors[0]
    if call["train"] is False:
        return [x, filled(call.shape, "all kept")]
    # The mask is an output of its own, read again by the backward pass.
    mask = noise(call)
    return [call.algebra.pointwise(call.title, x, mask), mask]


# --- elementwise ----------------------------------------------------------------------------------


@rule("add", "sub", "rsub", counted=EVERY)
def addition(call: RuleContext) -> Ownership:
    """A sum is followed as one, so that a loop over samples is recognised as one."""
    other = call["other"]
    is_tensor = isinstance(other, Ownership)
    # As ``sum()`` of a list begins: what is added to zero is itself.
    adds_zero = not is_tensor and other == 0 and call.name != "rsub"
    if adds_zero and len(call.tensors) == 1:
        return call.tensors[0]
    if is_tensor and call.name == "add" and call["alpha"] in (None, 1):
        for zeros, x in (call.tensors, call.tensors[::-1]):
            if _is_zero(zeros):
                return expand(x, call.shape)
        return call.algebra.pointwise("add", *call.tensors, kind="add")
    return call.algebra.pointwise(call.title, *call.tensors, kind="sub")


def _is_zero(x: Ownership) -> bool:
    """Tell whether a value was made as zeros, as a loop begins that adds up."""
    zero = filled((), ("zeros", [])).key
    return not x.statistics and bool(((x.key == zero) & (x.owner == SHARED)).all())


@rule(
    "mul div neg _to_copy clone detach alias positive lift_fresh lift_fresh_copy true_divide _conj "
    "to contiguous lift _lazy_clone",
    counted=EVERY,
)
def scaling(call: RuleContext) -> Ownership:
    """Products with factors, and copies."""
    tensors = call.tensors
    if not tensors:
        return shared(call.shape, call.title)
    by_predictions = (
        call.name == "div" and len(tensors) == 2 and "predictions" in tensors[1].sources
    )
    if by_predictions or call["rounding_mode"] is not None:
        return call.algebra.pointwise(call.title, *tensors)  # not linear
    # With a number for a factor there is one tensor, and the number is in the title.
    if len(tensors) > 1 or call.name in ("mul", "div", "neg"):
        out = call.algebra.pointwise(call.title, *tensors, kind="scale")
        divides = "div" in call.name and len(tensors) == 2 and tensors[1].grouped
        return replace(out, fold=None) if divides else out
    # A cast is noted, since one to integers is no linear function.
    if call["dtype"] is not None or call.name == "_conj":
        return cast(call, tensors[0])
    return tensors[0]


@rule("addcmul", "addcdiv", counted="value")
def added_product(call: RuleContext) -> Ownership:
    """A sum of one tensor and a product (or a quotient) of two others, times a number."""
    a, first, second = call.algebra, call["tensor1"], call["tensor2"]
    kind = "scale"
    if call.name == "addcdiv" and "predictions" in second.sources:
        kind = ""  # not linear
    product = a.pointwise((call.name, repr(call["value"])), first, second, kind=kind)
    return a.pointwise("add", call["self"], product, kind="add")


def cast(call: RuleContext, x: Ownership) -> Ownership:
    """Return ``x`` in another type: in a floating-point one it is still the same number."""
    dtype = call["dtype"]
    kind = ""
    if dtype is not None and dtype.is_floating_point:
        kind = "scale"
    return call.algebra.pointwise((call.name, repr(dtype)), x, kind=kind)


@rule("copy", ignored="self")
def overwrite(call: RuleContext) -> Ownership:
    """What was there before does not matter."""
    src = call["src"]
    families = {family(t) for t in call.types.arguments.get("src", ())}
    for target in map(family, call.types.results):
        if families and target not in families:
            # As a cast: linear where the numbers stay as they are.
            kind = "scale" if target == "floating" else ""
            src = call.algebra.pointwise(("copy", target), src, kind=kind)
    return expand(src, call.shape)


@rule(
    "dropout rrelu_with_noise rrelu_with_noise_functional complex polar "
    "log_sigmoid_forward prelu _prelu_kernel softplus_backward elu_backward leaky_relu_backward "
    "hardtanh_backward hardswish hardswish_backward log_sigmoid_backward hardsigmoid_backward "
    "mish_backward quantize_per_tensor dequantize fake_quantize_per_tensor_affine_cachemask celu "
    "softshrink softshrink_backward isclose real imag threshold special_erf nan_to_num "
    "frexp erfinv logit lgamma where masked_fill clamp xlogy copysign hardshrink "
    "hardshrink_backward",
    counted=EVERY,
)
def elementwise(call: RuleContext) -> Any:
    """Elementwise functions that lack PyTorch's tag for them."""
    return pointwise(call)


@rule("bucketize", "searchsorted", "isin")
def among(call: RuleContext) -> Ownership:
    """Each value is compared with all of a sorted list (or of a set)."""
    x, table = _value_and_table(call)
    tensors = [m for m in (x, table) if isinstance(m, Ownership)]
    if not isinstance(table, Ownership):
        return call.algebra.pointwise(call.title, *tensors)
    # Sorted lists row by row belong to the rows of the values; any other is read as a whole.
    by_row = call.name == "searchsorted" and len(table.shape) > 1 and isinstance(x, Ownership)
    if by_row:
        last = [len(table.shape) - 1]
        tensors[-1] = summary(call, "row", table, last, True)
    else:
        tensors[-1] = summary(call, "table", table, range(len(table.shape)))
    return call.algebra.pointwise(call.title, *tensors)


def _value_and_table(call: RuleContext) -> tuple[Any, Any]:
    """What is compared, and the list it is compared with; each may be a number."""
    if call.name == "isin":
        return call["elements"], call["test_elements"]
    if call.name == "searchsorted":
        return call["self"], call["sorted_sequence"]
    return call["self"], call["boundaries"]


@rule("glu")
def gated(call: RuleContext) -> Ownership:
    """One half of the entries along an axis gates the other."""
    return call.algebra.scan(call.title, call["self"], call.dims(), shape=call.shape)


@rule("glu_jvp")
def gated_tangent(call: RuleContext) -> Ownership:
    """The tangent of ``glu``: of its result, and of both halves of the entries along an axis."""
    halves = [
        call.algebra.scan(call.title, m, call.dims(of="x"), shape=call.shape)
        for m in call.named("x", "dx")
    ]
    return call.algebra.pointwise(call.title, call["glu"], *halves)


@rule("pow", "square", "float_power")
def power(call: RuleContext) -> Ownership:
    """Whole powers of what is mixed are still polynomials of it."""
    exponent = 2 if call.name == "square" else call["exponent"]
    whole = False
    if isinstance(exponent, int | float) and math.isfinite(exponent):
        # 2.0 is whole as well; 0.5 and -1 are not.
        whole = exponent == int(exponent) and exponent > 0
    return call.algebra.pointwise(call.title, *call.tensors, polynomial=whole)
