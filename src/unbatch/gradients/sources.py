"""Where rows come from: the planned sweep over the recorded computation, or the model itself, run sample by sample.

A source knows the problem, its data and its plan, and hands out parts; it does not know what is asked about them.
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

CHUNK = (
    32 * 2**20
)  # bytes of rows that are formed at a time where none are kept: what a cache holds is reused fastest


Take = Callable[[str, RowBlock], None]


@dataclass
class Chunking:
    """How many samples at a time: ``needs`` are the methods of parts that are called, ``memory`` the budget."""

    needs: frozenset[str]
    memory: int
    keep: bool  # all rows are kept in the end
    pairs: bool
    late: bool = False  # weighted sums will be asked for when all parts are in

    def of(
        self, count: int, row: int, lean: frozenset[str] = frozenset(), portion: int = CHUNK
    ) -> list[slice]:
        """Slices of ``count`` samples whose rows take ``row`` bytes each, about ``portion`` at a time."""
        if self.needs <= lean or self.keep:
            return [slice(0, count)]
        size = max(1, min(count, min(self.memory, portion) // max(row, 1)))
        return [slice(i, min(i + size, count)) for i in range(0, count, size)]


class Source(ABC):
    """Where rows come from. ``note``: what to keep in mind about them; ``reason``: of the plan, in words."""

    setting: Context
    note = ""
    reason = "One sweep serves all samples."

    @abstractmethod
    def feed(
        self, plan: Chunking, take: Take, outs: Mapping[str, Tensor], given: Mapping[int, Tensor] | None = None,
        last: bool = True,
    ) -> None:  # fmt: skip
        """Hand out parts of all parameters that have any; together they cover every sample of each once.

        ``given``: other cotangents of the predictions than those of the loss; ``last``: nothing else will be asked.
        """

    @property
    @abstractmethod
    def loss(self) -> LossAt:
        """The loss at the predictions."""

    @abstractmethod
    def weighted_sum(self, weights: Tensor) -> dict[str, Tensor]:
        """``Σ_n c_n row_n`` by parameter."""

    @abstractmethod
    def sites(self) -> list[SitePlan]:
        """What is contracted how, for the plan."""

    @abstractmethod
    def pullbacks(self, plan: Chunking) -> tuple[int, int]:
        """Backward passes in all, and how many columns share one call."""

    @abstractmethod
    def rest(self) -> dict[str, Tensor]:
        """The gradient by ways that do not pass through predictions of samples."""
