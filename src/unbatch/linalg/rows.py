"""Sums over rows and of tensors that are accurate and make no large temporaries. Tensors only.

Legend: ``n`` row (a sample), ``p`` entry of a flattened row.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# A row of at least so many entries is worth a kernel call of its own.
LARGE_ROW = 2**12


def wide(t: Tensor) -> Tensor:
    """Sums are accumulated in float32 at least; a tensor of its own either way."""
    return t.float() if t.dtype in (torch.float16, torch.bfloat16) else t


def real(dtype: torch.dtype) -> torch.dtype:
    """The type in which weights of samples are given."""
    return (
        torch.float32
        if dtype in (torch.float16, torch.bfloat16, torch.float32, torch.complex64)
        else torch.float64
    )


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
    return (
        torch.linalg.vector_norm(flat, dim=1).square_()
        if flat.shape[1]
        else flat.new_zeros(len(flat))
    )


def total_of_squares(rows: Tensor, mean: Tensor | None = None) -> Tensor:
    """``Σ_n |row_n − mean|²``, entry by entry; large rows one by one, so that nothing of their size is made anew."""
    rows = wide(rows)
    if rows.is_complex() or rows[0].numel() < LARGE_ROW:
        apart = rows if mean is None else rows - mean
        return (apart.abs() if apart.is_complex() else apart).square().sum(0)
    total, apart = torch.zeros_like(rows[0]), torch.empty_like(rows[0])
    for row in rows:
        moved = row if mean is None else torch.sub(row, mean, out=apart)
        total.addcmul_(moved, moved)
    return total


def fill(result: Tensor, out: Tensor | None) -> Tensor:
    return result if out is None else out.copy_(result)


def sum_of(tensors: Sequence[Tensor]) -> Tensor:
    """Return the sum of tensors of one shape, of which there has to be one at least."""
    total = tensors[0]
    for t in tensors[1:]:
        total = total + t
    return total


class Moments:
    """Mean and scatter ``Σ_n |row_n − mean|²`` of rows that come in slices (Chan, Golub, LeVeque 1979).

    Each slice is taken around a mean of its own. The mean is kept as the sum of two tensors, ``_anchor`` (that of the
    first slice) and ``_offset``, so that it is not rounded again and again.
    """

    def __init__(self) -> None:
        self.count = 0
        self.scatter, self._anchor, self._offset = torch.zeros(()), torch.zeros(()), torch.zeros(())

    def add(self, rows: Tensor) -> None:
        """Take a slice of rows, ``[n, ..]``."""
        rows = wide(rows)
        mean = rows.mean(0)
        scatter = total_of_squares(rows, mean)
        before, self.count = self.count, self.count + len(rows)
        if not before:
            self.scatter, self._anchor, self._offset = scatter, mean, torch.zeros_like(mean)
            return
        apart = mean.sub_(self._anchor).sub_(self._offset)
        self.scatter.add_(scatter).add_(
            apart.abs().square_(), alpha=before * len(rows) / self.count
        )
        self._offset.add_(apart, alpha=len(rows) / self.count)

    @property
    def mean(self) -> Tensor:
        return self._anchor + self._offset

    @property
    def variance(self) -> Tensor:
        """The unbiased estimate; zero for a single row."""
        return self.scatter / max(self.count - 1, 1)
