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
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from unbatch.analysis.verdict import Verdict
from unbatch.autodiff.jvp import Linearised
from unbatch.capture.isolation import outside_inference_mode
from unbatch.curvature import spectrum
from unbatch.curvature.column_map import ColumnMap, stacked
from unbatch.curvature.ggn_quantities import ColumnNorms, DiagGGN
from unbatch.curvature.gram import Gram, entrywise
from unbatch.curvature.hessian_root import HessianRoot, SampleRoot
from unbatch.curvature.low_rank import Compression
from unbatch.curvature.point import Point
from unbatch.curvature.spectrum import Directions, Factored
from unbatch.curvature.strategy import Draws
from unbatch.errors import (
    MSG_DRAWS,
    MSG_METHOD,
    MSG_NOT_POSITIVE,
    MSG_UNBIASED,
    InputError,
    StructureError,
    UnbatchError,
)
from unbatch.gradients.sources import Source
from unbatch.linalg import spectra
from unbatch.linalg.estimates import Control, DiagonalEstimate, estimate_diagonal
from unbatch.linalg.operators import Operator
from unbatch.linalg.rows import widest
from unbatch.linalg.solvers import Solved
from unbatch.linalg.space import Space
from unbatch.linalg.spectra import Eigenpairs

HessianTimes = Callable[[Mapping[int, Tensor]], dict[int, Tensor]]

LARGEST_SPECTRUM = 2**14  # columns of V up to which a few eigenpairs go by way of it

LARGEST_GRAM = 4096  # columns of V up to which a solve goes by way of their Gram matrix

