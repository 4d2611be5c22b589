"""The other processes of a distributed training, which take no part in a question.

An op that needs them would wait for them forever. It is recognised before it runs, in forward and
backward passes alike, and refused.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch.distributed

from unbatch.errors import MSG_PROCESSES, CaptureError

# The namespaces of ops that all processes run together.
COLLECTIVES = frozenset(
    {"c10d", "c10d_functional", "_c10d_functional", "_c10d_functional_autograd"}
)

# PyTorch can be built without.
AVAILABLE = torch.distributed.is_available()

# The module of tensor classes that live on several processes, or are on their way.
SPREAD = "torch.distributed"


def check_alone(op: Any, types: Sequence[type], place: Callable[[], str] = str) -> None:
    """Raise ``CaptureError`` before an op that several processes run together.

    ``types``: the classes of its tensors that have rules of their own. ``place``: where the op
    stands in the program, as a phrase that ends the message.
    """
    others = _other_processes()
    if not others:
        return
    spread = any(kind.__module__.startswith(SPREAD) for kind in types)
    if spread or op.namespace in COLLECTIVES:
        raise CaptureError(MSG_PROCESSES.format(others=others, op=op, place=place()))


def _other_processes() -> int:
    if AVAILABLE and torch.distributed.is_initialized():
        return torch.distributed.get_world_size() - 1
    return 0
