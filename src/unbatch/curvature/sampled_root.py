"""Roots of the second derivative of the loss that are drawn: few columns, right on average.

Exact roots are in ``loss_hessian.py``. Legend as in ``hessian_root.py``.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from unbatch.autodiff.loss import LossAt
from unbatch.curvature.hessian_root import Factor, SampleRoot, SoftmaxRoot


def sampled(exact: SampleRoot, loss: LossAt, count: int, seed: int) -> Factor:
    """Return ``count`` columns for each sample whose mean square is H: unbiased.

    For H that is positive semi-definite. For a softmax labels are
    drawn, so the columns are gradients of the likelihood (Kunstner, Balles, Hennig 2019); otherwise
    they are Gaussian, which for squared errors is the same.
    """
    generator = torch.Generator(exact.like.device).manual_seed(seed)
    if isinstance(exact, SoftmaxRoot):
        p = exact.grid.split(loss.predictions).double().softmax(-1).to(exact.like)
        columns = _likelihood_columns(exact, p, count, generator)
    else:
        columns = _gaussian_columns(exact, count, generator)
    columns = columns / count**0.5
    # A drawn column runs through all positions of a sample: one position with all entries.
    grid = replace(exact.grid, axis=None)
    flat = [grid.split(exact.grid.join(column))[:, 0] for column in columns.unbind(-1)]
    root = torch.stack(flat, -1)[:, None]
    signs = torch.ones(len(root), 1, count, dtype=root.dtype, device=root.device)
    text = f"{count} draws a sample, seed {seed}"
    return Factor(grid, root, signs, exact.form, sampled=text)


def _gaussian_columns(exact: SampleRoot, count: int, generator: torch.Generator) -> Tensor:
    """Return ``S z`` for normal ``z``, ``[n, t, c, count]``: their covariance is ``S Sᵀ = H``."""
    n, t, _, k = exact.shape
    like = exact.like
    # Drawn in float64: the same draws in every precision.
    normal = torch.randn(
        n, t, k, count, generator=generator, dtype=torch.float64, device=like.device
    )
    drawn = [exact.grid.split(exact.times(z.flatten())) for z in normal.to(like).unbind(-1)]
    return torch.stack(drawn, -1)


def _likelihood_columns(
    exact: SoftmaxRoot, probabilities: Tensor, count: int, generator: torch.Generator
) -> Tensor:
    """Return ``√Q (p − e_y)`` for labels ``y`` drawn from p, ``[n, t, c, count]``.

    Their covariance is ``Q (diag p − ppᵀ) = H``.
    """
    flat = probabilities.double().flatten(0, 1)
    labels = torch.multinomial(flat, count, replacement=True, generator=generator)
    labels = labels.view(*exact.Q.shape, 1, count)
    columns = probabilities[..., None].repeat(1, 1, 1, count)
    columns.scatter_add_(2, labels, -torch.ones_like(labels, dtype=columns.dtype))
    return columns * exact.Q.abs().sqrt()[..., None, None]
