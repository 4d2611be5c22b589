"""Eigenpairs, trace, diagonal and spectral density of a symmetric operator that is known by its
products only.

What users call: arguments are checked here, and results say how exact they are. The algorithms are
in ``lanczos.py`` and ``traces.py``. No networks here: ``A`` is anything with ``shape`` ``[D, D]``,
``dtype``, ``device``, and ``@`` on ``[D]``, ``[D, K]``. Random numbers come from generators of
their own, on the CPU and so the same for every device.
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
from unbatch.linalg.lanczos import Basis, Key, Ritz, quadrature_rule, search_eigenpairs
from unbatch.linalg.probes import seeded
from unbatch.linalg.products import long_dtype, sign_vectors, times
from unbatch.linalg.rows import Moments
from unbatch.linalg.traces import METHODS
from unbatch.running.interrupts import leave_behind
from unbatch.running.tasks import task


def _identity(values: Tensor) -> Tensor:
    return values


WHICH: dict[str, Key] = {"largest": _identity, "magnitude": torch.abs}


class Eigenpairs(NamedTuple):
    """``values`` ``[k]`` ascending, ``vectors`` ``[D, k]``, their orthonormal columns."""

    values: Tensor
    vectors: Tensor


@dataclass(frozen=True)
class Search:
    """How well eigenpairs were found: ``residuals`` ``[k]``, ``‖A v − λ v‖`` from products made for
    that purpose.

    ``norm``: the largest ``|λ|`` that was seen, to which ``rtol`` refers. ``complete``: a search
    from a new random vector, orthogonal to those found, came upon no further copy of an eigenvalue
    and on nothing beyond them.
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
        """Return whether the search is complete and every residual within ``rtol`` of the norm."""
        return self.complete and bool(self._within().all())

    def _within(self) -> Tensor:
        return self.residuals <= self.rtol * self.norm

    def check(self) -> None:
        """Raise ``ConvergenceError`` where it did not converge."""
        if self.converged:
            return
        message = errors.MSG_EIGENPAIRS.format(
            products=self.products,
            near=int(self._within().sum()),
            k=len(self.residuals),
            rtol=self.rtol,
            worst=float(self.residuals.max()),
            found="was finished" if self.complete else "was not finished",
        )
        raise ConvergenceError(message)


@dataclass(frozen=True)
class Estimate:
    """``values`` that are right on average, and their ``standard_errors``, of the same shape; what
    it took.

    ``method`` is "exact" where so many products were allowed that nothing had to be estimated.
    """

    values: Tensor
    standard_errors: Tensor
    method: str
    products: int
    seed: int


@dataclass(frozen=True)
class Density:
    """Quadrature rules for the spectrum: ``nodes`` and ``weights``, ``[probes, steps]``, weights of
    a probe sum to 1.

    Averaged over probes, ``D Σ_s weights f(nodes)`` is the trace of ``f(A)``, without bias for
    polynomials ``f`` of a degree below ``2 · steps``; standard errors tell the spread over probes,
    not what a function is off from such polynomials. ``size`` is D, ``width`` the standard
    deviation with which the density is smoothed.
    """

    nodes: Tensor
    weights: Tensor
    size: int
    width: float
    products: int
    seed: int

    def on(self, grid: Tensor) -> Estimate:
        """Return the density at the points of ``grid``, ``[G]``, smoothed by a Gaussian; it
        integrates to 1.
        """
        x = (grid.to(self.nodes)[:, None, None] - self.nodes) / self.width
        bumps = torch.exp(-x.square() / 2) / (self.width * math.sqrt(2 * math.pi))
        return self._mean(torch.einsum("gps,ps->pg", bumps, self.weights))

    def moment(self, f: Callable[[Tensor], Tensor]) -> Estimate:
        """Return the trace of ``f(A)``: ``f`` acts on eigenvalues, as in
        ``moment(lambda x: (x + damping).log())``.
        """
        return self._mean(self.size * (self.weights * f(self.nodes)).sum(1))

    def _mean(self, terms: Tensor) -> Estimate:
        return _mean(terms, "lanczos quadrature", self.products, self.seed)


# -- eigenpairs --


