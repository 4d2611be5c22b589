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

from unbatch.columns import ColumnNorms, DiagGGN, Gram, OfColumns, evaluate
from unbatch.compression import Basis, Compression
from unbatch.curvature import Curvature, Draws
from unbatch.errors import (
    MSG_DAMPING,
    MSG_DRAWS,
    MSG_GGN_STALE,
    MSG_METHOD,
    MSG_NO_DAMPING,
    MSG_NOT_DEFINITE,
    MSG_NOT_POSITIVE,
    MSG_SINGULAR,
    MSG_UNBIASED,
    InputError,
    StaleError,
    StructureError,
    UnbatchError,
)
from unbatch.estimates import Control, DiagonalEstimate, from_signs
from unbatch.linearised import Linearised
from unbatch.operator import Operator, sum_of
from unbatch.purity import outside_inference_mode
from unbatch.request import Request, recorded_precision, source_of
from unbatch.roots import Factor, Root
from unbatch.solvers import Solved, conjugate_gradients
from unbatch.sources import Source
from unbatch.spectra import Eigenpairs
from unbatch.tree import Space
from unbatch.verdicts import Verdict

LARGEST_GRAM = 4096  # columns of V up to which a solve goes by way of their Gram matrix


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

    def source(self, parameters: Mapping[str, Tensor]) -> Source:
        """Return where columns of these parameters come from."""
        return source_of(self.request.of(parameters))


@dataclass(frozen=True)
class Directions:
    """Eigenvectors of G, and what each component has along them.

    ``values`` ``[k]``, ascending; ``vectors`` ``[D, k]``; ``slopes`` ``γ``, ``[N, k]``, sum over n to the slope of the
    loss along each direction; ``curvatures`` ``λ``, ``[N, k]``, sum to ``values``. All in the scale of the loss, where
    those of ViViT are N times as large and average to slope and curvature.
    """

    values: Tensor
    vectors: Tensor
    slopes: Tensor
    curvatures: Tensor
    space: Space

    def named(self) -> dict[str, Tensor]:
        """The eigenvectors by parameter, ``[*param, k]``."""
        return self.space.named(self.vectors)


