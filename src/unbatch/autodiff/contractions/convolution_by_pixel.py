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
    """The weight of a convolution, not transposed: a matrix product for each group of channels."""

    def __init__(self, call: OperandUse) -> None:
        super().__init__(call)
        self.x: Tensor = call["input"]
        self.stride, self.padding = call["stride"], call["padding"]
        self.dilation, self.groups = call["dilation"], call["groups"]
        self.products: list[Linear] = []  # by group of channels

    @property
    def kind(self) -> str:
        return "convolution, by pixel"

    def receive(self, cotangents: Sequence[Tensor | None]) -> None:
        g, x = same_dtype(only_cotangent(cotangents), self.x)
        outputs = self._positions(g).chunk(self.groups, 2)
        inputs = self._positions(self._unfolded(x, g)).chunk(self.groups, 2)
        weights = self.operand.flatten(1).chunk(self.groups)
        self.products = []
        for weight, of_outputs, of_inputs in zip(weights, outputs, inputs, strict=True):
            self.products.append(Linear.of_sides(weight, of_outputs, of_inputs))

    def _positions(self, t: Tensor) -> Tensor:
        """Return ``[n, t, channels]`` from a value of the shape of the output."""
        return self.layout.split(t).movedim(2, -1).flatten(1, -2)

    def _unfolded(self, x: Tensor, g: Tensor) -> Tensor:
        """Return what the kernel sees at each output pixel: ``[images, i·kernel, *pixels]``."""
        kernel = self.operand.shape[2:]
        pixels = g.shape[2:]
        padding: list[int] = []
        for width in reversed(self._each(self.padding, len(kernel))):
            padding += [width, width]
        if any(padding):
            x = F.pad(x, padding)
        images, channels, *strides = x.stride()
        steps = self._each(self.stride, len(kernel))
        gaps = self._each(self.dilation, len(kernel))
        taps = [stride * gap for stride, gap in zip(strides, gaps, strict=True)]
        moves = [stride * step for stride, step in zip(strides, steps, strict=True)]
        windows = x.as_strided(
            (*x.shape[:2], *kernel, *pixels), (images, channels, *taps, *moves), x.storage_offset()
        )
        return windows.flatten(1, 1 + len(kernel))

    @staticmethod
    def _each(sizes: Sequence[int], count: int) -> list[int]:
        """Return a number for each axis where one may stand for all."""
        if len(sizes) == count:
            return list(sizes)
        return [sizes[0]] * count

    # -- by group: one after the other along the output channels --

    @property
    def lean(self) -> frozenset[str]:  # type: ignore[override]
        return self.products[0].lean

    @property
    def compact(self) -> bool:
        return self.products[0].compact

    def rows(self, where: slice, out: Tensor | None = None) -> Tensor:
        rows = torch.cat([product.rows(where) for product in self.products], 1)
        return fill(rows.reshape(len(rows), *self.operand.shape), out)

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
        return _ByGroup(gatherings, self.operand)

    def _sum(self, of: Callable[[Linear], Tensor]) -> Tensor:
        total = of(self.products[0])
        for product in self.products[1:]:
            total = total + of(product)
        return total

    def _stacked(self, of: Callable[[Linear], Tensor]) -> Tensor:
        return torch.cat([of(product) for product in self.products]).reshape(self.operand.shape)


class _ByGroup(Gathering):
    """What sums the squares of many cotangents, for each group of channels."""

    def __init__(self, parts: Sequence[Gathering], operand: Tensor) -> None:
        self.parts, self.operand = parts, operand

    def add(self, contraction: ConvolutionByPixel, where: slice, sign: float) -> None:
        for part, product in zip(self.parts, contraction.products, strict=True):
            part.add(product, where, sign)

    def total(self) -> Tensor:
        return torch.cat([part.total() for part in self.parts]).reshape(self.operand.shape)
