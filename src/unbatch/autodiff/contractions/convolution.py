"""Rows of the weight of a convolution.

Two formulas give the same rows; which of them is cheaper follows from the shapes and is counted,
never timed, so that the same call always does the same arithmetic. Biases are shifts
(``broadcast.py``).

Legend: ``n`` sample, ``t`` image of a sample (one, unless a sample has several), ``o``/``i`` output
and input channel, ``ky kx`` place inside the kernel, ``y x`` output pixel.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from unbatch.autodiff.contractions.contraction import (
    Contraction,
    OperandUse,
    only_cotangent,
)
from unbatch.linalg.rows import fill, same_dtype

aten = torch.ops.aten

# Bytes of rows formed at a time by the grouped convolution: one call serves all their samples.
GROUPED_PORTION = 32 * 2**20

# Bytes of unfolded input at a time. What does not fit into a cache costs four times as much to lay
# out.
UNFOLDED_AT_ONCE = 4 * 2**20

# The grouped kernel works on blocks of so many input channels: with fewer, most of its lanes are
# empty.
CHANNELS_PER_BLOCK = 16

# Milliseconds for 64 rows on one core, weight [o, i, ky, kx], where the choice is close:
#
#     weight           pixels   grouped   unfolded
#     16, 16, 3, 3      1024       3.9       13.1
#     32, 32, 3, 3       256       3.4        4.7
#     64, 64, 3, 3        64       6.3        5.1
#     64, 64, 3, 3      1024      47.9       63.8
#     128, 128, 3, 3     256      91.7       47.1
#     16, 3, 3, 3       1024       3.5        1.8
#
# Writing one number of the unfolded input takes as long as an eighth of what the grouped kernel
# needs for one number of a row, beside the multiplications, which both have in common.
PIXELS_PER_CHANNEL = 8


@dataclass(frozen=True)
class Geometry:
    """The arguments of a convolution that are no tensors, in the order of its op."""

    stride: Sequence[int]
    padding: Sequence[int]
    dilation: Sequence[int]
    transposed: bool
    output_padding: Sequence[int]
    groups: int

    def weight_gradient(self, g: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        """Return the gradient of the weight, summed over the images of ``g`` and ``x``."""
        gradient: Tensor = aten.convolution_backward(
            g,
            x,
            weight.to(x.dtype),
            None,
            self.stride,
            self.padding,
            self.dilation,
            self.transposed,
            self.output_padding,
            self.groups,
            (False, True, False),
        )[1]
        return gradient


class Convolution(Contraction):
    """The weight of a convolution, of any number of dimensions and groups, transposed or not."""

    lean = frozenset({"weighted_sum"})

    def __init__(self, call: OperandUse) -> None:
        super().__init__(call)
        self.x: Tensor = call["input"]
        self.geometry = Geometry(
            call["stride"],
            call["padding"],
            call["dilation"],
            call["transposed"],
            call["output_padding"],
            call["groups"],
        )
        self.formula = ""  # a key of ``FORMULAS``, once the cotangent's shape is known
        self.g: Tensor

    def receive(self, cotangents: Sequence[Tensor | None]) -> None:
        g, x = same_dtype(only_cotangent(cotangents), self.x)
        # ``[n, t, channels, *pixels]``: samples may have several images, one after the other.
        self.g, self.x = self.layout.split(g), self.layout.split(x)
        self.formula = cheaper_formula(self.g, self.operand, self.geometry)

    def rows(self, where: slice, out: Tensor | None = None) -> Tensor:
        formula = FORMULAS[self.formula]
        return formula(self.g[where], self.x[where], self.operand, self.geometry, out)

    @property
    def compact(self) -> bool:
        return self.g[0].numel() < self.operand.numel()

    @property
    def portion(self) -> int:  # type: ignore[override]
        if self.formula == "grouped":
            return GROUPED_PORTION
        return Contraction.portion

    @property
    def kind(self) -> str:
        return f"convolution, {self.formula}"

    def weighted_sum(self, weights: Tensor) -> Tensor:
        # One ordinary backward pass over all images, each cotangent scaled by its sample's weight.
        scaled = self.g * weights.to(self.g.dtype).reshape(-1, *[1] * (self.g.ndim - 1))
        return self.geometry.weight_gradient(
            scaled.flatten(0, 1), self.x.flatten(0, 1), self.operand
        )


# --- two formulas ---------------------------------------------------------------------------------

# A formula takes g ``[n, t, o, *pixels]``, x ``[n, t, i, *pixels]``, the weight, the geometry, and
# where the rows are to be written, if anywhere.
Formula = Callable[[Tensor, Tensor, Tensor, Geometry, Tensor | None], Tensor]


def cheaper_formula(g: Tensor, weight: Tensor, geometry: Geometry) -> str:
    """Return the key of ``FORMULAS`` that takes less time, by counting.

    Both do the same multiplications. Beside them, unfolding writes ``i·ky·kx`` numbers for every
    output pixel, and the grouped kernel has a cost for each of the ``o·i·ky·kx`` numbers of a row.
    So the ratio is that of pixels to output channels. Where unfolding is not written (transposed,
    grouped, or not two-dimensional), the grouped kernel serves.
    """
    if geometry.transposed or geometry.groups != 1 or weight.ndim != 4:
        return "grouped"
    outputs, inputs = weight.shape[:2]
    pixels = g.shape[1] * math.prod(g.shape[3:])
    if inputs >= CHANNELS_PER_BLOCK and pixels >= PIXELS_PER_CHANNEL * outputs:
        return "grouped"
    return "unfolded"


def grouped_rows(
    g: Tensor, x: Tensor, weight: Tensor, geometry: Geometry, out: Tensor | None
) -> Tensor:
    """Return rows by one convolution in which every sample is a group of channels."""

    def one(g: Tensor, x: Tensor) -> Tensor:
        return geometry.weight_gradient(g, x, weight)

    return fill(torch.func.vmap(one)(g, x), out)


def unfolded_rows(
    g: Tensor, x: Tensor, weight: Tensor, geometry: Geometry, out: Tensor | None
) -> Tensor:
    """Return rows by a matrix product for each sample.

    ``row_n[o, (i ky kx)] = Σ_(t y x) G_n[o, (t y x)] · U_n[(i ky kx), (t y x)]`` with ``U`` the
    input unfolded: what the kernel saw at each output pixel.
    """
    count, outputs, features = len(g), weight.shape[0], weight[0].numel()
    rows = _row_buffer(g, weight, out)
    flat_rows = rows.view(count, outputs, features)
    # Nothing is copied yet: windows are laid out below, a block of samples at a time.
    windows = _windows(_padded(x, geometry).contiguous(), g, weight, geometry)
    g = g.transpose(1, 2).reshape(count, outputs, -1)
    sample_bytes = features * g.shape[2] * g.element_size()
    step = max(1, UNFOLDED_AT_ONCE // max(sample_bytes, 1))
    for first in range(0, count, step):
        block = slice(first, min(first + step, count))
        unfolded = windows[block].reshape(-1, features, g.shape[2])
        torch.bmm(g[block], unfolded.mT, out=flat_rows[block])
    if rows is out:
        return rows
    return fill(rows, out)  # converted, or laid out otherwise


FORMULAS: dict[str, Formula] = {"grouped": grouped_rows, "unfolded": unfolded_rows}


def _row_buffer(g: Tensor, weight: Tensor, out: Tensor | None) -> Tensor:
    """Return ``out`` where a product can be written into it, and fresh memory otherwise."""
    if out is not None and out.dtype == g.dtype and out.is_contiguous():
        return out
    return g.new_empty(len(g), *weight.shape)


def _padded(x: Tensor, geometry: Geometry) -> Tensor:
    py, px = _pair(geometry.padding)
    if not py and not px:
        return x
    return F.pad(x, (px, px, py, py))


def _windows(x: Tensor, g: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
    """Return ``[n, i, ky, kx, t, y, x]``, a view: the input under the kernel at each pixel."""
    sy, sx = _pair(geometry.stride)
    dy, dx = _pair(geometry.dilation)
    samples, images, _, height, width = g.shape
    _, channels, ky, kx = weight.shape
    sample, image, channel, row, column = x.stride()
    shape = (samples, channels, ky, kx, images, height, width)
    strides = (sample, channel, row * dy, column * dx, image, row * sy, column * sx)
    return x.as_strided(shape, strides)


def _pair(sizes: Sequence[int]) -> tuple[int, int]:
    """Return two numbers where one stands for both."""
    if len(sizes) == 1:
        return sizes[0], sizes[0]
    return sizes[0], sizes[1]
