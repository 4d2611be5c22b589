"""What can be asked about the rows of a gradient.

A quantity is a frozen description. A *basic* one gives a collector, which is fed with row blocks,
one parameter and slice of samples at a time; a *derived* one is a few lines over the results of
others (``diagnostics.py``). To add one from outside the
package, write such a class; inside it, CONTRIBUTING says what else.

Legend: ``r_n`` row of sample n as it enters the loss, ``ḡ = Σ_n r_n`` the gradient (without the
part that does not pass through predictions), ``g_n = N·r_n``, so that ``ḡ`` is the mean of the
``g_n``; ``p`` parameter entry.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from unbatch.analysis.domain.ownership import Ownership
from unbatch.analysis.loss_weights import weights
from unbatch.autodiff.contractions.row_block import RowBlock
from unbatch.errors import MSG_HISTOGRAM, InputError
from unbatch.gradients.request import Request
from unbatch.gradients.results import ByParameter, Histograms, Rows, SquaredNormsByParameter
from unbatch.gradients.sources import Source
from unbatch.linalg.rows import Moments, real, vectors, widest


@dataclass(frozen=True)
class Label:
    """What rows are called. ``ownership``: that of the values in a loss that is a sum over
    samples.
    """

    by: str
    kind: str
    note: str = ""
    ownership: Mapping[int, Ownership] | None = None


@dataclass(frozen=True)
class About:
    """What a quantity may know of the question it is part of.

    ``shapes``: of the parameters, in their order. ``like``: a parameter, for dtype and device.
    ``out``: where the caller wants rows, by parameter. ``memory``: bytes that temporaries may take.
    """

    samples: int
    shapes: Mapping[str, tuple[int, ...]]
    label: Label
    source: Source
    like: Tensor
    out: Mapping[str, Tensor]
    memory: int

    @property
    def by(self) -> str:
        """Return the decomposition: "component", "copy" or "frozen"."""
        return self.label.by

    @property
    def kind(self) -> str:
        """Return what its rows are: "per-sample", "per-component", "per-copy" or "frozen"."""
        return self.label.kind

    @property
    def note(self) -> str:
        """Return what to keep in mind about the rows."""
        notes = (self.label.note, self.source.note)
        return "; ".join(note for note in notes if note)

    @property
    def weights(self) -> Tensor | None:
        """Return the weights ``w_n`` of the losses of samples, ``[N]``; None if unknown."""
        if self.label.ownership is None:
            return None
        return weights(self.source.context.graph, self.label.ownership, self.samples)

    def gradient(self) -> Mapping[str, Tensor]:
        """Return ``Σ_n r_n`` by parameter."""
        return self._gradient

    @cached_property
    def _gradient(self) -> Mapping[str, Tensor]:
        # Exact in any dtype, and given in the one in which sources take weights.
        ones = self.like.new_ones(self.samples, dtype=torch.float64)
        return self.weighted_sum(ones.to(real(self.like.dtype)))

    def weighted_sum(self, factors: Tensor) -> Mapping[str, Tensor]:
        """Return ``Σ_n c_n r_n`` by parameter.

        Asked by a quantity that is ``late``, it costs as much as a gradient; otherwise a forward
        pass more.
        """
        return self.source.weighted_sum(factors)

    def rest(self) -> Mapping[str, Tensor]:
        """Return the gradient that bypasses the predictions of samples, where there is any."""
        return self.source.rest()

    def result(self, tensors: Mapping[str, Tensor], cls: type[ByParameter] = ByParameter) -> Any:
        """Return tensors in the order of the parameters, labelled with what they were made of."""
        return cls(self.ordered(tensors), self.by, self.kind, self.note)

    def ordered(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return tensors in the order of the parameters."""
        return {name: tensors[name] for name in self.shapes}


def about_of(request: Request, source: Source, label: Label, out: Mapping[str, Tensor]) -> About:
    """Return what quantities may know of a request that is answered from ``source``."""
    parameters = list(request.parameters.values())
    like = parameters[0].detach().new_empty(0, dtype=widest(parameters))
    shapes = request.space.shapes
    return About(request.samples, shapes, label, source, like, out, request.memory)


class Quantity:
    """Something to ask about rows.

    ``moment``: it is a statistic over samples, and warns where samples depend on each other.
    ``late``: it needs a second pass, weighted sums after all row blocks; cotangents are retained
    until then.
    """

    moment = False
    late = False


class Basic(Quantity, ABC):
    """A quantity that is fed with row blocks.

    ``needs``: which method of a block it calls, so that rows are formed only if they must be.
    ``pairs``: it needs all rows of a parameter beside each other.
    """

    needs = "rows"
    pairs = False

    @abstractmethod
    def start(self, about: About) -> Collector:
        """Return a fresh collector."""


class Collector(ABC):
    """Takes the row blocks of every parameter, in any order, and gives the result."""

    def __init__(self, about: About) -> None:
        self.about = about

    @abstractmethod
    def take(self, name: str, block: RowBlock) -> None:
        """Take rows of one parameter for the samples ``block.where``.

        They are overwritten afterwards: copy what is kept.
        """

    @abstractmethod
    def finish(self) -> Any:
        """Return the result; called once, after the last block."""


