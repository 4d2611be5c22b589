"""How the cotangent at the output of an op meets the op's other inputs: derivatives by one operand, sample by sample.

One class per kind of site, found by the name of the op and of the operand. A new kind is one class here and one entry
in ``KINDS``. Nothing here knows about models, parameters or mixing: a *meeting* has an operand ``u`` that all samples
share, and rows ``∂(g·y)/∂u`` over the samples that its layout tells apart.

Legend: ``n`` sample, ``t`` position inside a sample, ``o``/``i`` output and input feature; ``G`` the cotangent
``[n, t, o]``, ``X`` the other input ``[n, t, i]``.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_map

from unbatch.layout import Scattered

aten = torch.ops.aten
CANCELS = 0.9  # of two sums of squares that are subtracted, the share from which on rounding is felt


@dataclass
class Call:
    """An op as it ran: its arguments by name, its outputs, and which argument is the shared operand."""

    op: Any
    arguments: dict[str, Any]
    outputs: tuple[Tensor, ...]
    operand: Tensor
    name: str  # the argument that is the operand
    layouts: tuple[Any, ...]  # of every output

    @property
    def layout(self) -> Any:
        return self.layouts[0]

    def __getitem__(self, name: str) -> Any:
        return self.arguments.get(name)


class Meeting(ABC):
    """Derivatives by a shared operand, for every sample, from a cotangent and what the forward pass kept.

    ``receive`` hands over the cotangents; afterwards every method takes a slice of samples. Only ``rows`` has to be
    written; the others are there to be replaced where a contraction does without rows.
    """

    lean: frozenset[str] = frozenset()  # what this kind gives without forming rows

    def __init__(self, call: Call) -> None:
        self.layout, self.operand = call.layout, call.operand
        self.samples = call.layout.samples

    @abstractmethod
    def receive(self, cotangents: Sequence[Tensor | None]) -> None:
        """Take the cotangents of the outputs of the op, as it ran."""

    @abstractmethod
    def rows(self, where: slice, out: Tensor | None = None) -> Tensor:
        """``[n, *operand]``; written into ``out`` where that is given."""

    def squared_norms(self, where: slice) -> Tensor:
        """``[n]``."""
        return squares(self.rows(where))

    def sum_of_squares(self, where: slice) -> Tensor:
        """``[*operand]``: ``Σ_n row_n²``, entry by entry."""
        return total_of_squares(self.rows(where))

    def scatter(self, where: slice) -> Tensor:
        """``[*operand]``: ``Σ_n (row_n − their mean)²``, entry by entry."""
        rows = self.rows(where)
        return total_of_squares(rows, wide(rows).mean(0))

    def weighted_sum(self, weights: Tensor) -> Tensor:
        """``[*operand]``: ``Σ_n c_n row_n``, over all samples."""
        return torch.einsum("n,n...->...", weights.to(self.operand.dtype), self.rows(slice(0, self.samples)))

    def dots(self) -> Tensor:
        """``[n, n]``: ``⟨row_n, row_m⟩``."""
        flat = wide(self.rows(slice(0, self.samples)).flatten(1))
        return flat @ flat.T


def wide(t: Tensor) -> Tensor:
    """Sums are accumulated in float32 at least; a tensor of its own either way."""
    return t.float() if t.dtype in (torch.float16, torch.bfloat16) else t


def squares(rows: Tensor) -> Tensor:
    """Squared norm of each row."""
    flat = wide(rows).flatten(1)
    return torch.linalg.vector_norm(flat, dim=1).square_() if flat.shape[1] else _real(flat.new_zeros(len(flat)))


def total_of_squares(rows: Tensor, mean: Tensor | None = None) -> Tensor:
    """``Σ_n |row_n − mean|²``, entry by entry; large rows one by one, so that nothing of their size is made anew."""
    rows = wide(rows)
    if rows.is_complex() or rows[0].numel() < 2**12:
        apart = rows if mean is None else rows - mean
        return apart.abs().square_().sum(0)
    total, apart = torch.zeros_like(rows[0]), torch.empty_like(rows[0])
    for row in rows:
        moved = row if mean is None else torch.sub(row, mean, out=apart)
        total.addcmul_(moved, moved)
    return total


def _real(t: Tensor) -> Tensor:
    return t.real if t.is_complex() else t


def fill(result: Tensor, out: Tensor | None) -> Tensor:
    return result if out is None else out.copy_(result)


def reduce_to(t: Tensor, shape: Sequence[int]) -> Tensor:
    """Sum ``[n, *dims]`` over the dims along which ``shape`` was broadcast: ``[n, *shape]``."""
    dims = [d + 1 for d, s in enumerate(shape) if s == 1 and t.shape[d + 1] != 1]
    return t.sum(dims, keepdim=True) if dims else t


# --- kinds ----------------------------------------------------------------------------------------


class Linear(Meeting):
    """``y = x uᵀ`` and its relatives: ``row_n = Σ_t G_nt ⊗ X_nt``.

    Rows are formed in the order in which the operand lies in memory, so that a transposed weight needs no copy.
    """

    def __init__(self, call: Call, x: Tensor, features_first: bool) -> None:
        """``x``: ``[places, i]``. ``features_first``: the op is ``u xᵀ`` with ``u`` ``[o, i]``; else ``x u``."""
        super().__init__(call)
        self.x, self.features_first = x, features_first
        self.batched = call.outputs[0].ndim == 3
        self.factor = call["alpha"] if call["alpha"] is not None else 1
        self.g: Tensor

    def receive(self, cotangents: Sequence[Tensor | None]) -> None:
        (g,) = cotangents[:1]
        assert g is not None
        g = g[0] if self.batched else g
        along = replace(self.layout, dim=0)
        self.g, self.x = along.split(g.T if self.features_first else g), along.split(self.x)
        if self.factor != 1:
            self.g = self.g * self.factor

    @property
    def sides(self) -> tuple[Tensor, Tensor]:
        return (self.g, self.x) if self.features_first else (self.x, self.g)

    @property
    def lean(self) -> frozenset[str]:  # type: ignore[override]
        _, t, o = self.g.shape
        i = self.x.shape[2]
        pairs = {"squared_norms"} if t * (o + i) < o * i else set()
        alone = {"sum_of_squares", "squared_norms", "dots"} if t == 1 else set()
        wide_enough = {"scatter"} if t == 1 and self.g.dtype != torch.float64 else set()
        return frozenset({"weighted_sum"} | pairs | alone | wide_enough)

    def rows(self, where: slice, out: Tensor | None = None) -> Tensor:
        a, b = (side[where] for side in self.sides)
        n, first, second = len(a), a.shape[2], b.shape[2]
        if out is not None:
            flat = out[:, 0] if self.batched else out
        elif self.operand.stride(-2) < self.operand.stride(-1):
            flat = a.new_empty(n, second, first).mT
        else:
            flat = a.new_empty(n, first, second)
        if flat.stride(1) < flat.stride(2):
            outer(b, a, flat.mT)
        else:
            outer(a, b, flat)
        return flat[:, None] if self.batched else flat

    def squared_norms(self, where: slice) -> Tensor:
        if "squared_norms" not in self.lean:
            return super().squared_norms(where)
        a, b = (wide(side[where]) for side in self.sides)
        if a.shape[1] == 1:
            return squares(a) * squares(b)
        return (torch.bmm(a, a.mT) * torch.bmm(b, b.mT)).sum((1, 2))

    def sum_of_squares(self, where: slice) -> Tensor:
        if "sum_of_squares" not in self.lean:
            return super().sum_of_squares(where)
        return self._product(*(wide(side)[where, 0].square() for side in self.sides))

    def scatter(self, where: slice) -> Tensor:
        """``Σ r² − (Σ r)²/N``, in blocks that stay in the cache; where that cancels, around the mean and in float64."""
        if "scatter" not in self.lean:
            return super().scatter(where)
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
        return self._product(a * scale, b) if a.shape[1] <= b.shape[1] else self._product(a, b * scale)

    def _product(self, a: Tensor, b: Tensor) -> Tensor:
        """``aᵀ b`` in the shape of the operand, and in its order in memory."""
        transposed = self.operand.stride(-2) < self.operand.stride(-1)
        return ((b.T @ a).T if transposed else a.T @ b).reshape(self.operand.shape)

    def dots(self) -> Tensor:
        if "dots" not in self.lean:
            return super().dots()
        a, b = (wide(side)[:, 0] for side in self.sides)
        return (a @ a.T) * (b @ b.T)


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


def outer(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """``Σ_t a_nt ⊗ b_nt`` into ``out``."""
    if a.shape[1] == 1:
        return torch.mul(a[:, 0, :, None], b[:, 0, None, :], out=out)
    return torch.bmm(a.mT, b, out=out) if out.dtype == a.dtype == b.dtype else fill(torch.bmm(a.mT, b.to(a.dtype)), out)


class Shift(Meeting):
    """``y = .. + factor·u``, broadcast, or placed along ``axis``: rows are sums of the cotangent."""

    def __init__(self, call: Call, factor: Any = 1, axis: int | None = None) -> None:
        super().__init__(call)
        self.factor, ndim = factor, call.outputs[0].ndim
        shape = list(self.operand.shape)
        after = ndim - len(shape) if axis is None else axis
        self.shape = [1] * after + shape + [1] * (ndim - after - len(shape))  # the operand, as it is broadcast
        self.spans = self.shape[self.layout.dim] != 1  # it has entries of its own for every sample
        self.g: Tensor

    def receive(self, cotangents: Sequence[Tensor | None]) -> None:
        (g,) = cotangents[:1]
        assert g is not None
        felt = self._felt(g)
        self.g = felt.sum_to_size(self.shape) if self.spans else self.layout.split(felt)

    def _felt(self, g: Tensor) -> Tensor:
        """The derivative by the operand as if it had not been broadcast."""
        return g

    def rows(self, where: slice, out: Tensor | None = None) -> Tensor:
        if self.spans:
            result = self.layout.only(self.g, *where.indices(self.samples)[:2])
        else:
            result = reduce_to(self.g[where], self.shape)
        result = result.reshape(len(result), *self.operand.shape)
        return fill(result if self.factor == 1 else result * self.factor, out)


class Scale(Shift):
    """``y = u·x̂ + ..``, broadcast, or placed along ``axis``."""

    def __init__(self, call: Call, x: Tensor, axis: int | None = None) -> None:
        super().__init__(call, axis=axis)
        self.x = x

    def _felt(self, g: Tensor) -> Tensor:
        return g * self.x


class Pointwise(Shift):
    """Any elementwise op: its derivative by the operand at every place, then as for a shift."""

    def __init__(self, call: Call) -> None:
        super().__init__(call)
        self.call = call

    def _felt(self, g: Tensor) -> Tensor:
        call = self.call
        u = self.operand.detach().expand(g.shape).requires_grad_()
        with torch.enable_grad():
            y = call.op(**{**_detached(call.arguments), call.name: u})
            (felt,) = torch.autograd.grad(y, u, g)
        return felt


class Embedding(Meeting):
    """A table looked up: the cotangents of equal indices of a sample are summed, and rows are sparse."""

    lean = frozenset({"squared_norms", "sum_of_squares", "weighted_sum"})

    def __init__(self, call: Call) -> None:
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
        keep = torch.ones_like(index, dtype=torch.bool) if self.padding is None else index != self.padding
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


class Convolution(Meeting):
    """The weight of a convolution. Which of three ways is fastest depends on the shapes and is measured once."""

    lean = frozenset({"weighted_sum"})
    fastest: dict[tuple[Any, ...], str] = {}  # noqa: RUF012  what has been measured, for all convolutions of a shape

    def __init__(self, call: Call) -> None:
        super().__init__(call)
        self.x: Tensor = call["input"]
        names = ("stride", "padding", "dilation", "transposed", "output_padding", "groups")
        self.geometry = [call[n] for n in names]
        self.g: Tensor

    def receive(self, cotangents: Sequence[Tensor | None]) -> None:
        (g,) = cotangents[:1]
        assert g is not None
        self.g, self.x = self.layout.split(g), self.layout.split(self.x)

    def rows(self, where: slice, out: Tensor | None = None) -> Tensor:
        g, x = self.g[where], self.x[where]
        return fill(getattr(self, self._way(g, x))(g, x), out)

    def weighted_sum(self, weights: Tensor) -> Tensor:
        scaled = self.g * weights.to(self.g.dtype).reshape(-1, *[1] * (self.g.ndim - 1))
        return self._backward(scaled.flatten(0, 1), self.x.flatten(0, 1))

    def _way(self, g: Tensor, x: Tensor) -> str:
        plain = not self.geometry[3] and self.geometry[5] == 1 and x.ndim == 5
        ways = ["vmapped", "one_by_one", *(["windows"] if plain else [])]
        if len(g) * g[0].numel() < 2**12:
            return "vmapped"
        key = (tuple(g.shape[1:]), min(len(g), 16), tuple(x.shape[1:]), str(self.geometry), g.dtype, g.device)
        if key not in self.fastest:
            self.fastest[key] = min(ways, key=lambda w: _seconds(lambda: getattr(self, w)(g, x)))
        return self.fastest[key]

    def _backward(self, g: Tensor, x: Tensor) -> Tensor:
        wanted = (False, True, False)
        gradient: Tensor = aten.convolution_backward(g, x, self.operand, None, *self.geometry, wanted)[1]
        return gradient

    def vmapped(self, g: Tensor, x: Tensor) -> Tensor:
        out: Tensor = torch.func.vmap(self._backward)(g, x)
        return out

    def one_by_one(self, g: Tensor, x: Tensor) -> Tensor:
        return torch.stack([self._backward(a, b) for a, b in zip(g, x, strict=True)])

    def windows(self, g: Tensor, x: Tensor) -> Tensor:
        """Every place that the kernel saw, as a matrix (two dimensions, one group)."""
        (sy, sx), (py, px), (dy, dx) = (_pair(v) for v in self.geometry[:3])
        o, i, ky, kx = self.operand.shape
        n, t, _, height, width = g.shape
        x = F.pad(x, (px, px, py, py)) if px or py else x
        x = x.contiguous()
        s = x.stride()
        shape = (n, i, ky, kx, t, height, width)
        seen = x.as_strided(shape, (s[0], s[2], s[3] * dy, s[4] * dx, s[1], s[3] * sy, s[4] * sx))
        columns = seen.reshape(n, i * ky * kx, t * height * width)
        return torch.bmm(g.transpose(1, 2).reshape(n, o, -1), columns.mT).view(n, o, i, ky, kx)


def projected(call: Call, norm: Call) -> Meeting:
    """The meeting of a weight, or bias, with the input of a topmost batch norm."""
    xhat, scale = normalised(norm)
    gain = scale if norm["weight"] is None else scale * norm["weight"]
    plain = meeting(call)
    if isinstance(plain, Linear) and call.name == "mat2" and plain.x.ndim == 2 and xhat.ndim == 2:
        return ProjectedRows(plain, gain, xhat)
    channel = 0 if call.name in ("weight", "bias", "self", "mat1") else call.operand.ndim - 1
    return Projected(lambda: meeting(call), channel, gain, xhat)


def _pair(v: Sequence[int]) -> tuple[int, int]:
    return (v[0], v[0]) if len(v) == 1 else (v[0], v[1])


def _seconds(run: Callable[[], object]) -> float:
    best = float("inf")
    for _ in range(2):
        start = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - start)
    return best


class ProjectedRows(Meeting):
    """The same for a matrix product with one place per sample, where it factorizes: nothing of the size of rows is lost.

    ``row_n = L_n ⊗ (c_n − x̂_n ∘ B)``: ``c`` the centred input ``[n, i]``, ``B = x̂ᵀc/N`` its regression on each channel,
    ``[o, i]``.
    """

    lean = frozenset({"squared_norms", "sum_of_squares", "dots", "weighted_sum"})

    def __init__(self, inner: Linear, gain: Tensor, normalised: Tensor) -> None:
        self.layout, self.operand, self.samples = inner.layout, inner.operand, inner.samples
        self.gain, self.xhat = gain, normalised
        self.centred = inner.x - inner.x.mean(0)
        self.slope = normalised.T @ self.centred / self.samples
        self.factor = inner.factor
        self.l: Tensor

    def receive(self, cotangents: Sequence[Tensor | None]) -> None:
        (g,) = cotangents[:1]
        assert g is not None
        self.l = g * (self.gain * self.factor)

    def rows(self, where: slice, out: Tensor | None = None) -> Tensor:
        x, c = self.xhat[where, :, None], self.centred[where, None, :]
        target = c.new_empty(len(c), *self.slope.shape) if out is None else out.mT
        torch.addcmul(c, x, self.slope, value=-1, out=target)
        return target.mul_(self.l[where, :, None]).mT

    def squared_norms(self, where: slice) -> Tensor:
        x, c, l2 = self.xhat[where], self.centred[where], self.l[where].square()
        left = c.square().sum(1, keepdim=True) - 2 * x * (c @ self.slope.T) + x.square() * self.slope.square().sum(1)
        return (l2 * left.clamp_min_(0)).sum(1)

    def sum_of_squares(self, where: slice) -> Tensor:
        x, c, l2 = self.xhat[where], self.centred[where], self.l[where].square()
        twice = (l2 * x).T @ c * self.slope * 2
        whole = l2.T @ c.square() - twice + (l2 * x.square()).sum(0)[:, None] * self.slope.square()
        return whole.clamp_min_(0).T

    def weighted_sum(self, weights: Tensor) -> Tensor:
        scaled = self.l * weights.to(self.l.dtype)[:, None]
        return (scaled.T @ self.centred - (scaled * self.xhat).sum(0)[:, None] * self.slope).T

    def dots(self) -> Tensor:
        c, scaled = self.centred, self.l * self.xhat
        crossed = (self.l * (c @ self.slope.T)) @ scaled.T
        bent = (scaled * self.slope.square().sum(1)) @ scaled.T
        return (self.l @ self.l.T) * (c @ c.T) - crossed - crossed.T + bent


class Pooled(Meeting):
    """A matrix product below the last place of mixing: the row of column ``k`` sums over the places of all samples.

    ``row_k = Σ_m G_km ⊗ X_m`` with the same ``X`` for all columns. Where there are fewer places than features, the rows
    lie in a space of that dimension: ``X = L Qᵀ`` gives coordinates ``G_kᵀ L`` with the same inner products.
    """

    lean = frozenset({"squared_norms", "coordinates"})

    def __init__(self, call: Call) -> None:
        self.operand, self.features_first = call.operand, call.name != "mat2"
        left = "mat1" if call["mat1"] is not None else "self"
        self.x: Tensor = call["mat2"].T if self.features_first else call[left]
        self.factor = call["alpha"] if call["alpha"] is not None else 1
        self.g: Tensor
        self.first = 0

    def receive(self, cotangents: Sequence[Tensor | None]) -> None:
        """``[k, *output]`` of some columns; the slices asked for afterwards count from ``first``."""
        (g,) = cotangents
        assert g is not None
        g = g.mT if self.features_first else g
        self.g = g if self.factor == 1 else g * self.factor
        self.samples = len(g)

    def _mine(self, where: slice) -> Tensor:
        return self.g[where.start - self.first : where.stop - self.first]

    def rows(self, where: slice, out: Tensor | None = None) -> Tensor:
        g = self._mine(where)
        x = self.x.expand(len(g), *self.x.shape)
        a, b = (g, x) if self.features_first else (x, g)
        if out is None:
            transposed = self.operand.stride(0) < self.operand.stride(1)
            shape = (len(g), b.shape[2], a.shape[2]) if transposed else (len(g), a.shape[2], b.shape[2])
            out = g.new_empty(shape).mT if transposed else g.new_empty(shape)
        if out.stride(1) < out.stride(2):
            torch.bmm(b.mT, a, out=out.mT)
        else:
            torch.bmm(a.mT, b, out=out)
        return out

    @cached_property
    def _small(self) -> Tensor:
        """``L``, ``[m, r]``: the places in coordinates."""
        x = wide(self.x)
        return torch.linalg.qr(x.T, mode="r")[1].T if x.shape[0] < x.shape[1] else x

    def coordinates(self, where: slice) -> Tensor:
        """``[k, q]``: rows up to a rotation."""
        g = wide(self._mine(where))
        return torch.matmul(g.mT, self._small).flatten(1)

    def squared_norms(self, where: slice) -> Tensor:
        return squares(self.coordinates(where))


class Generic(Meeting):
    """Any op: run again, and pulled back once for every sample with the cotangents of the others set to zero."""

    def __init__(self, call: Call) -> None:
        super().__init__(call)
        self.call = call
        self.cotangents: list[Tensor | None] = []

    def receive(self, cotangents: Sequence[Tensor | None]) -> None:
        self.cotangents = list(cotangents)

    def rows(self, where: slice, out: Tensor | None = None) -> Tensor:
        first, last, _ = where.indices(self.samples)
        u = self.operand.detach().requires_grad_()
        call = self.call
        arguments = _detached(call.arguments, self.operand, call.op._schema.is_mutable)
        swapped = {k: _swap(v, self.operand, u) for k, v in arguments.items()}
        with torch.enable_grad():
            result = call.op(**swapped)
        outputs = [o for o in (result if isinstance(result, tuple | list) else [result]) if isinstance(o, Tensor)]
        told = zip(outputs, self.cotangents, call.layouts, strict=False)
        pairs = [(o, g, layout) for o, g, layout in told if g is not None and o.requires_grad]
        if not pairs:
            return fill(self.operand.new_zeros(last - first, *self.operand.shape), out)
        seen = [o for o, _, _ in pairs]
        alone = [[layout.only(g, n, n + 1)[0] for _, g, layout in pairs] for n in range(first, last)]
        rows = [torch.autograd.grad(seen, u, gs, retain_graph=True)[0] for gs in alone]
        return fill(torch.stack(rows), out)


def _detached(arguments: Mapping[str, Any], but: Tensor | None = None, fresh: bool = False) -> dict[str, Any]:
    one = lambda a: a.detach().clone() if fresh else a.detach()  # noqa: E731
    out = tree_map(lambda a: one(a) if isinstance(a, Tensor) and a is not but else a, dict(arguments))
    assert isinstance(out, dict)
    return out


def _swap(tree: Any, old: Tensor, new: Tensor) -> Any:
    return tree_map(lambda a: new if a is old else a, tree)


class Projected(Meeting):
    """The weight right below a batch norm whose output is still separate: the batch norm's closed form.

    With ``L = γg/σ`` the cotangent as if the statistics were fixed and ``Π = I − 11ᵀ/M − x̂x̂ᵀ/M`` per channel,
    ``row_n = L_nᵀ (ΠX)_n = local_n − s_n·D₁ − t_n·D₂``: ``s_n = Σ L``, ``t_n = Σ L x̂`` over the places of sample n, and
    ``D₁``, ``D₂`` the meeting's sums for the cotangents ``1/M`` and ``x̂/M``.
    """

    def __init__(self, inner: Callable[[], Meeting], channel: int, gain: Tensor, normalised: Tensor) -> None:
        """``inner`` makes the meeting; ``channel``: the operand's axis of channels; ``gain`` is ``γ/σ``, ``[c]``."""
        self.inner, self.make, self.channel = inner(), inner, channel
        self.layout, self.operand, self.samples = self.inner.layout, self.inner.operand, self.inner.samples
        self.gain, self.normalised = gain, normalised
        self.parts: list[tuple[Tensor, Tensor]] = []

    def receive(self, cotangents: Sequence[Tensor | None]) -> None:
        (g,) = cotangents[:1]
        assert g is not None
        x = self.normalised
        per_channel = [1, -1, *[1] * (x.ndim - 2)]
        local = g * self.gain.reshape(per_channel)
        count = x.numel() // x.shape[1]
        ones = torch.ones(self.samples, dtype=x.dtype, device=x.device)
        self.inner.receive([local])
        rest = [d for d in range(1, x.ndim + 1) if d != 2]
        for direction in (torch.ones_like(x), x):
            total = self.make()
            total.receive([direction / count])
            coefficients = self.layout.split(local * direction).sum(rest)
            self.parts.append((coefficients, total.weighted_sum(ones)))

    def rows(self, where: slice, out: Tensor | None = None) -> Tensor:
        rows = self.inner.rows(where, out)
        view = [-1, *(-1 if d == self.channel else 1 for d in range(self.operand.ndim))]
        for coefficients, total in self.parts:
            a = coefficients[where]
            rows.sub_(a.reshape([len(a), *(a.shape[1] if v == -1 else 1 for v in view[1:])]) * total)
        return rows


