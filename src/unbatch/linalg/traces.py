"""Unbiased estimates of a trace from products with random vectors.

Each estimator returns *terms*, whose mean is the estimate and whose spread gives its standard
error, and how many products it took. Arguments are checked in ``spectra.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from unbatch.linalg.products import gaussian_vectors, sign_vectors, small, times
from unbatch.running.tasks import task


def hutchinson(A: Any, samples: int, generator: torch.Generator) -> tuple[Tensor, int]:
    """Return ``zᵀAz`` for random signs z, one vector at a time (Hutchinson 1989)."""
    terms = []
    with task("Trace by random signs", samples, "products") as products:
        for _ in products.over(range(samples)):
            z = sign_vectors(generator, A, 1)[:, 0]
            terms.append(z @ times(A, z))
    return torch.stack(terms), samples


def hutch_plus_plus(A: Any, samples: int, generator: torch.Generator) -> tuple[Tensor, int]:
    """Return ``tr QᵀAQ + gᵀ (I − QQᵀ) A (I − QQᵀ) g`` for every random g.

    Q is an orthonormal basis of a sketch ``A S`` (Meyer, Musco, Musco, Woodruff 2021).
    """
    sketch = samples // 3
    Q = torch.linalg.qr(times(A, sign_vectors(generator, A, sketch)))[0]
    g = sign_vectors(generator, A, samples - 2 * sketch)
    g = g - Q @ (Q.T @ g)
    return (Q * times(A, Q)).sum() + (g * times(A, g)).sum(0), samples


def xtrace(A: Any, samples: int, generator: torch.Generator) -> tuple[Tensor, int]:
    """Return the terms of XTrace (Epperly, Tropp, Webber 2024), one for each of ``samples // 2``
    vectors.
    """
    # Each of K vectors ω takes the part of g in Hutch++, with the sketch Q₍ᵢ₎ of the K − 1 others:
    #   tᵢ = tr Q₍ᵢ₎ᵀ A Q₍ᵢ₎ + xᵢᵀ A xᵢ · (D − K + 1) / ‖xᵢ‖²,   xᵢ = (I − Q₍ᵢ₎Q₍ᵢ₎ᵀ) ωᵢ,
    # where the last factor is one on average, as ωᵢ has a random direction in D − K + 1 dimensions.
    # With A Ω = Q R, range Q₍ᵢ₎ is what Q spans without Q sᵢ, where sᵢ is orthogonal to all columns
    # of R but the i-th: Rᵀ sᵢ ∝ eᵢ. So
    #   Q₍ᵢ₎Q₍ᵢ₎ᵀ = Q (I − sᵢsᵢᵀ) Qᵀ,   xᵢ = ωᵢ − Q uᵢ,   uᵢ = (I − sᵢsᵢᵀ) wᵢ,   wᵢ = Qᵀ ωᵢ,
    # and with H = Qᵀ A Q, Qᵀ A ωᵢ = rᵢ (A is symmetric), ωᵢᵀ A ωᵢ = wᵢᵀ rᵢ, everything is small:
    #   tr Q₍ᵢ₎ᵀ A Q₍ᵢ₎ = tr H − sᵢᵀ H sᵢ,
    #   xᵢᵀ A xᵢ = wᵢᵀ rᵢ − 2 uᵢᵀ rᵢ + uᵢᵀ H uᵢ,
    #   ‖xᵢ‖² = ‖ωᵢ‖² − ‖uᵢ‖².
    D, K = A.shape[0], samples // 2
    omega = gaussian_vectors(generator, A, K)
    Q, R_ = torch.linalg.qr(times(A, omega))
    H, R, w = small(Q.T @ times(A, Q)), small(R_), small(Q.T @ omega)
    s = torch.linalg.solve_triangular(regular(R, A.dtype).T, torch.eye(K).to(R), upper=False)
    s = s / s.norm(dim=0)
    u = w - s * (s * w).sum(0)
    inside = H.trace() - (s * (H @ s)).sum(0)
    outside = ((w - 2 * u) * R + u * (H @ u)).sum(0)
    lengths = small(omega.square().sum(0)) - u.square().sum(0)
    return (inside + outside * (D - K + 1) / lengths).to(omega), 2 * K


def regular(R: Tensor, dtype: torch.dtype) -> Tensor:
    """Return R with a diagonal no smaller than rounding.

    Where A has too low a rank, that adds directions in the null space of A.
    """
    least = torch.finfo(dtype).eps * float(R.abs().max()) or 1.0
    entries = R.diagonal()
    return R + torch.diag(torch.where(entries.abs() < least, least - entries, 0.0))


class Method(NamedTuple):
    """``terms`` gives an estimate from ``least`` products or more."""

    terms: Callable[[Any, int, torch.Generator], tuple[Tensor, int]]
    least: int


METHODS = {
    "xtrace": Method(xtrace, 4),
    "hutch++": Method(hutch_plus_plus, 4),
    "hutchinson": Method(hutchinson, 2),
}
