"""Krylov bases of a symmetric operator: thick-restart Lanczos, and Gauss quadrature from one
vector.

The search for eigenpairs behind ``spectra.eigh`` and the rules behind ``spectra.density``.
Arguments are checked, and results are judged, in ``spectra.py``.

Legend: ``D`` the dimension, ``most`` how many vectors fit in a basis, ``k`` how many eigenpairs are
asked for; a *Ritz pair* is an eigenpair of the projection of A on a basis.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from unbatch import errors
from unbatch.errors import InputError
from unbatch.linalg.products import gaussian_vectors, long_dtype, small, times
from unbatch.running.tasks import Task, task

# The probability with which a search for overlooked eigenvalues may miss one.
CHANCE = 1e-6

# Rows that a product of a symmetric matrix with the last one lies along, but for restarts.
NEIGHBOURS = 2

# The least number of steps of such a search.
FEWEST = 5

# Entries of the vectors of a basis that are rotated at a time: no second basis is needed for it.
ENTRIES_AT_ONCE = 1 << 16

# Takes eigenvalues to what they are ordered by, the largest first.
Key = Callable[[Tensor], Tensor]


class Ritz(NamedTuple):
    """Eigenpairs of the projection on a basis, in the order of the key.

    ``residuals`` are estimates; ``norm`` is the largest ``|λ|`` that any basis has shown.
    """

    values: Tensor
    vectors: Tensor
    residuals: Tensor
    norm: float


class Basis:
    """Orthonormal ``rows`` ``[most, D]``, the first ``size`` of which are in use, and A projected
    on them.
    """

    def __init__(self, A: Any, most: int, generator: torch.Generator) -> None:
        self.A, self.generator = A, generator
        self.rows = torch.empty(most, A.shape[0], dtype=long_dtype(A), device=A.device)
        self.projected = torch.zeros(most, most, dtype=torch.float64)
        self.size = 0
        self.products = 0
        self.norm = 0.0
        # The length of what was new in the last product ``A r``: for the next row v, ``rᵀ A v`` has
        # to be the same if A is symmetric. None where there is no such product.
        self.link: float | None = None

    def restart(self) -> None:
        """Forget all rows."""
        self.size, self.link = 0, None

    def times(self, v: Tensor) -> Tensor:
        """Return ``A v``, and count it."""
        self.products += 1
        return times(self.A, v)

    def draw(self) -> Tensor:
        """Return a random direction orthogonal to the rows."""
        v = gaussian_vectors(self.generator, self.A, 1)[:, 0]
        _, v = split_off(self.rows[: self.size], v / v.norm())
        return v / v.norm()

    def grow(self, v: Tensor) -> tuple[Tensor, float]:
        """Add ``v`` as a row; return the direction of ``A v`` that is new, and its length.

        Where nothing is new, the rows span an invariant space: the length is 0, the direction
        random. Raises ``InputError`` where products are not finite, or A proves not to be
        symmetric.
        """
        # The product first: an interrupt in it leaves a basis that is whole.
        product = self.times(v)
        self.rows[self.size] = v
        self.size += 1
        h, rest = split_off(self.rows[: self.size], product)
        h = small(h)
        self.projected[self.size - 1, : self.size] = h
        self.projected[: self.size, self.size - 1] = h
        length = float(rest.norm())
        if not math.isfinite(length):
            raise InputError(errors.MSG_NOT_FINITE)
        scale = max(float(self.projected[: self.size, : self.size].abs().max()), length)
        self._check_symmetry(h, scale)
        self.link = length
        if length > 10 * torch.finfo(self.rows.dtype).eps * scale:
            return rest / length, length
        # An invariant space: what is left of the product is rounding, and no direction.
        if self.size < self.rows.shape[1]:
            rest = self.draw()
        return rest, 0.0

    def _check_symmetry(self, h: Tensor, scale: float) -> None:
        """Raise ``InputError`` where ``rᵀ A v`` and ``vᵀ A r`` of neighbouring rows differ."""
        if self.link is None:
            return
        gap = abs(float(h[-2]) - self.link)
        if gap > 10 * torch.finfo(self.A.dtype).eps ** 0.5 * scale:
            raise InputError(errors.MSG_NOT_SYMMETRIC.format(gap=gap / scale))

    def ritz(self, key: Key, length: float) -> Ritz:
        """Return the Ritz pairs, where ``length`` is that of the new part of the last product.

        ``A rows = rows projected + length · next``, so that a residual is ``length`` times the last
        entry of the eigenvector.
        """
        values, vectors = torch.linalg.eigh(self.projected[: self.size, : self.size])
        order = key(values).argsort(descending=True)
        self.norm = max(self.norm, float(values.abs().max()))
        residuals = length * vectors[-1, order].abs()
        return Ritz(values[order], vectors[:, order], residuals, self.norm)

    def keep(self, ritz: Ritz, count: int) -> None:
        """Replace the rows by the first ``count`` Ritz vectors."""
        # In slices of the vectors, so that no second basis is needed.
        rotation = ritz.vectors[:, :count].T.to(self.rows)
        for part in self.rows.split(ENTRIES_AT_ONCE, 1):
            part[:count] = rotation @ part[: self.size]
        self.size, self.link = count, None
        self.projected[:count, :count] = torch.diag(ritz.values[:count])


def split_off(rows: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Return the coefficients of ``v`` along orthonormal rows, and what is orthogonal to them.

    Most of a product lies along the rows before it, so these go first, which takes little. Along
    all rows there is mostly rounding left then, and one more pass through them is enough; where it
    is not (more than half of the square was taken away), another one is (Giraud et al. 2005).
    """
    coefficients = torch.zeros(len(rows), dtype=v.dtype, device=v.device)
    last = slice(max(len(rows) - NEIGHBOURS, 0), None)
    coefficients[last] = rows[last] @ v
    v = v - coefficients[last] @ rows[last]
    for _ in range(2):
        before = v.norm()
        along = rows @ v
        v = v - along @ rows
        coefficients += along
        if v.norm() ** 2 > before**2 / 2:
            break
    return coefficients, v


