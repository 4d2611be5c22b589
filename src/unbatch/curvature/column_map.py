"""The factor ``V = Jᵀ S`` of the Gauss-Newton matrix as a linear map: products without columns."""

from __future__ import annotations

import torch
from torch import Tensor

from unbatch.autodiff.jvp import Linearised
from unbatch.capture.isolation import outside_inference_mode
from unbatch.curvature.hessian_root import HessianRoot
from unbatch.linalg.operators import Operator
from unbatch.linalg.space import Space
from unbatch.running.tasks import task


@outside_inference_mode("_apply", "_apply_transposed")
class ColumnMap(Operator):
    """``V``, ``[D, size]``: a vjp for each product from the left, a jvp for each from the right.

    ``like``: an operator of the same type and device.
    """

    def __init__(
        self, linearised: Linearised, root: HessianRoot, space: Space, like: Operator
    ) -> None:
        # The entries of ``V v`` have names, those of v have none: so no ``space`` on both sides.
        self.linearised, self.root, self.parameters = linearised, root, space
        self.shape = (space.size, root.size)
        self.dtype, self.device = like.dtype, like.device

    def _apply(self, v: Tensor) -> Tensor:
        columns = []
        with task("Columns of a matrix pulled back", v.shape[1]) as passes:
            for a in passes.over(v.T):
                columns.append(self._pull(a))
        return stacked(columns, v, self.shape[0])

    def _pull(self, a: Tensor) -> Tensor:
        """Return ``V a = Jᵀ (S a)``, ``[D]``."""
        cotangents = self.root.times(a)
        return self.parameters.flat(self.linearised.pull(cotangents, self.parameters.shapes))

    def _apply_transposed(self, v: Tensor) -> Tensor:
        columns = []
        with task("Columns of a matrix pushed forward", v.shape[1]) as passes:
            for column in passes.over(v.T):
                columns.append(self._push(column))
        return stacked(columns, v, self.shape[1])

    def _push(self, v: Tensor) -> Tensor:
        """Return ``Vᵀ v = Sᵀ (J v)``, ``[size]``."""
        tangents = self.linearised.push(self.parameters.named(v))
        return self.root.transposed_times(tangents)


def stacked(columns: list[Tensor], like: Tensor, size: int) -> Tensor:
    """Return vectors ``[size]`` as the columns of a matrix; ``[size, 0]`` for none."""
    if len(columns) == 1:
        return columns[0][:, None]  # a view: nothing is copied for a single vector
    if not columns:
        return like.new_zeros(size, 0)
    return torch.stack(columns, 1)
