"""Rows of one parameter for some samples, or a contraction that does without them.

Row blocks are what quantities are fed with. ``RowBlock`` holds rows that are there;
``LazyRowBlock`` forms them only if asked for. Where rows come from, and how operands become
parameters, is not known here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from unbatch.autodiff.contractions.contraction import Contraction, Gathering
from unbatch.linalg.rows import squares, total_of_squares, vectors, wide


class RowBlock:
    """The rows of one parameter for a slice of samples: ``[k, *param]``."""

    # Names of the methods that do not form rows.
    lean: frozenset[str] = frozenset()

    # Which column of a factor of a matrix the rows are, and its sign in the matrix; those of a
    # gradient are column 0.
    column, sign = 0, 1.0

    # Gives the sum of all rows of the parameter, where this block does not hold all of them.
    beyond: Callable[[], Tensor] | None = None

    def __init__(self, where: slice, rows: Tensor) -> None:
        self.where, self._rows = where, rows

    def with_total(self, total: Callable[[], Tensor]) -> RowBlock:
        """Return the same block that knows the sum of all rows, which ``total`` gives."""
        # A twin: the one who fed the block may hand it to others without the total.
        block = self._twin()
        block.beyond = total
        return block

    def of_column(self, number: int, sign: float) -> RowBlock:
        """Return the same block as rows of a column of a factor, with its sign in the matrix."""
        block = self._twin()
        block.column, block.sign = number, sign
        return block

    def _twin(self) -> RowBlock:
        """Return another block of the same rows."""
        # As copy.copy does, in a fifth of its time: there is one for every column and parameter.
        block = object.__new__(type(self))
        block.__dict__.update(self.__dict__)
        return block

    def rows(self) -> Tensor:
        """Return ``[k, *param]``; overwritten when the next block is formed."""
        return self._rows

    def squared_norms(self) -> Tensor:
        """Return ``‖row_n‖²``, ``[k]``."""
        return squares(self.rows())

    def sum_of_squares(self) -> Tensor:
        """Return ``Σ_n row_n²``, entry by entry: ``[*param]``."""
        return total_of_squares(self.rows())

    def gathering(self, memory: int) -> Gathering | None:
        """Return what sums the squares of many columns, where they are best taken together.

        None where adding up what each column gives is as good. Takes blocks of this parameter.
        """
        return None

    def scatter(self, mean: Tensor | None = None) -> Tensor:
        """Return ``Σ_n (row_n − mean)²``, ``[*param]``; by default around their own mean."""
        rows = self.rows()
        if mean is None:
            mean = wide(rows).mean(0)
        return total_of_squares(rows, mean)

    def weighted_sum(self, weights: Tensor) -> Tensor:
        """Return ``Σ_n c_n row_n``, ``[*param]``, for weights ``c`` ``[k]``."""
        rows = self.rows()
        return torch.einsum("n,n...->...", weights.to(rows.dtype), rows)

    def total(self) -> Tensor:
        """Return the sum of the rows of all samples, ``[*param]``, not only of this block's."""
        if self.beyond is not None:
            return self.beyond()
        return self.weighted_sum(self._ones())

    def _ones(self) -> Tensor:
        return self.rows().new_ones(self.where.stop - self.where.start)

    def coordinates(self) -> Tensor:
        """Return the rows up to one rotation for all samples, ``[k, q]``."""
        return vectors(self.rows())

    def dots(self) -> Tensor:
        """Return ``⟨row_n, row_m⟩``, ``[k, k]``."""
        flat = self.coordinates()
        return flat @ flat.T

    def stored(self) -> Tensor | Contraction:
        """Return what inner products can be had from later, in memory of its own.

        Coordinates ``[k, q]``, or the contraction itself where that is smaller.
        """
        # Coordinates may be a view of rows, which are overwritten.
        return self.coordinates().clone()


@dataclass(frozen=True)
class RowBlockView:
    """How an operand is a view of a parameter: ``one`` takes the parameter, ``rows`` a stack.

    ``transposed``: whether it is just that (True), or the parameter itself (False); None for any
    other view.
    """

    one: Callable[[Tensor], Tensor]
    transposed: bool | None = None

    def rows(self, stack: Tensor) -> Tensor:
        """Return the same view of each of ``[k, *param]``: ``[k, *operand]``."""
        if self.transposed is None:
            views: Tensor = torch.func.vmap(self.one)(stack)
            return views
        if self.transposed:
            return stack.mT
        return stack


