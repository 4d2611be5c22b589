"""Linear maps that are known by their products: a base class, and maps composed of others.

No networks here, and no algorithms: eigenvalues are in ``spectra.py``, systems in ``solvers.py``.
Vectors are flat, ``[n]`` or ``[n, K]``, or dicts of named tensors where a map has a ``space``.
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from unbatch.errors import MSG_OPERATOR_SHAPES, MSG_OPERATOR_VECTOR, InputError
from unbatch.linalg.rows import sum_of
from unbatch.linalg.space import Space
from unbatch.running.tasks import task

# ``[n, K]`` to ``[m, K]``.
Apply = Callable[[Tensor], Tensor]

UNIT_VECTORS = 32  # multiplied at a time when a matrix is formed


class Operator(ABC):
    """A linear map of shape ``[m, n]``; products with vectors, matrices and dicts of tensors.

    A concrete one has ``shape``, ``dtype``, ``device``, and ``_apply``; ``_apply_transposed`` if it
    is not symmetric. ``space``: names and shapes of the entries, on both sides, where there are
    any.
    """

    shape: tuple[int, int]
    dtype: torch.dtype
    device: torch.device
    space: Space | None = None
    symmetric: bool = False

    @abstractmethod
    def _apply(self, v: Tensor) -> Tensor:
        """Return ``A v``, ``[m, K]``, for ``[n, K]``."""

    def _apply_transposed(self, v: Tensor) -> Tensor:
        """Return ``Aᵀ v``, ``[n, K]``, for ``[m, K]``."""
        if not self.symmetric:
            name = type(self).__name__
            raise NotImplementedError(f"{name} has no product with its transpose: A @ v only.")
        return self._apply(v)

    # -- products --

    def __matmul__(self, other: Any) -> Any:
        """Return ``A @ v``: ``[m]`` for ``[n]``, ``[m, K]`` for ``[n, K]``, a dict for a dict.

        For an operator, return their product, an operator. Raises ``InputError`` where shapes do
        not fit.
        """
        if isinstance(other, Operator):
            return product(self, other)
        return self._times(other, self.shape[1], self._apply)

    def __rmatmul__(self, other: Any) -> Any:
        """Return ``v @ A`` for ``[m]``, ``[K, m]``, or a dict."""
        if isinstance(other, Tensor) and other.ndim == 2:
            return self._times(other.T, self.shape[0], self._apply_transposed).T
        return self._times(other, self.shape[0], self._apply_transposed)

    def _times(self, v: Any, size: int, apply: Apply) -> Any:
        if isinstance(v, Mapping):
            return self._times_named(v, size, apply)
        if not isinstance(v, Tensor) or v.ndim not in (1, 2) or v.shape[0] != size:
            raise InputError(self._no_vector(v, size))
        v = self._converted(v)
        if v.ndim == 2:
            return apply(v)
        return apply(v[:, None])[:, 0]

    def _times_named(self, v: Mapping[str, Tensor], size: int, apply: Apply) -> dict[str, Tensor]:
        """Return the product of a vector by names, by names."""
        if self.space is None:
            text = MSG_OPERATOR_VECTOR.format(got="a dict", size=size, what="it has no names")
            raise InputError(text)
        column = self._converted(self.space.flat(v))[:, None]
        return self.space.named(apply(column)[:, 0])

    def _no_vector(self, v: Any, size: int) -> str:
        """Return the message for what is no vector of this operator."""
        got = type(v).__name__
        if isinstance(v, Tensor):
            got = f"a tensor of shape {tuple(v.shape)}"
        what = "nothing else is understood"
        if self.space is not None:
            what = "dicts by name are understood, too"
        return MSG_OPERATOR_VECTOR.format(got=got, size=size, what=what)

    def _converted(self, v: Tensor) -> Tensor:
        """Return a vector on the operator's device and in its dtype."""
        return v.detach().to(self.device, self.dtype)

    @property
    def T(self) -> Operator:
        """Return the transposed map; itself if it is symmetric."""
        if self.symmetric:
            return self
        return Transposed(self)

    # -- composition; nothing is computed --

    def __add__(self, other: Operator) -> Operator:
        return Sum([self, other])

    def __sub__(self, other: Operator) -> Operator:
        return Sum([self, -1.0 * other])

    def __mul__(self, factor: float) -> Operator:
        return Scaled(self, float(factor))

    __rmul__ = __mul__

    def __neg__(self) -> Operator:
        return Scaled(self, -1.0)

    def __truediv__(self, factor: float) -> Operator:
        return Scaled(self, 1 / float(factor))

    # -- conversions --

    def to_dense(self) -> Tensor:
        """Return the matrix, ``[m, n]``, by products with unit vectors."""
        # Some unit vectors at a time, as an operator may need memory for every column.
        identity = torch.eye(self.shape[1], dtype=self.dtype, device=self.device)
        columns = []
        with task("Columns of the matrix", self.shape[1], "columns") as done:
            for vectors in identity.split(UNIT_VECTORS, 1):
                columns.append(self._apply(vectors))
                done.advance(vectors.shape[1])
        if not columns:
            return torch.zeros(self.shape, dtype=self.dtype, device=self.device)
        return torch.cat(columns, 1)

    def to_scipy(self) -> Any:
        """Return a ``scipy.sparse.linalg.LinearOperator``. Needs SciPy."""
        from scipy.sparse.linalg import LinearOperator

        def times(v: Any) -> Any:
            return self._numpy(self._apply, v)

        def times_transposed(v: Any) -> Any:
            return self._numpy(self._apply_transposed, v)

        dtype = torch.empty(0, dtype=self.dtype).numpy().dtype
        return LinearOperator(self.shape, times, times_transposed, times, dtype, times_transposed)

    def _numpy(self, apply: Apply, v: Any) -> Any:
        """Return a product with an array, ``[n]`` or ``[n, K]``, as an array."""
        # SciPy passes what it likes, of any dtype; the result has the operator's.
        columns = self._converted(torch.as_tensor(v).reshape(len(v), -1))
        return apply(columns).reshape(-1, *v.shape[1:]).cpu().numpy()


