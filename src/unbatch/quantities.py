"""What can be asked about the rows of a gradient: small classes fed with parts, one parameter and slice at a time.

A quantity is a frozen description; ``start`` gives the collector that is fed. A *basic* one takes parts, a *derived*
one is a few lines over the results of others. To add one, write such a class; nothing else needs to know.

Legend: ``r_n`` row of sample n as it enters the loss, ``ḡ = Σ_n r_n`` the gradient (without the part that does not
pass through predictions), ``g_n = N·r_n``, so that ``ḡ`` is the mean of the ``g_n``; ``p`` parameter entry.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from unbatch.contractions import total_of_squares, vectors, wide
from unbatch.errors import MSG_HISTOGRAM, MSG_MAX_NORM, InputError
from unbatch.parts import Part
from unbatch.results import ByParameter, Histograms, Rows, SquaredNorms


@dataclass(frozen=True)
class About:
    """What a quantity may know of the question it is part of.

    ``weighted_sum(c)`` gives ``Σ_n c_n r_n`` by parameter, for the price of a gradient beside a quantity that is
    ``late``; ``gradient()`` the same for ``c = 1``. ``out``: buffers for rows that the caller gave. ``memory``: bytes
    that temporaries may take.
    """

    samples: int
    shapes: Mapping[str, tuple[int, ...]]
    by: str
    kind: str
    note: str
    weights: Callable[[], Tensor | None]
    like: Tensor
    gradient: Callable[[], Mapping[str, Tensor]]
    weighted_sum: Callable[[Tensor], Mapping[str, Tensor]]
    rest: Callable[[], Mapping[str, Tensor]]
    out: Mapping[str, Tensor]
    memory: int

    def result(self, tensors: Mapping[str, Tensor], cls: type[ByParameter] = ByParameter) -> Any:
        """The same tensors in the order of the parameters, labelled with what they were made of."""
        return cls({n: tensors[n] for n in self.shapes}, self.by, self.kind, self.note)


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
    def take(self, name: str, part: Part) -> None:
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


# --- basic ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Gradients(Basic):
    """The rows themselves: a ``Rows``, ``[N, *param]`` for each parameter; with ``rest`` they sum to ``∇L``."""

    def start(self, about: About) -> Collector:
        return _Rows(about)


class _Rows(Collector):
    def __init__(self, about: About) -> None:
        super().__init__(about)
        self.rows: dict[str, Tensor] = dict(about.out)

    def take(self, name: str, part: Part) -> None:
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
        return Rows(ordered, about.by, about.kind, about.note, about.weights(), about.rest())


@dataclass(frozen=True)
class Norms(Basic):
    """Squared norms ``‖r_n‖²``: ``[N]`` for each parameter, and ``.total`` over all."""

    needs = "squared_norms"

    def start(self, about: About) -> Collector:
        return _PerSample(about, lambda name, part: part.squared_norms())


class _PerSample(Collector):
    """One number for every sample and parameter."""

    def __init__(self, about: About, number: Callable[[str, Part], Tensor]) -> None:
        super().__init__(about)
        self.number = number
        self.found: dict[str, Tensor] = {}

    def take(self, name: str, part: Part) -> None:
        numbers = self.number(name, part)
        if name not in self.found:
            self.found[name] = numbers.new_zeros(self.about.samples)
        self.found[name][part.where] = numbers

    def finish(self) -> SquaredNorms:
        result: SquaredNorms = self.about.result(self.found, SquaredNorms)
        return result


@dataclass(frozen=True)
class Projections(Basic):
    """``⟨r_n, ḡ⟩``: ``[N]`` for each parameter, and ``.total`` over all."""

    def start(self, about: About) -> Collector:
        return _PerSample(about, lambda _, part: vectors(part.rows()) @ vectors(part.total()[None])[0])


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

    def take(self, name: str, part: Part) -> None:
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

    def __init__(self, about: About, share: Callable[[str, Part], Tensor], factor: float = 1) -> None:
        super().__init__(about)
        self.share, self.factor = share, factor
        self.found: dict[str, Tensor] = {}

    def take(self, name: str, part: Part) -> None:
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
        self.found: dict[str, Tensor] = {}
        self.so_far: dict[str, tuple[int, Tensor, Tensor]] = {}  # how many are in; their mean is the sum of two tensors

    def take(self, name: str, part: Part) -> None:
        first, last, _ = part.where.indices(self.about.samples)
        count = last - first
        if count == self.about.samples:
            self.found[name] = part.scatter()
            return
        rows = wide(part.rows())
        mean = rows.mean(0)
        share = total_of_squares(rows, mean)
        if name not in self.so_far:
            self.found[name], self.so_far[name] = share, (count, mean, torch.zeros_like(mean))
            return
        before, anchor, offset = self.so_far[name]  # kept apart, so that the mean is not rounded again and again
        apart = mean.sub_(anchor).sub_(offset)
        self.found[name].add_(share).add_(apart.abs().square_(), alpha=before * count / (before + count))
        self.so_far[name] = before + count, anchor, offset.add_(apart, alpha=count / (before + count))

    def finish(self) -> ByParameter:
        for t in self.found.values():
            t.div_(self.about.samples)
        result: ByParameter = self.about.result(self.found)
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

    def take(self, name: str, part: Part) -> None:
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

    def take(self, name: str, part: Part) -> None:
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


# --- derived --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ClippedSum(Derived):
    """``Σ_n r_n · min(1, max_norm/‖r_n‖)`` with the norm over all parameters: ``[*param]``.

    The sum that differentially private SGD adds noise to (Abadi et al. 2016, algorithm 1), ``max_norm`` in the scale of
    the rows. No rows are kept: norms first, then one weighted gradient.
    """

    max_norm: float
    late = True

    def __post_init__(self) -> None:
        if not self.max_norm > 0:
            raise InputError(MSG_MAX_NORM.format(value=self.max_norm))

    def bases(self) -> Sequence[Quantity]:
        return (Norms(),)

    def combine(self, about: About, *results: Any) -> ByParameter:
        (norms,) = results
        factors = (self.max_norm / norms.total.sqrt().clamp_min(torch.finfo(norms.total.dtype).tiny)).clamp_max(1)
        result: ByParameter = about.result(about.weighted_sum(factors))
        return result


@dataclass(frozen=True)
class SignalToNoise(Derived):
    """``mean² / variance`` of the rows, entry by entry: ``[*param]``; infinite without noise (Liu et al. 2020)."""

    moment = True

    def bases(self) -> Sequence[Quantity]:
        return (Variance(), Total())

    def combine(self, about: About, *results: Any) -> ByParameter:
        variance, gradient = results
        means = {n: (wide(gradient[n]) / about.samples).abs().square() for n in about.shapes}
        felt = _felt({n: means[n] + variance[n] for n in about.shapes})
        ratio = {n: torch.where(felt[n], means[n] / variance[n], 0.0) for n in about.shapes}
        result: ByParameter = about.result(ratio)
        return result


def _felt(moments: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Entries whose second moment is more than the square of rounding in the largest.

    A bias right below a batch norm, say, has rows that are zero but for rounding: its signal and its noise are nothing.
    """
    largest = max((float(m.max()) for m in moments.values() if m.numel()), default=0.0)
    return {n: m > (64 * torch.finfo(m.dtype).eps) ** 2 * largest for n, m in moments.items()}