# Residuals of a solve, relative, by default.
RTOL_IN_DOUBLE, RTOL_IN_SINGLE = 1e-8, 1e-3


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
class GGN(Operator):
    """G at the parameters and the batch of the moment it was made.

    A symmetric operator on flat vectors and dicts. ``G @ v`` costs a jvp and a vjp through one
    forward pass that is kept. Raises ``StaleError`` when used after parameters or data have
    changed.
    """

    symmetric = True
    space: Space

    def __init__(self, point: Point, draws: Draws = None, samples: Tensor | None = None) -> None:
        self.point, self.draws, self.subset = point, draws, samples
        self.space = point.request.space
        parameters = list(point.parameters.values())
        self.shape = (self.space.size, self.space.size)
        self.dtype, self.device = widest(parameters), parameters[0].device
        # The type that rounds most among all parameters, whose layers its columns pass.
        types = [*point.request.context.types_of_parameters, self.dtype]
        self._rounded = max(types, key=lambda dtype: torch.finfo(dtype).eps)
        # Those that are not zero, ascending, by the type that they were computed in.
        self._eigenvalues: dict[torch.dtype, Tensor] = {}

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
        for column in v.T:
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
        info: bool = False,
    ) -> Any:
        """Return the diagonal, ``[D]``.

        ``per_component``: ``[N, D]``, one for every sample, which sum to it. ``rtol``: under
        several batch norms in train mode, by as few directions of their statistics as leave out no
        more than that (relative, Frobenius norm), by an estimate from random signs; ``unbiased``
        adds what they say is missing, so that the result is right on average and may be negative in
        an entry. ``info``: also a ``Compression`` that says what was spent and what is missing.
        Raises ``InputError`` for ``unbiased`` components.
        """
        if unbiased and per_component:
            raise InputError(MSG_UNBIASED)
        # The source before the root, which is then known from the same forward pass.
        source = self.point.source(compressed=rtol is not None)
        quantity = DiagGGN(per_component, rtol=rtol, seed=seed, root=self.root)
        diagonal = self.point.evaluate(quantity, source)
        flat = _rows(diagonal) if per_component else diagonal.flat()
        basis = quantity.basis_in(self.point.curvature)
        missing = None
        if basis is not None:
            missing = basis.remainder
        result = flat
        if unbiased and missing is not None:
            result = flat + missing.to(flat)
        if not info:
            return result
        estimate = None
        if missing is not None:
            # Relative to what is in the diagonal: the basis has estimated its norm, too.
            diagonal = flat.sum(0) if per_component else flat
            estimate = float(missing.norm() / diagonal.double().norm())
        return result, Compression.of(basis, self.root, estimate)

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

    def trace(self) -> Tensor:
        """Return ``tr G = Σ σ ‖v‖²``, a number."""
        source = self.point.source()  # before the root, as in ``diag``
        norms = self.point.evaluate(ColumnNorms(self.root), source)
        return (norms * self.root.sigma.to(norms.dtype)).sum()

    # -- columns and their inner products --

    def factor(self) -> dict[str, Tensor]:
        """Return ``V``, ``[size, *param]`` for each parameter; one pullback for each column.

        Column ``n·columns + j`` is the j-th of sample n.
        """
        size = self.root.size
        V = self.columns @ torch.eye(size, dtype=self.dtype, device=self.device)
        return {name: t.movedim(-1, 0) for name, t in self.space.named(V).items()}

    def gram(self, *, rtol: float | None = None, seed: int = 0, info: bool = False) -> Any:
        """Return ``VᵀV``, ``[NC, NC]``, with a column for every entry of the predictions.

        Sample by sample. With the symmetric root of H for a cross-entropy, ``√p`` in BackPACK's
        terms; in all cases a root of H. ``rtol``, ``info``: as for ``diag``, with the relative
        error of this matrix.
        """
        if rtol is None:
            gram, report = self._columns_gram, None
        else:
            gram, report = self._compressed_gram(rtol, seed, self.point.source(compressed=True))
        matrix = entrywise(gram, self.root, self.point.entries).to(self.dtype)
        if not info:
            return matrix
        return matrix, report or self._report()

    @cached_property
    def _columns_gram(self) -> Tensor:
        """``VᵀV`` of the columns of ``root``, in float64."""
        source = self.point.source()  # before the root, which is then known from the same pass
        return self.point.gram(Gram(self.root), source)

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

    @cached_property
    def _spectrum(self) -> tuple[Tensor, Tensor]:
        """Eigenvalues that are not zero, ascending, and ``A`` of eigenvectors ``V A``; float64."""
        gram = spectrum.checked(self._columns_gram, "Eigenvalues and eigenvectors")
        return spectrum.spectrum(gram, self.root.sigma.double(), self._rounded)

    def _values(self, working: torch.dtype) -> Tensor:
        """Return the eigenvalues that are not zero, ascending, computed in ``working``.

        Determinants need float64, where eigenvalues are shown in the type of the matrix.
        """
        gram = spectrum.checked(self._columns_gram, "Eigenvalues")
        if (self.root.sigma < 0).any():
            return self._spectrum[0]  # always in float64
        if working not in self._eigenvalues:
            values = spectrum.positive_eigenvalues(gram.to(working), self._rounded)
            self._eigenvalues[working] = values
        return self._eigenvalues[working]

    def eigvalsh(self, *, rtol: float | None = None, seed: int = 0, info: bool = False) -> Any:
        """Return eigenvalues, ascending: ``min(D, NC)`` of them; all others are zero.

        ``rtol``, ``info``: as for ``gram``, whose error bounds that of each eigenvalue beside the
        norm of them all.
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
            values = self._values(working)
        count = min(self.shape[0], max(self.point.entries, len(values)))
        eigenvalues = spectrum.padded(values, count).to(self.dtype)
        if not info:
            return eigenvalues
        return eigenvalues, report or self._report()

    def eigh(self, k: int | None = None) -> Eigenpairs:
        """Return the ``k`` eigenpairs with the largest eigenvalues, values ascending.

        By default all that are not zero. Builds the Gram matrix of all N·C columns first; each
        eigenvector then costs one pullback. Where there are more than 16,384 columns, the ``k``
        largest are found by products alone, as ``unbatch.spectra.eigh`` finds them.
        """
        if k is not None and (not isinstance(k, int) or k < 1):
            raise InputError(MSG_DRAWS.format(what="k", least=1, value=k))
        if k is not None and self.root.size > LARGEST_SPECTRUM:
            pairs: Eigenpairs = spectra.eigh(self, k)
            return pairs
        return spectrum.eigenpairs(self.columns, *self._spectrum, k)

    def directions(self, k: int) -> Directions:
        """Return the top k eigenvectors with slope and curvature of every component along them.

        Raises ``StructureError`` where the loss is no sum over samples.
        """
        curvature = self.point.curvature
        curvature.components("Slopes and curvatures of components")
        pairs = self.eigh(k)
        slope = curvature.loss.slope_of_samples
        slopes, curvatures = [], []
        for direction in pairs.vectors.T:
            tangents = self.linearised.push(self.space.named(direction))
            products = self.root.hessian_times(tangents)
            slopes.append(spectrum.inner_products(slope, tangents, curvature.dims))
            curvatures.append(spectrum.inner_products(products, tangents, curvature.dims))
        return Directions(*pairs, torch.stack(slopes, 1), torch.stack(curvatures, 1), self.space)

    def newton_step(self, damping: float | Tensor, k: int | None = None) -> dict[str, Tensor]:
        """Return ``−Σ_i γ_i / (λ_i + δ_i) e_i`` over the top k eigenvectors, by parameter.

        ``damping``: a number, or ``[k]``. ViViT's damped Newton step: along what is not among these
        eigenvectors it is zero; ``solve`` has it everywhere.
        """
        pairs = self.eigh(k)
        gradient = self.linearised.pull(self.point.curvature.loss.slope, self.space.shapes)
        step = spectrum.newton_step(pairs, self.space.flat(gradient), damping)
        return self.space.named(step)

    # -- determinants and solves --

    def slogdet(self, damping: float) -> tuple[Tensor, Tensor]:
        """Return sign and logarithm of ``|det(G + δI)|``."""
        sign, log = spectrum.slogdet(self._values(torch.float64), self.shape[0], damping)
        return sign.to(self.dtype), log.to(self.dtype)

    def logdet(self, damping: float) -> Tensor:
        """Return ``log det(G + δI)``; not a number where the determinant is negative."""
        sign, log = self.slogdet(damping)
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

        ``info``: also the worst ``Solved``. ``method``: "woodbury" (through the Gram matrix; the
        default where that is small), or "cg" (products only; needs a positive definite matrix).
        ``rtol``: of the residual, by default 1e-8 in float64, and 1e-3 if any parameter is in
        float32. Raises ``ConvergenceError`` where that is not reached and ``info`` is not asked
        for, ``InputError`` for other shapes.
        """
        if method not in (None, "woodbury", "cg"):
            raise InputError(MSG_METHOD.format(value=method))
        if not rtol:
            rtol = RTOL_IN_DOUBLE if self._rounded == torch.float64 else RTOL_IN_SINGLE
        reports: list[Solved] = []

        def solved(right: Tensor) -> Tensor:
            columns = []
            for column in right.unbind(1):
                # Chosen for each column: with none to solve for, no Gram matrix is built.
                if self._is_by_woodbury(method, damping):
                    gram = spectrum.checked(self._columns_gram, "Solutions")
                    factored = Factored(self.columns, gram, self.root.sigma)
                    x, report = spectrum.woodbury(self, factored, column, damping, rtol)
                else:
                    x, report = self._by_products(column, damping, rtol, max_iterations)
                columns.append(x)
                reports.append(report)
            return stacked(columns, right, len(right))

        x = self._times(b, self.shape[1], solved)
        if info:
            return x, spectrum.worst(reports, rtol)
        for report in reports:
            report.check()
        return x

    def _is_by_woodbury(self, method: str | None, damping: float) -> bool:
        """Return whether a solve goes through the Gram matrix, which needs a damping."""
        if method is not None:
            return method == "woodbury"
        return damping != 0 and self.root.size <= LARGEST_GRAM

    def _by_products(
        self, b: Tensor, damping: float, rtol: float, max_iterations: int
    ) -> tuple[Tensor, Solved]:
        """Solve by conjugate gradients; say where G is singular and not damped."""
        x, report = spectrum.by_products(self, b, damping, rtol, max_iterations)
        if damping == 0:
            report = spectrum.explained(report, self.rank_bound, self.shape[0])
        return x, report


def _rows(components: Mapping[str, Tensor]) -> Tensor:
    """Return ``[N, D]`` from ``[N, *param]`` for each parameter."""
    rows = [t.reshape(len(t), t.shape[1:].numel()) for t in components.values()]
    return torch.cat(rows, 1)
