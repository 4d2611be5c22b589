"""The generalized Gauss-Newton matrix ``G = Jᵀ H J`` as an operator.

``J = ∂F/∂θ`` and ``H = ∇²_F L = S Σ Sᵀ``, so ``G = V Σ Vᵀ`` with ``V = Jᵀ S``: as many columns as
predictions have entries, N·C, and often fewer than there are parameters, D.

Products need J and H only. The diagonal and the trace are sums over columns
(``ggn_quantities.py``); the spectrum, log-determinants and solves follow from the Gram matrix
``VᵀV`` (``gram.py``, ``spectrum.py``; Dangel, Tatzel, Hennig 2021, "ViViT"). How columns are pulled
back is chosen in ``strategy.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from unbatch.analysis.verdict import Verdict
from unbatch.autodiff.jvp import Linearised
from unbatch.capture.isolation import outside_inference_mode
from unbatch.curvature import spectrum
from unbatch.curvature.answers import RTOL_IN_DOUBLE, RTOL_IN_SINGLE, Answers, Factored, Spent
from unbatch.curvature.column_map import ColumnMap, stacked
from unbatch.curvature.ggn_quantities import DiagGGN
from unbatch.curvature.gram import Gram, entrywise
from unbatch.curvature.hessian_root import HessianRoot, SampleRoot
from unbatch.curvature.low_rank import Compression
from unbatch.curvature.point import Point
from unbatch.curvature.spectrum import Directions
from unbatch.curvature.strategy import Draws
from unbatch.curvature.ways import Ways
from unbatch.errors import (
    MSG_DRAWS,
    MSG_NOT_POSITIVE,
    MSG_QUESTION,
    MSG_UNBIASED,
    InputError,
    StructureError,
    UnbatchError,
)
from unbatch.gradients.sources import Source
from unbatch.linalg.estimates import Control, DiagonalEstimate, estimate_diagonal
from unbatch.linalg.rows import widest
from unbatch.linalg.solvers import Solved
from unbatch.running.tasks import task

HessianTimes = Callable[[Mapping[int, Tensor]], dict[int, Tensor]]


def ggn_product(
    linearised: Linearised, hessian_times: HessianTimes, v: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Return ``Jᵀ H J v`` by parameter, for the parameters in ``v``.

    One jvp, one Hessian-vector product at the predictions, one vjp.
    """
    Jv = linearised.push(v)
    HJv = hessian_times(Jv)
    return linearised.pull(HJv, v)


