"""Contractions at and below a layer that mixes samples.

Right below the topmost batch norm its closed form serves all samples at once; further down every sample is a column,
and a column pools the places of all samples.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from unbatch.autodiff.contractions.contraction import Contraction, Gathering, OperandUse
from unbatch.autodiff.contractions.matmul import Linear, outer_as, stacked_dots
from unbatch.linalg.rows import fill, same_dtype, squares, wide


class Projected(Contraction):
    """The weight right below a batch norm whose output is still separate: the batch norm's closed form.

    With ``L = γg/σ`` the cotangent as if the statistics were fixed and ``Π = I − 11ᵀ/M − x̂x̂ᵀ/M`` per channel,
    ``row_n = L_nᵀ (ΠX)_n = local_n − s_n·D₁ − t_n·D₂``: ``s_n = Σ L``, ``t_n = Σ L x̂`` over the places of sample n, and
    ``D₁``, ``D₂`` the meeting's sums for the cotangents ``1/M`` and ``x̂/M``.
    """

    def __init__(self, inner: Contraction, channel: int, gain: Tensor, normalised: Tensor) -> None:
        """``inner``: the meeting, fresh; ``channel``: the operand's axis of channels; ``gain`` is ``γ/σ``, ``[c]``."""
        self.inner, self.channel = inner, channel
        self.layout, self.operand, self.samples = (
            self.inner.layout,
            self.inner.operand,
            self.inner.samples,
        )
        self.gain, self.normalised = gain, normalised
        self.parts: list[tuple[Tensor, Tensor]] = []

    @property
    def kind(self) -> str:
        return f"{self.inner.kind}, projected"

    def receive(self, cotangents: Sequence[Tensor | None]) -> None:
        (g,) = cotangents[:1]
        assert g is not None
        x = self.normalised
        per_channel = [1, -1, *[1] * (x.ndim - 2)]
        local = g * self.gain.reshape(per_channel)
        count = x.numel() // x.shape[1]
        ones = torch.ones(self.samples, dtype=x.dtype, device=x.device)
        self.inner, self.parts, *sums = (
            copy.copy(self.inner),
            [],
            *(copy.copy(self.inner) for _ in range(2)),
        )
        self.inner.receive([local])
        rest = [d for d in range(1, x.ndim + 1) if d != 2]
        for total, direction in zip(sums, (torch.ones_like(x), x), strict=True):
            total.receive([(direction / count).to(local.dtype)])
            coefficients = self.layout.split(local * direction).sum(rest)
            self.parts.append((coefficients, total.weighted_sum(ones)))

    def rows(self, where: slice, out: Tensor | None = None) -> Tensor:
        rows = self.inner.rows(where, out)
        rows = rows.clone() if out is None else rows  # those of a shift are a view of its cotangent
        view = [-1, *(-1 if d == self.channel else 1 for d in range(self.operand.ndim))]
        for coefficients, total in self.parts:
            a = coefficients[where]
            rows.sub_(
                a.reshape([len(a), *(a.shape[1] if v == -1 else 1 for v in view[1:])]) * total
            )
        return rows


class ProjectedRows(Contraction):
    """The same for a matrix product with one place per sample, where it factorizes.

    ``row_n = L_n ⊗ (c_n − x̂_n ∘ B)``: ``c`` the centred input ``[n, i]``, ``B = x̂ᵀc/N`` its regression on each channel,
    ``[o, i]``.
    """

    lean = frozenset({"squared_norms", "sum_of_squares", "dots", "weighted_sum"})
    kind = "linear, projected"
    compact = True

    def __init__(self, inner: Linear, gain: Tensor, normalised: Tensor) -> None:
        self.layout, self.operand, self.samples = inner.layout, inner.operand, inner.samples
        self.gain, self.xhat = gain, wide(normalised)
        self.centred = wide(inner.x) - wide(inner.x).mean(0)
        self.slope = self.xhat.T @ self.centred / self.samples
        self.factor = inner.factor
        self.l: Tensor

    def receive(self, cotangents: Sequence[Tensor | None]) -> None:
        (g,) = cotangents[:1]
        assert g is not None
        self.l = wide(g * (self.gain * self.factor))

    def rows(self, where: slice, out: Tensor | None = None) -> Tensor:
        x, c = self.xhat[where, :, None], self.centred[where, None, :]
        fits = out is not None and out.dtype == c.dtype
        target = out.mT if fits and out is not None else c.new_empty(len(x), *self.slope.shape)
        torch.addcmul(c, x, self.slope, value=-1, out=target)
        rows = target.mul_(self.l[where, :, None]).mT
        return rows if fits else fill(rows, out)

    def squared_norms(self, where: slice) -> Tensor:
        x, c, l2 = self.xhat[where], self.centred[where], self.l[where].square()
        left = (
            c.square().sum(1, keepdim=True)
            - 2 * x * (c @ self.slope.T)
            + x.square() * self.slope.square().sum(1)
        )
        return (l2 * left.clamp_min_(0)).sum(1)

    def sum_of_squares(self, where: slice) -> Tensor:
        return self.by_squares(self.l[where].square(), where).clamp_min_(0)

    def gathering(self, memory: int) -> Gathering:
        return _Regressed(self)

    def by_squares(self, l2: Tensor, where: slice) -> Tensor:
        """Sums of squares are linear in those of ``L``."""
        x, c = self.xhat[where], self.centred[where]
        twice = (l2 * x).T @ c * self.slope * 2
        whole = l2.T @ c.square() - twice + (l2 * x.square()).sum(0)[:, None] * self.slope.square()
        return whole.T

    def weighted_sum(self, weights: Tensor) -> Tensor:
        scaled = self.l * weights.to(self.l.dtype)[:, None]
        return (scaled.T @ self.centred - (scaled * self.xhat).sum(0)[:, None] * self.slope).T

    def dots(self) -> Tensor:
        return self.dots_of([self])

    def dots_of(self, meetings: Sequence[ProjectedRows]) -> Tensor:
        c, count = self.centred, len(meetings)
        ls = torch.cat([m.l for m in meetings])
        scaled = ls * self.xhat.repeat(count, 1)
        crossed = (ls * (c @ self.slope.T).repeat(count, 1)) @ scaled.T
        bent = (scaled * self.slope.square().sum(1)) @ scaled.T
        return stacked_dots([m.l for m in meetings], c @ c.T) - crossed - crossed.T + bent


