"""The other processes of a distributed training: they take no part in a question, and would keep it waiting forever.

What needs them can be seen op by op, in forward and backward passes alike, and is refused before it runs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch.distributed

from unbatch.errors import MSG_PROCESSES, CaptureError

COLLECTIVES = frozenset(
    {"c10d", "c10d_functional", "_c10d_functional", "_c10d_functional_autograd"}
)  # namespaces


AVAILABLE = torch.distributed.is_available()  # PyTorch can be built without


SPREAD = "torch.distributed"  # where tensors are defined that live on several processes, or are on their way


def check_alone(op: Any, types: Sequence[type], place: Callable[[], str] = str) -> None:
    """Raises ``CaptureError`` before an op that several processes run together.

    ``types``: the classes of tensors that it is given and that have rules of their own. ``place``: in the program.
    """
    others = _others()
    if others and (
        op.namespace in COLLECTIVES or any(t.__module__.startswith(SPREAD) for t in types)
    ):
        raise CaptureError(MSG_PROCESSES.format(others=others, op=op, place=place()))


def _others() -> int:
    grouped = AVAILABLE and torch.distributed.is_initialized()
    return torch.distributed.get_world_size() - 1 if grouped else 0
