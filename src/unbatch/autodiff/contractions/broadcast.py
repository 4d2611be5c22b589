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
from unbatch.linalg.rows import fill, squares, vectors, wide


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
        self.spanned = [d for d in self.layout.dims if self.shape[d] != 1]
        self.spans_samples = bool(self.spanned)
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


class ByEntry(Contraction):
    """A broadcast operand with entries of its own along some axes of samples, not along others.

    As a table of positions that is added to the tokens of all sentences: the row of a token is zero
    but at its position.
    """

    lean = frozenset({"squared_norms", "sum_of_squares", "weighted_sum", "dots"})

    def __init__(self, shift: Shift, places: dict[int, Tensor]) -> None:
        """``places``: by axis along which the operand has entries, that of each sample."""
        self.layout, self.operand, self.samples = shift.layout, shift.operand, shift.samples
        self.shift, self.places = shift, places
        self.g: Tensor  # ``[n, *]``, what a row has at the place of its sample

    @property
    def kind(self) -> str:
        return f"{self.shift.kind}, by entry"

    def receive(self, cotangents: Sequence[Tensor | None]) -> None:
        pulled = self.shift._pulled_back(only_cotangent(cotangents))
        shape = list(self.shift.shape)
        for dim in self.places:
            shape[dim] = 1
        g = reduce_to(self.layout.split(pulled), shape)
        if self.shift.factor is not None:
            g = g * self.shift.factor
        self.g = g.squeeze([1 + dim for dim in self.places])

    def rows(self, where: slice, out: Tensor | None = None) -> Tensor:
        g = self.g[where]
        rows = g.new_zeros(len(g), *self.shift.shape)
        k = torch.arange(len(g), device=g.device)
        at = [place[where] for place in self._at(g)]
        self._in_front(rows, 1)[k, *at] = g
        return fill(rows.reshape(len(rows), *self.operand.shape), out)

    def squared_norms(self, where: slice) -> Tensor:
        return squares(self.g[where])

    def sum_of_squares(self, where: slice) -> Tensor:
        return self._summed(wide(self.g[where]).square(), where)

    def weighted_sum(self, weights: Tensor) -> Tensor:
        scale = weights.to(self.g.dtype).reshape(-1, *[1] * (self.g.ndim - 1))
        return self._summed(self.g * scale, slice(0, self.samples))

    def dots(self) -> Tensor:
        flat = vectors(self.g)
        dots = flat @ flat.T
        for place in self._at(dots):
            dots = dots.where(place[:, None] == place, 0)
        return dots

    def _summed(self, g: Tensor, where: slice) -> Tensor:
        """Return ``[*operand]`` with every ``g`` added at the place of its sample."""
        total = g.new_zeros(self.shift.shape)
        at = [place[where] for place in self._at(g)]
        self._in_front(total, 0).index_put_(tuple(at), g, accumulate=True)
        return total.reshape(self.operand.shape)

    def _at(self, like: Tensor) -> list[Tensor]:
        return [place.to(like.device) for place in self.places.values()]

    def _in_front(self, t: Tensor, before: int) -> Tensor:
        """Return a view with the axes of ``places`` behind the first ``before``."""
        dims = [before + dim for dim in self.places]
        return t.movedim(dims, list(range(before, before + len(dims))))


def reduce_to(t: Tensor, shape: Sequence[int]) -> Tensor:
    """Sum ``[n, *dims]`` over the dims along which ``shape`` was broadcast: ``[n, *shape]``."""
    dims = []
    for dim, size in enumerate(shape, start=1):
        if size == 1 and t.shape[dim] != 1:
            dims.append(dim)
    if not dims:
        return t
    return t.sum(dims, keepdim=True)
