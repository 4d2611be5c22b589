"""Eigenpairs, trace, diagonal and spectral density of a symmetric operator that is known by its products only.

No networks here: ``A`` is anything with ``shape`` ``[D, D]``, ``dtype``, ``device``, and ``@`` on ``[D]``, ``[D, K]``.
What is as long as D stays in its dtype (half precision: in float32) and on its device; what is small, as a projection
on a basis or a quadrature rule, is in float64 on the CPU. Random numbers come from generators of their own, on the CPU
and so the same for every device.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from unbatch import errors
from unbatch.errors import ConvergenceError, InputError
from unbatch.linalg.probes import random_signs, seeded
from unbatch.linalg.rows import Moments

CHANCE = 1e-6  # at which a search for overlooked eigenvalues may miss one


FEWEST = 5  # steps of such a search


ENTRIES_AT_ONCE = 1 << 16  # entries of the vectors of a basis that are turned at a time


Key = Callable[[Tensor], Tensor]


WHICH: dict[str, Key] = {"largest": lambda values: values, "magnitude": torch.abs}


class Eigenpairs(NamedTuple):
    """``values`` ``[k]`` ascending, ``vectors`` ``[D, k]``, orthonormal columns in the same order."""

    values: Tensor
    vectors: Tensor


@dataclass(frozen=True)
class Search:
    """How well eigenpairs were found: ``residuals`` ``[k]`` are ``‖A v − λ v‖``, from products made for that purpose.

    ``norm``: the largest ``|λ|`` that was seen, to which ``rtol`` refers. ``complete``: a search from a new random
    vector, orthogonal to those found, came upon no further copy of an eigenvalue and on nothing beyond them.
    """

    residuals: Tensor
    norm: float
    rtol: float
    complete: bool
    products: int
    basis: int
    seed: int

    @property
    def converged(self) -> bool:
        return self.complete and bool((self.residuals <= self.rtol * self.norm).all())

    def check(self) -> None:
        """Raise ``ConvergenceError`` where it did not converge."""
        if not self.converged:
            near = int((self.residuals <= self.rtol * self.norm).sum())
            found = "was finished" if self.complete else "was not finished"
            text = {
                "products": self.products,
                "near": near,
                "k": len(self.residuals),
                "rtol": self.rtol,
            }
            raise ConvergenceError(
                errors.MSG_EIGENPAIRS.format(found=found, worst=float(self.residuals.max()), **text)
            )


@dataclass(frozen=True)
class Estimate:
    """``values`` that are right on average, and their ``standard_errors``, of the same shape; what it took.

    ``method`` is "exact" where so many products were allowed that nothing had to be estimated.
    """

    values: Tensor
    standard_errors: Tensor
    method: str
    products: int
    seed: int


@dataclass(frozen=True)
class Density:
    """Quadrature rules for the spectrum: ``nodes`` and ``weights``, ``[probes, steps]``, weights of a probe sum to 1.

    Averaged over probes, ``D Σ_s weights f(nodes)`` is the trace of ``f(A)``, without bias for polynomials ``f`` of a
    degree below ``2 · steps``; standard errors tell the spread over probes, not what a function is off from such
    polynomials. ``size`` is D, ``width`` the standard deviation with which the density is smoothed.
    """

    nodes: Tensor
    weights: Tensor
    size: int
    width: float
    products: int
    seed: int

    def on(self, grid: Tensor) -> Estimate:
        """The density at the points of ``grid``, ``[G]``, smoothed by a Gaussian; it integrates to 1."""
        x = (grid.to(self.nodes)[:, None, None] - self.nodes) / self.width
        bumps = torch.exp(-x.square() / 2) / (self.width * math.sqrt(2 * math.pi))
        return _mean(
            torch.einsum("gps,ps->pg", bumps, self.weights),
            "lanczos quadrature",
            self.products,
            self.seed,
        )

    def moment(self, f: Callable[[Tensor], Tensor]) -> Estimate:
        """The trace of ``f(A)``: ``f`` acts on eigenvalues, as in ``moment(lambda x: (x + damping).log())``."""
        terms = self.size * (self.weights * f(self.nodes)).sum(1)
        return _mean(terms, "lanczos quadrature", self.products, self.seed)


# -- eigenpairs --


def eigh(
    A: Any, k: int, *, which: Literal["largest", "magnitude"] = "largest", rtol: float | None = None,
    max_products: int | None = None, basis: int | None = None, seed: int = 0, info: bool = False,
) -> Any:  # fmt: skip
    """The ``k`` eigenpairs (all, if D is less) with the largest eigenvalues, or largest in magnitude; values ascending.

    Thick-restart Lanczos (Wu and Simon 2000), orthogonalised in full, with ``basis`` vectors in memory (by default
    ``2 k + 20``). A Krylov space holds one vector of each eigenspace; so pairs that have converged are searched for
    copies from new random vectors, until by Kuczyński and Woźniakowski (1992, theorem 4.2) none is left but for a
    chance of 1e-6, or the next pair has converged as well. ``rtol``: of the residuals, relative to the norm of A; by
    default the root of the precision of its dtype. Raises ``ConvergenceError`` where ``max_products`` (by default
    ``50 · basis``) do not get there, unless ``info``, which adds a ``Search``.
    """
    D, key = _size(A), _choice(which, WHICH)
    _at_least("k", k, 1)
    k = min(k, D)
    rtol = torch.finfo(A.dtype).eps ** 0.5 if rtol is None else _positive("rtol", rtol)
    most = min(D, _at_least("basis", 2 * k + 20 if basis is None else basis, min(k + 2, D)))
    allowed = _at_least("max_products", 50 * most if max_products is None else max_products, 2 * k)
    space = _Basis(A, most, _generator(seed))
    ritz, complete = _search(space, k, key, rtol, allowed - k)
    space.turn(ritz, k)
    values, order = ritz.values[:k].sort()
    vectors = space.rows[:k][order.to(space.rows.device)].T
    residuals = [
        float((space.times(v) - x * v).norm())
        for x, v in zip(values.tolist(), vectors.T, strict=True)
    ]
    search = Search(
        torch.tensor(residuals, dtype=torch.float64),
        ritz.norm,
        rtol,
        complete,
        space.products,
        most,
        seed,
    )
    if not info:
        search.check()
    pairs = Eigenpairs(values.to(A.device, space.rows.dtype), vectors)
    return (pairs, search) if info else pairs


class _Ritz(NamedTuple):
    """Eigenpairs of the projection on a basis, in the order in which they are wanted; ``residuals``: as estimated.

    ``norm``: the largest ``|λ|`` that any basis has shown.
    """

    values: Tensor
    vectors: Tensor
    residuals: Tensor
    norm: float


class _Basis:
    """Orthonormal ``rows`` ``[most, D]``, of which ``size`` are taken, and the projection of A on them."""

    def __init__(self, A: Any, most: int, generator: torch.Generator) -> None:
        self.A, self.generator, self.size, self.products, self.norm = A, generator, 0, 0, 0.0
        self.rows = torch.empty(most, A.shape[0], dtype=_wide(A), device=A.device)
        self.projected = torch.zeros(most, most, dtype=torch.float64)
        self.link: float | None = None  # of the last row and the next, where that is known

    def times(self, v: Tensor) -> Tensor:
        self.products += 1
        return _times(self.A, v)

    def draw(self) -> Tensor:
        """A random direction orthogonal to the rows."""
        v = _gaussian(self.generator, self.A, 1)[:, 0]
        v = _apart(self.rows[: self.size], v / v.norm())[1]
        return v / v.norm()

    def grow(self, v: Tensor) -> tuple[Tensor, float]:
        """Takes ``v`` as a further row; returns the direction of ``A v`` that is new, and its length.

        Where there is none, the rows span an invariant space: the length is 0, the direction random.
        """
        self.rows[self.size] = v
        self.size += 1
        h, rest = _apart(self.rows[: self.size], self.times(v))
        h = _small(h)
        self.projected[self.size - 1, : self.size] = self.projected[: self.size, self.size - 1] = h
        length, eps = float(rest.norm()), torch.finfo(self.rows.dtype).eps
        if not math.isfinite(length):
            raise InputError(errors.MSG_NOT_FINITE)
        scale = max(float(self.projected[: self.size, : self.size].abs().max()), length)
        gap = 0.0 if self.link is None else abs(float(h[-2]) - self.link)
        if gap > 10 * torch.finfo(self.A.dtype).eps ** 0.5 * scale:
            raise InputError(errors.MSG_NOT_SYMMETRIC.format(gap=gap / scale))
        self.link = length
        if length > 10 * eps * scale:
            return rest / length, length
        return (self.draw() if self.size < self.rows.shape[1] else rest), 0.0

    def ritz(self, key: Key, length: float) -> _Ritz:
        """``A rows = rows projected + length · next``: the last entries of an eigenvector tell its residual."""
        values, vectors = torch.linalg.eigh(self.projected[: self.size, : self.size])
        order = key(values).argsort(descending=True)
        self.norm = max(self.norm, float(values.abs().max()))
        return _Ritz(values[order], vectors[:, order], length * vectors[-1, order].abs(), self.norm)

    def turn(self, ritz: _Ritz, keep: int) -> None:
        """Only the first ``keep`` Ritz vectors stay, in place of the rows."""
        turned = ritz.vectors[:, :keep].T.to(self.rows)
        for part in self.rows.split(ENTRIES_AT_ONCE, 1):
            part[:keep] = turned @ part[: self.size]
        self.size, self.link = keep, None
        self.projected[:keep, :keep] = torch.diag(ritz.values[:keep])


def _apart(rows: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """What ``v`` has along the rows, and the rest of it; twice, which is enough (Giraud et al. 2005)."""
    first = rows @ v
    v = v - first @ rows
    second = rows @ v
    return first + second, v - second @ rows


def _search(basis: _Basis, k: int, key: Key, rtol: float, allowed: int) -> tuple[_Ritz, bool]:
    """Grows and restarts until the first k Ritz pairs have converged and a random start finds nothing beyond them."""
    most, D = basis.rows.shape
    stride, locked, steps, v = max(1, (most - k) // 10), -math.inf, 0, basis.draw()
    while True:
        v, length = basis.grow(v)
        steps, spent = steps + 1, basis.products >= allowed
        if steps % stride and basis.size < most and not spent:
            continue
        ritz = basis.ritz(key, length)
        if basis.size == D or spent:
            return ritz, basis.size == D
        near = ritz.residuals <= 0.5 * rtol * ritz.norm
        if basis.size > k and near[:k].all():
            total = float(key(ritz.values[:k]).sum())
            if (
                total > locked + k * rtol * ritz.norm
            ):  # more than was known: search again, beside these
                basis.turn(ritz, k)
                locked, steps, v = total, 0, basis.draw()
                continue
            if steps >= FEWEST and (
                near[k] or _nothing_beyond(ritz.values, k, key, min(steps, most - k), D)
            ):
                return ritz, True
        if basis.size == most:
            basis.turn(ritz, k + (most - k) // 2)


def _nothing_beyond(values: Tensor, k: int, key: Key, steps: int, D: int) -> bool:
    """After ``steps`` from a random vector, whether a value above the first k would have shown but for ``CHANCE``.

    The largest Ritz value is short of the largest eigenvalue by more than ``ε`` of the spread with a probability of at
    most ``1.648 √D exp(−√ε (2 steps − 1))``. The spread is taken from Ritz values, with what they may be short of.
    """
    short = (math.log(1.648 * math.sqrt(D) / CHANCE) / (2 * steps - 1)) ** 2
    if short >= 0.5:
        return False
    spread, gap = values[k:].max() - values[k:].min(), key(values[k - 1]) - key(values[k])
    return bool(spread * short / (1 - 2 * short) <= gap)


# -- trace and diagonal --


def trace(
    A: Any,
    samples: int,
    *,
    method: Literal["xtrace", "hutch++", "hutchinson"] = "xtrace",
    seed: int = 0,
) -> Estimate:
    """``tr A`` from at most ``samples`` products, without bias; exact where these are D or more.

    "xtrace" (Epperly, Tropp, Webber 2024) and "hutch++" (Meyer, Musco, Musco, Woodruff 2021) are exact on the range
    they have sketched, and good where the spectrum decays; "hutchinson" (1989) takes random signs, one by one. The
    terms of XTrace share products, so its standard error is a little low, more so if ``samples`` come near the rank.
    """
    D, (estimate, least) = _size(A), _choice(method, METHODS)
    _at_least("samples", samples, least)
    generator = _generator(seed)
    if samples >= D:
        values = _exact(A).sum()
        return Estimate(values, torch.zeros_like(values), "exact", D, seed)
    terms, products = estimate(A, samples, generator)
    return _mean(terms, method, products, seed)


def diagonal(A: Any, samples: int, *, seed: int = 0) -> Estimate:
    """The diagonal, ``[D]``, from products with ``samples`` vectors of random signs (Bekas, Kokiopoulou, Saad 2007).

    Without bias, with a standard error for each entry; exact where ``samples`` are D or more.
    """
    D, samples = _size(A), _at_least("samples", samples, 2)
    generator = _generator(seed)
    if samples >= D:
        values = _exact(A)
        return Estimate(values, torch.zeros_like(values), "exact", D, seed)
    found = Moments()
    for _ in range(samples):
        z = _signs(generator, A, 1)[:, 0]
        found.add((z * _times(A, z))[None])
    return Estimate(found.mean, (found.variance / samples).sqrt(), "random signs", samples, seed)


def _exact(A: Any) -> Tensor:
    return _times(A, torch.eye(A.shape[0], dtype=_wide(A), device=A.device)).diagonal().clone()


def _hutchinson(A: Any, samples: int, generator: torch.Generator) -> tuple[Tensor, int]:
    terms = []
    for _ in range(samples):
        z = _signs(generator, A, 1)[:, 0]
        terms.append(z @ _times(A, z))
    return torch.stack(terms), samples


def _hutchpp(A: Any, samples: int, generator: torch.Generator) -> tuple[Tensor, int]:
    """``tr QᵀAQ + gᵀ (I − QQᵀ) A (I − QQᵀ) g``, with Q an orthonormal basis of ``A S``, for every g."""
    sketch = samples // 3
    Q = torch.linalg.qr(_times(A, _signs(generator, A, sketch)))[0]
    g = _signs(generator, A, samples - 2 * sketch)
    g = g - Q @ (Q.T @ g)
    return (Q * _times(A, Q)).sum() + (g * _times(A, g)).sum(0), samples


def _xtrace(A: Any, samples: int, generator: torch.Generator) -> tuple[Tensor, int]:
    # Each of K vectors ω takes the part of g in Hutch++, with the sketch Q₍ᵢ₎ of the K − 1 others:
    #   tᵢ = tr Q₍ᵢ₎ᵀ A Q₍ᵢ₎ + xᵢᵀ A xᵢ · (D − K + 1) / ‖xᵢ‖²,   xᵢ = (I − Q₍ᵢ₎Q₍ᵢ₎ᵀ) ωᵢ,
    # where the last factor is one on average, as ωᵢ has a random direction in D − K + 1 dimensions. With A Ω = Q R,
    # range Q₍ᵢ₎ is what Q spans without Q sᵢ, where sᵢ is orthogonal to all columns of R but the i-th: Rᵀ sᵢ ∝ eᵢ. So
    #   Q₍ᵢ₎Q₍ᵢ₎ᵀ = Q (I − sᵢsᵢᵀ) Qᵀ,   xᵢ = ωᵢ − Q uᵢ,   uᵢ = (I − sᵢsᵢᵀ) wᵢ,   wᵢ = Qᵀ ωᵢ,
    # and with H = Qᵀ A Q, Qᵀ A ωᵢ = rᵢ (A is symmetric), ωᵢᵀ A ωᵢ = wᵢᵀ rᵢ, everything is small:
    #   tr Q₍ᵢ₎ᵀ A Q₍ᵢ₎ = tr H − sᵢᵀ H sᵢ,   xᵢᵀ A xᵢ = wᵢᵀ rᵢ − 2 uᵢᵀ rᵢ + uᵢᵀ H uᵢ,   ‖xᵢ‖² = ‖ωᵢ‖² − ‖uᵢ‖².
    D, K = A.shape[0], samples // 2
    omega = _gaussian(generator, A, K)
    Q, R_ = torch.linalg.qr(_times(A, omega))
    H, R, w = _small(Q.T @ _times(A, Q)), _small(R_), _small(Q.T @ omega)
    s = torch.linalg.solve_triangular(_regular(R, A.dtype).T, torch.eye(K).to(R), upper=False)
    s = s / s.norm(dim=0)
    u = w - s * (s * w).sum(0)
    inside = H.trace() - (s * (H @ s)).sum(0)
    outside = ((w - 2 * u) * R + u * (H @ u)).sum(0)
    lengths = _small(omega.square().sum(0)) - u.square().sum(0)
    return (inside + outside * (D - K + 1) / lengths).to(omega), 2 * K


def _regular(R: Tensor, dtype: torch.dtype) -> Tensor:
    """R with a diagonal no smaller than rounding: where A has too low a rank, directions it does not feel are added."""
    least = torch.finfo(dtype).eps * float(R.abs().max()) or 1.0
    entries = R.diagonal()
    return R + torch.diag(torch.where(entries.abs() < least, least - entries, 0.0))


METHODS: dict[str, tuple[Callable[..., tuple[Tensor, int]], int]] = {
    "xtrace": (_xtrace, 4),
    "hutch++": (_hutchpp, 4),
    "hutchinson": (_hutchinson, 2),
}


# -- density --


def density(
    A: Any, *, probes: int, steps: int, seed: int = 0, width: float | None = None
) -> Density:
    """Stochastic Lanczos quadrature (Ubaru, Chen, Saad 2017; Lin, Saad, Yang 2016), orthogonalised in full.

    ``probes · steps`` products at most, ``steps`` vectors in memory; ``width``: of the Gaussian in ``Density.on``, by
    default the range of the nodes over ``steps``.
    """
    D = _size(A)
    _at_least("probes", probes, 2)
    steps = min(_at_least("steps", steps, 1), D)
    basis = _Basis(A, steps, _generator(seed))
    rules = [_rule(basis, steps) for _ in range(probes)]
    nodes, weights = torch.stack([n for n, _ in rules]), torch.stack([w for _, w in rules])
    spread = max(float(nodes.max() - nodes.min()), 1e-3 * float(nodes.abs().max())) or 1.0
    width = spread / steps if width is None else _positive("width", width)
    return Density(nodes, weights, D, width, basis.products, seed)


def _rule(basis: _Basis, steps: int) -> tuple[Tensor, Tensor]:
    """Nodes and weights from one random vector; fewer, filled up with weights of zero, where its space is invariant."""
    basis.size, basis.link = 0, None
    v, length = basis.draw(), math.inf
    while length and basis.size < steps:
        v, length = basis.grow(v)
    values, vectors = torch.linalg.eigh(basis.projected[: basis.size, : basis.size])
    missing = steps - basis.size
    nodes = torch.cat([values, values[-1:].expand(missing)])
    return nodes, torch.nn.functional.pad(vectors[0].square(), (0, missing))


# -- what all of them use --


def _mean(terms: Tensor, method: str, products: int, seed: int) -> Estimate:
    return Estimate(terms.mean(0), terms.std(0) / math.sqrt(len(terms)), method, products, seed)


def _wide(A: Any) -> torch.dtype:
    return torch.promote_types(A.dtype, torch.float32)


def _times(A: Any, v: Tensor) -> Tensor:
    found: Tensor = A @ v.to(A.dtype)
    return found.to(v.dtype)


def _small(x: Tensor) -> Tensor:
    return x.cpu().double()


def _generator(seed: int) -> torch.Generator:
    return seeded(_at_least("seed", seed, 0))


def _gaussian(generator: torch.Generator, A: Any, K: int) -> Tensor:
    return torch.randn(K, A.shape[0], generator=generator, dtype=_wide(A)).T.to(A.device)


def _signs(generator: torch.Generator, A: Any, K: int) -> Tensor:
    return random_signs(K * A.shape[0], generator).view(K, -1).T.to(A.device, _wide(A))


def _size(A: Any) -> int:
    shape = tuple(A.shape)
    if len(shape) != 2 or shape[0] != shape[1] or not shape[0] or not A.dtype.is_floating_point:
        raise InputError(errors.MSG_SQUARE.format(shape=shape, dtype=A.dtype))
    return shape[0]


def _at_least(what: str, value: int, least: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise InputError(errors.MSG_DRAWS.format(what=what, least=least, value=value))
    return value


def _positive(what: str, value: float) -> float:
    if not 0 < value < math.inf:
        raise InputError(errors.MSG_POSITIVE.format(what=what, value=value))
    return float(value)


def _choice(value: str, table: dict[str, Any]) -> Any:
    if value not in table:
        raise InputError(errors.MSG_WHICH.format(value=value))
    return table[value]