def product(a: Operator, b: Operator) -> Operator:
    """Return the map that applies ``b`` first; raises ``InputError`` where shapes do not fit."""
    return Product([a, b])


class Dense(Operator):
    """A matrix."""

    def __init__(self, matrix: Tensor, space: Space | None = None, symmetric: bool = False) -> None:
        self.matrix, self.space, self.symmetric = matrix, space, symmetric
        self.shape = (matrix.shape[0], matrix.shape[1])
        self.dtype, self.device = matrix.dtype, matrix.device

    def _apply(self, v: Tensor) -> Tensor:
        return self.matrix @ v

    def _apply_transposed(self, v: Tensor) -> Tensor:
        return self.matrix.mT @ v

    def to_dense(self) -> Tensor:
        return self.matrix


class Diagonal(Operator):
    """A diagonal matrix, by its entries ``[n]``."""

    symmetric = True

    def __init__(self, entries: Tensor, space: Space | None = None) -> None:
        self.entries, self.space = entries, space
        self.shape = (len(entries), len(entries))
        self.dtype, self.device = entries.dtype, entries.device

    def _apply(self, v: Tensor) -> Tensor:
        return self.entries[:, None] * v


class Transposed(Operator):
    """The transpose of another map; see ``Operator.T``."""

    def __init__(self, inner: Operator) -> None:
        self.inner, self.space = inner, inner.space
        self.shape = (inner.shape[1], inner.shape[0])
        self.dtype, self.device = inner.dtype, inner.device

    def _apply(self, v: Tensor) -> Tensor:
        return self.inner._apply_transposed(v)

    def _apply_transposed(self, v: Tensor) -> Tensor:
        return self.inner._apply(v)


class Sum(Operator):
    """A sum of maps of one shape; raises ``InputError`` where shapes differ."""

    def __init__(self, terms: Sequence[Operator]) -> None:
        self.terms, first = list(terms), terms[0]
        if any(term.shape != first.shape for term in terms):
            raise InputError(_shapes_do_not_fit("add", terms))
        self.shape, self.space = first.shape, first.space
        self.dtype, self.device = first.dtype, first.device
        self.symmetric = all(term.symmetric for term in terms)

    def _apply(self, v: Tensor) -> Tensor:
        return sum_of([t._apply(v) for t in self.terms])

    def _apply_transposed(self, v: Tensor) -> Tensor:
        return sum_of([t._apply_transposed(v) for t in self.terms])


class Scaled(Operator):
    """A map times a number."""

    def __init__(self, inner: Operator, factor: float) -> None:
        self.inner, self.factor = inner, factor
        self.symmetric, self.space = inner.symmetric, inner.space
        self.shape, self.dtype, self.device = inner.shape, inner.dtype, inner.device

    def _apply(self, v: Tensor) -> Tensor:
        return self.factor * self.inner._apply(v)

    def _apply_transposed(self, v: Tensor) -> Tensor:
        return self.factor * self.inner._apply_transposed(v)


class Product(Operator):
    """A product of maps, the last of which acts first; raises ``InputError`` where shapes do not
    fit.

    Never symmetric as far as is known here: a product of symmetric maps is not.
    """

    def __init__(self, factors: Sequence[Operator]) -> None:
        self.factors, first, last = list(factors), factors[0], factors[-1]
        if any(left.shape[1] != right.shape[0] for left, right in itertools.pairwise(factors)):
            raise InputError(_shapes_do_not_fit("multiply", factors))
        self.shape, self.space = (first.shape[0], last.shape[1]), first.space
        self.dtype, self.device = first.dtype, first.device

    def _apply(self, v: Tensor) -> Tensor:
        for factor in reversed(self.factors):
            v = factor._apply(v)
        return v

    def _apply_transposed(self, v: Tensor) -> Tensor:
        for factor in self.factors:
            v = factor._apply_transposed(v)
        return v


def _shapes_do_not_fit(what: str, operators: Sequence[Operator]) -> str:
    """Return the message for operators that cannot be added, or multiplied."""
    shapes = ", ".join(str(operator.shape) for operator in operators)
    return MSG_OPERATOR_SHAPES.format(what=what, shapes=shapes)
