"""Tables that are looked up: a row of the gradient is zero but at the indices of its sample."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from unbatch.autodiff.contractions.contraction import (
    Contraction,
    OperandUse,
    only_cotangent,
)
from unbatch.linalg.rows import squares, wide


class Embedding(Contraction):
    """The table of an embedding. Rows are kept as their entries that are not zero.

    Equal indices of one sample share a *slot*, in which their cotangents are summed: ``g``
    ``[slot, *]`` holds the sums, ``owner`` ``[slot]`` the sample, and ``place`` ``[slot]`` the
    index in the table.
    """

    lean = frozenset({"squared_norms", "sum_of_squares", "weighted_sum"})

    def __init__(self, call: OperandUse) -> None:
        super().__init__(call)
        self.indices: Tensor = call["indices"]
        self.padding: int | None = call["padding_idx"]
        self.by_count = bool(call["scale_grad_by_freq"])
        self.g: Tensor
        self.place: Tensor
        self.owner: Tensor

    def receive(self, cotangents: Sequence[Tensor | None]) -> None:
        size = len(self.operand)
        index = self.layout.split(self.indices).flatten(1)
        g = self.layout.split(only_cotangent(cotangents)).reshape(*index.shape, -1)
        if self.by_count:
            # Counts are over the whole batch, as those of the op are.
            g = g / index.flatten().bincount(minlength=size)[index].unsqueeze(-1)
        counts = self._not_padding(index)
        owner = torch.arange(self.samples, device=index.device)[:, None].expand_as(index)
        # One number for sample and index together finds equal pairs in one pass.
        slots, slot = torch.unique((owner * size + index)[counts], return_inverse=True)
        self.g = wide(g).new_zeros(len(slots), g.shape[-1]).index_add_(0, slot, wide(g[counts]))
        self.owner, self.place = slots // size, slots % size

    def _not_padding(self, index: Tensor) -> Tensor:
        """Return where an index has a gradient; a negative ``padding_idx`` means everywhere."""
        if self.padding is None or self.padding < 0:
            return torch.ones_like(index, dtype=torch.bool)
        return index != self.padding

    def rows(self, where: slice, out: Tensor | None = None) -> Tensor:
        first, last, _ = where.indices(self.samples)
        if out is None:
            out = self.operand.new_empty(last - first, *self.operand.shape)
        mine = self._slots_of(where)
        out.zero_()[self.owner[mine] - first, self.place[mine]] = self.g[mine].to(out.dtype)
        return out

    def _slots_of(self, where: slice) -> Tensor:
        first, last, _ = where.indices(self.samples)
        return (self.owner >= first) & (self.owner < last)

    def squared_norms(self, where: slice) -> Tensor:
        return self.g.new_zeros(self.samples).index_add_(0, self.owner, squares(self.g))[where]

    def sum_of_squares(self, where: slice) -> Tensor:
        mine = self._slots_of(where)
        total = self.g.new_zeros(self.operand.shape)
        return total.index_add_(0, self.place[mine], self.g[mine].square())

    def weighted_sum(self, weights: Tensor) -> Tensor:
        total = self.g.new_zeros(self.operand.shape)
        return total.index_add_(0, self.place, self.g * weights.to(self.g.dtype)[self.owner, None])
