"""Other values for the samples of a batch: what an experiment puts in place of a sample.

Knows tensors with samples along the first axis, and nothing about programs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

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
    if rows.dtype.itemsize == 1:
        # PyTorch does no arithmetic with numbers of eight bits.
        return variant_of(rows.float(), others.float(), variant, generator).to(rows.dtype)
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


def without_nan(inputs: Any, dims: Sequence[int | None], samples: int) -> Any:
    """Return inputs with other samples in the place of those that hold NaN.

    Runs cannot be compared on these. The same inputs where there are none, or no others; ``dims``:
    the sample axis of each leaf.
    """
    leaves, spec = tree_flatten(inputs)
    if not samples:
        return inputs
    bad = torch.zeros(samples, dtype=torch.bool)
    for leaf, dim in zip(leaves, dims, strict=True):
        if dim is not None and isinstance(leaf, Tensor) and leaf.is_floating_point():
            rows = leaf.detach().movedim(dim, 0)
            bad |= rows.isnan().reshape(samples, -1).any(1).cpu()
    if not bad.any() or bad.all():
        return inputs
    order = torch.arange(samples)
    good = (~bad).nonzero()[:, 0]
    order[bad] = good[torch.arange(int(bad.sum())) % len(good)]
    for i, dim in enumerate(dims):
        if dim is not None and isinstance(leaves[i], Tensor):
            leaves[i] = leaves[i].detach().index_select(dim, order.to(leaves[i].device))
    return tree_unflatten(leaves, spec)


def _other_labels(rows: Tensor, others: Tensor, variant: str) -> Tensor:
    """Return labels, tokens or masks of other samples: made-up ones might not be in range."""
    if variant in CLOSE_TO_DATA or rows.dtype == torch.bool:
        return others
    # A second source, so that the variants differ in discrete inputs as well.
    return others.roll(1, 0)