class Derived(Quantity, ABC):
    """A function of other quantities."""

    @abstractmethod
    def bases(self) -> Sequence[Quantity]:
        """Return the quantities it is made from."""

    @abstractmethod
    def combine(self, about: About, *results: Any) -> Any:
        """Return the result, from those of the bases in their order."""


# --- rows, and numbers for each of them -----------------------------------------------------------


@dataclass(frozen=True)
class Gradients(Basic):
    """The rows themselves: a ``Rows``, ``[N, *param]`` for each parameter; with ``rest`` they sum
    to ``∇L``.
    """

    def start(self, about: About) -> Collector:
        return _Rows(about)


class _Rows(Collector):
    """All rows, in the caller's memory where there is some."""

    def __init__(self, about: About) -> None:
        super().__init__(about)
        self.rows: dict[str, Tensor] = dict(about.out)

    def take(self, name: str, block: RowBlock) -> None:
        rows = block.rows()
        first, last, _ = block.where.indices(self.about.samples)
        if name not in self.rows:
            if last - first == self.about.samples:  # all of them, in memory of their own
                self.rows[name] = rows
                return
            self.rows[name] = rows.new_empty(self.about.samples, *self.about.shapes[name])
        target = self.rows[name][block.where]
        # Where the caller gave memory, the rows may have been formed in it already.
        if target.data_ptr() != rows.data_ptr() or target.stride() != rows.stride():
            target.copy_(rows)

    def finish(self) -> Rows:
        about = self.about
        rows = about.ordered(self.rows)
        return Rows(rows, about.by, about.kind, about.note, about.weights, about.rest())


@dataclass(frozen=True)
class SquaredNorms(Basic):
    """Squared norms ``‖r_n‖²``: ``[N]`` for each parameter, and ``.total`` over all."""

    needs = "squared_norms"

    def start(self, about: About) -> Collector:
        return _PerSample(about, _squared_norms)


def _squared_norms(block: RowBlock) -> Tensor:
    return block.squared_norms()


class _PerSample(Collector):
    """One number for every sample and parameter; ``numbers_of`` takes a block to ``[k]``."""

    def __init__(self, about: About, numbers_of: Callable[[RowBlock], Tensor]) -> None:
        super().__init__(about)
        self.numbers_of = numbers_of
        self.numbers: dict[str, Tensor] = {}

    def take(self, name: str, block: RowBlock) -> None:
        numbers = self.numbers_of(block)
        # Samples that no block covers keep a zero.
        if name not in self.numbers:
            self.numbers[name] = numbers.new_zeros(self.about.samples)
        self.numbers[name][block.where] = numbers

    def finish(self) -> SquaredNormsByParameter:
        result: SquaredNormsByParameter = self.about.result(self.numbers, SquaredNormsByParameter)
        return result


@dataclass(frozen=True)
class Projections(Basic):
    """``⟨r_n, ḡ⟩``: ``[N]`` for each parameter, and ``.total`` over all."""

    def start(self, about: About) -> Collector:
        return _PerSample(about, _projections)


def _projections(block: RowBlock) -> Tensor:
    return vectors(block.rows()) @ vectors(block.total()[None])[0]


# --- sums over samples ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Total(Basic):
    """``ḡ = Σ_n r_n``: ``[*param]``; with the part that does not pass through predictions it is the
    gradient.
    """

    needs = "total"

    def start(self, about: About) -> Collector:
        return _Total(about)


class _Total(Collector):
    """The sum of all rows."""

    def __init__(self, about: About) -> None:
        super().__init__(about)
        self.totals: dict[str, Tensor] = {}

    def take(self, name: str, block: RowBlock) -> None:
        if name not in self.totals:  # any block knows the sum over all of them
            self.totals[name] = block.total()

    def finish(self) -> ByParameter:
        result: ByParameter = self.about.result(self.totals)
        return result


@dataclass(frozen=True)
class SumOfSquares(Basic):
    """``Σ_n r_n²``, entry by entry: ``[*param]``."""

    needs = "sum_of_squares"

    def start(self, about: About) -> Collector:
        return _SumOfSquares(about)


class _SumOfSquares(Collector):
    """``factor · Σ_n r_n²``."""

    def __init__(self, about: About, factor: float = 1) -> None:
        super().__init__(about)
        self.factor = factor
        self.sums: dict[str, Tensor] = {}

    def take(self, name: str, block: RowBlock) -> None:
        share = block.sum_of_squares()
        if name in self.sums:
            self.sums[name].add_(share)
        else:
            self.sums[name] = share

    def finish(self) -> ByParameter:
        if self.factor != 1:
            for total in self.sums.values():
                total.mul_(self.factor)
        result: ByParameter = self.about.result(self.sums)
        return result


