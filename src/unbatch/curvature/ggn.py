"""The generalized Gauss-Newton matrix ``G = Jᵀ H J`` as an operator: products, and what follows from its low rank.

``J = ∂F/∂θ`` and ``H = ∇²_F L = S Σ Sᵀ``, so ``G = V Σ Vᵀ`` with ``V = Jᵀ S``: as many columns as predictions have
entries, N·C, and often fewer than there are parameters, D. Products need J and H only; the spectrum, log-determinants
and solves follow from the Gram matrix ``VᵀV`` (Dangel, Tatzel, Hennig 2021, "ViViT").
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from unbatch.analysis.structure import Verdict
from unbatch.autodiff.jvp import Linearised
from unbatch.capture.isolation import outside_inference_mode
from unbatch.curvature import spectrum
from unbatch.curvature.ggn_quantities import ColumnNorms, ColumnQuantity, DiagGGN, Gram, evaluate
from unbatch.curvature.hessian_root import Factor, HessianRoot
from unbatch.curvature.low_rank import Basis, Compression
from unbatch.curvature.spectrum import Directions, Factored
from unbatch.curvature.strategy import Curvature, Draws
from unbatch.errors import (
    MSG_DRAWS,
    MSG_GGN_STALE,
    MSG_METHOD,
    MSG_NOT_POSITIVE,
    MSG_UNBIASED,
    InputError,
    StaleError,
    StructureError,
    UnbatchError,
)
from unbatch.gradients.request import Request, recorded_precision, source_of
from unbatch.gradients.sources import Source
from unbatch.linalg.estimates import Control, DiagonalEstimate, from_signs
from unbatch.linalg.operators import Operator
from unbatch.linalg.rows import sum_of
from unbatch.linalg.solvers import Solved
from unbatch.linalg.space import Space
from unbatch.linalg.spectra import Eigenpairs

HessianTimes = Callable[[Mapping[int, Tensor]], dict[int, Tensor]]


LARGEST_GRAM = 4096  # columns of V up to which a solve goes by way of their Gram matrix


# --- products -------------------------------------------------------------------------------------


def ggn_product(
    linearised: Linearised, hessian_times: HessianTimes, v: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Return ``Jᵀ H J v`` by parameter, for the parameters in ``v``."""
    Jv = linearised.push(v)
    HJv = hessian_times(Jv)
    return linearised.pull(HJv, v)


@outside_inference_mode("_apply", "_apply_transposed")
class ColumnMap(Operator):
    """``V = Jᵀ S``, ``[D, size]``: a push-forward or a pullback for each product."""

    def __init__(
        self, linearised: Linearised, root: HessianRoot, space: Space, like: Operator
    ) -> None:
        self.linearised, self.root, self.parameters = linearised, root, space
        self.shape = (space.size, root.size)
        self.dtype, self.device = like.dtype, like.device

    def _apply(self, v: Tensor) -> Tensor:
        return _stacked([self._column(a) for a in v.T], v, self.shape[0])

    def _column(self, a: Tensor) -> Tensor:
        pulled = self.linearised.pull(self.root.times(a), self.parameters.shapes)
        return self.parameters.flat(pulled)

    def _apply_transposed(self, v: Tensor) -> Tensor:
        return _stacked([self._coordinates(column) for column in v.T], v, self.shape[1])

    def _coordinates(self, v: Tensor) -> Tensor:
        return self.root.transposed_times(self.linearised.push(self.parameters.named(v)))


def _rows(components: Mapping[str, Tensor]) -> Tensor:
    """Return ``[N, D]`` from ``[N, *param]`` for each parameter."""
    return torch.cat([t.reshape(len(t), -1) for t in components.values()], 1)


def _stacked(columns: list[Tensor], like: Tensor, size: int) -> Tensor:
    if len(columns) == 1:
        return columns[0][:, None]  # a view: nothing is copied for a single vector
    return torch.stack(columns, 1) if columns else like.new_zeros(size, 0)


