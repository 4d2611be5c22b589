"""Rows of the weight of a convolution where samples are pixels, or lie along an axis of pixels.

At every output pixel a convolution is a product of the weight with what the kernel sees there. So a
row sums over the output pixels of a sample, whatever these have in common in the input.

Legend: ``n`` sample, ``t`` output pixel of a sample, ``o``/``i`` output and input channel.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from unbatch.autodiff.contractions.contraction import (
    Contraction,
    Gathering,
    OperandUse,
    only_cotangent,
)
from unbatch.autodiff.contractions.matmul import Linear
from unbatch.linalg.rows import fill, same_dtype


class ConvolutionByPixel(Contraction):
    """The weight of a convolution, transposed or not: a product for each group of channels."""

    def __init__(self, call: OperandUse) -> None:
        super().__init__(call)
        self.x: Tensor = call["input"]
        axes = self.operand.ndim - 2
        self.stride = _each(call["stride"], axes)
        self.padding = _each(call["padding"], axes)
        self.dilation = _each(call["dilation"], axes)
        self.transposed, self.groups = bool(call["transposed"]), call["groups"]
        self.products: list[Linear] = []  # by group of channels

    @property
    def kind(self) -> str:
        return "convolution, by pixel"

    def receive(self, cotangents: Sequence[Tensor | None]) -> None:
        g, x = same_dtype(only_cotangent(cotangents), self.x)
        outputs = self._positions(g).chunk(self.groups, 2)
        inputs = self._positions(self._unfolded(x, g)).chunk(self.groups, 2)
        self.products = []
        for of_outputs, of_inputs in zip(outputs, inputs, strict=True):
            shape = of_outputs.shape[2], of_inputs.shape[2]
            operand = torch.empty(shape, device="meta")
            self.products.append(Linear.of_sides(operand, of_outputs, of_inputs))

    def _positions(self, t: Tensor) -> Tensor:
        """Return ``[n, t, channels]`` from a value of the shape of the output."""
        return self.layout.split(t).movedim(2, -1).flatten(1, -2)

    # -- what the kernel sees --

    def _unfolded(self, x: Tensor, g: Tensor) -> Tensor:
        """Return what the kernel sees at each output pixel: ``[images, i·kernel, *pixels]``."""
        kernel, pixels = self.operand.shape[2:], g.shape[2:]
        if self.transposed:
            x, steps = self._spread_out(x, pixels), [1] * len(kernel)
        else:
            x, steps = _padded(x, [(width, width) for width in self.padding]), self.stride
        images, channels, *strides = x.stride()
        taps = [stride * gap for stride, gap in zip(strides, self.dilation, strict=True)]
        moves = [stride * step for stride, step in zip(strides, steps, strict=True)]
        windows = x.as_strided(
            (*x.shape[:2], *kernel, *pixels), (images, channels, *taps, *moves), x.storage_offset()
        )
        return windows.flatten(1, 1 + len(kernel))

    def _spread_out(self, x: Tensor, pixels: Sequence[int]) -> Tensor:
        """Return an input on which a plain convolution with the kernel turned round does the same.

        Its pixels are ``stride`` apart, with zeros between them and around.
        """
        sizes = []
        for size, step in zip(x.shape[2:], self.stride, strict=True):
            sizes.append((size - 1) * step + 1)
        spread = x.new_zeros(*x.shape[:2], *sizes)
        places = [slice(None, None, step) for step in (1, 1, *self.stride)]
        spread[tuple(places)] = x
        widths = []
        for axis, size in enumerate(sizes):
            reach = self.dilation[axis] * (self.operand.shape[2 + axis] - 1)
            before = reach - self.padding[axis]
            widths.append((before, pixels[axis] + reach - before - size))
        return _padded(spread, widths)

    def _as_operand(self, parts: Sequence[Tensor]) -> Tensor:
        """Return ``[*, *operand]`` from ``[*, o, i·kernel]`` of each group."""
        kernel = self.operand.shape[2:]
        if not self.transposed:
            whole = torch.cat(list(parts), -2)
            return whole.reshape(*whole.shape[:-2], *self.operand.shape)
        # The weight is ``[i, o, *kernel]``, and was turned round.
        turned = [part.unflatten(-1, (-1, *kernel)) for part in parts]
        along = -1 - len(kernel)
        whole = torch.cat([part.transpose(along - 1, along) for part in turned], along - 1)
        return whole.flip(list(range(-len(kernel), 0)))

    # -- by group: one after the other along the output channels --

    @property
    def lean(self) -> frozenset[str]:  # type: ignore[override]
        return self.products[0].lean

    @property
    def compact(self) -> bool:
        return self.products[0].compact

    def rows(self, where: slice, out: Tensor | None = None) -> Tensor:
        return fill(self._as_operand([product.rows(where) for product in self.products]), out)

    def squared_norms(self, where: slice) -> Tensor:
        return self._sum(lambda product: product.squared_norms(where))

    def sum_of_squares(self, where: slice) -> Tensor:
        return self._stacked(lambda product: product.sum_of_squares(where))

    def scatter(self, where: slice) -> Tensor:
        return self._stacked(lambda product: product.scatter(where))

    def weighted_sum(self, weights: Tensor) -> Tensor:
        return self._stacked(lambda product: product.weighted_sum(weights))

    def dots(self) -> Tensor:
        return self._sum(lambda product: product.dots())

    def dots_of(self, contractions: Sequence[Any]) -> Tensor | None:
        total: Tensor | None = None
        for k, product in enumerate(self.products):
            dots = product.dots_of([c.products[k] for c in contractions])
            if dots is None:
                return None
            total = dots if total is None else total + dots
        return total

    def gathering(self, memory: int) -> Gathering | None:
        parts = [product.gathering(memory) for product in self.products]
        gatherings = [part for part in parts if part is not None]
        if len(gatherings) < len(parts):
            return None
        return _ByGroup(gatherings, self)

    def _sum(self, of: Callable[[Linear], Tensor]) -> Tensor:
        total = of(self.products[0])
        for product in self.products[1:]:
            total = total + of(product)
        return total

    def _stacked(self, of: Callable[[Linear], Tensor]) -> Tensor:
        return self._as_operand([of(product) for product in self.products])


class _ByGroup(Gathering):
    """What sums the squares of many cotangents, for each group of channels."""

    def __init__(self, parts: Sequence[Gathering], first: ConvolutionByPixel) -> None:
        self.parts, self.first = parts, first

    def add(self, contraction: ConvolutionByPixel, where: slice, sign: float) -> None:
        for part, product in zip(self.parts, contraction.products, strict=True):
            part.add(product, where, sign)

    def total(self) -> Tensor:
        return self.first._as_operand([part.total() for part in self.parts])


def _each(sizes: Sequence[int], axes: int) -> list[int]:
    """Return a number for each axis where one may stand for all."""
    if len(sizes) == axes:
        return list(sizes)
    return [sizes[0]] * axes


def _padded(x: Tensor, widths: Sequence[tuple[int, int]]) -> Tensor:
    """Return a value with zeros before and after each axis of pixels; cut off where negative."""
    padding: list[int] = []
    for before, after in reversed(widths):
        padding += [before, after]
    if not any(padding):
        return x
    return F.pad(x, padding)
