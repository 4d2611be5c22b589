"""Products with an operator that is known by ``@`` alone, and random vectors to multiply it with.

``A`` is anything with ``shape`` ``[D, D]``, ``dtype``, ``device``, and ``@`` on ``[D]`` and
``[D, K]``. What is as long as D stays in its dtype (half precision: in float32) and on its device;
what is small, as a projection on a basis or a quadrature rule, is in float64 on the CPU.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from unbatch.linalg.probes import random_signs


def long_dtype(A: Any) -> torch.dtype:
    """Return the dtype of vectors of length D: that of A, float32 at least."""
    return torch.promote_types(A.dtype, torch.float32)


def times(A: Any, v: Tensor) -> Tensor:
    """Return ``A v`` in the dtype of ``v``, ``[D]`` or ``[D, K]``; multiplied in that of A."""
    product: Tensor = A @ v.to(A.dtype)
    return product.to(v.dtype)


def small(x: Tensor) -> Tensor:
    """Return a tensor whose size does not grow with D, in float64 on the CPU."""
    return x.cpu().double()


def gaussian_vectors(generator: torch.Generator, A: Any, K: int) -> Tensor:
    """Return K standard normal vectors, ``[D, K]``; drawn one after the other, on the CPU."""
    return torch.randn(K, A.shape[0], generator=generator, dtype=long_dtype(A)).T.to(A.device)


def sign_vectors(generator: torch.Generator, A: Any, K: int) -> Tensor:
    """Return K vectors of random signs, ``[D, K]``; drawn one after the other, on the CPU."""
    return random_signs(K * A.shape[0], generator).view(K, -1).T.to(A.device, long_dtype(A))