# --- the matrix -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Point:
    """Where the matrix is taken, what is known there, and whether that still holds."""

    request: Request
    curvature: Curvature
    stale: Callable[[], bool]

    @property
    def parameters(self) -> Mapping[str, Tensor]:
        return self.request.parameters

    @property
    def samples(self) -> int:
        return self.request.samples

    @property
    def memory(self) -> int:
        return self.request.memory

    def restricted(self, names: Sequence[str]) -> Point:
        """Return the same for some of the parameters."""
        chosen = {n: p for n, p in self.parameters.items() if n in names}
        return replace(self, request=self.request.of(chosen))

    def share_forward(self, source: Source, compressed: bool) -> None:
        """Know H from the forward pass of ``source``, where that is of all parameters."""
        if self.parameters.keys() == self.curvature.request.parameters.keys():
            self.curvature.share_forward(source, False, compressed)

    def source(self, parameters: Mapping[str, Tensor]) -> Source:
        """Return where columns of these parameters come from."""
        return source_of(self.request.of(parameters))


@outside_inference_mode("_apply")
class GGN(Operator):
    """G at the parameters and the batch of the moment it was made; a symmetric operator on flat vectors and dicts.

    ``G @ v`` costs a push-forward and a pullback through one forward pass that is kept. Raises ``StaleError`` when used
    after parameters or data have changed.
    """

    symmetric = True
    space: Space

    def __init__(self, point: Point, draws: Draws = None, samples: Tensor | None = None) -> None:
        self.point, self.draws, self.chosen = point, draws, samples
        self.space = point.request.space
        like = next(iter(point.parameters.values()))
        self.shape, self.dtype, self.device = (
            (self.space.size, self.space.size),
            like.dtype,
            like.device,
        )

    def __repr__(self) -> str:
        try:
            note = self.note
        except UnbatchError as error:  # to be shown is no reason to fail
            note = str(error)
        return f"<Gauss-Newton matrix {tuple(self.shape)}, {note}>"

    # -- what it is made of --

    @property
    def linearised(self) -> Linearised:
        self._fresh()
        return self.point.curvature.linearised

    @cached_property
    def root(self) -> HessianRoot:
        """``S``: a root of the second derivative of the loss, or of the part that was asked for."""
        self._fresh()
        curvature = self.point.curvature
        root = curvature.root(self.draws)
        if self.chosen is None:
            return root
        if self.draws is None or not isinstance(root, Factor):
            root = curvature.components("A choice of samples")
        return root.restricted(self.chosen, self.point.samples / max(len(self.chosen), 1))

    @property
    def columns(self) -> ColumnMap:
        """``V = Jᵀ S``, ``[D, size]``, as an operator."""
        return ColumnMap(self.linearised, self.root, self.space, self)

    @property
    def rank_bound(self) -> int:
        """``min(D, Σ_n rank H_n)``."""
        return min(self.shape[0], self.root.rank)

    @property
    def positive_semidefinite(self) -> Verdict:
        """Whether H is, and so G: with the lowest eigenvalue of H in the note where it is not."""
        lowest = self.root.lowest
        holds = lowest >= 0
        note = "" if holds else f"the second derivative of the loss has the eigenvalue {lowest:.3g}"
        return Verdict("positive_semidefinite", "holds" if holds else "fails", "proved", note=note)

    @property
    def note(self) -> str:
        """What to keep in mind: of which form H was found to be, and whether it was drawn."""
        vanishing = (
            "; it vanishes: the loss is linear in these predictions"
            if self.root.form == "zero"
            else ""
        )
        return "; ".join(
            filter(
                None,
                (f"second derivative of the loss {self.root.form}{vanishing}", self.root.sampled),
            )
        )

    def _fresh(self) -> None:
        if self.point.stale():
            raise StaleError(MSG_GGN_STALE)

    # -- products --

    def _apply(self, v: Tensor) -> Tensor:
        linearised, space = self.linearised, self.space
        products = []
        for column in v.T:
            product = ggn_product(linearised, self._hessian_times, space.named(column))
            products.append(space.flat(product))
        return _stacked(products, v, len(v))

    @property
    def _hessian_times(self) -> HessianTimes:
        """``H v`` by double backward of the loss, or by the root of a part of H."""
        if self.draws is None and self.chosen is None:
            return self.point.curvature.loss.hessian_times
        return self.root.hessian_times

    # -- what is asked of columns --

    def _source(self, compressed: bool = False) -> Source:
        """Return where columns come from; H is known from the forward pass that these need."""
        self._fresh()
        with torch.no_grad(), recorded_precision():
            source = self.point.source(self.point.parameters)
            self.point.share_forward(source, compressed)
            return source

    def _evaluate(self, quantity: ColumnQuantity, source: Source) -> Any:
        with torch.no_grad(), recorded_precision():
            return evaluate(self.point.curvature, source, quantity, self.point.parameters)

    def diag(
        self, per_component: bool = False, *, rtol: float | None = None, unbiased: bool = False, seed: int = 0,
        info: bool = False,
    ) -> Any:  # fmt: skip
        """The diagonal, ``[D]``; ``per_component``: ``[N, D]``, one for every sample, which sum to it.

        ``rtol``: under several batch norms in train mode, by as few directions of their statistics as leave out no more
        than that (relative, Frobenius norm), by an estimate from random signs; ``unbiased`` adds what they say is
        missing, so that the result is right on average and may be negative in an entry. ``info``: also a
        ``Compression`` that says what was spent and what is missing. Raises ``InputError`` for ``unbiased`` components.
        """
        if unbiased and per_component:
            raise InputError(MSG_UNBIASED)
        source = self._source(rtol is not None)
        quantity = DiagGGN(per_component, rtol=rtol, seed=seed, root=self.root)
        diagonal = self._evaluate(quantity, source)
        flat = _rows(diagonal) if per_component else diagonal.flat()
        basis = quantity.basis_in(self.point.curvature)
        estimate, missing = None, None
        if basis is not None and not basis.exact:
            missing = basis.remainder
        if missing is not None:
            whole = flat.sum(0) if per_component else flat
            estimate = float(missing.norm() / whole.double().norm())
        if unbiased and missing is not None:
            flat = flat + missing.to(flat)
        return (flat, self._compression(basis, estimate)) if info else flat

    def estimate_diag(
        self, draws: int, *, seed: int = 0, control: GGN | None = None
    ) -> DiagonalEstimate:
        """The diagonal from ``draws`` vectors of random signs, one pullback each: unbiased, with standard errors.

        ``control``: another matrix on the same batch, as ``problem.ggn(by="frozen")``, whose exact diagonal is used as
        a control variate; the result says how much was gained, which may be nothing. Raises ``StructureError`` where G
        is not positive semi-definite.
        """
        if not isinstance(draws, int) or draws < 2:
            raise InputError(MSG_DRAWS.format(what="draws", least=2, value=draws))
        if self.root.lowest < 0:
            raise StructureError(
                MSG_NOT_POSITIVE.format(what="Random signs", lowest=self.root.lowest)
            )
        other = None
        if control is not None:
            # The same signs through the J of the other matrix: the root has to be that of this one.
            others = ColumnMap(control.linearised, self.root, control.space, control)
            other = Control(lambda z: others @ z, control.diag(), self.root.table[1])
        columns = self.columns
        return from_signs(
            lambda z: columns @ z, self.root.size, draws, seed, self.space.slices, other
        )

    def _compression(self, basis: Basis | None, estimate: float | None = None) -> Compression:
        if basis is None:
            columns = self.root.size if self.root.separate else self.root.rank
            return Compression(0, 0, True, 0.0, columns, 0, 0)
        missing = basis.estimate if estimate is None else estimate
        size = len(basis.turn)
        return Compression(
            basis.rank, size, basis.exact, missing, basis.pullbacks, basis.pushes, basis.seed
        )

    def trace(self) -> Tensor:
        """``tr G``, a number."""
        source = self._source()
        norms = self._evaluate(ColumnNorms(self.root), source)
        return (norms * self.root.sigma.to(norms.dtype)).sum()

    @cached_property
    def _columns_gram(self) -> Tensor:
        """``VᵀV`` of the columns of ``root``, in float64."""
        source = self._source()
        return self._gram_of(Gram(self.root), source)

    def _gram_of(self, quantity: Gram, source: Source) -> Tensor:
        """Return the sum over groups of parameters, where memory does not hold the columns of all."""
        groups = self._groups()
        if len(groups) == 1:
            return self._evaluate(quantity, source).double()
        shares = []
        for group in groups:
            part = self.point.restricted(list(group))
            with torch.no_grad(), recorded_precision():
                source = part.source(group)
                shares.append(evaluate(part.curvature, source, quantity, group))
        return sum_of(shares).double()

    def _groups(self) -> list[dict[str, Tensor]]:
        """Parameters in their order, so many together as memory holds the columns of."""
        groups, size = [dict[str, Tensor]()], 0
        for name, p in self.point.parameters.items():
            more = 4 * self.root.size * p.numel()
            if groups[-1] and size + more > self.point.memory:
                groups.append({})
                size = 0
            groups[-1][name] = p
            size += more
        return groups

    def gram(self, *, rtol: float | None = None, seed: int = 0, info: bool = False) -> Any:
        """``VᵀV``, ``[NC, NC]``, for V with a column for every entry of the predictions, sample by sample.

        With the symmetric root of H for a cross-entropy, ``√p`` in BackPACK's terms; in all cases a root of H.
        ``rtol``, ``info``: as for ``diag``, with the relative error of this matrix.
        """
        if rtol is None:
            gram, curvature = self._columns_gram, self.point.curvature
            report = self._compression(curvature.basis(self.root)) if info else None
        else:
            gram, report = self._compressed_gram(rtol, seed, self._source(True))
        entrywise = self._entrywise(gram)
        return (entrywise, report) if info else entrywise

    def _compressed_gram(
        self, rtol: float, seed: int, source: Source
    ) -> tuple[Tensor, Compression]:
        quantity = Gram(self.root, rtol, seed)
        gram = self._gram_of(quantity, source)
        return gram, self._compression(quantity.basis_in(self.point.curvature))

    def _entrywise(self, gram: Tensor) -> Tensor:
        """From the columns of the root to one column for every entry of the predictions."""
        root = self.root
        if isinstance(root, Factor) and not root.sampled:
            n, t, c, k = root.root.shape
            whole = torch.eye(c, k).expand(n, t, c, k) if root.whole is None else root.whole
            whole, size = whole.to(gram), n * t * c
            gram = torch.einsum(
                "ntck,ntkx->ntcx", whole, gram.view(n, t, k, self.root.size)
            ).reshape(size, -1)
            gram = torch.einsum("ntck,xntk->xntc", whole, gram.view(size, n, t, k)).reshape(
                size, size
            )
        elif not root.separate:
            entries = sum(p.numel() for p in self.point.curvature.loss.predictions.values())
            gram = torch.nn.functional.pad(gram, (0, entries - root.size, 0, entries - root.size))
        return gram.to(self.dtype)

    def factor(self) -> dict[str, Tensor]:
        """``V`` on request: ``[size, *param]`` for each parameter; column ``n·columns + j`` is the j-th of sample n."""
        size = self.root.size
        V = self.columns @ torch.eye(size, dtype=self.dtype, device=self.device)
        return {name: t.movedim(-1, 0) for name, t in self.space.named(V).items()}

    # -- spectrum --

    @cached_property
    def _spectrum(self) -> tuple[Tensor, Tensor]:
        """Eigenvalues that are not zero, ascending, and ``A`` of eigenvectors ``V A``; in float64."""
        return spectrum.spectrum(self._columns_gram, self.root.sigma.double(), self.dtype)

    @cached_property
    def _eigenvalues(self) -> dict[torch.dtype, Tensor]:
        """Those that are not zero, ascending, by the type that they were computed in."""
        return {}

    def _values(self, working: torch.dtype) -> Tensor:
        gram = self._columns_gram  # before the root, which is then known from the same forward pass
        if (self.root.sigma < 0).any():
            return self._spectrum[0]
        if working not in self._eigenvalues:
            values = spectrum.positive_eigenvalues(gram.to(working), self.dtype)
            self._eigenvalues[working] = values
        return self._eigenvalues[working]

    def eigvalsh(self, *, rtol: float | None = None, seed: int = 0, info: bool = False) -> Any:
        """Eigenvalues, ascending: ``min(D, NC)`` of them; all others are zero.

        ``rtol``, ``info``: as for ``gram``, whose error bounds that of each eigenvalue beside the norm of them all.
        """
        working = torch.promote_types(self.dtype, torch.float32)
        values, report = None, None
        if rtol is not None:
            source = self._source(True)
            if self.root.lowest >= 0:
                gram, report = self._compressed_gram(rtol, seed, source)
                values = torch.linalg.eigvalsh(gram.to(working))
        if values is None:
            values = self._values(working)
        entries = sum(p.numel() for p in self.point.curvature.loss.predictions.values())
        count = min(self.shape[0], max(entries, len(values)))
        eigenvalues = spectrum.padded(values, count).to(self.dtype)
        if not info:
            return eigenvalues
        if report is None:
            report = self._compression(self.point.curvature.basis(self.root))
        return eigenvalues, report

    def eigh(self, k: int | None = None) -> Eigenpairs:
        """The ``k`` eigenpairs with the largest eigenvalues (by default all that are not zero), values ascending.

        The cost does not grow with k but by one pullback for each.
        """
        if k is not None and (not isinstance(k, int) or k < 1):
            raise InputError(MSG_DRAWS.format(what="k", least=1, value=k))
        return spectrum.eigenpairs(self.columns, *self._spectrum, k)

    def directions(self, k: int) -> Directions:
        """The top k eigenvectors with slope and curvature of every component along them; needs a sum over samples."""
        curvature = self.point.curvature
        curvature.components("Slopes and curvatures of components")
        values, vectors = self.eigh(k)
        slopes, curvatures = [], []
        for direction in vectors.T:
            pushed = self.linearised.push(self.space.named(direction))
            curved = self.root.hessian_times(pushed)
            slopes.append(spectrum.inner_products(curvature.loss.slope, pushed, curvature.dims))
            curvatures.append(spectrum.inner_products(curved, pushed, curvature.dims))
        return Directions(
            values, vectors, torch.stack(slopes, 1), torch.stack(curvatures, 1), self.space
        )

    def newton_step(self, damping: float | Tensor, k: int | None = None) -> dict[str, Tensor]:
        """``−Σ_i γ_i / (λ_i + δ_i) e_i`` over the top k eigenvectors, by parameter; ``damping``: a number, or ``[k]``.

        ViViT's damped Newton step. Along what is not among them the step is zero; ``solve`` has it everywhere.
        """
        pairs = self.eigh(k)
        slope = self.linearised.pull(self.point.curvature.loss.slope, self.space.shapes)
        step = spectrum.newton_step(pairs, self.space.flat(slope), damping)
        return self.space.named(step)

    # -- determinants and solves --

    def slogdet(self, damping: float) -> tuple[Tensor, Tensor]:
        """Sign and logarithm of ``|det(G + δI)|``."""
        sign, log = spectrum.slogdet(self._values(torch.float64), self.shape[0], damping)
        return sign.to(self.dtype), log.to(self.dtype)

    def logdet(self, damping: float) -> Tensor:
        """``log det(G + δI)``; not a number where the determinant is negative."""
        sign, log = self.slogdet(damping)
        return torch.where(sign < 0, torch.nan, log)

    def solve(
        self, b: Any, damping: float, *, method: str | None = None, info: bool = False, rtol: float | None = None,
        max_iterations: int = 1000,
    ) -> Any:  # fmt: skip
        """``(G + δI)⁻¹ b`` for ``[D]``, a dict, or the columns of ``[D, K]``; with ``info`` also the worst ``Solved``.

        ``method``: "woodbury" (through the Gram matrix; the default where that is small), or "cg" (products only; needs
        a positive definite matrix). ``rtol``: of the residual, by default 1e-8 in float64 and 1e-3 in float32. Raises
        ``ConvergenceError`` where that is not reached and ``info`` is not asked for, ``InputError`` for other shapes.
        """
        if method not in (None, "woodbury", "cg"):
            raise InputError(MSG_METHOD.format(value=method))
        rtol = rtol or (1e-8 if self.dtype == torch.float64 else 1e-3)
        reports: list[Solved] = []

        def solved(right: Tensor) -> Tensor:
            columns = []
            for column in right.unbind(1):
                if self._by_woodbury(method, damping):
                    factored = Factored(self.columns, self._columns_gram, self.root.sigma)
                    x, report = spectrum.woodbury(self, factored, column, damping, rtol)
                else:
                    x, report = self._by_products(column, damping, rtol, max_iterations)
                columns.append(x)
                reports.append(report)
            return torch.stack(columns, 1) if columns else right

        x = self._times(b, self.shape[1], solved)
        if info:
            nothing = Solved("nothing to solve", 0, 0.0, rtol)
            return x, max(reports, key=lambda report: report.residual, default=nothing)
        for report in reports:
            report.check()
        return x

    def _by_woodbury(self, method: str | None, damping: float) -> bool:
        if method is not None:
            return method == "woodbury"
        return damping != 0 and self.root.size <= LARGEST_GRAM

    def _by_products(
        self, b: Tensor, damping: float, rtol: float, max_iterations: int
    ) -> tuple[Tensor, Solved]:
        x, report = spectrum.by_products(self, b, damping, rtol, max_iterations)
        if damping == 0:
            report = spectrum.explained(report, self.rank_bound, self.shape[0])
        return x, report