# --- which kind an op is --------------------------------------------------------------------------


def _matmul(call: Call) -> Meeting | None:
    left, right = ("mat1", "mat2") if call["mat1"] is not None else ("self", "mat2")
    a, b = call[left], call[right]
    if a.ndim == 3:
        if a.shape[0] != 1 or call.layout.dim == 0:
            return None
        a, b = a[0], b[0]
    if call.name == right and call.layout.dim == call.outputs[0].ndim - 2:
        return Linear(call, a, features_first=False)
    if call.name == left and call.layout.dim == call.outputs[0].ndim - 1:
        return Linear(call, b.T, features_first=True)
    return None


def _addmm(call: Call) -> Meeting | None:
    if call.name == "self":
        return Shift(call, call["beta"] if call["beta"] is not None else 1)
    return _matmul(call)


def _convolution(call: Call) -> Meeting | None:
    if call.layout.dim != 0 or call.name not in ("weight", "bias"):
        return None
    return Convolution(call) if call.name == "weight" else Shift(call, axis=1)


def _add(call: Call) -> Meeting | None:
    if isinstance(call["self"], Tensor) and isinstance(call["other"], Tensor):
        return Shift(call, (call["alpha"] if call["alpha"] is not None else 1) if call.name == "other" else 1)
    return None


