"""Square roots of the second derivative of the loss: ``H = S Σ Sᵀ``, with signs in Σ.

The columns of S, as cotangents of the predictions, are what the Gauss-Newton matrix is made of. Σ
holds −1 where H has negative eigenvalues. How a root is computed stands in ``loss_hessian.py``.

Legend: ``n`` sample; ``t`` position: H has no entry between two positions of a sample; ``c`` entry
at a position; ``k`` column of the root at a position.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

Named = Mapping[int, Tensor]  # by prediction

SINGLE_ENTRIES = -1  # as the axis of a grid

Column = tuple[int, float, dict[int, Tensor]]  # number, sign, cotangents of the predictions


@dataclass(frozen=True)
class Grid:
    """How the entries of the predictions are laid out as ``[n, t, c]``.

    ``dims``: the axes of the samples; None: the whole batch counts as one sample, because H joins
    samples or there is an output without such an axis. ``axis``: of the only prediction, with the
    samples moved to the front, along which H couples entries; -1: every entry is a position of its
    own, and H is diagonal; None: one position, H may couple all entries of a sample.
    """

    shapes: Mapping[int, tuple[int, ...]]
    dims: Mapping[int, int] | None
    axis: int | None

    def split(self, v: Named) -> Tensor:
        """Return ``[n, t, c]``."""
        rows = [samples_first(v[i], i, self.dims) for i in self.shapes]
        if self.axis is not None and self.axis >= 0:
            (only,) = rows
            if only.ndim == 2:
                return only[:, None, :]  # [n, c]: one position
            return only.movedim(self.axis, -1).flatten(1, -2)
        # All entries of a sample, over all predictions, one after the other.
        flat = torch.cat([_entries_of(row) for row in rows], 1)
        return flat[:, :, None] if self.axis == SINGLE_ENTRIES else flat[:, None, :]

    def join(self, t: Tensor) -> dict[int, Tensor]:
        """Return the predictions of ``[n, t, c]``: the inverse of ``split``."""
        if self.axis is not None and self.axis >= 0:
            ((i, shape),) = self.shapes.items()
            moved = self._moved(i, shape).movedim(self.axis, -1).shape
            return {i: self._back(i, t.reshape(moved).movedim(-1, self.axis))}
        flat, start = _entries_of(t), 0
        predictions = {}
        for i, shape in self.shapes.items():
            moved = self._moved(i, shape).shape
            size = moved[1:].numel()
            entries = flat[:, start : start + size]
            predictions[i] = self._back(i, entries.reshape(moved))
            start += size
        return predictions

    def _moved(self, i: int, shape: tuple[int, ...]) -> Tensor:
        return samples_first(_without_memory(shape), i, self.dims)

    def _back(self, i: int, moved: Tensor) -> Tensor:
        """Return a prediction whose samples come first in the shape that it has."""
        return moved[0] if self.dims is None else moved.movedim(0, self.dims[i])


def sign_of(t: Tensor) -> Tensor:
    """Return −1 where entries are negative, and 1 elsewhere."""
    return torch.where(t < 0, -1.0, 1.0).to(t)


def samples_first(t: Tensor, i: int, dims: Mapping[int, int] | None) -> Tensor:
    """Return prediction ``i`` as ``[n, ..]``; ``dims`` as for a grid."""
    return t[None] if dims is None else t.movedim(dims[i], 0)


def _entries_of(rows: Tensor) -> Tensor:
    """Return ``[n, entries]``, also of no rows."""
    return rows.flatten(1) if rows.ndim > 1 else rows[:, None]


def _without_memory(shape: tuple[int, ...]) -> Tensor:
    """Return a tensor that knows what moving its axes does to a shape, and holds no numbers."""
    return torch.empty(shape, device="meta")


class HessianRoot(ABC):
    """``H = S Σ Sᵀ`` with ``size`` columns; ``sigma``, ``[size]``: the signs on the diagonal of Σ.

    ``separate``: every column belongs to one sample, and column ``n·columns + j`` is the j-th of
    sample n. ``form`` names what H was found to be; ``sampled`` says that S was drawn, and how.
    """

    form: str
    sampled: str = ""
    separate: bool = True
    size: int
    sigma: Tensor

    @property
    def layout(self) -> tuple[int, int]:
        """Return samples, and columns of each; one sample has all that are not separate."""
        return 1, self.size

    @abstractmethod
    def column_batches(self) -> Iterator[Column]:
        """Yield number, sign and cotangents of every column that is not zero.

        Where columns are separate, the j-th of all samples come together.
        """

    @property
    @abstractmethod
    def batches(self) -> int:
        """Return how many ``column_batches`` there are."""

    @abstractmethod
    def times(self, a: Tensor) -> dict[int, Tensor]:
        """Return ``S a`` for ``a`` ``[size]``: cotangents of the predictions."""

    @abstractmethod
    def transposed_times(self, v: Named) -> Tensor:
        """Return ``Sᵀ v``, ``[size]``."""

    def hessian_times(self, v: Named) -> dict[int, Tensor]:
        """Return ``H v = S Σ Sᵀ v``."""
        return self.times(self.transposed_times(v) * self.sigma)

    @property
    @abstractmethod
    def rank(self) -> int:
        """Return how many columns are not zero: no less than the rank of H."""

    @property
    @abstractmethod
    def lowest(self) -> float:
        """Return the lowest eigenvalue of H, or zero where none is below."""


class SampleRoot(HessianRoot):
    """The root of an H that is block diagonal by samples; or of any H, of one sample that is all.

    ``signs``: the diagonal of Σ, ``[n, t, k]``. ``to_entries``: ``[n, t, c, k]`` such that
    ``S to_entriesᵀ`` is the symmetric root, which has as many columns as entries; None where none
    is known beside S. ``like``: a tensor of its type, on its device.
    """

    grid: Grid
    signs: Tensor
    to_entries: Tensor | None
    like: Tensor

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int, int, int]:
        """Return how many samples, positions, entries and columns at a position there are."""

    @property
    @abstractmethod
    def nonzero(self) -> Tensor:
        """Return which columns are not zero, ``[n, t, k]``; what is not a number is not zero."""

    @property
    @abstractmethod
    def is_finite(self) -> bool: ...

    @abstractmethod
    def column(self, j: int) -> dict[int, Tensor]:
        """Return the ``j``-th column of all samples: cotangents of the predictions."""

    @abstractmethod
    def restricted(self, samples: Tensor, weight: float) -> SampleRoot:
        """Return the columns of some samples, times ``√weight``; all others are zero."""

    @abstractmethod
    def to(self, dtype: torch.dtype) -> SampleRoot:
        """Return the same in another floating-point type."""

    @property
    def separate(self) -> bool:  # type: ignore[override]
        return self.grid.dims is not None

    @property
    def columns(self) -> int:
        """Return how many columns a sample has: ``t·k``."""
        _, t, _, k = self.shape
        return t * k

    @property
    def layout(self) -> tuple[int, int]:
        return self.shape[0], self.columns

    @property
    def size(self) -> int:  # type: ignore[override]
        return self.shape[0] * self.columns

    @property
    def sigma(self) -> Tensor:  # type: ignore[override]
        return self.signs.flatten()

    @property
    def entries(self) -> int:
        """Return ``C``: entries of the prediction of one sample."""
        _, t, c, _ = self.shape
        return t * c

    @property
    def rank(self) -> int:
        return int(self.nonzero.sum())

    def sign(self, j: int) -> Tensor:
        """Return the signs of the ``j``-th column, ``[n]``."""
        t, k = divmod(j, self.shape[3])
        return self.signs[:, t, k]

    def column_batches(self) -> Iterator[Column]:
        """Yield columns as above; one with both signs comes twice, zero in samples of the other."""
        nonzero, signs = self.nonzero, self.signs
        for sign in (1.0, -1.0):
            has_sign = signs == sign
            # One transfer from the device for all columns, [t·k] each.
            in_some = (nonzero & has_sign).any(0).flatten().tolist()
            in_all = has_sign.all(0).flatten().tolist()
            for j in range(self.columns):
                if not in_some[j]:
                    continue
                # A column with one sign, nearly all of them, is fed as it is.
                column = self.column(j)
                if not in_all[j]:
                    column = self._only(column, self.sign(j) == sign)
                yield j, sign, column

    @property
    def batches(self) -> int:
        count = 0
        for sign in (1.0, -1.0):
            count += int((self.nonzero & (self.signs == sign)).any(0).sum())
        return count

    def _only(self, column: Named, samples: Tensor) -> dict[int, Tensor]:
        """Return a column with zeros in all but these samples, ``[n]`` booleans."""
        split = self.grid.split(column)
        return self.grid.join(split * samples.to(split.dtype)[:, None, None])


@dataclass(frozen=True, eq=False)
class Factor(SampleRoot):
    """A root that is formed: ``root`` is S, ``[n, t, c, k]``."""

    grid: Grid
    root: Tensor
    signs: Tensor
    form: str
    sampled: str = ""
    to_entries: Tensor | None = None

    @property
    def like(self) -> Tensor:  # type: ignore[override]
        return self.root

    @property
    def shape(self) -> tuple[int, int, int, int]:
        n, t, c, k = self.root.shape
        return n, t, c, k

    @property
    def nonzero(self) -> Tensor:
        return self.root.ne(0).any(2)

    @property
    def is_finite(self) -> bool:
        return bool(self.root.isfinite().all())

    @cached_property
    def lowest(self) -> float:
        if not (self.signs < 0).any():
            return 0.0
        root, signs = self.root.double(), self.signs.double()
        # The eigenvalues of H are those of its blocks.
        blocks = torch.einsum("ntck,ntk,ntdk->ntcd", root, signs, root)
        # A block that is not finite has no eigenvalues.
        blocks = blocks[blocks.flatten(1).isfinite().all(1)]
        if not blocks.numel():
            return 0.0
        return min(float(torch.linalg.eigvalsh(blocks).min()), 0.0)

    def column(self, j: int) -> dict[int, Tensor]:
        # Zero at all positions but one: j counts positions, and columns within them.
        t, k = divmod(j, self.root.shape[3])
        entries = self.root.new_zeros(self.root.shape[:3])
        entries[:, t] = self.root[:, t, :, k]
        return self.grid.join(entries)

    def transposed_times(self, v: Named) -> Tensor:
        return torch.einsum("ntck,ntc->ntk", self.root, self.grid.split(v)).flatten()

    def times(self, a: Tensor) -> dict[int, Tensor]:
        return self.grid.join(torch.einsum("ntck,ntk->ntc", self.root, a.view(self.signs.shape)))

    def restricted(self, samples: Tensor, weight: float) -> Factor:
        # Zero columns keep their numbers, and take no pullback: ``column_batches`` leaves them out.
        factors = torch.zeros(len(self.root), dtype=self.root.dtype, device=self.root.device)
        factors[samples] = weight**0.5
        return replace(self, root=self.root * factors[:, None, None, None])

    def to(self, dtype: torch.dtype) -> Factor:
        to_entries = None if self.to_entries is None else self.to_entries.to(dtype)
        return replace(
            self, root=self.root.to(dtype), signs=self.signs.to(dtype), to_entries=to_entries
        )


@dataclass(frozen=True, eq=False)
class SoftmaxRoot(SampleRoot):
    """The root of ``Q (diag p − ppᵀ)`` at each position, which is never formed.

    With ``u = √p`` the projector ``I − uuᵀ`` is ``BBᵀ``, B the columns of the reflection that takes
    the last unit vector to u; so ``S = √|Q| diag(u) B`` has a column less than there are classes.
    The reflection is ``I − w wᵀ / w_c`` with ``w = u + e_c``, of which the last column is left out.
    ``u``: ``[n, t, c]``; ``Q``: ``[n, t]``.
    """

    grid: Grid
    u: Tensor
    Q: Tensor

    form = "of a softmax"

    @property
    def like(self) -> Tensor:  # type: ignore[override]
        return self.u

    @property
    def shape(self) -> tuple[int, int, int, int]:
        n, t, c = self.u.shape
        return n, t, c, c - 1

    @property
    def signs(self) -> Tensor:  # type: ignore[override]
        return sign_of(self.Q)[..., None].expand(*self.Q.shape, self.shape[3])

    @property
    def nonzero(self) -> Tensor:
        # Of a column all is zero with its entry of u.
        return self.u[..., :-1].ne(0) & self.Q.ne(0)[..., None]

    @property
    def is_finite(self) -> bool:
        return bool(self.u.isfinite().all() and self.Q.isfinite().all())

    @cached_property
    def lowest(self) -> float:
        if not (self.Q < 0).any():
            return 0.0
        root = self._scale[..., None] * self.to_entries
        return Factor(self.grid, root, self.signs, self.form).lowest

    @cached_property
    def _scale(self) -> Tensor:
        """``√|Q| u``, ``[n, t, c]``."""
        return self.Q.abs().sqrt()[..., None] * self.u

    @cached_property
    def _shares(self) -> Tensor:
        """The entries of u but the last, by that of w, ``[n, t, k]``."""
        return self.u[..., :-1] / (self.u[..., -1:] + 1)

    @property
    def _w(self) -> Tensor:
        return torch.cat([self.u[..., :-1], self.u[..., -1:] + 1], -1)

    @property
    def to_entries(self) -> Tensor:  # type: ignore[override]
        c = self.shape[2]
        unit = torch.eye(c, dtype=self.u.dtype, device=self.u.device)[:, :-1]
        return unit - self._w[..., :, None] * self._shares[..., None, :]

    def column(self, j: int) -> dict[int, Tensor]:
        t, k = divmod(j, self.shape[3])
        of_position = -self._w[:, t] * self._shares[:, t, k, None]
        of_position[:, k] += 1
        entries = torch.zeros_like(self.u)
        entries[:, t] = self._scale[:, t] * of_position
        return self.grid.join(entries)

    def times(self, a: Tensor) -> dict[int, Tensor]:
        a = a.view(*self.Q.shape, self.shape[3])
        # The last entry of a vector that has one less is zero.
        padded = torch.nn.functional.pad(a, (0, 1))
        along = (self._shares * a).sum(-1, keepdim=True)
        return self.grid.join(self._scale * (padded - self._w * along))

    def transposed_times(self, v: Named) -> Tensor:
        scaled = self._scale * self.grid.split(v)
        along = (self._w * scaled).sum(-1, keepdim=True)
        return (scaled[..., :-1] - self._shares * along).flatten()

    def restricted(self, samples: Tensor, weight: float) -> SoftmaxRoot:
        factors = torch.zeros(len(self.Q), dtype=self.Q.dtype, device=self.Q.device)
        factors[samples] = weight
        return replace(self, Q=self.Q * factors[:, None])

    def to(self, dtype: torch.dtype) -> SoftmaxRoot:
        return replace(self, u=self.u.to(dtype), Q=self.Q.to(dtype))
