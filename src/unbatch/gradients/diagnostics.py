"""Derived quantities: a clipped sum, signal and noise, tests of whether a batch is large enough.

Each is a few lines over results of ``quantities.py``, whose legend holds here as well. A statistic
of how samples differ is not a number for one sample alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from unbatch.errors import MSG_MAX_NORM, InputError
from unbatch.gradients.quantities import (
    About,
    Derived,
    Projections,
    Quantity,
    SquaredNorms,
    Total,
    Variance,
)
from unbatch.gradients.results import ByParameter, SquaredNormsByParameter
from unbatch.linalg.precision import largest
from unbatch.linalg.rows import wide


@dataclass(frozen=True)
class ClippedSum(Derived):
    """``Σ_n r_n · min(1, max_norm/‖r_n‖)`` with the norm over all parameters: ``[*param]``.

    The sum that differentially private SGD adds noise to (Abadi et al. 2016, algorithm 1),
    ``max_norm`` in the scale of the rows. No rows are kept: norms first, then one weighted
    gradient.
    """

    max_norm: float
    late = True

    def __post_init__(self) -> None:
        if not self.max_norm > 0:
            raise InputError(MSG_MAX_NORM.format(value=self.max_norm))

    def bases(self) -> Sequence[Quantity]:
        return (SquaredNorms(),)

    def combine(self, about: About, *results: Any) -> ByParameter:
        (norms,) = results
        # A row of zeros has any factor; the smallest number keeps it from dividing by zero.
        tiny = torch.finfo(norms.total.dtype).tiny
        factors = (self.max_norm / norms.total.sqrt().clamp_min(tiny)).clamp_max(1)
        result: ByParameter = about.result(about.weighted_sum(factors))
        return result


@dataclass(frozen=True)
class SignalToNoise(Derived):
    """``mean² / variance`` of the rows, entry by entry: ``[*param]``; infinite without noise (Liu
    et al. 2020).
    """

    moment = True

    def bases(self) -> Sequence[Quantity]:
        return (Variance(), Total())

    def combine(self, about: About, *results: Any) -> ByParameter:
        variance, gradient = results
        signal, second_moments = {}, {}
        for name in about.shapes:
            signal[name] = (wide(gradient[name]) / about.samples).abs().square()
            second_moments[name] = signal[name] + variance[name]
        # Elsewhere it is nothing over nothing: no signal.
        significant = _above_rounding(second_moments)
        ratio = {}
        for name in about.shapes:
            ratio[name] = torch.where(significant[name], signal[name] / variance[name], 0.0)
        result: ByParameter = about.result(ratio)
        return result


ROUNDING = 64  # units in the last place that rounding may take


def _above_rounding(moments: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return which entries' second moments are more than the square of rounding in the largest.

    A bias right below a batch norm, say, has rows that are zero but for rounding: its signal and
    its noise are nothing.
    """
    # What is not finite is no rounding, and does not say how large rounding is.
    size = largest(m[m.isfinite()] for m in moments.values())
    significant = {}
    for name, moment in moments.items():
        rounding = (ROUNDING * torch.finfo(moment.dtype).eps) ** 2 * size
        significant[name] = ~(moment <= rounding)
    return significant


def _unless_alone(about: About, value: Tensor) -> Tensor:
    """Return a statistic of how samples differ; not a number where there is one sample only."""
    if about.samples > 1:
        return value
    return torch.full_like(value, float("nan"))


def _squared(tensors: Mapping[str, Tensor]) -> Tensor:
    """Return the squared norm over all parameters."""
    return torch.stack([wide(t).square().sum() for t in tensors.values()]).sum()


@dataclass(frozen=True)
class NoiseScale(Derived):
    """``tr(Σ) / ‖G‖²``, a number: how many samples it takes for a gradient to be half noise.

    The simple noise scale of McCandlish et al. 2018 (appendix A.1), with their unbiased estimates
    of numerator and denominator from the batch sizes 1 and N; it may come out negative where the
    gradient drowns in noise.
    """

    moment = True

    def bases(self) -> Sequence[Quantity]:
        return (SquaredNorms(), Total())

    def combine(self, about: About, *results: Any) -> Tensor:
        # ‖g‖² of one sample, on average, and ‖ḡ‖² of all N, are ‖G‖² + tr(Σ) and ‖G‖² + tr(Σ)/N on
        # average: two equations for the two unknowns.
        n, (norms, gradient) = about.samples, results
        of_sample, of_batch = n**2 * norms.total.mean(), _squared(gradient)
        return _unless_alone(about, n * (of_sample - of_batch) / (n * of_batch - of_sample))


