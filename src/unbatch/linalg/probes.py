"""Random vectors on which identities are tested: Gaussian cotangents and tangents, and random
signs.

Numbers are drawn on the CPU from a generator with a seed, in a type of their own, and then brought
to where they are used: on every device and in every precision the same.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import TypeVar

import torch
from torch import Tensor

Key = TypeVar("Key", bound=Hashable)


def seeded(seed: int) -> torch.Generator:
    """Return a generator on the CPU."""
    return torch.Generator().manual_seed(seed)


def gaussian_like(t: Tensor, generator: torch.Generator) -> Tensor:
    """Return standard normal numbers of the shape, type and device of ``t``; drawn in float64."""
    return torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t)


def gaussians_like(tensors: Mapping[Key, Tensor], generator: torch.Generator) -> dict[Key, Tensor]:
    """Return ``gaussian_like`` for every tensor, drawn in the order of the mapping."""
    return {key: gaussian_like(t, generator) for key, t in tensors.items()}


def random_signs(count: int, generator: torch.Generator) -> Tensor:
    """Return ``count`` numbers out of 1 and -1, each as likely as the other; integers."""
    return torch.randint(2, (count,), generator=generator) * 2 - 1
