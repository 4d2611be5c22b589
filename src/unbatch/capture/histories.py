"""Tensors that a program keeps with their history: what autograd knows of how they were made.

Nothing can give a history back to a tensor that was cut off from it, or written to in place. So the
program is given another tensor, on the same memory and connected to the first, as long as it runs.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import parametrize

from unbatch.capture.holders import MISSING, Entries, Holder


class Weights(Entries):
    """Weights that PyTorch has made of parameters and keeps for a while, between all modules."""

    def __init__(self) -> None:
        pass

    @property
    def space(self) -> dict[Any, Any]:  # type: ignore[override]
        """The entries; another dict each time that PyTorch begins."""
        return parametrize._cache


# A tensor in its place: the holder, and the name there.
Kept = tuple[Holder, Hashable, Tensor]

# Beside it, what stands there for a while.
WithHistory = tuple[Holder, Hashable, Tensor, Tensor]


class _Connected(torch.autograd.Function):
    """The identity, as another tensor on the same memory and no view of the first."""

    @staticmethod
    def forward(ctx: Any, t: Tensor) -> Tensor:
        return t.data

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g


def connected(t: Tensor) -> Tensor:
    """Return another tensor on the same memory, made of the first and no view of it."""
    with torch.enable_grad():
        other: Tensor = _Connected.apply(t)
    return other


def replace_histories(places: Iterable[Kept], replaced: list[WithHistory]) -> None:
    """Put others in place of tensors that have a history; note which in ``replaced``."""
    others: dict[int, Tensor] = {}
    for holder, name, t in places:
        if t.grad_fn is None:
            continue
        if id(t) not in others:
            others[id(t)] = connected(t)
        holder.put(name, others[id(t)])
        replaced.append((holder, name, t, others[id(t)]))


def put_back_histories(replaced: Iterable[WithHistory]) -> None:
    """Put the tensors back, but where the program has put something else."""
    for holder, name, t, other in replaced:
        if dict(holder.values()).get(name, MISSING) is other:
            holder.put(name, t)
