"""Roots of the second derivative of the loss that are drawn: few columns, right on average.

Exact roots are in ``loss_hessian.py``. Legend as in ``hessian_root.py``.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from unbatch.autodiff.loss import LossAt
from unbatch.curvature.hessian_root import Factor
from unbatch.curvature.loss_hessian import SOFTMAX


def likelihood(exact: Factor, loss: LossAt) -> Tensor | None:
    """Return ``p``, ``[n, t, c]``, of which H is ``Q (diag p − ppᵀ)``: labels can be drawn.

    None for any other form.
    """
    if exact.form != SOFTMAX:
        return None
    return exact.grid.split(loss.predictions).double().softmax(-1).to(exact.root)


def sampled(exact: Factor, probabilities: Tensor | None, count: int, seed: int) -> Factor:
    """Return ``count`` columns for each sample whose mean square is H: unbiased.

    For H that is positive semi-definite. For a softmax (``probabilities`` ``[n, t, c]``) labels are
    drawn, so the columns are gradients of the likelihood (Kunstner, Balles, Hennig 2019); otherwise
    they are Gaussian, which for squared errors is the same.
    """
    generator = torch.Generator(exact.root.device).manual_seed(seed)
    if probabilities is None:
        columns = _gaussian_columns(exact.root, count, generator)
    else:
        columns = _likelihood_columns(exact.root, probabilities, count, generator)
    columns = columns / count**0.5
    # A drawn column runs through all positions of a sample: one position with all entries.
    grid = replace(exact.grid, axis=None)
    flat = [grid.split(exact.grid.join(column))[:, 0] for column in columns.unbind(-1)]
    root = torch.stack(flat, -1)[:, None]
    signs = torch.ones(len(root), 1, count, dtype=root.dtype, device=root.device)
    text = f"{count} draws a sample, seed {seed}"
    return Factor(grid, root, signs, exact.form, sampled=text)


def _gaussian_columns(root: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Return ``S z`` for normal ``z``, ``[n, t, c, count]``: their covariance is ``S Sᵀ = H``."""
    n, t, _, k = root.shape
    # Drawn in float64: the same draws in every precision.
    normal = torch.randn(
        n, t, k, count, generator=generator, dtype=torch.float64, device=root.device
    )
    return root @ normal.to(root)


def _likelihood_columns(
    root: Tensor, probabilities: Tensor, count: int, generator: torch.Generator
) -> Tensor:
    """Return ``√Q (p − e_y)`` for labels ``y`` drawn from p, ``[n, t, c, count]``.

    Their covariance is ``Q (diag p − ppᵀ) = H``; Q is had from ``tr H = Q (1 − Σ p²)``.
    """
    n, t, c, _ = root.shape
    flat = probabilities.double().flatten(0, 1)
    labels = torch.multinomial(flat, count, replacement=True, generator=generator)
    one_hot = torch.nn.functional.one_hot(labels, c).mT.view(n, t, c, count).to(root)
    # Where a softmax is saturated both are zero up to rounding, and so is Q.
    rest = (1 - probabilities.square().sum(-1)).clamp_min(1e-30)
    Q = root.square().sum((2, 3)) / rest
    return (probabilities[..., None] - one_hot) * Q.sqrt()[..., None, None]
