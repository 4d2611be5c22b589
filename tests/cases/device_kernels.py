"""The batch norms that PyTorch picks on a GPU, run on a CPU: its own kernels under their names.

A call goes the whole way that it goes on a GPU: through PyTorch's autograd formula for the op, and
through the backward op that this formula names. The kernels are there inside ``registered()`` only.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from cases.device_rows import RULE, Family, lent

aten = torch.ops.aten
ALL = [True, True, True]  # gradients by input, weight and bias

BATCH_NORMS = Family()
NORMS = ("tests/gradients/test_device_norms.py",)


@BATCH_NORMS.kernel("cudnn_batch_norm", "`nn.BatchNorm2d`", RULE, NORMS)
def cudnn_batch_norm(x: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    """Return a reserve as well, for the backward op, which is no number to derive by."""
    return *miopen_batch_norm(x, *arguments), x.new_empty(16, dtype=torch.uint8)


@BATCH_NORMS.kernel("miopen_batch_norm", "the same on ROCm", RULE, NORMS)
def miopen_batch_norm(
    x: Tensor,
    weight: Tensor,
    bias: Any,
    mean: Any,
    var: Any,
    training: bool,
    factor: float,
    eps: float,
) -> tuple[Tensor, ...]:
    result: tuple[Tensor, ...] = aten.native_batch_norm(
        x, weight, bias, mean, var, training, factor, eps
    )
    return result


@BATCH_NORMS.backward("miopen_batch_norm_backward")
def miopen_batch_norm_backward(
    x: Tensor,
    g: Tensor,
    weight: Tensor,
    mean: Any,
    var: Any,
    saved_mean: Tensor,
    saved_invstd: Tensor,
    eps: float,
) -> tuple[Tensor, ...]:
    kept = (mean, var, saved_mean, saved_invstd, True, eps)
    result: tuple[Tensor, ...] = aten.native_batch_norm_backward(g, x, weight, *kept, ALL)
    return result


@BATCH_NORMS.backward("cudnn_batch_norm_backward")
def cudnn_batch_norm_backward(x: Tensor, g: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    *arguments, reserve = arguments
    assert reserve.dtype == torch.uint8, "the reserve of the forward op comes back"
    return miopen_batch_norm_backward(x, g, *arguments)


def registered() -> AbstractContextManager[None]:
    """Inside, a CPU has the batch norms of a GPU."""
    return lent(BATCH_NORMS)
