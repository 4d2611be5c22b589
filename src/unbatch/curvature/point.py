"""Where a Gauss-Newton matrix is taken: the question, the curvature there, whether it is stale.

The matrix itself is in ``ggn.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from unbatch.curvature.ggn_quantities import ColumnQuantity, evaluate
from unbatch.curvature.gram import Gram, groups_in_memory
from unbatch.curvature.strategy import Curvature
from unbatch.errors import (
    MSG_GGN_STALE,
    MSG_NO_SNAPSHOT,
    NO_SNAPSHOT_OF_LOSS,
    StaleError,
    StructureError,
)
from unbatch.gradients.request import Request, recorded_precision
from unbatch.gradients.sources import Source
from unbatch.linalg.rows import sum_of
from unbatch.running.tasks import task


@dataclass(frozen=True)
class Point:
    """The parameters and the batch at which a matrix is taken, and what is computed there.

    ``stale``: whether these have changed since.
    """

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
    def entries(self) -> int:
        """Return ``NC``: entries of all outputs that the second derivative of the loss is of."""
        return self.curvature.entries

    def restricted(self, names: Sequence[str]) -> Point:
        """Return the same for some of the parameters."""
        parameters = {name: p for name, p in self.parameters.items() if name in names}
        return replace(self, request=self.request.of(parameters))

    @property
    def is_snapshot(self) -> bool:
        """Return whether it has copies of all that it is computed from."""
        return self.request.context.alone

    def snapshot(self) -> Point:
        """Return the same on copies of parameters, buffers and data, which is never stale.

        Raises ``StaleError``, and ``StructureError`` where the program itself would have to be run.
        """
        self.check_fresh()
        difference = self.request.replay_difference
        with recorded_precision():
            if not difference and not self.curvature.loss.is_as_replayed():
                difference = NO_SNAPSHOT_OF_LOSS
            if difference:
                raise StructureError(MSG_NO_SNAPSHOT.format(why=difference))
            request = self.request.on_copies()
            return Point(request, Curvature(request), lambda: False)

    def check_fresh(self) -> None:
        """Raise ``StaleError`` where parameters or data have changed."""
        if self.stale():
            raise StaleError(MSG_GGN_STALE)

    # -- columns --

    def source(self, compressed: bool = False) -> Source:
        """Return where columns come from; H is then known from the forward pass these need.

        ``compressed``: they go by way of batch statistics whatever is counted.
        """
        self.check_fresh()
        with torch.no_grad(), recorded_precision():
            source = self.curvature.source(self.request)
            # H belongs to the whole question: a pass of all parameters knows it, too.
            if self.parameters.keys() == self.curvature.request.parameters.keys():
                self.curvature.share_forward(source, False, compressed)
            return source

    def evaluate(self, quantity: ColumnQuantity, source: Source) -> Any:
        """Return the result of a quantity of the columns, fed from ``source``."""
        with torch.no_grad(), recorded_precision():
            return evaluate(self.curvature, source, quantity, self.parameters)

    def gram(self, quantity: Gram, source: Source) -> Tensor:
        """Return ``VᵀV`` in float64.

        As a sum over groups of parameters, where memory does not hold the columns of all.
        """
        columns = quantity.root.size
        groups = groups_in_memory(self.parameters, columns, self.request.memory)
        if len(groups) == 1:
            result: Tensor = self.evaluate(quantity, source)
            return result.double()
        shares = []
        with task("Gram matrix of some parameters at a time", len(groups), "groups") as parts:
            for group in parts.over(groups):
                # A sweep for each group: in time what is saved in memory.
                with torch.no_grad(), recorded_precision():
                    rows_of_group = self.curvature.source(self.request.of(group))
                    shares.append(evaluate(self.curvature, rows_of_group, quantity, group))
        return sum_of(shares).double()
