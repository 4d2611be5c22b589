"""Matrix products with a shared operand: rows are sums of outer products.

Legend: ``n`` sample, ``k`` one of several cotangents, ``t`` position inside a sample, ``o``/``i``
output and input feature; ``G`` the cotangent ``[n, t, o]``, ``X`` the other input ``[n, t, i]``.
Then

    ``row_n = Σ_t G_nt ⊗ X_nt``.

With one position (``t = 1``) a row is one outer product, and nearly everything factorizes:
``‖row_n‖² = ‖G_n‖²·‖X_n‖²``, ``⟨row_n, row_m⟩ = ⟨G_n, G_m⟩·⟨X_n, X_m⟩``, and
``Σ_n row_n² = (G²)ᵀ X²``.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from unbatch.autodiff.contractions.contraction import (
    Contraction,
    Gathering,
    OperandUse,
    only_cotangent,
)
from unbatch.linalg.rows import fill, same_dtype, wide

BLOCK = 64  # features, the least that a matrix product is efficient for

# Numbers in a block of sums of squares that stay in the cache while they are subtracted.
ENTRIES_IN_CACHE = 2**16

# Of two sums of squares that are subtracted, the share from which on rounding shows in the
# difference.
CANCELS = 0.9


class Linear(Contraction):
    """``y = x uᵀ`` and its relatives.

    Rows are formed in the order in which the operand lies in memory, so that a transposed weight
    needs no copy.
    """

    def __init__(self, call: OperandUse, x: Tensor, features_first: bool) -> None:
        """``x``: ``[positions, i]``; ``features_first``: it is ``u xᵀ``, ``u`` ``[o, i]``; else
        ``x u``.
        """
        super().__init__(call)
        self.x, self.features_first = x, features_first
        # In the matrix ``[positions, features]`` samples run along the first dim, whatever they did
        # in the output of the op.
        self.along = replace(self.layout, dim=0)
        self.batched = call.outputs[0].ndim == 3
        self.factor = 1 if call["alpha"] is None else call["alpha"]
        self.g: Tensor

    def receive(self, cotangents: Sequence[Tensor | None]) -> None:
        g = only_cotangent(cotangents)
        if self.batched:  # a stack of one matrix
            g = g[0]
        g, x = same_dtype(g, self.x)
        if self.features_first:
            g = g.T
        self.g, self.x = self.along.split(g), self.along.split(x)
        if self.factor != 1:
            self.g = self.g * self.factor

    @classmethod
    def of_sides(cls, operand: Tensor, g: Tensor, x: Tensor) -> Linear:
        """Return ``u xᵀ`` that has received ``g``, for sides ``[n, t, o]`` and ``[n, t, i]``."""
        product = object.__new__(cls)
        product.operand, product.samples = operand, len(g)
        product.features_first, product.batched, product.factor = True, False, 1
        product.g, product.x = g, x
        return product

    @classmethod
    def joined(cls, contractions: Sequence[Linear]) -> Linear:
        """Return several uses of one operand as one, with the positions of all.

        A recurrent weight has a use for every step.
        """
        product = copy.copy(contractions[0])
        product.g = torch.cat([c.g for c in contractions], 1)
        product.x = torch.cat([c.x for c in contractions], 1)
        return product

    @property
    def one_position(self) -> bool:
        """Whether rows are single outer products."""
        return self.g.shape[1] == 1

    @property
    def compact(self) -> bool:
        return self.g.shape[1] < self.x.shape[2]

    @property
    def sides(self) -> tuple[Tensor, Tensor]:
        """Return ``G`` and ``X`` in the order of the operand's dims."""
        if self.features_first:
            return self.g, self.x
        return self.x, self.g

    @property
    def lean(self) -> frozenset[str]:  # type: ignore[override]
        _, positions, outputs = self.g.shape
        inputs = self.x.shape[2]
        methods = {"weighted_sum", "sum_of_squares", "scatter"}
        if positions == 1:
            methods |= {"squared_norms", "dots"}
        elif positions * (outputs + inputs) < outputs * inputs:
            # ‖Σ_t G_t ⊗ X_t‖² = Σ_ts ⟨G_t, G_s⟩⟨X_t, X_s⟩ takes t²(o + i) multiplications, a row
            # t·o·i.
            methods.add("squared_norms")
        return frozenset(methods)

    def rows(self, where: slice, out: Tensor | None = None) -> Tensor:
        # A stack of one matrix has a dim of its own in the operand, and so in the rows.
        a, b = self.sides
        if not self.batched:
            return outer_as(self.operand, a[where], b[where], out)
        if out is not None:
            out = out[:, 0]
        return outer_as(self.operand, a[where], b[where], out)[:, None]

    def squared_norms(self, where: slice) -> Tensor:
        if "squared_norms" not in self.lean:
            return super().squared_norms(where)
        a, b = self._wide_sides(where)
        if self.one_position:
            # Squared last: the squares of the sides may be out of range where that of a row is not.
            return (_norms(a) * _norms(b)).square_()
        return (torch.bmm(a, a.mT) * torch.bmm(b, b.mT)).sum((1, 2))

    def _wide_sides(self, where: slice) -> tuple[Tensor, Tensor]:
        a, b = self.sides
        return wide(a[where]), wide(b[where])

    def sum_of_squares(self, where: slice) -> Tensor:
        if self.one_position:
            a, b = self._wide_sides(where)
            a, b = balanced(a[:, 0], b[:, 0])
            return self._product(a.square(), b.square())

        def sum_up(rows: Tensor) -> Tensor:
            return rows.square_().sum(0)

        return self._by_blocks(where, sum_up)

    def dots_of(self, contractions: Sequence[Any]) -> Tensor | None:
        if not self.one_position:
            return None
        # All cotangents of the site share X.
        x = wide(self.x[:, 0])
        return stacked_dots([wide(c.g[:, 0]) for c in contractions], x @ x.T)

    def gathering(self, memory: int) -> Gathering | None:
        if not self.one_position:
            return None
        return _OnePosition(self)

    def scatter(self, where: slice) -> Tensor:
        # In float64 the difference of two sums could not be repaired where it cancels.
        if self.one_position and self.g.dtype != torch.float64:
            return self._scatter_by_difference(where)

        def sum_up(rows: Tensor) -> Tensor:
            return rows.sub_(rows.mean(0)).square_().sum(0)

        return self._by_blocks(where, sum_up)

    # -- in blocks of the operand --

    def _in_memory_order(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """Return two sides in the order in which the operand's dims lie in memory."""
        if self._transposed:
            return b, a
        return a, b

    @property
    def _transposed(self) -> bool:
        """Whether the operand's last dim is not its innermost one."""
        return self.operand.stride(-2) < self.operand.stride(-1)

    def _shaped(self, total: Tensor) -> Tensor:
        """Return a result in memory order as ``[*operand]``."""
        if self._transposed:
            total = total.T
        return total.reshape(self.operand.shape)

    def _by_blocks(self, where: slice, sum_up: Callable[[Tensor], Tensor]) -> Tensor:
        """Return ``[*operand]`` from the rows of all samples, a block of the operand at a time.

        ``sum_up`` takes ``[n, block]`` to ``[block]`` and may overwrite what it takes. The rows of
        a block take about ``portion`` bytes, as no more fits into a cache.
        """
        a, b = self._in_memory_order(*self._wide_sides(where))
        (samples, _, first), second, size = a.shape, b.shape[2], a.element_size()
        # Few blocks, of which each is at least as large as a product is efficient for.
        tall = _at_once(first, self.portion // (samples * second * size))
        broad = _at_once(second, self.portion // (samples * tall * size))
        total = a.new_empty(first, second)
        buffer = a.new_empty(samples * tall * broad)
        for i in range(0, first, tall):
            for j in range(0, second, broad):
                block = total[i : i + tall, j : j + broad]
                rows = buffer[: samples * block.numel()].view(samples, *block.shape)
                torch.bmm(a[:, :, i : i + tall].mT, b[:, :, j : j + broad], out=rows)
                block.copy_(sum_up(rows))
        return self._shaped(total)

    def _scatter_by_difference(self, where: slice) -> Tensor:
        """Return ``Σ r² − (Σ r)²/N``, in blocks that stay in the cache.

        Where the two sums cancel, the entry is computed again around the mean, in float64.
        """
        a, b = self._wide_sides(where)
        a, b = self._in_memory_order(a[:, 0], b[:, 0])
        (samples, first), second = a.shape, b.shape[1]
        total = a.new_empty(first, second)
        step = max(1, ENTRIES_IN_CACHE // second)
        a2, b2 = a.square(), b.square()
        buffer = a.new_empty(min(step, first), second)
        for i in range(0, first, step):
            block = slice(i, i + step)
            scatter = total[block]
            square_of_sum = buffer[: len(scatter)]
            torch.mm(a2[:, block].T, b2, out=scatter)
            torch.mm(a[:, block].T, b, out=square_of_sum).square_().div_(samples)
            scatter.sub_(square_of_sum)
            # ``Σ r² − s < (1/CANCELS − 1) s`` says that s is more than that share of ``Σ r²``.
            doubtful = scatter < square_of_sum.mul_(1 / CANCELS - 1)
            if doubtful.any():
                _scatter_again(scatter, doubtful, a[:, block], b)
        return self._shaped(total)

    def weighted_sum(self, weights: Tensor) -> Tensor:
        a, b = self.sides
        a, b = a.flatten(0, 1), b.flatten(0, 1)
        scale = weights.to(a.dtype).repeat_interleave(self.g.shape[1])[:, None]
        if a.shape[1] <= b.shape[1]:  # the smaller side is scaled
            return self._product(a * scale, b)
        return self._product(a, b * scale)

    def _product(self, a: Tensor, b: Tensor) -> Tensor:
        """Return ``aᵀ b`` in the shape of the operand, and in its order in memory."""
        if self._transposed:
            return (b.T @ a).T.reshape(self.operand.shape)
        return (a.T @ b).reshape(self.operand.shape)

    def dots(self) -> Tensor:
        if "dots" not in self.lean:
            return super().dots()
        a, b = self.sides
        a, b = balanced(wide(a)[:, 0], wide(b)[:, 0])
        return (a @ a.T) * (b @ b.T)


def _norms(side: Tensor) -> Tensor:
    """Return the norm of each ``[1, o]`` of ``[n, 1, o]``."""
    norms: Tensor = torch.linalg.vector_norm(side.flatten(1), dim=1)
    return norms


def balanced(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Return sides ``[n, o]``, ``[n, i]`` of the same outer products, the second no larger than 1.

    Otherwise squares of a side may overflow or vanish, where those of the products do not.
    """
    if not b.shape[1]:  # nothing has no largest entry
        return a, b
    size = b.abs().amax(1, keepdim=True)
    size = torch.where((size > 0) & size.isfinite(), size, 1)
    return a * size, b / size


def _at_once(features: int, fitting: int) -> int:
    """Return how many of ``features`` make a block, if ``fitting`` of them fit into memory."""
    return max(1, min(features, max(BLOCK, fitting)))


def stacked_dots(gs: Sequence[Tensor], between: Tensor) -> Tensor:
    """Return ``⟨g_kn, g_lm⟩·between_nm``, ``[kn, lm]``, for ``g_k`` ``[n, o]``."""
    g, k, n = torch.cat(list(gs)), len(gs), len(between)
    # One product for all pairs of cotangents; multiplied in place, as it is the largest tensor
    # here.
    dots = g @ g.T
    dots.view(k, n, k, n).mul_(between[None, :, None, :])
    return dots


class _OnePosition(Gathering):
    """``(Σ_k σ_k g_k²)ᵀ x²``: one product for all cotangents where a sample has one position."""

    def __init__(self, first: Linear) -> None:
        self.squares, self.first = torch.zeros_like(wide(first.g[:, 0])), first

    def add(self, contraction: Linear, where: slice, sign: float) -> None:
        g = wide(contraction.g[where, 0])
        self.squares[where].addcmul_(g, g, value=sign)

    def total(self) -> Tensor:
        x2 = wide(self.first.x[:, 0]).square()
        if self.first.features_first:
            return self.first._product(self.squares, x2)
        return self.first._product(x2, self.squares)


def _scatter_again(total: Tensor, doubtful: Tensor, a: Tensor, b: Tensor) -> None:
    """Write ``Σ_n (a_n b_n − mean)²`` in float64 into the doubtful entries of ``total``."""
    a, b = a.double(), b.double()
    if int(doubtful.count_nonzero()) > total.numel() // 50:
        # Many entries: two products are cheaper than picking them, and float64 has digits to lose.
        exact = (a.square().T @ b.square()).sub_((a.T @ b).square_().div_(len(a))).clamp_min_(0)
        total.copy_(torch.where(doubtful, exact.to(total.dtype), total))
        return
    i, j = doubtful.nonzero(as_tuple=True)
    rows = a[:, i] * b[:, j]
    total[doubtful] = (rows - rows.mean(0)).square_().sum(0).to(total.dtype)


def outer_as(operand: Tensor, a: Tensor, b: Tensor, out: Tensor | None) -> Tensor:
    """Return ``Σ_t a_nt ⊗ b_nt``; new rows lie in memory as the operand does."""
    if out is None:
        n, first, second = len(a), a.shape[2], b.shape[2]
        if operand.stride(-2) < operand.stride(-1):
            out = a.new_empty(n, second, first).mT
        else:
            out = a.new_empty(n, first, second)
    if out.stride(1) < out.stride(2):
        outer(b, a, out.mT)
    else:
        outer(a, b, out)
    return out


def outer(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """Write ``Σ_t a_nt ⊗ b_nt`` into ``out``."""
    if a.shape[1] == 1:
        return torch.mul(a[:, 0, :, None], b[:, 0, None, :], out=out)
    if out.dtype == a.dtype == b.dtype:
        return torch.bmm(a.mT, b, out=out)
    return fill(torch.bmm(a.mT, b.to(a.dtype)), out)
