"""What can be asked about the rows of a gradient: small classes fed with parts, one parameter and slice at a time.

A quantity is a frozen description; ``start`` gives the collector that is fed. A *basic* one takes parts, a *derived*
one is a few lines over the results of others (``diagnostics.py``). To add one, write such a class; nothing else needs
to know.

Legend: ``r_n`` row of sample n as it enters the loss, ``ḡ = Σ_n r_n`` the gradient (without the part that does not
pass through predictions), ``g_n = N·r_n``, so that ``ḡ`` is the mean of the ``g_n``; ``p`` parameter entry.
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
from unbatch.linalg.rows import Moments, real, vectors, wide


@dataclass(frozen=True)
class Label:
    """What rows are called. ``marks``: of the values in a loss that is a sum over samples."""

    by: str
    kind: str
    note: str = ""
    marks: Mapping[int, Ownership] | None = None


@dataclass(frozen=True)
class About:
    """What a quantity may know of the question it is part of.

    ``like``: a parameter, for type and device. ``out``: buffers for rows that the caller gave.
    ``memory``: bytes that temporaries may take.
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
        return self.label.by

    @property
    def kind(self) -> str:
        return self.label.kind

    @property
    def note(self) -> str:
        return "; ".join(filter(None, (self.label.note, self.source.note)))

    @property
    def weights(self) -> Tensor | None:
        """Return the weights ``w_n`` of the losses of samples, ``[N]``, where they can be read off."""
        if self.label.marks is None:
            return None
        return weights(self.source.setting.graph, self.label.marks, self.samples)

    def gradient(self) -> Mapping[str, Tensor]:
        """Return ``Σ_n r_n`` by parameter."""
        return self._gradient

    @cached_property
    def _gradient(self) -> Mapping[str, Tensor]:
        ones = self.like.new_ones(self.samples, dtype=torch.float64)
        return self.weighted_sum(ones.to(real(self.like.dtype)))

    def weighted_sum(self, factors: Tensor) -> Mapping[str, Tensor]:
        """Return ``Σ_n c_n r_n`` by parameter.

        It costs as much as a gradient beside a quantity that is ``late``.
        """
        return self.source.weighted_sum(factors)

    def rest(self) -> Mapping[str, Tensor]:
        """Return the gradient by ways that do not pass through predictions of samples."""
        return self.source.rest()

    def result(self, tensors: Mapping[str, Tensor], cls: type[ByParameter] = ByParameter) -> Any:
        """The same tensors in the order of the parameters, labelled with what they were made of."""
        return cls({n: tensors[n] for n in self.shapes}, self.by, self.kind, self.note)


def about_of(request: Request, source: Source, label: Label, out: Mapping[str, Tensor]) -> About:
    """Return what quantities may know of a request that is answered from ``source``."""
    like = next(iter(request.parameters.values())).detach()
    shapes = request.space.shapes
    return About(request.samples, shapes, label, source, like, out, request.memory)


class Quantity:
    """Something to ask about rows. ``moment``: it is a statistic over samples, and warns where samples mix.

    ``late``: it asks for weighted sums when all parts are in, and what they take is kept for it.
    """

    moment = False
    late = False


class Basic(Quantity, ABC):
    """Fed with parts. ``needs``: which method of a part it calls, so that rows are formed only if they must be."""

    needs = "rows"
    pairs = False  # needs all rows of a parameter beside each other

    @abstractmethod
    def start(self, about: About) -> Collector:
        """A fresh collector."""


class Collector(ABC):
    """Takes the parts of every parameter, in any order, and gives the result."""

    def __init__(self, about: About) -> None:
        self.about = about

    @abstractmethod
    def take(self, name: str, part: RowBlock) -> None:
        """Rows of one parameter for the samples ``part.where``; overwritten afterwards, so copy what you keep."""

    @abstractmethod
    def finish(self) -> Any:
        """The result."""


class Derived(Quantity, ABC):
    """A function of other quantities."""

    @abstractmethod
    def bases(self) -> Sequence[Quantity]:
        """What it is made from."""

    @abstractmethod
    def combine(self, about: About, *results: Any) -> Any:
        """The result, from those of the bases in their order."""


