"""Quantities of the columns of the Gauss-Newton factor ``V = Jᵀ S``, and what feeds them.

A column is fed like the rows of a gradient: S gives other cotangents of the predictions than the
loss has. So what holds for rows (parameter use sites, contractions, columns below the mixing
frontier) holds here. The Gram matrix is in ``gram.py``; products with G are in ``ggn.py``.

Legend: ``v_nj`` column j of sample n, ``σ_nj`` its sign; ``G = Σ σ_nj v_nj v_njᵀ``; ``p`` parameter
entry.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from unbatch.autodiff.contractions.contraction import Gathering
from unbatch.autodiff.contractions.row_block import RowBlock
from unbatch.curvature.hessian_root import Column, HessianRoot
from unbatch.curvature.low_rank import Basis, CorrectedSource
from unbatch.curvature.pace import Deadline
from unbatch.curvature.strategy import Curvature, Draws, Rtol
from unbatch.gradients.quantities import About, Basic, Collector, Label, about_of
from unbatch.gradients.results import ByParameter
from unbatch.gradients.sources import Chunking, Source
from unbatch.linalg.rows import wide
from unbatch.running.tasks import task

# --- feeding --------------------------------------------------------------------------------------


class ColumnQuantity(Basic):
    """A quantity that is fed with columns of V instead of rows of the gradient."""

    def root_in(self, curvature: Curvature) -> HessianRoot:
        """Return the root of which the columns are."""
        return curvature.root()

    def basis_in(self, curvature: Curvature) -> Basis | None:
        """Return how columns go by way of batch statistics; None: each is pulled back alone."""
        return curvature.basis(self.root_in(curvature), self.tolerance)

    @property
    def tolerance(self) -> Rtol | None:
        """Return how much may be missing; None: nothing."""
        return None

    def check(self, curvature: Curvature) -> None:
        """Raise ``StructureError`` where the quantity does not exist."""


def evaluate(
    curvature: Curvature, source: Source, quantity: ColumnQuantity, parameters: Mapping[str, Tensor]
) -> Any:
    """Return the result of a quantity for these parameters, fed from ``source``."""
    quantity.check(curvature)
    by = curvature.request.by
    about = about_of(curvature.request.of(parameters), source, Label(by, by), {})
    collector = quantity.start(about)
    feed_quantities(curvature, source, {quantity: collector}, parameters)
    return collector.finish()


def feed_quantities(
    curvature: Curvature,
    source: Source,
    collectors: Mapping[ColumnQuantity, Collector],
    parameters: Mapping[str, Tensor],
) -> None:
    """Feed the collectors of all quantities; those of the same columns are fed together."""
    groups: dict[tuple[HessianRoot, Basis | None], list[ColumnQuantity]] = {}
    for quantity in collectors:
        key = quantity.root_in(curvature), quantity.basis_in(curvature)
        groups.setdefault(key, []).append(quantity)
    for (root, basis), quantities in groups.items():
        needs: set[str] = set()
        pairs = False
        group: list[Collector] = []
        for quantity in quantities:
            needs.add(quantity.needs)
            pairs |= quantity.pairs
            group.append(collectors[quantity])
        chunks = Chunking(frozenset(needs), curvature.memory, keep=False, pairs=pairs)
        columns = curvature.columns_of(source, basis, parameters)
        feed_columns(columns, curvature, root, group, chunks, parameters)


def feed_columns(
    source: Source | CorrectedSource,
    curvature: Curvature,
    root: HessianRoot,
    collectors: Sequence[Collector],
    chunks: Chunking,
    parameters: Mapping[str, Tensor],
) -> None:
    """Feed collectors with all columns: row blocks carry the number and the sign of theirs.

    Raises ``BudgetError`` where they would take longer than the question may.
    """
    samples, columns = root.layout
    deadline = Deadline(columns, curvature.request.seconds)
    fed: set[str] = set()

    def take(j: int, sign: float, name: str, block: RowBlock) -> None:
        fed.add(name)
        column = block.of_column(j, sign)
        for collector in collectors:
            collector.take(name, column)

    # The last one is known beforehand: after it the source lets go of its graph.
    batches = _with_last(root.column_batches())
    with task("Columns of the Gauss-Newton factor", root.batches, unit_of(root)) as passes:
        for (j, sign, cotangents), last in passes.over(batches):
            deadline.check(j)
            source.feed(chunks, partial(take, j, sign), {}, cotangents, last=last)
    for name, p in parameters.items():
        if name not in fed:  # no prediction depends on it
            zeros = p.detach().new_zeros(1, *p.shape).expand(samples, *p.shape)
            take(0, 1.0, name, RowBlock(slice(0, samples), zeros))


def unit_of(root: HessianRoot) -> str:
    """Return what comes at a time, in words: a column, or one of every sample."""
    return "columns a sample" if root.separate else "columns"


def _with_last(columns: Iterator[Column]) -> Iterator[tuple[Column, bool]]:
    """Yield every column with whether it is the last; no more than two are there at a time."""
    before = next(columns, None)
    for column in columns:
        assert before is not None
        yield before, False
        before = column
    if before is not None:
        yield before, True


# --- the diagonal ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class DiagGGN(ColumnQuantity):
    """``Σ σ_nj v_nj²``, the diagonal of G: ``[*param]`` for each parameter.

    In the scale of the loss. ``per_component``: ``[N, *param]``, one for every sample, which sum to
    the diagonal; needs a loss that is a sum over samples. ``mc_samples``: from so many columns for
    each sample, drawn with ``seed`` (BackPACK's ``DiagGGNMC``); unbiased. ``rtol``: where columns
    go through batch statistics, by as few directions of these as leave out no more of the diagonal
    than that, relative and by an estimate (Frobenius norm); ``GGN.diag(info=True)`` says how many.
    """

    per_component: bool = False
    mc_samples: int | None = None
    seed: int = 0
    rtol: float | None = None
    root: HessianRoot | None = None

    needs = "sum_of_squares"

    def __post_init__(self) -> None:
        if self.per_component:
            # Squares of samples apart: sums over them are of no use.
            object.__setattr__(self, "needs", "rows")

    def root_in(self, curvature: Curvature) -> HessianRoot:
        if self.root is not None:
            return self.root
        draws: Draws = None
        if self.mc_samples is not None:
            draws = (self.mc_samples, self.seed)
        return curvature.root(draws)

    @property
    def tolerance(self) -> Rtol | None:
        return None if self.rtol is None else Rtol(self.rtol, seed=self.seed)

    def check(self, curvature: Curvature) -> None:
        # Columns that run through all samples belong to no component.
        if self.per_component:
            curvature.components("A GGN diagonal for every component")

    def start(self, about: About) -> Collector:
        return _ComponentDiagonals(about) if self.per_component else _Diagonal(about)


class _Diagonal(Collector):
    """Adds up squares of columns.

    Those of one site are gathered where that is cheaper than adding up what each of them gives.
    """

    def __init__(self, about: About) -> None:
        super().__init__(about)
        self.diagonal: dict[str, Tensor] = {}
        self.gathering: dict[str, Gathering] = {}

    def take(self, name: str, block: RowBlock) -> None:
        if name not in self.gathering:
            gathering = block.gathering(self.about.memory)
            if gathering is not None:
                self.gathering[name] = gathering
        # Once begun, a gathering takes all columns of its parameter, with their signs.
        if name in self.gathering:
            self.gathering[name].add(block, block.where, block.sign)
        else:
            self._add(name, block.sum_of_squares(), block.sign)

    def _add(self, name: str, squares: Tensor, sign: float) -> None:
        if name not in self.diagonal:
            self.diagonal[name] = torch.zeros_like(squares)
        self.diagonal[name].add_(squares, alpha=sign)

    def finish(self) -> ByParameter:
        for name in list(self.gathering):
            # Popped, so that the cotangents of one parameter are freed before the next.
            gathering = self.gathering.pop(name)
            self._add(name, gathering.total(), 1.0)
        result: ByParameter = self.about.result(self.diagonal)
        return result


class _ComponentDiagonals(Collector):
    """Adds up squares of columns, for every sample apart."""

    def __init__(self, about: About) -> None:
        super().__init__(about)
        self.diagonals: dict[str, Tensor] = {}

    def take(self, name: str, block: RowBlock) -> None:
        rows = wide(block.rows())  # squares of half precision are summed in float32
        if name not in self.diagonals:
            self.diagonals[name] = rows.new_zeros(self.about.samples, *rows.shape[1:])
        self.diagonals[name][block.where].addcmul_(rows, rows, value=block.sign)

    def finish(self) -> ByParameter:
        result: ByParameter = self.about.result(self.diagonals)
        return result


# --- norms ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ColumnNorms(ColumnQuantity):
    """``Σ_p v²`` of every column, ``[size]``.

    The diagonal of the Gram matrix; with signs they sum to tr G.
    """

    root: HessianRoot
    needs = "squared_norms"

    def root_in(self, curvature: Curvature) -> HessianRoot:
        return self.root

    def start(self, about: About) -> Collector:
        return _ColumnNorms(about, self.root)


class _ColumnNorms(Collector):
    """Adds up squared norms, ``[samples, columns]``, over parameters."""

    def __init__(self, about: About, root: HessianRoot) -> None:
        super().__init__(about)
        self.norms = wide(about.like.new_zeros(*root.layout))

    def take(self, name: str, block: RowBlock) -> None:
        if self.norms.shape[1]:  # parameters without columns are fed zeros as column 0
            self.norms[block.where, block.column] += block.squared_norms()

    def finish(self) -> Tensor:
        return self.norms.flatten()
