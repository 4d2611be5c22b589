"""The second derivative of the loss at a point, roots of it, and the way that columns of the Gauss-Newton factor go.

A way is chosen by counting: every column on its own below the last place where samples meet, or all batch statistics,
or as many directions of these as a tolerance needs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from unbatch.analysis.structure import Structure
from unbatch.autodiff.jvp import Linearised, LinearisedGraph, LinearisedModel
from unbatch.autodiff.loss import LossAt
from unbatch.curvature.batch_statistics import Extent, Statistics
from unbatch.curvature.hessian_root import Factor, HessianRoot
from unbatch.curvature.loss_hessian import factor, joint
from unbatch.curvature.sampled_root import likelihood, sampled
from unbatch.curvature.low_rank import (
    Basis,
    CoefficientSVD,
    CorrectedSource,
    CostEstimate,
    OfDiagonal,
    OfGram,
    compressed,
    estimate_cost,
    everything,
)
from unbatch.errors import (
    MSG_NO_BLOCKS,
    MSG_NO_COMPONENTS,
    MSG_NOT_POSITIVE,
    MSG_NOT_REPLAYED,
    MSG_VANISHING,
    VANISHING,
    VANISHING_INSIDE,
    StructureError,
    VanishingCurvatureWarning,
    warn,
)
from unbatch.gradients.request import Request, check_recurrences_of, is_planned, source_of
from unbatch.gradients.sources import Chunking, Source
from unbatch.linalg.space import Space

Draws = (
    tuple[int, int] | None
)  # how many columns are drawn for each sample, and the seed; None: H itself


DRAWS = 6  # vectors of random signs on which an error is estimated


@dataclass(frozen=True)
class Rtol:
    """A tolerance for the diagonal, or for the Gram matrix: of the relative error in the Frobenius norm."""

    value: float
    gram: bool = False
    seed: int = 0


@dataclass(frozen=True)
class StatisticsRoute:
    """The way by batch statistics. ``extent``: what it takes; ``request``: of which question."""

    extent: Extent
    request: Request

    @property
    def space(self) -> Space:
        return self.request.space

    @cached_property
    def statistics(self) -> Statistics | None:
        """Return the statistics after two forward passes; None where they fail their self-check."""
        return Statistics.of(self.request.setting, self.request.parameters)

    def source(self, parameters: Mapping[str, Tensor]) -> Source:
        """Return where rows of these parameters with statistics held constant come from."""
        return source_of(self.request.frozen().of(parameters))

    def counted(self, columns: int) -> CostEstimate:
        """Return whether it takes less than to pull back so many columns."""
        return estimate_cost(self.extent, columns, self.space.size, self.request.memory)


def linearised_of(request: Request) -> Linearised:
    """Return the predictions as a linear map of the parameters, after one forward pass."""
    setting, frozen = request.setting, request.by == "frozen"
    check_recurrences_of(request)
    if setting.faithful:
        return LinearisedGraph(setting, request.parameters, frozen)
    if frozen and not request.structure.independent_forward:
        raise StructureError(MSG_NOT_REPLAYED.format(by=request.by, why=request.unfaithful))
    return LinearisedModel(setting, request.parameters)


def through_of(request: Request) -> StatisticsRoute | None:
    """Return the way by batch statistics; None where it does not exist.

    Samples have to depend on each other by batch norms alone, and in more than one place.
    """
    if request.by != "component" or not is_planned(request):
        return None
    if not request.setting.route(request.parameters, request.by).flow.columns:
        return None
    extent = Extent.of(request.setting, request.parameters)
    return None if extent is None else StatisticsRoute(extent, request)


class Curvature:
    """The second derivative of the loss at the predictions, and roots of it.

    ``apart``: it is known to be block diagonal by samples. What it takes forward passes to know
    (the loss at the predictions, the linear map, the batch statistics) is computed when first needed.
    """

    def __init__(self, request: Request) -> None:
        self.request = request
        self.memory = request.memory
        self.roots: dict[Draws, HessianRoot] = {}
        self.bases: dict[tuple[HessianRoot, Rtol | None], Basis | None] = {}
        self.spreads: dict[HessianRoot, CoefficientSVD] = {}
        self._loss: LossAt | None = None
        self._linearised: Linearised | None = None

    @property
    def structure(self) -> Structure:
        return self.request.structure

    @property
    def apart(self) -> bool:
        return bool(self.structure.reduction)

    # -- forward passes --

    @property
    def linearised(self) -> Linearised:
        if self._linearised is None:
            self._linearised = linearised_of(self.request)
        return self._linearised

    @property
    def loss(self) -> LossAt:
        """Return the loss at the predictions."""
        if self._loss is None:
            lin = self.linearised
            self._loss = LossAt(self.request.setting, lin.predictions, lin.inner, lin.all_outputs)
        return self._loss

    def share_forward(self, source: Source, rows: bool, compressed: bool = False) -> None:
        """Know the loss from a forward pass that the question needs anyway.

        With ``rows``, or where columns are pulled back one by one, that is the pass of ``source``.
        By way of statistics (always if ``compressed``) it is the one that knows these, which is
        also the linear map; and where H joins all samples, its columns go through the linear map.
        """
        if self._loss is not None or (not rows and not self.apart):
            return
        statistics = None if rows else self._statistics_ahead(compressed)
        if statistics is None:
            self._loss = source.loss
        elif self._linearised is None:
            self._linearised = statistics.free

    def _statistics_ahead(self, compressed: bool) -> Statistics | None:
        """Return them if columns will go by way of them, as far as that can be said before H is known."""
        if self._through is None:
            return None
        entries = sum(math.prod(shape) for shape in self.structure.predictions)
        return self._through.statistics if compressed or self._through.counted(entries) else None

    @cached_property
    def dims(self) -> dict[int, int]:
        """Return the axis of the samples of every prediction."""
        axes = self.request.setting.axes
        return {i: dim for i, dim in axes.items() if i in self.loss.predictions}

    @cached_property
    def _through(self) -> StatisticsRoute | None:
        return through_of(self.request)

    def basis(self, root: HessianRoot, rtol: Rtol | None = None) -> Basis | None:
        """How columns go by way of statistics; None: each is pulled back on its own.

        Without ``rtol``, all statistics, where that is counted to take less.
        """
        if (root, rtol) not in self.bases:
            self.bases[root, rtol] = self._basis(root, rtol)
        return self.bases[root, rtol]

    def _basis(self, root: HessianRoot, rtol: Rtol | None) -> Basis | None:
        if not isinstance(root, Factor) or not root.size or self._through is None:
            return None
        whole = rtol is None or root.lowest < 0
        if whole and not self._through.counted(root.size):
            return None
        statistics, space = self._through.statistics, self._through.space
        if statistics is None:
            return None
        if rtol is None or whole:
            return everything(statistics, space)
        spread = self.spreads.setdefault(root, CoefficientSVD(statistics, root, space))
        missing = (OfGram if rtol.gram else OfDiagonal)(spread, DRAWS, rtol.seed)
        row = space.size * root.root.element_size()
        return compressed(spread, missing, rtol.value, rtol.seed, self.memory // (2 * row))

    def plan(self, root: HessianRoot, source: Source, chunks: Chunking) -> tuple[int, str]:
        """Backward passes in all, and why they are those."""
        samples, columns = root.table
        passes, _ = source.pullbacks(chunks)
        if not root.separate:
            return (
                root.rank,
                "The second derivative of the loss joins all samples: each of its columns is pulled back.",
            )
        counted = None if self._through is None else self._through.counted(samples * columns)
        if self._through is None or counted is None:
            return columns * passes, f"{columns} columns a sample. {source.reason}"
        if counted and self._through.statistics is not None:
            return counted.statistics + 2 * columns, counted.reason
        return columns * passes, counted.reason

    def columns_of(
        self, source: Source, basis: Basis | None, parameters: Mapping[str, Tensor]
    ) -> Source | CorrectedSource:
        """What feeds columns of these parameters."""
        through = self._through if basis is not None else None
        if basis is None or through is None or through.statistics is None:
            return source
        return CorrectedSource(
            through.source(parameters), through.statistics, basis, through.space, list(parameters)
        )

    def root(self, draws: Draws = None) -> HessianRoot:
        """A root of H, or one that is drawn so that it is one on average.

        Raises ``StructureError`` where H is too large to be taken apart, or has negative eigenvalues and draws are
        asked for.
        """
        if draws not in self.roots:
            self.roots[draws] = self._exact() if draws is None else self._drawn(*draws)
        return self.roots[draws]

    def _exact(self) -> HessianRoot:
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

    def _drawn(self, count: int, seed: int) -> HessianRoot:
        exact = self.components("Columns drawn for each sample")
        if exact.lowest < 0:
            raise StructureError(
                MSG_NOT_POSITIVE.format(what="Columns drawn at random", lowest=exact.lowest)
            )
        return sampled(exact, likelihood(exact, self.loss), count, seed)

    def components(self, what: str) -> Factor:
        """The root of a sum over samples; raises ``StructureError`` where the loss is none."""
        root = self.root()
        if not isinstance(root, Factor):
            reduction = self.structure.reduction
            why = "it fails" if reduction.status == "fails" else "it is unknown"
            raise StructureError(MSG_NO_COMPONENTS.format(what=what, why=why))
        return root