# --- those that take parts ------------------------------------------------------------------------


@dataclass(frozen=True)
class Gradients(Basic):
    """The rows themselves: a ``Rows``, ``[N, *param]`` for each parameter; with ``rest`` they sum to ``∇L``."""

    def start(self, about: About) -> Collector:
        return _Rows(about)


class _Rows(Collector):
    def __init__(self, about: About) -> None:
        super().__init__(about)
        self.rows: dict[str, Tensor] = dict(about.out)

    def take(self, name: str, part: RowBlock) -> None:
        rows = part.rows()
        first, last, _ = part.where.indices(self.about.samples)
        if name not in self.rows and last - first == self.about.samples:
            self.rows[name] = rows
            return
        if name not in self.rows:
            self.rows[name] = rows.new_empty(self.about.samples, *self.about.shapes[name])
        target = self.rows[name][part.where]
        if target.data_ptr() != rows.data_ptr() or target.stride() != rows.stride():
            target.copy_(rows)

    def finish(self) -> Rows:
        about = self.about
        ordered = {n: self.rows[n] for n in about.shapes}
        return Rows(ordered, about.by, about.kind, about.note, about.weights, about.rest())


@dataclass(frozen=True)
class SquaredNorms(Basic):
    """Squared norms ``‖r_n‖²``: ``[N]`` for each parameter, and ``.total`` over all."""

    needs = "squared_norms"

    def start(self, about: About) -> Collector:
        return _PerSample(about, lambda name, part: part.squared_norms())


class _PerSample(Collector):
    """One number for every sample and parameter."""

    def __init__(self, about: About, number: Callable[[str, RowBlock], Tensor]) -> None:
        super().__init__(about)
        self.number = number
        self.found: dict[str, Tensor] = {}

    def take(self, name: str, part: RowBlock) -> None:
        numbers = self.number(name, part)
        if name not in self.found:
            self.found[name] = numbers.new_zeros(self.about.samples)
        self.found[name][part.where] = numbers

    def finish(self) -> SquaredNormsByParameter:
        result: SquaredNormsByParameter = self.about.result(self.found, SquaredNormsByParameter)
        return result


@dataclass(frozen=True)
class Projections(Basic):
    """``⟨r_n, ḡ⟩``: ``[N]`` for each parameter, and ``.total`` over all."""

    def start(self, about: About) -> Collector:
        return _PerSample(
            about, lambda _, part: vectors(part.rows()) @ vectors(part.total()[None])[0]
        )


@dataclass(frozen=True)
class Total(Basic):
    """``ḡ = Σ_n r_n``: ``[*param]``; with the part that does not pass through predictions it is the gradient."""

    needs = "total"

    def start(self, about: About) -> Collector:
        return _Total(about)


class _Total(Collector):
    def __init__(self, about: About) -> None:
        super().__init__(about)
        self.found: dict[str, Tensor] = {}

    def take(self, name: str, part: RowBlock) -> None:
        if name not in self.found:
            self.found[name] = part.total()

    def finish(self) -> ByParameter:
        result: ByParameter = self.about.result(self.found)
        return result


@dataclass(frozen=True)
class SumOfSquares(Basic):
    """``Σ_n r_n²``, entry by entry: ``[*param]``."""

    needs = "sum_of_squares"

    def start(self, about: About) -> Collector:
        return _PerEntry(about, lambda name, part: part.sum_of_squares())


class _PerEntry(Collector):
    """A sum over samples of something that each has for every entry of a parameter."""

    def __init__(
        self, about: About, share: Callable[[str, RowBlock], Tensor], factor: float = 1
    ) -> None:
        super().__init__(about)
        self.share, self.factor = share, factor
        self.found: dict[str, Tensor] = {}

    def take(self, name: str, part: RowBlock) -> None:
        share = self.share(name, part)
        self.found[name] = self.found[name].add_(share) if name in self.found else share

    def finish(self) -> ByParameter:
        for t in self.found.values() if self.factor != 1 else ():
            t.mul_(self.factor)
        result: ByParameter = self.about.result(self.found)
        return result


