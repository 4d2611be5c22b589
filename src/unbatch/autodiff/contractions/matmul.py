"""Matrix products that meet a shared operand: rows are outer products, summed over the places of a sample.

Legend: ``n`` sample, ``t`` place inside a sample, ``o``/``i`` output and input feature; ``G`` the cotangent
``[n, t, o]``, ``X`` the other input ``[n, t, i]``.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from unbatch.autodiff.contractions.contraction import Contraction, Gathering, OperandUse
from unbatch.linalg.rows import fill, same_dtype, squares, wide

BLOCK = 64  # features, the least that a matrix product is efficient for


CANCELS = (
    0.9  # of two sums of squares that are subtracted, the share from which on rounding is felt
)


class Linear(Contraction):
    """``y = x uᵀ`` and its relatives: ``row_n = Σ_t G_nt ⊗ X_nt``.

    Rows are formed in the order in which the operand lies in memory, so that a transposed weight needs no copy.
    """

    def __init__(self, call: OperandUse, x: Tensor, features_first: bool) -> None:
        """``x``: ``[places, i]``. ``features_first``: the op is ``u xᵀ`` with ``u`` ``[o, i]``; else ``x u``."""
        super().__init__(call)
        self.x, self.features_first = x, features_first
        self.along = replace(self.layout, dim=0)
        self.batched = call.outputs[0].ndim == 3
        self.factor = call["alpha"] if call["alpha"] is not None else 1
        self.g: Tensor

    def receive(self, cotangents: Sequence[Tensor | None]) -> None:
        (g,) = cotangents[:1]
        assert g is not None
        g = g[0] if self.batched else g
        g, x = same_dtype(g, self.x)
        self.g, self.x = self.along.split(g.T if self.features_first else g), self.along.split(x)
        if self.factor != 1:
            self.g = self.g * self.factor

    @classmethod
    def joined(cls, meetings: Sequence[Linear]) -> Linear:
        """Several uses of one operand as one, with the places of all: a recurrent weight has one for every step."""
        whole = copy.copy(meetings[0])
        whole.g = torch.cat([m.g for m in meetings], 1)
        whole.x = torch.cat([m.x for m in meetings], 1)
        return whole

    @property
    def compact(self) -> bool:
        return self.g.shape[1] < self.x.shape[2]

    @property
    def sides(self) -> tuple[Tensor, Tensor]:
        return (self.g, self.x) if self.features_first else (self.x, self.g)

    @property
    def lean(self) -> frozenset[str]:  # type: ignore[override]
        _, t, o = self.g.shape
        i = self.x.shape[2]
        pairs = {"squared_norms"} if t * (o + i) < o * i else set()
        alone = {"squared_norms", "dots"} if t == 1 else set()
        return frozenset({"weighted_sum", "sum_of_squares", "scatter"} | pairs | alone)

    def rows(self, where: slice, out: Tensor | None = None) -> Tensor:
        a, b = (side[where] for side in self.sides)
        flat = outer_as(self.operand, a, b, out[:, 0] if out is not None and self.batched else out)
        return flat[:, None] if self.batched else flat

    def squared_norms(self, where: slice) -> Tensor:
        if "squared_norms" not in self.lean:
            return super().squared_norms(where)
        a, b = (wide(side[where]) for side in self.sides)
        if a.shape[1] == 1:
            return squares(a) * squares(b)
        return (torch.bmm(a, a.mT) * torch.bmm(b, b.mT)).sum((1, 2))

    def sum_of_squares(self, where: slice) -> Tensor:
        if self.g.shape[1] == 1:
            return self._product(*(wide(side)[where, 0].square() for side in self.sides))
        return self._by_blocks(where, lambda rows: rows.square_().sum(0))

    def dots_of(self, meetings: Sequence[Any]) -> Tensor | None:
        if self.g.shape[1] > 1:
            return None
        x = wide(self.x[:, 0])
        return stacked_dots([wide(m.g[:, 0]) for m in meetings], x @ x.T)

    def gathering(self, memory: int) -> Gathering | None:
        return _OnePlace(self) if self.g.shape[1] == 1 else None

    def scatter(self, where: slice) -> Tensor:
        if self.g.shape[1] == 1 and self.g.dtype != torch.float64:
            return self._scatter(where)
        return self._by_blocks(where, lambda rows: rows.sub_(rows.mean(0)).square_().sum(0))

    def _by_blocks(self, where: slice, sum_up: Callable[[Tensor], Tensor]) -> Tensor:
        """``[*operand]`` from the rows of all samples, a block of the operand at a time."""
        a, b = (wide(side)[where] for side in self.sides)
        transposed = self.operand.stride(-2) < self.operand.stride(-1)
        a, b = (b, a) if transposed else (a, b)
        (n, _, first), second = a.shape, b.shape[2]
        tall = max(1, min(first, max(BLOCK, self.portion // (n * second * a.element_size()))))
        broad = max(1, min(second, max(BLOCK, self.portion // (n * tall * a.element_size()))))
        total, space = a.new_empty(first, second), a.new_empty(n * tall * broad)
        for i in range(0, first, tall):
            for j in range(0, second, broad):
                here = total[i : i + tall, j : j + broad]
                rows = space[: n * here.numel()].view(n, *here.shape)
                here.copy_(
                    sum_up(torch.bmm(a[:, :, i : i + tall].mT, b[:, :, j : j + broad], out=rows))
                )
        return (total.T if transposed else total).reshape(self.operand.shape)

    def _scatter(self, where: slice) -> Tensor:
        """``Σ r² − (Σ r)²/N``, in blocks that stay in the cache; where that cancels, around the mean and in float64."""
        a, b = (wide(side)[where, 0] for side in self.sides)
        transposed = self.operand.stride(-2) < self.operand.stride(-1)
        a, b = (b, a) if transposed else (a, b)
        total = a.new_empty(a.shape[1], b.shape[1])
        step = max(1, 2**16 // b.shape[1])
        a2, b2, sums = a.square(), b.square(), a.new_empty(min(step, a.shape[1]), b.shape[1])
        for block in (slice(i, i + step) for i in range(0, a.shape[1], step)):
            here, sum_ = total[block], sums[: len(total[block])]
            torch.mm(a2[:, block].T, b2, out=here)
            here.sub_(torch.mm(a[:, block].T, b, out=sum_).square_().div_(len(a)))
            doubtful = here < sum_.mul_(1 / CANCELS - 1)
            if doubtful.any():
                _again(here, doubtful, a[:, block], b)
        return (total.T if transposed else total).reshape(self.operand.shape)

    def weighted_sum(self, weights: Tensor) -> Tensor:
        a, b = (side.flatten(0, 1) for side in self.sides)
        scale = weights.to(a.dtype).repeat_interleave(self.g.shape[1])[:, None]
        return (
            self._product(a * scale, b) if a.shape[1] <= b.shape[1] else self._product(a, b * scale)
        )

    def _product(self, a: Tensor, b: Tensor) -> Tensor:
        """``aᵀ b`` in the shape of the operand, and in its order in memory."""
        transposed = self.operand.stride(-2) < self.operand.stride(-1)
        return ((b.T @ a).T if transposed else a.T @ b).reshape(self.operand.shape)

    def dots(self) -> Tensor:
        if "dots" not in self.lean:
            return super().dots()
        a, b = (wide(side)[:, 0] for side in self.sides)
        return (a @ a.T) * (b @ b.T)


def stacked_dots(gs: Sequence[Tensor], between: Tensor) -> Tensor:
    """``⟨g_kn, g_lm⟩·between_nm``, ``[kn, lm]``, for ``g_k`` ``[n, o]`` and ``between`` ``[n, m]``."""
    g, k, n = torch.cat(list(gs)), len(gs), len(between)
    dots = g @ g.T
    dots.view(k, n, k, n).mul_(between[None, :, None, :])
    return dots


class _OnePlace(Gathering):
    """``(Σ_k σ_k g_k²)ᵀ x²``: one product for all cotangents where a sample has one place."""

    def __init__(self, first: Linear) -> None:
        self.squares, self.like = torch.zeros_like(wide(first.g[:, 0])), first

    def add(self, meeting: Linear, where: slice, sign: float) -> None:
        g = wide(meeting.g[where, 0])
        self.squares[where].addcmul_(g, g, value=sign)

    def total(self) -> Tensor:
        x2 = wide(self.like.x[:, 0]).square()
        return self.like._product(
            *((self.squares, x2) if self.like.features_first else (x2, self.squares))
        )


def _again(total: Tensor, doubtful: Tensor, a: Tensor, b: Tensor) -> None:
    """``Σ_n (a_n b_n − mean)²`` in float64 for some entries, in place."""
    a, b = a.double(), b.double()
    if int(doubtful.count_nonzero()) > total.numel() // 50:
        exact = (a.square().T @ b.square()).sub_((a.T @ b).square_().div_(len(a))).clamp_min_(0)
        total.copy_(torch.where(doubtful, exact.to(total.dtype), total))
        return
    i, j = doubtful.nonzero(as_tuple=True)
    rows = a[:, i] * b[:, j]
    total[doubtful] = (rows - rows.mean(0)).square_().sum(0).to(total.dtype)


def outer_as(operand: Tensor, a: Tensor, b: Tensor, out: Tensor | None) -> Tensor:
    """``Σ_t a_nt ⊗ b_nt``; new rows lie in memory as the operand does."""
    if out is None:
        n, first, second = len(a), a.shape[2], b.shape[2]
        transposed = operand.stride(-2) < operand.stride(-1)
        out = a.new_empty(n, second, first).mT if transposed else a.new_empty(n, first, second)
    if out.stride(1) < out.stride(2):
        outer(b, a, out.mT)
    else:
        outer(a, b, out)
    return out


def outer(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """``Σ_t a_nt ⊗ b_nt`` into ``out``."""
    if a.shape[1] == 1:
        return torch.mul(a[:, 0, :, None], b[:, 0, None, :], out=out)
    return (
        torch.bmm(a.mT, b, out=out)
        if out.dtype == a.dtype == b.dtype
        else fill(torch.bmm(a.mT, b.to(a.dtype)), out)
    )
