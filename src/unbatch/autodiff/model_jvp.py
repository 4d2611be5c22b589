"""The predictions as a linear map of the parameters, by the model itself.

Where the recording has other derivatives than the model (``jvp.py`` has the same of the recording).
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from functools import cached_property
from typing import final

import torch
from torch import Tensor

from unbatch.autodiff import eager
from unbatch.autodiff.adjoint import AdjointTest, Columns
from unbatch.autodiff.autograd import detached, or_zeros, pick, zero_leaves
from unbatch.autodiff.context import Context
from unbatch.autodiff.dependence import within
from unbatch.autodiff.jvp import COLUMNS, NO_WAY, TWICE, Linearised, bytes_of
from unbatch.errors import MSG_NO_TANGENT, StructureError


@final
class LinearisedModel(Linearised):
    """The model itself, run when this is made.

    Tangents are pushed by double backward where that belongs to its backward pass: a function may
    leave no graph for it. Else, by the rows of J.
    """

    def __init__(self, context: Context, parameters: Mapping[str, Tensor]) -> None:
        ran = eager.run(context, parameters, twice=True)
        self.context = context
        self.leaves, self.outputs, self.inner = dict(parameters), ran.outputs, ran.inner
        self.all_outputs = detached(ran.values)
        self._differentiated = ran.differentiated

    def pull(
        self, cotangents: Mapping[int, Tensor], names: Iterable[str] | None = None
    ) -> dict[str, Tensor]:
        """Return ``Jᵀ u``, by parameter (some of them, by name)."""
        with self._differentiated():
            return self._pulled(cotangents, names)

    def push(self, tangents: Mapping[str, Tensor]) -> dict[int, Tensor]:
        """Return ``J v``, by prediction.

        Raises ``StructureError`` where the backward pass is not finite on any batch.
        """
        typed = self._typed(tangents)
        if self.way == COLUMNS:
            return self._columns.push(typed)
        return self._push_twice(typed)

    # -- which way --

    @property
    def _key(self) -> Hashable:
        return tuple(self.leaves), "model"

    def _on(self, other: Context) -> LinearisedModel:
        return LinearisedModel(other, self.leaves)

    def _way(self) -> str | None:
        test = AdjointTest.of(self.pull, self.leaves, self.outputs, self.context.rounding)
        if test is None:
            return None
        try:
            agrees = test.agrees(self._push_twice(test.v))
        except (NotImplementedError, RuntimeError):
            agrees = False  # not differentiable twice
        if agrees:
            return TWICE
        if test.agrees(self._columns.push(test.v)):
            return COLUMNS
        if agrees is None:
            return None
        raise StructureError(MSG_NO_TANGENT.format(place="the model", error=NO_WAY))

    # -- by double backward --

    @cached_property
    def _transposed(self) -> tuple[dict[str, Tensor], list[Tensor]]:
        """``Jᵀ w`` by parameter, as a function of ``w`` (which is the second), at zero."""
        ends, leaves = list(self.outputs.values()), list(self.leaves.values())
        ws = zero_leaves(ends)
        with self._differentiated(), torch.enable_grad():
            grads = torch.autograd.grad(ends, leaves, ws, create_graph=True, allow_unused=True)
        by_name = zip(self.leaves, grads, strict=True)
        return {n: g for n, g in by_name if g is not None and g.requires_grad}, ws

    def _push_twice(self, tangents: Mapping[str, Tensor]) -> dict[int, Tensor]:
        """Return ``J v`` as the derivative of ``⟨Jᵀw, v⟩`` by ``w``."""
        pulled, ws = self._transposed
        names = within(pulled, tangents)
        ends, vs = pick(pulled, names), pick(tangents, names)
        grads: Sequence[Tensor | None] = [None] * len(ws)
        if ends:
            with self._differentiated():
                grads = torch.autograd.grad(ends, ws, vs, retain_graph=True, allow_unused=True)
        like = detached(self.outputs).values()
        return dict(zip(self.outputs, or_zeros(grads, like), strict=True))

    # -- by the rows of J --

    @cached_property
    def _columns(self) -> Columns:
        def pull(i: int, units: Tensor) -> dict[str, Tensor]:
            rows = [self.pull({i: unit.clone()}) for unit in units]
            return {name: torch.stack([row[name] for row in rows]) for name in self.leaves}

        return Columns(self.predictions, pull, bytes_of(self.leaves))