def _sub(call: Call) -> Meeting | None:
    return Shift(call, -(call["alpha"] if call["alpha"] is not None else 1) if call.name == "other" else 1)


def _mul(call: Call) -> Meeting | None:
    other = call["other" if call.name == "self" else "self"]
    return Scale(call, other) if isinstance(other, Tensor) else None


def _expand(call: Call) -> Meeting | None:
    return Shift(call)


def _embedding(call: Call) -> Meeting | None:
    indexed = call["indices"].ndim > call.layout.dim
    return Embedding(call) if call.name == "weight" and indexed else None


def _layer_norm(call: Call) -> Meeting | None:
    if call.layout.dim >= call.outputs[0].ndim - len(call["normalized_shape"]):
        return None
    _, mean, rstd = call.outputs
    return Shift(call) if call.name == "bias" else Scale(call, (call["input"] - mean) * rstd)


def _group_norm(call: Call) -> Meeting | None:
    if call.layout.dim != 0:
        return None
    if call.name == "bias":
        return Shift(call, axis=1)
    x, groups = call["input"], call["group"]
    mean, rstd = (o.reshape(len(x), groups, *[1] * (x.ndim - 1)) for o in call.outputs[1:])
    grouped = x.reshape(len(x), groups, -1, *x.shape[2:])
    return Scale(call, ((grouped - mean) * rstd).reshape(x.shape), axis=1)


