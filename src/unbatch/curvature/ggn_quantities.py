"""Quantities of the columns of the Gauss-Newton factor ``V = Jᵀ S``, and what feeds them.

A column is fed like the rows of a gradient: ``S`` gives other cotangents of the predictions than the loss has. So what
holds for rows (sites, contractions, columns below the last mixing) holds here.

Legend: ``v_nj`` column j of sample n, ``σ_nj`` its sign; ``G = Σ σ_nj v_nj v_njᵀ``; ``p`` parameter entry.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from unbatch.autodiff.contractions.contraction import Contraction, Gathering
from unbatch.autodiff.contractions.row_block import RowBlock
from unbatch.curvature.hessian_root import HessianRoot
from unbatch.curvature.low_rank import Basis, CorrectedSource
from unbatch.curvature.strategy import Curvature, Rtol
from unbatch.gradients.quantities import About, Basic, Collector, Label, about_of
from unbatch.gradients.results import ByParameter
from unbatch.gradients.sources import Chunking, Source
from unbatch.linalg.rows import vectors, wide

# --- feeding --------------------------------------------------------------------------------------


def feed_columns(
    source: Source | CorrectedSource, curvature: Curvature, root: HessianRoot,
    collectors: Sequence[Collector], chunks: Chunking, parameters: Mapping[str, Tensor],
) -> None:  # fmt: skip
    """Feed collectors with all columns: parts carry the number and the sign of theirs."""
    seen: set[str] = set()

    def take(j: int, sign: float, name: str, part: RowBlock) -> None:
        seen.add(name)
        column = part.of_column(j, sign)
        for collector in collectors:
            collector.take(name, column)

    columns = list(root.each())
    for at, (j, sign, cotangents) in enumerate(columns):
        if root.separate:
            source.feed(chunks, partial(take, j, sign), {}, cotangents, last=at == len(columns) - 1)
        else:
            for name, v in curvature.linearised.pull(cotangents, parameters).items():
                take(j, sign, name, RowBlock(slice(0, 1), v[None]))
    count = len(next(iter(curvature.loss.predictions.values()))) if root.separate else 1
    for name in [n for n in parameters if n not in seen]:
        zero = parameters[name].detach().new_zeros(1, *parameters[name].shape)
        take(0, 1.0, name, RowBlock(slice(0, count), zero.expand(count, *zero.shape[1:])))


def feed_quantities(
    curvature: Curvature,
    source: Source,
    collectors: Mapping[ColumnQuantity, Collector],
    parameters: Mapping[str, Tensor],
) -> None:
    """Feed the collectors of all quantities; those of the same columns are fed together."""
    together: dict[tuple[HessianRoot, Basis | None], list[ColumnQuantity]] = {}
    for quantity in collectors:
        key = quantity.root_in(curvature), quantity.basis_in(curvature)
        together.setdefault(key, []).append(quantity)
    for (root, basis), quantities in together.items():
        needs = frozenset(q.needs for q in quantities)
        pairs = any(q.pairs for q in quantities)
        chunks = Chunking(needs, curvature.memory, keep=False, pairs=pairs)
        columns = curvature.columns_of(source, basis, parameters)
        group = [collectors[q] for q in quantities]
        feed_columns(columns, curvature, root, group, chunks, parameters)


def evaluate(
    curvature: Curvature, source: Source, quantity: ColumnQuantity, parameters: Mapping[str, Tensor]
) -> Any:
    """Return what a quantity gives for these parameters, fed from ``source``."""
    quantity.check(curvature)
    label = Label(curvature.request.by, curvature.request.by)
    about = about_of(curvature.request.of(parameters), source, label, {})
    collector = quantity.start(about)
    feed_quantities(curvature, source, {quantity: collector}, parameters)
    return collector.finish()


class ColumnQuantity(Basic):
    """A quantity that is fed with columns of V instead of rows of the gradient."""

    def root_in(self, curvature: Curvature) -> HessianRoot:
        """Of which root the columns are."""
        return curvature.root()

    def basis_in(self, curvature: Curvature) -> Basis | None:
        """Whether they go by way of batch statistics, and by how many."""
        return curvature.basis(self.root_in(curvature), self.tolerance)

    @property
    def tolerance(self) -> Rtol | None:
        """How much may be missing."""
        return None

    def check(self, curvature: Curvature) -> None:
        """Raise where it does not exist."""


# --- quantities -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class DiagGGN(ColumnQuantity):
    """``Σ σ_nj v_nj²``, the diagonal of G: ``[*param]`` for each parameter, in the scale of the loss.

    ``per_component``: ``[N, *param]``, one for every sample, which sum to the diagonal; needs a loss that is a sum over
    samples. ``mc_samples``: from so many columns for each sample, drawn with ``seed`` (BackPACK's ``DiagGGNMC``);
    unbiased. ``rtol``: where columns go through batch statistics, by as few directions of these as leave out no more of
    the diagonal than that, relative and by an estimate (Frobenius norm); ``GGN.diag(info=True)`` says how many.
    """

    per_component: bool = False
    mc_samples: int | None = None
    seed: int = 0
    rtol: float | None = None
    root: HessianRoot | None = None

    needs = "sum_of_squares"

    def __post_init__(self) -> None:
        if self.per_component:
            object.__setattr__(self, "needs", "rows")

    def root_in(self, curvature: Curvature) -> HessianRoot:
        drawn = None if self.mc_samples is None else (self.mc_samples, self.seed)
        return curvature.root(drawn) if self.root is None else self.root

    @property
    def tolerance(self) -> Rtol | None:
        return None if self.rtol is None else Rtol(self.rtol, seed=self.seed)

    def check(self, curvature: Curvature) -> None:
        if self.per_component:
            curvature.components("A GGN diagonal for every component")

    def start(self, about: About) -> Collector:
        return _Diagonals(about) if self.per_component else _Diagonal(about)


class _Diagonal(Collector):
    """Columns of one site are gathered where that is cheaper than adding up what each of them gives."""

    def __init__(self, about: About) -> None:
        super().__init__(about)
        self.found: dict[str, Tensor] = {}
        self.gathering: dict[str, Gathering] = {}
        self.first: dict[str, RowBlock] = {}

    def take(self, name: str, part: RowBlock) -> None:
        if name not in self.gathering and (fresh := part.gathering(self.about.memory)) is not None:
            self.gathering[name], self.first[name] = fresh, part
        if name in self.gathering:
            part.gather(self.gathering[name])
        else:
            self._add(name, part.sum_of_squares(), part.sign)

    def _add(self, name: str, share: Tensor, sign: float) -> None:
        if name not in self.found:
            self.found[name] = torch.zeros_like(share)
        self.found[name].add_(share, alpha=sign)

    def finish(self) -> ByParameter:
        for name in list(self.gathering):
            self._add(name, self.first[name].gathered(self.gathering.pop(name)), 1.0)
        result: ByParameter = self.about.result(self.found)
        return result


class _Diagonals(Collector):
    def __init__(self, about: About) -> None:
        super().__init__(about)
        self.found: dict[str, Tensor] = {}

    def take(self, name: str, part: RowBlock) -> None:
        rows = wide(part.rows())
        if name not in self.found:
            self.found[name] = rows.new_zeros(self.about.samples, *rows.shape[1:])
        self.found[name][part.where].addcmul_(rows, rows, value=part.sign)

    def finish(self) -> ByParameter:
        result: ByParameter = self.about.result(self.found)
        return result


@dataclass(frozen=True)
class ColumnNorms(ColumnQuantity):
    """``Σ_p v²`` of every column, ``[size]``: the diagonal of the Gram matrix; with signs they sum to tr G."""

    root: HessianRoot
    needs = "squared_norms"

    def root_in(self, curvature: Curvature) -> HessianRoot:
        return self.root

    def start(self, about: About) -> Collector:
        return _ColumnNorms(about, self.root)


class _ColumnNorms(Collector):
    def __init__(self, about: About, root: HessianRoot) -> None:
        super().__init__(about)
        self.found = wide(about.like.new_zeros(*root.table))

    def take(self, name: str, part: RowBlock) -> None:
        if self.found.shape[1]:
            self.found[part.where, part.column] += part.squared_norms()

    def finish(self) -> Tensor:
        return self.found.flatten()


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


class _Gram(Collector):
    """Of every column and parameter the shorter is kept: its rows (in coordinates, where there are some), or what they
    are made of. They are multiplied when all are there, parameter by parameter."""

    def __init__(self, about: About, root: HessianRoot) -> None:
        super().__init__(about)
        self.root = root
        self.put: dict[tuple[int, ...], Tensor] = {}
        self.kept: dict[
            str, list[tuple[Tensor, Tensor | Contraction]]
        ] = {}  # numbers of columns, and what has them

    def take(self, name: str, part: RowBlock) -> None:
        samples, columns = self.root.table
        if not columns:
            return
        numbers = torch.arange(samples)[part.where] * columns + part.column
        self.kept.setdefault(name, []).append((numbers, part.kept()))

    def finish(self) -> Tensor:
        total = wide(self.about.like.new_zeros(self.root.size, self.root.size))
        for name in list(self.kept):
            kept = self.kept.pop(name)
            together = self._without_rows([what for _, what in kept])
            if together is not None:
                self._put(torch.cat([numbers for numbers, _ in kept]), together)
            else:
                self._add(total, list(self._groups(kept)))
        for key, block in self.put.items():
            numbers = torch.tensor(key)
            total.index_put_(
                (numbers[:, None], numbers), block, accumulate=True
            )  # a number may come twice
        return total

    @staticmethod
    def _without_rows(kept: Sequence[Tensor | Contraction]) -> Tensor | None:
        sites = [what for what in kept if isinstance(what, Contraction)]
        return sites[0].dots_of(sites) if sites and len(sites) == len(kept) else None

    def _add(self, total: Tensor, groups: list[list[tuple[Tensor, Tensor | Contraction]]]) -> None:
        for k, group in enumerate(groups):
            here, rows = self._formed(group)
            for other in groups[k:]:
                there, others = (here, rows) if other is group else self._formed(other)
                if other is group:
                    self._put(here, symmetric_product(rows))
                else:
                    block = rows @ others.T
                    total.index_put_((here[:, None], there), block, accumulate=True)
                    total.index_put_((there[:, None], here), block.T, accumulate=True)

    def _put(self, numbers: Tensor, block: Tensor) -> None:
        """Add what is in the order of ``numbers``; blocks of the same order are brought into place together."""
        key = tuple(numbers.tolist())
        if key in self.put:
            self.put[key].add_(block)
        else:
            self.put[key] = block

    @staticmethod
    def _formed(group: list[tuple[Tensor, Tensor | Contraction]]) -> tuple[Tensor, Tensor]:
        return torch.cat([numbers for numbers, _ in group]), torch.cat(
            [rows_of(what) for _, what in group]
        )

    def _groups(
        self, kept: list[tuple[Tensor, Tensor | Contraction]]
    ) -> Iterator[list[tuple[Tensor, Tensor | Contraction]]]:
        """As many at a time as memory holds the rows of."""
        group: list[tuple[Tensor, Tensor | Contraction]] = []
        size = 0
        for one in kept:
            size += 2 * rows_bytes(one[1])
            if group and size > self.about.memory:
                yield group
                group, size = [], 2 * rows_bytes(one[1])
            group.append(one)
        yield group


def symmetric_product(a: Tensor) -> Tensor:
    """``a aᵀ``, of which the half below the diagonal is copied from the other."""
    out, block = a.new_empty(len(a), len(a)), max(64, -(-len(a) // 6))
    for i in range(0, len(a), block):
        here = slice(i, i + block)
        torch.mm(a[here], a[i:].T, out=out[here, i:])
        out[i + block :, here] = out[here, i + block :].T
    return out


def rows_of(what: Tensor | Contraction) -> Tensor:
    return what if isinstance(what, Tensor) else vectors(what.rows(slice(0, what.samples)))


def rows_bytes(what: Tensor | Contraction) -> int:
    size = what.numel() if isinstance(what, Tensor) else what.samples * what.operand.numel()
    return 4 * size