def _per_pair(about: About, value: Tensor) -> Tensor:
    """Of one sample alone nothing is known about how samples differ: not a number."""
    return value if about.samples > 1 else torch.full_like(value, float("nan"))


def _squared(tensors: Mapping[str, Tensor]) -> Tensor:
    return torch.stack([wide(t).square().sum() for t in tensors.values()]).sum()


@dataclass(frozen=True)
class NoiseScale(Derived):
    """``tr(Σ) / ‖G‖²``, a number: how many samples it takes for a gradient to be half noise.

    The simple noise scale of McCandlish et al. 2018 (appendix A.1), with their unbiased estimates of numerator and
    denominator from the batch sizes 1 and N; it may come out negative where the gradient drowns in noise.
    """

    moment = True

    def bases(self) -> Sequence[Quantity]:
        return (Norms(), Total())

    def combine(self, about: About, *results: Any) -> Tensor:
        n, (norms, gradient) = about.samples, results
        single, whole = n**2 * norms.total.mean(), _squared(gradient)
        return _per_pair(about, n * (single - whole) / (n * whole - single))


def _ratios(n: int, norms: SquaredNorms, projections: SquaredNorms, gradient: ByParameter) -> tuple[Tensor, Tensor]:
    """``Σ‖g_n‖²/‖ḡ‖²`` and ``Σ⟨g_n, ḡ⟩²/‖ḡ‖⁴``."""
    whole = _squared(gradient)
    return n**2 * norms.total.sum() / whole, n**2 * projections.total.square().sum() / whole**2


