"""Linear maps between spaces of vectors, known by what they do: an abstract base, and maps composed of others.

No networks here. Vectors are flat, ``[n]`` or ``[n, K]``, or dicts of named tensors where a map has a ``space``.
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from unbatch.errors import MSG_OPERATOR_SHAPES, MSG_OPERATOR_VECTOR, InputError
from unbatch.linalg.rows import sum_of
from unbatch.linalg.space import Space


class Operator(ABC):
    """A linear map of shape ``[m, n]``; products with vectors, matrices and dicts of tensors.

    A concrete one has ``shape``, ``dtype``, ``device``, and ``_apply``; ``_apply_transposed`` if it is not symmetric.
    ``space``: names and shapes of the entries, on both sides, where there are any.
    """

    shape: tuple[int, int]
    dtype: torch.dtype
    device: torch.device
    space: Space | None = None
    symmetric: bool = False

    @abstractmethod
    def _apply(self, v: Tensor) -> Tensor:
        """``[n, K]`` to ``[m, K]``."""

    def _apply_transposed(self, v: Tensor) -> Tensor:
        """``[m, K]`` to ``[n, K]``."""
        if not self.symmetric:
            raise NotImplementedError(
                f"{type(self).__name__} is known by its products from the left only."
            )
        return self._apply(v)

    # -- products --

    def __matmul__(self, other: Any) -> Any:
        """``A @ v``: a tensor ``[m]`` for ``[n]``, ``[m, K]`` for ``[n, K]``, a dict for a dict; an operator for one.

        Raises ``InputError`` where shapes do not fit.
        """
        return (
            product(self, other)
            if isinstance(other, Operator)
            else self._times(other, self.shape[1], self._apply)
        )

    def __rmatmul__(self, other: Any) -> Any:
        """``v @ A`` for ``[m]``, ``[K, m]``, or a dict."""
        if isinstance(other, Tensor) and other.ndim == 2:
            return self._times(other.T, self.shape[0], self._apply_transposed).T
        return self._times(other, self.shape[0], self._apply_transposed)

    def _times(self, v: Any, size: int, apply: Any) -> Any:
        if isinstance(v, Mapping):
            if self.space is None:
                raise InputError(
                    MSG_OPERATOR_VECTOR.format(got="a dict", size=size, what="it has no names")
                )
            return self.space.named(apply(self._fitting(self.space.flat(v))[:, None])[:, 0])
        if not isinstance(v, Tensor) or v.ndim not in (1, 2) or v.shape[0] != size:
            got = (
                f"a tensor of shape {tuple(v.shape)}" if isinstance(v, Tensor) else type(v).__name__
            )
            what = (
                "dicts by name are understood, too"
                if self.space is not None
                else "nothing else is understood"
            )
            raise InputError(MSG_OPERATOR_VECTOR.format(got=got, size=size, what=what))
        v = self._fitting(v)
        return apply(v) if v.ndim == 2 else apply(v[:, None])[:, 0]

    def _fitting(self, v: Tensor) -> Tensor:
        return v.detach().to(self.device, self.dtype)

    @property
    def T(self) -> Operator:
        return self if self.symmetric else Transposed(self)

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

    # -- out of here --

    def to_dense(self) -> Tensor:
        """``[m, n]``, by products with unit vectors."""
        columns = [
            self._apply(e)
            for e in torch.eye(self.shape[1], dtype=self.dtype, device=self.device).split(32, 1)
        ]
        return (
            torch.cat(columns, 1)
            if columns
            else torch.zeros(self.shape, dtype=self.dtype, device=self.device)
        )

    def to_scipy(self) -> Any:
        """A ``scipy.sparse.linalg.LinearOperator``. Needs SciPy."""
        from scipy.sparse.linalg import LinearOperator

        def numbers(apply: Any) -> Any:
            return lambda v: (
                apply(self._fitting(torch.as_tensor(v).reshape(len(v), -1)))
                .reshape(-1, *v.shape[1:])
                .cpu()
                .numpy()
            )

        dtype = torch.empty(0, dtype=self.dtype).numpy().dtype
        forward, back = numbers(self._apply), numbers(self._apply_transposed)
        return LinearOperator(self.shape, forward, back, forward, dtype, back)


def product(a: Operator, b: Operator) -> Operator:
    return Product([a, b])


class Dense(Operator):
    """A matrix."""

    def __init__(self, matrix: Tensor, space: Space | None = None, symmetric: bool = False) -> None:
        self.matrix, self.space, self.symmetric = matrix, space, symmetric
        self.shape, self.dtype, self.device = (
            (matrix.shape[0], matrix.shape[1]),
            matrix.dtype,
            matrix.device,
        )

    def _apply(self, v: Tensor) -> Tensor:
        return self.matrix @ v

    def _apply_transposed(self, v: Tensor) -> Tensor:
        return self.matrix.mT @ v

    def to_dense(self) -> Tensor:
        return self.matrix


class Diagonal(Operator):
    symmetric = True

    def __init__(self, entries: Tensor, space: Space | None = None) -> None:
        self.entries, self.space = entries, space
        self.shape, self.dtype, self.device = (
            (len(entries), len(entries)),
            entries.dtype,
            entries.device,
        )

    def _apply(self, v: Tensor) -> Tensor:
        return self.entries[:, None] * v


class Transposed(Operator):
    def __init__(self, inner: Operator) -> None:
        self.inner, self.space = inner, inner.space
        self.shape, self.dtype, self.device = (
            (inner.shape[1], inner.shape[0]),
            inner.dtype,
            inner.device,
        )

    def _apply(self, v: Tensor) -> Tensor:
        return self.inner._apply_transposed(v)

    def _apply_transposed(self, v: Tensor) -> Tensor:
        return self.inner._apply(v)


class Sum(Operator):
    def __init__(self, terms: Sequence[Operator]) -> None:
        self.terms, first = list(terms), terms[0]
        if any(t.shape != first.shape for t in terms):
            raise InputError(
                MSG_OPERATOR_SHAPES.format(
                    what="add", shapes=", ".join(str(t.shape) for t in terms)
                )
            )
        self.shape, self.dtype, self.device, self.space = (
            first.shape,
            first.dtype,
            first.device,
            first.space,
        )
        self.symmetric = all(t.symmetric for t in terms)

    def _apply(self, v: Tensor) -> Tensor:
        return sum_of([t._apply(v) for t in self.terms])

    def _apply_transposed(self, v: Tensor) -> Tensor:
        return sum_of([t._apply_transposed(v) for t in self.terms])


class Scaled(Operator):
    def __init__(self, inner: Operator, factor: float) -> None:
        self.inner, self.factor, self.symmetric, self.space = (
            inner,
            factor,
            inner.symmetric,
            inner.space,
        )
        self.shape, self.dtype, self.device = inner.shape, inner.dtype, inner.device

    def _apply(self, v: Tensor) -> Tensor:
        return self.factor * self.inner._apply(v)

    def _apply_transposed(self, v: Tensor) -> Tensor:
        return self.factor * self.inner._apply_transposed(v)


class Product(Operator):
    def __init__(self, factors: Sequence[Operator]) -> None:
        self.factors = list(factors)
        shapes = [f.shape for f in factors]
        if any(a[1] != b[0] for a, b in itertools.pairwise(shapes)):
            raise InputError(
                MSG_OPERATOR_SHAPES.format(what="multiply", shapes=", ".join(map(str, shapes)))
            )
        self.shape = (shapes[0][0], shapes[-1][1])
        self.dtype, self.device, self.space = factors[0].dtype, factors[0].device, factors[0].space

    def _apply(self, v: Tensor) -> Tensor:
        for factor in reversed(self.factors):
            v = factor._apply(v)
        return v

    def _apply_transposed(self, v: Tensor) -> Tensor:
        for factor in self.factors:
            v = factor._apply_transposed(v)
        return v
