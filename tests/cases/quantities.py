"""Quantities of the rows of a gradient: each with its definition in plain lines, and its row in the
table of consequences.

Where definitions in the papers are in the scale of a mean loss, `g_n = N·r_n`: their mean is the
gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

import unbatch as ub
from unbatch.gradients.quantities import Projections, Quantity
from unbatch.reference import definitions as reference

Plain = dict[str, Tensor]

# ---------------------------------------------------------------- definitions


def per_loss(rows: Plain) -> Tensor:
    """`g_n`, `[N, D]`: as if the loss were the mean of the terms that the rows belong to."""
    return len(next(iter(rows.values()))) * reference.flat(rows)


def projections(rows: Plain) -> Plain:
    """Of every row on the sum of all, parameter by parameter."""
    return {k: torch.stack([(row * r.sum(0)).sum() for row in r]) for k, r in rows.items()}


def signal_to_noise(rows: Plain) -> Plain:
    """Liu et al. 2020 (GSNR): squared mean over variance; biased, as Cockpit's, and without its
    1e-5.
    """
    return {k: r.mean(0).square() / (r - r.mean(0)).square().mean(0) for k, r in rows.items()}


def noise_scale(rows: Plain) -> Tensor:
    """McCandlish et al. 2018, section 2.2 and appendix A.1, for the batch sizes 1 and N."""
    g = per_loss(rows)
    n = len(g)
    small, big = g.square().sum(1).mean(), g.mean(0).square().sum()
    squared_gradient = (n * big - 1 * small) / (n - 1)
    trace = (small - big) / (1 / 1 - 1 / n)
    return trace / squared_gradient


def norm_test(rows: Plain) -> Tensor:
    """Byrd et al. 2012, equation 3.9: sample variance over N, per squared gradient. Cockpit returns
    the root of it.
    """
    g = per_loss(rows)
    mean = g.mean(0)
    variance = (g - mean).square().sum() / (len(g) - 1)
    return variance / len(g) / mean.square().sum()


def inner_product_test(rows: Plain) -> Tensor:
    """Bollapragada et al. 2018, equation 2.6: sample variance of ⟨g_n, ḡ⟩. Cockpit returns the root
    of it.
    """
    g = per_loss(rows)
    mean = g.mean(0)
    variance = (g @ mean - mean @ mean).square().sum() / (len(g) - 1)
    return variance / len(g) / (mean @ mean).square()


def orthogonality_test(rows: Plain) -> Tensor:
    """Bollapragada et al. 2018, equation 3.3: variance of what is orthogonal to ḡ. Cockpit returns
    the root of it.
    """
    g = per_loss(rows)
    mean = g.mean(0)
    variance = sum((row - (row @ mean) / (mean @ mean) * mean).square().sum() for row in g) / (
        len(g) - 1
    )
    return variance / len(g) / mean.square().sum()


def early_stopping(rows: Plain) -> Tensor:
    """Mahsereci et al. 2017: `1 − N · mean over entries of ḡ²/s²`; Cockpit divides by `s² + 1e-5`
    and counts all.
    """
    g = per_loss(rows)
    noise = g.var(0, unbiased=True)
    noisy = noise > 0
    return 1 - len(g) * (g.mean(0)[noisy].square() / noise[noisy]).mean()


BINS, LOW, HIGH = 7, -0.5, 1.0
EDGES = [LOW + (HIGH - LOW) * i / BINS for i in range(BINS + 1)]


def histogram(rows: Plain) -> Plain:
    """Cockpit's, of `g_n`, for each parameter; what lies beyond the edges is not moved into the
    outer bins.
    """
    n = len(next(iter(rows.values())))
    counted = {}
    for k, r in rows.items():
        bins = [((n * r >= low) & (n * r < high)).sum() for low, high in pairwise(EDGES)]
        counted[k] = torch.stack(bins)
    return counted


CLIP = 0.3


def clipped_sum(rows: Plain) -> Plain:
    """Abadi et al. 2016, algorithm 1: every row divided by `max(1, ‖row‖/C)`."""
    norms = reference.flat(rows).norm(dim=1)
    return {
        k: sum(row / max(1.0, norm / CLIP) for row, norm in zip(r, norms, strict=True))
        for k, r in rows.items()
    }


# ---------------------------------------------------------------- the table


@dataclass(frozen=True)
class Asked:
    """A quantity, its definition, and of which degree in the rows it is.

    `row`: in the table of consequences; empty for one that is not public. `moment`: it is a
    statistic over samples, and warns where rows are none. `ratio`: of entries, one by one; those
    that are zero but for rounding have no ratio.
    """

    quantity: Quantity
    definition: Callable[[Plain], Any]
    degree: int
    row: str
    moment: bool = False
    ratio: bool = False

    @property
    def name(self) -> str:
        return type(self.quantity).__name__


TESTS = "norm, inner product and orthogonality tests"

ASKED = [
    Asked(ub.Gradients(), lambda rows: rows, 1, "per-sample gradients"),
    Asked(
        ub.SquaredNorms(),
        lambda rows: reference.squared_norms(rows)[0],
        2,
        "squared gradient norms",
    ),
    Asked(Projections(), projections, 2, ""),
    Asked(ub.SumOfSquares(), reference.sum_of_squares, 2, "sum of squared gradients"),
    Asked(ub.SecondMoment(), reference.second_moment, 2, "second moment of gradients", moment=True),
    Asked(ub.Variance(), reference.variance, 2, "gradient variance", moment=True),
    Asked(ub.Dots(), reference.dots, 2, "Gram matrix of gradients"),
    Asked(ub.SignalToNoise(), signal_to_noise, 0, "signal-to-noise", moment=True, ratio=True),
    Asked(ub.Histogram(BINS, LOW, HIGH), histogram, 0, "gradient histogram"),
    Asked(ub.NoiseScale(), noise_scale, 0, "gradient noise scale", moment=True),
    Asked(ub.NormTest(), norm_test, 0, TESTS, moment=True),
    Asked(ub.InnerProductTest(), inner_product_test, 0, TESTS, moment=True),
    Asked(ub.OrthogonalityTest(), orthogonality_test, 0, TESTS, moment=True),
    Asked(
        ub.EarlyStopping(), early_stopping, 0, "early stopping criterion", moment=True, ratio=True
    ),
    Asked(ub.ClippedSum(CLIP), clipped_sum, 1, "clipped sum"),
]
