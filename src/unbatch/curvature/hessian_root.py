"""Square roots of the second derivative of the loss: ``H = S Σ Sᵀ``, with signs Σ where H has negative eigenvalues.

The columns of S, as cotangents of the predictions, are what the Gauss-Newton matrix is made of. How they are found is
not said here.

Legend: ``n`` sample, ``t`` position (entries at different positions do not meet in H), ``c`` entry at a position, ``k``
column of the root at a position.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from unbatch.linalg.rows import sum_of

Named = Mapping[int, Tensor]  # by prediction


@dataclass(frozen=True)
class Grid:
    """How the entries of the predictions are laid out as ``[n, t, c]``.

    ``axis``: of the only prediction, along which entries meet; -1: an entry meets none but itself; None: all entries
    of a sample, over all predictions, may meet.
    """

    shapes: Mapping[int, tuple[int, ...]]
    dims: Mapping[int, int]  # the axes of the samples
    axis: int | None

    def split(self, v: Named) -> Tensor:
        """``[n, t, c]``."""
        rows = {i: v[i].movedim(self.dims[i], 0) for i in self.shapes}
        if self.axis is not None and self.axis >= 0:
            (only,) = rows.values()
            return only.movedim(self.axis, -1).flatten(1, -2) if only.ndim > 2 else only[:, None, :]
        flat = torch.cat([r.reshape(len(r), -1) for r in rows.values()], 1)
        return flat[:, :, None] if self.axis == -1 else flat[:, None, :]

    def join(self, t: Tensor) -> dict[int, Tensor]:
        """The inverse of ``split``."""
        if self.axis is not None and self.axis >= 0:
            ((i, shape),) = self.shapes.items()
            moved = list(
                torch.empty(shape, device="meta")
                .movedim(self.dims[i], 0)
                .movedim(self.axis, -1)
                .shape
            )
            return {i: t.reshape(moved).movedim(-1, self.axis).movedim(0, self.dims[i])}
        flat, out, start = t.reshape(len(t), -1), {}, 0
        for i, shape in self.shapes.items():
            front = list(torch.empty(shape, device="meta").movedim(self.dims[i], 0).shape)
            size = torch.Size(front[1:]).numel()
            out[i] = flat[:, start : start + size].reshape(front).movedim(0, self.dims[i])
            start += size
        return out


class HessianRoot(ABC):
    """``H = S Σ Sᵀ`` with ``size`` columns; ``sigma``, ``[size]``, are the signs on the diagonal of Σ.

    ``separate``: every column belongs to one sample, and column ``n·columns + j`` is the j-th of sample n. ``form``
    names what H was found to be; ``sampled`` says that S was drawn, and how.
    """

    form: str
    sampled: str = ""
    separate: bool = True
    size: int
    sigma: Tensor

    @property
    def table(self) -> tuple[int, int]:
        """Samples and columns of each; one sample has them all where they are not separate."""
        return 1, self.size

    @abstractmethod
    def each(self) -> Iterator[tuple[int, float, dict[int, Tensor]]]:
        """Number, sign and cotangents of columns that are not zero; where they are separate, of all samples at once."""

    @abstractmethod
    def times(self, a: Tensor) -> dict[int, Tensor]:
        """``S a`` for ``a`` ``[size]``: cotangents of the predictions."""

    @abstractmethod
    def transposed_times(self, v: Named) -> Tensor:
        """``Sᵀ v``, ``[size]``."""

    def hessian_times(self, v: Named) -> dict[int, Tensor]:
        """``H v``."""
        return self.times(self.transposed_times(v) * self.sigma)

    @property
    @abstractmethod
    def rank(self) -> int:
        """How many columns are not zero: no less than the rank of H."""

    @property
    @abstractmethod
    def lowest(self) -> float:
        """The lowest eigenvalue of H, or zero where none is below."""


@dataclass(frozen=True, eq=False)
class Factor(HessianRoot):
    """H block diagonal by samples: ``root`` is S, ``[n, t, c, k]``, ``signs`` the diagonal of Σ, ``[n, t, k]``.

    ``whole``: ``[n, t, c, k]`` with ``S wholeᵀ`` the symmetric choice of S that has as many columns as entries, where
    that is another one.
    """

    grid: Grid
    root: Tensor
    signs: Tensor
    form: str
    whole: Tensor | None = None
    sampled: str = ""

    @property
    def columns(self) -> int:
        """How many columns a sample has: ``t·k``."""
        return self.root.shape[1] * self.root.shape[3]

    @property
    def table(self) -> tuple[int, int]:
        return len(self.root), self.columns

    @property
    def size(self) -> int:  # type: ignore[override]
        return len(self.root) * self.columns

    @property
    def sigma(self) -> Tensor:  # type: ignore[override]
        return self.signs.flatten()

    @property
    def entries(self) -> int:
        """``C``: entries of the prediction of one sample."""
        return self.root.shape[1] * self.root.shape[2]

    @property
    def rank(self) -> int:
        return int((self.root.abs().amax(2) > 0).sum()) if self.root.numel() else 0

    @cached_property
    def lowest(self) -> float:
        if not (self.signs < 0).any():
            return 0.0
        blocks = torch.einsum(
            "ntck,ntk,ntdk->ntcd", self.root.double(), self.signs.double(), self.root.double()
        )
        return min(float(torch.linalg.eigvalsh(blocks).min()), 0.0)

    def column(self, j: int) -> dict[int, Tensor]:
        """The ``j``-th column of all samples: cotangents of the predictions."""
        t, k = divmod(j, self.root.shape[3])
        out = self.root.new_zeros(self.root.shape[:3])
        out[:, t] = self.root[:, t, :, k]
        return self.grid.join(out)

    def sign(self, j: int) -> Tensor:
        """``[n]``: the signs of the ``j``-th column."""
        t, k = divmod(j, self.root.shape[3])
        return self.signs[:, t, k]

    def each(self) -> Iterator[tuple[int, float, dict[int, Tensor]]]:
        """Number, sign and cotangents of every column that is not zero; a column of both signs comes in two parts."""
        felt = self.root.ne(0).any(2)
        for value in (1.0, -1.0):
            here = self.signs == value
            some, alone = ((felt & here).any(0).flatten().tolist(), here.all(0).flatten().tolist())
            for j in (j for j in range(self.columns) if some[j]):
                column = self.column(j)
                yield j, value, column if alone[j] else self._only(column, self.sign(j) == value)

    def _only(self, column: Named, here: Tensor) -> dict[int, Tensor]:
        split = self.grid.split(column)
        return self.grid.join(split * here.to(split.dtype)[:, None, None])

    def transposed_times(self, v: Named) -> Tensor:
        return torch.einsum("ntck,ntc->ntk", self.root, self.grid.split(v)).flatten()

    def times(self, a: Tensor) -> dict[int, Tensor]:
        return self.grid.join(torch.einsum("ntck,ntk->ntc", self.root, a.view(self.signs.shape)))

    def restricted(self, samples: Tensor, weight: float) -> Factor:
        """The columns of some samples, times ``√weight``; all others zero."""
        kept = torch.zeros(len(self.root), dtype=self.root.dtype, device=self.root.device)
        kept[samples] = weight**0.5
        return replace(self, root=self.root * kept[:, None, None, None])

    def to(self, dtype: torch.dtype) -> Factor:
        whole = self.whole if self.whole is None else self.whole.to(dtype)
        return replace(self, root=self.root.to(dtype), signs=self.signs.to(dtype), whole=whole)


@dataclass(frozen=True, eq=False)
class Joint(HessianRoot):
    """Any H: ``vectors`` is S, ``[size, *prediction]`` for every prediction; columns run through all samples."""

    vectors: Named
    sigma: Tensor
    form: str = "of all predictions together"
    separate = False

    @property
    def size(self) -> int:  # type: ignore[override]
        return len(self.sigma)

    def each(self) -> Iterator[tuple[int, float, dict[int, Tensor]]]:
        for j in range(self.size):
            yield j, float(self.sigma[j]), {i: t[j] for i, t in self.vectors.items()}

    def times(self, a: Tensor) -> dict[int, Tensor]:
        return {i: torch.tensordot(a, t, 1) for i, t in self.vectors.items()}

    def transposed_times(self, v: Named) -> Tensor:
        return sum_of([t.flatten(1) @ v[i].flatten() for i, t in self.vectors.items()])

    @property
    def rank(self) -> int:
        return self.size

    @property
    def lowest(self) -> float:
        squares = sum_of([t.flatten(1).square().sum(1) for t in self.vectors.values()]) * self.sigma
        return min(float(squares.min()), 0.0) if self.size else 0.0
