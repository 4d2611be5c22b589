"""Operands that are broadcast: shifts, scales, and any elementwise op.

Each of them has a derivative by the operand at every place; a row is its sum over the places of a
sample.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from unbatch.autodiff.contractions.contraction import (
    Contraction,
    Gathering,
    OperandUse,
    detached,
    only_cotangent,
)
from unbatch.linalg.rows import fill, wide


class Shift(Contraction):
    """``y = .. + factor·u``, broadcast, or placed along ``axis``: rows sum the cotangent."""

    # All of them but the inherited rows: these are there already, and take no memory of their own.
    lean = frozenset({"squared_norms", "sum_of_squares", "scatter", "weighted_sum", "dots"})

    def __init__(self, call: OperandUse, factor: Any = None, axis: int | None = None) -> None:
        super().__init__(call)
        self.factor = factor
        self.shape = _broadcast_shape(self.operand.shape, call.outputs[0].ndim, axis)
        # The operand may have entries of its own for every sample (a table of positions, say, added
        # along the sample axis). Then an entry belongs to one sample, and nothing is summed over.
        self.spans_samples = self.shape[self.layout.dim] != 1
        self.g: Tensor

    def receive(self, cotangents: Sequence[Tensor | None]) -> None:
        pulled = self._pulled_back(only_cotangent(cotangents))
        # Sums are taken once, for all samples: rows are then slices of them.
        if self.spans_samples:
            sums = pulled.sum_to_size(self.shape)
        else:
            sums = reduce_to(self.layout.split(pulled), self.shape)
        if self.factor is not None:  # after the sum, which has fewer entries
            sums = sums * self.factor
        self.g = sums

    def _pulled_back(self, g: Tensor) -> Tensor:
        """Return the derivative by the operand if it had not been broadcast, shaped as ``g``."""
        return g

    def rows(self, where: slice, out: Tensor | None = None) -> Tensor:
        if self.spans_samples:
            first, last, _ = where.indices(self.samples)
            rows = self.layout.only(self.g, first, last)
        else:
            rows = self.g[where]
        return fill(rows.reshape(len(rows), *self.operand.shape), out)

    def gathering(self, memory: int) -> Gathering | None:
        if self.spans_samples:
            return None
        return _SquaredRows(self)


def _broadcast_shape(shape: Sequence[int], ndim: int, axis: int | None) -> list[int]:
    """Return the operand's shape as it is broadcast: from the right, or from ``axis`` on."""
    before = ndim - len(shape) if axis is None else axis
    after = ndim - before - len(shape)
    return [1] * before + list(shape) + [1] * after


class _SquaredRows(Gathering):
    """``Σ_n (Σ_k σ_k row_kn²)``: the rows are there, and are summed over samples once."""

    def __init__(self, first: Shift) -> None:
        self.squares, self.shape = torch.zeros_like(wide(first.g)), first.operand.shape

    def add(self, contraction: Shift, where: slice, sign: float) -> None:
        g = wide(contraction.g[where])
        self.squares[where].addcmul_(g, g, value=sign)

    def total(self) -> Tensor:
        return self.squares.sum(0).reshape(self.shape)


class Scale(Shift):
    """``y = u·x̂ + ..``, broadcast, or placed along ``axis``; ``x̂ = scale·(x − mean)``, if these
    are given.

    ``factor``: a scale that is the same all along the dims that are summed over, so that it can be
    applied to the sums.
    """

    def __init__(
        self,
        call: OperandUse,
        x: Tensor,
        mean: Tensor | None = None,
        scale: Tensor | None = None,
        axis: int | None = None,
        factor: Tensor | None = None,
    ) -> None:
        super().__init__(call, factor, axis)
        self.x, self.mean, self.scale = x, mean, scale

    def _pulled_back(self, g: Tensor) -> Tensor:
        if self.mean is None:
            return g * self.x
        # ``x̂`` is formed again rather than kept: the forward pass has it nowhere.
        normalised = self.x - self.mean
        if self.scale is not None:
            normalised.mul_(self.scale)
        # In place only where that would not round a wider cotangent.
        if normalised.dtype == torch.promote_types(normalised.dtype, g.dtype):
            return normalised.mul_(g)
        return normalised * g


class Pointwise(Shift):
    """Any elementwise op: its derivative by the operand at every place, then as for a shift."""

    def __init__(self, call: OperandUse) -> None:
        super().__init__(call)
        self.call = call

    def _pulled_back(self, g: Tensor) -> Tensor:
        call = self.call
        # Expanded, the operand has an entry for every place, and so has its derivative.
        u = self.operand.detach().expand(g.shape).requires_grad_()
        arguments = detached(call.arguments)
        arguments[call.name] = u
        with torch.enable_grad():
            y = call.op(**arguments)
            (pulled,) = torch.autograd.grad(y, u, g)
        return pulled


def reduce_to(t: Tensor, shape: Sequence[int]) -> Tensor:
    """Sum ``[n, *dims]`` over the dims along which ``shape`` was broadcast: ``[n, *shape]``."""
    dims = []
    for dim, size in enumerate(shape, start=1):
        if size == 1 and t.shape[dim] != 1:
            dims.append(dim)
    if not dims:
        return t
    return t.sum(dims, keepdim=True)