@dataclass(frozen=True)
class NormTest(Derived):
    """``(Σ‖g_n‖²/‖ḡ‖² − N) / (N(N − 1))``, a number: the square of the least radius that passes
    (Byrd et al. 2012, equation 3.9; Cockpit, Schneider et al. 2021, reports its root).
    """

    moment = True

    def bases(self) -> Sequence[Quantity]:
        return (Norms(), Total())

    def combine(self, about: About, *results: Any) -> Tensor:
        n, (norms, gradient) = about.samples, results
        excess = n**2 * norms.total.sum() / _squared(gradient) - n
        return _per_pair(about, excess / max(n * (n - 1), 1))


@dataclass(frozen=True)
class InnerProductTest(Derived):
    """``(Σ⟨g_n, ḡ⟩²/‖ḡ‖⁴ − N) / (N(N − 1))``, a number: the square of the least
    radius that passes (Bollapragada et al. 2018; Cockpit reports its root).
    """

    moment = True

    def bases(self) -> Sequence[Quantity]:
        return (Norms(), Projections(), Total())

    def combine(self, about: About, *results: Any) -> Tensor:
        n, (_, shadows) = about.samples, _ratios(about.samples, *results)
        return _per_pair(about, (shadows - n) / max(n * (n - 1), 1))


@dataclass(frozen=True)
class OrthogonalityTest(Derived):
    """``Σ(‖g_n‖²/‖ḡ‖² − ⟨g_n, ḡ⟩²/‖ḡ‖⁴) / (N(N − 1))``, a number: the square of the least
    radius that passes (Bollapragada et al. 2018; Cockpit reports its root).
    """

    moment = True

    def bases(self) -> Sequence[Quantity]:
        return (Norms(), Projections(), Total())

    def combine(self, about: About, *results: Any) -> Tensor:
        n, (lengths, shadows) = about.samples, _ratios(about.samples, *results)
        return _per_pair(about, (lengths - shadows) / max(n * (n - 1), 1))


@dataclass(frozen=True)
class EarlyStopping(Derived):
    """``1 − (N/D) Σ_p ḡ_p²/s_p²``, ``s²`` the unbiased variance of the ``g_n``: a number; stop when it is positive.

    The evidence-based criterion of Mahsereci et al. 2017, "Early stopping without a validation set". The sum, and its
    ``D``, are over the entries that have noise at all; Cockpit adds 1e-5 to the variance of the others.
    """

    moment = True

    def bases(self) -> Sequence[Quantity]:
        return (Variance(), Total())

    def combine(self, about: About, *results: Any) -> Tensor:
        n, (variance, gradient) = about.samples, results
        noisy = torch.cat([f.flatten() for f in _felt(variance).values()])
        mean = torch.cat([wide(gradient[k]).flatten() for k in about.shapes])[noisy]
        spread = variance.flat()[noisy] * n**3 / max(n - 1, 1)
        evidence = n * (mean.abs().square() / spread).mean() if len(spread) else spread.new_zeros(())
        return _per_pair(about, 1 - evidence)