@outside_inference_mode("_apply")
class GGN(Factored):
    """G at the parameters and the batch of the moment it was made.

    A symmetric operator on flat vectors and dicts. ``G @ v`` costs a jvp and a vjp through one
    forward pass that is kept. Raises ``StaleError`` when used after parameters or data have
    changed.
    """

    def __init__(self, point: Point, draws: Draws = None, samples: Tensor | None = None) -> None:
        self.point, self.draws, self.subset = point, draws, samples
        self.space = point.request.space
        parameters = list(point.parameters.values())
        self.shape = (self.space.size, self.space.size)
        self.dtype, self.device = widest(parameters), parameters[0].device
        # The type that rounds most among all parameters, whose layers its columns pass.
        types = [*point.request.context.types_of_parameters, self.dtype]
        self.rounded = max(types, key=lambda dtype: torch.finfo(dtype).eps)
        self._answers = Answers(self)

    def __repr__(self) -> str:
        try:
            note = self.note
        except UnbatchError as error:  # printing never fails
            note = str(error)
        kind = "Snapshot of a Gauss-Newton" if self.point.is_snapshot else "Gauss-Newton"
        return f"<{kind} matrix {tuple(self.shape)}, {note}>"

    def snapshot(self) -> GGN:
        """Return the matrix as it is now, to be used on after parameters or data have changed.

        It answers what this one answers, is never stale, and says in its ``repr`` that it is a
        snapshot. Memory: copies of all parameters, buffers and data of the batch; beside these, as
        this matrix, what is kept between questions (the activations of a forward pass; the Gram
        matrix). Cost: a forward pass, and some evaluations of the loss. Raises ``StaleError``, and
        ``StructureError`` where only the model itself has the derivatives, and not its recording.
        """
        return GGN(self.point.snapshot(), self.draws, self.subset)

    # -- what it is made of --

    @property
    def linearised(self) -> Linearised:
        """Return ``J`` as a linear map. Raises ``StaleError``."""
        self.point.check_fresh()
        return self.point.curvature.linearised

    @cached_property
    def root(self) -> HessianRoot:
        """``S``: a root of the second derivative of the loss, or of the part asked for."""
        self.point.check_fresh()
        curvature = self.point.curvature
        root = curvature.root(self.draws)
        if self.subset is None:
            return root
        # Some samples of H exist only where it is block diagonal by samples.
        if self.draws is None or not isinstance(root, SampleRoot):
            root = curvature.components("A choice of samples")
        weight = self.point.samples / max(len(self.subset), 1)
        return root.restricted(self.subset, weight)

    @property
    def columns(self) -> ColumnMap:
        """Return ``V = Jᵀ S``, ``[D, size]``, as an operator."""
        return ColumnMap(self.linearised, self.root, self.space, self)

    @property
    def rank_bound(self) -> int:
        """Return ``min(D, Σ_n rank H_n)``."""
        return min(self.shape[0], self.root.rank)

    @property
    def positive_semidefinite(self) -> Verdict:
        """Return whether H is, and so G; where not, the note has the lowest eigenvalue of H."""
        lowest = self.root.lowest
        if lowest >= 0:
            return Verdict("positive_semidefinite", "holds", "proved")
        note = f"the second derivative of the loss has the eigenvalue {lowest:.3g}"
        return Verdict("positive_semidefinite", "fails", "proved", note=note)

    @property
    def note(self) -> str:
        """Return which form H was found to have, and whether columns were drawn."""
        note = f"second derivative of the loss {self.root.form}"
        if self.root.form == "zero":
            note += "; it vanishes: the loss is linear in these predictions"
        if self.root.sampled:
            note += f"; {self.root.sampled}"
        return note

    # -- products --

    def _apply(self, v: Tensor) -> Tensor:
        linearised, space = self.linearised, self.space
        products = []
        with task("Products with the Gauss-Newton matrix", v.shape[1], "products") as passes:
            for column in passes.over(v.T):
                product = ggn_product(linearised, self._hessian_times, space.named(column))
                products.append(space.flat(product))
        return stacked(products, v, len(v))

    @property
    def _hessian_times(self) -> HessianTimes:
        """Return ``v -> H v``: by double backward, or by the root of a part of H."""
        if self.draws is None and self.subset is None:
            return self.point.curvature.loss.hessian_times
        return self.root.hessian_times

    # -- diagonal and trace --

    def diag(
        self,
        per_component: bool = False,
        *,
        rtol: float | None = None,
        unbiased: bool = False,
        seed: int = 0,
        method: str | None = None,
        info: bool = False,
    ) -> Any:
        """Return the diagonal, ``[D]``.

        ``per_component``: ``[N, D]``, one for every sample, which sum to it. ``rtol``: under
        several batch norms in train mode, by as few directions of their statistics as leave out no
        more than that (relative, Frobenius norm), by an estimate from random signs; ``unbiased``
        adds what they say is missing, so that the result is right on average and may be negative in
        an entry. ``method``: "columns" or "forward", as for ``trace``. ``info``: also a
        ``Compression`` that says what was spent and what is missing. Raises ``InputError`` for
        ``unbiased`` components.
        """
        if unbiased and per_component:
            raise InputError(MSG_UNBIASED)
        ways = self._answers.diagonal_ways("diag")
        if per_component or rtol is not None:
            ways = ways.by_hand("columns")  # of samples, or through the statistics of a batch
        if self._answers.choose(ways, method).method == "forward":
            forward = self._answers.forward_squares()
            spent = Compression(0, 0, True, 0.0, 0, self.shape[0], seed)
            return (forward, spent) if info else forward
        quantity = DiagGGN(per_component, rtol=rtol, seed=seed)
        diagonal, report = self._by_columns(quantity, unbiased)
        return (diagonal, report) if info else diagonal

    def _by_columns(self, quantity: DiagGGN, unbiased: bool) -> tuple[Tensor, Compression]:
        """Return the diagonal, or those of components, from columns; and what is missing."""
        # The source before the root, which is then known from the same forward pass.
        source = self.point.source(compressed=quantity.rtol is not None)
        quantity = replace(quantity, root=self.root)
        diagonal = self.point.evaluate(quantity, source)
        flat = _rows(diagonal) if quantity.per_component else diagonal.flat()
        basis = quantity.basis_in(self.point.curvature)
        missing = None
        if basis is not None:
            missing = basis.remainder
        if missing is None:
            return flat, Compression.of(basis, self.root)
        # Relative to what is in the diagonal: the basis has estimated its norm, too.
        whole = flat.sum(0) if quantity.per_component else flat
        report = Compression.of(basis, self.root, float(missing.norm() / whole.double().norm()))
        # What is missing was estimated without bias, and so is the sum.
        return (flat + missing.to(flat) if unbiased else flat), report

    def estimate_diag(
        self, draws: int, *, seed: int = 0, control: GGN | None = None
    ) -> DiagonalEstimate:
        """Return the diagonal from ``draws`` vectors of random signs, one pullback each.

        Unbiased, with standard errors. ``control``: another matrix on the same batch, as
        ``problem.ggn(by="frozen")``, whose exact diagonal is used as a control variate; the result
        says how much was gained, which may be nothing. Raises ``StructureError`` where G is not
        positive semi-definite.
        """
        if not isinstance(draws, int) or draws < 2:
            raise InputError(MSG_DRAWS.format(what="draws", least=2, value=draws))
        lowest = self.root.lowest
        if lowest < 0:
            raise StructureError(MSG_NOT_POSITIVE.format(what="Random signs", lowest=lowest))
        variate = None
        if control is not None:
            # The same signs through the J of the other matrix: with the root of this one.
            others = ColumnMap(control.linearised, self.root, control.space, control)
            variate = Control(lambda z: others @ z, control.diag(), self.root.layout[1])
        columns = self.columns
        return estimate_diagonal(
            lambda z: columns @ z, self.root.size, draws, seed, self.space.slices, variate
        )

    def trace(self, *, method: str | None = None, info: bool = False) -> Any:
        """Return ``tr G = Σ σ ‖v‖²``, a number.

        ``method``: "columns" (a pullback for each) or "forward" (a unit vector of each parameter
        entry pushed forward), by default the cheaper one. ``info``: also a ``Spent``. Raises
        ``BudgetError``, as all questions below, where no way fits the budgets of the matrix.
        """
        way = self._answers.choose(self._answers.diagonal_ways("trace"), method)
        trace = self._answers.trace(way)
        return (trace, Spent(way.method, way.pulls, way.pushes)) if info else trace

    # -- columns and their inner products --

    def factor(self) -> dict[str, Tensor]:
        """Return ``V``, ``[size, *param]`` for each parameter; one pullback for each column.

        Column ``n·columns + j`` is the j-th of sample n.
        """
        size = self.root.size
        V = self.columns @ torch.eye(size, dtype=self.dtype, device=self.device)
        return {name: t.movedim(-1, 0) for name, t in self.space.named(V).items()}

    def gram(
        self,
        *,
        rtol: float | None = None,
        seed: int = 0,
        method: str | None = None,
        info: bool = False,
    ) -> Any:
        """Return ``VᵀV``, ``[NC, NC]``, with a column for every entry of the predictions.

        Sample by sample. With the symmetric root of H for a cross-entropy, ``√p`` in BackPACK's
        terms; in all cases a root of H. ``rtol``, ``method``, ``info``: as for ``diag``, with the
        relative error of this matrix.
        """
        gram, report = None, None
        if rtol is not None:
            gram, report = self._compressed_gram(rtol, seed, self.point.source(compressed=True))
        elif self._answers.choose(self._answers.gram_ways(), method).method == "columns":
            gram = self._answers.gram_matrix
        else:
            gram = self._answers.forward_gram()
            report = Compression(0, 0, True, 0.0, 0, self.shape[0], seed)
        matrix = entrywise(gram, self.root, self.point.entries).to(self.dtype)
        if not info:
            return matrix
        return matrix, report or self._report()

    def _compressed_gram(
        self, rtol: float, seed: int, source: Source
    ) -> tuple[Tensor, Compression]:
        quantity = Gram(self.root, rtol, seed)
        gram = self.point.gram(quantity, source)
        basis = quantity.basis_in(self.point.curvature)
        return gram, Compression.of(basis, self.root)

    def _report(self) -> Compression:
        """Return what was spent on columns without a tolerance."""
        return Compression.of(self.point.curvature.basis(self.root), self.root)

    # -- spectrum --

    def eigvalsh(
        self,
        *,
        rtol: float | None = None,
        seed: int = 0,
        method: str | None = None,
        info: bool = False,
    ) -> Any:
        """Return eigenvalues, ascending: ``min(D, NC)`` of them; all others are zero.

        ``rtol``, ``info``: as for ``gram``, whose error bounds that of each eigenvalue beside the
        norm of them all. ``method``: "gram" or "dense", by default the cheaper one.
        """
        working = torch.promote_types(self.dtype, torch.float32)
        values, report = None, None
        if rtol is not None:
            source = self.point.source(compressed=True)
            # With negative signs the eigenvalues are not those of the Gram matrix.
            if self.root.lowest >= 0:
                gram, report = self._compressed_gram(rtol, seed, source)
                gram = spectrum.checked(gram, "Eigenvalues")
                values = torch.linalg.eigvalsh(gram.to(working))
        if values is None:
            way = self._answers.choose(self._answers.eigenvalue_ways(), method)
            values = self._answers.decomposition(way).eigenvalues(working)
            if way.method == "dense":
                report = Compression(0, 0, True, 0.0, self.shape[0], self.shape[0], seed)
        count = min(self.shape[0], max(self.point.entries, len(values)))
        eigenvalues = spectrum.padded(values, count).to(self.dtype)
        if not info:
            return eigenvalues
        return eigenvalues, report or self._report()

    def eigh(
        self,
        k: int | None = None,
        *,
        method: str | None = None,
        rtol: float | None = None,
        start: Tensor | None = None,
        seed: int = 0,
        info: bool = False,
    ) -> Any:
        """Return the ``k`` eigenpairs with the largest eigenvalues, values ascending.

        By default all that are not zero. ``method``: "gram" (the Gram matrix of all columns, and a
        pullback for each eigenvector), "dense" (G itself, where parameters are few), or "lanczos"
        (products alone, for a ``k``); by default the cheapest, which ``plan("eigh", k)`` shows. By
        products pairs converge to residuals of ``rtol``, relative to the norm of G, from ``start``
        (``[D]`` or ``[D, K]``: eigenvectors of an earlier matrix, say) or a random vector.
        ``info``: also a ``Spent``. Raises ``ConvergenceError`` where they do not, and ``info`` is
        not asked for.
        """
        _check_k(k)
        answers = self._answers
        way = answers.choose(answers.eigenpair_ways(k), method)
        search = {"rtol": rtol, "start": start, "seed": seed}
        pairs, spent = answers.eigenpairs(way, k, search, checked=not info)
        return (pairs, spent) if info else pairs

    def directions(self, k: int, *, method: str | None = None) -> Directions:
        """Return the top k eigenvectors with slope and curvature of every component along them.

        ``method``: as for ``eigh``. Raises ``StructureError`` where the loss is no sum over
        samples.
        """
        curvature = self.point.curvature
        curvature.components("Slopes and curvatures of components")
        pairs = self.eigh(k, method=method)
        slope = curvature.loss.slope_of_samples
        slopes, curvatures = [], []
        with task("Slopes and curvatures along eigenvectors", pairs.vectors.shape[1]) as passes:
            for direction in passes.over(pairs.vectors.T):
                tangents = self.linearised.push(self.space.named(direction))
                products = self.root.hessian_times(tangents)
                slopes.append(spectrum.inner_products(slope, tangents, curvature.dims))
                curvatures.append(spectrum.inner_products(products, tangents, curvature.dims))
        of_samples = torch.stack(slopes, 1), torch.stack(curvatures, 1)
        return Directions(pairs.values, pairs.vectors, *of_samples, self.space)

    def newton_step(
        self,
        damping: float | Tensor,
        k: int | None = None,
        *,
        method: str | None = None,
        info: bool = False,
    ) -> Any:
        """Return ``−Σ_i γ_i / (λ_i + δ_i) e_i`` over the top k eigenvectors, by parameter.

        ``damping``: a number, or ``[k]``. ViViT's damped Newton step: along what is not among these
        eigenvectors it is zero; ``solve`` has it everywhere. ``method``: as for ``eigh``. ``info``:
        also a ``Spent``.
        """
        _check_k(k)
        answers = self._answers
        way = answers.choose(answers.newton_ways(k, damping), method)
        slope = self.linearised.pull(self.point.curvature.loss.slope, self.space.shapes)
        step, spent = answers.newton_step(way, self.space.flat(slope), damping, k)
        named = self.space.named(step)
        return (named, spent) if info else named

    # -- determinants and solves --

    def slogdet(self, damping: float, *, method: str | None = None) -> tuple[Tensor, Tensor]:
        """Return sign and logarithm of ``|det(G + δI)|``; ``method`` as for ``eigvalsh``."""
        way = self._answers.choose(self._answers.determinant_ways(), method)
        values = self._answers.decomposition(way).eigenvalues(torch.float64)
        sign, log = spectrum.slogdet(values, self.shape[0], damping)
        return sign.to(self.dtype), log.to(self.dtype)

    def logdet(self, damping: float, *, method: str | None = None) -> Tensor:
        """Return ``log det(G + δI)``; not a number where the determinant is negative."""
        sign, log = self.slogdet(damping, method=method)
        return torch.where(sign < 0, torch.nan, log)

    def solve(
        self,
        b: Any,
        damping: float,
        *,
        method: str | None = None,
        info: bool = False,
        rtol: float | None = None,
        max_iterations: int = 1000,
    ) -> Any:
        """Return ``(G + δI)⁻¹ b`` for ``[D]``, a dict, or the columns of ``[D, K]``.

        ``info``: also the worst ``Solved``. ``method``: "woodbury" (through the Gram matrix, with
        damping), "dense" (through G itself), or "cg" (products only; needs a positive definite
        matrix); by default the cheapest, and the next one where products do not converge.
        ``rtol``: of the residual, by default 1e-8 in float64, and 1e-3 if any parameter is in
        float32. Ctrl-C in "cg" leaves ``x``, flat, and its ``Solved`` in ``reached`` of the
        ``KeyboardInterrupt``. Raises ``ConvergenceError`` where that is not reached and ``info`` is
        not asked for, ``InputError`` for other shapes.
        """
        if not rtol:
            rtol = RTOL_IN_DOUBLE if self.rounded == torch.float64 else RTOL_IN_SINGLE
        reports: list[Solved] = []

        def solved(right: Tensor) -> Tensor:
            columns: list[Tensor] = []
            # With no column to solve for, no matrix is formed.
            with task("Solving", right.shape[1], "right-hand sides") as sides:
                for column in sides.over(right.unbind(1)):
                    if method is None:
                        ways = self._answers.solve_ways(damping, right.shape[1] - len(columns))
                    else:
                        ways = self._answers.solve_way_by_hand(method)
                    x, report = self._solved(ways, column, damping, rtol, max_iterations)
                    columns.append(x)
                    reports.append(report)
            return stacked(columns, right, len(right))

        x = self._times(b, self.shape[1], solved)
        if info:
            return x, spectrum.worst(reports, rtol)
        for report in reports:
            report.check()
        return x

    def _solved(
        self, ways: Ways, b: Tensor, damping: float, rtol: float, limit: int
    ) -> tuple[Tensor, Solved]:
        """Solve by the cheapest way; by the next where that does not converge."""
        answers = self._answers
        while True:
            way = answers.choose(ways, None)
            x, report = answers.solve(way, b, damping, rtol, limit)
            rest = ways.without(way.method)
            if report.converged or not rest.in_memory:
                return x, report
            ways = rest

    # -- which way --

    def plan(self, question: str, k: int | None = None, *, damping: float = 1.0) -> Ways:
        """Return the ways to answer a question, what each takes, and the one taken; printable.

        ``question``: "diag", "trace", "gram", "eigvalsh", "eigh", "directions", "newton_step",
        "logdet" or "solve". Cost: six passes, which are timed. Raises ``InputError`` for others.
        """
        _check_k(k)
        answers = self._answers
        known: dict[str, Callable[[], Ways]] = {
            "diag": lambda: answers.diagonal_ways("diag"),
            "trace": lambda: answers.diagonal_ways("trace"),
            "gram": answers.gram_ways,
            "eigvalsh": answers.eigenvalue_ways,
            "eigh": lambda: answers.eigenpair_ways(k),
            "directions": lambda: answers.eigenpair_ways(k, "directions"),
            "newton_step": lambda: answers.newton_ways(k, damping),
            "logdet": answers.determinant_ways,
            "solve": lambda: answers.solve_ways(damping),
        }
        if question not in known:
            raise InputError(MSG_QUESTION.format(known=", ".join(known), value=question))
        return replace(known[question](), measured=answers.pace)


def _check_k(k: int | None) -> None:
    if k is None or (isinstance(k, int) and not isinstance(k, bool) and k >= 1):
        return
    raise InputError(MSG_DRAWS.format(what="k", least=1, value=k))


def _rows(components: Mapping[str, Tensor]) -> Tensor:
    """Return ``[N, D]`` from ``[N, *param]`` for each parameter."""
    rows = [t.reshape(len(t), t.shape[1:].numel()) for t in components.values()]
    return torch.cat(rows, 1)
