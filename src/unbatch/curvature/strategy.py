"""The second derivative of the loss at a point, and how columns of the factor are pulled back.

The route is chosen by counting: every column on its own below the last cross-sample dependence, or
all batch statistics (``batch_statistics.py``), or as many directions of these as a tolerance needs
(``low_rank.py``, ``truncation.py``). What is computed from columns stands in
``ggn_quantities.py``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from unbatch.analysis.structure import Structure
from unbatch.autodiff.contractions.row_block import RowBlock
from unbatch.autodiff.jvp import Linearised, LinearisedGraph
from unbatch.autodiff.loss import LossAt
from unbatch.autodiff.model_jvp import LinearisedModel
from unbatch.curvature.batch_statistics import Statistics, StatisticsCost
from unbatch.curvature.hessian_root import HessianRoot, SampleRoot
from unbatch.curvature.loss_hessian import factor, is_linear_in
from unbatch.curvature.low_rank import (
    Basis,
    CoefficientSVD,
    CorrectedSource,
    CostEstimate,
    estimate_cost,
    full_basis,
)
from unbatch.curvature.sampled_root import sampled
from unbatch.curvature.truncation import DiagonalResidual, GramResidual, truncated_basis
from unbatch.errors import (
    MSG_COMPLEX_OUTPUT,
    MSG_JOINED,
    MSG_MATRIX_NOT_FINITE,
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
from unbatch.gradients.plan import SitePlan
from unbatch.gradients.request import (
    Request,
    check_linear,
    check_predictions_of,
    check_recurrences_of,
    is_planned,
    source_of,
)
from unbatch.gradients.sources import Chunking, Source, Take
from unbatch.linalg.space import Space

# How many columns are drawn for each sample, and the seed; None: H itself.
Draws = tuple[int, int] | None

DRAWS = 6  # vectors of random signs on which an error is estimated


@dataclass(frozen=True)
class Rtol:
    """A tolerance: of the relative error in the Frobenius norm.

    ``gram``: of the Gram matrix, and not of the diagonal; ``seed``: of the random signs.
    """

    value: float
    gram: bool = False
    seed: int = 0


# --- what a question has at hand ------------------------------------------------------------------


@dataclass(frozen=True)
class StatisticsRoute:
    """The route through batch statistics. ``request``: the question it answers."""

    statistics_cost: StatisticsCost
    request: Request

    @staticmethod
    def of(request: Request) -> StatisticsRoute | None:
        """Return None where the route does not exist.

        Samples have to depend on each other by batch norms alone, and in more than one place.
        """
        # Frozen statistics are constants, and a model that is not replayed has none at hand.
        if request.by != "component" or not is_planned(request):
            return None
        # Below a single batch norm sites are projected: nothing has to be pulled back alone.
        if not request.context.schedule(request.parameters, request.by).plan.columns:
            return None
        cost = StatisticsCost.of(request.context, request.parameters)
        return None if cost is None else StatisticsRoute(cost, request)

    @property
    def space(self) -> Space:
        return self.request.space

    @cached_property
    def statistics(self) -> Statistics | None:
        """The statistics after two forward passes; None where they fail their self-check."""
        return Statistics.of(self.request.context, self.request.parameters)

    def source(self, parameters: Mapping[str, Tensor]) -> Source:
        """Return the source of rows of these parameters with statistics held constant."""
        return source_of(self.request.frozen().of(parameters))

    def cost(self, columns: int) -> CostEstimate:
        """Return whether it takes less than to pull back so many columns."""
        return estimate_cost(self.statistics_cost, columns, self.space.size, self.request.memory)


def linearised_of(request: Request) -> Linearised:
    """Return the predictions as a linear map of the parameters, after one forward pass.

    Raises ``StructureError`` where statistics cannot be held constant, for the model is not
    replayed.
    """
    context, frozen = request.context, request.by == "frozen"
    check_predictions_of(request)
    check_recurrences_of(request)
    check_linear(request)
    if context.faithful:
        return LinearisedGraph(context, request.parameters, frozen)
    if frozen and not request.structure.independent_forward:
        raise StructureError(MSG_NOT_REPLAYED.format(by=request.by, why=request.replay_difference))
    return LinearisedModel(context, request.parameters)


# --- the curvature at a point ---------------------------------------------------------------------


class Curvature:
    """The second derivative of the loss at the predictions, and roots of it.

    What takes forward passes (the loss at the predictions, the linear map, the batch statistics) is
    computed when it is first needed, and kept, as are roots and bases: a matrix is asked many
    questions, and each of these is a function of the request alone.
    """

    def __init__(self, request: Request) -> None:
        self.request = request
        self.memory = request.memory
        self._roots: dict[Draws, HessianRoot] = {}
        self._bases: dict[tuple[HessianRoot, Rtol | None], Basis | None] = {}
        self._svds: dict[HessianRoot, CoefficientSVD] = {}
        self._loss: LossAt | None = None
        self._linearised: Linearised | None = None

    @property
    def structure(self) -> Structure:
        return self.request.structure

    @cached_property
    def separable(self) -> bool:
        """Return whether H is block diagonal by samples, as that of a sum over samples is.

        An output without an axis of samples may enter it linearly: then H says nothing of it.
        """
        context = self.request.context
        if not self.structure.reduction or not context.axes:
            return False
        return not context.outputs.joined or is_linear_in(self.loss, context.outputs.joined)

    # -- forward passes --

    @property
    def linearised(self) -> Linearised:
        """Return the linear map ``J``."""
        if self._linearised is None:
            self._linearised = linearised_of(self.request)
        return self._linearised

    @property
    def loss(self) -> LossAt:
        """Return the loss at the predictions."""
        if self._loss is None:
            lin = self.linearised
            _check_real(lin.predictions)
            self._loss = LossAt(self.request.context, lin.predictions, lin.inner, lin.all_outputs)
        return self._loss

    def share_forward(self, source: Source, rows: bool, compressed: bool = False) -> None:
        """Take the loss from a forward pass that the question needs anyway.

        With ``rows``, or where columns are pulled back one by one, that is the pass of ``source``.
        By way of statistics (always if ``compressed``) it is the one of these, which is also the
        linear map; and where H couples all samples, its columns go through the linear map.
        """
        if self._loss is not None or (not rows and not self.separable):
            return
        statistics = None if rows else self._statistics_ahead(compressed)
        if statistics is None:
            loss = source.loss
            _check_real(loss.predictions)
            self._loss = loss
        elif self._linearised is None:
            self._linearised = statistics.free

    def _statistics_ahead(self, compressed: bool) -> Statistics | None:
        """Return the statistics if columns will go by way of them, guessed before H is known."""
        if self.route is None:
            return None
        # A root has no more columns than the predictions have entries.
        entries = sum(math.prod(shape) for shape in self.structure.predictions)
        if compressed or self.route.cost(entries):
            return self.route.statistics
        return None

    @cached_property
    def dims(self) -> dict[int, int]:
        """The axis of the samples of every output that has one."""
        axes = self.request.context.axes
        return {i: axes[i] for i in self.loss.predictions if i in axes}

    @property
    def entries(self) -> int:
        """Return how many entries the outputs have by which H is taken."""
        outputs = self.dims if self.separable else self.loss.predictions
        return sum(self.loss.predictions[i].numel() for i in outputs)

    # -- where columns come from --

    def source(self, request: Request) -> Source:
        """Return what pulls columns back to the parameters of ``request``."""
        if self.separable:
            return source_of(request)
        return JointColumns(self, request.parameters)

    # -- roots of H --

    def root(self, draws: Draws = None) -> HessianRoot:
        """Return a root of H, or one that is drawn so that it is one on average.

        Raises ``StructureError`` where H is too large to be decomposed, or has negative eigenvalues
        and draws are asked for.
        """
        check_linear(self.request)
        if draws not in self._roots:
            self._roots[draws] = self._exact() if draws is None else self._drawn(*draws)
        return self._roots[draws]

    def known_root(self, draws: Draws) -> HessianRoot | None:
        """Return a root that is there from an earlier question."""
        return self._roots.get(draws)

    def _exact(self) -> HessianRoot:
        if self.separable:
            root = factor(self.loss, list(self.dims), self.dims)
        else:
            root = factor(self.loss, list(self.loss.predictions), None)
        shapes = [tuple(t.shape) for t in self.loss.predictions.values()]
        if root is None:
            raise StructureError(MSG_NO_BLOCKS.format(shapes=shapes))
        if not root.rank and self.request.samples:
            # No error: a matrix of zeros is the right answer, if hardly the expected one.
            cut, remedy = VANISHING_INSIDE if self.loss.context.own_loss else VANISHING
            text = MSG_VANISHING.format(cut=cut, shapes=shapes, remedy=remedy)
            warn(text, VanishingCurvatureWarning)
        return root

    def _drawn(self, count: int, seed: int) -> HessianRoot:
        exact = self.components("Columns drawn for each sample")
        if not exact.is_finite:
            raise StructureError(MSG_MATRIX_NOT_FINITE.format(what="Columns drawn at random"))
        if exact.lowest < 0:
            text = MSG_NOT_POSITIVE.format(what="Columns drawn at random", lowest=exact.lowest)
            raise StructureError(text)
        return sampled(exact, self.loss, count, seed)

    def components(self, what: str) -> SampleRoot:
        """Return the root of a sum over samples.

        ``what``: is asked for, in words. Raises ``StructureError`` where the loss is no such sum.
        """
        if self.separable:
            root = self.root()
            assert isinstance(root, SampleRoot)
            return root
        reduction = self.structure.reduction
        if reduction:
            shapes = self.structure.joined_in_words
            raise StructureError(MSG_JOINED.format(what=what, outputs=shapes))
        why = "it fails" if reduction.status == "fails" else "it is unknown"
        raise StructureError(MSG_NO_COMPONENTS.format(what=what, why=why))

    # -- the route of columns --

    @cached_property
    def route(self) -> StatisticsRoute | None:
        """The route through batch statistics; None where there is none."""
        return StatisticsRoute.of(self.request)

    def counted_passes(self, columns: int) -> float | None:
        """Return how many whole backward passes columns below batch norms take, the cheaper way.

        None where no statistics are between them. Counted from shapes: nothing is tried out.
        """
        request = self.request
        cost = None
        if request.by == "component":
            cost = StatisticsCost.of(request.context, request.parameters)
        if cost is None:
            return None
        estimate = estimate_cost(cost, columns, request.space.size, request.memory)
        return estimate.least / (2 * cost.work)

    def basis(self, root: HessianRoot, rtol: Rtol | None = None) -> Basis | None:
        """Return how columns go by way of statistics; None: each is pulled back on its own.

        Without ``rtol``, all statistics, where that is counted to take less.
        """
        if (root, rtol) not in self._bases:
            self._bases[root, rtol] = self._basis(root, rtol)
        return self._bases[root, rtol]

    def _basis(self, root: HessianRoot, rtol: Rtol | None) -> Basis | None:
        route = self.route
        if not isinstance(root, SampleRoot) or not root.separate or not root.size or route is None:
            return None
        # Estimates of an error assume that all signs are positive: otherwise nothing is left out.
        takes_all = rtol is None or root.lowest < 0
        if takes_all and not route.cost(root.size):
            return None
        statistics, space = route.statistics, route.space
        if statistics is None:
            return None
        if rtol is None or takes_all:
            return full_basis(statistics, space)
        if root not in self._svds:
            self._svds[root] = CoefficientSVD(statistics, root, space)
        svd = self._svds[root]
        residual = GramResidual if rtol.gram else DiagonalResidual
        estimator = residual(svd, DRAWS, rtol.seed)
        # Rows of the basis may take half of the memory.
        most_rows = self.memory // (2 * space.size * root.like.element_size())
        return truncated_basis(svd, estimator, rtol.value, rtol.seed, most_rows)

    def columns_of(
        self, source: Source, basis: Basis | None, parameters: Mapping[str, Tensor]
    ) -> Source | CorrectedSource:
        """Return the source that feeds columns of these parameters."""
        if not self.separable:
            return JointColumns(self, parameters)
        route = self.route
        if basis is None or route is None or route.statistics is None:
            return source
        frozen = route.source(parameters)
        return CorrectedSource(frozen, route.statistics, basis, route.space, list(parameters))

    def plan(self, root: HessianRoot, source: Source, chunks: Chunking) -> tuple[int, str]:
        """Return how many backward passes all columns take, and why that many."""
        if not root.separate:  # through the linear map, whatever the source does
            return root.rank, JointColumns.reason
        samples, columns = root.layout
        passes, _ = source.pullbacks(chunks)
        if self.route is None:
            return columns * passes, f"{columns} columns a sample. {source.reason}"
        cost = self.route.cost(samples * columns)
        # Of each column two pullbacks: with statistics constant, and by these.
        if cost and self.route.statistics is not None:
            return cost.statistics + 2 * columns, cost.reason
        return columns * passes, cost.reason


def _check_real(outputs: Mapping[int, Tensor]) -> None:
    for t in outputs.values():
        if t.is_complex():
            raise StructureError(MSG_COMPLEX_OUTPUT.format(dtype=t.dtype))


# --- columns that run through all samples ---------------------------------------------------------


class JointColumns(Source):
    """Columns of an H that joins all samples: each is pulled back as one vector, and is one row."""

    reason = (
        "The second derivative of the loss joins all samples: each of its columns is pulled back."
    )

    def __init__(self, curvature: Curvature, parameters: Mapping[str, Tensor]) -> None:
        self.curvature, self.parameters = curvature, parameters
        self.context = curvature.request.context

    @property
    def loss(self) -> LossAt:
        return self.curvature.loss

    def feed(
        self,
        chunks: Chunking,
        take: Take,
        outs: Mapping[str, Tensor],
        cotangents: Mapping[int, Tensor] | None = None,
        last: bool = True,
    ) -> None:
        if cotangents is None:
            cotangents = self.loss.slope
        for name, v in self._pulled(cotangents).items():
            take(name, RowBlock(slice(0, 1), v[None]))

    def _pulled(self, cotangents: Mapping[int, Tensor]) -> dict[str, Tensor]:
        return self.curvature.linearised.pull(cotangents, self.parameters)

    def weighted_sum(self, weights: Tensor) -> dict[str, Tensor]:
        return {name: weights[0] * g for name, g in self._pulled(self.loss.slope).items()}

    def sites(self) -> list[SitePlan]:
        return [SitePlan((name,), "", "", "by autograd", "model") for name in self.parameters]

    def pullbacks(self, chunks: Chunking) -> tuple[int, int]:
        return 1, 1

    def rest(self) -> dict[str, Tensor]:
        return {}
