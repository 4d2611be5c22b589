"""What is said where PyTorch has no derivative of an op, no kernel for a tensor, or no memory."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from unbatch.errors import (
    MSG_NO_DERIVATIVE,
    MSG_NO_KERNEL,
    MSG_NO_MEMORY,
    BudgetError,
    StructureError,
    UnbatchError,
)
from unbatch.rendering import in_bytes

MISSING = re.compile(r"derivative for '?(?:aten::)?(\w+)'? is not implemented")

# The first words of some fifty lines.
NO_KERNEL = re.compile(
    r"Could not run '(?:aten::)?([\w.]+)' with arguments from the '(\w+)' backend"
)

# What the allocator of a CPU says.
NO_MEMORY = re.compile(r"can't allocate memory: you tried to allocate (\d+) bytes")


@contextmanager
def refused_if_missing() -> Iterator[None]:
    """Raise ``StructureError`` with the name of an op that has no derivative, or no kernel.

    And ``BudgetError`` where memory was not given.
    """
    try:
        yield
    except MemoryError as error:
        raise BudgetError(MSG_NO_MEMORY.format(device="this machine", why=error)) from error
    except RuntimeError as error:  # NotImplementedError is one
        if isinstance(error, UnbatchError):
            raise
        memory = _lack_of_memory(error)
        if memory is not None:
            raise BudgetError(memory) from error
        refusal = _refusal(str(error))
        if refusal is None:
            raise
        raise StructureError(refusal) from error


def _lack_of_memory(error: RuntimeError) -> str | None:
    """Return what to say where memory was not given; None for another error."""
    text = str(error)
    if isinstance(error, torch.OutOfMemoryError):
        why = ". ".join(text.split(". ")[:2])  # the first two sentences, of many
        return MSG_NO_MEMORY.format(device="the device", why=why)
    # A CPU says it in an error of any kind.
    asked = NO_MEMORY.search(text)
    if asked is None:
        return None
    return MSG_NO_MEMORY.format(device="this machine", why=f"{in_bytes(int(asked[1]))} at once")


def _refusal(text: str) -> str | None:
    """Return what to say in place of an error of PyTorch's; None if it is of another kind."""
    missing = MISSING.search(text)
    if missing is not None:
        return MSG_NO_DERIVATIVE.format(op=missing[1])
    return without_kernel(text)


def without_kernel(text: str) -> str | None:
    """Return what to say of an op that has no kernel for a tensor; None for another error."""
    lacking = NO_KERNEL.search(text)
    if lacking is None:
        return None
    return MSG_NO_KERNEL.format(op=lacking[1], backend=lacking[2])
