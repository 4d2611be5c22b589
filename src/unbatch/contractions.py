"""How the cotangent at the output of an op meets the op's other inputs: derivatives by one operand, sample by sample.

A *meeting* has an operand ``u`` that all samples share, and rows ``∂(g·y)/∂u`` over the samples that its layout tells
apart. Here live what every kind can do, and the common kinds; convolutions and what batch norms need have rooms of
their own, and ``kinds.py`` says which op is of which kind. Nothing here knows about models, parameters or plans.

Legend: ``n`` sample, ``t`` position inside a sample, ``o``/``i`` output and input feature; ``G`` the cotangent
``[n, t, o]``, ``X`` the other input ``[n, t, i]``.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

BLOCK = 64  # features, the least that a matrix product is efficient for
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
    portion: int = 2 * 2**20  # bytes of rows that are best formed at a time: about what a cache holds

    @property
    def kind(self) -> str:
        """What it is called in a plan."""
        return type(self).__name__.lower()

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
        rows = self.rows(slice(0, self.samples))
        return torch.einsum("n,n...->...", weights.to(rows.dtype), rows)

    def coordinates(self, where: slice) -> Tensor:
        """``[n, q]``: the rows, up to one rotation for all samples; no longer than they are."""
        return vectors(self.rows(where))

    def dots(self) -> Tensor:
        """``[n, n]``: ``⟨row_n, row_m⟩``."""
        flat = vectors(self.rows(slice(0, self.samples)))
        return flat @ flat.T


# --- sums that are accurate and make no large temporaries -----------------------------------------


def wide(t: Tensor) -> Tensor:
    """Sums are accumulated in float32 at least; a tensor of its own either way."""
    return t.float() if t.dtype in (torch.float16, torch.bfloat16) else t


def real(dtype: torch.dtype) -> torch.dtype:
    """The type in which weights of samples are given."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16, torch.float32, torch.complex64) else torch.float64


def same_dtype(*tensors: Tensor) -> tuple[Tensor, ...]:
    """In the widest of their types: what one of them lost is lost, the other need not lose it."""
    dtype = tensors[0].dtype
    for t in tensors[1:]:
        dtype = torch.promote_types(dtype, t.dtype)
    return tuple(t.to(dtype) for t in tensors)


def vectors(rows: Tensor) -> Tensor:
    """``[n, p]``, real, in float32 at least."""
    flat = wide(rows).reshape(len(rows), rows[0].numel())
    return torch.view_as_real(flat.resolve_conj()).flatten(1) if flat.is_complex() else flat


def squares(rows: Tensor) -> Tensor:
    """Squared norm of each row."""
    flat = vectors(rows)
    return torch.linalg.vector_norm(flat, dim=1).square_() if flat.shape[1] else flat.new_zeros(len(flat))


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
        g, x = same_dtype(g, self.x)
        self.g, self.x = along.split(g.T if self.features_first else g), along.split(x)
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
                here.copy_(sum_up(torch.bmm(a[:, :, i : i + tall].mT, b[:, :, j : j + broad], out=rows)))
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
    return torch.bmm(a.mT, b, out=out) if out.dtype == a.dtype == b.dtype else fill(torch.bmm(a.mT, b.to(a.dtype)), out)


class Shift(Meeting):
    """``y = .. + factor·u``, broadcast, or placed along ``axis``: rows are sums of the cotangent."""

    def __init__(self, call: Call, factor: Any = None, axis: int | None = None) -> None:
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
        sums = felt.sum_to_size(self.shape) if self.spans else reduce_to(self.layout.split(felt), self.shape)
        self.g = sums if self.factor is None else sums * self.factor

    def _felt(self, g: Tensor) -> Tensor:
        """The derivative by the operand as if it had not been broadcast."""
        return g

    def rows(self, where: slice, out: Tensor | None = None) -> Tensor:
        rows = self.layout.only(self.g, *where.indices(self.samples)[:2]) if self.spans else self.g[where]
        return fill(rows.reshape(len(rows), *self.operand.shape), out)


class Scale(Shift):
    """``y = u·x̂ + ..``, broadcast, or placed along ``axis``; ``x̂ = scale·(x − mean)``, where those are given.

    ``factor``: a scale that is the same all along the dims that are summed over.
    """

    def __init__(
        self, call: Call, x: Tensor, mean: Tensor | None = None, scale: Tensor | None = None,
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
