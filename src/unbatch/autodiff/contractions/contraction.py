"""Per-sample derivatives of one op by one of its operands: the contract, and a fallback for any op.

A *contraction* stands for one use of an operand ``u`` that all samples share. It receives the
cotangent ``g`` of the op's output ``y`` and gives *rows*, ``row_n = ∂(g_n·y_n)/∂u``, one for each
sample, or numbers derived from rows without forming them. What is fast for some ops lives in files
of its own; ``registry.py`` says which op is of which kind. Nothing here knows about models,
parameters or plans.

Legend: ``n`` sample, ``k`` one of several cotangents, ``t`` position inside a sample, ``o``/``i``
output and input feature; ``G`` the cotangent ``[n, t, o]``, ``X`` the other input ``[n, t, i]``.
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
from unbatch.capture.steps import ExecutedOp
from unbatch.capture.trees import dense
from unbatch.linalg.rows import fill, squares, total_of_squares, vectors, wide


@dataclass
class OperandUse(ExecutedOp):
    """An op as it ran, seen from one of its arguments: the operand that all samples share."""

    operand: Tensor
    name: str  # the argument that is the operand
    layouts: tuple[Any, ...]  # where the samples lie, for every output

    @property
    def layout(self) -> Any:
        """Return where the samples lie in the first output."""
        return self.layouts[0]


class Gathering(ABC):
    """``Σ_k σ_k Σ_n row_kn²`` over cotangents ``k`` that a site receives one after the other."""

    @abstractmethod
    def add(self, contraction: Any, where: slice, sign: float) -> None:
        """Add the squares of one cotangent's rows for a slice of samples, times ``sign``."""

    @abstractmethod
    def total(self) -> Tensor:
        """Return the sum, ``[*operand]``."""


class Contraction(ABC):
    """Derivatives by a shared operand, for every sample.

    ``receive`` hands over the cotangents; afterwards every method takes a slice of samples. Only
    ``receive`` and ``rows`` have to be written; the others are there to be replaced where a kind
    does without rows, and are then listed in ``lean``.
    """

    # Names of the methods that do not form rows.
    lean: frozenset[str] = frozenset()

    # Bytes of rows that are best formed at a time: about what a cache holds.
    portion: int = 2 * 2**20

    def __init__(self, call: OperandUse) -> None:
        self.layout, self.operand = call.layout, call.operand
        self.samples = call.layout.samples

    @property
    def compact(self) -> bool:
        """Whether the cotangent takes less memory than the rows."""
        return False

    @property
    def kind(self) -> str:
        """Return the name that a plan prints."""
        return type(self).__name__.lower()

    def fresh_copy(self) -> Self:
        """Return the same site, for another cotangent."""
        # A contraction is made once, at the forward pass, and receives once for each backward pass.
        # A shallow copy by hand: copy.copy takes as long as a small contraction, and this runs for
        # every site of every column.
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__)
        return other

    @abstractmethod
    def receive(self, cotangents: Sequence[Tensor | None]) -> None:
        """Take the cotangents of the outputs of the op; None for an output that has none."""

    @abstractmethod
    def rows(self, where: slice, out: Tensor | None = None) -> Tensor:
        """Return rows ``[n, *operand]``; written into ``out`` where that is given."""

    def squared_norms(self, where: slice) -> Tensor:
        """Return ``‖row_n‖²``, ``[n]``."""
        return squares(self.rows(where))

    def sum_of_squares(self, where: slice) -> Tensor:
        """Return ``Σ_n row_n²``, entry by entry: ``[*operand]``."""
        return total_of_squares(self.rows(where))

    def dots_of(self, contractions: Sequence[Any]) -> Tensor | None:
        """Return ``⟨row_kn, row_lm⟩``, ``[kn, lm]``, for contractions ``k`` of this site.

        None where there is no better way than to multiply rows.
        """
        return None

    def gathering(self, memory: int) -> Gathering | None:
        """Return what sums the squares of many cotangents together, in ``memory`` bytes.

        None where adding up what each cotangent gives is as good.
        """
        return None

    def scatter(self, where: slice) -> Tensor:
        """Return ``Σ_n (row_n − mean)²`` around the mean of these rows: ``[*operand]``."""
        rows = self.rows(where)
        return total_of_squares(rows, wide(rows).mean(0))

    def weighted_sum(self, weights: Tensor) -> Tensor:
        """Return ``Σ_n c_n row_n`` over all samples, ``[*operand]``, for weights ``c`` ``[n]``."""
        rows = self.rows(slice(0, self.samples))
        return torch.einsum("n,n...->...", weights.to(rows.dtype), rows)

    def coordinates(self, where: slice) -> Tensor:
        """Return the rows up to one rotation for all samples, ``[n, q]``; ``q`` at most ``p``."""
        return vectors(self.rows(where))

    def dots(self) -> Tensor:
        """Return ``⟨row_n, row_m⟩``, ``[n, n]``."""
        flat = vectors(self.rows(slice(0, self.samples)))
        return flat @ flat.T


