"""Contractions at and below a layer that mixes samples.

Right below the topmost batch norm its closed form serves all samples at once (``Projected``, and
``ProjectedRows`` where that factorizes). Further down every sample is a column of its own, and a
column sums over the positions of all samples (``PooledRows``). The scale and shift of a batch norm
itself are ordinary broadcasts (``broadcast.py``).

Legend: ``n`` sample, ``k`` column, ``o``/``i`` output and input feature, ``c`` channel; ``x̂`` the
normalised values, ``M`` how many of them a channel has, ``L = γg/σ`` the cotangent below the batch
norm as if its statistics were fixed.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from unbatch.autodiff.contractions.contraction import (
    Contraction,
    Gathering,
    OperandUse,
    only_cotangent,
)
from unbatch.autodiff.contractions.matmul import Linear, outer_as, stacked_dots
from unbatch.linalg.rows import fill, same_dtype, squares, wide


class Projected(Contraction):
    """A weight right below a batch norm whose output is still separate.

    Per channel, the derivative of a batch norm is ``(γ/σ) Π`` with ``Π = I − 11ᵀ/M − x̂x̂ᵀ/M``; it
    is symmetric, so that it can be applied to the input X of the op in place of the cotangent:

        ``row_n = L_nᵀ (ΠX)_n = L_nᵀ X_n − s_n·D₁ − t_n·D₂``,
        ``s_n = Σ L_n``, ``t_n = Σ L_n x̂_n`` over the positions of sample n,
        ``D₁``, ``D₂`` the total rows for the cotangents ``1/M`` and ``x̂/M``.
    """

    def __init__(self, inner: Contraction, channel: int, gain: Tensor, normalised: Tensor) -> None:
        """``inner``: the op's own contraction, fresh. ``channel``: the operand's dim of channels.

        ``gain`` is ``γ/σ``, ``[c]``; ``normalised`` is ``x̂``.
        """
        self.inner, self.channel = inner, channel
        self.layout, self.operand, self.samples = inner.layout, inner.operand, inner.samples
        self.gain, self.normalised = gain, normalised
        # What is subtracted: coefficients ``[n, c]`` (s and t) with their totals (D₁ and D₂).
        self.corrections: list[tuple[Tensor, Tensor]] = []

    @property
    def kind(self) -> str:
        return f"{self.inner.kind}, projected"

    def receive(self, cotangents: Sequence[Tensor | None]) -> None:
        x = self.normalised
        per_channel = [1, -1, *[1] * (x.ndim - 2)]
        local = only_cotangent(cotangents) * self.gain.reshape(per_channel)
        # A contraction holds one cotangent: three copies receive L, 1/M and x̂/M.
        fresh = self.inner
        self.inner = copy.copy(fresh)
        self.inner.receive([local])
        places = [d for d in range(1, x.ndim + 1) if d != 2]  # of a sample: all but [n, _, c]
        count = x.numel() // x.shape[1]
        ones = torch.ones(self.samples, dtype=x.dtype, device=x.device)
        self.corrections = []
        for direction in (torch.ones_like(x), x):
            contraction = copy.copy(fresh)
            contraction.receive([(direction / count).to(local.dtype)])
            coefficients = self.layout.split(local * direction).sum(places)
            self.corrections.append((coefficients, contraction.weighted_sum(ones)))

    def rows(self, where: slice, out: Tensor | None = None) -> Tensor:
        rows = self.inner.rows(where, out)
        if out is None:
            rows = rows.clone()  # those of a shift are a view of its cotangent
        # s and t have one number for each channel, broadcast along the operand's dim of channels.
        for coefficients, total in self.corrections:
            a = coefficients[where]
            shape = [len(a)] + [1] * self.operand.ndim
            shape[1 + self.channel] = a.shape[1]
            rows.sub_(a.reshape(shape) * total)
        return rows


class ProjectedRows(Contraction):
    """The same for a matrix product with one position per sample, where it factorizes.

    ``row_n = L_n ⊗ (c_n − x̂_n ∘ B)`` with ``c`` the centred input ``[n, i]`` and ``B = x̂ᵀc/N``
    its regression on each channel, ``[o, i]``.
    """

    lean = frozenset({"squared_norms", "sum_of_squares", "dots", "weighted_sum"})
    kind = "linear, projected"
    compact = True

    def __init__(self, inner: Linear, gain: Tensor, normalised: Tensor) -> None:
        self.layout, self.operand, self.samples = inner.layout, inner.operand, inner.samples
        # Forward quantities only, and so shared by all cotangents of this site.
        self.gain, self.xhat = gain, wide(normalised)
        self.centred = wide(inner.x) - wide(inner.x).mean(0)
        self.slope = self.xhat.T @ self.centred / self.samples
        self.factor = inner.factor
        self.l: Tensor

    def receive(self, cotangents: Sequence[Tensor | None]) -> None:
        self.l = wide(only_cotangent(cotangents) * (self.gain * self.factor))

    def rows(self, where: slice, out: Tensor | None = None) -> Tensor:
        x, c = self.xhat[where, :, None], self.centred[where, None, :]
        # The operand is ``[i, o]``; the residual is formed as ``[n, o, i]``, into ``out`` if that
        # fits.
        if out is not None and out.dtype == c.dtype:
            return self._scaled_residual(x, c, where, out.mT)
        residual = c.new_empty(len(x), *self.slope.shape)
        return fill(self._scaled_residual(x, c, where, residual), out)

    def _scaled_residual(self, x: Tensor, c: Tensor, where: slice, residual: Tensor) -> Tensor:
        torch.addcmul(c, x, self.slope, value=-1, out=residual)
        return residual.mul_(self.l[where, :, None]).mT

    def squared_norms(self, where: slice) -> Tensor:
        # ‖row_n‖² = Σ_o L_no² ‖c_n − x̂_no B_o‖², the norm multiplied out.
        x, c, l2 = self.xhat[where], self.centred[where], self.l[where].square()
        residual = (
            c.square().sum(1, keepdim=True)
            - 2 * x * (c @ self.slope.T)
            + x.square() * self.slope.square().sum(1)
        )
        return (l2 * residual.clamp_min_(0)).sum(1)

    def sum_of_squares(self, where: slice) -> Tensor:
        return self.sum_of_squares_for(self.l[where].square(), where).clamp_min_(0)

    def gathering(self, memory: int) -> Gathering:
        return _SquaredCotangents(self)

    def sum_of_squares_for(self, l2: Tensor, where: slice) -> Tensor:
        """Return ``Σ_n row_n²`` for squares ``l2`` ``[n, o]`` of ``L``, in which it is linear."""
        x, c = self.xhat[where], self.centred[where]
        mixed = (l2 * x).T @ c * self.slope * 2
        total = l2.T @ c.square() - mixed + (l2 * x.square()).sum(0)[:, None] * self.slope.square()
        return total.T

    def weighted_sum(self, weights: Tensor) -> Tensor:
        scaled = self.l * weights.to(self.l.dtype)[:, None]
        return (scaled.T @ self.centred - (scaled * self.xhat).sum(0)[:, None] * self.slope).T

    def dots(self) -> Tensor:
        return self.dots_of([self])

    def dots_of(self, contractions: Sequence[ProjectedRows]) -> Tensor:
        # ⟨row_n, row_m⟩ = Σ_o L_no L_mo ⟨c_n − x̂_no B_o, c_m − x̂_mo B_o⟩, multiplied out;
        # ``crossed`` has ⟨c_n, x̂_mo B_o⟩ and ``quadratic`` x̂_no x̂_mo ‖B_o‖².
        c, count = self.centred, len(contractions)
        ls = torch.cat([m.l for m in contractions])
        scaled = ls * self.xhat.repeat(count, 1)
        crossed = (ls * (c @ self.slope.T).repeat(count, 1)) @ scaled.T
        quadratic = (scaled * self.slope.square().sum(1)) @ scaled.T
        return stacked_dots([m.l for m in contractions], c @ c.T) - crossed - crossed.T + quadratic


class _SquaredCotangents(Gathering):
    """Sums the squares of ``L`` over cotangents; one formula at the end serves all of them."""

    def __init__(self, first: ProjectedRows) -> None:
        self.squares, self.first = torch.zeros_like(first.l), first

    def add(self, contraction: ProjectedRows, where: slice, sign: float) -> None:
        self.squares[where].addcmul_(contraction.l[where], contraction.l[where], value=sign)

    def total(self) -> Tensor:
        return self.first.sum_of_squares_for(self.squares, slice(0, self.first.samples))


class PooledRows(Contraction):
    """A matrix product below the last place of mixing: a row sums over all samples.

    ``row_k = Σ_m G_km ⊗ X_m`` with ``m`` the positions of all samples, and the same ``X`` for all
    columns. Where there are fewer positions than features, the rows lie in a space of that
    dimension: ``X = L Qᵀ`` gives coordinates ``G_kᵀ L`` with the same inner products.
    """

    lean = frozenset({"squared_norms", "coordinates"})

    def __init__(self, call: OperandUse) -> None:
        self.operand, self.features_first = call.operand, call.name != "mat2"
        left = "self" if call["mat1"] is None else "mat1"
        self.x: Tensor = call["mat2"].T if self.features_first else call[left]
        self.factor = 1 if call["alpha"] is None else call["alpha"]
        self.g: Tensor
        self.first = 0  # number of the first column that was received
        self.shared = self  # holds what all columns have in common

    def of(self, g: Tensor, first: int) -> PooledRows:
        """Return this for cotangents ``[k, *output]`` of columns numbered from ``first``."""
        other = copy.copy(self)
        other.shared = self
        other.receive([g])
        other.first = first
        return other

    def receive(self, cotangents: Sequence[Tensor | None]) -> None:
        """Take ``[k, *output]`` of some columns; slices of columns count from ``first``."""
        g = only_cotangent(cotangents)
        if self.features_first:
            g = g.mT
        g, self.x = same_dtype(g, self.x)
        if self.factor != 1:
            g = g * self.factor
        self.g = g
        self.samples = len(g)

    def _columns(self, where: slice) -> Tensor:
        return self.g[where.start - self.first : where.stop - self.first]

    def rows(self, where: slice, out: Tensor | None = None) -> Tensor:
        g = self._columns(where)
        x = self.x.expand(len(g), *self.x.shape)
        if self.features_first:
            return outer_as(self.operand, g, x, out)
        return outer_as(self.operand, x, g, out)

    @cached_property
    def positions(self) -> Tensor:
        """Return ``L``, ``[m, r]``: the positions in ``r = min(m, i)`` coordinates."""
        x = wide(self.x)
        if x.shape[0] >= x.shape[1]:
            return x
        return torch.linalg.qr(x.T, mode="r")[1].T

    def coordinates(self, where: slice) -> Tensor:
        """Return rows up to a rotation, ``[k, q]``."""
        # The coordinates of X are those of all columns, and are computed once for all of them.
        g = wide(self._columns(where))
        return torch.matmul(g.mT, self.shared.positions).flatten(1)

    def squared_norms(self, where: slice) -> Tensor:
        return squares(self.coordinates(where))

    def gathering(self, memory: int) -> Gathering | None:
        # ``M_o`` for every output feature.
        positions, features = self.x.shape
        size = self.g.shape[2] * positions**2 * wide(self.x).element_size()
        if positions >= features or size > memory:
            return None
        return _SecondMoments(self)


class _SecondMoments(Gathering):
    """``Σ_k σ_k (Σ_m G_kmo X_mi)² = x_iᵀ M_o x_i`` with ``M_o = Σ_k σ_k g_ko g_koᵀ``,
    ``[o, m, m]``.

    With fewer positions than input features this takes less than forming the rows.
    """

    def __init__(self, first: PooledRows) -> None:
        g = wide(first.g)
        self.moments, self.first = g.new_zeros(g.shape[2], g.shape[1], g.shape[1]), first

    def add(self, contraction: PooledRows, where: slice, sign: float) -> None:
        g = wide(contraction._columns(where))
        columns, positions, features = g.shape
        # ``[o, k, m]``, so that one batched product sums over columns for every feature.
        by_feature = g.reshape(-1, features).T.contiguous().view(features, columns, positions)
        self.moments.baddbmm_(by_feature.mT, by_feature, alpha=sign)

    def total(self) -> Tensor:
        # One feature at a time: a product for all of them would be of the size of the rows.
        x = wide(self.first.x)
        squares = torch.stack([(moment @ x).mul_(x).sum(0) for moment in self.moments])
        if self.first.features_first:
            return squares
        return squares.T
