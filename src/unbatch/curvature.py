"""The second derivative of the loss at a point, roots of it, and the way that columns of the Gauss-Newton factor go.

A way is chosen by counting: every column on its own below the last place where samples meet, or all batch statistics,
or as many directions of these as a tolerance needs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from torch import Tensor

from unbatch.compression import Basis, Completed, OfDiagonal, OfGram, Spread, compressed, everything, pays
from unbatch.cotangents import LossAt
from unbatch.errors import (
    MSG_NO_BLOCKS,
    MSG_NO_COMPONENTS,
    MSG_NOT_POSITIVE,
    MSG_VANISHING,
    VANISHING,
    VANISHING_INSIDE,
    StructureError,
    VanishingCurvatureWarning,
    warn,
)
from unbatch.linearised import Linearised
from unbatch.loss import factor, joint, likelihood, sampled
from unbatch.roots import Factor, Root
from unbatch.sources import Chunks, Source
from unbatch.statistics import Statistics
from unbatch.tree import Space
from unbatch.verdicts import Structure

Draws = tuple[int, int] | None  # how many columns are drawn for each sample, and the seed; None: H itself
DRAWS = 6  # vectors of random signs on which an error is estimated


@dataclass(frozen=True)
class Rtol:
    """A tolerance for the diagonal, or for the Gram matrix: of the relative error in the Frobenius norm."""

    value: float
    gram: bool = False
    seed: int = 0


@dataclass(frozen=True)
class Through:
    """What it takes to go by way of batch statistics: ``source`` gives frozen rows of some parameters."""

    statistics: Statistics
    source: Callable[[Mapping[str, Tensor]], Source]
    space: Space


@dataclass
class Curvature:
    """The second derivative of the loss at the predictions, and roots of it.

    ``apart``: it is known to be block diagonal by samples. ``linearise`` gives the predictions as a linear map,
    ``through`` what is needed to go by way of batch statistics, where columns would have to be pulled back one by one
    and that is the only way in which samples listen to each other.
    """

    loss: LossAt
    dims: Mapping[int, int]
    structure: Structure
    linearise: Callable[[], Linearised]
    through: Callable[[], Through | None]
    memory: int
    roots: dict[Draws, Root] = field(default_factory=dict)
    bases: dict[tuple[Any, ...], Basis | None] = field(default_factory=dict)
    spreads: dict[Root, Spread] = field(default_factory=dict)

    @property
    def apart(self) -> bool:
        return bool(self.structure.reduction)

    @cached_property
    def _through(self) -> Through | None:
        return self.through()

    def basis(self, root: Root, rtol: Rtol | None = None) -> Basis | None:
        """How columns go by way of statistics; None: each is pulled back on its own.

        Without ``rtol``, all statistics, where that is counted to take less.
        """
        if (root, rtol) not in self.bases:
            self.bases[root, rtol] = self._basis(root, rtol)
        return self.bases[root, rtol]

    def _basis(self, root: Root, rtol: Rtol | None) -> Basis | None:
        if not isinstance(root, Factor) or not root.size or self._through is None:
            return None
        statistics, space = self._through.statistics, self._through.space
        if rtol is None or root.lowest < 0:
            worth = pays(statistics, root.size, space.size, self.memory)
            return everything(statistics, space) if worth else None
        spread = self.spreads.setdefault(root, Spread(statistics, root, space))
        missing = (OfGram if rtol.gram else OfDiagonal)(spread, DRAWS, rtol.seed)
        row = space.size * root.root.element_size()
        return compressed(spread, missing, rtol.value, rtol.seed, self.memory // (2 * row))

    def plan(self, root: Root, source: Source, chunks: Chunks) -> tuple[int, str]:
        """Backward passes in all, and why they are those."""
        samples, columns = root.table
        passes, _ = source.pullbacks(chunks)
        if not root.separate:
            return root.rank, "The second derivative of the loss joins all samples: each of its columns is pulled back."
        through = self._through
        if through is None:
            return columns * passes, f"{columns} columns a sample. {source.reason}"
        counted = pays(through.statistics, samples * columns, through.space.size, self.memory)
        return (counted.statistics + 2 * columns if counted else columns * passes), counted.reason

    def columns_of(self, source: Source, basis: Basis | None, parameters: Mapping[str, Tensor]) -> Source | Completed:
        """What feeds columns of these parameters."""
        through = self._through if basis is not None else None
        if basis is None or through is None:
            return source
        return Completed(through.source(parameters), through.statistics, basis, through.space, list(parameters))

    @cached_property
    def linearised(self) -> Linearised:
        return self.linearise()

    def root(self, draws: Draws = None) -> Root:
        """A root of H, or one that is drawn so that it is one on average.

        Raises ``StructureError`` where H is too large to be taken apart, or has negative eigenvalues and draws are
        asked for.
        """
        if draws not in self.roots:
            self.roots[draws] = self._exact() if draws is None else self._drawn(*draws)
        return self.roots[draws]

    def _exact(self) -> Root:
        found = factor(self.loss, self.dims) if self.apart else joint(self.loss, self.dims)
        if found is None:
            sizes = {i: tuple(t.shape) for i, t in self.loss.predictions.items()}
            raise StructureError(MSG_NO_BLOCKS.format(shapes=list(sizes.values())))
        if not found.rank:
            shapes = [tuple(t.shape) for t in self.loss.predictions.values()]
            cut, remedy = VANISHING_INSIDE if self.loss.setting.own_loss else VANISHING
            text = MSG_VANISHING.format(cut=cut, shapes=shapes, remedy=remedy)
            warn(text, VanishingCurvatureWarning)
        return found

    def _drawn(self, count: int, seed: int) -> Root:
        exact = self.components("Columns drawn for each sample")
        if exact.lowest < 0:
            raise StructureError(MSG_NOT_POSITIVE.format(what="Columns drawn at random", lowest=exact.lowest))
        return sampled(exact, likelihood(exact, self.loss), count, seed)

    def components(self, what: str) -> Factor:
        """The root of a sum over samples; raises ``StructureError`` where the loss is none."""
        root = self.root()
        if not isinstance(root, Factor):
            reduction = self.structure.reduction
            why = "it fails" if reduction.status == "fails" else "it is unknown"
            raise StructureError(MSG_NO_COMPONENTS.format(what=what, why=why))
        return root