def only_cotangent(cotangents: Sequence[Tensor | None]) -> Tensor:
    """Return the cotangent of the first output, for ops of which no other output has one.

    A contraction receives only where at least one output has a cotangent. Raises ``ValueError``
    where that is not the first.
    """
    cotangent = cotangents[0]
    if cotangent is None:
        raise ValueError("The first output of the op has no cotangent: use GenericContraction.")
    return cotangent


# --- any op ---------------------------------------------------------------------------------------


class GenericContraction(Contraction):
    """Any op: run again, and pulled back once for each sample."""

    def __init__(self, call: OperandUse) -> None:
        super().__init__(call)
        self.call = call
        self.cotangents: list[Tensor | None] = []

    def receive(self, cotangents: Sequence[Tensor | None]) -> None:
        self.cotangents = list(cotangents)

    def rows(self, where: slice, out: Tensor | None = None) -> Tensor:
        first, last, _ = where.indices(self.samples)
        u = self.operand.detach().requires_grad_()
        outputs: list[Tensor] = []
        cotangents: list[tuple[Any, Tensor]] = []  # with the layout of the output
        pairs = zip(self._run_with(u), self.cotangents, self.call.layouts, strict=False)
        for output, cotangent, layout in pairs:
            if cotangent is not None and output.requires_grad:
                outputs.append(output)
                cotangents.append((layout, cotangent))
        if not outputs:  # the op is constant in its operand
            return fill(self.operand.new_zeros(last - first, *self.operand.shape), out)
        # One backward pass for each sample: nothing is known of the op that would let one pass
        # serve several, not even that it can be batched.
        rows: list[Tensor] = []
        for n in range(first, last):
            of_sample = [layout.only(g, n, n + 1)[0] for layout, g in cotangents]
            grads = torch.autograd.grad(outputs, u, of_sample, retain_graph=True)
            rows += map(dense, grads)
        return fill(torch.stack(rows), out)

    def _run_with(self, u: Tensor) -> list[Tensor]:
        """Return the tensors that the op gives when its operand is ``u``, connected to it."""
        call = self.call
        writes = ops.may_write(call.op)
        # An op that writes gets copies: the arguments are still needed, and what is differentiated
        # by cannot be written to.
        arguments = detached(call.arguments, self.operand, copy=writes)
        with torch.enable_grad():
            operand = u.clone() if writes else u
            result = call.op(**_replaced(arguments, self.operand, operand))
        if not isinstance(result, tuple | list):
            result = [result]
        return [output for output in result if isinstance(output, Tensor)]


def detached(
    arguments: Mapping[str, Any], but: Tensor | None = None, copy: bool = False
) -> dict[str, Any]:
    """Return arguments of an op with every tensor but one detached, and copied if ``copy``."""

    def detach(a: Any) -> Any:
        if not isinstance(a, Tensor) or a is but:
            return a
        if copy:
            return a.detach().clone()
        return a.detach()

    return {name: tree_map(detach, value) for name, value in arguments.items()}


def _replaced(arguments: Mapping[str, Any], old: Tensor, new: Tensor) -> dict[str, Any]:
    """Return arguments with one tensor in the place of another, also inside lists."""

    def replace(a: Any) -> Any:
        return new if a is old else a

    return {name: tree_map(replace, value) for name, value in arguments.items()}
