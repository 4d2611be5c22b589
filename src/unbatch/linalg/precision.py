"""How far numbers that should be equal may be apart, by floating-point type and purpose; and the
same in float64.

Every tolerance that decides whether something is believed stands here, with the reason for its
size. What is measured on the spot (how much one rounding of the inputs changes the outputs) stays
where it is measured.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

# --- the same in float64 --------------------------------------------------------------------------


NARROW = (torch.float32, torch.bfloat16, torch.float16)


def in_double(tree: Any) -> Any:
    """Return a tensor, or a tree with tensors in it, in float64 where it is in a narrower real
    type.
    """

    def one(t: Any) -> Any:
        if isinstance(t, Tensor) and t.dtype in NARROW:
            return t.double()
        return t

    if isinstance(tree, Tensor):  # tree_map takes as long for a leaf as the conversion
        return one(tree)
    return tree_map(one, tree)


def double_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return float64 for a narrower real type, and any other type as it is."""
    if dtype in NARROW:
        return torch.float64
    return dtype


# --- sizes ----------------------------------------------------------------------------------------


def largest(tensors: Iterable[Tensor]) -> float:
    """Return the largest magnitude of an entry, 0.0 where there is none.

    Not a number where one of them is not, wherever it stands: of Python's ``max`` that would depend
    on the order. A test that accepts has to be written so that it fails for such a size.
    """
    size = 0.0
    for t in tensors:
        if not t.numel():
            continue
        here = float(t.detach().abs().max())
        if here > size or math.isnan(here):
            size = here
        if math.isnan(size):
            break
    return size


# --- by floating-point type -----------------------------------------------------------------------


# Relative errors of a gradient, or of a product with a Hessian, that rounding explains. Passes
# through deep nets lose about half of the digits of float64 at worst, and ill-conditioned batch
# norms as many of float32; a wrong plan is off by 1e-2 and more.
DOUBLE, SINGLE = 1e-8, 2e-3


class Purpose(NamedTuple):
    """A tolerance for each type, and for floating-point types that are not listed."""

    by_dtype: Mapping[torch.dtype, float]
    other: float


# Gradients against gradients. Of half precision little more than the order of magnitude can be
# told.
BACKWARD = Purpose(
    {
        torch.float64: DOUBLE,
        torch.complex128: DOUBLE,
        torch.float32: SINGLE,
        torch.complex64: SINGLE,
    },
    0.3,
)


# Predictions against predictions when other samples change. Kernels pick other orders of summation
# for other numbers: some hundred roundings each. Types that are not listed are left to the rounding
# that is measured on the inputs.
FORWARD = Purpose(
    {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 5e-2},
    other=1e-9,
)


# The same for a model that was copied to float64: nothing in it has been rounded to a coarser type.
FORWARD_IN_DOUBLE = 1e-11


def tolerance(dtypes: Iterable[torch.dtype], purpose: Purpose) -> float:
    """Return the tolerance by the coarsest floating-point type; that of float64 where there is
    none.
    """
    worst = purpose.by_dtype[torch.float64]
    for dtype in dtypes:
        if dtype.is_floating_point or dtype.is_complex:
            worst = max(worst, purpose.by_dtype.get(dtype, purpose.other))
    return worst


# --- derivatives of the loss ----------------------------------------------------------------------


class Differences(NamedTuple):
    """Central differences of a gradient: their step, the relative error that is allowed, and that
    of a rounding.
    """

    step: float
    relative: float
    rounding: float


# The step balances the error of the difference, of second order in it, with rounding, which is
# divided by it.
DIFFERENCES_IN_DOUBLE = Differences(step=1e-6, relative=1e-3, rounding=1e-13)


DIFFERENCES_IN_SINGLE = Differences(step=1e-2, relative=5e-2, rounding=1e-4)


class LossTolerances(NamedTuple):
    """What a difference has to exceed to be a counterexample to the structure of a loss."""

    # Of a row of the gradient, relative to the largest one: below it, a row has no direction.
    norm: float
    size: float  # the same, relative to the loss over the size of the predictions
    second_difference: float  # relative to the loss
    direction: float  # sine of the angle between two gradients
    parameter: float  # change of the loss, relative to it


# Where all is computed in float64, a true dependence is far above what is left of 16 digits. Where
# a cast lies on the way, four digits of the loss are left, and two of the direction of a gradient.
LOSS_IN_DOUBLE = LossTolerances(
    norm=1e-9, size=1e-12, second_difference=1e-10, direction=1e-6, parameter=1e-9
)


LOSS_WITH_CASTS = LossTolerances(
    norm=1e-4, size=1e-5, second_difference=1e-4, direction=1e-2, parameter=1e-4
)
