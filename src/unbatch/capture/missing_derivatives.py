"""What is said where PyTorch comes to an op that has no derivative, or no kernel for a tensor."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

from unbatch.errors import MSG_NO_DERIVATIVE, MSG_NO_KERNEL, StructureError

MISSING = re.compile(r"derivative for '?(?:aten::)?(\w+)'? is not implemented")

# The first words of some fifty lines.
NO_KERNEL = re.compile(
    r"Could not run '(?:aten::)?([\w.]+)' with arguments from the '(\w+)' backend"
)


@contextmanager
def refused_if_missing() -> Iterator[None]:
    """Raise ``StructureError`` with the name of an op that has no derivative, or no kernel."""
    try:
        yield
    except RuntimeError as error:  # NotImplementedError is one
        if isinstance(error, StructureError):
            raise
        refusal = _refusal(str(error))
        if refusal is None:
            raise
        raise StructureError(refusal) from error


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
