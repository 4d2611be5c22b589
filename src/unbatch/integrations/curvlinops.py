"""Operators of this package for curvlinops, and operators of curvlinops for this package.

Both are the same matrix, so nothing is scaled: products are equal. curvlinops is imported when an
operator is handed to it; to take one of its operators it need not be.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from unbatch.errors import InputError
from unbatch.integrations import needed
from unbatch.linalg.operators import Operator
from unbatch.linalg.space import Space

MSG_NAMES = (
    "names= takes one name for every tensor that the operator acts on, {shapes}, as in "
    "`dict(model.named_parameters())`; got {names}."
)


MSG_TWO_SPACES = (
    "names= is for operators that map a space to itself; this one maps {inside} to {outside}."
)


Shapes = list[tuple[int, ...]]


def to_curvlinops(operator: Operator) -> Any:
    """Return a ``curvlinops`` ``PyTorchLinearOperator`` of the same matrix.

    For the estimators, inverses and compositions of curvlinops. It takes flat tensors, and lists of
    tensors in the order of the parameters where the operator has names. For linear systems note
    that by its defaults ``CGInverseLinearOperator`` stops early without saying so; ``GGN.solve``
    raises.

    Raises ``ImportError`` where curvlinops is missing.
    """
    return _operator_class()(operator)


def from_curvlinops(operator: Any, names: Iterable[str] | None = None) -> Operator:
    """Return an ``Operator`` of the same matrix, for ``unbatch.spectra`` and compositions.

    ``names``: of the tensors that it acts on, in their order, so that it takes dicts of them; a
    mapping by name will do. What the operator itself does not get right stays so: through layer
    norm and batch norm in train mode, products of ``HessianLinearOperator`` (curvlinops 3.0) are
    not those of the Hessian.

    Raises ``InputError`` where there are not as many names as tensors.
    """
    space = None
    if names is not None:
        space = _space(operator, list(names))
    return _OfCurvlinops(operator, space)


def _space(operator: Any, names: Sequence[str]) -> Space:
    inside: Shapes = list(map(tuple, operator._in_shape))
    outside: Shapes = list(map(tuple, operator._out_shape))
    if inside != outside:
        raise InputError(MSG_TWO_SPACES.format(inside=inside, outside=outside))
    if len(set(names)) != len(inside):
        # A name that comes twice would stand for two tensors.
        raise InputError(MSG_NAMES.format(shapes=inside, names=names))
    return Space(dict(zip(names, inside, strict=True)))


class _OfCurvlinops(Operator):
    """An operator of curvlinops."""

    def __init__(self, inner: Any, space: Space | None) -> None:
        self.inner = inner
        self.space = space
        self.symmetric = bool(inner.SELF_ADJOINT)
        self.shape = tuple(inner.shape)
        self.dtype = inner.dtype
        self.device = inner.device

    def _apply(self, v: Tensor) -> Tensor:
        product: Tensor = self.inner @ v
        return product.detach()

    def _apply_transposed(self, v: Tensor) -> Tensor:
        product: Tensor = self.inner.adjoint() @ v
        return product.detach()


@cache
def _operator_class() -> type:
    """Return the class of operators for curvlinops, once: it can be defined where that is there."""
    module = needed("curvlinops._torch_base", "curvlinops", "curvlinops-for-pytorch")
    base: Any = module.PyTorchLinearOperator

    class UnbatchLinearOperator(base):
        """An operator of unbatch."""

        def __init__(self, inner: Operator) -> None:
            self.inner = inner
            self.SELF_ADJOINT = inner.symmetric
            rows, columns = inner.shape
            # It maps a vector with as many entries as there are columns.
            super().__init__(_shapes(inner, columns), _shapes(inner, rows))

        def _matmat(self, X: list[Tensor]) -> list[Tensor]:
            # A tensor for each parameter, with the columns of the matrix along the last axis.
            columns = X[0].shape[-1]
            product = self.inner @ torch.cat([x.reshape(-1, columns) for x in X])
            parts = []
            rows = product.split(self._out_shape_flat)
            for part, shape in zip(rows, self._out_shape, strict=True):
                parts.append(part.reshape(*shape, columns))
            return parts

        def _adjoint(self) -> Any:
            return UnbatchLinearOperator(self.inner.T)

        @property
        def device(self) -> torch.device:
            return self.inner.device

        @property
        def dtype(self) -> torch.dtype:
            return self.inner.dtype

    return UnbatchLinearOperator


def _shapes(operator: Operator, size: int) -> Shapes:
    """Return the shapes of the tensors on a side of that size: of the parameters, or one vector."""
    if operator.space is not None:
        shapes = list(operator.space.shapes.values())
        if shapes and sum(map(math.prod, shapes)) == size:
            return shapes
    # A side without names, as that of the predictions of a Jacobian.
    return [(size,)]