def _ratios(
    n: int,
    norms: SquaredNormsByParameter,
    projections: SquaredNormsByParameter,
    gradient: ByParameter,
) -> tuple[Tensor, Tensor]:
    """Return ``Σ‖g_n‖²/‖ḡ‖²`` and ``Σ⟨g_n, ḡ⟩²/‖ḡ‖⁴``."""
    size = _squared(gradient)
    return n**2 * norms.total.sum() / size, n**2 * projections.total.square().sum() / size**2


@dataclass(frozen=True)
class NormTest(Derived):
    """``(Σ‖g_n‖²/‖ḡ‖² − N) / (N(N − 1))``, a number: the square of the least radius that passes
    (Byrd et al. 2012, equation 3.9; Cockpit, Schneider et al. 2021, reports its root).
    """

    moment = True

    def bases(self) -> Sequence[Quantity]:
        return (SquaredNorms(), Total())

    def combine(self, about: About, *results: Any) -> Tensor:
        n, (norms, gradient) = about.samples, results
        excess = n**2 * norms.total.sum() / _squared(gradient) - n
        return _unless_alone(about, excess / max(n * (n - 1), 1))


@dataclass(frozen=True)
class InnerProductTest(Derived):
    """``(Σ⟨g_n, ḡ⟩²/‖ḡ‖⁴ − N) / (N(N − 1))``, a number: the square of the least
    radius that passes (Bollapragada et al. 2018; Cockpit reports its root).
    """

    moment = True

    def bases(self) -> Sequence[Quantity]:
        return (SquaredNorms(), Projections(), Total())

    def combine(self, about: About, *results: Any) -> Tensor:
        n, (_, projections) = about.samples, _ratios(about.samples, *results)
        return _unless_alone(about, (projections - n) / max(n * (n - 1), 1))


@dataclass(frozen=True)
class OrthogonalityTest(Derived):
    """``Σ(‖g_n‖²/‖ḡ‖² − ⟨g_n, ḡ⟩²/‖ḡ‖⁴) / (N(N − 1))``, a number: the square of the least
    radius that passes (Bollapragada et al. 2018; Cockpit reports its root).
    """

    moment = True

    def bases(self) -> Sequence[Quantity]:
        return (SquaredNorms(), Projections(), Total())

    def combine(self, about: About, *results: Any) -> Tensor:
        n, (norms, projections) = about.samples, _ratios(about.samples, *results)
        return _unless_alone(about, (norms - projections) / max(n * (n - 1), 1))


@dataclass(frozen=True)
class EarlyStopping(Derived):
    """``1 − (N/D) Σ_p ḡ_p²/s_p²``, ``s²`` the unbiased variance of the ``g_n``: a number; stop when
    it is positive.

    The evidence-based criterion of Mahsereci et al. 2017, "Early stopping without a validation
    set". The sum, and its ``D``, are over the entries that have noise at all; Cockpit adds 1e-5 to
    the variance of the others.
    """

    moment = True

    def bases(self) -> Sequence[Quantity]:
        return (Variance(), Total())

    def combine(self, about: About, *results: Any) -> Tensor:
        n, (variance, gradient) = about.samples, results
        noisy = ByParameter(_above_rounding(variance)).flat()
        mean = wide(gradient.flat())[noisy]
        # From the biased variance of the r_n to the unbiased one of the g_n = N r_n.
        spread = variance.flat()[noisy] * n**3 / max(n - 1, 1)
        # Without any noise there is no evidence against stopping.
        if not len(spread):
            return _unless_alone(about, spread.new_ones(()))
        evidence = n * (mean.abs().square() / spread).mean()
        return _unless_alone(about, 1 - evidence)