def eigh(
    A: Any,
    k: int,
    *,
    which: Literal["largest", "magnitude"] = "largest",
    rtol: float | None = None,
    max_products: int | None = None,
    basis: int | None = None,
    seed: int = 0,
    info: bool = False,
) -> Any:
    """Return the ``k`` eigenpairs (all, if D is less) largest in value, or in magnitude; values
    ascending.

    Thick-restart Lanczos (Wu and Simon 2000), orthogonalised in full, with ``basis`` vectors in
    memory (by default ``2 k + 20``). A Krylov space holds one vector of each eigenspace; so pairs
    that have converged are searched for copies from new random vectors, until by Kuczyński and
    Woźniakowski (1992, theorem 4.2) none is left but for a chance of 1e-6, or the next pair has
    converged as well. ``rtol``: of the residuals, relative to the norm of A; by default the root of
    the precision of its dtype. Raises ``ConvergenceError`` where ``max_products`` (by default
    ``50 · basis``) do not get there, unless ``info``, which adds a ``Search``. Ctrl-C leaves pairs
    and ``Search`` as far as it got in ``reached`` of the ``KeyboardInterrupt``.
    """
    pairs, search = searched(
        A, k, which=which, rtol=rtol, max_products=max_products, basis=basis, seed=seed
    )
    if info:
        return pairs, search
    search.check()
    return pairs


def searched(
    A: Any,
    k: int,
    *,
    which: str = "largest",
    rtol: float | None = None,
    max_products: int | None = None,
    basis: int | None = None,
    seed: int = 0,
    start: Tensor | None = None,
) -> tuple[Eigenpairs, Search]:
    """Return the pairs of ``eigh``, and how well they were found.

    ``start``: ``[D]``, or ``[D, K]`` of which the sum is taken, in place of a random vector.
    """
    D, key = _size(A), _choice(which, WHICH)
    k = min(_at_least("k", k, 1), D)
    rtol = torch.finfo(A.dtype).eps ** 0.5 if rtol is None else _positive("rtol", rtol)
    if basis is None:
        basis = 2 * k + 20
    most = min(D, _at_least("basis", basis, min(k + 2, D)))
    if max_products is None:
        max_products = 50 * most
    # The residuals of the result take k products of their own.
    allowed = _at_least("max_products", max_products, 2 * k) - k
    space = Basis(A, most, _generator(seed))
    # ``complete`` is about what may have been overlooked, the residuals about what was found.
    begin = _start(A, start)
    try:
        ritz, complete = search_eigenpairs(space, k, key, rtol, allowed, begin)
    except KeyboardInterrupt as error:
        if space.link is not None:
            leave_behind(error, *_so_far(space, k, key, rtol, seed))
        raise
    pairs = _ascending(space, ritz, k)
    residuals = _residuals(space, pairs)
    return pairs, Search(residuals, ritz.norm, rtol, complete, space.products, most, seed)


def _start(A: Any, start: Tensor | None) -> Tensor | None:
    """Return the direction to start from; None for a random one."""
    if start is None:
        return None
    if start.ndim not in (1, 2) or start.shape[0] != A.shape[0]:
        text = errors.MSG_START.format(size=A.shape[0], shape=tuple(start.shape))
        raise InputError(text)
    v = start.detach().to(A.device, long_dtype(A))
    if v.ndim == 2:
        v = v.sum(1)
    length = v.norm()
    if not length.isfinite() or not length:
        return None
    return v / length


def _so_far(space: Basis, k: int, key: Key, rtol: float, seed: int) -> tuple[Eigenpairs, Search]:
    """Return the pairs that an interrupted search has, k at most, with estimates of residuals."""
    assert space.link is not None
    ritz = space.ritz(key, space.link)
    k = min(k, space.size)
    order = ritz.values[:k].argsort()
    residuals = ritz.residuals[:k][order]
    pairs = _ascending(space, ritz, k)
    search = Search(residuals, ritz.norm, rtol, False, space.products, len(space.rows), seed)
    return pairs, search


def _ascending(space: Basis, ritz: Ritz, k: int) -> Eigenpairs:
    """Return the first k Ritz pairs as eigenpairs."""
    # The order of the key is descending, and by magnitude not even that of the values.
    space.keep(ritz, k)
    values, order = ritz.values[:k].sort()
    vectors = space.rows[:k][order.to(space.rows.device)].T
    return Eigenpairs(values.to(space.rows.device, space.rows.dtype), vectors)


