"""Rules for windows and grids: pooling, resampling, padding by reflection, and the like.

Positions are the last dims, and each is taken to see all of them along which samples lie; leading
dims are left alone. Convolutions are in ``layers.py``.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from unbatch.analysis.domain.ownership import (
    Ownership,
    expand_plain,
    permute,
    squeeze,
    unsqueeze,
)
from unbatch.analysis.rules.layers import with_new_dims
from unbatch.analysis.rules.registry import RuleContext, rule, summary

# How many dims at the end are positions.
POSITIONS = {
    1: (
        "avg_pool1d max_pool1d upsample_nearest1d upsample_linear1d _upsample_nearest_exact1d "
        "reflection_pad1d replication_pad1d"
    ),
    2: (
        "avg_pool2d max_pool2d_with_indices _adaptive_avg_pool2d adaptive_max_pool2d "
        "upsample_nearest2d upsample_bilinear2d upsample_bicubic2d _upsample_bilinear2d_aa "
        "_upsample_bicubic2d_aa _upsample_nearest_exact2d reflection_pad2d replication_pad2d "
        "col2im max_unpool2d mkldnn_max_pool2d mkldnn_adaptive_avg_pool2d fractional_max_pool2d"
    ),
    3: (
        "avg_pool3d max_pool3d_with_indices _adaptive_avg_pool3d adaptive_max_pool3d "
        "upsample_nearest3d upsample_trilinear3d reflection_pad3d replication_pad3d im2col "
        "fractional_max_pool3d"
    ),
}

SPATIAL = {name: dims for dims, names in POSITIONS.items() for name in names.split()}


@rule(*SPATIAL)
def windows(call: RuleContext) -> Any:
    """Positions see windows of positions."""
    a, (x, *others) = call.algebra, call.tensors
    count = min(SPATIAL[call.name], len(x.shape))
    lead = len(x.shape) - count
    windowed = a.scan(call.title, x, range(lead, len(x.shape)))
    if others:
        # Positions to which values go, or samples of a fractional window: one for each position.
        indices = [_indices(call, m, len(x.shape), count) for m in others]
        windowed = a.pointwise(call.title, windowed, *indices)
    return [window_result(windowed, s, lead).with_key(i) for i, s in enumerate(call.shapes)]


def _indices(call: RuleContext, m: Ownership, ndim: int, count: int) -> Ownership:
    """Positions to which values go, or numbers that shift the windows of a sample's channel."""
    if len(m.shape) == ndim:
        return call.algebra.scan("index", m, range(ndim - count, ndim))
    m = summary(call, "shifts", m, [len(m.shape) - 1])
    for _ in range(ndim - len(m.shape)):
        m = unsqueeze(m, len(m.shape))
    return m


def window_result(x: Ownership, shape: tuple[int, ...], lead: int) -> Ownership:
    """Return ``x``, scanned behind ``lead`` dims, with the positions of ``shape`` there."""
    # A scan leaves all positions alike but for their index, so one of them stands for any number
    # of them, in any number of dims: what counts is whom they depend on.
    ndim = len(x.shape)
    x = replace(x, shape=(*x.shape[:lead], *[1] * (ndim - lead)))
    x = squeeze(x, range(lead, ndim))
    for _ in range(len(shape) - lead):
        x = unsqueeze(x, len(x.shape))
    return expand_plain(x, shape)


# The vjps of ops on windows of which PyTorch has no definition in simpler ones.
VJPS = {
    1: "reflection_pad1d_backward replication_pad1d_backward",
    2: (
        "avg_pool2d_backward reflection_pad2d_backward replication_pad2d_backward "
        "_adaptive_avg_pool2d_backward adaptive_max_pool2d_backward fractional_max_pool2d_backward"
    ),
    3: (
        "avg_pool3d_backward reflection_pad3d_backward replication_pad3d_backward "
        "_adaptive_avg_pool3d_backward adaptive_max_pool3d_backward fractional_max_pool3d_backward "
        "max_pool3d_with_indices_backward"
    ),
}

SPATIAL_VJPS = {name: dims for dims, names in VJPS.items() for name in names.split()}


@rule(*SPATIAL_VJPS, ignored="self")
def window_vjps(call: RuleContext) -> Ownership:
    """Positions of the input see windows of cotangents; of the input its sizes alone count."""
    a, x, g = call.algebra, call["self"], call["grad_output"]
    lead = len(x.shape) - min(SPATIAL_VJPS[call.name], len(x.shape))
    name = (call.title, x.shape[lead:])
    # The positions of the greatest entries, where there are any.
    seen = [a.scan(name, m, range(lead, len(m.shape))) for m in (g, *call.named("indices"))]
    seen = [window_result(m, (*m.shape[:lead], *[1] * (len(x.shape) - lead)), lead) for m in seen]
    return window_result(a.pointwise(name, *seen), call.shape, lead)


@rule("grid_sampler_2d", "grid_sampler_3d")
def grid_sample(call: RuleContext) -> Ownership:
    """Every point of a grid [n, .., 2 or 3] looks anywhere into an image [n, c, ..]."""
    # The image is read as a whole at each point, since where a point looks depends on numbers.
    x, grid = call["input"], call["grid"]
    image = summary(call, "space", x, range(2, len(x.shape)), True)
    last = len(grid.shape) - 1
    points = permute(grid, [0, last, *range(1, last)])
    points = summary(call, "point", points, [1], True)
    return call.algebra.pointwise(call.title, image, points)


@rule("affine_grid_generator")
def affine_grid(call: RuleContext) -> Ownership:
    """A grid for each matrix [n, 2, 3]."""
    theta = summary(call, call.title, call["theta"], [1, 2])
    return with_new_dims(theta, call.shape, 1, 0)