def search_eigenpairs(
    basis: Basis, k: int, key: Key, rtol: float, allowed: int, start: Tensor | None = None
) -> tuple[Ritz, bool]:
    """Return the first k Ritz pairs and whether nothing was overlooked, after ``allowed`` products
    at most. ``start``: of unit length, in place of a random vector.
    """
    with task("Eigenpairs by Lanczos", allowed, "products", at_most=True) as products:
        return _search(basis, k, key, rtol, products, start)


def _search(
    basis: Basis, k: int, key: Key, rtol: float, products: Task, start: Tensor | None
) -> tuple[Ritz, bool]:
    """Search, with no more products than the task has in all.

    A Krylov space holds one vector of each eigenspace. So once the pairs have converged, they are
    locked, and a new random vector orthogonal to them starts the space that would hold their
    copies. The search is complete when such a start has brought up nothing beyond them.
    """
    most, D = basis.rows.shape
    # Eigenvalues of the projection cost as much as some steps, and are not looked at after each.
    stride = max(1, (most - k) // 10)
    locked = -math.inf  # the sum of the keys of pairs from which a new search has started
    steps = 0  # since the last start
    v = basis.draw() if start is None else start
    while True:
        v, length = basis.grow(v)
        products.advance()
        steps += 1
        spent = products.done == products.total
        if steps % stride and basis.size < most and not spent:
            continue
        ritz = basis.ritz(key, length)
        products.say(_in_words(ritz, k, rtol))
        # A basis of the whole space has all there is; without products the best so far is returned.
        if basis.size == D or spent:
            return ritz, basis.size == D
        if basis.size > k and _have_converged(ritz, k, rtol):
            total = float(key(ritz.values[:k]).sum())
            if total > locked + k * rtol * ritz.norm:  # more than before: search again beside these
                basis.keep(ritz, k)
                locked, steps, v = total, 0, basis.draw()
                continue
            if _is_complete(ritz, k, key, rtol, steps, basis):
                return ritz, True
        if basis.size == most:  # full: half of what is not asked for is thrown away
            basis.keep(ritz, k + (most - k) // 2)


def _in_words(ritz: Ritz, k: int, rtol: float) -> str:
    """Return how near the first k pairs are."""
    near = int(_near(ritz, rtol)[:k].sum())
    size = ritz.norm or 1.0
    worst = float(ritz.residuals[:k].max()) / size
    return f"{near} of {k} pairs, residual {worst:.1g}, wanted {0.5 * rtol:.1g}"


def _near(ritz: Ritz, rtol: float) -> Tensor:
    return ritz.residuals <= 0.5 * rtol * ritz.norm


def _have_converged(ritz: Ritz, k: int, rtol: float) -> bool:
    return bool(_near(ritz, rtol)[:k].all())


def _is_complete(ritz: Ritz, k: int, key: Key, rtol: float, steps: int, basis: Basis) -> bool:
    """Return whether the pair behind the first k has converged, or nothing lies beyond them."""
    if steps < FEWEST:
        return False
    if _near(ritz, rtol)[k]:
        return True
    most, D = basis.rows.shape
    return nothing_beyond(ritz.values, k, key, min(steps, most - k), D)


def nothing_beyond(values: Tensor, k: int, key: Key, steps: int, D: int) -> bool:
    """Return whether a value above the first k would have shown, but for ``CHANCE``.

    After ``steps`` from a random vector, the largest Ritz value is short of the largest eigenvalue
    by more than ``ε`` of the spread with a probability of at most
    ``1.648 √D exp(−√ε (2 steps − 1))`` (Kuczyński and Woźniakowski 1992, theorem 4.2). The spread
    is taken from Ritz values, with what they may be short of.
    """
    short = (math.log(1.648 * math.sqrt(D) / CHANCE) / (2 * steps - 1)) ** 2
    if short >= 0.5:
        return False
    spread, gap = values[k:].max() - values[k:].min(), key(values[k - 1]) - key(values[k])
    return bool(spread * short / (1 - 2 * short) <= gap)


def quadrature_rule(basis: Basis, steps: int) -> tuple[Tensor, Tensor]:
    """Return nodes and weights, ``[steps]``, from one random vector.

    Where its Krylov space is invariant there are fewer, filled up with weights of zero.
    """
    basis.restart()
    v, length = basis.draw(), math.inf
    with task("Lanczos from one vector", steps, "products", at_most=True) as products:
        while length and basis.size < steps:
            v, length = basis.grow(v)
            products.advance()
    values, vectors = torch.linalg.eigh(basis.projected[: basis.size, : basis.size])
    missing = steps - basis.size
    nodes = torch.cat([values, values[-1:].expand(missing)])
    return nodes, torch.nn.functional.pad(vectors[0].square(), (0, missing))