class _Regressed(Gathering):
    def __init__(self, first: ProjectedRows) -> None:
        self.squares, self.like = torch.zeros_like(first.l), first

    def add(self, meeting: ProjectedRows, where: slice, sign: float) -> None:
        self.squares[where].addcmul_(meeting.l[where], meeting.l[where], value=sign)

    def total(self) -> Tensor:
        return self.like.by_squares(self.squares, slice(0, self.like.samples))


class Pooled(Contraction):
    """A matrix product below the last place of mixing: the row of column ``k`` sums over the places of all samples.

    ``row_k = Σ_m G_km ⊗ X_m`` with the same ``X`` for all columns. Where there are fewer places than features, the rows
    lie in a space of that dimension: ``X = L Qᵀ`` gives coordinates ``G_kᵀ L`` with the same inner products.
    """

    lean = frozenset({"squared_norms", "coordinates"})

    def __init__(self, call: OperandUse) -> None:
        self.operand, self.features_first = call.operand, call.name != "mat2"
        left = "mat1" if call["mat1"] is not None else "self"
        self.x: Tensor = call["mat2"].T if self.features_first else call[left]
        self.factor = call["alpha"] if call["alpha"] is not None else 1
        self.g: Tensor
        self.first = 0
        self.whole = self  # keeps what all columns share

    def of(self, g: Tensor, first: int) -> Pooled:
        """The same with the cotangents of other columns, ``[k, *output]``, the first of which is ``first``."""
        other = copy.copy(self)
        other.whole = self
        other.receive([g])
        other.first = first
        return other

    def receive(self, cotangents: Sequence[Tensor | None]) -> None:
        """``[k, *output]`` of some columns; the slices asked for afterwards count from ``first``."""
        (g,) = cotangents
        assert g is not None
        g, self.x = same_dtype(g.mT if self.features_first else g, self.x)
        self.g = g if self.factor == 1 else g * self.factor
        self.samples = len(g)

    def _mine(self, where: slice) -> Tensor:
        return self.g[where.start - self.first : where.stop - self.first]

    def rows(self, where: slice, out: Tensor | None = None) -> Tensor:
        g = self._mine(where)
        x = self.x.expand(len(g), *self.x.shape)
        a, b = (g, x) if self.features_first else (x, g)
        return outer_as(self.operand, a, b, out)

    @cached_property
    def small(self) -> Tensor:
        """``L``, ``[m, r]``: the places in coordinates."""
        x = wide(self.x)
        return torch.linalg.qr(x.T, mode="r")[1].T if x.shape[0] < x.shape[1] else x

    def coordinates(self, where: slice) -> Tensor:
        """``[k, q]``: rows up to a rotation."""
        g = wide(self._mine(where))
        return torch.matmul(g.mT, self.whole.small).flatten(1)

    def squared_norms(self, where: slice) -> Tensor:
        return squares(self.coordinates(where))

    def gathering(self, memory: int) -> Gathering | None:
        places, features = self.x.shape
        size = self.g.shape[2] * places**2 * wide(self.x).element_size()
        return _SecondMoments(self) if places < features and size <= memory else None


class _SecondMoments(Gathering):
    """``Σ_k σ_k (Σ_m G_kmo X_mi)² = x_iᵀ M_o x_i`` with ``M_o = Σ_k σ_k g_ko g_koᵀ``, ``[o, m, m]``.

    Fewer places than input features: then this takes less than forming the rows.
    """

    def __init__(self, first: Pooled) -> None:
        g = wide(first.g)
        self.moments, self.like = g.new_zeros(g.shape[2], g.shape[1], g.shape[1]), first

    def add(self, meeting: Pooled, where: slice, sign: float) -> None:
        g = wide(meeting._mine(where))
        columns, places, features = g.shape
        turned = g.reshape(-1, features).T.contiguous().view(features, columns, places)
        self.moments.baddbmm_(turned.mT, turned, alpha=sign)

    def total(self) -> Tensor:
        x, like = wide(self.like.x), self.like
        squares = torch.stack([(m @ x).mul_(x).sum(0) for m in self.moments])
        return squares if like.features_first else squares.T
