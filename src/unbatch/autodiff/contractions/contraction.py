"""How the cotangent at the output of an op meets the op's other inputs: derivatives by one operand, sample by sample.

A *meeting* has an operand ``u`` that all samples share, and rows ``∂(g·y)/∂u`` over the samples that its layout tells
apart. Here live what every kind can do, and the kind that fits any op; the others have rooms of their own, and
``kinds.py`` says which op is of which kind. Nothing here knows about models, parameters or plans.

Legend: ``n`` sample, ``t`` position inside a sample, ``o``/``i`` output and input feature; ``G`` the cotangent
``[n, t, o]``, ``X`` the other input ``[n, t, i]``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from unbatch.capture import ops
from unbatch.capture.graph import ExecutedOp
from unbatch.linalg.rows import fill, squares, total_of_squares, vectors, wide


@dataclass
class OperandUse(ExecutedOp):
    """An op as it ran, seen from one of its arguments: the operand that all samples share."""

    operand: Tensor
    name: str  # the argument that is the operand
    layouts: tuple[Any, ...]  # of every output

    @property
    def layout(self) -> Any:
        return self.layouts[0]


class Gathering(ABC):
    """``Σ_k σ_k Σ_n row_kn²`` over cotangents ``k`` that come one after the other to the same site."""

    @abstractmethod
    def add(self, meeting: Any, where: slice, sign: float) -> None:
        """Take the rows of a slice that the meeting has for one cotangent."""

    @abstractmethod
    def total(self) -> Tensor:
        """``[*operand]``."""


class Contraction(ABC):
    """Derivatives by a shared operand, for every sample, from a cotangent and what the forward pass kept.

    ``receive`` hands over the cotangents; afterwards every method takes a slice of samples. Only ``rows`` has to be
    written; the others are there to be replaced where a contraction does without rows.
    """

    lean: frozenset[str] = frozenset()  # what this kind gives without forming rows
    portion: int = (
        2 * 2**20
    )  # bytes of rows that are best formed at a time: about what a cache holds

    @property
    def compact(self) -> bool:
        """The cotangent takes less memory than the rows."""
        return False

    @property
    def kind(self) -> str:
        """What it is called in a plan."""
        return type(self).__name__.lower()

    def __init__(self, call: OperandUse) -> None:
        self.layout, self.operand = call.layout, call.operand
        self.samples = call.layout.samples

    def again(self) -> Self:
        """The same site, for another cotangent; ``copy.copy`` would take as long as a contraction."""
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__)
        return other

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

    def dots_of(self, meetings: Sequence[Any]) -> Tensor | None:
        """``⟨row_kn, row_lm⟩``, ``[kn, lm]``, for meetings ``k`` of this site with several cotangents.

        None where there is no better way than to multiply rows.
        """
        return None

    def gathering(self, memory: int) -> Gathering | None:
        """Where sums of squares for many cotangents are best taken together, what does in so many bytes."""
        return None

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


# --- any op ---------------------------------------------------------------------------------------


class GenericContraction(Contraction):
    """Any op: run again, and pulled back once for every sample with the cotangents of the others set to zero."""

    def __init__(self, call: OperandUse) -> None:
        super().__init__(call)
        self.call = call
        self.cotangents: list[Tensor | None] = []

    def receive(self, cotangents: Sequence[Tensor | None]) -> None:
        self.cotangents = list(cotangents)

    def rows(self, where: slice, out: Tensor | None = None) -> Tensor:
        first, last, _ = where.indices(self.samples)
        u = self.operand.detach().requires_grad_()
        call = self.call
        writes = ops.may_write(call.op)
        arguments = detached(call.arguments, self.operand, writes)
        with torch.enable_grad():
            moving = u.clone() if writes else u  # what is differentiated by cannot be written to
            result = call.op(**{k: _swap(v, self.operand, moving) for k, v in arguments.items()})
        outputs = [
            o
            for o in (result if isinstance(result, tuple | list) else [result])
            if isinstance(o, Tensor)
        ]
        told = zip(outputs, self.cotangents, call.layouts, strict=False)
        pairs = [(o, g, layout) for o, g, layout in told if g is not None and o.requires_grad]
        if not pairs:
            return fill(self.operand.new_zeros(last - first, *self.operand.shape), out)
        seen = [o for o, _, _ in pairs]
        alone = [
            [layout.only(g, n, n + 1)[0] for _, g, layout in pairs] for n in range(first, last)
        ]
        rows = [torch.autograd.grad(seen, u, gs, retain_graph=True)[0] for gs in alone]
        return fill(torch.stack(rows), out)


def detached(
    arguments: Mapping[str, Any], but: Tensor | None = None, fresh: bool = False
) -> dict[str, Any]:
    one = lambda a: a.detach().clone() if fresh else a.detach()  # noqa: E731
    out = tree_map(
        lambda a: one(a) if isinstance(a, Tensor) and a is not but else a, dict(arguments)
    )
    assert isinstance(out, dict)
    return out


def _swap(tree: Any, old: Tensor, new: Tensor) -> Any:
    return tree_map(lambda a: new if a is old else a, tree)
