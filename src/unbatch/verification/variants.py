"""Other values for the samples of a batch: what an experiment puts in place of a sample.

Knows tensors with samples along the first axis, and nothing about programs.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Moderate values first. The others are there for branches that are only taken far from the data: a
# clamp that saturates, a threshold, a ``where`` on the size of an activation.
VARIANTS = ("rolled", "noisy", "large", "tiny", "zero", "huge")

# These keep samples close to the data, so every pair of samples is tried with them.
CLOSE_TO_DATA = ("rolled", "noisy")

# Far-out values are rounded more coarsely in whatever they are added up with.
GAIN = {"large": 1e2, "huge": 1e4}


def variant_of(rows: Tensor, others: Tensor, variant: str, generator: torch.Generator) -> Tensor:
    """Return other values for every row, of the same shape and type.

    ``others`` holds the rows of other samples, in the order in which they replace ``rows``.
    """
    if not rows.is_floating_point():
        return _other_labels(rows, others, variant)
    if variant == "rolled":
        return others
    noise = torch.randn(rows.shape, generator=generator, dtype=torch.float64).to(rows)
    spread = rows.abs().mean() + 1e-3
    if variant == "noisy":
        return others + 0.5 * spread * noise
    if variant == "large":
        return 30 * others + 30 * spread * noise
    if variant == "tiny":
        return 1e-3 * others
    if variant == "zero":
        return torch.zeros_like(others)
    return -1e4 * others + 1e4 * spread * noise


def _other_labels(rows: Tensor, others: Tensor, variant: str) -> Tensor:
    """Return labels, tokens or masks of other samples: made-up ones might not be in range."""
    if variant in CLOSE_TO_DATA or rows.dtype == torch.bool:
        return others
    # A second source, so that the variants differ in discrete inputs as well.
    return others.roll(1, 0)