def _residuals(space: Basis, pairs: Eigenpairs) -> Tensor:
    """Return the residuals of eigenpairs, by a product for each."""
    values, vectors = pairs
    residuals = []
    with task("Residuals of the eigenpairs", len(values), "products") as products:
        for value, v in products.over(zip(values, vectors.T, strict=True)):
            residuals.append(float((space.times(v) - value * v).norm()))
    return torch.tensor(residuals, dtype=torch.float64)


# -- trace and diagonal --


def trace(
    A: Any,
    samples: int,
    *,
    method: Literal["xtrace", "hutch++", "hutchinson"] = "xtrace",
    seed: int = 0,
) -> Estimate:
    """Return ``tr A`` from at most ``samples`` products, without bias; exact where these are D or
    more.

    "xtrace" (Epperly, Tropp, Webber 2024) and "hutch++" (Meyer, Musco, Musco, Woodruff 2021) are
    exact on the range they have sketched, and good where the spectrum decays; "hutchinson" (1989)
    takes random signs, one by one. The terms of XTrace share products, so its standard error is a
    little low, more so if ``samples`` come near the rank.
    """
    D = _size(A)
    estimator = _choice(method, METHODS)
    _at_least("samples", samples, estimator.least)
    generator = _generator(seed)
    if samples >= D:
        return _exactly(_diagonal_of(A).sum(), D, seed)
    terms, products = estimator.terms(A, samples, generator)
    return _mean(terms, method, products, seed)


def diagonal(A: Any, samples: int, *, seed: int = 0) -> Estimate:
    """Return the diagonal, ``[D]``, from products with ``samples`` random signs (Bekas,
    Kokiopoulou, Saad 2007).

    Without bias, with a standard error for each entry; exact where ``samples`` are D or more.
    """
    D, samples = _size(A), _at_least("samples", samples, 2)
    generator = _generator(seed)
    if samples >= D:
        return _exactly(_diagonal_of(A), D, seed)
    moments = Moments()
    with task("Diagonal by random signs", samples, "products") as products:
        for _ in products.over(range(samples)):
            z = sign_vectors(generator, A, 1)[:, 0]
            moments.add((z * times(A, z))[None])
    standard_errors = (moments.variance / samples).sqrt()
    return Estimate(moments.mean, standard_errors, "random signs", samples, seed)


def _diagonal_of(A: Any) -> Tensor:
    """Return the diagonal from D products."""
    identity = torch.eye(A.shape[0], dtype=long_dtype(A), device=A.device)
    return times(A, identity).diagonal().clone()


def _exactly(values: Tensor, products: int, seed: int) -> Estimate:
    return Estimate(values, torch.zeros_like(values), "exact", products, seed)


# -- density --


def density(
    A: Any, *, probes: int, steps: int, seed: int = 0, width: float | None = None
) -> Density:
    """Return quadrature rules by stochastic Lanczos (Ubaru, Chen, Saad 2017; Lin, Saad, Yang 2016).

    Orthogonalised in full: ``probes · steps`` products at most, ``steps`` vectors in memory.
    ``width``: of the Gaussian in ``Density.on``, by default the range of the nodes over ``steps``.
    """
    D = _size(A)
    _at_least("probes", probes, 2)
    steps = min(_at_least("steps", steps, 1), D)
    basis = Basis(A, steps, _generator(seed))
    rules = []
    with task("Spectral density by Lanczos", probes, "probes") as drawn:
        for _ in drawn.over(range(probes)):
            rules.append(quadrature_rule(basis, steps))
    nodes = torch.stack([of_probe for of_probe, _ in rules])
    weights = torch.stack([of_probe for _, of_probe in rules])
    # A multiple of the identity has one node, and the zero matrix none but zero.
    spread = max(float(nodes.max() - nodes.min()), 1e-3 * float(nodes.abs().max())) or 1.0
    width = spread / steps if width is None else _positive("width", width)
    return Density(nodes, weights, D, width, basis.products, seed)


# -- what all of them use --


def _mean(terms: Tensor, method: str, products: int, seed: int) -> Estimate:
    return Estimate(terms.mean(0), terms.std(0) / math.sqrt(len(terms)), method, products, seed)


def _generator(seed: int) -> torch.Generator:
    return seeded(_at_least("seed", seed, 0))


def _size(A: Any) -> int:
    """Return D. Raises ``InputError`` for what is not square, empty or not real."""
    shape = tuple(A.shape)
    square = len(shape) == 2 and shape[0] == shape[1] and shape[0] > 0
    if not square or not A.dtype.is_floating_point:
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