class LazyRowBlock(RowBlock):
    """A parameter with one site whose operand is a view of it: rows are formed if asked for.

    Once rows have been formed they are used for everything, as nothing is cheaper then.
    """

    def __init__(
        self, where: slice, site: Contraction, view: RowBlockView, out: Tensor | None, like: Tensor
    ):
        """``out``: where rows are to be formed, if anywhere; ``like``: the parameter."""
        self.where, self.site, self.view, self.out, self.like = where, site, view, out, like
        self.lean = site.lean
        self._formed: Tensor | None = None

    def rows(self) -> Tensor:
        if self._formed is None:
            rows = self.out
            if rows is None:
                count = self.where.stop - self.where.start
                rows = self.like.new_empty(count, *self.like.shape)
            # Written through the view, so that the rows lie as the parameter does.
            self.site.rows(self.where, self.view.rows(rows))
            self._formed = rows
        return self._formed

    def _without_rows(self, method: str) -> bool:
        """Return whether the contraction's own method is the better way."""
        return self._formed is None and method in self.lean

    def _in_parameter(self, result: Tensor) -> Tensor:
        """Return ``[*param]`` from ``[*operand]``; free where both have one order in memory."""
        moved = torch.empty(self.like.shape, dtype=result.dtype, device=result.device)
        # The view of fresh memory tells how the operand's entries would lie in it.
        operand = self.view.one(moved)
        if operand.stride() == result.stride():
            return result.as_strided(moved.shape, moved.stride())
        operand.copy_(result)
        return moved

    def squared_norms(self) -> Tensor:
        if not self._without_rows("squared_norms"):
            return super().squared_norms()
        return self.site.squared_norms(self.where)

    def sum_of_squares(self) -> Tensor:
        if not self._without_rows("sum_of_squares"):
            return super().sum_of_squares()
        return self._in_parameter(self.site.sum_of_squares(self.where))

    def gathering(self, memory: int) -> Gathering | None:
        if self._formed is not None:
            return None
        gathering = self.site.gathering(memory)
        if gathering is None:
            return None
        return _InParameter(gathering, self)

    def scatter(self, mean: Tensor | None = None) -> Tensor:
        if mean is not None or not self._without_rows("scatter"):
            return super().scatter(mean)
        return self._in_parameter(self.site.scatter(self.where))

    def weighted_sum(self, weights: Tensor) -> Tensor:
        if not self._without_rows("weighted_sum"):
            return super().weighted_sum(weights)
        # The contraction sums over all samples: those outside this block weigh nothing.
        whole = weights.new_zeros(self.site.samples)
        whole[self.where] = weights
        return self._in_parameter(self.site.weighted_sum(whole))

    def _ones(self) -> Tensor:
        if self.lean:  # not to form rows only for their type
            return torch.ones(self.where.stop - self.where.start)
        return super()._ones()

    def coordinates(self) -> Tensor:
        if not self._without_rows("coordinates"):
            return super().coordinates()
        return self.site.coordinates(self.where)

    @property
    def _all_samples(self) -> bool:
        return (self.where.start, self.where.stop) == (0, self.site.samples)

    def dots(self) -> Tensor:
        if self._all_samples and self._without_rows("dots"):
            return self.site.dots()
        return super().dots()

    def stored(self) -> Tensor | Contraction:
        if self._all_samples and self.site.compact:
            return self.site
        if self._without_rows("coordinates"):
            return self.coordinates()  # fresh memory already
        return super().stored()


class _InParameter(Gathering):
    """A contraction's gathering, fed with blocks, and its total in the shape of the parameter."""

    def __init__(self, of_operand: Gathering, first: LazyRowBlock) -> None:
        self.of_operand, self.first = of_operand, first

    def add(self, block: LazyRowBlock, where: slice, sign: float) -> None:
        self.of_operand.add(block.site, where, sign)

    def total(self) -> Tensor:
        return self.first._in_parameter(self.of_operand.total())
