"""Operators of this package for curvlinops, and operators of curvlinops for this package.

Both speak of the same matrix, so nothing is scaled: products are equal. curvlinops is imported when an operator is
handed to it; to take one of its operators it need not be.
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
    """A ``curvlinops`` ``PyTorchLinearOperator`` of the same matrix, for its estimators, inverses and compositions.

    It takes flat tensors, and lists of tensors in the order of the parameters where the operator has names. For linear
    systems note that by its defaults ``CGInverseLinearOperator`` stops early without saying so; ``GGN.solve`` raises.
    Raises ``ImportError`` where curvlinops is missing.
    """
    return _foreign()(operator)


def from_curvlinops(operator: Any, names: Iterable[str] | None = None) -> Operator:
    """An ``Operator`` of the same matrix, for ``unbatch.spectra``, compositions and dicts of tensors.

    ``names``: of the tensors that it acts on, in their order; a mapping by name will do. Raises ``InputError`` where
    there are not as many. What the operator itself does not get right stays so: through layer norm and batch norm in
    train mode, products of ``HessianLinearOperator`` (curvlinops 3.0) are not those of the Hessian.
    """
    return _Foreign(operator, None if names is None else _space(operator, list(names)))


def _space(operator: Any, names: Sequence[str]) -> Space:
    inside, outside = (
        [tuple(s) for s in shapes] for shapes in (operator._in_shape, operator._out_shape)
    )
    if inside != outside:
        raise InputError(MSG_TWO_SPACES.format(inside=inside, outside=outside))
    if len(set(names)) != len(inside):
        raise InputError(MSG_NAMES.format(shapes=inside, names=names))
    return Space(dict(zip(names, inside, strict=True)))


class _Foreign(Operator):
    """A curvlinops operator."""

    def __init__(self, inner: Any, space: Space | None) -> None:
        self.inner, self.space, self.symmetric = inner, space, bool(inner.SELF_ADJOINT)
        self.shape, self.dtype, self.device = tuple(inner.shape), inner.dtype, inner.device

    def _apply(self, v: Tensor) -> Tensor:
        product: Tensor = self.inner @ v
        return product.detach()

    def _apply_transposed(self, v: Tensor) -> Tensor:
        product: Tensor = self.inner.adjoint() @ v
        return product.detach()


@cache
def _foreign() -> type:
    base: Any = needed(
        "curvlinops._torch_base", "curvlinops", "curvlinops-for-pytorch"
    ).PyTorchLinearOperator

    class UnbatchLinearOperator(base):
        """An operator of unbatch."""

        def __init__(self, inner: Operator) -> None:
            self.inner, self.SELF_ADJOINT = inner, inner.symmetric
            rows, columns = (_shapes(inner, size) for size in inner.shape)
            super().__init__(columns, rows)

        def _matmat(self, X: list[Tensor]) -> list[Tensor]:
            columns = X[0].shape[-1]
            product = self.inner @ torch.cat([x.reshape(-1, columns) for x in X])
            parts = product.split(self._out_shape_flat)
            return [p.reshape(*s, columns) for p, s in zip(parts, self._out_shape, strict=True)]

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
    """Of the tensors on a side of that size: those of the parameters, or one vector."""
    shapes = list(operator.space.shapes.values()) if operator.space is not None else []
    return shapes if sum(map(math.prod, shapes)) == size and shapes else [(size,)]
