"""Operands that are broadcast: shifts, scales, and any elementwise op. Rows are sums over the places of a sample."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from unbatch.autodiff.contractions.contraction import Contraction, Gathering, OperandUse, detached
from unbatch.linalg.rows import fill, wide


class Shift(Contraction):
    """``y = .. + factor·u``, broadcast, or placed along ``axis``: rows are sums of the cotangent."""

    lean = frozenset(
        {"squared_norms", "sum_of_squares", "scatter", "weighted_sum", "dots"}
    )  # rows are there already

    def __init__(self, call: OperandUse, factor: Any = None, axis: int | None = None) -> None:
        super().__init__(call)
        self.factor, ndim = factor, call.outputs[0].ndim
        shape = list(self.operand.shape)
        after = ndim - len(shape) if axis is None else axis
        self.shape = (
            [1] * after + shape + [1] * (ndim - after - len(shape))
        )  # the operand, as it is broadcast
        self.spans = self.shape[self.layout.dim] != 1  # it has entries of its own for every sample
        self.g: Tensor

    def receive(self, cotangents: Sequence[Tensor | None]) -> None:
        (g,) = cotangents[:1]
        assert g is not None
        felt = self._felt(g)
        sums = (
            felt.sum_to_size(self.shape)
            if self.spans
            else reduce_to(self.layout.split(felt), self.shape)
        )
        self.g = sums if self.factor is None else sums * self.factor

    def _felt(self, g: Tensor) -> Tensor:
        """The derivative by the operand as if it had not been broadcast."""
        return g

    def rows(self, where: slice, out: Tensor | None = None) -> Tensor:
        rows = (
            self.layout.only(self.g, *where.indices(self.samples)[:2])
            if self.spans
            else self.g[where]
        )
        return fill(rows.reshape(len(rows), *self.operand.shape), out)

    def gathering(self, memory: int) -> Gathering | None:
        return None if self.spans else _Squares(self)


class _Squares(Gathering):
    """``Σ_n (Σ_k σ_k row_kn²)``: the rows are there, and are summed over samples once."""

    def __init__(self, first: Shift) -> None:
        self.squares, self.shape = torch.zeros_like(wide(first.g)), first.operand.shape

    def add(self, meeting: Shift, where: slice, sign: float) -> None:
        g = wide(meeting.g[where])
        self.squares[where].addcmul_(g, g, value=sign)

    def total(self) -> Tensor:
        return self.squares.sum(0).reshape(self.shape)


class Scale(Shift):
    """``y = u·x̂ + ..``, broadcast, or placed along ``axis``; ``x̂ = scale·(x − mean)``, where those are given.

    ``factor``: a scale that is the same all along the dims that are summed over.
    """

    def __init__(
        self, call: OperandUse, x: Tensor, mean: Tensor | None = None, scale: Tensor | None = None,
        axis: int | None = None, factor: Tensor | None = None,
    ) -> None:  # fmt: skip
        super().__init__(call, factor, axis)
        self.x, self.mean, self.scale = x, mean, scale

    def _felt(self, g: Tensor) -> Tensor:
        if self.mean is None:
            return g * self.x
        felt = self.x - self.mean
        felt = felt if self.scale is None else felt.mul_(self.scale)
        return felt.mul_(g) if felt.dtype == torch.promote_types(felt.dtype, g.dtype) else felt * g


class Pointwise(Shift):
    """Any elementwise op: its derivative by the operand at every place, then as for a shift."""

    def __init__(self, call: OperandUse) -> None:
        super().__init__(call)
        self.call = call

    def _felt(self, g: Tensor) -> Tensor:
        call = self.call
        u = self.operand.detach().expand(g.shape).requires_grad_()
        with torch.enable_grad():
            y = call.op(**{**detached(call.arguments), call.name: u})
            (felt,) = torch.autograd.grad(y, u, g)
        return felt


def reduce_to(t: Tensor, shape: Sequence[int]) -> Tensor:
    """Sum ``[n, *dims]`` over the dims along which ``shape`` was broadcast: ``[n, *shape]``."""
    dims = [d + 1 for d, s in enumerate(shape) if s == 1 and t.shape[d + 1] != 1]
    return t.sum(dims, keepdim=True) if dims else t