@dataclass(frozen=True)
class SecondMoment(Basic):
    """``(1/N) Σ_n r_n²``, entry by entry: ``[*param]``."""

    moment = True
    needs = "sum_of_squares"

    def start(self, about: About) -> Collector:
        return _PerEntry(about, lambda name, part: part.sum_of_squares(), 1 / about.samples)


@dataclass(frozen=True)
class Variance(Basic):
    """``(1/N) Σ_n (r_n − ḡ/N)²``, entry by entry: ``[*param]``; taken around the mean, so never negative.

    That is BackPACK's ``variance`` (biased), in the squared scale of the loss.
    """

    moment = True
    needs = "scatter"

    def start(self, about: About) -> Collector:
        return _Scatter(about)


class _Scatter(Collector):
    """``Σ_n (r_n − mean)²``, put together from slices, each around a mean of its own (Chan, Golub, LeVeque 1979)."""

    def __init__(self, about: About) -> None:
        super().__init__(about)
        self.scatter: dict[str, Tensor] = {}
        self.moments: dict[str, Moments] = {}  # of parameters whose rows come in several slices

    def take(self, name: str, part: RowBlock) -> None:
        first, last, _ = part.where.indices(self.about.samples)
        if last - first == self.about.samples:
            self.scatter[name] = part.scatter()
            return
        moments = self.moments.setdefault(name, Moments())
        moments.add(part.rows())
        self.scatter[name] = moments.scatter

    def finish(self) -> ByParameter:
        for t in self.scatter.values():
            t.div_(self.about.samples)
        result: ByParameter = self.about.result(self.scatter)
        return result


@dataclass(frozen=True)
class Dots(Basic):
    """``⟨r_n, r_m⟩``, ``[N, N]``, over all parameters."""

    needs = "dots"
    pairs = True

    def start(self, about: About) -> Collector:
        return _Dots(about)


class _Dots(Collector):
    def __init__(self, about: About) -> None:
        super().__init__(about)
        self.total = wide(about.like.new_zeros(about.samples, about.samples)).clone()
        self.waiting: dict[str, list[tuple[slice, Tensor]]] = {}

    def take(self, name: str, part: RowBlock) -> None:
        n = self.about.samples
        here = part.where
        if here.indices(n)[:2] == (0, n):
            self.total += part.dots()
            return
        rows = part.coordinates()
        self.total[here, here] += rows @ rows.T
        for there, other in self.waiting.setdefault(name, []):
            cross = rows @ other.T
            self.total[here, there] += cross
            self.total[there, here] += cross.T
        self.waiting[name].append((here, rows))
        if sum(len(r) for _, r in self.waiting[name]) == n:
            del self.waiting[name]

    def finish(self) -> Tensor:
        return self.total


@dataclass(frozen=True)
class Histogram(Basic):
    """How the entries of all ``g_n = N·r_n`` are distributed: counts for each parameter, ``[bins]``.

    ``N·r_n`` is what Cockpit's 1d gradient histogram counts for a mean loss (Schneider et al. 2021, section 2.3). Bins
    are even between ``low`` and ``high``; what lies beyond is in ``.outside``.
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
    def __init__(self, about: About, asked: Histogram) -> None:
        super().__init__(about)
        self.asked = asked
        self.counts: dict[str, Tensor] = {}
        self.outside: dict[str, int] = {}

    def take(self, name: str, part: RowBlock) -> None:
        asked = self.asked
        entries = vectors(part.rows()).flatten() * self.about.samples
        inside = torch.histc(entries, asked.bins, asked.low, asked.high).long()
        before = self.counts.get(name)
        self.counts[name] = inside if before is None else before + inside
        self.outside[name] = self.outside.get(name, 0) + entries.numel() - int(inside.sum())

    def finish(self) -> Histograms:
        asked = self.asked
        result: Histograms = self.about.result(self.counts, Histograms)
        result.edges = torch.linspace(asked.low, asked.high, asked.bins + 1)
        result.outside = self.outside
        return result


def is_moment(quantity: Quantity) -> bool:
    """It, or something it is made from, is a statistic over samples."""
    below = quantity.bases() if isinstance(quantity, Derived) else ()
    return quantity.moment or any(is_moment(b) for b in below)