def normalised(call: Call) -> tuple[Tensor, Tensor]:
    """``x̂`` of a batch norm and ``1/σ``, by the statistics that it used."""
    x = call["input"]
    if call["training"] or call["running_mean"] is None:
        mean, scale = call.outputs[1], call.outputs[2]
    else:
        mean, scale = call["running_mean"], (call["running_var"] + call["eps"]).rsqrt()
    view = [1, -1, *[1] * (x.ndim - 2)]
    return (x - mean.reshape(view)) * scale.reshape(view), scale


def _batch_norm(call: Call) -> Meeting | None:
    return Shift(call, axis=1) if call.name == "bias" else Scale(call, normalised(call)[0], axis=1)


KINDS: dict[str, Callable[[Call], Meeting | None]] = {
    "mm": _matmul,
    "bmm": _matmul,
    "addmm": _addmm,
    "convolution": _convolution,
    "add": _add,
    "sub": _sub,
    "mul": _mul,
    "expand": _expand,
    "embedding": _embedding,
    "native_layer_norm": _layer_norm,
    "native_group_norm": _group_norm,
    "native_batch_norm": _batch_norm,
}


def meeting(call: Call) -> Meeting:
    """The kind that fits, or the generic one."""
    if isinstance(call.layout, Scattered):
        return Generic(call)
    name = call.op._schema.name.removeprefix("aten::").removesuffix("_")
    wide_call = call["self"] is not None and call.op._overloadpacket is not None
    kind = KINDS.get(name)
    found = kind(call) if kind is not None else None
    elementwise = torch.Tag.pointwise in call.op.tags or name == "_prelu_kernel"
    if found is None and wide_call and elementwise and _once(call):
        found = Pointwise(call)
    return found or Generic(call)


def _once(call: Call) -> bool:
    """The operand is one argument, broadcast against the others, and the op does not write in place."""
    same = sum(a is call.operand for a in call.arguments.values())
    return same == 1 and not call.op._schema.is_mutable and isinstance(call.arguments.get(call.name), Tensor)
