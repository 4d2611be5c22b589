"""Where rows of the gradient come from: the contract of a source, and how its rows are cut into
chunks.

A source knows the problem, its data and its backward plan, and hands out row blocks; it does not
know what is asked about them. The two kinds are in ``replayed_rows.py`` and ``eager_rows.py``;
which one answers a question is decided in ``request.py``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from unbatch.autodiff.context import Context
from unbatch.autodiff.contractions.row_block import RowBlock
from unbatch.autodiff.loss import LossAt
from unbatch.gradients.plan import SitePlan

# Bytes of rows that are formed at a time where none are kept: what a cache holds is reused fastest.
CHUNK = 32 * 2**20

# Receives the name of a parameter and a block of its rows.
Take = Callable[[str, RowBlock], None]


def slices_of(count: int, size: int) -> list[slice]:
    """Return slices of at most ``size`` that cover ``count`` samples."""
    return [slice(first, min(first + size, count)) for first in range(0, count, size)]


@dataclass
class Chunking:
    """How many samples at a time: ``needs`` are the methods of blocks that are called, ``memory``
    the budget.
    """

    needs: frozenset[str]
    memory: int
    keep: bool  # all rows are kept in the end
    pairs: bool  # all rows of a parameter are needed beside each other
    late: bool = False  # weighted sums will be asked for when all blocks are in

    def of(
        self, count: int, row: int, lean: frozenset[str] = frozenset(), portion: int = CHUNK
    ) -> list[slice]:
        """Return slices of ``count`` samples whose rows take ``row`` bytes each, ``portion`` at a
        time.

        One slice where no rows are formed (all that is needed is in ``lean``), or all are kept
        anyway.
        """
        if self.needs <= lean or self.keep:
            return [slice(0, count)]
        fitting = min(self.memory, portion) // max(row, 1)
        # One sample at a time at least, whatever the budget: a row cannot be cut.
        size = max(1, min(count, fitting))
        return slices_of(count, size)


class Source(ABC):
    """Where rows come from.

    ``note``: what to keep in mind about the rows; ``reason``: why this source, in words, for the
    plan.
    """

    context: Context
    note = ""
    reason = "One backward pass serves all samples."

    @abstractmethod
    def feed(
        self,
        chunks: Chunking,
        take: Take,
        outs: Mapping[str, Tensor],
        cotangents: Mapping[int, Tensor] | None = None,
        last: bool = True,
    ) -> None:
        """Hand out blocks of all parameters that have any; together they cover every sample once.

        ``outs``: where rows are to be written, by parameter; ``cotangents``: those of the
        predictions, if not of the loss; ``last``: nothing else will be asked, so that nothing need
        be kept.
        """

    @property
    @abstractmethod
    def loss(self) -> LossAt:
        """Return the loss at the predictions."""

    @abstractmethod
    def weighted_sum(self, weights: Tensor) -> dict[str, Tensor]:
        """Return ``Σ_n c_n row_n`` by parameter, for weights ``c`` ``[N]``."""

    @abstractmethod
    def sites(self) -> list[SitePlan]:
        """Return what is contracted how, for the plan."""

    @abstractmethod
    def pullbacks(self, chunks: Chunking) -> tuple[int, int]:
        """Return how many backward passes there are in all, and how many columns share one call."""

    @abstractmethod
    def rest(self) -> dict[str, Tensor]:
        """Return the gradient that bypasses the predictions of samples, if there is any."""