@outside_inference_mode("_apply")
class GGN(Operator):
    """G at the parameters and the batch of the moment it was made; a symmetric operator on flat vectors and dicts.

    ``G @ v`` costs a push-forward and a pullback through one forward pass that is kept. Raises ``StaleError`` when used
    after parameters or data have changed.
    """

    symmetric = True

    def __init__(self, point: Point, draws: Draws = None, samples: Tensor | None = None) -> None:
        self.point, self.draws, self.chosen = point, draws, samples
        self.space = point.request.space
        like = next(iter(point.parameters.values()))
        self.shape, self.dtype, self.device = (self.space.size, self.space.size), like.dtype, like.device

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
    def root(self) -> Root:
        """``S``: a root of the second derivative of the loss, or of the part that was asked for."""
        self._fresh()
        root = self.point.curvature.root(self.draws)
        if self.chosen is None:
            return root
        parts = root if self.draws is not None else self.point.curvature.components("A choice of samples")
        assert isinstance(parts, Factor)
        return parts.restricted(self.chosen, self.point.samples / max(len(self.chosen), 1))

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
        vanishing = "; it vanishes: the loss is linear in these predictions" if self.root.form == "zero" else ""
        return "; ".join(
            filter(None, (f"second derivative of the loss {self.root.form}{vanishing}", self.root.sampled))
        )

    def _fresh(self) -> None:
        if self.point.stale():
            raise StaleError(MSG_GGN_STALE)

    # -- products --

    def _apply(self, v: Tensor) -> Tensor:
        lin = self.linearised
        assert self.space is not None
        out = []
        for column in v.T:
            curved = self._hessian(lin.push(self.space.named(column)))
            out.append(self._flat(curved))
        if len(out) == 1:
            return out[0][:, None]
        return torch.stack(out, 1) if out else torch.zeros_like(v)

    def _hessian(self, v: Mapping[int, Tensor]) -> dict[int, Tensor]:
        if self.draws is None and self.chosen is None and "root" not in self.__dict__:
            return self.point.curvature.loss.hessian_times(v)
        return self.root.hessian_times(v)

    def _from_columns(self, a: Tensor) -> Tensor:
        """``V a``, ``[D]``."""
        return self._flat(self.root.times(a.to(self.device, self.dtype)))

    def _flat(self, cotangents: Mapping[int, Tensor]) -> Tensor:
        """``Jᵀ u``, ``[D]``."""
        assert self.space is not None
        return self.space.flat(self.linearised.pull(cotangents, self.space.shapes))

    def _to_columns(self, v: Tensor) -> Tensor:
        """``Vᵀ v``, ``[size]``."""
        assert self.space is not None
        return self.root.transposed_times(self.linearised.push(self.space.named(v.to(self.device, self.dtype))))

    # -- what is asked of columns --

    def _ask(self, quantity: OfColumns) -> Any:
        return self._evaluated(quantity, self.point.parameters)

    def _evaluated(self, quantity: OfColumns, parameters: Mapping[str, Tensor]) -> Any:
        self._fresh()
        with torch.no_grad(), recorded_precision():
            source = self.point.source(parameters)
            return evaluate(self.point.curvature, source, quantity, parameters)

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
        wanted = DiagGGN(per_component, rtol=rtol, seed=seed, root=self.root)
        found = self._ask(wanted)
        flat = torch.cat([t.reshape(len(t), -1) for t in found.values()], 1) if per_component else found.flat()
        basis = wanted.basis_in(self.point.curvature)
        missing = basis.remainder if basis is not None and not basis.exact else None
        whole = flat.sum(0) if per_component else flat
        told = self._told(basis, None if missing is None else float(missing.norm() / whole.double().norm()))
        if unbiased and missing is not None:
            flat = flat + missing.to(flat)
        return (flat, told) if info else flat

    def estimate_diag(self, draws: int, *, seed: int = 0, control: GGN | None = None) -> DiagonalEstimate:
        """The diagonal from ``draws`` vectors of random signs, one pullback each: unbiased, with standard errors.

        ``control``: another matrix on the same batch, as ``problem.ggn(by="frozen")``, whose exact diagonal is used as
        a control variate; the result says how much was gained, which may be nothing. Raises ``StructureError`` where G
        is not positive semi-definite.
        """
        if not isinstance(draws, int) or draws < 2:
            raise InputError(MSG_DRAWS.format(what="draws", least=2, value=draws))
        if self.root.lowest < 0:
            raise StructureError(MSG_NOT_POSITIVE.format(what="Random signs", lowest=self.root.lowest))
        other = None
        if control is not None:
            columns = self.root.table[1]
            like = self.root.sigma
            other = Control(lambda z: control._flat(self.root.times(z.to(like))), control.diag(), columns)
        assert self.space is not None
        return from_signs(self._from_columns, self.root.size, draws, seed, self.space.slices, other)

    def _told(self, basis: Basis | None, estimate: float | None = None) -> Compression:
        if basis is None:
            columns = self.root.size if self.root.separate else self.root.rank
            return Compression(0, 0, True, 0.0, columns, 0, 0)
        missing = basis.estimate if estimate is None else estimate
        size = len(basis.turn)
        return Compression(basis.rank, size, basis.exact, missing, basis.pullbacks, basis.pushes, basis.seed)

    def trace(self) -> Tensor:
        """``tr G``, a number."""
        norms = self._ask(ColumnNorms(self.root))
        return (norms * self.root.sigma.to(norms.dtype)).sum()

    @cached_property
    def _columns_gram(self) -> Tensor:
        """``VᵀV`` of the columns of ``root``, in float64."""
        return self._gram_of(Gram(self.root))

    def _gram_of(self, wanted: Gram) -> Tensor:
        """Parameters a few at a time where memory does not hold the columns of all."""
        self._fresh()
        gram, group, size = [], dict[str, Tensor](), 0
        bytes_ = {n: 4 * self.root.size * p.numel() for n, p in self.point.parameters.items()}
        for name, p in self.point.parameters.items():
            if group and size + bytes_[name] > self.point.memory:
                gram.append(self._evaluated(wanted, group))
                group, size = {}, 0
            group[name], size = p, size + bytes_[name]
        gram.append(self._evaluated(wanted, group))
        total: Tensor = sum_of(gram).double()
        return total

    def gram(self, *, rtol: float | None = None, seed: int = 0, info: bool = False) -> Any:
        """``VᵀV``, ``[NC, NC]``, for V with a column for every entry of the predictions, sample by sample.

        With the symmetric root of H for a cross-entropy, ``√p`` in BackPACK's terms; in all cases a root of H.
        ``rtol``, ``info``: as for ``diag``, with the relative error of this matrix.
        """
        if rtol is None:
            found = self._entrywise(self._columns_gram)
            return (found, self._told(self.point.curvature.basis(self.root))) if info else found
        gram, told = self._compressed_gram(rtol, seed)
        return (self._entrywise(gram), told) if info else self._entrywise(gram)

    def _compressed_gram(self, rtol: float, seed: int) -> tuple[Tensor, Compression]:
        wanted = Gram(self.root, rtol, seed)
        return self._gram_of(wanted), self._told(wanted.basis_in(self.point.curvature))

    def _entrywise(self, gram: Tensor) -> Tensor:
        """From the columns of the root to one column for every entry of the predictions."""
        root = self.root
        if isinstance(root, Factor) and not root.sampled:
            n, t, c, k = root.root.shape
            whole = torch.eye(c, k).expand(n, t, c, k) if root.whole is None else root.whole
            whole, size = whole.to(gram), n * t * c
            gram = torch.einsum("ntck,ntkx->ntcx", whole, gram.view(n, t, k, self.root.size)).reshape(size, -1)
            gram = torch.einsum("ntck,xntk->xntc", whole, gram.view(size, n, t, k)).reshape(size, size)
        elif not root.separate:
            entries = sum(p.numel() for p in self.point.curvature.loss.predictions.values())
            gram = torch.nn.functional.pad(gram, (0, entries - root.size, 0, entries - root.size))
        return gram.to(self.dtype)

    def factor(self) -> dict[str, Tensor]:
        """``V`` on request: ``[size, *param]`` for each parameter; column ``n·columns + j`` is the j-th of sample n."""
        rows = torch.eye(self.root.size, dtype=self.dtype, device=self.device)
        assert self.space is not None
        stacked = (
            torch.stack([self._from_columns(e) for e in rows], 1) if len(rows) else rows.new_zeros(self.shape[0], 0)
        )
        return {n: t.movedim(-1, 0) for n, t in self.space.named(stacked).items()}

    # -- spectrum --

    @cached_property
    def _spectrum(self) -> tuple[Tensor, Tensor]:
        """Eigenvalues that are not zero, ascending, and coefficients ``A`` of eigenvectors ``V A``; in float64."""
        gram, sigma = self._columns_gram, self.root.sigma.double()
        values, vectors = torch.linalg.eigh(gram)
        felt = self._felt(values)
        values, vectors = values[felt], vectors[:, felt]
        if (sigma > 0).all():
            return values, vectors / values.sqrt()
        half = vectors * values.sqrt()
        values_, turned = torch.linalg.eigh(half.T @ (sigma[:, None] * half))
        return values_, (vectors / values.sqrt()) @ turned

    def _felt(self, values: Tensor) -> Tensor:
        """Which of the eigenvalues of the Gram matrix, ascending, are more than rounding."""
        return values > len(values) * torch.finfo(self.dtype).eps * values[-1:]

    def _values(self, dtype: torch.dtype = torch.float64) -> Tensor:
        """Eigenvalues that are not zero, for which no eigenvectors are needed where all signs are positive."""
        if "_spectrum" in self.__dict__ or (self.root.sigma < 0).any():
            return self._spectrum[0]
        values = torch.linalg.eigvalsh(self._columns_gram.to(dtype))
        return values[self._felt(values)]

    def eigvalsh(self, *, rtol: float | None = None, seed: int = 0, info: bool = False) -> Any:
        """Eigenvalues, ascending: ``min(D, NC)`` of them; all others are zero.

        ``rtol``, ``info``: as for ``gram``, whose error bounds that of each eigenvalue beside the norm of them all.
        """
        wide = torch.promote_types(self.dtype, torch.float32)
        if rtol is None or self.root.lowest < 0:
            values, told = self._values(wide), None
        else:
            gram, told = self._compressed_gram(rtol, seed)
            values = torch.linalg.eigvalsh(gram.to(wide))
        entries = sum(p.numel() for p in self.point.curvature.loss.predictions.values())
        count = min(self.shape[0], max(entries, len(values)))
        kept = values[values.abs().argsort(descending=True)][:count]
        zeros = values.new_zeros(count - len(kept))
        found = torch.cat([kept, zeros]).sort().values.to(self.dtype)
        if not info:
            return found
        return found, told if told is not None else self._told(self.point.curvature.basis(self.root))

    def eigh(self, k: int | None = None) -> Eigenpairs:
        """The ``k`` eigenpairs with the largest eigenvalues (by default all that are not zero), values ascending.

        The cost does not grow with k but by one pullback for each.
        """
        if k is not None and (not isinstance(k, int) or k < 1):
            raise InputError(MSG_DRAWS.format(what="k", least=1, value=k))
        values, coefficients = self._spectrum
        start = 0 if k is None else max(0, len(values) - k)
        columns = [self._from_columns(a) for a in coefficients[:, start:].T]
        vectors = torch.stack(columns, 1) if columns else coefficients.new_zeros(self.shape[0], 0, dtype=self.dtype)
        return Eigenpairs(values[start:].to(self.dtype), torch.nn.functional.normalize(vectors, dim=0))

    def directions(self, k: int) -> Directions:
        """The top k eigenvectors with slope and curvature of every component along them; needs a sum over samples."""
        self.point.curvature.components("Slopes and curvatures of components")
        values, vectors = self.eigh(k)
        assert self.space is not None
        loss, dims = self.point.curvature.loss, self.point.curvature.dims
        slopes, curvatures = [], []
        for e in vectors.T:
            pushed = self.linearised.push(self.space.named(e))
            curved = self.root.hessian_times(pushed)
            slopes.append(_per_sample(loss.slope, pushed, dims))
            curvatures.append(_per_sample(curved, pushed, dims))
        return Directions(values, vectors, torch.stack(slopes, 1), torch.stack(curvatures, 1), self.space)

    def newton_step(self, damping: float | Tensor, k: int | None = None) -> dict[str, Tensor]:
        """``−Σ_i γ_i / (λ_i + δ_i) e_i`` over the top k eigenvectors, by parameter; ``damping``: a number, or ``[k]``.

        ViViT's damped Newton step. Along what is not among them the step is zero; ``solve`` has it everywhere.
        """
        values, vectors = self.eigh(k)
        try:
            damping = torch.as_tensor(damping, dtype=self.dtype, device=self.device)
        except (TypeError, ValueError):
            raise InputError(MSG_DAMPING.format(value=repr(damping), count=len(values), lowest=0.0)) from None
        if (damping.ndim and damping.shape != values.shape) or not (values + damping > 0).all():
            raise InputError(MSG_DAMPING.format(value=damping.tolist(), count=len(values), lowest=float(values.min())))
        assert self.space is not None
        gradient = self._flat(self.point.curvature.loss.slope)
        return self.space.named(-vectors @ ((vectors.T @ gradient) / (values + damping)))

    # -- determinants and solves --

    def slogdet(self, damping: float) -> tuple[Tensor, Tensor]:
        """Sign and logarithm of ``|det(G + δI)|``."""
        values = self._values()
        shifted, rest = values + damping, self.shape[0] - len(values)
        if rest and damping == 0:
            return shifted.new_zeros(()).to(self.dtype), shifted.new_full((), -torch.inf).to(self.dtype)
        base = torch.as_tensor(damping, dtype=torch.float64)
        sign = shifted.sign().prod() * (base.sign() ** rest if rest else 1)
        log = shifted.abs().log().sum() + (rest * base.abs().log() if rest else 0)
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
        solved: list[Solved] = []

        def columns(v: Tensor) -> Tensor:
            found = [self._solved(column, damping, method, rtol, max_iterations) for column in v.unbind(1)]
            solved.extend(how for _, how in found)
            return torch.stack([x for x, _ in found], 1) if found else v

        x = self._times(b, self.shape[1], columns)
        worst = max(solved, key=lambda how: how.residual, default=Solved("nothing to solve", 0, 0.0, rtol))
        for how in [] if info else solved:
            how.check()
        return (x, worst) if info else x

    def _solved(
        self, b: Tensor, damping: float, method: str | None, rtol: float, max_iterations: int
    ) -> tuple[Tensor, Solved]:
        if method == "woodbury" or (method is None and damping != 0 and self.root.size <= LARGEST_GRAM):
            return self._woodbury(b, damping, rtol)
        if damping < 0:
            raise InputError(MSG_NOT_DEFINITE.format(value=damping))
        x, how = conjugate_gradients(lambda v: self @ v + damping * v, b, rtol, max_iterations)
        if damping == 0 and not how.converged and self.rank_bound < self.shape[0]:
            how = replace(how, remark=MSG_SINGULAR.format(rank=self.rank_bound, size=self.shape[0]))
        return x, how

    def _woodbury(self, b: Tensor, damping: float, rtol: float) -> tuple[Tensor, Solved]:
        """``(b − V (δΣ + VᵀV)⁻¹ Vᵀ b) / δ``, and the same once more for the residual, which takes the rounding away."""
        if damping == 0:
            raise InputError(MSG_NO_DAMPING)
        inner = self._columns_gram + damping * torch.diag(self.root.sigma.double())
        x, residual = torch.zeros_like(b), b
        for _ in range(2):
            a = torch.linalg.solve(inner, self._to_columns(residual).double())
            x = x + (residual - self._from_columns(a)) / damping
            residual = b - (self @ x + damping * x)
        size = b.norm().clamp_min(torch.finfo(b.dtype).tiny)
        return x, Solved("woodbury", 2, float(residual.norm() / size), rtol)


def _per_sample(a: Mapping[int, Tensor], b: Mapping[int, Tensor], dims: Mapping[int, int]) -> Tensor:
    """``[N]``: inner products of the predictions of each sample."""
    parts = [(a[i] * b[i]).movedim(dims[i], 0).flatten(1).sum(1) if a[i].ndim > 1 else a[i] * b[i] for i in a if i in b]
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total
