"""Sums over rows and of tensors that are accurate and make no large temporaries. Tensors only.

Legend: ``n`` row (a sample), ``p`` entry of a flattened row.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

# A row of at least so many entries is worth a kernel call of its own.
LARGE_ROW = 2**12


HALF = (torch.float16, torch.bfloat16)


def wide(t: Tensor) -> Tensor:
    """Return a tensor in which sums may be accumulated: float32 at least; itself if it is."""
    if t.dtype in HALF:
        return t.float()
    return t


def widest(tensors: Iterable[Tensor]) -> torch.dtype:
    """Return the type that holds the entries of all tensors, of which there is one at least.

    A net may have layers of several types; what is summed over them is of this one.
    """
    return functools.reduce(torch.promote_types, [t.dtype for t in tensors])


def real(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which weights of samples are given, for a parameter's dtype."""
    if dtype in (*HALF, torch.float32, torch.complex64):
        return torch.float32
    return torch.float64


def same_dtype(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Return tensors in the widest of their dtypes, so that none loses digits to another."""
    dtype = tensors[0].dtype
    for t in tensors[1:]:
        dtype = torch.promote_types(dtype, t.dtype)
    return tuple(t.to(dtype) for t in tensors)


def vectors(rows: Tensor) -> Tensor:
    """Return ``[n, p]``, real, in float32 at least; a complex entry becomes two real ones."""
    flat = wide(rows).reshape(len(rows), rows.shape[1:].numel())
    if not flat.is_complex():
        return flat
    return torch.view_as_real(flat.resolve_conj()).flatten(1)


def squares(rows: Tensor) -> Tensor:
    """Return the squared norm of each row, ``[n]``."""
    flat = vectors(rows)
    if not flat.shape[1]:  # the norm of nothing is refused
        return flat.new_zeros(len(flat))
    # A norm and its square make no temporary of the rows' size, unlike squares and their sum.
    return torch.linalg.vector_norm(flat, dim=1).square_()


def total_of_squares(rows: Tensor, mean: Tensor | None = None) -> Tensor:
    """Return ``Σ_n |row_n − mean|²``, entry by entry.

    Large rows are taken one by one, so that nothing of the size of all of them is made.
    """
    rows = wide(rows)
    if rows.is_complex() or rows.shape[1:].numel() < LARGE_ROW or not len(rows):
        return _total_of_squares_at_once(rows, mean)
    # Accumulated in place; without a mean there is not even a temporary of a row.
    total = torch.zeros_like(rows[0])
    if mean is None:
        for row in rows:
            total.addcmul_(row, row)
        return total
    deviation = torch.empty_like(rows[0])
    for row in rows:
        torch.sub(row, mean, out=deviation)
        total.addcmul_(deviation, deviation)
    return total


def _total_of_squares_at_once(rows: Tensor, mean: Tensor | None) -> Tensor:
    if mean is not None:
        rows = rows - mean
    if rows.is_complex():
        rows = rows.abs()
    return rows.square().sum(0)


def fill(result: Tensor, out: Tensor | None) -> Tensor:
    """Return a result, written into ``out`` where that is given."""
    if out is None:
        return result
    return out.copy_(result)


def sum_of(tensors: Sequence[Tensor]) -> Tensor:
    """Return the sum of tensors of one shape, of which there has to be one at least."""
    total = tensors[0]
    for t in tensors[1:]:
        total = total + t
    return total


class Moments:
    """Mean and scatter ``Σ_n |row_n − mean|²`` of rows that come in slices (Chan, Golub, LeVeque
    1979).

    Each slice is taken around a mean of its own, and with ``a`` rows before and ``b`` in the slice,

        ``scatter += scatter of the slice + (mean of the slice − mean)² · a b / (a + b)``.

    The mean is kept as the sum of two tensors, ``_anchor`` (that of the first slice) and
    ``_offset``, so that it is not rounded again and again.
    """

    def __init__(self) -> None:
        self.count = 0
        self.scatter, self._anchor, self._offset = torch.zeros(()), torch.zeros(()), torch.zeros(())

    def add(self, rows: Tensor) -> None:
        """Take a slice of rows, ``[n, *]``; they are not kept."""
        # Around its own mean, a slice has no digits to lose to a mean far from zero.
        rows = wide(rows)
        mean = rows.mean(0)
        scatter = total_of_squares(rows, mean)
        before, self.count = self.count, self.count + len(rows)
        if not before:
            self.scatter, self._anchor, self._offset = scatter, mean, torch.zeros_like(mean)
            return
        difference = mean.sub_(self._anchor).sub_(self._offset)
        share = len(rows) / self.count
        between = difference.abs().square_()
        self.scatter.add_(scatter).add_(between, alpha=before * len(rows) / self.count)
        self._offset.add_(difference, alpha=share)

    @property
    def mean(self) -> Tensor:
        """Return the mean of all rows, ``[*]``."""
        return self._anchor + self._offset

    @property
    def variance(self) -> Tensor:
        """Return the unbiased estimate, ``[*]``; zero for a single row."""
        return self.scatter / max(self.count - 1, 1)
