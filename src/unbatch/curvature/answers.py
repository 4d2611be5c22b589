"""How questions about the diagonal and the spectrum of G are answered, each by its cheapest way.

The ways are counted in ``ways.py``; here each of them is gone. What is expensive and of use to
other questions, the Gram matrix or G itself, is kept.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from unbatch.autodiff.jvp import Linearised
from unbatch.curvature import spectrum
from unbatch.curvature.column_map import ColumnMap
from unbatch.curvature.ggn_quantities import ColumnNorms
from unbatch.curvature.gram import Gram
from unbatch.curvature.hessian_root import HessianRoot
from unbatch.curvature.pace import Pace
from unbatch.curvature.point import Point
from unbatch.curvature.sizes import Sizes, sizes_of
from unbatch.curvature.spectrum import Decomposition, DenseDecomposition, GramDecomposition
from unbatch.curvature.strategy import Draws
from unbatch.curvature.ways import Counting, Way, Ways
from unbatch.linalg import spectra
from unbatch.linalg.operators import Operator
from unbatch.linalg.solvers import Solved, conjugate_gradients
from unbatch.linalg.space import Space
from unbatch.linalg.spectra import Eigenpairs
from unbatch.running.tasks import task

ESTIMATED_DIAGONAL = "`G.estimate_diag(100)` takes 100 backward passes"
ESTIMATED_TRACE = "`unbatch.spectra.trace(G, 100)` takes 100 products"
ESTIMATED_SPECTRUM = "`unbatch.spectra.density(G, probes=10, steps=30)` takes 300 products"
LARGEST_ONLY = "`G.eigh(k)` finds the k largest by products"
ESTIMATED_DETERMINANT = f"{ESTIMATED_SPECTRUM}, of which `.moment(f)` is the trace of f(G)"

ROWS = "Rows of the Gauss-Newton factor pushed forward"

# Residuals of a solve, relative, by default; and the most products for one.
RTOL_IN_DOUBLE, RTOL_IN_SINGLE = 1e-8, 1e-3
LIMIT = 1000


def is_single(damping: Any) -> bool:
    """Return whether a damping is one number greater than zero, for all eigenvectors."""
    if isinstance(damping, Tensor):
        return damping.ndim == 0 and bool(damping > 0)
    return isinstance(damping, int | float) and damping > 0


@dataclass(frozen=True)
class Spent:
    """How a question was answered: by which ``method``, with how many backward passes (``pulls``)
    and forward passes of tangents (``pushes``).

    ``residual``: the largest ``‖G v − λ v‖`` of eigenpairs, or ``‖b − A x‖ / ‖b‖`` of a solution,
    that an iteration has left; zero for what is exact up to rounding.
    """

    method: str
    pulls: float
    pushes: float
    residual: float = 0.0


class Factored(Operator):
    """A matrix ``G = V Σ Vᵀ`` that is known by its products, and by the columns of V.

    ``point``: where it is taken; ``draws``: how many columns are drawn for each sample, if any;
    ``subset``: of which samples it is, if not of all; ``rounded``: the type that rounds most among
    those of the layers; ``root``: of the second derivative of the loss, with the signs Σ.
    """

    symmetric = True
    space: Space
    point: Point
    draws: Draws
    subset: Tensor | None
    rounded: torch.dtype

    @property
    @abstractmethod
    def root(self) -> HessianRoot: ...

    @property
    @abstractmethod
    def linearised(self) -> Linearised: ...

    @property
    @abstractmethod
    def columns(self) -> ColumnMap: ...

    @property
    @abstractmethod
    def rank_bound(self) -> int: ...


class Answers:
    """Answers about one matrix."""

    def __init__(self, matrix: Factored) -> None:
        self.matrix = matrix

    # -- which way --

    @cached_property
    def _sizes(self) -> Sizes:
        matrix = self.matrix
        return sizes_of(matrix.point.curvature, matrix.point.request, matrix.draws)

    @property
    def _counting(self) -> Counting:
        # A matrix that an earlier question has left behind costs nothing.
        there = {name: vars(self).get(name) for name in ("gram", "dense")}
        decomposed = {name for name, matrix in there.items() if matrix and matrix.is_decomposed}
        known = bool(there["gram"]), bool(there["dense"])
        return Counting(self._sizes, *known, frozenset(decomposed))

    def diagonal_ways(self, question: str) -> Ways:
        """Return the ways to the diagonal or the trace."""
        estimate = ESTIMATED_TRACE if question == "trace" else ESTIMATED_DIAGONAL
        return self._ways(f"G.{question}()", self._counting.diagonal(), estimate)

    def gram_ways(self) -> Ways:
        """Return the ways to the Gram matrix."""
        return self._ways("G.gram()", self._counting.inner_products())

    def eigenvalue_ways(self, question: str = "G.eigvalsh()") -> Ways:
        """Return the ways to all eigenvalues."""
        estimates = f"{LARGEST_ONLY}; {ESTIMATED_SPECTRUM}"
        return self._ways(question, self._counting.eigenvalues(), estimates)

    def determinant_ways(self) -> Ways:
        """Return the ways to a determinant."""
        return self._ways("G.logdet(..)", self._counting.eigenvalues(), ESTIMATED_DETERMINANT)

    def eigenpair_ways(self, k: int | None, question: str = "eigh") -> Ways:
        """Return the ways to the k largest eigenpairs, or to all."""
        estimates = "" if k is not None else f"{LARGEST_ONLY}; {ESTIMATED_SPECTRUM}"
        shown = "" if k is None else str(k)
        ways = self._ways(f"G.{question}({shown})", self._counting.eigenpairs(k), estimates)
        return self._searchable(ways)

    def newton_ways(self, k: int | None, damping: Any) -> Ways:
        """Return the ways to a Newton step along k eigenvectors, or all.

        Along all, it is the solution of a system where the gradient lies in the range of G.
        """
        shown = "G.newton_step(..)" if k is None else f"G.newton_step(.., {k})"
        ways = self._ways(shown, self._counting.newton_step(k, self._is_double))
        ways = self._searchable(ways)
        if k is not None or (is_single(damping) and self._is_a_solution):
            return ways
        return ways.without("cg")

    def solve_ways(self, damping: float, columns: int = 1) -> Ways:
        """Return the ways to solve for so many right-hand sides.

        Through the Gram matrix with damping only, by products where the matrix is definite.
        """
        ways = self._ways("G.solve(..)", self._counting.solution(columns, self._is_double))
        if damping == 0:
            ways = ways.without("woodbury")
        if damping < 0 or self.matrix.root.lowest < 0:
            ways = ways.without("cg")
        return ways

    def solve_way_by_hand(self, method: str) -> Ways:
        """Return the way that is asked for, whatever the damping."""
        ways = self._ways("G.solve(..)", self._counting.solution(1, self._is_double))
        return ways.by_hand(method)

    def _searchable(self, ways: Ways) -> Ways:
        """Leave out searches by products that round more coarsely than their type says."""
        return ways if self.matrix.rounded == self.matrix.dtype else ways.without("lanczos")

    def _ways(self, question: str, ways: list[Way], estimates: str = "") -> Ways:
        request = self.matrix.point.request
        return Ways(question, ways, self._sizes, request.memory, request.seconds, estimates)

    @property
    def _is_double(self) -> bool:
        return self.matrix.rounded == torch.float64

    @cached_property
    def pace(self) -> Pace:
        """How long passes take: three of each kind are made for it."""
        return Pace.measured(self.matrix.linearised, self.matrix.point.parameters)

    def choose(self, ways: Ways, method: str | None) -> Way:
        """Return the way that is taken. Raises ``InputError`` and ``BudgetError``."""
        return ways.by_hand(method).within_time(lambda: self.pace)

    # -- the small matrices --

    @cached_property
    def gram_matrix(self) -> Tensor:
        """``VᵀV`` of the columns of the root, in float64."""
        point = self.matrix.point
        source = point.source()  # before the root, which is then known from the same pass
        return point.gram(Gram(self.matrix.root), source)

    @cached_property
    def gram(self) -> GramDecomposition:
        """The decomposition by the Gram matrix."""
        matrix, gram = self.matrix, self.gram_matrix
        # The linear map takes a forward pass of its own: for what needs V, and not before.
        return GramDecomposition(lambda: matrix.columns, gram, matrix.root.sigma, matrix.rounded)

    @cached_property
    def dense(self) -> DenseDecomposition:
        """The decomposition by G itself."""
        matrix = self.matrix
        return DenseDecomposition(matrix.to_dense().double(), matrix.dtype, matrix.rounded)

    def decomposition(self, way: Way) -> Decomposition:
        """Return the one of a way that has one."""
        return self.dense if way.method == "dense" else self.gram

    # -- diagonal and trace, forward --

    def forward_squares(self) -> Tensor:
        """Return ``Σ σ (Sᵀ J e_i)²`` for each unit vector ``e_i``: the diagonal, ``[D]``."""
        matrix = self.matrix
        signs = matrix.root.sigma
        diagonal = torch.zeros(matrix.shape[0], dtype=matrix.dtype, device=matrix.device)
        with task(ROWS, len(diagonal)) as passes:
            for i, row in passes.over(self._rows_of_factor()):
                diagonal[i] = (signs * row.square()).sum()
        return diagonal

    def forward_gram(self) -> Tensor:
        """Return ``VᵀV`` from the rows of V, in float64."""
        matrix = self.matrix
        # Kept whole: the budget of memory was held against it.
        V = torch.zeros(*matrix.columns.shape, dtype=matrix.dtype, device=matrix.device)
        with task(ROWS, len(V)) as passes:
            for i, row in passes.over(self._rows_of_factor()):
                V[i] = row
        V = V.double()
        return V.T @ V

    def _rows_of_factor(self) -> Iterator[tuple[int, Tensor]]:
        """Yield number and entries of each row of V, by a forward pass for each."""
        columns = self.matrix.columns
        unit = torch.zeros(self.matrix.shape[0], dtype=columns.dtype, device=columns.device)
        for i in range(len(unit)):
            unit[i] = 1
            yield i, columns.T @ unit
            unit[i] = 0

    def trace(self, way: Way) -> Tensor:
        """Return the trace, a number."""
        if way.method == "forward":
            return self.forward_squares().sum()
        point = self.matrix.point
        source = point.source()  # before the root, as for the Gram matrix
        root = self.matrix.root
        norms = point.evaluate(ColumnNorms(root), source)
        return (norms * root.sigma.to(norms.dtype)).sum()

    # -- eigenpairs --

    def eigenpairs(
        self, way: Way, k: int | None, search: dict[str, Any], checked: bool = True
    ) -> tuple[Eigenpairs, Spent]:
        """Return the k largest; ``search``: the options of one by products.

        ``checked``: raise ``ConvergenceError`` where such a search does not converge.
        """
        if way.method != "lanczos" or k is None:
            pairs = self.decomposition(way).pairs(k)
            return pairs, Spent(way.method, way.pulls, way.pushes)
        # What was found is judged by the caller where it asks how well.
        pairs, found, more = self._searched(k, search)
        if checked:
            found.check()
        worst = float(found.residuals.max()) if len(found.residuals) else 0.0
        return pairs, Spent("lanczos", found.products + more, found.products, worst)

    def _searched(self, k: int, search: dict[str, Any]) -> tuple[Eigenpairs, spectra.Search, int]:
        """Return the k largest by products, how well, and what eigenvectors took besides.

        In the smaller of two spaces: with ``VᵀV a = λ a``, ``V a`` is an eigenvector of ``V Vᵀ``
        for the same λ, which is G where all signs are positive.
        """
        matrix = self.matrix
        root, V = matrix.root, matrix.columns
        # With signs of both kinds VᵀV has other eigenvalues than G.
        if root.size >= matrix.shape[0] or not root.size or (root.sigma < 0).any():
            pairs, found = spectra.searched(matrix, k, **search)
            return self._without_zeros(pairs), found, 0
        # A vector of parameters starts a search among columns by what it has in common with these.
        if search.get("start") is not None:
            search = search | {"start": V.T @ search["start"]}
        small, found = spectra.searched(V.T @ V, min(k, root.size), **search)
        small = self._without_zeros(small)
        vectors = torch.nn.functional.normalize(V @ small.vectors.to(matrix.dtype), dim=0)
        pairs = Eigenpairs(small.values.to(matrix.dtype), vectors)
        # ‖G V a − λ V a‖ = ‖V r‖ ≤ √λ_max ‖r‖, beside ‖V a‖ = √λ
        lowest = float(small.values[:1].sum())
        if lowest > 0:
            found = replace(found, residuals=found.residuals * (found.norm / lowest) ** 0.5)
        return pairs, found, len(small.values)

    def _without_zeros(self, pairs: Eigenpairs) -> Eigenpairs:
        """Leave out eigenvalues that are rounding, as those of a decomposition are."""
        values, vectors = pairs
        if not len(values):
            return pairs
        rounding = min(self.matrix.shape) * torch.finfo(self.matrix.rounded).eps
        nonzero = values.abs() > rounding * values.abs().max()
        return Eigenpairs(values[nonzero], vectors[:, nonzero])

    # -- Newton steps and solves --

    def newton_step(
        self, way: Way, gradient: Tensor, damping: Any, k: int | None
    ) -> tuple[Tensor, Spent]:
        """Return ``−Σ_i γ_i / (λ_i + δ_i) e_i`` over the k largest, ``[D]``."""
        if way.method == "cg":
            return self._step_by_products(gradient, damping)
        if way.method == "lanczos":
            (values, vectors), spent = self.eigenpairs(way, k, {})
            shifts = spectrum.checked_damping(damping, values)
            return -vectors @ ((vectors.T @ gradient) / (values + shifts)), spent
        step = self.decomposition(way).newton_step(gradient, damping, k)
        return step, Spent(way.method, way.pulls, way.pushes)

    def _step_by_products(self, gradient: Tensor, damping: Any) -> tuple[Tensor, Spent]:
        """Return the step along all eigenvectors that are not zero, as a solution."""
        matrix = self.matrix
        rtol = RTOL_IN_DOUBLE if self._is_double else RTOL_IN_SINGLE
        step, report = spectrum.by_products(matrix, -gradient, damping, rtol, LIMIT)
        report.check()
        # The residual that is told takes a product of its own.
        products = report.iterations + 1
        return step, Spent("cg", products, products, report.residual)

    @property
    def _is_a_solution(self) -> bool:
        matrix = self.matrix
        # Of drawn columns, and of some samples, the gradient is no combination.
        if matrix.draws is not None or matrix.subset is not None:
            return False
        return matrix.root.lowest >= 0 and self._slope_is_in_range

    @cached_property
    def _slope_is_in_range(self) -> bool:
        """Whether the slope of the loss at the predictions is ``H u`` for some u.

        The gradient lies in the range of G then, and a solution has no part along what G takes to
        zero, as a Newton step has none.
        """
        loss = self.matrix.point.curvature.loss
        slope = loss.slope
        # What has a slope and no second derivative is in no range.
        zeros = {i: torch.zeros_like(t) for i, t in slope.items()}
        shapes = {i: tuple(t.shape) for i, t in slope.items()}
        space = Space({str(i): shape for i, shape in shapes.items()})

        def times(v: Tensor) -> Tensor:
            product = loss.hessian_times({int(i): t for i, t in space.named(v).items()})
            return space.flat({str(i): product.get(i, zeros[i]) for i in shapes})

        right = space.flat({str(i): t for i, t in slope.items()})
        rtol = RTOL_IN_DOUBLE if self._is_double else RTOL_IN_SINGLE
        _, report = conjugate_gradients(times, right, rtol, LIMIT)
        return report.converged

    def solve(
        self, way: Way, b: Tensor, damping: float, rtol: float, limit: int
    ) -> tuple[Tensor, Solved]:
        """Return ``(G + δI)⁻¹ b`` for ``b`` ``[D]``."""
        matrix = self.matrix
        if way.method == "cg":
            x, report = spectrum.by_products(matrix, b, damping, rtol, limit)
        else:
            decomposition = self.decomposition(way)

            def solved(right: Tensor) -> Tensor:
                return decomposition.solve(right, damping)

            x, residual = spectrum.refined(matrix, solved, b, damping)
            report = Solved(way.method, 2, residual, rtol)
        if damping == 0:
            report = spectrum.explained(report, matrix.rank_bound, matrix.shape[0])
        return x, report