@dataclass(frozen=True)
class SecondMoment(Basic):
    """``(1/N) Σ_n r_n²``, entry by entry: ``[*param]``."""

    moment = True
    needs = "sum_of_squares"

    def start(self, about: About) -> Collector:
        return _SumOfSquares(about, 1 / about.samples)


@dataclass(frozen=True)
class Variance(Basic):
    """``(1/N) Σ_n (r_n − ḡ/N)²``, entry by entry: ``[*param]``; taken around the mean, so never
    negative.

    That is BackPACK's ``variance`` (biased), in the squared scale of the loss.
    """

    moment = True
    needs = "scatter"

    def start(self, about: About) -> Collector:
        return _Scatter(about)


class _Scatter(Collector):
    """``Σ_n (r_n − mean)²``; rows that come in several slices are put together by ``Moments``."""

    def __init__(self, about: About) -> None:
        super().__init__(about)
        self.scatter: dict[str, Tensor] = {}
        self.moments: dict[str, Moments] = {}

    def take(self, name: str, block: RowBlock) -> None:
        # All rows at once may do without forming them; slices cannot, as each needs its mean.
        first, last, _ = block.where.indices(self.about.samples)
        if last - first == self.about.samples:
            self.scatter[name] = block.scatter()
            return
        moments = self.moments.setdefault(name, Moments())
        moments.add(block.rows())
        self.scatter[name] = moments.scatter

    def finish(self) -> ByParameter:
        for scatter in self.scatter.values():
            scatter.div_(self.about.samples)
        result: ByParameter = self.about.result(self.scatter)
        return result


# --- pairs of rows, and entries -------------------------------------------------------------------


@dataclass(frozen=True)
class Dots(Basic):
    """``⟨r_n, r_m⟩``, ``[N, N]``, over all parameters."""

    needs = "dots"
    pairs = True

    def start(self, about: About) -> Collector:
        return _Dots(about)


class _Dots(Collector):
    """The matrix, block by block: slices of a parameter are kept until their partners have come."""

    def __init__(self, about: About) -> None:
        super().__init__(about)
        # Inner products are real ones, of complex rows as well (``vectors``).
        self.total = about.like.new_zeros(
            about.samples, about.samples, dtype=real(about.like.dtype)
        )
        self.slices: dict[str, list[tuple[slice, Tensor]]] = {}

    def take(self, name: str, block: RowBlock) -> None:
        samples, where = self.about.samples, block.where
        if where.indices(samples)[:2] == (0, samples):
            self.total += block.dots()
            return
        # A slice meets itself, and every slice of the same parameter that came before.
        rows = block.coordinates()
        self.total[where, where] += rows @ rows.T
        earlier = self.slices.setdefault(name, [])
        for other, other_rows in earlier:
            cross = rows @ other_rows.T
            self.total[where, other] += cross
            self.total[other, where] += cross.T
        earlier.append((where, rows))
        # Complete: no later slice will need these, and they are as large as all rows.
        if sum(len(rows) for _, rows in earlier) == samples:
            del self.slices[name]

    def finish(self) -> Tensor:
        return self.total


@dataclass(frozen=True)
class Histogram(Basic):
    """How the entries of all ``g_n = N·r_n`` are distributed: counts for each parameter,
    ``[bins]``.

    ``N·r_n`` is what Cockpit's 1d gradient histogram counts for a mean loss (Schneider et al. 2021,
    section 2.3). Bins are even between ``low`` and ``high``; what lies beyond is in ``.outside``.
    """

    bins: int = 100
    low: float = -1.0
    high: float = 1.0

    def __post_init__(self) -> None:
        if self.bins < 1 or not self.low < self.high:
            raise InputError(MSG_HISTOGRAM.format(bins=self.bins, low=self.low, high=self.high))

    def start(self, about: About) -> Collector:
        return _Histogram(about, self)


class _Histogram(Collector):
    """Counts of entries inside the bins, and outside of them."""

    def __init__(self, about: About, bins: Histogram) -> None:
        super().__init__(about)
        self.bins = bins
        self.counts: dict[str, Tensor] = {}
        self.outside: dict[str, int] = {}

    def take(self, name: str, block: RowBlock) -> None:
        bins = self.bins
        # In the scale of one sample's own loss, as in Cockpit.
        entries = vectors(block.rows()).flatten() * self.about.samples
        inside = torch.histc(entries, bins.bins, bins.low, bins.high).long()
        if name in self.counts:
            self.counts[name] += inside
        else:
            self.counts[name], self.outside[name] = inside, 0
        self.outside[name] += entries.numel() - int(inside.sum())

    def finish(self) -> Histograms:
        about, bins = self.about, self.bins
        edges = torch.linspace(bins.low, bins.high, bins.bins + 1)
        counts = about.ordered(self.counts)
        return Histograms(counts, about.by, about.kind, about.note, edges, self.outside)


def is_moment(quantity: Quantity) -> bool:
    """Return whether a quantity, or one it is made from, is a statistic over samples."""
    if quantity.moment:
        return True
    return isinstance(quantity, Derived) and any(is_moment(base) for base in quantity.bases())
