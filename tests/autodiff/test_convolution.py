"""Rows of a convolution's weight: two formulas against a plain backward pass for every sample."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from unbatch.autodiff.contractions import convolution
from unbatch.autodiff.contractions.convolution import FORMULAS, Geometry, cheaper_formula

N = 5

# weight, input, stride, padding, dilation
SHAPES = {
    "plain": ((4, 3, 3, 3), (3, 8, 7), (1, 1), (0, 0), (1, 1)),
    "padded": ((4, 3, 3, 2), (3, 6, 7), (1, 1), (1, 2), (1, 1)),
    "strided": ((2, 3, 3, 3), (3, 9, 8), (2, 3), (1, 0), (1, 1)),
    "dilated": ((2, 3, 3, 2), (3, 9, 8), (1, 2), (2, 1), (2, 3)),
    "one by one": ((4, 3, 1, 1), (3, 5, 4), (1, 1), (0, 0), (1, 1)),
}


def geometry_of(stride, padding, dilation, transposed=False, groups=1) -> Geometry:
    return Geometry(stride, padding, dilation, transposed, (0,) * len(stride), groups)


def operands(shape, images: int) -> tuple[Tensor, Tensor, Tensor, Geometry]:
    """Return cotangents and inputs ``[n, t, ..]``, the weight, and the geometry."""
    weight_shape, input_shape, *where = shape
    weight = torch.randn(weight_shape, dtype=torch.float64)
    x = torch.randn(N, images, *input_shape, dtype=torch.float64)
    y = torch.nn.functional.conv2d(x.flatten(0, 1), weight, None, *where)
    g = torch.randn_like(y).unflatten(0, (N, images))
    return g, x, weight, geometry_of(*where)


def expected_rows(g: Tensor, x: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
    where = (geometry.stride, geometry.padding, geometry.dilation)
    rows = []
    for g_n, x_n in zip(g, x, strict=True):
        leaf = weight.clone().requires_grad_()
        y = torch.nn.functional.conv2d(x_n, leaf, None, *where)
        rows += torch.autograd.grad(y, leaf, g_n)
    return torch.stack(rows)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("formula", FORMULAS)
@pytest.mark.parametrize("images", [1, 2])
def test_rows_are_those_of_a_plain_backward_pass(shape, formula, images):
    arguments = operands(shape, images)
    expected = expected_rows(*arguments)
    rows = FORMULAS[formula](*arguments, None)
    torch.testing.assert_close(rows, expected)
    out = torch.empty_like(expected)
    FORMULAS[formula](*arguments, out)
    torch.testing.assert_close(out, expected)


def test_blocks_of_samples_change_nothing(monkeypatch):
    arguments = operands(SHAPES["padded"], 2)
    whole = convolution.unfolded_rows(*arguments, None)
    monkeypatch.setattr(convolution, "UNFOLDED_AT_ONCE", 1)
    assert torch.equal(convolution.unfolded_rows(*arguments, None), whole)


def test_a_result_of_another_type_is_converted():
    arguments = operands(SHAPES["plain"], 1)
    out = torch.empty(N, *arguments[2].shape, dtype=torch.float32)
    convolution.unfolded_rows(*arguments, out)
    torch.testing.assert_close(out, expected_rows(*arguments).float())


CHOICES = {
    "many pixels for few channels": ((16, 16, 3, 3), (32, 32), {}, "grouped"),
    "few pixels": ((64, 64, 3, 3), (8, 8), {}, "unfolded"),
    "few input channels": ((16, 3, 3, 3), (32, 32), {}, "unfolded"),
    "transposed": ((16, 3, 3, 3), (32, 32), {"transposed": True}, "grouped"),
    "groups": ((16, 3, 3, 3), (32, 32), {"groups": 4}, "grouped"),
    "one dimension": ((16, 3, 3), (32,), {}, "grouped"),
}


@pytest.mark.parametrize("case", CHOICES.values(), ids=CHOICES)
def test_the_formula_follows_from_the_shapes(case):
    weight, pixels, options, expected = case
    one = (1,) * len(pixels)
    geometry = geometry_of(one, one, one, **options)
    g = torch.empty(2, 1, weight[0], *pixels)
    assert cheaper_formula(g, torch.empty(weight), geometry) == expected
