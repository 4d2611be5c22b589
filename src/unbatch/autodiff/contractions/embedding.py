"""Tables that are looked up: rows are sparse."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from unbatch.autodiff.contractions.contraction import Contraction, OperandUse
from unbatch.linalg.rows import squares, wide


class Embedding(Contraction):
    """A table looked up: the cotangents of equal indices of a sample are summed, and rows are sparse."""

    lean = frozenset({"squared_norms", "sum_of_squares", "weighted_sum"})

    def __init__(self, call: OperandUse) -> None:
        super().__init__(call)
        self.indices: Tensor = call["indices"]
        padding = call["padding_idx"]
        self.padding = padding if padding is not None and padding >= 0 else None
        self.by_count = bool(call["scale_grad_by_freq"])
        self.g: Tensor
        self.place: Tensor
        self.owner: Tensor

    def receive(self, cotangents: Sequence[Tensor | None]) -> None:
        (g,) = cotangents[:1]
        assert g is not None
        size = len(self.operand)
        index = self.layout.split(self.indices).flatten(1)
        g = self.layout.split(g).reshape(*index.shape, -1)
        if self.by_count:
            g = g / index.flatten().bincount(minlength=size)[index].unsqueeze(-1)
        keep = (
            torch.ones_like(index, dtype=torch.bool)
            if self.padding is None
            else index != self.padding
        )
        owner = torch.arange(self.samples, device=index.device)[:, None].expand_as(index)
        spots, inverse = torch.unique((owner * size + index)[keep], return_inverse=True)
        self.g = wide(g).new_zeros(len(spots), g.shape[-1]).index_add_(0, inverse, wide(g[keep]))
        self.owner, self.place = spots // size, spots % size

    def rows(self, where: slice, out: Tensor | None = None) -> Tensor:
        first, last, _ = where.indices(self.samples)
        if out is None:
            out = self.operand.new_empty(last - first, *self.operand.shape)
        mine = (self.owner >= first) & (self.owner < last)
        out.zero_()[self.owner[mine] - first, self.place[mine]] = self.g[mine].to(out.dtype)
        return out

    def squared_norms(self, where: slice) -> Tensor:
        return self.g.new_zeros(self.samples).index_add_(0, self.owner, squares(self.g))[where]

    def sum_of_squares(self, where: slice) -> Tensor:
        first, last, _ = where.indices(self.samples)
        mine = (self.owner >= first) & (self.owner < last)
        total = self.g.new_zeros(self.operand.shape)
        return total.index_add_(0, self.place[mine], self.g[mine].square())

    def weighted_sum(self, weights: Tensor) -> Tensor:
        total = self.g.new_zeros(self.operand.shape)
        return total.index_add_(0, self.place, self.g * weights.to(self.g.dtype)[self.owner, None])
