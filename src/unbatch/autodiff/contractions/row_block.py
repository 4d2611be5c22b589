"""Rows of one parameter for some samples, or contractions that do without rows: what quantities are fed with."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from unbatch.autodiff.contractions.contraction import Contraction, Gathering
from unbatch.linalg.rows import squares, total_of_squares, vectors, wide


class RowBlock:
    """The rows of one parameter for a slice of samples: ``[k, *param]``."""

    lean: frozenset[str] = frozenset()
    column, sign = 0, 1.0  # of a factor of a matrix, where the rows are not those of a gradient
    beyond: Callable[[], Tensor] | None = (
        None  # the sum of all rows of the parameter, where these are not all
    )

    def __init__(self, where: slice, rows: Tensor) -> None:
        self.where, self._rows = where, rows

    def with_total(self, total: Callable[[], Tensor]) -> RowBlock:
        """Return the same part that knows the sum of all rows, which ``total`` gives."""
        part = copy.copy(self)
        part.beyond = total
        return part

    def of_column(self, number: int, sign: float) -> RowBlock:
        """Return the same part as rows of a column of a factor, with its sign in the matrix."""
        part = copy.copy(self)
        part.column, part.sign = number, sign
        return part

    def rows(self) -> Tensor:
        return self._rows

    def squared_norms(self) -> Tensor:
        """``[k]``."""
        return squares(self.rows())

    def sum_of_squares(self) -> Tensor:
        """``[*param]``."""
        return total_of_squares(self.rows())

    def gathering(self, memory: int) -> Gathering | None:
        """What takes sums of squares of many columns, where they are best taken together."""
        return None

    def gather(self, into: Gathering) -> None:
        raise NotImplementedError

    def gathered(self, from_: Gathering) -> Tensor:
        """``[*param]``."""
        raise NotImplementedError

    def scatter(self, mean: Tensor | None = None) -> Tensor:
        """``[*param]``: ``Σ_n (row_n − mean)²``, around the mean of these rows by default."""
        rows = self.rows()
        return total_of_squares(rows, wide(rows).mean(0) if mean is None else mean)

    def weighted_sum(self, weights: Tensor) -> Tensor:
        """``[*param]``, by weights ``[k]``."""
        rows = self.rows()
        return torch.einsum("n,n...->...", weights.to(rows.dtype), rows)

    def total(self) -> Tensor:
        """``[*param]``: the sum of the rows of all samples, also of those beyond this slice."""
        if self.beyond is not None:
            return self.beyond()
        count, like = (
            self.where.stop - self.where.start,
            self.rows() if self.lean == frozenset() else None,
        )
        return self.weighted_sum(torch.ones(count) if like is None else like.new_ones(count))

    def coordinates(self) -> Tensor:
        """``[k, q]``: the rows, up to one rotation for all samples."""
        return vectors(self.rows())

    def dots(self) -> Tensor:
        """``[k, k]``."""
        flat = self.coordinates()
        return flat @ flat.T

    def kept(self) -> Tensor | Contraction:
        """What rows can be had from later, in memory of its own: ``[k, q]``, or a site, where that is less."""
        return self.coordinates().clone()


@dataclass(frozen=True)
class RowBlockView:
    """How an operand is seen in a parameter: ``one`` takes the parameter, ``rows`` a stack of them."""

    one: Callable[[Tensor], Tensor]
    transposed: bool | None = (
        None  # whether it is just that, or the parameter itself; None: anything else
    )

    def rows(self, stack: Tensor) -> Tensor:
        if self.transposed is None:
            out: Tensor = torch.func.vmap(self.one)(stack)
            return out
        return stack.mT if self.transposed else stack


class LazyRowBlock(RowBlock):
    """A parameter with one site, of which the operand is a view of it: what the site can, the part can."""

    def __init__(
        self, where: slice, site: Contraction, view: RowBlockView, out: Tensor | None, like: Tensor
    ):
        self.where, self.site, self.view, self.out, self.like = where, site, view, out, like
        self.lean = site.lean
        self._formed: Tensor | None = None

    def rows(self) -> Tensor:
        if self._formed is None:
            count = self.where.stop - self.where.start
            out = self.like.new_empty(count, *self.like.shape) if self.out is None else self.out
            self.site.rows(self.where, self.view.rows(out))
            self._formed = out
        return self._formed

    def _moved(self, result: Tensor) -> Tensor:
        """From the operand's shape to the parameter's; for free where the operand's order in memory was kept."""
        out = torch.empty(self.like.shape, dtype=result.dtype, device=result.device)
        seen = self.view.one(out)
        if seen.stride() == result.stride():
            return result.as_strided(out.shape, out.stride())
        seen.copy_(result)
        return out

    def squared_norms(self) -> Tensor:
        known = self._formed is None and "squared_norms" in self.lean
        return self.site.squared_norms(self.where) if known else super().squared_norms()

    def sum_of_squares(self) -> Tensor:
        known = self._formed is None and "sum_of_squares" in self.lean
        return (
            self._moved(self.site.sum_of_squares(self.where)) if known else super().sum_of_squares()
        )

    def gathering(self, memory: int) -> Gathering | None:
        return self.site.gathering(memory) if self._formed is None else None

    def gather(self, into: Gathering) -> None:
        into.add(self.site, self.where, self.sign)

    def gathered(self, from_: Gathering) -> Tensor:
        return self._moved(from_.total())

    def scatter(self, mean: Tensor | None = None) -> Tensor:
        known = self._formed is None and "scatter" in self.lean and mean is None
        return self._moved(self.site.scatter(self.where)) if known else super().scatter(mean)

    def weighted_sum(self, weights: Tensor) -> Tensor:
        if "weighted_sum" not in self.lean or self._formed is not None:
            return super().weighted_sum(weights)
        whole = weights.new_zeros(self.site.samples)
        whole[self.where] = weights
        return self._moved(self.site.weighted_sum(whole))

    def coordinates(self) -> Tensor:
        known = self._formed is None and "coordinates" in self.lean
        return self.site.coordinates(self.where) if known else super().coordinates()

    def dots(self) -> Tensor:
        whole = (self.where.start, self.where.stop) == (0, self.site.samples)
        return (
            self.site.dots()
            if whole and self._formed is None and "dots" in self.lean
            else super().dots()
        )

    def kept(self) -> Tensor | Contraction:
        whole = (self.where.start, self.where.stop) == (0, self.site.samples)
        if whole and self.site.compact:
            return self.site
        return (
            self.coordinates()
            if "coordinates" in self.lean and self._formed is None
            else super().kept()
        )
