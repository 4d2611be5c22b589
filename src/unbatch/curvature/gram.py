"""The Gram matrix ``VᵀV`` of the columns of the Gauss-Newton factor.

Spectra, determinants and solves are made of it in ``spectrum.py``. Legend as in
``ggn_quantities.py``; ``M`` columns in all.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from unbatch.autodiff.contractions.contraction import Contraction
from unbatch.autodiff.contractions.row_block import RowBlock
from unbatch.curvature.ggn_quantities import ColumnQuantity
from unbatch.curvature.hessian_root import HessianRoot, SampleRoot
from unbatch.curvature.strategy import Curvature, Rtol
from unbatch.gradients.quantities import About, Collector
from unbatch.linalg.rows import vectors, wide
from unbatch.running.tasks import task

FLOAT32 = 4  # bytes

BANDS = 6  # of rows, in which a symmetric product is computed
LEAST_BAND = 64  # rows


@dataclass(frozen=True)
class Gram(ColumnQuantity):
    """``VᵀV``, ``[size, size]``: inner products of the columns, over all parameters."""

    root: HessianRoot
    rtol: float | None = None
    seed: int = 0
    needs = "dots"
    pairs = True

    @property
    def tolerance(self) -> Rtol | None:
        return None if self.rtol is None else Rtol(self.rtol, True, self.seed)

    def root_in(self, curvature: Curvature) -> HessianRoot:
        return self.root

    def start(self, about: About) -> Collector:
        return _Gram(about, self.root)


# --- collecting -----------------------------------------------------------------------------------


class Columns(NamedTuple):
    """One parameter's part of the j-th column of some samples.

    ``numbers``: which columns of V they are; ``content``: their rows (in coordinates, where there
    are some), or the site they can be had from, whichever takes less memory.
    """

    numbers: Tensor
    content: Tensor | Contraction

    @property
    def rows(self) -> Tensor:
        """Return ``[n, q]``."""
        if isinstance(self.content, Tensor):
            return self.content
        return vectors(self.content.rows(slice(0, self.content.samples)))

    @property
    def bytes(self) -> int:
        """Return what the rows take."""
        if isinstance(self.content, Tensor):
            return FLOAT32 * self.content.numel()
        return FLOAT32 * self.content.samples * self.content.operand.numel()


class _Gram(Collector):
    """Keeps all columns, and multiplies them when all are there, parameter by parameter."""

    def __init__(self, about: About, root: HessianRoot) -> None:
        super().__init__(about)
        self.root = root
        self.like = wide(about.like)
        self.columns: dict[str, list[Columns]] = {}
        # Sums of blocks by the order of their columns; they are brought into place together.
        self.blocks: dict[tuple[int, ...], Tensor] = {}

    def take(self, name: str, block: RowBlock) -> None:
        samples, columns = self.root.layout
        if not columns:
            return
        # Column j of sample n has the number n·columns + j; a block holds one j of some samples.
        numbers = torch.arange(samples)[block.where] * columns + block.column
        self.columns.setdefault(name, []).append(Columns(numbers, block.stored()))

    def finish(self) -> Tensor:
        total = self.like.new_zeros(self.root.size, self.root.size)
        names = list(self.columns)
        with task("Inner products of the columns", len(names), "parameters") as parameters:
            for name in parameters.over(names):
                columns = self.columns.pop(name)  # freed before the next parameter
                products = _without_rows(columns)
                if products is None:
                    self._add_products(total, list(self._in_memory(columns)))
                else:
                    self._add(_numbers(columns), products)
        for key, block in self.blocks.items():
            numbers = torch.tensor(key)
            # Accumulated: a number may come twice, where a column has both signs.
            total.index_put_((numbers[:, None], numbers), block, accumulate=True)
        return total

    def _add_products(self, total: Tensor, groups: list[list[Columns]]) -> None:
        """Add inner products within groups and between them; two groups are in memory at a time."""
        count = len(groups)
        with task("Blocks of inner products", count * (count + 1) // 2, "blocks") as blocks:
            for k, group in enumerate(groups):
                numbers, rows = _numbers(group), _rows(group)
                self._add(numbers, symmetric_product(rows))
                blocks.advance()
                for other in blocks.over(groups[k + 1 :]):
                    other_numbers = _numbers(other)
                    block = (rows @ _rows(other).T).to(total.dtype)
                    total.index_put_((numbers[:, None], other_numbers), block, accumulate=True)
                    total.index_put_((other_numbers[:, None], numbers), block.T, accumulate=True)

    def _add(self, numbers: Tensor, block: Tensor) -> None:
        """Add ``block``, whose rows and columns are in the order of ``numbers``."""
        # Parameters are mostly fed in the same order, and their blocks can be added as they are.
        key = tuple(numbers.tolist())
        if key in self.blocks:
            self.blocks[key].add_(block)
        else:
            self.blocks[key] = block.to(self.like.dtype)

    def _in_memory(self, columns: Sequence[Columns]) -> Iterator[list[Columns]]:
        """Yield groups, as many at a time as memory holds the rows of twice."""
        group: list[Columns] = []
        size = 0
        for column in columns:
            more = 2 * column.bytes
            if group and size + more > self.about.memory:
                yield group
                group, size = [], 0
            group.append(column)
            size += more
        yield group


def _without_rows(columns: Sequence[Columns]) -> Tensor | None:
    """Return the inner products of sites that have them without forming rows."""
    # All of them, or none: rows cannot be multiplied with what has none.
    sites = [column.content for column in columns if isinstance(column.content, Contraction)]
    if not sites or len(sites) < len(columns):
        return None
    return sites[0].dots_of(sites)


def _numbers(columns: Sequence[Columns]) -> Tensor:
    return torch.cat([column.numbers for column in columns])


def _rows(columns: Sequence[Columns]) -> Tensor:
    return torch.cat([column.rows for column in columns])


def symmetric_product(a: Tensor) -> Tensor:
    """Return ``a aᵀ``, of which the half below the diagonal is copied from the other."""
    # In bands, from the diagonal to the right: about half of the products of the whole.
    out = a.new_empty(len(a), len(a))
    band = max(LEAST_BAND, -(-len(a) // BANDS))
    for start in range(0, len(a), band):
        rows = slice(start, start + band)
        torch.mm(a[rows], a[start:].T, out=out[rows, start:])
        out[start + band :, rows] = out[rows, start + band :].T
    return out


# --- with a column for every entry of the predictions ---------------------------------------------


def entrywise(gram: Tensor, root: HessianRoot, entries: int) -> Tensor:
    """Return the Gram matrix with a column for every entry of the predictions, ``[NC, NC]``.

    ``gram`` is that of the columns of the root, of which there are fewer where H is singular. With
    ``W`` such that ``S Wᵀ`` is a root with a column for each entry, it is ``W (VᵀV) Wᵀ``.
    ``entries``: NC.
    """
    if not root.separate:
        return torch.nn.functional.pad(gram, (0, entries - root.size, 0, entries - root.size))
    if not isinstance(root, SampleRoot) or root.sampled:
        return gram
    n, t, c, k = root.shape
    # Without ``whole`` it is S itself, filled up with columns of zeros.
    to_entries = root.to_entries
    if to_entries is None:
        to_entries = torch.eye(c, k).expand(n, t, c, k)
    W, size = to_entries.to(gram), n * t * c
    half = torch.einsum("ntck,ntkx->ntcx", W, gram.view(n, t, k, root.size))
    half = half.reshape(size, root.size)
    return torch.einsum("ntck,xntk->xntc", W, half.view(size, n, t, k)).reshape(size, size)


def groups_in_memory(
    parameters: Mapping[str, Tensor], columns: int, memory: int
) -> list[dict[str, Tensor]]:
    """Return the parameters in their order, so many together as memory holds the columns of."""
    groups: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, p in parameters.items():
        more = FLOAT32 * columns * p.numel()
        # A group has one parameter at least, even if that is too large.
        if groups[-1] and size + more > memory:
            groups.append({})
            size = 0
        groups[-1][name] = p
        size += more
    return groups
